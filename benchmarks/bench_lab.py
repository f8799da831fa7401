"""The notebook's time and the recall of the presets: `python -m benchmarks lab`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pandas as pd

import evaluate
from config import Config, make_config
from dataset import open_dataset
from interface.run_notebook import run_notebook, tables
from metrics import recalls_of
from train import fit

ROOT = Path(__file__).resolve().parent.parent
FLICKR8K = [ROOT.parent / "shared" / "flickr8k", ROOT / "data" / "flickr8k"]
SEEDS = (0, 1, 2)


def time_notebook() -> None:
    """main.ipynb from an empty folder: images generated, captions encoded, trained, evaluated."""
    with tempfile.TemporaryDirectory() as folder:
        places = {f"{name}_dir": f"{folder}/{name}" for name in ("data", "cache", "runs")}
        places["data_dir"] = f"{folder}/scenes"
        start = time.perf_counter()
        made = run_notebook(ROOT / "main.ipynb", {"OVERRIDES": places}, folder)
        print(
            f"\nmain.ipynb, quickstart, from an empty folder: {time.perf_counter() - start:.0f} s (target: at most 300)"
        )
        print(tables(made["notebook"]))


def train_seeds(config: Config) -> pd.DataFrame:
    """Mean and standard deviation over seeds of the test split's recalls in percent, and the seconds of training."""
    for splits in config.split_groups():
        open_dataset(config, splits)  # fills the caches, which are no part of the training time
    rows = []
    for seed in SEEDS:
        start = time.perf_counter()
        run = fit(config.updated(seed=seed), resume="never")
        seconds = time.perf_counter() - start
        metrics = evaluate.evaluate_run(run)[config.test_splits[0]]
        recalls = {name: 100 * value for name, value in recalls_of(metrics).items()}
        rows.append({"seconds": seconds, "best epoch": run.best_epoch, **recalls})
    table = pd.DataFrame(rows)
    return pd.DataFrame({"mean": table.mean(), "std": table.std()}).T.round(2)


def recall_flickr8k() -> None:
    """Official test split, 1,000 images with five captions each; epoch chosen on dev, test evaluated once."""
    folder_of_data = next((folder for folder in FLICKR8K if folder.is_dir()), None)
    if folder_of_data is None:
        print("flickr8k: skipped; run `python dataset.py fetch flickr8k` first")
        return
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("flickr8k", data_dir=folder_of_data, runs_dir=folder, cache_dir=ROOT / "cache")
        print(f"\nflickr8k, 1K test, 5 captions, seeds {SEEDS} (target R@1: 23.5 and 18, under 180 s)")
        print(train_seeds(config).to_string())


def main() -> None:
    """Both."""
    time_notebook()
    recall_flickr8k()


if __name__ == "__main__":
    main()
