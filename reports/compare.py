"""Comparing runs: one row per setting, averaged over seeds, with the significance of each difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from config import FLAGS, NOT_IN_NAME, Config, make_config
from core.errors import LabError, choose
from metrics import as_text, is_recall
from retrieval.statistics import TEST_SAMPLE_ONLY, PairedTest
from utils import Run

BASELINE, OTHER_GALLERY, TOO_FEW = "baseline", "not compared: another gallery", "too few seeds"
WORDS = {True: "higher", False: "lower", None: "no significant difference"}


def opened(folder: Path, load: Callable[[Path], Run]) -> Run | None:
    """A run, or None with a printed message if its folder is damaged, so that the other runs are still compared."""
    try:
        return load(folder)
    except LabError as error:
        print(f"{folder} is left out: {error}")
        return None


def settings_label(config: Config) -> str:
    """How a run differs from its preset, seed and folders aside: `plain`, `bn`, `attn, num_epochs=2`."""
    flags = [short for field, short in FLAGS.items() if config[field]]
    fields = [n for n in config.differences(make_config(config.preset)) if n not in {*FLAGS, *NOT_IN_NAME}]
    return ", ".join([*flags, *(f"{name}={config[name]}" for name in fields)]) or "plain"


@dataclass(frozen=True)
class Setting:
    """The runs of one configuration, one per seed, on one gallery.

    Args:
        figures: one row per run.
        gallery: fingerprint of the images and captions they were measured on.
    """

    label: str
    runs: list[Run]
    figures: pd.DataFrame
    gallery: str

    @property
    def split(self) -> str:
        return self.runs[0].test_split

    @property
    def about(self) -> dict[str, Any]:
        """Split, protocol and size of its gallery, number of seeds, mean training time in seconds."""
        metrics = self.runs[0].metrics[self.split]
        protocol = {"split": self.split, "protocol": metrics["protocol"]}
        sizes = {"images": metrics["num_images"], "captions": metrics["num_texts"]}
        seconds = [run.training.get("train_seconds", math.nan) for run in self.runs]
        return {**protocol, **sizes, "seeds": len(self.runs), "seconds": sum(seconds) / len(seconds)}


def judged_figures(settings: Sequence[Setting]) -> list[str]:
    """Recall@1 in both directions, or the first two metrics if there is none."""
    names = [str(name) for name in settings[0].figures]
    recalls = [name for name in names if is_recall(name) and name.endswith("@1")]
    return recalls or names[:2]


def _baseline(settings: Sequence[Setting], name: str | None) -> Setting:
    """The setting with this label or with a run of this name; by default the first."""
    if name is None:
        return settings[0]
    by_run = {run.name: setting for setting in settings for run in setting.runs}
    return choose({**by_run, **{setting.label: setting for setting in settings}}, name, "baseline")


def verdict_of(test: PairedTest) -> str:
    """A paired test in words: `higher (test sample only, p = 0.003)`."""
    word = WORDS[test.difference > 0 if test.is_difference else None]
    p_value = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.3f}"
    return f"{word} ({TEST_SAMPLE_ONLY}, {p_value})"


def _mean_and_spread(row: pd.Series, name: str) -> str:
    mean, spread = row[name], row[f"{name}_std"]
    return as_text(name, mean) + ("" if math.isnan(spread) else f" ± {as_text(name, spread)}")


def differing_fields(runs: Mapping[str, Config]) -> pd.DataFrame:
    """Fields in which the configurations differ, seeds and folders aside: one row per field, one column per name."""
    dumped = {name: config.model_dump(mode="json") for name, config in runs.items()}
    table = pd.DataFrame({name: {k: str(v) for k, v in values.items()} for name, values in dumped.items()})
    differ = table.nunique(axis=1) > 1
    return table[differ & ~table.index.isin(NOT_IN_NAME - {"preset"})]
