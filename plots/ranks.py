"""Figures of what a model gets right: confusions, calibration, ranks, recall by gallery size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from core.errors import LabError
from plots.style import (
    BLUE,
    DIRECTIONS,
    DOTTED,
    GREY,
    INK,
    LEGEND_ABOVE,
    WRONG,
    SavePath,
    color,
    new_figure,
    saved,
    styled,
    to_numpy,
    wrap,
)
from retrieval.figures import chance
from retrieval.hubness import hub_skewness

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
    """Percent of each true class (rows) predicted as each class (columns), and the most frequent mistakes.

    Args:
        matrix: (C, C) counts, row the true class.
        labels: C names; more than 40 are not written beside the matrix.
        top: how many mistakes to list.
    Raises: LabError if the matrix is not (C, C).
    """
    from sklearn.metrics import ConfusionMatrixDisplay  # slow to import

    counts = to_numpy(matrix).astype(float)
    if counts.shape != (len(labels), len(labels)) or not counts.size:
        raise LabError(f"a confusion matrix of shape {counts.shape} does not fit {len(labels)} labels.")
    figure = new_figure(min(6.0, 2.2 + 0.4 * len(labels)))
    axes, side = figure.subplots(1, 2, width_ratios=[2, 1])
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=[wrap(label, 20) for label in labels])
    written: dict[str, Any] = {"include_values": len(labels) <= 14, "values_format": ".0f"}
    display.plot(ax=axes, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 100}, **written)
    axes.tick_params(length=0, labelsize=9 if len(labels) <= 24 else 7)
    if max(map(len, labels)) * len(labels) > 45:
        axes.tick_params(axis="x", rotation=90)
    if len(labels) > 40:
        axes.set(xticks=[], yticks=[])
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.set_title(
        f"accuracy {100 * np.trace(counts) / max(counts.sum(), 1):.1f} % of {counts.sum():,.0f} images"
    )
    bar = figure.colorbar(display.im_, ax=axes, shrink=0.8, aspect=30, label="share of the true class (%)")
    bar.ax.grid(False)
    mistakes = [
        wrap(f"{true} → {predicted}: {count:,.0f} ({100 * share:.0f} %)", 44)
        for true, predicted, count, share in top_confusions(counts, labels, top).to_numpy()
    ]
    heading = "most frequent mistakes\ntrue → predicted: number (share)\n" if mistakes else "no mistakes"
    side.text(0, 1, "\n".join([heading, *mistakes]), size=9, va="top", linespacing=1.35)
    side.set_axis_off()
    return saved(figure, path)


# --- calibration ---


def calibration_bins(confidence: Any, correct: Any, bins: int = 10) -> pd.DataFrame:
    """Equal-width bins over [0, 1]: mean `confidence`, `accuracy` (NaN if empty) and `count`.

    Args: (N,) confidence of the predicted class in [0, 1]; (N,) whether it was right.
    """
    values = {"confidence": to_numpy(confidence).astype(float), "accuracy": to_numpy(correct).astype(float)}
    shapes = [array.shape for array in values.values()]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
        raise LabError(f"confidence {shapes[0]} and correct {shapes[1]} must have one value per prediction.")
    table = pd.DataFrame(values)
    edges = np.linspace(0, 1, bins + 1).tolist()
    groups = table.groupby(pd.cut(table["confidence"], edges, include_lowest=True), observed=False)
    return groups.mean().assign(count=groups.size())


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
    figure = new_figure(3.8)
    axes, counts = figure.subplots(1, 2)
    middle, width = (np.arange(bins) + 0.5) * 100 / bins, 92 / bins
    axes.bar(middle, 100 * table["accuracy"], width, color=BLUE, label="accuracy")
    gap = 100 * (table["confidence"] - table["accuracy"])
    look: dict[str, Any] = {"edgecolor": WRONG, "facecolor": "none", "hatch": "///", "linewidth": 1}
    axes.bar(middle, gap, width, 100 * table["accuracy"], label="gap to mean confidence", **look)
    axes.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1.2, label="perfect calibration")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.set_title(f"expected calibration error {100 * calibration_error(table):.1f} %")
    counts.bar(middle, table["count"], width, color=GREY)
    counts.set(xlim=(0, 100), xlabel="confidence (%)", ylabel="number of predictions")
    counts.set_title(f"{table['count'].sum():,} predictions")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return saved(figure, path)


# --- ranks ---

RANK_EDGES = [0, 1, 5, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000, 10**6, 10**9]


@styled
def rank_histogram(
    ranks: Mapping[str, Any], path: SavePath = None, galleries: Mapping[str, tuple[int, int]] | None = None
) -> Figure:
    """Percent of queries by the rank of their nearest match, by direction, beside a random order.

    Args:
        ranks: "i2t" or "t2i" (or any name) -> (Q,) rank of each query's best match, 1 is nearest.
        galleries: the same names -> (gallery size, matches per query), for the chance marks.
    """
    values = {name: to_numpy(rank).astype(int) for name, rank in ranks.items()}
    if not values or any(rank.size == 0 or rank.min() < 1 for rank in values.values()):
        raise LabError("ranks must be whole numbers of 1 or more, at least one per direction.")
    edges = RANK_EDGES[: int(np.searchsorted(RANK_EDGES, max(rank.max() for rank in values.values()))) + 1]
    names = [f"{low + 1:,}" if high == low + 1 else f"{low + 1:,}–{high:,}" for low, high in pairwise(edges)]
    figure = new_figure(3.4)
    axes = figure.subplots()
    width = 0.84 / len(values)
    for order, (name, rank) in enumerate(values.items()):
        shares = 100 * np.histogram(rank, np.array(edges) + 0.5)[0] / rank.size
        middles = np.arange(len(names)) - 0.42 + (order + 0.5) * width
        label = f"{DIRECTIONS.get(name, name)}: median rank {np.median(rank):,.0f} of {rank.size:,} queries"
        bars = axes.bar(middles, shares, 0.94 * width, color=color(order), label=label)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2, fontsize=8, bbox=paper)
        if galleries and name in galleries:
            size, matches = galleries[name]
            reached = [100 * chance(np.array(matches), size, edge) for edge in edges]
            spans = (middles - width / 2, middles + width / 2)
            axes.hlines(np.diff(reached), *spans, color=INK, linestyle=DOTTED, linewidth=2)
    handles, labels = axes.get_legend_handles_labels()
    if galleries:
        handles.append(Line2D([], [], color=INK, linestyle=DOTTED, linewidth=2))
        labels.append("random order")
    axes.legend(handles, labels, ncols=3, **LEGEND_ABOVE)
    axes.set(xticks=range(len(names)), xticklabels=names, xlabel="rank of the nearest match")
    axes.set_ylabel("queries (%)")
    axes.margins(y=0.12)
    axes.grid(False, axis="x")
    return saved(figure, path)


# --- hubs ---


@styled
def hub_curves(counts: Mapping[str, Any], k: int, path: SavePath = None) -> Figure:
    """How many captions find each image among their first k, most frequent image first, by scoring rule.

    Args: counts: scoring rule -> (I,) whole numbers, as `retrieval.hubness.times_retrieved` gives them.
    """
    figure = new_figure(4.0)
    axes = figure.subplots()
    for order, (name, values) in enumerate(counts.items()):
        falling = np.sort(to_numpy(values))[::-1]
        label = (
            f"{name}: skewness {hub_skewness(falling):.2f}, at most {falling[0]:,} captions, "
            f"{100 * np.mean(falling == 0):.1f} % of the images never"
        )
        axes.plot(np.arange(1, len(falling) + 1), falling, color=color(order), label=label)
    mean = float(np.mean(to_numpy(next(iter(counts.values())))))
    axes.axhline(
        mean, color=INK, linestyle=DOTTED, linewidth=1.4, label=f"every image equally often: {mean:,.0f}"
    )
    axes.legend(ncols=1, **LEGEND_ABOVE)
    axes.set(xlabel="images, the most frequent first", ylabel=f"captions that find it\namong the first {k}")
    axes.set(xscale="log", xlim=(1, len(falling)), ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return saved(figure, path)


# --- recall by gallery size ---

MARKERS = "Ds^vPXph"


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
        curves: name -> what `retrieval.figures.recall_by_gallery_size` returns, or a table with
            `gallery_size` and `recall` in [0, 1], and `low`, `high` if known.
        published: (system, gallery size in images, recall in [0, 1]).
        k, direction: what the curves show, for the axes.
    """
    figure = new_figure(4.3)
    axes = figure.subplots()
    sizes = [size for _, size, _ in published]
    for run, (name, rows) in enumerate(curves.items()):
        names = {"sizes": "gallery_size", direction: "recall"}
        table = pd.DataFrame(rows).rename(columns=names).sort_values("gallery_size")
        axes.plot(table["gallery_size"], 100 * table["recall"], color=color(run), label=name)
        if {"low", "high"} <= set(table):
            band = (100 * table["low"], 100 * table["high"])
            axes.fill_between(table["gallery_size"], *band, color=color(run), alpha=0.18, linewidth=0)
        sizes += table["gallery_size"].tolist()
    if not sizes:
        raise LabError("there is no curve and no published result to draw.")
    reach = np.geomspace(min(sizes) / 1.15, max(sizes) * 1.15, 100)
    chance = 100 * np.minimum(1, k / reach)
    axes.plot(reach, chance, color=INK, linestyle=DOTTED, linewidth=1.4, label="chance, one match")
    axes.legend(ncols=4, **LEGEND_ABOVE)
    handles = []
    for order, system in enumerate(dict.fromkeys(system for system, _, _ in published)):
        points = [(size, 100 * recall) for name, size, recall in published if name == system]
        look: dict[str, Any] = {"marker": MARKERS[order % len(MARKERS)], "ms": 7}
        look["color"] = color(len(curves) + order)
        handles += axes.plot(
            *zip(*points, strict=True), linestyle="", alpha=0.8, label=wrap(system, 28), **look
        )
    if handles:
        figure.legend(handles=handles, loc="outside right upper", title="published systems", alignment="left")
    axes.set(xscale="log", xlim=(reach[0], reach[-1]), ylim=(0, 104))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set(xlabel="gallery size (images)", ylabel=f"{DIRECTIONS.get(direction, direction)} Recall@{k} (%)")
    return saved(figure, path)
