"""What every figure shares: colours, style, saving, placing in inches, measured text, legends.

Nothing goes through pyplot, so a long notebook keeps no figure alive.
"""

from __future__ import annotations

import functools
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from core.errors import LabError
from core.files import atomic_path

# --- Style and layout ---


WIDTH = 9.0  # inches: 900 px in a notebook
SAVE_DPI = 150
MAX_LINES = 12  # of one wrapped text
MARGIN, GAP = 0.12, 0.14  # inches

# Okabe & Ito's palette, told apart under every common colour blindness; its yellow is too pale on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
BLUE, WRONG, RIGHT, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#666666"
DOTTED: Any = (0, (1, 1.5))
# symbol, frame colour, frame line: never told by colour alone
VERDICTS: dict[bool, tuple[str, str, str]] = {True: ("✓", RIGHT, "solid"), False: ("✗", WRONG, "dashed")}
DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}

STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a caption with two dollar signs is no formula
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e2e2e2",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
}

Params = ParamSpec("Params")
SavePath = str | os.PathLike[str] | None


# --- style ---


def lab_style() -> AbstractContextManager[None]:
    """Context with the lab's style over matplotlib's defaults, whatever the session has set."""
    return matplotlib.style.context(["default", STYLE])


def styled(draw: Callable[Params, Figure]) -> Callable[Params, Figure]:
    """Decorator: run a figure's function under the lab's style."""

    @functools.wraps(draw)
    def wrapper(*args: Params.args, **kwargs: Params.kwargs) -> Figure:
        with lab_style():
            return draw(*args, **kwargs)

    return wrapper


class LabFigure(Figure):
    """A Figure drawn in the lab's style that shows itself in a notebook without pyplot."""

    def draw(self, renderer: Any) -> None:
        with lab_style():  # ticks are made while drawing
            super().draw(renderer)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=SAVE_DPI)
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height}


def new_figure(height: float) -> LabFigure:
    """An empty white figure at notebook width, `height` inches high."""
    return LabFigure(figsize=(WIDTH, height), dpi=100, facecolor="white")


def saved(figure: Figure, path: SavePath) -> Figure:
    """The figure, after saving it as PNG where `path` is given; parent folders are made."""
    if path is not None:
        with atomic_path(Path(path)) as beside:
            figure.savefig(beside, dpi=SAVE_DPI, format="png")
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes placed in inches from the figure's top left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def text_at(figure: Figure, left: float, top: float, text: str, size: float = 9, **options: Any) -> None:
    """Text whose top left corner lies `left`, `top` inches from the figure's top left corner."""
    across, down = figure.get_size_inches()
    figure.text(left / across, 1 - top / down, text, size=size, ha="left", va="top", **options)


def colour(position: int) -> str:
    """The palette's colour for the run or series at this position."""
    return COLOURS[position % len(COLOURS)]


# --- text ---


@functools.lru_cache(maxsize=8192)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Inches one line takes in the figures' font, with 5 % to spare for hinting."""
    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return TextToPath().get_text_width_height_descent(text, font, False)[0] / 72 * 1.05


def _width_to(word: str, size: float, bold: bool, end: int) -> float:
    return text_width(word[:end], size, bold)


def _pieces(word: str, width: float, size: float, bold: bool) -> Iterator[str]:
    """A word in pieces that fit, cut after `_`, `-`, `/` or `.` where there is one."""
    while len(word) > 1:
        end = 1  # doubled, so that a long word is never measured as a whole
        while end < len(word) and text_width(word[:end], size, bold) <= width:
            end *= 2
        if end >= len(word) and text_width(word, size, bold) <= width:
            break
        ends = range(1, min(end, len(word)))
        fits = max(1, bisect_right(ends, width, key=functools.partial(_width_to, word, size, bold)))
        mark = max(word.rfind(mark, 0, fits) for mark in "_-/.") + 1
        cut = mark if mark > fits // 2 else fits
        yield word[:cut]
        word = word[cut:]
    yield word


def wrap(text: Any, width: float, size: float = 9, bold: bool = False) -> str:
    """Text broken into lines at most `width` inches wide, measured in the figures' font.

    Line breaks in it stay. Past 12 lines (`MAX_LINES`) the last one says how much is left out.
    """
    lines: list[str] = []
    whole, most = len(str(text)), int(MAX_LINES * width / text_width("i", size, bold)) + 1
    text = str(text)[:most]  # no more than the lines hold is measured
    for paragraph in text.split("\n"):
        lines.append("")
        for piece in (piece for word in paragraph.split() for piece in _pieces(word, width, size, bold)):
            longer = f"{lines[-1]} {piece}".strip()
            if text_width(longer, size, bold) > width:
                lines.append(piece)
            else:
                lines[-1] = longer
    if len(lines) > MAX_LINES or whole > len(text):
        left_out = len(" ".join(lines[MAX_LINES - 1 :])) + whole - len(text)
        lines[MAX_LINES - 1 :] = [f"… (+{left_out} characters)"]
    return "\n".join(lines)


def text_height(wrapped: str, size: float = 9) -> float:
    """Inches that wrapped text takes."""
    return (wrapped.count("\n") + 1) * size * 1.25 / 72 if wrapped else 0.0


# --- legends ---


def legend_above(axes: Axes, handles: Sequence[Line2D]) -> None:
    """A legend of two columns over the axes, where it hides nothing."""
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.08, 1), ncols=2, columnspacing=1)


def legend_below(figure: Figure, names: Sequence[str]) -> None:
    """Grow the figure downwards by a legend of the runs, one colour a name; a single run needs none."""
    if len(names) < 2:
        return
    widest = max(text_width(name, 9, False) for name in names) + 0.7
    columns = max(1, min(len(names), int((WIDTH - 0.6) / widest)))
    width, before = figure.get_size_inches()
    height = before + 0.21 * -(-len(names) // columns) + 0.1
    for axes in figure.axes:
        box = axes.get_position(original=True)
        bottom = 1 - (1 - box.y0) * before / height
        axes.set_position((box.x0, bottom, box.width, box.height * before / height))
    figure.set_size_inches(width, height)
    handles = [Line2D([], [], color=colour(run), linewidth=5, label=name) for run, name in enumerate(names)]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.05, 0), ncols=columns)


def shade_bar(
    figure: Figure, shown: Any, left: float, top: float, label: str, extend: str = "neither"
) -> None:
    """A colour bar placed in inches."""
    bar = axes_at(figure, left, top, 2.3, 0.12)
    figure.colorbar(shown, cax=bar, orientation="horizontal", extend=extend)
    bar.set_xlabel(label, size=9)
    bar.grid(False)


# --- Parts: plain data read in any form; pictures, matrices and curves ---


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
def image_rows(
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
