"""What every figure shares: colors, style, saving, wrapped text, and rows of images with captions.

No figure is registered with pyplot, so a long notebook keeps none of them in memory.
"""

from __future__ import annotations

import functools
import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from core.errors import LabError
from core.files import atomic_path

WIDTH = 9.0  # inches: 900 px in a notebook
SAVE_DPI = 150
MAX_LINES = 20  # of one wrapped text
LETTERS_PER_INCH, LINE_HEIGHT = 13, 0.165  # estimates for the 9 pt text under an image

# The palette of Okabe & Ito, distinct under every common color blindness; its yellow is too pale on white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
BLUE, WRONG, RIGHT, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#666666"
DOTTED: Any = (0, (1, 1.5))
# symbol, frame color, frame line: the color is never the only sign
VERDICTS: dict[bool, tuple[str, str, str]] = {True: ("✓", RIGHT, "solid"), False: ("✗", WRONG, "dashed")}
DIRECTIONS = {"i2t": "image-to-text", "t2i": "text-to-image"}
LEGEND_ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "columnspacing": 0.8,
    "handlelength": 1.5,
}

STYLE: dict[str, Any] = {
    "figure.constrained_layout.w_pad": 0.08,  # inches
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a caption with two dollar signs is not a formula
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
    "legend.columnspacing": 0.8,
    "legend.handlelength": 1.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
}

Params = ParamSpec("Params")
SavePath = str | os.PathLike[str] | None
ImageLike = Any  # a PIL image, a path, pixels (H, W, 3) or (H, W), a tensor (3, H, W)
Metrics = Mapping[str, Any]
Table = pd.DataFrame | Metrics | Sequence[Metrics]
Series = Mapping[str, tuple[str, Any]]  # column -> (label, line style)


# --- style and saving ---


def lab_style() -> AbstractContextManager[None]:
    """Context with the lab's style over matplotlib's defaults, independent of the session's settings."""
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
    """An empty white figure at notebook width, `height` inches high, whose layout makes room for all texts."""
    return LabFigure(figsize=(WIDTH, height), dpi=100, facecolor="white", layout="constrained")


def saved(figure: Figure, path: SavePath) -> Figure:
    """The figure, after saving it as PNG if `path` is given; missing parent folders are created."""
    if path is not None:
        with atomic_path(Path(path)) as temporary:
            figure.savefig(temporary, dpi=SAVE_DPI, format="png")
    return figure


def color(position: int) -> str:
    """The palette's color for the run or series at this position."""
    return COLORS[position % len(COLORS)]


def wrap(text: Any, width: int) -> str:
    """Text broken into at most `MAX_LINES` lines of `width` characters; its own line breaks are kept."""
    shortened = str(text)[: (MAX_LINES + 1) * width]
    lines = [line for part in shortened.splitlines() for line in textwrap.wrap(part, width) or [""]]
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "…"])


def text_lines(wrapped: str) -> int:
    return wrapped.count("\n") + 1 if wrapped else 0


def run_legend(figure: Figure, names: Sequence[str]) -> None:
    """A legend of the runs' colors below the panels; a single run needs none."""
    if len(names) < 2:
        return
    columns = max(1, min(len(names), 120 // (max(map(len, names)) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.21 * -(-len(names) // columns))
    handles = [Line2D([], [], color=color(run), linewidth=5, label=name) for run, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


# --- data in every accepted form ---


def to_numpy(values: Any) -> np.ndarray:
    """An array of anything array-like, including tensors on any device."""
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
        raise LabError(f"an array of shape {array.shape} is not an image; give (H, W, 3) or (3, H, W).")
    if array.dtype != np.uint8:
        if array.size and not 0 <= array.min() <= array.max() <= 1:
            raise LabError("pixel values are outside [0, 1]; undo the image's normalization or give uint8.")
        array = (array * 255).round().astype(np.uint8)
    return np.broadcast_to(array, (*array.shape[:2], 3)).copy()


def as_pixels(image: ImageLike, longest: int = 480) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of an image in any accepted form, its longer side at most `longest`.

    Raises: LabError if a file cannot be read, or if an array is not an image.
    """
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        image = Image.fromarray(_pixels(image))
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        message = f"the image {image} cannot be read; replace it or leave it out ({error})."
        raise LabError(message) from error
    upright.thumbnail((longest, longest))
    return np.asarray(upright)


def as_table(rows: Table) -> pd.DataFrame:
    """One row per run, indexed by its name, from a table, a metrics dict, or a list or dict of them.

    Names come from a column `run` or `name` if there is one. Raises: LabError if there is no row.
    """
    if isinstance(rows, Mapping):
        nested = rows and all(isinstance(value, Mapping) for value in rows.values())
        named = rows if nested else {"": rows}
        table = pd.DataFrame(list(named.values()), index=list(named))
    else:
        table = pd.DataFrame(rows)
    if table.empty:
        raise LabError("there is no run to draw; give a table with one row per run.")
    name = next((column for column in ("run", "name") if column in table), None)
    return table if name is None else table.set_index(name)


def chance_of(chance: float | Metrics | None, metric: str) -> float | None:
    """Chance for one metric, from a mapping by metric; a bare number applies to Recall@1 alone."""
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


# --- images ---


@dataclass(frozen=True)
class Cell:
    """An image, the text under it, and whether it is right (None: not judged)."""

    image: ImageLike
    text: str = ""
    correct: bool | None = None


def draw_image(axes: Axes, pixels: np.ndarray, correct: bool | None = None) -> None:
    """An image without ticks; right and wrong have their own frame color, frame line and symbol."""
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
    """Rows of images with their texts, each row under its heading.

    Args:
        rows: (heading, cells) per row; an empty heading takes no space.
        columns: how many cells share the width; by default as many as the longest row has, at least 4.
    Raises: LabError if there is no image.
    """
    if not any(cells for _, cells in rows):
        raise LabError("there is no image to draw.")
    columns = columns or max(4, *(len(cells) for _, cells in rows))
    side = WIDTH / columns - 0.15
    pixels = [[as_pixels(cell.image) for cell in cells] for _, cells in rows]
    texts = [[wrap(cell.text, int(LETTERS_PER_INCH * side)) for cell in cells] for _, cells in rows]
    headings = [wrap(heading, 100) for heading, _ in rows]
    title = wrap(title, 90)
    heights = []
    for images, captions, heading in zip(pixels, texts, headings, strict=True):
        image_height = side * min(1.1, max((p.shape[0] / p.shape[1] for p in images), default=0))
        lines = text_lines(heading) + max(map(text_lines, captions), default=0)
        heights.append(image_height + LINE_HEIGHT * lines + 0.25)
    figure = new_figure(sum(heights) + 0.25 * text_lines(title))
    if title:
        figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    panels = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, (panel, (_, cells)) in enumerate(zip(panels, rows, strict=True)):
        if headings[row]:
            panel.suptitle(headings[row], x=0.01, ha="left", size=10, weight="bold")
        for column, axes in enumerate(panel.subplots(1, columns, squeeze=False)[0]):
            if column < len(cells):
                draw_image(axes, pixels[row][column], cells[column].correct)
                axes.set_xlabel(texts[row][column], loc="left", size=9)
            else:
                axes.set_axis_off()
    return figure


# --- curves ---


def plot_series(
    axes: Axes, tables: Mapping[str, pd.DataFrame], series: Series, best: Mapping[str, Any] | None = None
) -> list[Line2D]:
    """Columns of every run against the epoch: colored by run, or by column if there is one run.

    Returns: one legend handle per column.
    """
    handles = []
    single = len(tables) == 1
    for order, (column, (label, line)) in enumerate(series.items()):
        having = [(run, name) for run, name in enumerate(tables) if column in tables[name]]
        for run, name in having:
            points = tables[name][["epoch", column]].dropna()
            shade = color(order if single else run)
            marker = "o" if len(points) < (25 if single else 2) else ""
            axes.plot(points["epoch"], points[column], linestyle=line, marker=marker, color=shade, label=name)
            starred = points[points["epoch"] == (best or {}).get(name)]
            if len(starred) and column != "train_loss":
                axes.plot(starred["epoch"], starred[column], "*", color=shade, ms=13, mec="white", zorder=3)
        if having:
            shade = color(order) if single else GREY
            handles.append(Line2D([], [], color=shade, linestyle=line, label=label))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    return handles
