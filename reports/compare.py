"""Runs side by side: a row a setting, seeds averaged, what is and is not a difference; the page that tells it."""

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

# --- Comparison ---


BASELINE, OTHER_GALLERY, TOO_FEW = "baseline", "not compared: another gallery", "too few seeds"
WORDS = {True: "higher", False: "lower", None: "no difference shown"}


def opened(folder: Path, load: Callable[[Path], Run]) -> Run | None:
    """A run, or None where its folder is damaged, which is said: one of ten must not stop the others."""
    try:
        return load(folder)
    except LabError as error:
        print(f"{folder} is left out: {error}")
        return None


def flag_settings(config: Config) -> list[Config]:
    """The configuration under each setting of the flags; a cached image tower has no map to pool."""
    pooling = (False,) if config.image_tower_mode == "cached" else (False, True)
    flags = [
        {"use_batch_norm": norm, "use_attention_pooling": pool} for norm in (False, True) for pool in pooling
    ]
    return [config.updated(**setting) for setting in flags]


def settings_label(config: Config) -> str:
    """What sets a run apart from its preset, seed and places apart: `plain`, `bn`, `attn, num_epochs=2`."""
    flags = [short for field, short in FLAGS.items() if config[field]]
    fields = [n for n in config.differences(make_config(config.preset)) if n not in {*FLAGS, *NOT_IN_NAME}]
    return ", ".join([*flags, *(f"{name}={config[name]}" for name in fields)]) or "plain"


@dataclass(frozen=True)
class Setting:
    """The runs of one configuration, a seed each, on one gallery.

    Args:
        figures: a row a run.
        gallery: fingerprint of what they were measured on.
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
        """Its gallery in words, how many seeds, and mean seconds of training."""
        found = self.runs[0].metrics[self.split]
        protocol = {"split": self.split, "protocol": found["protocol"]}
        sizes = {"images": found["num_images"], "captions": found["num_texts"]}
        seconds = [run.training.get("train_seconds", math.nan) for run in self.runs]
        return {**protocol, **sizes, "seeds": len(self.runs), "seconds": sum(seconds) / len(seconds)}


def judged_figures(settings: Sequence[Setting]) -> list[str]:
    """Recall@1 both ways, or the first two figures where there is none."""
    names = [str(name) for name in settings[0].figures]
    recalls = [name for name in names if is_recall(name) and name.endswith("@1")]
    return recalls or names[:2]


def _baseline(settings: Sequence[Setting], wanted: str | None) -> Setting:
    if wanted is None:
        return settings[0]
    by_run = {run.name: setting for setting in settings for run in setting.runs}
    return choose({**by_run, **{setting.label: setting for setting in settings}}, wanted, "baseline")


def told_test(found: PairedTest) -> str:
    """A paired test in words: `higher (test sample only, p = 0.003)`."""
    word = WORDS[found.difference > 0 if found.is_difference else None]
    p_value = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    return f"{word} ({TEST_SAMPLE_ONLY}, {p_value})"


def _mean_and_spread(row: pd.Series, name: str) -> str:
    mean, spread = row[name], row[f"{name}_std"]
    return as_text(name, mean) + ("" if math.isnan(spread) else f" ± {as_text(name, spread)}")


def differing_fields(runs: Mapping[str, Config]) -> pd.DataFrame:
    """Fields in which the configurations differ, seeds and places apart: a row a field, a column a name."""
    dumped = {name: config.model_dump(mode="json") for name, config in runs.items()}
    table = pd.DataFrame({name: {k: str(v) for k, v in values.items()} for name, values in dumped.items()})
    differ = table.nunique(axis=1) > 1
    return table[differ & ~table.index.isin(NOT_IN_NAME - {"preset"})]
