"""Figures of what a model gets right: confusions, calibration, ranks, recall by gallery size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.errors import LabError
from plots.style import (
    BLUE,
    DIRECTIONS,
    DOTTED,
    GREY,
    INK,
    MARGIN,
    WIDTH,
    WRONG,
    SavePath,
    axes_at,
    colour,
    new_figure,
    saved,
    shade_bar,
    shaded_matrix,
    styled,
    text_at,
    text_height,
    text_width,
    to_numpy,
    wrap,
)

# --- confusions ---


def top_confusions(matrix: Any, labels: Sequence[str], top: int = 10) -> pd.DataFrame:
    """The most frequent mistakes: `true`, `predicted`, `count`, and `share` of the true class in [0, 1]."""
    counts = to_numpy(matrix).astype(float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mistakes = counts * (1 - np.eye(len(labels)))
    places = np.argsort(-mistakes, axis=None, kind="stable")[:top]
    pairs = [(t, p) for t, p in zip(*np.unravel_index(places, counts.shape), strict=True) if mistakes[t, p]]
    rows = [(labels[t], labels[p], counts[t, p], shares[t, p]) for t, p in pairs]
    return pd.DataFrame(rows, columns=["true", "predicted", "count", "share"])


@styled
def confusion_matrix(matrix: Any, labels: Sequence[str], path: SavePath = None, top: int = 10) -> Figure:
    """Predicted classes (columns) of each true class (rows), shaded by its share, and the commonest mistakes.

    Args:
        matrix: (C, C) counts, row the true class.
        labels: C names; more than 40 are not written beside the matrix.
        top: how many mistakes to list.
    Raises: LabError if the matrix is not (C, C).
    """
    counts = to_numpy(matrix).astype(float)
    if counts.shape != (len(labels), len(labels)) or not counts.size:
        raise LabError(f"a confusion matrix of shape {counts.shape} does not fit {len(labels)} labels.")
    size = 9 if len(labels) <= 24 else 7
    names = [wrap(label, 1.5, size) for label in labels] if len(labels) <= 40 else []
    widest = max((text_width(line, size) for name in names for line in name.split("\n")), default=0)
    side = min(5.6 - widest, 0.62 * len(labels))
    left = MARGIN + widest + 0.4
    right = left + side + 0.35  # where the list of mistakes starts
    found = top_confusions(counts, labels, top).to_numpy()
    mistakes = [
        f"{true} → {predicted}: {count:,.0f}, {100 * share:.0f} %" for true, predicted, count, share in found
    ]
    heading = "commonest mistakes, true → predicted: count, share" if mistakes else "no mistakes"
    listed = "\n".join(wrap(line, WIDTH - right - MARGIN) for line in [heading, "", *mistakes])
    figure = new_figure(max(0.35 + side + widest + 0.5, 1.15 + 1.15 * text_height(listed)))
    axes = axes_at(figure, left, 0.35, side, side)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = shaded_matrix(axes, shares, np.vectorize("{:,.0f}".format)(counts), (0, 100))
    ticks = range(len(names))
    axes.set(xticks=ticks, xlabel="predicted", yticks=ticks, yticklabels=names, ylabel="true")
    axes.set_xticklabels(names, rotation=0 if widest < side / len(labels) - 0.05 else 90)
    axes.tick_params(labelsize=size)
    accuracy = 100 * np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"accuracy {accuracy:.1f} % of {counts.sum():,.0f}")
    shade_bar(figure, shown, right, 0.4, "share of the true class (%)")
    text_at(figure, right, 1.1, listed, linespacing=1.35)
    return saved(figure, path)


# --- calibration ---


def calibration_bins(confidence: Any, correct: Any, bins: int = 10) -> pd.DataFrame:
    """Equal-width bins over (0, 1]: `low`, `high`, `count`, mean `confidence`, `accuracy` (NaN where empty).

    Args: (N,) confidence of the predicted class in [0, 1]; (N,) whether it was right.
    """
    sure, right = to_numpy(confidence).astype(float), to_numpy(correct).astype(float)
    if sure.ndim != 1 or sure.shape != right.shape or not sure.size:
        raise LabError(
            f"confidence {sure.shape} and correct {right.shape} must both have one value a prediction."
        )
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, values, minlength=bins) / count for values in (sure, right)]
    columns = {
        "low": edges[:-1],
        "high": edges[1:],
        "count": count,
        "confidence": means[0],
        "accuracy": means[1],
    }
    return pd.DataFrame(columns)


def calibration_error(table: pd.DataFrame) -> float:
    """Expected calibration error in [0, 1], of `calibration_bins`. Source: Guo et al. 2017, equation 3."""
    gaps = (table["accuracy"] - table["confidence"]).abs().fillna(0)
    return float((gaps * table["count"]).sum() / table["count"].sum())


@styled
def reliability_diagram(confidence: Any, correct: Any, path: SavePath = None, bins: int = 10) -> Figure:
    """Accuracy against confidence in bins, the gap to perfect calibration, and how often each occurs.

    Args: (N,) confidence of the predicted class in [0, 1]; (N,) whether it was right.
    """
    table = calibration_bins(confidence, correct, bins)
    figure = new_figure(4.15)
    axes, counts = axes_at(figure, 0.75, 0.4, 3.6, 2.9), axes_at(figure, 5.3, 0.4, 3.5, 2.9)
    middle, width = 50 * (table["low"] + table["high"]), 92 / bins
    axes.bar(middle, 100 * table["accuracy"], width, color=BLUE, label="accuracy")
    gap = 100 * (table["confidence"] - table["accuracy"])
    look: dict[str, Any] = {"edgecolor": WRONG, "facecolor": "none", "hatch": "///", "linewidth": 1}
    axes.bar(middle, gap, width, 100 * table["accuracy"], label="gap to mean confidence", **look)
    axes.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1.2, label="perfect calibration")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.set_title(f"expected calibration error {100 * calibration_error(table):.1f} %")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=3)  # bars may fill the axes
    counts.bar(middle, table["count"], width, color=GREY)
    counts.set(xlim=(0, 100), xlabel="confidence (%)", ylabel="predictions")
    counts.set_title(f"{table['count'].sum():,} predictions")
    return saved(figure, path)


# --- ranks ---

RANK_EDGES = [0, 1, 5, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000, 10**6, 10**9]


def chance_of_rank(rank: int, gallery: int, matches: int = 1) -> float:
    """Probability that a random order puts one of `matches` among the first `rank` of `gallery` items."""
    if rank > gallery - matches:
        return 1.0
    logs = [
        math.lgamma(n + 1) for n in (gallery - matches, gallery - matches - rank, gallery, gallery - rank)
    ]
    return 1 - math.exp(logs[0] - logs[1] - logs[2] + logs[3])


@styled
def rank_histogram(
    ranks: Mapping[str, Any], path: SavePath = None, galleries: Mapping[str, tuple[int, int]] | None = None
) -> Figure:
    """How many queries find their nearest match at which rank, by direction, beside a random order.

    Args:
        ranks: "i2t" or "t2i" (or any name) -> (Q,) rank of each query's best match, 1 is nearest.
        galleries: the same names -> (gallery size, matches a query), for the chance marks.
    """
    values = {name: to_numpy(rank).astype(int) for name, rank in ranks.items()}
    if not values or any(rank.size == 0 or rank.min() < 1 for rank in values.values()):
        raise LabError("ranks must be whole numbers from 1 on, at least one a direction.")
    edges = RANK_EDGES[: int(np.searchsorted(RANK_EDGES, max(rank.max() for rank in values.values()))) + 1]
    names = [f"{low + 1:,}" if high == low + 1 else f"{low + 1:,}–{high:,}" for low, high in pairwise(edges)]
    figure = new_figure(3.5)
    axes = axes_at(figure, 0.75, 0.45, 8.1, 2.3)
    width = 0.84 / len(values)
    for order, (name, rank) in enumerate(values.items()):
        shares = 100 * np.histogram(rank, np.array(edges) + 0.5)[0] / rank.size
        middles = np.arange(len(names)) - 0.42 + (order + 0.5) * width
        label = f"{DIRECTIONS.get(name, name)}: median rank {np.median(rank):,.0f} of {rank.size:,} queries"
        bars = axes.bar(middles, shares, 0.94 * width, color=colour(order), label=label)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2, fontsize=8, bbox=paper)
        if galleries and name in galleries:
            reached = 100 * np.array([chance_of_rank(edge, *galleries[name]) for edge in edges])
            spans = (middles - width / 2, middles + width / 2)
            axes.hlines(np.diff(reached), *spans, color=INK, linestyle=DOTTED, linewidth=2)
    handles, labels = axes.get_legend_handles_labels()
    if galleries:
        handles.append(Line2D([], [], color=INK, linestyle=DOTTED, linewidth=2))
        labels.append("random order")
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=3, columnspacing=1.2)
    axes.set(
        xticks=range(len(names)), xticklabels=names, xlabel="rank of the nearest match", ylabel="queries (%)"
    )
    axes.margins(y=0.12)
    axes.grid(False, axis="x")
    return saved(figure, path)


# --- recall by gallery size ---

# right, left, up, down, then the corners
SIDES = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)])


def _label_boxes(point: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(48, 4) boxes (left, bottom, right, top) for a label around its point, nearest first."""
    distances = np.repeat([0.07, 0.16, 0.28, 0.42, 0.6, 0.85], len(SIDES))[:, None]
    sides = np.tile(SIDES, (6, 1))
    corners = point + sides * distances + size * (sides - 1) / 2
    return np.hstack([corners, corners + size])


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) area that each of `boxes` (N, 4) shares with all of `others` (M, 4)."""
    boxes, others = boxes[:, None], others[None]
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    return np.prod(np.maximum(sides, 0), axis=-1).sum(axis=-1)


def _distance(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(N, P) distances of boxes (N, 4) from points (P, 2)."""
    nearest = np.clip(points[None], boxes[:, None, :2], boxes[:, None, 2:])
    return np.linalg.norm(nearest - points[None], axis=-1)


def place_labels(points: np.ndarray, sizes: np.ndarray, taken: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) for labels, each at the nearest place that is free, or else the least bad one.

    A place that is nearer to another point than to its own would mislead, and counts as bad.

    Args:
        points, sizes: (N, 2) the points, and the width and height of their labels, inches.
        taken: (M, 4) boxes (left, bottom, right, top) to keep clear of.
        frame: (4,) the box to stay within.
    """
    placed = taken
    for point, size in zip(points, sizes, strict=True):
        boxes = _label_boxes(point, size)
        outside = np.maximum(frame[:2] - boxes[:, :2], 0) + np.maximum(boxes[:, 2:] - frame[2:], 0)
        others = points[np.linalg.norm(points - point, axis=1) > 0.03]
        own = _distance(boxes, point[None]) + 0.02
        misleading = (_distance(boxes, others) < own).any(axis=1)
        costs = _overlap(boxes, placed) + outside.sum(axis=1) + 0.02 * misleading
        placed = np.vstack([placed, boxes[np.argmin(costs.round(6))]])
    return placed[len(taken) :]


@styled
def gallery_size_curves(
    curves: Mapping[str, Any],
    published: Sequence[tuple[str, int, float]] = (),
    path: SavePath = None,
    k: int = 1,
    direction: str = "t2i",
) -> Figure:
    """Recall@K against the size of the gallery, published systems at their own sizes.

    Args:
        curves: name -> what `metrics.recall_by_gallery_size` returns, or a table with `gallery_size` and
            `recall` in [0, 1], and `low`, `high` where known.
        published: (system, gallery size in images, recall in [0, 1]).
        k, direction: what the curves show, for the axes.
    """
    figure = new_figure(4.6)
    axes = axes_at(figure, 0.7, 0.45, 8.1, 3.5)
    sizes = [size for _, size, _ in published]
    for run, (name, rows) in enumerate(curves.items()):
        names = {"sizes": "gallery_size", direction: "recall"}
        table = pd.DataFrame(rows).rename(columns=names).sort_values("gallery_size")
        axes.plot(table["gallery_size"], 100 * table["recall"], color=colour(run), label=name)
        if {"low", "high"} <= set(table):
            band = (100 * table["low"], 100 * table["high"])
            axes.fill_between(table["gallery_size"], *band, color=colour(run), alpha=0.18, linewidth=0)
        sizes += table["gallery_size"].tolist()
    if not sizes:
        raise LabError("there is no curve and no published point to draw.")
    room = 4 if published else 1.15  # for labels beside the rightmost points
    reach = np.geomspace(min(sizes) / 1.15, max(sizes) * room, 100)
    chance = 100 * np.minimum(1, k / reach)
    axes.plot(reach, chance, color=INK, linestyle=DOTTED, linewidth=1.4, label="chance, one match")
    axes.set(xscale="log", xlim=(reach[0], reach[-1]), ylim=(0, 104))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set(xlabel="gallery size (images)", ylabel=f"Recall@{k}, {DIRECTIONS.get(direction, direction)} (%)")
    if published:
        _published_points(figure, axes, published)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, columnspacing=1.2)
    return saved(figure, path)


def _published_points(figure: Figure, axes: Axes, published: Sequence[tuple[str, int, float]]) -> None:
    """Points with labels that overlap neither one another nor a curve."""
    spots = np.array([(size, 100 * recall) for _, size, recall in published])
    to_inches = (axes.transData + figure.dpi_scale_trans.inverted()).transform
    points = to_inches(spots)
    lines = np.concatenate([to_inches(np.column_stack(line.get_data())) for line in axes.lines])
    taken = np.concatenate(
        [np.hstack([spot - pad, spot + pad]) for spot, pad in ((lines, 0.04), (points, 0.06))]
    )
    names = [wrap(name, 2.0, 8) for name, _, _ in published]
    extents = [
        (max(text_width(line, 8) for line in name.split("\n")), text_height(name, 8)) for name in names
    ]
    frame = np.concatenate([axes.get_window_extent().min, axes.get_window_extent().max]) / figure.dpi
    boxes = place_labels(points, np.array(extents), taken, frame)
    leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    look: dict[str, Any] = {"textcoords": figure.dpi_scale_trans, "size": 8, "ha": "center", "va": "center"}
    for name, spot, point, box in zip(names, spots, points, boxes, strict=True):
        away = np.linalg.norm(np.clip(point, box[:2], box[2:]) - point) > 0.11
        axes.annotate(name, spot, (box[:2] + box[2:]) / 2, arrowprops=leader if away else None, **look)
    axes.plot(*spots.T, linestyle="", marker="D", color=INK, markersize=5, label="published")
