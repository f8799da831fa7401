"""What every figure shares: colours, style, saving, placing in inches, measured text, legends.

Nothing goes through pyplot, so a long notebook keeps no figure alive.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath

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
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=SAVE_DPI, format="png")
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


def _pieces(word: str, width: float, size: float, bold: bool) -> Iterator[str]:
    """A word in pieces that fit, cut after `_`, `-`, `/` or `.` where there is one."""
    while len(word) > 1 and text_width(word, size, bold) > width:
        fits = max((n for n in range(1, len(word)) if text_width(word[:n], size, bold) <= width), default=1)
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
    for paragraph in str(text).split("\n"):
        lines.append("")
        for piece in (piece for word in paragraph.split() for piece in _pieces(word, width, size, bold)):
            longer = f"{lines[-1]} {piece}".strip()
            if text_width(longer, size, bold) > width:
                lines.append(piece)
            else:
                lines[-1] = longer
    if len(lines) > MAX_LINES:
        left_out = len(" ".join(lines[MAX_LINES - 1 :]))
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
