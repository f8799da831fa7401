"""Figures that look inside a model's features: modality gap and geometry, similarities, a map, failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle

from core.errors import LabError, choose
from plots.style import (
    BLUE,
    GREY,
    MARGIN,
    WRONG,
    Cell,
    Picture,
    SavePath,
    as_histories,
    as_picture,
    axes_at,
    colour,
    draw_picture,
    image_rows,
    legend_above,
    legend_below,
    new_figure,
    plot_series,
    saved,
    shade_bar,
    shaded_matrix,
    styled,
    text_height,
    to_numpy,
    wrap,
)
from retrieval.figures import unit_rows

# --- geometry ---

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
        history: a table with `epoch` and the columns that `geometry.feature_geometry` gives, or name -> table.
    """
    tables = as_histories(history)
    figure = new_figure(3.1)
    for place, (label, series) in enumerate(GEOMETRY.items()):
        axes = axes_at(figure, 0.75 + place * 3.0, 0.4, 2.15, 2.15)
        legend_above(axes, plot_series(axes, tables, series))
        axes.set_ylabel(label, size=9)
    legend_below(figure, list(tables))
    return saved(figure, path)


# --- similarities ---


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
    shown = shaded_matrix(axes, values, texts, (values.min(), values.max()))
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=[])
    for text, image in np.argwhere(framed):
        corner = (image - 0.48, text - 0.47)
        axes.add_patch(Rectangle(corner, 0.96, 0.94, fill=False, edgecolor=WRONG, linewidth=2))
    for place, picture in enumerate(images):
        thumbnail = axes_at(figure, 3.15 + (place + 0.04) * cell, MARGIN, 0.92 * cell, cell)
        draw_picture(thumbnail, as_picture(picture, 160))
    shade_bar(figure, shown, 3.15, top + height + 0.2, f"{label}; framed: matching")
    return saved(figure, path)


# --- the map of both modalities ---


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


def _project(
    sides: Sequence[np.ndarray], wanted: Sequence[Any], method: str, limit: int, seed: int
) -> tuple[list[dict[int, np.ndarray]], list[str]]:
    """Row -> (2,) place in the plane for the rows kept of each modality, and the axes' labels."""
    kept = [_chosen(len(rows), limit, want, seed) for rows, want in zip(sides, wanted, strict=True)]
    rows = np.concatenate([rows[keep] for rows, keep in zip(sides, kept, strict=True)])
    if len(np.unique(rows, axis=0)) < 3:
        raise LabError("a map in the plane needs at least three different features.")
    spots, labels = choose(MAPS, method, "method")(rows, seed)
    parts = np.split(spots, [len(kept[0])])
    return [dict(zip(keep, part, strict=True)) for keep, part in zip(kept, parts, strict=True)], labels


def _place_thumbnails(axes: Axes, images: Iterable[tuple[Any, Picture]], size: float = 0.5) -> None:
    """Small pictures at their points; one that would hide an earlier one is left out."""
    axes.autoscale_view()  # the limits that will be drawn, not those before the last points
    to_inches = (axes.transData + axes.figure.dpi_scale_trans.inverted()).transform
    placed: list[np.ndarray] = []
    for spot, image in images:
        point = to_inches(spot)
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
    sides = [unit_rows(image_features, "image_features"), unit_rows(text_features, "text_features")]
    joined = np.zeros((0, 2), int) if pairs is None else to_numpy(pairs).astype(int).reshape(-1, 2)
    given = () if thumbnails is None else thumbnails
    shown = dict(given if isinstance(given, Mapping) else enumerate(given))
    wanted = [[*shown, *joined[:, 0]], joined[:, 1]]
    spots, labels = _project(sides, wanted, method, limit, seed)
    figure = new_figure(6.3)
    axes = axes_at(figure, 0.7, 0.6, 8.1, 5.1)
    for image, text in joined:
        if image in spots[0] and text in spots[1]:
            ends = np.stack([spots[0][image], spots[1][text]])
            axes.plot(*ends.T, color=GREY, linewidth=0.6, alpha=0.6, zorder=1)
    for order, name in enumerate(("images", "texts")):
        points, total = np.stack([*spots[order].values()]), len(sides[order])
        label = f"{len(points):,} of {total:,} {name}" if len(points) < total else f"{total:,} {name}"
        look: dict[str, Any] = {"marker": "os"[order], "color": colour(order), "alpha": 0.7, "linewidth": 0}
        axes.scatter(points[:, 0], points[:, 1], 16, label=label, **look)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, markerscale=1.6)
    _place_thumbnails(axes, [(spots[0][row], image) for row, image in shown.items() if row in spots[0]])
    return saved(figure, path)


# --- failures ---


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
    return saved(image_rows(rows, title), path)
