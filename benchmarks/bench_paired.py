"""Side-by-side images: the plain and the full setting, and the effect of the swap margin.

`python -m benchmarks paired` trains everything below and prints one table a data set; a finished run is reused.
`python -m benchmarks paired --tiny` tests the command in a minute on a few images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from config import make_config
from dataset import prepare_data
from labs.side_by_side import PairResult, evaluate_pairs
from metrics import as_text
from reports.compare import settings_label
from retrieval.statistics import compare_settings
from train import fit
from utils import Run

ROOT = Path(__file__).resolve().parent.parent
CIFAR10 = [ROOT.parent / "shared" / "cifar10", ROOT / "data" / "cifar10"]
SETTINGS = (("paired_small_baseline", 0.0), ("paired_small", 0.0), ("paired_small", 1.0))
"""Preset, and weight of the swap margin."""
FIGURES = ("top1", "top10", "top100", "top1_same", "top1_different", "swapped", "order")
SEEDS = (0, 1, 2)
PAIRS_PER_EPOCH = 4000  # of CIFAR-10's 18,000 training images, in turn
TINY: dict[str, Any] = dict(
    max_samples=60, num_epochs=2, image_width=16, image_num_layers=1, image_num_heads=2
)


def measure(title: str, seeds: tuple[int, ...], **overrides: Any) -> None:
    """Train every setting with every seed, and print their tables on training and on test images."""
    measured: dict[str, list[tuple[Run, dict[str, Any]]]] = {"train": [], "test": []}
    for preset, weight in SETTINGS:
        config = make_config(preset, swap_weight=weight, **overrides)
        prepare_data(config)
        for seed in seeds:
            run = fit(config.updated(seed=seed))
            results = evaluate_pairs(run, tuple(measured), show=False)
            for split, rows in measured.items():
                rows.append((run, results[split].metrics))
            print(one_line(run, results["test"]), flush=True)
    for split, rows in measured.items():
        captions = rows[0][1]["num_texts"]
        print(f"\n{title}: {split} images against {captions} captions, %, mean ± std over seeds {seeds}")
        print(settings_table(rows).to_string())
    verdicts(measured["test"])


def settings_table(results: Sequence[tuple[Run, dict[str, Any]]]) -> pd.DataFrame:
    """One row per preset and setting, in percent as mean ± standard deviation over seeds.

    Args: results: each run with its metrics of one split, see `PairResult.metrics`.
    """
    rows = []
    for run, metrics in results:
        label = f"{run.config.preset}: {settings_label(run.config)}"
        rows.append({"setting": label, **{name: metrics[name] for name in FIGURES if name in metrics}})
    table = {}
    for setting, group in pd.DataFrame(rows).groupby("setting", sort=False):
        means = {name: as_text(name, group[name].mean(), std=group[name].std()) for name in group.columns[1:]}
        table[str(setting)] = {"seeds": len(group), **means}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("setting")


def one_line(run: Run, result: PairResult) -> str:
    """One run's test figures with the interval of its top-1 over pairs."""
    metrics = result.metrics
    figures = ", ".join(f"{name} {100 * metrics[name]:.1f}" for name in FIGURES if name in metrics)
    interval = f"[{100 * metrics['top1_low']:.1f}, {100 * metrics['top1_high']:.1f}]"
    seconds = run.training["train_seconds"]
    return f"{run.name}: {figures}; top1 {interval}; {metrics['num_swapped']} swapped; {seconds:.0f} s"


def verdicts(rows: list[tuple[Run, dict[str, Any]]]) -> None:
    """Whether the full setting is better than the plain one, and what the margin changes, over seeds."""
    plain, full, margin = (
        [metrics for run, metrics in rows if (run.config.preset, run.config.swap_weight) == setting]
        for setting in SETTINGS
    )
    for sides, names in (((plain, full), ("plain", "full")), ((full, margin), ("no margin", "margin"))):
        for name in ("top1", "swapped"):
            first, second = ([metrics[name] for metrics in side] for side in sides)
            test = compare_settings(first, second)
            print(f"{name}, {' - '.join(names)}: {test.difference:+.4f} [{test.low:+.4f}, {test.high:+.4f}]")


def main() -> None:
    """Generated shapes, then CIFAR-10's class folders if they exist."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few images, two epochs, two seeds")
    parser.add_argument("--data", choices=("shapes", "cifar10"), help="one data set alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    places: dict[str, Any] = {"runs_dir": ROOT / "runs" / "bench_paired", "cache_dir": ROOT / "cache"}
    some = {**places, **(TINY if given.tiny else {})}
    seeds = tuple(given.seeds[:2] if given.tiny else given.seeds)
    if given.data != "cifar10":
        measure("generated shapes", seeds, data_dir=ROOT / "data" / "shapes", **some)
    if given.data == "shapes":
        return
    cifar10 = next((folder for folder in CIFAR10 if folder.is_dir()), None)
    if cifar10 is None:
        print("CIFAR-10: skipped; put its images into data/cifar10/{train,test}/CLASS/")
        return
    measure("CIFAR-10", seeds, source=None, data_dir=cifar10, pairs_per_epoch=PAIRS_PER_EPOCH, **some)


if __name__ == "__main__":
    main()
