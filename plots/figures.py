"""The lab's everyday figures: images with captions, learning curves, bars, attention, the data check.

Every function takes plain data (arrays, tables, PIL images or paths), returns the Figure, and saves it
as PNG if `path` is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from core.errors import LabError
from plots.style import (
    BLUE,
    DIRECTIONS,
    DOTTED,
    GREY,
    INK,
    LEGEND_ABOVE,
    LETTERS_PER_INCH,
    LINE_HEIGHT,
    VERDICTS,
    WIDTH,
    WRONG,
    Cell,
    ImageLike,
    Metrics,
    SavePath,
    Series,
    Table,
    as_histories,
    as_pixels,
    as_table,
    chance_of,
    color,
    draw_image,
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


def captioned_images(
    images: Sequence[ImageLike],
    captions: Sequence[str | Sequence[str]],
    path: SavePath = None,
    columns: int = 4,
    title: str = "",
) -> Figure:
    """Images with their captions wrapped under them; several captions per image become a bullet list."""
    if len(captions) != len(images):
        raise LabError(f"{len(images)} images and {len(captions)} captions; give one caption per image.")
    texts = [text if isinstance(text, str) else "\n".join(f"• {line}" for line in text) for text in captions]
    cells = [Cell(image, text) for image, text in zip(images, texts, strict=True)]
    rows = [("", cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return saved(image_rows(rows, title, columns), path)


# --- curves ---

LOSSES: Series = {"train_loss": ("train", "--"), "val_loss": ("validation", "-")}
RECALLS: Series = {
    "i2t_recall@1": (DIRECTIONS["i2t"], "-"),
    "t2i_recall@1": (DIRECTIONS["t2i"], "--"),
    "top1_best": ("best so far", "--"),
    "top1": ("top-1 of all captions", "-"),
}
RATES: Series = {"learning_rate": ("learning rate", "-")}


@styled
def learning_curves(
    histories: Mapping[str, Any] | pd.DataFrame,
    path: SavePath = None,
    chance: float | Metrics | None = None,
    chance_loss: float | None = None,
    best_epoch: int | Mapping[str, int] | None = None,
) -> Figure:
    """Loss, Recall@1 and learning rate of one or several runs; quick enough to redraw every epoch.

    Args:
        histories: run name -> table with `epoch`, `train_loss`, `val_loss`, `learning_rate`, and
            `i2t_recall@1`, `t2i_recall@1` or `top1` in [0, 1]; columns and values may be missing.
        chance: Recall@1 of random ranking, in [0, 1]; a number, or a mapping by metric.
        chance_loss: the chance-level loss (`losses.chance_level`); None where the loss has none.
        best_epoch: marked with a star; a number, or one per run.
    """
    tables = as_histories(histories)
    for name, table in tables.items():
        table = table.assign(top1_best=table["top1"].cummax()) if "top1" in table else table
        tables[name] = table.assign(**{column: 100 * table[column] for column in RECALLS if column in table})
    level = chance_of(chance, "i2t_recall@1")
    best = best_epoch if isinstance(best_epoch, Mapping) else dict.fromkeys(tables, best_epoch)
    epochs = {epoch for epoch in best.values() if epoch is not None}
    label = f"best epoch {min(epochs)}" if len(epochs) == 1 else "best epoch"
    star = Line2D([], [], color=GREY, linestyle="", marker="*", markersize=10, label=label)
    figure = new_figure(3.1)
    loss, recall, rate = figure.subplots(1, 3)
    for axes, series, reference, label in (
        (loss, LOSSES, chance_loss, "chance level {:.2f}"),
        (recall, RECALLS, None if level is None else 100 * level, "chance {:.2g} %"),
    ):
        handles = plot_series(axes, tables, series, best)
        if reference is not None:
            look: dict[str, Any] = {"color": INK, "linestyle": DOTTED, "linewidth": 1.4}
            handles.append(axes.axhline(reference, label=label.format(reference), **look))
        axes.legend(handles=handles + [star] * bool(epochs), ncols=2, **LEGEND_ABOVE)
    plot_series(rate, tables, RATES)
    rate.set_ylim(bottom=0)
    power = 10.0 ** np.floor(np.log10(rate.get_ylim()[1]))
    loss.set_ylabel("loss")
    ranked = any("top1" in table for table in tables.values())
    recall.set_ylabel("accuracy (%)" if ranked else "Recall@1 (%)")
    rate.set_ylabel(f"learning rate ({power:.0e})")
    rate.yaxis.set_major_formatter(lambda value, _: f"{value / power:.3g}")
    run_legend(figure, list(tables))
    return saved(figure, path)


# --- bars ---


def _recall_panel(
    axes: Axes, runs: pd.DataFrame, metrics: Sequence[str], levels: Sequence[float | None]
) -> None:
    """Bars of every run over each metric, in percent, with dotted lines at chance."""
    width = 0.86 / len(runs)
    for run, (name, row) in enumerate(runs.iterrows()):
        heights = [100 * float(row.get(metric, np.nan)) for metric in metrics]
        middles = np.arange(len(metrics)) - 0.43 + (run + 0.5) * width
        bars = axes.bar(middles, heights, 0.92 * width, color=color(run), label=str(name))
        texts = ["" if np.isnan(height) else f"{height:.1f}" for height in heights]
        axes.bar_label(bars, texts, padding=2, fontsize=9, rotation=90 if len(runs) > 3 else 0)
    ticks = [metric.partition("_")[2].capitalize() for metric in metrics]
    for place, level in enumerate(levels):
        if level is not None:
            ticks[place] += f"\nchance {100 * level:.2g} %"
            span = (place - 0.48, place + 0.48)
            axes.hlines(100 * level, *span, color=INK, linestyle=DOTTED, linewidth=1.6)
    axes.set(xticks=range(len(ticks)), xticklabels=ticks, ylim=(0, 116), yticks=range(0, 101, 20))
    axes.grid(False, axis="x")


@styled
def recall_bars(table: Table, path: SavePath = None, chance: float | Metrics | None = None) -> Figure:
    """Recall@K of one or several runs in both directions, beside chance.

    Args:
        table: one row per run, or one metrics dict, with `i2t_recall@K` and `t2i_recall@K` in [0, 1].
        chance: recall of random ranking in [0, 1], by metric; a bare number is that of Recall@1.
    Raises: LabError if there is no recall to draw.
    """
    runs = as_table(table)
    matches = [re.fullmatch(r"(?:i2t|t2i)_recall@(\d+)", str(column)) for column in runs.columns]
    ks = sorted({int(match[1]) for match in matches if match})
    if not ks:
        raise LabError("the table has no column such as 'i2t_recall@1'; evaluate the run first.")
    figure = new_figure(3.1)
    for axes, (direction, name) in zip(figure.subplots(1, 2), DIRECTIONS.items(), strict=True):
        metrics = [f"{direction}_recall@{k}" for k in ks]
        _recall_panel(axes, runs, metrics, [chance_of(chance, metric) for metric in metrics])
        axes.set_ylabel(f"{name} Recall@K (%)")
    run_legend(figure, [str(name) for name in runs.index])
    return saved(figure, path)


def _whiskers(runs: pd.DataFrame, metric: str) -> np.ndarray:
    """(2, R) percentage points below and above each value, NaN where none is given."""
    missing = pd.Series(np.nan, runs.index)
    spread = runs.get(f"{metric}_std", missing)
    low = (runs[metric] - runs.get(f"{metric}_low", missing)).fillna(spread)
    high = (runs.get(f"{metric}_high", missing) - runs[metric]).fillna(spread)
    return 100 * np.stack([low, high]).astype(float)


def _comparison_panel(axes: Axes, values: np.ndarray, spread: np.ndarray, level: float | None) -> None:
    """Horizontal bars (percent) with whiskers, a dashed line at the first bar, a dotted one at chance."""
    rows = np.arange(len(values))
    axes.barh(rows, values, 0.62, color=[color(run) for run in range(len(values))])
    axes.errorbar(values, rows, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.3, capsize=3)
    ends = values + np.nan_to_num(spread[1])
    for row in np.flatnonzero(~np.isnan(values)):
        beside: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{values[row]:.1f}", (ends[row], row), **beside)
    if len(values) > 1:
        axes.axvline(values[0], color=GREY, linestyle="--", linewidth=1)
    if level is not None:
        axes.axvline(100 * level, color=INK, linestyle=DOTTED, linewidth=1.4)
    axes.set_xlim(0, 1.22 * np.nanmax([*ends, 1]))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


@styled
def comparison_bars(
    rows: Table,
    path: SavePath = None,
    chance: float | Metrics | None = None,
    metrics: Sequence[str] = ("i2t_recall@1", "t2i_recall@1"),
    whiskers: str = "",
) -> Figure:
    """Runs side by side, one panel per metric, the first run's value as a reference line.

    Args:
        rows: one row per run (named by `run`, `name` or the index), the metrics in [0, 1]; whiskers come
            from the columns `METRIC_low` and `METRIC_high`, or from `METRIC_std`.
        chance: of random ranking, by metric; a bare number is that of Recall@1.
        whiskers: what they are, for the note, such as "95 % bootstrap interval over test images".
    Raises: LabError if a metric is not in the table.
    """
    runs = as_table(rows)
    for metric in metrics:
        if metric not in runs:
            raise LabError(f"the table has no column {metric!r}; it has {', '.join(map(str, runs.columns))}.")
    if not metrics:
        raise LabError("there is no metric to compare; name at least one in metrics.")
    names = [wrap(name, 26) for name in runs.index]
    spreads = [f"{metric}_{end}" for metric in metrics for end in ("low", "std")]
    spreads = [column for column in spreads if column in runs and runs[column].notna().any()]
    usual = "± 1 standard deviation" if spreads and spreads[0].endswith("_std") else "low to high"
    notes = {
        "dashed: first row": len(runs) > 1,
        "dotted: chance": chance is not None,
        f"whiskers: {whiskers or usual}": bool(spreads),
    }
    note = wrap("   ·   ".join(text for text, applies in notes.items() if applies), 125)
    height = len(names) * max(0.36, LINE_HEIGHT * max(map(text_lines, names)) + 0.1)
    figure = new_figure(height + 0.7 + LINE_HEIGHT * text_lines(note))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        level = chance_of(chance, metric)
        _comparison_panel(axes, 100 * runs[metric].to_numpy(float), _whiskers(runs, metric), level)
        direction, _, rest = metric.partition("_")
        known = direction in DIRECTIONS
        axes.set_xlabel(f"{DIRECTIONS[direction]} {rest.capitalize()} (%)" if known else f"{metric} (%)")
    panels[0].set(yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    figure.supxlabel(note, size=8.5)
    return saved(figure, path)


def _probability_bars(
    axes: Axes, labels: Sequence[str], values: np.ndarray, truth: int | None, rows: int
) -> None:
    """The most probable labels, their text over the bars; a true label further down takes the last row."""
    order = list(np.argsort(-values, kind="stable"))
    first = order[:rows] if truth is None or truth in order[:rows] else [*order[: rows - 1], truth]
    for row, label in enumerate(first):
        judged = truth is not None and (row == 0 or label == truth)
        symbol, hue, _ = VERDICTS[bool(label == truth)] if judged else ("", BLUE, "")
        rank = f" (rank {order.index(label) + 1})" if order.index(label) != row else ""
        axes.barh(row, 100 * values[label], 0.82, color=hue, alpha=0.5 if judged or row == 0 else 0.25)
        axes.text(2, row, wrap(f"{symbol} {labels[label]}{rank}".strip(), 24), va="center", size=9)
        axes.text(132, row, f"{100 * values[label]:.1f} %", va="center", ha="right", size=9)
    axes.set(xlim=(0, 132), ylim=(rows - 0.4, -0.6), xticks=[0, 50, 100], yticks=[])
    axes.set_xlabel("probability (%)")


@styled
def zero_shot_bars(
    images: Sequence[ImageLike],
    labels: Sequence[str],
    probabilities: Any,
    true_labels: Sequence[str | int] | None = None,
    path: SavePath = None,
    top: int = 5,
) -> Figure:
    """Images beside the probabilities of their most probable labels.

    Args:
        images: N images.
        labels: L texts.
        probabilities: (N, L) in [0, 1].
        true_labels: N texts or positions in `labels`; ✓ marks them, ✗ a wrong first choice.
        top: how many labels to draw per image; the last row shows a true label further down.
    Raises: LabError if the shapes do not fit or a true label is not among `labels`.
    """
    table, names = to_numpy(probabilities).astype(float), list(labels)
    if not table.size or table.shape != (len(images), len(names)):
        sizes = f"{len(images)} images and {len(names)} labels"
        raise LabError(f"probabilities of shape {table.shape} do not fit {sizes}.")
    truths: list[Any] = [None] * len(images) if true_labels is None else list(true_labels)
    for place, truth in enumerate(truths):
        if isinstance(truth, str) and truth not in names:
            raise LabError(f"the true label {truth!r} is not among the labels {', '.join(names)}.")
        truths[place] = names.index(truth) if isinstance(truth, str) else truth
    rows = min(top, len(names))
    height = rows * max(0.36, LINE_HEIGHT * max(text_lines(wrap(f"✓ {name}", 24)) for name in names) + 0.1)
    figure = new_figure((max(height, 1.0) + 0.65) * -(-len(images) // 2))
    grid = figure.subplots(-(-len(images) // 2), 4, width_ratios=[1.5, 2.6] * 2, squeeze=False).ravel()
    for place, image in enumerate(images):
        draw_image(grid[2 * place], as_pixels(image))
        grid[2 * place].set_anchor("NW")
        _probability_bars(grid[2 * place + 1], names, table[place], truths[place], rows)
    for axes in grid[2 * len(images) :]:
        axes.set_axis_off()
    return saved(figure, path)


# --- attention ---

HEAT = LinearSegmentedColormap.from_list(  # transparent where a weight is low, so that the image shows
    "heat", [(0.05, 0.03, 0.53, 0.0), (0.55, 0.05, 0.6, 0.5), (0.93, 0.4, 0.3, 0.75), (0.98, 0.95, 0.1, 0.9)]
)


def _attention_map(axes: Axes, pixels: np.ndarray, ratio: np.ndarray, scale: Normalize) -> None:
    """Weights (H, W) over a grey copy of the image."""
    height, width = pixels.shape[:2]
    draw_image(axes, np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8))
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(ratio, HEAT, scale, extent=edges, interpolation="bicubic")
    axes.set_anchor("NW")


@styled
def attention_maps(
    images: Sequence[ImageLike],
    weights: Sequence[Any],
    captions: Sequence[str] | None = None,
    path: SavePath = None,
    columns: int = 4,
    label: str = "weight (average pooling gives 1)",
) -> Figure:
    """Each image above a grey copy of it under the pooling weights, all on one scale.

    Args:
        images: N images.
        weights: N maps (H, W), each summing to 1; drawn as multiples of 1 / (H W), the weight of average
            pooling. The scale ends at their 99th percentile, at 2 or more.
        captions: N texts.
        label: of the scale.
    Raises: LabError if there are not as many maps as images, or one is not (H, W).
    """
    ratios = [to_numpy(weight).astype(float) * to_numpy(weight).size for weight in weights]
    shapes = [ratio.shape for ratio in ratios]
    if not len(images) or len(shapes) != len(images) or any(len(s) != 2 or 0 in s for s in shapes):
        raise LabError(f"{len(images)} images need as many weights of shape (H, W); got {shapes}.")
    scale = Normalize(0, max(2.0, float(np.percentile(np.concatenate([r.ravel() for r in ratios]), 99))))
    side = WIDTH / columns - 0.15
    texts = [wrap(text, int(LETTERS_PER_INCH * side)) for text in captions or [""] * len(images)]
    pixels = [as_pixels(image) for image in images]
    rows = -(-len(images) // columns)
    box = min(1.1, max(p.shape[0] / p.shape[1] for p in pixels)) * side
    figure = new_figure(rows * (2 * box + 0.2 + LINE_HEIGHT * max(map(text_lines, texts))) + 0.6)
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for place in range(len(images), rows * columns):
        row, column = divmod(place, columns)
        grid[2 * row, column].set_axis_off()
        grid[2 * row + 1, column].set_axis_off()
    for place, image in enumerate(pixels):
        row, column = divmod(place, columns)
        above, below = grid[2 * row : 2 * row + 2, column]
        draw_image(above, image)
        _attention_map(below, image, ratios[place], scale)
        below.set_xlabel(texts[place], loc="left", size=9)
    bar: dict[str, Any] = {"location": "bottom", "shrink": 0.3, "aspect": 25, "anchor": (0, 0.5)}
    figure.colorbar(ScalarMappable(scale, HEAT), ax=grid, extend="max", label=label, **bar).ax.grid(False)
    return saved(figure, path)


# --- the data check ---


def _count_bars(axes: Axes, counts: Mapping[Any, int]) -> None:
    bars = axes.bar([str(name) for name in counts], list(counts.values()), 0.7, color=BLUE)
    axes.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=2, fontsize=9)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))  # 120k
    axes.set_ylabel("number of images")
    axes.margins(y=0.14)
    axes.grid(False, axis="x")


def _split_panel(axes: Axes, counts: Mapping[str, int]) -> None:
    _count_bars(axes, counts)
    axes.set(title=f"{sum(counts.values()):,} images", xlabel="split")


def _captions_panel(axes: Axes, counts: Mapping[int, int]) -> None:
    _count_bars(axes, dict(sorted(counts.items())))
    total = sum(number * images for number, images in counts.items())
    axes.set(title=f"{total:,} captions", xlabel="captions per image")


def _sizes_panel(axes: Axes, sizes: Any) -> None:
    """Widths and heights; a bubble grows with the number of images of one size."""
    points, counts = np.unique(np.asarray(sizes, int).reshape(-1, 2), axis=0, return_counts=True)
    widths, heights = points.T
    axes.scatter(widths, heights, 14 + 500 * counts / counts.sum(), color=BLUE, alpha=0.45, linewidth=0)
    commonest = f"{widths[counts.argmax()]}×{heights[counts.argmax()]}"
    limits = (0, 1.15 * points.max())
    axes.set(xlabel="width (px)", ylabel="height (px)", xlim=limits, ylim=limits)
    axes.set_title(f"{len(points):,} sizes, most {commonest}" if len(points) > 1 else f"all {commonest}")


def _lengths_panel(axes: Axes, lengths: Any) -> None:
    values = np.asarray(lengths, int)
    axes.hist(values, list(np.arange(values.min(), values.max() + 2) - 0.5), color=BLUE)
    axes.axvline(np.median(values), color=INK, linestyle="--", linewidth=1.2)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(
        title=f"median {np.median(values):.0f} words", xlabel="words per caption", ylabel="number of captions"
    )


def _undecodable_panel(axes: Axes, causes: Mapping[str, int]) -> None:
    rows = range(len(causes))
    bars = axes.barh(rows, list(causes.values()), 0.6, color=WRONG)
    axes.bar_label(bars, [f"{count:,}" for count in causes.values()], padding=3, fontsize=9)
    axes.set(yticks=rows, yticklabels=[wrap(cause, 16) for cause in causes], xlabel="images left out")
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
    """The results of the data check, one panel for each part that is not empty.

    Args:
        report: from `sources.check.check` or `load_report`; drawn are
            `images_per_split` {split: images}, `captions_per_image` {captions: images},
            `image_sizes` [[width, height], ...], `caption_lengths` [words, ...] and
            `undecodable` {cause: images}.
    Raises: LabError if all of these are empty.
    """
    panels = [(key, draw) for key, draw in PANELS.items() if report.get(key)]
    if not panels:
        raise LabError(f"the data report is empty; it needs one of {', '.join(PANELS)}.")
    rows = -(-len(panels) // 3)
    figure = new_figure(2.6 * rows)
    for place, (key, draw) in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, 3, place), report[key])
    return saved(figure, path)
