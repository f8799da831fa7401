"""Runs side by side: one row a setting, its seeds averaged, and what is and is not a difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from config import FLAGS, NOT_IN_NAME, Config, make_config
from errors import LabError, choose
from measure import as_text, figures_of, is_recall, measured, ranks_of
from runs import Run, load_run
from uncertainty import MIN_SEEDS, TEST_SAMPLE_ONLY, PairedTest, compare_settings, paired_test

BASELINE, OTHER_GALLERY, TOO_FEW = "baseline", "not compared: another gallery", "too few seeds"
WORDS = {True: "higher", False: "lower", None: "no difference shown"}


def finished_runs(runs_dir: str | Path, preset: str | None = None) -> list[Run]:
    """Every finished run of a preset, or of all, by name."""
    folders = sorted(path.parent for path in Path(runs_dir).glob("*/training.json"))
    runs = [load_run(folder) for folder in folders]
    return [run for run in runs if run.finished and preset in (None, run.config.preset)]


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
        return self.runs[0].config.test_splits[0]

    @property
    def about(self) -> dict[str, Any]:
        """Its gallery in words, how many seeds, and mean seconds of training."""
        found = self.runs[0].metrics[self.split]
        protocol = {"split": self.split, "protocol": found["protocol"]}
        sizes = {"images": found["num_images"], "captions": found["num_texts"]}
        seconds = [run.training.get("train_seconds", math.nan) for run in self.runs]
        return {**protocol, **sizes, "seeds": len(self.runs), "seconds": sum(seconds) / len(seconds)}


def group_settings(runs: Sequence[Run], *, show: bool = True) -> list[Setting]:
    """Runs that differ in nothing but the seed, together, in the order given; evaluated where they are not yet.

    Raises: LabError if there is no run.
    """
    if not runs:
        raise LabError("there is no finished run to compare; train one first.")
    several = len({run.config.preset for run in runs}) > 1
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        label = settings_label(run.config)
        label = f"{run.config.preset}: {label}" if several else label
        found = measured(run, show=show)[run.config.test_splits[0]]
        groups.setdefault((label, found["gallery"]), []).append(run)
    return [_setting(label, group, gallery) for (label, gallery), group in groups.items()]


def _setting(label: str, runs: list[Run], gallery: str) -> Setting:
    figures = [figures_of(run.metrics[run.config.test_splits[0]]) for run in runs]
    return Setting(label, runs, pd.DataFrame(figures, index=[run.name for run in runs]), gallery)


def compare_runs(
    runs: Sequence[Run],
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    *,
    show: bool = True,
) -> pd.DataFrame:
    """One row a setting: protocol, seeds, mean and standard deviation of its figures, and verdicts.

    Figures are of the first test split, recalls in [0, 1]; `_std` over seeds is nan for a single one. Each of
    `metrics` has a column `_verdict` against the baseline: `higher`, `lower` or `no difference shown` where both
    have three seeds or more (Welch's interval of the difference of means); for two single runs on one gallery the
    paired test, marked `test sample only`, which says nothing of another seed's training; else `too few seeds`.

    Args:
        baseline: a setting's label or a run's name; None: the first.
        metrics: figures to judge; None: Recall@1 both ways, or the first two figures where there is none.
    Raises: LabError if there is no run or no such baseline.
    """
    return comparison_table(group_settings(runs, show=show), baseline, metrics)


def comparison_table(
    settings: Sequence[Setting], baseline: str | None = None, metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """`compare_runs` of runs that are grouped already."""
    base = _baseline(settings, baseline)
    judged = metrics or judged_figures(settings)
    rows = []
    for setting in settings:
        spread = setting.figures.std().add_suffix("_std")
        verdicts = {f"{name}_verdict": verdict(setting, base, name) for name in judged}
        means = setting.figures.mean()
        rows.append({"run": setting.label, **setting.about, **means, **spread, **verdicts})
    return pd.DataFrame(rows).set_index("run")


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


def verdict(setting: Setting, base: Setting, metric: str) -> str:
    """What may be said of a figure of a setting against the baseline's; see `compare_runs`."""
    if setting is base:
        return BASELINE
    if setting.gallery != base.gallery:
        return OTHER_GALLERY
    if metric not in setting.figures or metric not in base.figures:
        return f"not compared: {metric} is not known of both"
    counts = {len(setting.runs), len(base.runs)}
    if min(counts) >= MIN_SEEDS:
        found = compare_settings(setting.figures[metric].tolist(), base.figures[metric].tolist())
        return WORDS[found.difference > 0 if found.is_difference else None]
    if counts == {1} and is_recall(metric):
        return told_test(paired_test_of(setting.runs[0], base.runs[0], metric))
    return TOO_FEW


def paired_test_of(first: Run, second: Run, metric: str = "i2t_recall@1") -> PairedTest:
    """The paired test of two runs on their first test split, from the ranks they kept; nothing is encoded again.

    Raises: LabError if they were measured on different galleries.
    """
    splits = [run.config.test_splits[0] for run in (first, second)]
    galleries = [run.metrics[split]["gallery"] for run, split in zip((first, second), splits, strict=True)]
    if galleries[0] != galleries[1]:
        raise LabError(
            f"{first.name} and {second.name} were measured on different galleries; evaluate both on the same data."
        )
    return paired_test(ranks_of(first, splits[0]), ranks_of(second, splits[1]), metric)


def told_test(found: PairedTest) -> str:
    """A paired test in words: `higher (test sample only, p = 0.003)`."""
    word = WORDS[found.difference > 0 if found.is_difference else None]
    p_value = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    return f"{word} ({TEST_SAMPLE_ONLY}, {p_value})"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare_runs` for people: recalls in percent as `mean ± std`, verdicts beside them."""
    shown = table[["split", "protocol", "images", "captions", "seeds"]].copy()
    shown["training (s)"] = table["seconds"].round()
    for name in [str(name) for name in table if f"{name}_std" in table]:
        shown[name] = [_mean_and_spread(row, name) for _, row in table.iterrows()]
        if f"{name}_verdict" in table:
            shown[f"{name} against {BASELINE}"] = table[f"{name}_verdict"]
    return shown


def _mean_and_spread(row: pd.Series, name: str) -> str:
    mean, spread = row[name], row[f"{name}_std"]
    return as_text(name, mean) + ("" if math.isnan(spread) else f" ± {as_text(name, spread)}")


def differing_fields(runs: Mapping[str, Config]) -> pd.DataFrame:
    """Fields in which the configurations differ, seeds and places apart: a row a field, a column a name."""
    dumped = {name: config.model_dump(mode="json") for name, config in runs.items()}
    table = pd.DataFrame({name: {k: str(v) for k, v in values.items()} for name, values in dumped.items()})
    differ = table.nunique(axis=1) > 1
    return table[differ & ~table.index.isin(NOT_IN_NAME - {"preset"})]
