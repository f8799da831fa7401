"""The effect of hard negatives: `python -m benchmarks retrieval [--budget SECONDS] [--seeds N ...]`.

Every setting starts from the same heads and gets the same processor time: an epoch of each is timed once, in this
process, mining and validation with it, and the setting gets as many epochs as fit into the budget.
Processor time and not the clock's, so that whatever else runs on the machine favours nobody; run it with
OMP_NUM_THREADS=1. Learning rates and epochs are chosen on the validation split; test is read once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student
from tqdm.auto import tqdm

from config import Config, make_config
from core.errors import LabError, choose
from dataset import prepare_data
from evaluate import evaluate_run, open_gallery
from labs.finetune import order_margins
from retrieval.statistics import compare_settings
from train import fit
from utils import Run, goodness

ROOT = Path(__file__).resolve().parent.parent
FLICKR8K = [ROOT.parent / "shared" / "flickr8k", ROOT / "data" / "flickr8k"]
LOSSES = ("infonce", "contrastive", "triplet")
MININGS = ("none", "random", "semantic")
LEARNING_RATES = (1e-4, 1e-3)
FIGURES = ("i2t_recall@1", "t2i_recall@1", "t2i_map")
PLAIN = {"loss": "infonce", "mining": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    f"{loss}, {mining}": {"loss": loss, "mining": mining} for loss in LOSSES for mining in MININGS
} | {
    "infonce, semantic, neighbours": {**PLAIN, "mining": "semantic", "mining_neighbour_batches": True},
    "infonce, semantic, every 4th epoch": {**PLAIN, "mining": "semantic", "mining_refresh_epochs": 4},
}
BASELINE = "infonce, none"


def epoch_seconds(config: Config) -> tuple[float, float]:
    """Mean processor seconds of an epoch after the first, and the share of its clock time that went into mining."""
    marks: list[float] = []
    timed = max(2, config.mining_refresh_epochs)  # at least one mining, and no more than its share
    run = fit(
        config.updated(num_epochs=1 + timed, patience=None, runs_dir=config.runs_dir / "timing"),
        resume="never",
        show=False,
        on_epoch=lambda history: marks.append(time.process_time()),
    )
    history = run.history.iloc[1:]
    mining = history["mining_seconds"].sum() if "mining_seconds" in history else 0.0
    return (marks[-1] - marks[0]) / timed, mining / (mining + history["train_seconds"].sum())


def validated(run: Run) -> float:
    """The figure that chooses, at its best epoch; lower is better where it changes its sign."""
    return float(goodness(run.history[run.config.best_metric], run.config.best_metric).max())


def tuned(
    config: Config, start: Run, given: argparse.Namespace, timed: dict[str, tuple[float, float]], name: str
) -> tuple[dict[str, Any], Run]:
    """The run whose learning rate validates best of those that the budget allows, and how it was made.

    A setting is timed with the first seed; `timed` keeps it for the others.
    """
    budget, rates = given.budget, given.rates
    base = config.updated(start_from=start.folder, seed=start.config.seed)
    if name not in timed:
        timed[name] = epoch_seconds(base)
    seconds, share = timed[name]
    epochs = max(1, round(budget / seconds))
    runs = [fit(base.updated(num_epochs=epochs, learning_rate=rate), show=False) for rate in rates]
    best = max(runs, key=validated)
    about = {
        "epochs": epochs,
        "rate": best.config.learning_rate,
        "s an epoch": seconds,
        "mining %": 100 * share,
    }
    return about, best


def interval(values: Sequence[float]) -> str:
    """Mean over seeds in percent and its 95 % interval (Student's)."""
    series = 100 * pd.Series(values)
    if len(series) < 2:
        return f"{series.mean():.1f}"
    reach = student.ppf(0.975, len(series) - 1) * series.std() / len(series) ** 0.5
    return f"{series.mean():.1f} ± {reach:.1f}"


def against(values: Sequence[float], base: Sequence[float]) -> str:
    """The difference of means in points with Welch's 95 % interval, from three seeds per setting."""
    test = compare_settings([100 * value for value in values], [100 * value for value in base])
    return f"{test.difference:+.1f} [{test.low:+.1f}, {test.high:+.1f}]"


def summary(rows: pd.DataFrame, figures: Sequence[str]) -> pd.DataFrame:
    """One row per setting: means over seeds, and the differences from BASELINE."""
    base = rows[rows["setting"] == BASELINE]
    table = []
    for name, group in rows.groupby("setting", sort=False):
        row: dict[str, Any] = {"setting": name, "seeds": len(group)}
        for column in ("epochs", "s an epoch", "mining %"):
            if column in group:
                row[column] = round(group[column].mean(), 1)
        for figure in figures:
            row[f"{figure} %"] = interval(group[figure].tolist())
            row[f"{figure} gain"] = "baseline"
            if name != BASELINE:
                row[f"{figure} gain"] = against(group[figure].tolist(), base[figure].tolist())
        table.append(row)
    return pd.DataFrame(table).set_index("setting")


def photographs(given: argparse.Namespace, folder: Path) -> None:
    """Each loss and each mining on Flickr8k, heads over cached towers."""
    data = next((place for place in FLICKR8K if place.is_dir()), None)
    if data is None:
        print("flickr8k: skipped; run `python dataset.py fetch flickr8k` first")
        return
    places = dict(data_dir=data, cache_dir=ROOT / "cache", runs_dir=folder, max_samples=given.max_samples)
    config = make_config("flickr8k", **places)
    rows: list[dict[str, Any]] = []
    timed: dict[str, tuple[float, float]] = {}
    for seed in given.seeds:
        start = fit(config.updated(seed=seed, num_epochs=given.start_epochs), show=False)
        rows.append({"setting": "start", **test_figures(start)})
        for name, setting in tqdm(chosen(given).items(), f"flickr8k, seed {seed}", unit="setting"):
            base = config.updated(**setting, batch_size=given.batch_size)
            about, run = tuned(base, start, given, timed, name)
            rows.append({"setting": name, "seed": seed, **about, "val": validated(run), **test_figures(run)})
    table = pd.DataFrame(rows)
    print(
        f"\nFlickr8k, official 1K test, 5 captions, {given.budget:g} s of processor time a run, "
        f"batches of {given.batch_size}:"
    )
    print(summary(table, FIGURES).to_string())
    means = table.dropna(subset="val").groupby("setting")["val"].mean()
    print(f"best on validation ({config.best_metric}): {means.idxmax()}")


def chosen(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings to run; BASELINE is always among them."""
    return {name: choose(SETTINGS, name, "setting") for name in dict.fromkeys([BASELINE, *given.settings])}


def test_figures(run: Run) -> dict[str, float]:
    """The figures of the first test split."""
    metrics = evaluate_run(run, show=False)[run.config.test_splits[0]]
    return {name: metrics[name] for name in FIGURES}


def word_order(given: argparse.Namespace, folder: Path) -> None:
    """Whether hard negatives teach word order, on known pairs (test) and held-out ones (novel)."""
    places = dict(data_dir=ROOT / "data" / "scenes", cache_dir=ROOT / "cache", runs_dir=folder)
    heads = dict(image_tower_mode="cached", batch_size=256, head_hidden_dim=2048, text_head="mlp")
    config = make_config("quickstart", **places, **heads, max_samples=given.max_samples)
    prepare_data(config)
    rows: list[dict[str, Any]] = []
    timed: dict[str, tuple[float, float]] = {}
    for seed in given.seeds:
        start = fit(config.updated(seed=seed, num_epochs=given.start_epochs), show=False)
        settings = {name: how for name, how in chosen(given).items() if name.startswith("infonce")}
        rows.append({"setting": "start", **order_figures(start)})
        for name, setting in tqdm(settings.items(), f"scenes, seed {seed}", unit="setting"):
            about, run = tuned(config.updated(**setting, batch_size=64), start, given, timed, name)
            rows.append({"setting": name, **about, **order_figures(run)})
    table = pd.DataFrame(rows)
    figures = [column for column in table if "order" in str(column)]
    print(
        "\nGenerated scenes: share of images nearer to the true caption than to the exchanged one (chance 50 %)"
    )
    print(summary(table, figures).T.to_string())


def order_figures(run: Run) -> dict[str, float]:
    """Share of right orders, by split and by what was exchanged."""
    result = {}
    for split in ("test", "novel"):
        margins = order_margins(open_gallery(run, split, show=False))
        shares = (margins["margin"] > 0).groupby(margins["kind"]).mean()
        result |= {f"{split} {kind} order": float(share) for kind, share in shares.items()}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=30.0, help="processor seconds a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(LEARNING_RATES), help="to choose from")
    parser.add_argument("--batch_size", type=int, default=256, help="batch size on photographs")
    parser.add_argument("--start_epochs", type=int, default=6, help="of the heads that all start from")
    parser.add_argument("--max_samples", type=int, help="at most this many images a split, to see it run")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--only", choices=("photographs", "word_order"), help="one table alone")
    given = parser.parse_args(arguments)
    if given.budget <= 0:
        raise LabError(f"a budget of {given.budget:g} s trains nothing; give more than 0.")
    parts = {"photographs": photographs, "word_order": word_order}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            if given.only in (None, name):
                part(given, Path(folder) / name)


if __name__ == "__main__":
    main()
