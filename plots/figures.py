"""The lab's everyday figures: picture grids, learning curves, bars, attention.

Every function takes plain data (arrays, tables, PIL images or paths), returns the Figure, and saves it
as PNG where `path` is given.
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
    GAP,
    GREY,
    INK,
    MARGIN,
    VERDICTS,
    WIDTH,
    WRONG,
    Cell,
    Metrics,
    Picture,
    SavePath,
    Series,
    Table,
    as_histories,
    as_picture,
    as_table,
    axes_at,
    chance_of,
    colour,
    draw_picture,
    image_rows,
    legend_above,
    legend_below,
    new_figure,
    plot_series,
    saved,
    shade_bar,
    styled,
    text_at,
    text_height,
    to_numpy,
    wrap,
)

# --- picture grids ---


def captioned_images(
    images: Sequence[Picture],
    captions: Sequence[str | Sequence[str]],
    path: SavePath = None,
    columns: int = 4,
    title: str = "",
) -> Figure:
    """Pictures with their captions wrapped under them; several captions a picture take a bullet each."""
    if len(captions) != len(images):
        raise LabError(f"{len(images)} pictures and {len(captions)} captions; give one caption a picture.")
    texts = [text if isinstance(text, str) else "\n".join(f"• {line}" for line in text) for text in captions]
    cells = [Cell(image, text) for image, text in zip(images, texts, strict=True)]
    rows = [("", cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return saved(image_rows(rows, title, columns), path)


def retrieval_grid(
    queries: Sequence[str],
    images: Sequence[Sequence[Picture]],
    scores: Sequence[Sequence[float]] | None = None,
    correct: Sequence[Sequence[bool]] | None = None,
    path: SavePath = None,
    title: str = "",
) -> Figure:
    """The pictures found for each text query, nearest first.

    Args:
        queries: Q texts.
        images: Q lists of pictures, nearest first; a list may be empty.
        scores: Q lists of similarities, written under the pictures.
        correct: Q lists; right is a solid green frame with ✓, wrong a dashed orange one with ✗.
    """
    if len(images) != len(queries):
        raise LabError(f"{len(queries)} queries and {len(images)} lists of pictures; give one list a query.")
    rows = []
    for query, found in enumerate(images):
        notes = [""] * len(found) if scores is None else [f"  ·  {score:.3f}" for score in scores[query]]
        texts = [f"{place}{note}" for place, note in enumerate(notes, start=1)]
        marks = [None] * len(found) if correct is None else correct[query]
        cells = [Cell(*parts) for parts in zip(found, texts, marks, strict=True)]
        rows.append((f"“{queries[query]}”", cells))
    return saved(image_rows(rows, title), path)


# --- curves ---

LOSSES: Series = {"train_loss": ("train", "--"), "val_loss": ("validation", "-")}
RECALLS: Series = {
    "i2t_recall@1": (DIRECTIONS["i2t"], "-"),
    "t2i_recall@1": (DIRECTIONS["t2i"], "--"),
    "top1_best": ("best so far", "--"),
    "top1": ("top-1 of all captions", "-"),
}
RATES: Series = {"learning_rate": ("learning rate", "-")}


def _reference(axes: Axes, level: float | None, label: str) -> list[Line2D]:
    """A dotted line where there is a level; its legend handle, the level filled into `label`."""
    look: dict[str, Any] = {"color": INK, "linestyle": DOTTED, "linewidth": 1.4}
    return [] if level is None else [axes.axhline(level, label=label.format(level), **look)]


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
        chance_loss: the loss's chance level (`losses.chance_level`); None where it has none.
        best_epoch: starred; a number, or one a run.
    """
    tables = as_histories(histories)
    for name, table in tables.items():
        table = table.assign(top1_best=table["top1"].cummax()) if "top1" in table else table
        tables[name] = table.assign(**{column: 100 * table[column] for column in RECALLS if column in table})
    level = chance_of(chance, "i2t_recall@1")
    best = best_epoch if isinstance(best_epoch, Mapping) else dict.fromkeys(tables, best_epoch)
    epochs = sorted({epoch for epoch in best.values() if epoch is not None})
    star = Line2D([], [], color=GREY, linestyle="", marker="*", markersize=10, label="best epoch")
    star.set_label(f"best epoch {epochs[0]}" if len(epochs) == 1 else "best epoch")
    figure = new_figure(3.3)
    loss, recall, rate = (axes_at(figure, left, 0.62, 2.25, 2.15) for left in (0.65, 3.6, 6.6))
    for axes, series, reference, label in (
        (loss, LOSSES, chance_loss, "chance level {:.2f}"),
        (recall, RECALLS, None if level is None else 100 * level, "chance {:.2g} %"),
    ):
        handles = plot_series(axes, tables, series, best) + _reference(axes, reference, label)
        legend_above(axes, handles + [star] * bool(epochs))
    plot_series(rate, tables, RATES)
    rate.set_ylim(bottom=0)
    power = 10.0 ** np.floor(np.log10(rate.get_ylim()[1]))
    loss.set_ylabel("loss")
    ranked = any("top1" in table for table in tables.values())
    recall.set_ylabel("accuracy (%)" if ranked else "Recall@1 (%)")
    rate.set_ylabel(f"learning rate ({power:.0e})")
    rate.yaxis.set_major_formatter(lambda value, _: f"{value / power:.3g}")
    legend_below(figure, list(tables))
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
        bars = axes.bar(middles, heights, 0.92 * width, color=colour(run), label=str(name))
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
        table: one row a run, or one metrics dict, with `i2t_recall@K` and `t2i_recall@K` in [0, 1].
        chance: recall of random ranking in [0, 1], by metric; a bare number is Recall@1's.
    Raises: LabError if there is no recall to draw.
    """
    runs = as_table(table)
    found = [re.fullmatch(r"(?:i2t|t2i)_recall@(\d+)", str(column)) for column in runs.columns]
    ks = sorted({int(match[1]) for match in found if match})
    if not ks:
        raise LabError("the table has no column such as 'i2t_recall@1'; evaluate the run first.")
    figure = new_figure(3.25)
    for side, (direction, title) in enumerate(DIRECTIONS.items()):
        axes = axes_at(figure, 0.65 + side * 4.4, 0.35, 3.85, 2.35)
        metrics = [f"{direction}_recall@{k}" for k in ks]
        _recall_panel(axes, runs, metrics, [chance_of(chance, metric) for metric in metrics])
        axes.set_title(title)
    figure.axes[0].set_ylabel("queries answered (%)")
    legend_below(figure, [str(name) for name in runs.index])
    return saved(figure, path)


def _whiskers(runs: pd.DataFrame, metric: str) -> np.ndarray:
    """(2, R) percentage points below and above each value, NaN where none is given."""
    nothing = pd.Series(np.nan, runs.index)
    spread = runs.get(f"{metric}_std", nothing)
    low = (runs[metric] - runs.get(f"{metric}_low", nothing)).fillna(spread)
    high = (runs.get(f"{metric}_high", nothing) - runs[metric]).fillna(spread)
    return 100 * np.stack([low, high]).astype(float)


def _comparison_panel(axes: Axes, values: np.ndarray, spread: np.ndarray, level: float | None) -> None:
    """Horizontal bars (percent) with whiskers, a dashed line at the first bar, a dotted one at chance."""
    rows = np.arange(len(values))
    axes.barh(rows, values, 0.62, color=[colour(run) for run in range(len(values))])
    axes.errorbar(values, rows, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.3, capsize=3)
    ends = values + np.nan_to_num(spread[1])
    for row in np.flatnonzero(~np.isnan(values)):
        beside: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{values[row]:.1f}", (ends[row], row), **beside)
    if len(values) > 1:
        axes.axvline(values[0], color=GREY, linestyle="--", linewidth=1)
    if level is not None:
        axes.axvline(100 * level, color=INK, linestyle=DOTTED, linewidth=1.4)
    axes.set(xlim=(0, 1.22 * np.nanmax([*ends, 1])), yticks=rows, yticklabels=[])
    axes.invert_yaxis()
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
    """Runs side by side, a panel a metric, the first run's value as a reference line.

    Args:
        rows: one row a run (named by `run`, `name` or the index), the metrics in [0, 1]; whiskers come
            from the columns `METRIC_low` and `METRIC_high`, or from `METRIC_std`.
        chance: of random ranking, by metric; a bare number is Recall@1's.
        whiskers: what they are, for the note, such as "95 % interval, test sample only".
    Raises: LabError if a metric is not in the table.
    """
    runs = as_table(rows)
    for metric in metrics:
        if metric not in runs:
            raise LabError(f"the table has no column {metric!r}; it has {', '.join(map(str, runs.columns))}.")
    if not metrics:
        raise LabError("there is no figure to compare; name at least one in metrics.")
    names = [wrap(name, 1.9) for name in runs.index]
    spreads = [f"{metric}_{end}" for metric in metrics for end in ("low", "std")]
    drawn = [column for column in spreads if column in runs and runs[column].notna().any()]
    usual = "± 1 standard deviation" if drawn and drawn[0].endswith("_std") else "low to high"
    notes = {
        "dashed: first row": len(runs) > 1,
        "dotted: chance": chance is not None,
        f"whiskers: {whiskers or usual}": bool(drawn),
    }
    note = "   ·   ".join(text for text, applies in notes.items() if applies)
    height = len(names) * max(0.36, max(map(text_height, names)) + 0.1)
    figure = new_figure(height + 0.95 + 0.3 * bool(note))
    width = (WIDTH - 2.2) / len(metrics) - 0.25
    for panel, metric in enumerate(metrics):
        axes = axes_at(figure, 2.1 + panel * (width + 0.25), 0.35, width, height)
        _comparison_panel(
            axes, 100 * runs[metric].to_numpy(float), _whiskers(runs, metric), chance_of(chance, metric)
        )
        direction, _, rest = metric.partition("_")
        known = direction in DIRECTIONS
        axes.set(title=DIRECTIONS.get(direction, ""), xlabel=f"{rest.capitalize() if known else metric} (%)")
    figure.axes[0].set_yticklabels(names)
    text_at(figure, 2.1, height + 0.97, note, 8.5)
    return saved(figure, path)


def _probability_bars(
    axes: Axes, labels: Sequence[str], values: np.ndarray, truth: int | None, rows: int
) -> None:
    """The likeliest labels, their text over the bars; a true label further down takes the last row."""
    order = list(np.argsort(-values, kind="stable"))
    shown = order[:rows] if truth is None or truth in order[:rows] else [*order[: rows - 1], truth]
    for row, label in enumerate(shown):
        judged = truth is not None and (row == 0 or label == truth)
        symbol, hue, _ = VERDICTS[bool(label == truth)] if judged else ("", BLUE, "")
        rank = f" (rank {order.index(label) + 1})" if order.index(label) != row else ""
        axes.barh(row, 100 * values[label], 0.82, color=hue, alpha=0.5 if judged or row == 0 else 0.25)
        text = wrap(f"{symbol} {labels[label]}{rank}".strip(), 1.9)
        axes.text(2, row, text, va="center", size=9)
        axes.text(132, row, f"{100 * values[label]:.1f} %", va="center", ha="right", size=9)
    axes.set(xlim=(0, 132), ylim=(rows - 0.4, -0.6), xticks=[0, 50, 100], yticks=[])
    axes.set_xlabel("probability (%)", x=0.38)


@styled
def zero_shot_bars(
    images: Sequence[Picture],
    labels: Sequence[str],
    probabilities: Any,
    true_labels: Sequence[str | int] | None = None,
    path: SavePath = None,
    top: int = 5,
) -> Figure:
    """Pictures beside the probabilities of their likeliest labels.

    Args:
        images: N pictures.
        labels: L texts.
        probabilities: (N, L) in [0, 1].
        true_labels: N texts or positions in `labels`; ✓ marks them, ✗ a wrong first choice.
        top: how many labels to draw a picture; the last row goes to a true label further down.
    Raises: LabError if the shapes do not fit or a true label is not among `labels`.
    """
    table, names = to_numpy(probabilities).astype(float), list(labels)
    if not table.size or table.shape != (len(images), len(names)):
        sizes = f"{len(images)} pictures and {len(names)} labels"
        raise LabError(f"probabilities of shape {table.shape} do not fit {sizes}.")
    truths: list[Any] = [None] * len(images) if true_labels is None else list(true_labels)
    for place, truth in enumerate(truths):
        if isinstance(truth, str) and truth not in names:
            raise LabError(f"the true label {truth!r} is not among the labels {', '.join(names)}.")
        truths[place] = names.index(truth) if isinstance(truth, str) else truth
    rows = min(top, len(names))
    tallest = max(text_height(wrap(f"✓ {name}", 1.9)) for name in names)
    height = rows * max(0.36, tallest + 0.1)
    figure = new_figure((height + 0.65) * -(-len(images) // 2) + 0.1)
    for place, image in enumerate(images):
        left, start = MARGIN + (place % 2) * 4.5, 0.12 + (place // 2) * (height + 0.65)
        picture = axes_at(figure, left, start, 1.55, max(height, 1.0))
        draw_picture(picture, as_picture(image))
        picture.set_anchor("NW")
        bars = axes_at(figure, left + 1.68, start, 2.6, height)
        _probability_bars(bars, names, table[place], truths[place], rows)
    return saved(figure, path)


# --- attention ---

HEAT = LinearSegmentedColormap.from_list(  # clear where a weight is low, so that the picture shows
    "heat", [(0.05, 0.03, 0.53, 0.0), (0.55, 0.05, 0.6, 0.5), (0.93, 0.4, 0.3, 0.75), (0.98, 0.95, 0.1, 0.9)]
)


def _attention_map(axes: Axes, pixels: np.ndarray, ratio: np.ndarray, scale: Normalize) -> None:
    """Weights (H, W) over a grey copy of the picture."""
    height, width = pixels.shape[:2]
    draw_picture(axes, np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8))
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(ratio, HEAT, scale, extent=edges, interpolation="bicubic")
    axes.set_anchor("NW")


@styled
def attention_maps(
    images: Sequence[Picture],
    weights: Sequence[Any],
    captions: Sequence[str] | None = None,
    path: SavePath = None,
    columns: int = 4,
) -> Figure:
    """Each picture above its grey copy under the pooling weights, all on one scale.

    Args:
        images: N pictures.
        weights: N maps (H, W), each summing to 1; drawn as multiples of 1 / (H W), which is what average
            pooling gives. The scale ends at their 99th percentile, at 2 or more.
        captions: N texts.
    Raises: LabError if there are not as many maps as pictures, or one is not (H, W).
    """
    ratios = [to_numpy(weight).astype(float) * to_numpy(weight).size for weight in weights]
    if (
        not len(images)
        or len(ratios) != len(images)
        or any(ratio.ndim != 2 or not ratio.size for ratio in ratios)
    ):
        shapes = [ratio.shape for ratio in ratios]
        raise LabError(f"{len(images)} pictures need as many weights of shape (H, W); got {shapes}.")
    scale = Normalize(0, max(2.0, float(np.percentile(np.concatenate([r.ravel() for r in ratios]), 99))))
    cell = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    texts = [wrap(text, cell) for text in ([""] * len(images) if captions is None else captions)]
    pixels = [as_picture(image) for image in images]
    box = min(1.1, max(p.shape[0] / p.shape[1] for p in pixels)) * cell
    row_height = 2 * box + 0.14 + max(map(text_height, texts)) + 0.2
    height = MARGIN + row_height * -(-len(images) // columns)
    figure = new_figure(height + 0.5)
    for place, image in enumerate(pixels):
        left, top = MARGIN + place % columns * (cell + GAP), MARGIN + place // columns * row_height
        draw_picture(axes_at(figure, left, top, cell, box), image)
        _attention_map(axes_at(figure, left, top + box + 0.06, cell, box), image, ratios[place], scale)
        text_at(figure, left, top + 2 * box + 0.14, texts[place])
    label = "weight (average pooling gives 1)"
    shade_bar(figure, ScalarMappable(scale, HEAT), MARGIN + 0.1, height - 0.05, label, "max")
    return saved(figure, path)


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
