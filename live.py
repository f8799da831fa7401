"""The training view: one figure and one line of numbers, kept up to date in place."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pandas as pd
from IPython.display import DisplayHandle, display

import plots
from config import Config, run_name
from errors import LabError
from utils import Run

SECONDS_BETWEEN = 2.0  # a figure takes a fifth of a second; epochs over cached features are as quick
STATUS = {
    "train_loss": ("loss", "{:.3f}"),
    "val_loss": ("validation loss", "{:.3f}"),
    "i2t_recall@1": ("image-to-text Recall@1", "{:.1%}"),
    "t2i_recall@1": ("text-to-image Recall@1", "{:.1%}"),
    "top1": ("top-1", "{:.1%}"),
    "learning_rate": ("learning rate", "{:.2g}"),
    "temperature": ("temperature", "{:.4f}"),
    "images_per_second": ("images a second", "{:,.0f}"),
}
"""Columns of the history in the line of numbers: heading and form."""


class Interrupted(LabError):  # noqa: N818  a state, not a mistake
    """A run has epochs left."""


class LiveView:
    """A callback for `fit(on_epoch=...)`: learning curves and the last epoch's numbers, updated in place.

    However long the run, a saved notebook holds one figure and one line. A run that exists already is
    drawn at once, so that a cell run again goes on where its figure was.

    Args:
        name: of the run, for the legend.
        history: what is known before the first epoch of this call, a row an epoch.
        num_epochs: of the whole run, for the time left.
        chance: recall of a random ranking, drawn as a line.
        chance_loss: the loss's chance level, drawn as a line.
    """

    def __init__(
        self,
        name: str,
        history: pd.DataFrame | None = None,
        *,
        num_epochs: int | None = None,
        chance: float | None = None,
        chance_loss: float | None = None,
    ) -> None:
        self.name, self.num_epochs = name, num_epochs
        self.lines: dict[str, Any] = {"chance": chance, "chance_loss": chance_loss}
        self.handles: list[DisplayHandle] = []
        self.drawn_at = 0.0
        if history is not None and len(history):
            self(history)

    def __call__(self, history: pd.DataFrame) -> None:
        """Draw the history so far; a quick run's epochs are drawn every two seconds, the last one always."""
        now, last = time.monotonic(), len(history) == self.num_epochs
        if not self.handles or last or now - self.drawn_at >= SECONDS_BETWEEN:
            self._draw(history)

    def finish(self, run: Run) -> None:
        """Draw what the run has come to, its best epoch starred.

        Raises: Interrupted if it has epochs left, so that no cell below measures half a run.
        """
        if run.finished:
            self.num_epochs = len(run.history)  # it may have stopped early
        if len(run.history):
            self._draw(run.history, run.best_epoch)
        if not run.finished:
            done = f"after {len(run.history)} of {run.config.num_epochs} epochs"
            raise Interrupted(f"training was interrupted {done}; run this cell again to continue.")

    def _draw(self, history: pd.DataFrame, best_epoch: int | None = None) -> None:
        curves = plots.learning_curves({self.name: history}, best_epoch=best_epoch, **self.lines)
        shown = (curves, self.status(history))
        if self.handles:
            for handle, part in zip(self.handles, shown, strict=True):
                handle.update(part)
        else:
            self.handles = [display(part, display_id=True) for part in shown]
        self.drawn_at = time.monotonic()

    def status(self, history: pd.DataFrame) -> pd.DataFrame:
        """One row: the last epoch and its numbers, and the time that the epochs left will take."""
        last = history.ffill().iloc[-1]  # not every epoch is validated
        of = f" of {self.num_epochs}" if self.num_epochs else ""
        row = {"epoch": f"{last['epoch']:.0f}{of}"}
        row |= {label: form.format(last[name]) for name, (label, form) in STATUS.items() if name in last}
        if self.num_epochs and "train_seconds" in last:
            left = (self.num_epochs - len(history)) * history["train_seconds"].mean()
            row["training left"] = str(timedelta(seconds=round(left)))
        return pd.DataFrame([row], index=[self.name])


def live_curves(name: str, *, chance: float | None = None, chance_loss: float | None = None) -> LiveView:
    """A training view by a run's name alone."""
    return LiveView(name, chance=chance, chance_loss=chance_loss)


def live_training(
    config: Config, *, chance: float | None = None, chance_loss: float | None = None
) -> LiveView:
    """The training view of a configuration's run, beginning with what its history.csv holds."""
    path = config.runs_dir / run_name(config) / "history.csv"
    history = pd.read_csv(path) if path.is_file() else None
    return LiveView(
        run_name(config), history, num_epochs=config.num_epochs, chance=chance, chance_loss=chance_loss
    )
