"""Parts that several figures share: plain data read in any form; pictures, matrices and curves drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from errors import LabError
from plots_style import (
    GAP,
    GREY,
    INK,
    MARGIN,
    VERDICTS,
    WIDTH,
    axes_at,
    colour,
    new_figure,
    styled,
    text_at,
    text_height,
    wrap,
)

Picture = Any  # a PIL image, a path, pixels (H, W, 3) or (H, W), a tensor (3, H, W)
Metrics = Mapping[str, Any]
Table = pd.DataFrame | Metrics | Sequence[Metrics]
Series = Mapping[str, tuple[str, Any]]  # column -> (label, line)


# --- data ---


def to_numpy(values: Any) -> np.ndarray:
    """An array of anything array-like; a tensor leaves its device and its gradient behind."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def _pixels(values: Any) -> np.ndarray:
    """(H, W, 3) uint8 of an array or tensor."""
    array = to_numpy(values)
    tensor = hasattr(values, "detach")
    if array.ndim == 3 and array.shape[0] in (1, 3) and (tensor or array.shape[-1] not in (1, 3)):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise LabError(f"an array of shape {array.shape} is no picture; give (H, W, 3) or (3, H, W).")
    if array.dtype != np.uint8:
        if array.size and not 0 <= array.min() <= array.max() <= 1:
            raise LabError("a picture's pixels lie outside [0, 1]; undo its normalisation or give uint8.")
        array = (array * 255).round().astype(np.uint8)
    return np.broadcast_to(array, (*array.shape[:2], 3)).copy()


def as_picture(image: Picture, longest: int = 480) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a picture in any accepted form, its longer side at most `longest`.

    Raises: LabError if a file cannot be read, or if an array is no picture.
    """
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        image = Image.fromarray(_pixels(image))
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's answer to a broken PNG
        message = f"the picture {image} cannot be read; replace it or leave it out ({error})."
        raise LabError(message) from error
    picture.thumbnail((longest, longest))
    return np.asarray(picture)


def as_table(rows: Table) -> pd.DataFrame:
    """One row a run, indexed by its name, from a table, a metrics dict, or a list or dict of them.

    Names come from a column `run` or `name` where there is one. Raises: LabError if there is no row.
    """
    if isinstance(rows, Mapping):
        if rows and all(isinstance(value, Mapping) for value in rows.values()):
            table = pd.DataFrame(list(rows.values()), index=list(rows))
        else:
            table = pd.DataFrame([dict(rows)], index=[""])
    else:
        table = pd.DataFrame(rows)
    if table.empty:
        raise LabError("there is no run to draw; give a table with one row a run.")
    names = [column for column in ("run", "name") if column in table]
    return table.set_index(names[0]) if names else table


def chance_of(chance: float | Metrics | None, metric: str) -> float | None:
    """Chance for one metric, from a mapping by metric; a bare number speaks of Recall@1 alone."""
    level = chance.get(metric) if isinstance(chance, Mapping) else chance if metric.endswith("@1") else None
    return None if level is None else float(level)


def as_histories(histories: Mapping[str, Any] | pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Run name -> table, from a mapping of tables or lists of rows, or from one run's table."""
    named = {"": histories} if isinstance(histories, pd.DataFrame) else histories
    tables = {name: pd.DataFrame(history) for name, history in named.items()}
    for name, table in tables.items():
        if len(table) and "epoch" not in table:
            raise LabError(f"the history of {name or 'the run'} has no column 'epoch'; add it.")
    return tables


# --- pictures ---


@dataclass(frozen=True)
class Cell:
    """A picture, the text under it, and whether it is right (None: not judged)."""

    image: Picture
    text: str = ""
    correct: bool | None = None


def draw_picture(axes: Axes, pixels: np.ndarray, correct: bool | None = None) -> None:
    """A picture without ticks; right and wrong get a frame of their own colour and line, and a symbol."""
    axes.imshow(pixels, interpolation="antialiased")
    axes.set(xticks=[], yticks=[], anchor="SW")
    axes.grid(False)
    axes.spines[:].set_visible(correct is not None)
    if correct is not None:
        symbol, frame, line = VERDICTS[bool(correct)]
        axes.spines[:].set(edgecolor=frame, linewidth=3, linestyle=line)
        badge: dict[str, Any] = {"boxstyle": "circle,pad=0.25", "facecolor": frame, "edgecolor": "white"}
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "left", "va": "top"}
        axes.text(0.05, 0.95, symbol, size=11, color="white", bbox=badge, **place)


@styled
def picture_rows(
    rows: Sequence[tuple[str, Sequence[Cell]]], title: str = "", columns: int | None = None
) -> Figure:
    """Rows of pictures, each under its heading; the figure grows with the texts.

    Args:
        rows: (heading, cells) a row; an empty heading takes no room.
        columns: how many cells share the width; by default as many as the longest row has, at least 4.
    Raises: LabError if there is no picture.
    """
    if not any(cells for _, cells in rows):
        raise LabError("there is no picture to draw.")
    columns = columns or max(4, *(len(cells) for _, cells in rows))
    cell = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    pixels = [[as_picture(item.image) for item in cells] for _, cells in rows]
    texts = [[wrap(item.text, cell) for item in cells] for _, cells in rows]
    heads = [wrap(heading, WIDTH - 2 * MARGIN, 10, bold=True) for heading, _ in rows]
    boxes = [min(1.1, max((p.shape[0] / p.shape[1] for p in row), default=0)) * cell for row in pixels]
    starts = [text_height(head, 10) + (0.06 if head else 0) for head in heads]
    below = [0.08 + max(map(text_height, row), default=0) + 0.2 for row in texts]
    title = wrap(title, WIDTH - 2 * MARGIN, 11, bold=True)
    top = MARGIN + text_height(title, 11) + (0.12 if title else 0)
    figure = new_figure(top + sum(starts) + sum(boxes) + sum(below))
    text_at(figure, MARGIN, MARGIN, title, 11, weight="bold")
    for row, (_, cells) in enumerate(rows):
        text_at(figure, MARGIN, top, heads[row], 10, weight="bold")
        top += starts[row]
        for column, item in enumerate(cells):
            left = MARGIN + column * (cell + GAP)
            draw_picture(axes_at(figure, left, top, cell, boxes[row]), pixels[row][column], item.correct)
            text_at(figure, left, top + boxes[row] + 0.08, texts[row][column])
        top += boxes[row] + below[row]
    return figure


# --- matrices and curves ---


def shaded_matrix(
    axes: Axes, values: np.ndarray, texts: np.ndarray, limits: tuple[float, float]
) -> AxesImage:
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


def plot_series(
    axes: Axes, tables: Mapping[str, pd.DataFrame], series: Series, best: Mapping[str, Any] | None = None
) -> list[Line2D]:
    """Columns of every run against the epoch: coloured by run, or by column where there is one run.

    Returns: a legend handle a column.
    """
    handles = []
    single = len(tables) == 1
    for order, (column, (label, line)) in enumerate(series.items()):
        having = [(run, name) for run, name in enumerate(tables) if column in tables[name]]
        for run, name in having:
            points = tables[name][["epoch", column]].dropna()
            shade = colour(order if single else run)
            marker = "o" if len(points) < (25 if single else 2) else ""
            axes.plot(points["epoch"], points[column], linestyle=line, marker=marker, color=shade, label=name)
            starred = points[points["epoch"] == (best or {}).get(name)]
            if len(starred) and column != "train_loss":
                axes.plot(starred["epoch"], starred[column], "*", color=shade, ms=13, mec="white", zorder=3)
        if having:
            shade = colour(order) if single else GREY
            handles.append(Line2D([], [], color=shade, linestyle=line, label=label))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    return handles
