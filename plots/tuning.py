"""Figures of a study: its history, what mattered, its trials as lines, and each field's slice."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.errors import LabError
from plots.style import (
    BLUE,
    GREY,
    INK,
    WIDTH,
    WRONG,
    SavePath,
    axes_at,
    legend_above,
    new_figure,
    saved,
    shade_bar,
    styled,
    text_at,
    wrap,
)

SHADES: Colormap = LinearSegmentedColormap.from_list(
    "worse to better", ["#dcdcdc", "#8fb8d8", BLUE, "#012a4a"]
)
FEW = 4  # so many different values or fewer stand side by side, at equal distances
NOT_FIELDS = {"number", "state", "value", "epochs", "reason"}
MARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "complete": ("finished", {"marker": "o", "color": BLUE}),
    "pruned": ("pruned", {"marker": "o", "markerfacecolor": "white", "color": GREY}),
    "fail": ("failed", {"marker": "x", "color": WRONG}),
}


def fields_of(trials: pd.DataFrame) -> list[str]:
    """The fields a study tried, in the table's order."""
    return [str(name) for name in trials.columns if name not in NOT_FIELDS]


def _finished(trials: pd.DataFrame) -> pd.DataFrame:
    done = trials[trials["state"] == "complete"] if len(trials) else trials
    if not len(done):
        raise LabError("no trial has finished yet; there is nothing to draw.")
    return done


@styled
def study_history(trials: pd.DataFrame, metric: str, path: SavePath = None) -> Figure:
    """Every trial's value and the best so far; pruned trials stand at the value they reached.

    Args:
        trials: a row a trial: `number`, `state` (complete, pruned or fail), `value`.
        metric: what the value is, for the axis.
    """
    done = _finished(trials)
    figure = new_figure(3.4)
    axes = axes_at(figure, 0.75, 0.45, 8.0, 2.4)
    handles = []
    for state, (label, look) in MARKS.items():
        rows = trials[trials["state"] == state]
        floor = trials["value"].min()
        axes.plot(rows["number"], rows["value"].fillna(floor), linestyle="", markersize=5, **look)
        if len(rows):
            name = f"{label} ({len(rows)})"
            handles.append(Line2D([], [], linestyle="", markersize=5, label=name, **look))
    steps = pd.Series(done["value"].to_numpy(), done["number"]).cummax()
    steps.loc[trials["number"].max()] = steps.iloc[-1]
    axes.plot(steps.index, steps, drawstyle="steps-post", color=INK, linewidth=1.3)
    handles.append(
        Line2D([], [], color=INK, linewidth=1.3, label=f"best so far, {steps.iloc[-1]:.3f} at the end")
    )
    axes.set(xlabel="trial", ylabel=metric)
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1.2)
    return saved(figure, path)


@styled
def importances(shares: Mapping[str, float], path: SavePath = None) -> Figure:
    """How much of the values' variance each field explains, as bars.

    Args: shares: field -> share in [0, 1].
    Raises: LabError if there is none.
    """
    if not shares:
        raise LabError("importances need at least two finished trials whose values differ.")
    ordered = sorted(shares.items(), key=lambda item: item[1])
    figure = new_figure(0.32 * len(ordered) + 0.75)
    axes = axes_at(figure, 2.3, 0.15, 6.3, 0.32 * len(ordered))
    bars = axes.barh([name for name, _ in ordered], [100 * share for _, share in ordered], 0.62, color=BLUE)
    axes.bar_label(bars, [f"{100 * share:.0f}" for _, share in ordered], padding=4, fontsize=9)
    axes.set(xlabel="share of the values' variance (%)", xlim=(0, 108 * (ordered[-1][1] or 1)))
    axes.grid(False, axis="y")
    return saved(figure, path)


class _Axis:
    """Places of a field's values on an axis from 0 to 1; a field that a trial did not use lies below."""

    UNUSED = -0.14

    def __init__(self, values: pd.Series, log: bool) -> None:
        used = values.dropna()
        numbers = all(
            isinstance(v, (int, float, np.number)) and not isinstance(v, (bool, np.bool_)) for v in used
        )
        self.numeric = numbers and used.nunique() > FEW
        self.log = log and self.numeric
        self.choices = [_told(v) for v in sorted(set(used), key=lambda v: float(v) if numbers else str(v))]
        scaled = self._scaled(used) if self.numeric else np.arange(max(len(self.choices), 1))
        self.low, self.high = float(scaled.min()), float(scaled.max())

    def _scaled(self, values: pd.Series | np.ndarray) -> np.ndarray:
        numbers = np.asarray(values, dtype=float)
        return np.log10(numbers) if self.log else numbers

    def places(self, values: pd.Series) -> np.ndarray:
        """(N,) heights of a column's values."""
        used = values.notna().to_numpy()
        found = np.full(len(values), self.UNUSED)
        if self.numeric:
            scaled = self._scaled(values[used])
        else:
            scaled = np.array([self.choices.index(_told(v)) for v in values[used]], dtype=float)
        span = self.high - self.low
        found[used] = (scaled - self.low) / span if span else 0.5
        return found

    def ticks(self) -> list[tuple[float, str]]:
        """Height and text of each tick."""
        span = self.high - self.low
        if not self.numeric:
            return [(row / span if span else 0.5, name) for row, name in enumerate(self.choices)]
        heights = [0.0, 0.5, 1.0] if span else [0.5]
        values = [self.low + height * span for height in heights]
        return [(h, _told(10**v if self.log else v)) for h, v in zip(heights, values, strict=True)]


def _told(value: Any) -> str:
    """A value as ticks show it."""
    if not isinstance(value, (float, np.floating)):
        return str(value)
    number = float(value)
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:g}"


@styled
def parallel_coordinates(
    trials: pd.DataFrame, metric: str, log: Collection[str] = (), path: SavePath = None
) -> Figure:
    """Finished trials as lines over the fields, shaded by value, the best drawn last and marked.

    Args:
        trials: as in `study_history`, a column a field; NaN where a trial did not use it.
        log: fields drawn over their logarithm.
    """
    done = _finished(trials).sort_values("value")
    fields = _fields(trials)
    axis = {field: _Axis(done[field], field in log) for field in fields}
    heights = np.stack([axis[field].places(done[field]) for field in fields], axis=1)  # (N, F)
    scale = Normalize(done["value"].min(), max(done["value"].max(), done["value"].min() + 1e-9))
    figure = new_figure(4.4)
    axes = axes_at(figure, 0.35, 0.95, WIDTH - 1.2, 2.6)
    lines = [np.column_stack([range(len(fields)), row]) for row in heights]
    axes.add_collection(LineCollection(lines, colors=SHADES(scale(done["value"])), linewidths=1.4))
    axes.plot(range(len(fields)), heights[-1], color=WRONG, linewidth=2.2, marker="o")
    for place, field in enumerate(fields):
        axes.axvline(place, color=GREY, linewidth=0.8)
        for height, text in axis[field].ticks():
            _tick(axes, place, height, text)
        if done[field].isna().any():
            _tick(axes, place, _Axis.UNUSED, "not used")
        axes.text(place, 1.06, field, size=8.5, weight="bold", rotation=25, ha="left", va="bottom")
    axes.set(xlim=(-0.15, len(fields) - 0.45), ylim=(_Axis.UNUSED - 0.05, 1.06))
    axes.axis("off")
    shade_bar(figure, ScalarMappable(scale, SHADES), 0.45, 3.8, metric)
    text_at(figure, 3.2, 3.77, f"orange: the best trial, {metric} {done['value'].iloc[-1]:.3f}", 9)
    return saved(figure, path)


def _fields(trials: pd.DataFrame) -> list[str]:
    fields = fields_of(trials)
    if not fields:
        raise LabError("the study tried no field; there is nothing to draw.")
    return fields


def _tick(axes: Axes, place: float, height: float, text: str) -> None:
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
    axes.text(place + 0.04, height, text, size=8, va="center", ha="left", bbox=box, zorder=5)


@styled
def slices(trials: pd.DataFrame, metric: str, log: Collection[str] = (), path: SavePath = None) -> Figure:
    """Value against each field, a panel a field; finished trials are filled, pruned ones hollow.

    Args: as in `parallel_coordinates`.
    """
    _finished(trials)
    fields, columns = _fields(trials), 3
    rows = -(-len(fields) // columns)
    figure = new_figure(0.3 + 2.35 * rows)
    for number, field in enumerate(fields):
        left, top = 0.7 + number % columns * 2.85, 0.3 + number // columns * 2.35
        axes = axes_at(figure, left, top, 2.2, 1.6)
        _slice(axes, trials, field, field in log)
        axes.set(xlabel=field, ylabel=metric if number % columns == 0 else "")
    handles = [Line2D([], [], linestyle="", label=label, **look) for label, look in list(MARKS.values())[:2]]
    legend_above(figure.axes[0], handles)
    return saved(figure, path)


def _slice(axes: Axes, trials: pd.DataFrame, field: str, log: bool) -> None:
    """One panel; texts stand at whole numbers."""
    axis = _Axis(trials[field], log)
    for state in ("pruned", "complete"):
        some = trials[(trials["state"] == state) & trials[field].notna()]
        across = (
            some[field].astype(float) if axis.numeric else [axis.choices.index(_told(v)) for v in some[field]]
        )
        axes.plot(across, some["value"], linestyle="", markersize=4.5, alpha=0.8, **MARKS[state][1])
    if axis.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the usual one writes formulas
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    if not axis.numeric:
        names = [wrap(name, 2.2 / max(len(axis.choices), 1), 8) for name in axis.choices]
        axes.set_xticks(range(len(names)), names, size=8)
        axes.set_xlim(-0.5, len(names) - 0.5)
