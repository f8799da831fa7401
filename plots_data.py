"""The data check's report as a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from errors import LabError
from plots_style import BLUE, INK, WRONG, SavePath, axes_at, new_figure, saved, styled, wrap


def _count_bars(axes: Axes, counts: Mapping[Any, int]) -> None:
    bars = axes.bar([str(name) for name in counts], list(counts.values()), 0.7, color=BLUE)
    axes.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=2, fontsize=9)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))  # 120k: six digits would leave the figure
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
    points, counts = np.unique(np.asarray(sizes, int).reshape(-1, 2), axis=0, return_counts=True)
    wide, high = points.T
    axes.scatter(wide, high, 14 + 500 * counts / counts.sum(), color=BLUE, alpha=0.45, linewidth=0)
    commonest = f"{wide[counts.argmax()]}×{high[counts.argmax()]}"
    limits = (0, 1.15 * points.max())
    axes.set(xlabel="width (px)", ylabel="height (px)", xlim=limits, ylim=limits)
    axes.set_title(f"{len(points):,} sizes, most {commonest}" if len(points) > 1 else f"all {commonest}")


def _lengths_panel(axes: Axes, lengths: Any) -> None:
    values = np.asarray(lengths, int)
    axes.hist(values, list(np.arange(values.min(), values.max() + 2) - 0.5), color=BLUE)
    axes.axvline(np.median(values), color=INK, linestyle="--", linewidth=1.2)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
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
    """What the data check found, a panel for each part that holds something.

    Args:
        report: as `data_check.check` makes it or `data_check.load_report` reads it; drawn are
            `images_per_split` {split: images}, `captions_per_image` {captions: images},
            `image_sizes` [[width, height], ...], `caption_lengths` [words, ...] and
            `undecodable` {cause: images}.
    Raises: LabError if none of these holds anything.
    """
    panels = [(key, draw) for key, draw in PANELS.items() if report.get(key)]
    if not panels:
        raise LabError(f"the data report holds nothing to draw; it needs one of {', '.join(PANELS)}.")
    figure = new_figure(0.1 + 2.75 * -(-len(panels) // 3))
    for place, (key, draw) in enumerate(panels):
        indent = 0.6 if key == "undecodable" else 0.0  # room for the causes' names
        left, top = 0.75 + place % 3 * 3.0, 0.4 + place // 3 * 2.75
        draw(axes_at(figure, left + indent, top, 2.1 - indent, 1.75), report[key])
    return saved(figure, path)
