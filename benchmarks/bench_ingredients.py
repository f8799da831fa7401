"""The effect of each ingredient on Flickr8k, three seeds each: `python -m benchmarks ingredients`.

Every row changes one thing of the preset. Epochs and rows are judged on dev; test is read by the last table alone,
for the preset. Runs are kept in outputs/ingredients: called again, finished ones are not trained again.
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd

import evaluate
from benchmarks.bench_engine import flickr8k
from benchmarks.bench_lab import ROOT, SEEDS
from config import Config
from metrics import recalls_of
from train import fit
from utils import Run

CACHED: dict[str, dict[str, Any]] = {
    "preset": {},
    "one caption an image": {"captions_per_image": 1},
    "negatives: queue": {"negatives": "queue"},
    "negatives: bank": {"negatives": "bank"},
    "no EMA": {"ema_decay": 0.0},
    "no dropout": {"head_dropout": 0.0},
    "dropout 0.6, decay 0.3": {"head_dropout": 0.6, "weight_decay": 0.3},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "temperature 0.07": {"temperature": 0.07},
    "temperature learned": {"learn_temperature": True},
    "width 1024": {"head_hidden_dim": 1024},
    "linear heads": {"image_head": "linear", "text_head": "linear"},
    "no label smoothing": {"label_smoothing": 0.0},
    "sigmoid loss": {
        "loss": "sigmoid",
        "label_smoothing": 0.0,
        "temperature": 0.1,
        "learn_temperature": True,
    },
}
TUNED: dict[str, dict[str, Any]] = {
    "preset": {},
    "no augmentation": {"augment_crop_scale": 1.0, "augment_flip": 0.0},
    "towers at a tenth of the rate": {"image_tower_learning_rate": 2e-5},
    "tower from epoch 2": {"freeze_tower_epochs": 1},
}
RECALLS = ["i2t_recall@1", "t2i_recall@1"]


def trained(config: Config) -> Run:
    """The run of a configuration; a fine-tuned one starts from the frozen preset's run of the same seed."""
    if config.preset == "flickr8k_tuned":
        heads = flickr8k(runs_dir=config.runs_dir, seed=config.seed)
        assert heads is not None
        config = config.updated(start_from=fit(heads, show=False).folder)
    return fit(config, show=False)


def at_best_epoch(run: Run) -> dict[str, float]:
    """Dev recalls in percent at the epoch chosen on dev, and the seconds of training."""
    row = run.history[run.history["epoch"] == run.best_epoch].iloc[0]
    seconds = float(run.history["train_seconds"].sum())
    return {**{name: 100 * row[name] for name in RECALLS}, "epoch": run.best_epoch, "seconds": seconds}


def ingredients(config: Config, settings: dict[str, dict[str, Any]], seeds: tuple[int, ...]) -> pd.DataFrame:
    """One row per setting: mean and standard deviation over seeds on dev, and the gain over the preset."""
    rows = {}
    for name, changes in settings.items():
        runs = [trained(config.updated(seed=seed, **changes)) for seed in seeds]
        recalls = pd.DataFrame([at_best_epoch(run) for run in runs])
        spread = recalls[RECALLS].std().add_suffix(" ±")
        rows[name] = pd.concat([recalls.mean(), spread])
        print(
            f"  {name}: " + ", ".join(f"{recalls[r].mean():.1f} ± {recalls[r].std():.1f}" for r in RECALLS),
            flush=True,
        )
    table = pd.DataFrame(rows).T
    gains = table[RECALLS] - table.loc["preset", RECALLS]
    return table.join(gains.add_suffix(" gain")).round(2)


def on_test(config: Config, seeds: tuple[int, ...]) -> pd.DataFrame:
    """The preset's recalls on the official test split, mean and standard deviation over seeds, percent."""
    runs = [trained(config.updated(seed=seed)) for seed in seeds]
    recalls = [recalls_of(evaluate.evaluate_run(run)[config.test_splits[0]]) for run in runs]
    table = 100 * pd.DataFrame(recalls)
    return pd.DataFrame({"mean": table.mean(), "std": table.std()}).T.round(2)


def main() -> None:
    """Both presets, frozen and fine-tuned; `--only cached` or `--only tuned`, `--seeds N`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["cached", "tuned"])
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--rows", nargs="*", help="names of rows beside the preset; none given: all")
    given = parser.parse_args()
    seeds = tuple(range(given.seeds))
    for preset, settings in {"flickr8k": CACHED, "flickr8k_tuned": TUNED}.items():
        kind = "tuned" if preset.endswith("tuned") else "cached"
        config = flickr8k(preset=preset, runs_dir=ROOT / "outputs" / "ingredients")
        if config is None:
            print("flickr8k: skipped; run `python dataset.py fetch flickr8k` first")
            return
        if given.only in (None, kind):
            rows = {n: s for n, s in settings.items() if given.rows is None or n in ("preset", *given.rows)}
            print(f"\n{preset}, dev, Recall@1 in %, seeds {seeds}")
            print(ingredients(config, rows, seeds).to_string())
            print(
                f"\n{preset}, official 1K test, 5 captions, seeds {seeds}\n{on_test(config, seeds).to_string()}"
            )


if __name__ == "__main__":
    main()
