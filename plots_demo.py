"""`python plots.py demo` draws the learning curves that training shows, from made-up numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import plots


def demo_history(num_epochs: int = 20, seed: int = 0) -> pd.DataFrame:
    """A history as training of pairs writes it, a row an epoch; every number is made up."""
    rng = np.random.default_rng(seed)
    epoch = np.arange(1, num_epochs + 1)
    learnt = 1 - np.exp(-epoch / (0.35 * num_epochs))
    noise = rng.normal(0, 0.02, num_epochs)
    rate = np.minimum(epoch / 2, 1) * 0.5 * (1 + np.cos(np.pi * epoch / (num_epochs + 1))) * 1e-4
    top1 = (0.62 * learnt + 2 * noise).clip(0.01, 1)
    return pd.DataFrame(
        {
            "epoch": epoch,
            "train_loss": 3.4 - 2.4 * learnt + noise,
            "val_loss": 3.5 - 2.0 * learnt + 3 * noise,
            "top1": top1,
            "learning_rate": rate,
        }
    )


def main() -> None:
    """`demo [--file PATH]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["demo"])
    parser.add_argument("--file", default="outputs/demo_curves.png", help="where the figure goes")
    path = Path(parser.parse_args().file)
    history = demo_history()
    plots.learning_curves(
        {"demo (made-up numbers)": history}, path, chance=0.01, best_epoch=int(history["top1"].argmax()) + 1
    )
    print(f"{path}: the curves of a run that never was")


if __name__ == "__main__":
    main()
