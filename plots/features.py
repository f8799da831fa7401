"""Figures of a model's features: modality gap and geometry, similarities, a map in the plane, failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle

from core.errors import LabError, choose
from plots.style import (
    BLUE,
    GREY,
    INK,
    LEGEND_ABOVE,
    LINE_HEIGHT,
    WRONG,
    Cell,
    ImageLike,
    SavePath,
    as_histories,
    as_pixels,
    color,
    image_rows,
    new_figure,
    plot_series,
    run_legend,
    saved,
    styled,
    text_lines,
    to_numpy,
    wrap,
)
from retrieval.figures import unit_rows

THUMBNAIL_PIXELS = 160

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
        history: a table with `epoch` and the columns of `retrieval.figures.feature_geometry`, or name -> table.
    """
    tables = as_histories(history)
    figure = new_figure(2.9)
    for axes, (label, series) in zip(figure.subplots(1, 3), GEOMETRY.items(), strict=True):
        axes.legend(handles=plot_series(axes, tables, series), ncols=2, **LEGEND_ABOVE)
        axes.set_ylabel(label, size=9)
    run_legend(figure, list(tables))
    return saved(figure, path)


# --- similarities ---


def _thumbnail(image: ImageLike, inches: float) -> OffsetImage:
    """An image whose longer side is `inches` long."""
    pixels = as_pixels(image, THUMBNAIL_PIXELS)
    return OffsetImage(pixels, zoom=72 * inches / max(pixels.shape[:2]))


@styled
def similarity_matrix(
    scores: Any,
    captions: Sequence[str],
    images: Sequence[ImageLike],
    matches: Any = None,
    path: SavePath = None,
    label: str = "cosine similarity",
) -> Figure:
    """Similarities of captions (rows) and images (columns), the matching cells framed.

    Args:
        scores: (I, T) for I images and T captions, or several such by title, drawn side by side on one scale.
        matches: (I, T) bool; by default the diagonal where I = T.
        label: what the scores are, with their unit.
    Raises: LabError if the scores' shape is not (I, T).
    """
    panels = scores if isinstance(scores, Mapping) else {"": scores}
    values = {title: to_numpy(panel).astype(float).T for title, panel in panels.items()}  # (T, I)
    shape = (len(captions), len(images))
    if any(panel.shape != shape or not panel.size for panel in values.values()):
        shapes = ", ".join(str(panel.T.shape) for panel in values.values())
        sizes = f"{len(images)} images and {len(captions)} captions"
        raise LabError(f"scores of shape {shapes} do not fit {sizes}; give (images, captions).")
    diagonal = np.eye(*shape, dtype=bool) & (len(captions) == len(images))
    framed = diagonal if matches is None else to_numpy(matches).astype(bool).T
    names = [wrap(caption, 40 if len(panels) == 1 else 28) for caption in captions]
    side = min(0.9, 5.0 / len(images) / len(panels))
    row_height = max(0.4, LINE_HEIGHT * max(map(text_lines, names)) + 0.1)
    figure = new_figure(side + row_height * len(names) + 1.0 + 0.3 * (len(panels) > 1))
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    scale = Normalize(min(panel.min() for panel in values.values()), max(p.max() for p in values.values()))
    for axes, (title, panel) in zip(grid, values.items(), strict=True):
        shades = _similarity_panel(axes, panel, framed, images, side, scale)
        axes.set_title(title, pad=72 * side + 10 if title else None)
    grid[0].set(yticks=range(len(names)), yticklabels=names)
    bar: dict[str, Any] = {"location": "bottom", "shrink": 0.5, "aspect": 25}
    figure.colorbar(shades, ax=grid, label=f"{label}; framed: matching", **bar).ax.grid(False)
    return saved(figure, path)


def _similarity_panel(
    axes: Axes,
    values: np.ndarray,
    framed: np.ndarray,
    images: Sequence[ImageLike],
    side: float,
    scale: Normalize,
) -> AxesImage:
    """(T, I) similarities under thumbnails whose longer side is `side` inches."""
    shades = axes.imshow(values, "Blues", norm=scale, aspect="auto")
    axes.set(xticks=[])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if side > 0.35:
        texts = np.vectorize("{:.2f}".format)(values.round(2) + 0.0)  # adding 0 turns -0.00 into 0.00
        dark = np.asarray(scale(values)) > 0.6
        for row, column in np.ndindex(values.shape):
            ink = "white" if dark[row, column] else INK
            axes.text(column, row, texts[row, column], ha="center", va="center", color=ink, size=8.5)
    for text, image in np.argwhere(framed):
        corner = (image - 0.48, text - 0.47)
        axes.add_patch(Rectangle(corner, 0.96, 0.94, fill=False, edgecolor=WRONG, linewidth=2))
    for column, image in enumerate(images):
        above: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "box_alignment": (0.5, 0)}
        axes.add_artist(AnnotationBbox(_thumbnail(image, side), (column, 1), frameon=False, **above))
    return shades


# --- temperature ---


@styled
def temperature_curves(
    cosines: Any, temperatures: Sequence[float] = (1.0, 0.2, 0.05), match: int = 0, path: SavePath = None
) -> Figure:
    """The softmax of one query's cosines (G,) at several temperatures, the gallery from nearest to farthest.

    Args: match: the query's own gallery item, marked by a star.
    """
    values = to_numpy(cosines).astype(float)
    order = np.argsort(-values, kind="stable")
    place = int(np.flatnonzero(order == match)[0])
    figure = new_figure(2.6)
    axes = figure.subplots()
    for number, temperature in enumerate(temperatures):
        weights = np.exp((values - values.max()) / temperature)
        shares = 100 * (weights / weights.sum())[order]
        look: dict[str, Any] = {"color": color(number), "label": f"temperature {temperature:g}"}
        axes.plot(
            range(1, len(order) + 1), shares, marker="o" if len(order) <= 30 else "", markersize=3, **look
        )
        axes.plot(place + 1, shares[place], marker="*", markersize=13, color=color(number))
    axes.set(
        xlabel="captions of the batch, from nearest to farthest (star: the image's own)",
        ylabel="probability (%)",
    )
    axes.set_ylim(bottom=0)
    axes.legend(ncols=len(temperatures), **LEGEND_ABOVE)
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


def _sample(count: int, limit: int, required: Sequence[int], seed: int) -> np.ndarray:
    """At most `limit` of `count` rows, ascending: the required ones, and a random sample of the others."""
    first = np.unique(np.asarray(required, dtype=int))[:limit]
    others = np.setdiff1d(np.arange(count), first)
    sample = np.random.default_rng(seed).permutation(others)[: max(0, limit - len(first))]
    return np.sort(np.concatenate([first, sample]))


def _place_thumbnails(axes: Axes, images: Iterable[tuple[Any, ImageLike]], side: float = 0.5) -> None:
    """Small images at their points; one that would hide an earlier one is left out."""
    to_inches = (axes.transData + axes.figure.dpi_scale_trans.inverted()).transform
    placed: list[np.ndarray] = []
    for spot, image in images:
        point = to_inches(spot)
        if any(np.abs(point - other).max() < side for other in placed):
            continue
        placed.append(point)
        frame = {"edgecolor": BLUE, "linewidth": 1.5}
        box = AnnotationBbox(_thumbnail(image, 0.9 * side), spot, pad=0.08, bboxprops=frame)
        box.set_in_layout(False)
        axes.add_artist(box)


@styled
def modality_map(
    image_features: Any,
    text_features: Any,
    path: SavePath = None,
    method: str = "pca",
    thumbnails: Mapping[int, ImageLike] | Sequence[ImageLike] | None = None,
    pairs: Any = None,
    seed: int = 0,
    limit: int = 1000,
) -> Figure:
    """Both modalities in one plane; deterministic for a given seed.

    Args:
        image_features, text_features: (I, D) and (T, D), normalized here.
        method: "pca" or "tsne"; t-SNE takes about 10 s for 2,000 rows in all.
        thumbnails: image row -> image, or an image for each of the first rows; drawn where there is room.
        pairs: (P, 2) rows (image, text) joined by a line.
        limit: at most this many rows of each modality, a random sample by seed; the legend says so.
    """
    sides = [unit_rows(image_features, "image_features"), unit_rows(text_features, "text_features")]
    joined = np.zeros((0, 2), int) if pairs is None else to_numpy(pairs).astype(int).reshape(-1, 2)
    given = () if thumbnails is None else thumbnails
    images = dict(given if isinstance(given, Mapping) else enumerate(given))
    required: list[Sequence[int]] = [[*images, *joined[:, 0]], joined[:, 1].tolist()]
    samples = [_sample(len(rows), limit, first, seed) for rows, first in zip(sides, required, strict=True)]
    rows = np.concatenate([rows[sample] for rows, sample in zip(sides, samples, strict=True)])
    if len(np.unique(rows, axis=0)) < 3:
        raise LabError("a map in the plane needs at least three different features.")
    spots, labels = choose(MAPS, method, "method")(rows, seed)
    parts = zip(samples, np.split(spots, [len(samples[0])]), strict=True)
    points = [dict(zip(sample.tolist(), part, strict=True)) for sample, part in parts]  # row -> (2,)
    figure = new_figure(5.8)
    axes = figure.subplots()
    for image, text in joined:
        if image in points[0] and text in points[1]:
            axes.plot(
                *zip(points[0][image], points[1][text], strict=True),
                color=GREY,
                linewidth=0.6,
                alpha=0.6,
                zorder=1,
            )
    for order, name in enumerate(("images", "texts")):
        some, total = len(points[order]), len(sides[order])
        label = f"{some:,} of {total:,} {name}" if some < total else f"{total:,} {name}"
        look: dict[str, Any] = {"marker": "os"[order], "color": color(order), "alpha": 0.7, "linewidth": 0}
        x, y = np.stack([*points[order].values()]).T
        axes.scatter(x, y, 16, label=label, **look)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(ncols=2, markerscale=1.6, **LEGEND_ABOVE)
    figure.draw_without_rendering()  # so that the limits and the layout are final
    _place_thumbnails(axes, [(points[0][row], image) for row, image in images.items() if row in points[0]])
    return saved(figure, path)


# --- failures ---


@dataclass(frozen=True)
class Failure:
    """A caption whose image is not the nearest.

    Args:
        rank: of the matching image, 1 is nearest.
        above: the wrong images, nearest first.
        scores: similarity of the matching image, then of those above.
    """

    query: str
    image: ImageLike
    rank: int
    above: Sequence[ImageLike]
    scores: Sequence[float]

    def cells(self, gallery: int) -> list[Cell]:
        """The matching image with its rank among `gallery` images, then those ranked above it."""
        texts = [
            f"match: rank {self.rank:,} of {gallery:,}",
            *(f"rank {n + 1}" for n in range(len(self.above))),
        ]
        return [
            Cell(image, f"{text}  ·  {score:.3f}", correct=place == 0)
            for place, (image, text, score) in enumerate(
                zip([self.image, *self.above], texts, self.scores, strict=True)
            )
        ]


def failures(rows: Sequence[Failure], gallery: int, path: SavePath = None) -> Figure:
    """Text queries that failed, the worst first, in a gallery of so many images."""
    return saved(image_rows([(f"“{row.query}”", row.cells(gallery)) for row in rows]), path)
