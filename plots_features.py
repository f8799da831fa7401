"""Figures that look inside a model and its data, in the style of `plots`.

Similarities, confusions, calibration, ranks, the map of both modalities, failures; and the
geometry of the joint space: modality gap, alignment, uniformity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from errors import LabError, choose
from plots import (
    BLUE,
    DIRECTIONS,
    DOTTED,
    GREY,
    INK,
    MARGIN,
    WIDTH,
    WRONG,
    Cell,
    Picture,
    SavePath,
    as_histories,
    as_picture,
    axes_at,
    colour,
    draw_picture,
    legend_above,
    legend_below,
    new_figure,
    picture_rows,
    plot_series,
    saved,
    shade_bar,
    styled,
    text_at,
    text_height,
    text_width,
    to_numpy,
    wrap,
)

# ------------------------------------------------------------------------------------------- geometry


def _unit_rows(features: Any, name: str) -> np.ndarray:
    """(N, D) features on the unit sphere."""
    rows = to_numpy(features).astype(np.float32)
    if rows.ndim != 2 or not len(rows) or not np.isfinite(rows).all():
        raise LabError(f"{name} must be finite numbers of shape (N, D); got shape {rows.shape}.")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def modality_gap_size(image_features: Any, text_features: Any) -> float:
    """Distance between the mean image feature and the mean text feature, 0 to 2.

    Args: (I, D) and (T, D) features, normalised here.
    Source: Liang et al. 2022, "Mind the Gap", the difference between the two modalities' centres.
    """
    image_mean = _unit_rows(image_features, "image_features").mean(axis=0)
    text_mean = _unit_rows(text_features, "text_features").mean(axis=0)
    return float(np.linalg.norm(image_mean - text_mean))


def alignment(image_features: Any, text_features: Any, image_id: Any, text_id: Any) -> float:
    """Mean squared distance of matching pairs, 0 to 4: the lower, the closer.

    Args: (I, D) and (T, D) features, normalised here; (I,) and (T,) ids, equal ids match, -1 never does.
    Raises: LabError if nothing matches.
    Source: Wang & Isola 2020, section 4.1, alpha = 2.
    """
    sums, counts = [], []
    wanted = np.intersect1d(to_numpy(image_id), to_numpy(text_id))
    wanted = wanted[wanted != -1]
    if not len(wanted):
        raise LabError("no image and text share an id; alignment needs matching pairs.")
    for features, ids, name in ((image_features, image_id, "image"), (text_features, text_id, "text")):
        having = np.isin(to_numpy(ids), wanted)
        rows = _unit_rows(features, f"{name}_features")[having]
        place = np.searchsorted(wanted, to_numpy(ids)[having])
        total = np.zeros((len(wanted), rows.shape[1]))
        np.add.at(total, place, rows)
        sums.append(total)
        counts.append(np.bincount(place, minlength=len(wanted)))
    return float(2 - 2 * (sums[0] * sums[1]).sum() / (counts[0] * counts[1]).sum())


def uniformity(features: Any, chunk: int = 1024) -> float:
    """Log of the mean Gaussian potential of all pairs of rows, at most 0: the lower, the more spread out.

    Args: (N, D) features, normalised here, N > 1; takes N^2 D operations in memory N * chunk.
    Source: Wang & Isola 2020, section 4.1, t = 2.
    """
    rows = _unit_rows(features, "features")
    if len(rows) < 2:
        raise LabError("uniformity needs at least two rows of features.")
    total = 0.0
    for start in range(0, len(rows), chunk):
        cosine = rows[start : start + chunk] @ rows.T  # (chunk, N)
        total += float(np.exp(4 * np.minimum(cosine, 1) - 4, dtype=np.float32).sum(dtype=np.float64))
    return float(np.log((total - len(rows)) / (len(rows) * (len(rows) - 1))))


def feature_geometry(
    image_features: Any, text_features: Any, image_id: Any, text_id: Any
) -> dict[str, float]:
    """One row of `modality_gap`'s history: gap, alignment, and uniformity of both modalities."""
    return {
        "modality_gap": modality_gap_size(image_features, text_features),
        "alignment": alignment(image_features, text_features, image_id, text_id),
        "image_uniformity": uniformity(image_features),
        "text_uniformity": uniformity(text_features),
    }


GEOMETRY = {
    "distance of the two means": {"modality_gap": ("modality gap", "-")},
    "alignment (lower: closer)": {"alignment": ("matching pairs", "-")},
    "uniformity (lower: more spread)": {
        "image_uniformity": ("images", "-"),
        "text_uniformity": ("texts", "--"),
    },
}


@styled
def modality_gap(history: Mapping[str, Any] | pd.DataFrame, path: SavePath = None) -> Figure:
    """Gap, alignment and uniformity over training, of one or several runs.

    Args:
        history: a table with `epoch` and the columns that `feature_geometry` gives, or name -> table.
    """
    tables = as_histories(history)
    figure = new_figure(3.1)
    for place, (label, series) in enumerate(GEOMETRY.items()):
        axes = axes_at(figure, 0.75 + place * 3.0, 0.4, 2.15, 2.15)
        legend_above(axes, plot_series(axes, tables, series))
        axes.set_ylabel(label, size=9)
    legend_below(figure, list(tables))
    return saved(figure, path)


# --------------------------------------------------------------------------------------------- matrices


def _matrix(axes: Axes, values: np.ndarray, texts: np.ndarray, limits: tuple[float, float]) -> AxesImage:
    """Shaded cells; up to 14 columns of them with their texts, white where the shade is dark."""
    shown = axes.imshow(values, "Blues", aspect="auto", vmin=limits[0], vmax=limits[1])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    depth = np.asarray(shown.norm(values))
    if values.shape[1] <= 14:
        for row, column in np.ndindex(values.shape):
            ink = "white" if depth[row, column] > 0.6 else INK
            look: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
            axes.text(column, row, str(texts[row, column]), size=9 if values.shape[1] <= 10 else 7.5, **look)
    return shown


@styled
def similarity_matrix(
    scores: Any,
    captions: Sequence[str],
    images: Sequence[Picture],
    matches: Any = None,
    path: SavePath = None,
    label: str = "cosine similarity",
) -> Figure:
    """Similarities of captions (rows) and pictures (columns), the matching cells framed.

    Args:
        scores: (I, T) for I pictures and T captions.
        matches: (I, T) bool; by default the diagonal where I = T.
        label: what the scores are, with their unit.
    Raises: LabError if the scores' shape is not (I, T).
    """
    values = to_numpy(scores).astype(float).T  # (T, I)
    if values.shape != (len(captions), len(images)) or not values.size:
        sizes = f"{len(images)} pictures and {len(captions)} captions"
        raise LabError(f"scores of shape {values.T.shape} do not fit {sizes}; give (pictures, captions).")
    diagonal = np.eye(*values.shape, dtype=bool) & (len(captions) == len(images))
    framed = diagonal if matches is None else to_numpy(matches).astype(bool).T
    names = [wrap(caption, 2.9) for caption in captions]
    cell = min(1.0, 5.7 / len(images))
    row = max(0.3, min(0.5, cell), max(map(text_height, names)) + 0.06)
    top, height = MARGIN + cell + 0.06, row * len(names)
    figure = new_figure(top + height + 0.78)
    axes = axes_at(figure, 3.15, top, cell * len(images), height)
    texts = np.vectorize("{:.2f}".format)(values.round(2) + 0.0)  # adding 0 turns -0.00 into 0.00
    shown = _matrix(axes, values, texts, (values.min(), values.max()))
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=[])
    for text, image in np.argwhere(framed):
        corner = (image - 0.48, text - 0.47)
        axes.add_patch(Rectangle(corner, 0.96, 0.94, fill=False, edgecolor=WRONG, linewidth=2))
    for place, picture in enumerate(images):
        thumbnail = axes_at(figure, 3.15 + (place + 0.04) * cell, MARGIN, 0.92 * cell, cell)
        draw_picture(thumbnail, as_picture(picture, 160))
    shade_bar(figure, shown, 3.15, top + height + 0.2, f"{label}; framed: matching")
    return saved(figure, path)


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
    shown = _matrix(axes, shares, np.vectorize("{:,.0f}".format)(counts), (0, 100))
    ticks = range(len(names))
    axes.set(xticks=ticks, xlabel="predicted", yticks=ticks, yticklabels=names, ylabel="true")
    axes.set_xticklabels(names, rotation=0 if widest < side / len(labels) - 0.05 else 90)
    axes.tick_params(labelsize=size)
    accuracy = 100 * np.trace(counts) / max(counts.sum(), 1)
    axes.set_title(f"accuracy {accuracy:.1f} % of {counts.sum():,.0f}")
    shade_bar(figure, shown, right, 0.4, "share of the true class (%)")
    text_at(figure, right, 1.1, listed, linespacing=1.35)
    return saved(figure, path)


# --------------------------------------------------------------------------------- confidence and ranks


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
    figure = new_figure(3.9)
    axes, counts = axes_at(figure, 0.75, 0.4, 3.6, 2.9), axes_at(figure, 5.3, 0.4, 3.5, 2.9)
    middle, width = 50 * (table["low"] + table["high"]), 92 / bins
    axes.bar(middle, 100 * table["accuracy"], width, color=BLUE, label="accuracy")
    gap = 100 * (table["confidence"] - table["accuracy"])
    look: dict[str, Any] = {"edgecolor": WRONG, "facecolor": "none", "hatch": "///", "linewidth": 1}
    axes.bar(middle, gap, width, 100 * table["accuracy"], label="gap to mean confidence", **look)
    axes.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1.2, label="perfect calibration")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.set_title(f"expected calibration error {100 * calibration_error(table):.1f} %")
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    counts.bar(middle, table["count"], width, color=GREY)
    counts.set(xlim=(0, 100), xlabel="confidence (%)", ylabel="predictions")
    counts.set_title(f"{table['count'].sum():,} predictions")
    return saved(figure, path)


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


# ----------------------------------------------------------------------------- recall by gallery size


SIDES = np.array(
    [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
)  # right, left, up, ...


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
def recall_by_gallery_size(
    curves: Mapping[str, Any],
    published: Sequence[tuple[str, int, float]] = (),
    path: SavePath = None,
    k: int = 1,
    direction: str = "t2i",
) -> Figure:
    """Recall@K against the size of the gallery, published systems at their own sizes.

    Args:
        curves: name -> table with `gallery_size` and `recall` in [0, 1], and `low`, `high` where known.
        published: (system, gallery size, recall in [0, 1]).
        k, direction: what the curves show, for the axes.
    """
    figure = new_figure(4.6)
    axes = axes_at(figure, 0.7, 0.45, 8.1, 3.5)
    sizes = [size for _, size, _ in published]
    for run, (name, rows) in enumerate(curves.items()):
        table = pd.DataFrame(rows).sort_values("gallery_size")
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
    axes.set(xlabel="gallery size", ylabel=f"Recall@{k}, {DIRECTIONS.get(direction, direction)} (%)")
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


# ---------------------------------------------------------------------------- the map of both modalities


def _pca(rows: np.ndarray, seed: int) -> tuple[np.ndarray, list[str]]:
    from sklearn.decomposition import PCA  # slow to import

    model = PCA(2, svd_solver="full").fit(rows)
    labels = [
        f"component {n} ({100 * share:.0f} % of the variance)"
        for n, share in enumerate(model.explained_variance_ratio_, 1)
    ]
    return model.transform(rows), labels


def _tsne(rows: np.ndarray, seed: int) -> tuple[np.ndarray, list[str]]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(rows) - 1) / 3)
    with threadpool_limits(1, user_api="openmp"):  # its threads spin: where cores are shared, two are slower
        spots = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    return spots, [f"t-SNE {n} (no unit, perplexity {perplexity:.0f})" for n in (1, 2)]


MAPS = {"pca": _pca, "tsne": _tsne}


def _chosen(count: int, limit: int, wanted: Sequence[int], seed: int) -> np.ndarray:
    """At most `limit` of `count` rows, ascending: the wanted ones, and a random draw of the others."""
    first = np.unique(np.asarray(wanted, dtype=int))[:limit]
    others = np.setdiff1d(np.arange(count), first)
    drawn = np.random.default_rng(seed).permutation(others)[: max(0, limit - len(first))]
    return np.sort(np.concatenate([first, drawn]))


def _thumbnails(
    figure: Figure, axes: Axes, spots: np.ndarray, images: Sequence[Picture], size: float = 0.5
) -> None:
    """Small pictures at their points; one that would hide an earlier one is left out."""
    points = axes.transData.transform(spots) / figure.dpi
    placed: list[np.ndarray] = []
    for spot, point, image in zip(spots, points, images, strict=True):
        if any(np.abs(point - other).max() < size for other in placed):
            continue
        placed.append(point)
        pixels = as_picture(image, 96)
        zoom = size * 72 / max(pixels.shape[:2]) * 0.9
        frame = {"edgecolor": BLUE, "linewidth": 1.5}
        axes.add_artist(AnnotationBbox(OffsetImage(pixels, zoom=zoom), spot, pad=0.08, bboxprops=frame))


@styled
def modality_map(
    image_features: Any,
    text_features: Any,
    path: SavePath = None,
    method: str = "pca",
    thumbnails: Mapping[int, Picture] | Sequence[Picture] | None = None,
    pairs: Any = None,
    seed: int = 0,
    limit: int = 1000,
) -> Figure:
    """Both modalities in one plane; deterministic by seed.

    Args:
        image_features, text_features: (I, D) and (T, D), normalised here.
        method: "pca" or "tsne"; t-SNE takes some 10 s for 2,000 rows in all.
        thumbnails: image row -> picture, or a picture for each of the first rows; drawn where there is room.
        pairs: (P, 2) rows (image, text) joined by a line.
        limit: at most so many rows of each modality, drawn by seed; the legend says so.
    """
    sides = [_unit_rows(image_features, "image_features"), _unit_rows(text_features, "text_features")]
    joined = np.zeros((0, 2), int) if pairs is None else to_numpy(pairs).astype(int).reshape(-1, 2)
    shown = (
        thumbnails
        if isinstance(thumbnails, Mapping)
        else dict(enumerate(() if thumbnails is None else thumbnails))
    )
    wanted = [[*shown, *joined[:, 0]], [*joined[:, 1]]]
    kept = [_chosen(len(rows), limit, want, seed) for rows, want in zip(sides, wanted, strict=True)]
    project = choose(MAPS, method, "method")
    spots, labels = project(
        np.concatenate([rows[keep] for rows, keep in zip(sides, kept, strict=True)]), seed
    )
    images, texts = spots[: len(kept[0])], spots[len(kept[0]) :]
    figure = new_figure(6.3)
    axes = axes_at(figure, 0.7, 0.6, 8.1, 5.1)
    for image, text in joined[np.isin(joined[:, 0], kept[0]) & np.isin(joined[:, 1], kept[1])]:
        ends = np.stack([images[np.searchsorted(kept[0], image)], texts[np.searchsorted(kept[1], text)]])
        axes.plot(*ends.T, color=GREY, linewidth=0.6, alpha=0.6, zorder=1)
    for order, (name, points, rows) in enumerate((("images", images, sides[0]), ("texts", texts, sides[1]))):
        label = f"{len(points):,}" + (f" of {len(rows):,}" if len(points) < len(rows) else "") + f" {name}"
        look: dict[str, Any] = {"marker": "os"[order], "color": colour(order), "alpha": 0.7, "linewidth": 0}
        axes.scatter(points[:, 0], points[:, 1], 16, label=label, **look)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, markerscale=1.6)
    with_picture = [row for row in shown if row in kept[0]]
    if with_picture:
        places = images[np.searchsorted(kept[0], with_picture)]
        _thumbnails(figure, axes, places, [shown[row] for row in with_picture])
    return saved(figure, path)


# ---------------------------------------------------------------------------------- failures and data


def failures(
    queries: Sequence[str],
    images: Sequence[Picture],
    ranks: Sequence[int],
    above: Sequence[Sequence[Picture]],
    scores: Sequence[Sequence[float]] | None = None,
    path: SavePath = None,
    gallery: int | None = None,
    title: str = "",
) -> Figure:
    """Text queries that went wrong: their own picture with its rank, and the pictures ranked above it.

    Args:
        queries: Q captions, the worst first.
        images: the Q pictures they belong to.
        ranks: Q ranks of those pictures, 1 is nearest.
        above: Q lists of wrong pictures, nearest first.
        scores: Q lists: the own picture's similarity, then those of the pictures above.
        gallery: how many pictures were ranked.
    """
    rows = []
    size = f" of {gallery:,}" if gallery else ""
    for place, (query, own, rank, found) in enumerate(zip(queries, images, ranks, above, strict=True)):
        texts = [f"its own: rank {rank:,}{size}", *(f"rank {n}" for n in range(1, len(found) + 1))]
        if scores is not None:
            texts = [f"{text}  ·  {score:.3f}" for text, score in zip(texts, scores[place], strict=True)]
        judged = [True] + [False] * len(found)
        cells = [Cell(*parts) for parts in zip([own, *found], texts, judged, strict=True)]
        rows.append((f"“{query}”", cells))
    columns = max(4, *(len(cells) for _, cells in rows), 0)
    return saved(picture_rows(rows, columns, title), path)


def _count_bars(axes: Axes, counts: Mapping[Any, int]) -> None:
    bars = axes.bar([str(name) for name in counts], list(counts.values()), 0.7, color=BLUE)
    axes.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=2, fontsize=9)
    axes.margins(y=0.14)
    axes.grid(False, axis="x")


def _split_panel(axes: Axes, counts: Mapping[str, int]) -> None:
    _count_bars(axes, counts)
    axes.set(title=f"{sum(counts.values()):,} images", xlabel="split", ylabel="images")


def _captions_panel(axes: Axes, counts: Mapping[int, int]) -> None:
    _count_bars(axes, dict(sorted(counts.items())))
    total = sum(number * images for number, images in counts.items())
    axes.set(title=f"{total:,} captions", xlabel="captions an image", ylabel="images")


def _sizes_panel(axes: Axes, sizes: Any) -> None:
    """Widths and heights; a bubble grows with the number of images of one size."""
    points, counts = np.unique(to_numpy(sizes).astype(int).reshape(-1, 2), axis=0, return_counts=True)
    wide, high = points.T
    axes.scatter(wide, high, 14 + 500 * counts / counts.sum(), color=BLUE, alpha=0.45, linewidth=0)
    commonest = f"{wide[counts.argmax()]}×{high[counts.argmax()]}"
    limits = (0, 1.15 * points.max())
    axes.set(xlabel="width (px)", ylabel="height (px)", xlim=limits, ylim=limits)
    axes.set_title(f"{len(points):,} sizes, most {commonest}" if len(points) > 1 else f"all {commonest}")


def _lengths_panel(axes: Axes, lengths: Any) -> None:
    values = to_numpy(lengths).astype(int)
    axes.hist(values, list(np.arange(values.min(), values.max() + 2) - 0.5), color=BLUE)
    axes.axvline(np.median(values), color=INK, linestyle="--", linewidth=1.2)
    axes.set(title=f"median {np.median(values):.0f} words", xlabel="words a caption", ylabel="captions")


def _undecodable_panel(axes: Axes, causes: Mapping[str, int]) -> None:
    rows = range(len(causes))
    bars = axes.barh(rows, list(causes.values()), 0.6, color=WRONG)
    axes.bar_label(bars, [f"{count:,}" for count in causes.values()], padding=3, fontsize=9)
    axes.set(yticks=rows, yticklabels=[wrap(cause, 1.2) for cause in causes], xlabel="images left out")
    axes.set_title(f"{sum(causes.values()):,} undecodable images")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(False, axis="y")


PANELS: dict[str, Callable[[Axes, Any], None]] = {
    "images_per_split": _split_panel,
    "captions_per_image": _captions_panel,
    "image_sizes": _sizes_panel,
    "caption_lengths": _lengths_panel,
    "undecodable": _undecodable_panel,
}


@styled
def data_report(report: Mapping[str, Any], path: SavePath = None) -> Figure:
    """What a data check found: a panel for every key that is there and holds something.

    Args:
        report: `images_per_split` {split: images}, `captions_per_image` {captions: images},
            `image_sizes` [(width, height), ...], `caption_lengths` [words, ...] and
            `undecodable` {cause: images}.
    Raises: LabError if none of these keys holds anything.
    """
    panels = [(key, draw) for key, draw in PANELS.items() if report.get(key) is not None and len(report[key])]
    if not panels:
        raise LabError(f"the data report holds nothing to draw; it needs one of {', '.join(PANELS)}.")
    figure = new_figure(0.1 + 2.75 * -(-len(panels) // 3))
    for place, (key, draw) in enumerate(panels):
        indent = 0.6 if key == "undecodable" else 0.0  # room for the causes' names
        left, top = 0.75 + place % 3 * 3.0, 0.4 + place // 3 * 2.75
        draw(axes_at(figure, left + indent, top, 2.1 - indent, 1.75), report[key])
    return saved(figure, path)
