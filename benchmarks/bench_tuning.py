"""A tuned head against the untuned one on the test split: `python -m benchmarks tuning`.

A study of 60 trials with pruning on Flickr8k's features, everything chosen on dev; then three seeds each of the
preset's head and of the best trial's settings. `--trials 5 --epochs 2 --seeds 2` proves the command in minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd

import tune
from benchmarks.bench_heads import convert
from config import Config, make_config
from dataset import embeddings_at
from evaluate import compare_runs, readable
from retrieval.statistics import compare_settings
from tune import read_space, train_all

ROOT = Path(__file__).resolve().parent.parent
FEATURES = [place / "flickr8k" for place in (ROOT.parent / "shared", ROOT / "data")]
MINUTES = 15  # target for the study
JUDGED = ("i2t_recall@1", "t2i_recall@1")


def _seeds(config: Config, count: int, epochs: int | None) -> list[Config]:
    settings = {"num_epochs": epochs} if epochs else {}
    return [config.updated(seed=seed, **settings) for seed in range(count)]


def bench(data: Path, folder: Path, given: argparse.Namespace) -> None:
    """The study, its best settings, and both sides' seeds."""
    config = make_config(
        "projection_heads", **embeddings_at(convert(data, folder / "embeddings")), runs_dir=folder / "runs"
    )
    space = read_space(given.space)
    short = config.updated(num_epochs=given.trial_epochs, captions_per_image=given.captions)
    start = time.perf_counter()
    study = tune.tune(short, space, folder / "study", num_trials=given.trials)
    minutes = (time.perf_counter() - start) / 60
    states = tune.trials_table(study)["state"].value_counts().to_dict()
    print(f"\nstudy: {states}, {minutes:.1f} minutes (target: under {MINUTES} for 60 trials)")
    print(f"best: {study.best_params}")
    sides = {"untuned": config, "tuned": tune.best_config(study, config, space)}
    runs = {name: train_all(_seeds(side, given.seeds, given.epochs)) for name, side in sides.items()}
    table = compare_runs([run for some in runs.values() for run in some])
    print(readable(table).T.to_string())
    _print_gain(runs)


def _print_gain(runs: dict[str, list]) -> None:
    recalls = {
        name: pd.DataFrame([run.metrics["test"] for run in some])[list(JUDGED)] for name, some in runs.items()
    }
    for metric in JUDGED:
        tuned, untuned = (recalls[name][metric].tolist() for name in ("tuned", "untuned"))
        if len(tuned) < 3:
            print(f"{metric}: {len(tuned)} seeds are too few for an interval")
            continue
        result = compare_settings(tuned, untuned)
        low, high = 100 * result.low, 100 * result.high
        print(
            f"{metric}: tuned is {100 * result.difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
        )


def main() -> None:
    """Skipped with a reason if the features are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--trial_epochs", type=int, default=6, help="epochs of a trial")
    parser.add_argument("--captions", type=int, default=2, help="captions per image in a trial's epoch")
    parser.add_argument("--epochs", type=int, default=None, help="of the final runs; none: the preset's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--space", default=str(ROOT / "configs" / "tuning" / "default.yaml"))
    given = parser.parse_args()
    data = next((place for place in FEATURES if (place / "features.safetensors").is_file()), None)
    if data is None:
        print("tuning: skipped; it needs features.safetensors in ../shared/flickr8k or data/flickr8k")
        return
    with tempfile.TemporaryDirectory() as folder:
        bench(data, Path(folder), given)


if __name__ == "__main__":
    main()
