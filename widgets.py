"""Notebook views; each is also a plain call."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from IPython.display import DisplayHandle, display

import plots


def live_curves(name: str, *, chance: float | None = None, uniform_loss: float | None = None) -> Callable:
    """A callback for `fit(on_epoch=...)` that keeps one figure of the learning curves up to date.

    Args:
        name: of the run, for the legend.
        chance: recall of a random ranking, drawn as a line.
        uniform_loss: the loss of uniform logits, drawn as a line.
    """
    handle: list[DisplayHandle] = []

    def draw(history: pd.DataFrame) -> None:
        figure = plots.learning_curves({name: history}, chance=chance, uniform_loss=uniform_loss)
        if handle:
            handle[0].update(figure)
        else:
            handle.append(display(figure, display_id=True))

    return draw
