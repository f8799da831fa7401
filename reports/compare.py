"""Comparing runs: one row per setting, averaged over seeds, with the significance of each difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from config import FLAGS, NOT_IN_NAME, Config, make_config
from core.errors import LabError, choose
from metrics import is_recall
from reports.gallery import ranks_of
from retrieval.statistics import MIN_SEEDS, TEST_IMAGES_ONLY, Comparison, compare_settings, paired_test
from utils import Run

BASELINE, OTHER_GALLERY, TOO_FEW = "baseline", "not compared: another gallery", "too few seeds"
WORDS = {True: "higher", False: "lower", None: "no significant difference"}


def settings_label(config: Config) -> str:
    """How a run differs from its preset, seed and folders aside: `plain`, `bn`, `attn, num_epochs=2`."""
    flags = [short for field, short in FLAGS.items() if config[field]]
    fields = [n for n in config.differences(make_config(config.preset)) if n not in {*FLAGS, *NOT_IN_NAME}]
    return ", ".join([*flags, *(f"{name}={config[name]}" for name in fields)]) or "plain"


def differing_fields(runs: Mapping[str, Config]) -> pd.DataFrame:
    """Fields in which the configurations differ, seeds and folders aside: one row per field, one column per name."""
    dumped = {name: config.model_dump(mode="json") for name, config in runs.items()}
    table = pd.DataFrame({name: {k: str(v) for k, v in values.items()} for name, values in dumped.items()})
    differ = table.nunique(axis=1) > 1
    return table[differ & ~table.index.isin(NOT_IN_NAME - {"preset"})].rename_axis("field")


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

    def row(self) -> dict[str, Any]:
        """Split, protocol and size of its gallery, number of seeds, mean training time in seconds, and figures."""
        metrics = self.runs[0].metrics[self.split]
        protocol = {"split": self.split, "protocol": metrics["protocol"]}
        sizes = {"images": metrics["num_images"], "captions": metrics["num_texts"]}
        seconds = [run.training.get("train_seconds", math.nan) for run in self.runs]
        seeds = {"seeds": len(self.runs), "seconds": sum(seconds) / len(seconds)}
        return {**protocol, **sizes, **seeds, **self.figures.mean(), **self.figures.std().add_suffix("_std")}


def judged_figures(settings: Sequence[Setting]) -> list[str]:
    """Recall@1 in both directions, or the first two metrics if there is none."""
    names = [str(name) for name in settings[0].figures]
    recalls = [name for name in names if is_recall(name) and name.endswith("@1")]
    return recalls or names[:2]


def comparison_table(
    settings: Sequence[Setting], baseline: str | None = None, metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """See `evaluate.compare_runs`."""
    by_run = {run.name: setting for setting in settings for run in setting.runs}
    by_label = {setting.label: setting for setting in settings}
    base = settings[0] if baseline is None else choose({**by_run, **by_label}, baseline, "baseline")
    judged = metrics or judged_figures(settings)
    rows = [
        {
            "run": setting.label,
            **setting.row(),
            **{f"{name}_verdict": verdict(setting, base, name) for name in judged},
        }
        for setting in settings
    ]
    return pd.DataFrame(rows).set_index("run")


def verdict(setting: Setting, base: Setting, metric: str) -> str:
    """How a figure of a setting compares with the baseline's; see `evaluate.compare_runs`."""
    if setting is base:
        return BASELINE
    if setting.gallery != base.gallery:
        return OTHER_GALLERY
    if metric not in setting.figures or metric not in base.figures:
        return f"not compared: {metric} was not measured for both"
    counts = {len(setting.runs), len(base.runs)}
    if min(counts) >= MIN_SEEDS:
        result = compare_settings(setting.figures[metric].tolist(), base.figures[metric].tolist())
        return WORDS[result.difference > 0 if result.is_difference else None]
    if counts == {1} and is_recall(metric):
        test = paired_test_of(setting.runs[0], base.runs[0], metric)
        p_value = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.3f}"
        word = WORDS[test.difference > 0 if test.is_difference else None]
        return f"{word} ({TEST_IMAGES_ONLY}, {p_value})"
    return TOO_FEW


def paired_test_of(first: Run, second: Run, metric: str = "i2t_recall@1") -> Comparison:
    """The paired test of two runs on their first test split, from their saved features; nothing is encoded again.

    Raises: LabError if they were measured on different galleries.
    """
    splits = [run.test_split for run in (first, second)]
    galleries = [run.metrics[split]["gallery"] for run, split in zip((first, second), splits, strict=True)]
    if galleries[0] != galleries[1]:
        raise LabError(
            f"{first.name} and {second.name} were measured on different galleries; evaluate both on the same data."
        )
    return paired_test(ranks_of(first, splits[0]), ranks_of(second, splits[1]), metric)
