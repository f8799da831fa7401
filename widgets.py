"""Notebook controls over plain functions, and the experiment form, made from the configuration's own fields."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure

from config import Config, run_name
from core.errors import LabError, choose
from evaluate import evaluate_run, finished_runs, paired_test_of
from interface.controls import Control, ExperimentForm
from metrics import figures_of, recalls_of, told
from plots.figures import attention_maps, captioned_images, learning_curves, zero_shot_bars
from reports.gallery import Gallery
from reports.search import GallerySearch, search_grid
from reports.sections import failure_figure, worst_captions
from reports.zero_shot import DEFAULT_TEMPLATES, classify, known_labels
from sources.check import load_report
from sources.decode import decode
from sources.table import CaptionTable
from utils import Run


def experiment_form(config: Config) -> ExperimentForm:
    """A form that edits `config` in place; `config[name] = value` is the same as a plain line."""
    return ExperimentForm(config)


SECONDS_BETWEEN = 2.0  # a figure takes a fifth of a second; epochs over cached features are as quick
STATUS = {
    "train_loss": ("loss", "{:.3f}"),
    "val_loss": ("validation loss", "{:.3f}"),
    "i2t_recall@1": ("image-to-text Recall@1", "{:.1%}"),
    "t2i_recall@1": ("text-to-image Recall@1", "{:.1%}"),
    "top1": ("top-1", "{:.1%}"),
    "learning_rate": ("learning rate", "{:.2g}"),
    "temperature": ("temperature", "{:.4f}"),
    "images_per_second": ("images a second", "{:,.0f}"),
}
"""Columns of the history in the line of numbers: heading and form."""


class Interrupted(LabError):  # noqa: N818  a state, not a mistake
    """A run has epochs left."""


class LiveView:
    """A callback for `fit(on_epoch=...)`: learning curves and the last epoch's numbers, updated in place.

    However long the run, a saved notebook holds one figure and one line. A run that exists already is
    drawn at once, so that a cell run again goes on where its figure was.

    Args:
        name: of the run, for the legend.
        history: what is known before the first epoch of this call, a row an epoch.
        num_epochs: of the whole run, for the time left.
        chance: recall of a random ranking, drawn as a line.
        chance_loss: the loss's chance level, drawn as a line.
    """

    def __init__(
        self,
        name: str,
        history: pd.DataFrame | None = None,
        *,
        num_epochs: int | None = None,
        chance: float | None = None,
        chance_loss: float | None = None,
    ) -> None:
        self.name, self.num_epochs = name, num_epochs
        self.lines: dict[str, Any] = {"chance": chance, "chance_loss": chance_loss}
        self.handles: list[DisplayHandle] = []
        self.drawn_at = 0.0
        if history is not None and len(history):
            self(history)

    def __call__(self, history: pd.DataFrame) -> None:
        """Draw the history so far; a quick run's epochs are drawn every two seconds, the last one always."""
        now, last = time.monotonic(), len(history) == self.num_epochs
        if not self.handles or last or now - self.drawn_at >= SECONDS_BETWEEN:
            self._draw(history)

    def finish(self, run: Run) -> None:
        """Draw what the run has come to, its best epoch starred.

        Raises: Interrupted if it has epochs left, so that no cell below measures half a run.
        """
        if run.finished:
            self.num_epochs = len(run.history)  # it may have stopped early
        if len(run.history):
            self._draw(run.history, run.best_epoch)
        if not run.finished:
            done = f"after {len(run.history)} of {run.config.num_epochs} epochs"
            raise Interrupted(f"training was interrupted {done}; run this cell again to continue.")

    def _draw(self, history: pd.DataFrame, best_epoch: int | None = None) -> None:
        curves = learning_curves({self.name: history}, best_epoch=best_epoch, **self.lines)
        shown = (curves, self.status(history))
        if self.handles:
            for handle, part in zip(self.handles, shown, strict=True):
                handle.update(part)
        else:
            self.handles = [display(part, display_id=True) for part in shown]
        self.drawn_at = time.monotonic()

    def status(self, history: pd.DataFrame) -> pd.DataFrame:
        """One row: the last epoch and its numbers, and the time that the epochs left will take."""
        last = history.ffill().iloc[-1]  # not every epoch is validated
        of = f" of {self.num_epochs}" if self.num_epochs else ""
        row = {"epoch": f"{last['epoch']:.0f}{of}"}
        row |= {label: form.format(last[name]) for name, (label, form) in STATUS.items() if name in last}
        if self.num_epochs and "train_seconds" in last:
            left = (self.num_epochs - len(history)) * history["train_seconds"].mean()
            row["training left"] = str(timedelta(seconds=round(left)))
        return pd.DataFrame([row], index=[self.name])


def live_curves(name: str, *, chance: float | None = None, chance_loss: float | None = None) -> LiveView:
    """A training view by a run's name alone."""
    return LiveView(name, chance=chance, chance_loss=chance_loss)


def live_training(
    config: Config, *, chance: float | None = None, chance_loss: float | None = None
) -> LiveView:
    """The training view of a configuration's run, beginning with what its history.csv holds."""
    path = config.runs_dir / run_name(config) / "history.csv"
    history = pd.read_csv(path) if path.is_file() else None
    return LiveView(
        run_name(config), history, num_epochs=config.num_epochs, chance=chance, chance_loss=chance_loss
    )


# --- Explorers of one encoded split ---


WIDE, NARROW = widgets.Layout(width="440px"), widgets.Layout(width="300px")
AS_WIDE = widgets.Layout(width="auto")  # as its label
SOME_LABELS = "a dog; a child; a bicycle; a boat"


def split_texts(texts: str) -> list[str]:
    """The parts between semicolons, without the empty ones."""
    return [text.strip() for text in texts.split(";") if text.strip()]


def _slider(count: int, label: str, start: int = 0, step: int = 1) -> widgets.IntSlider:
    wide, last = widgets.Layout(width="380px"), max(0, count - 1)
    return widgets.IntSlider(start, 0, last, step, description=label, continuous_update=False, layout=wide)


# --- search ---


def search_figure(
    search: GallerySearch, query: str, minus: str = "", k: int = 5, picture: Any = None
) -> Figure:
    """The k nearest pictures of each text; several stand between semicolons.

    Args:
        minus: what the pictures should not show, taken from each text.
        picture: a picture that is added to each text, as `queries` takes them; with no text, alone.
    Raises: LabError if there is no query, or k is not in 1..pictures; UndecodableImage.
    """
    if not split_texts(query) and picture is None:
        raise LabError("write what the picture should show, such as 'a dog in the snow'.")
    if not minus.strip() and picture is None:
        return search_grid(search.by_text(split_texts(query), k))
    around = [(picture, 1.0)] * (picture is not None) + [(text, -1.0) for text in split_texts(minus)]
    wanted: list[list[tuple[Any, float]]] = [[(text, 1.0)] for text in split_texts(query)] or [[]]
    return search_grid([search.combined([*terms, *around], k) for terms in wanted])


def search_box(gallery: Gallery, query: str = "", k: int = 5) -> Control:
    """Search while typing; begins with `query`, or with a caption of the gallery."""
    first = query or gallery.dataset.table.captions_of(int(gallery.dataset.rows[0]))[0]
    most = max(1, min(10, len(gallery.image_id) - 1))
    search = GallerySearch.of(gallery)

    def show(upload: Sequence[Any], **asked: Any) -> Figure:
        return search_figure(search, picture=bytes(upload[-1]["content"]) if upload else None, **asked)

    return Control(
        show,
        query=widgets.Text(first, description="search", layout=WIDE),
        minus=widgets.Text("", description="without", placeholder="nothing", layout=NARROW),
        k=widgets.IntSlider(min(k, most), 1, most, description="pictures", continuous_update=False),
        upload=widgets.FileUpload(accept="image/*", description="and like a picture", layout=AS_WIDE),
    )


# --- zero-shot ---


def zero_shot_figure(
    run: Run, picture: str | Path | bytes, labels: str, templates: str = "; ".join(DEFAULT_TEMPLATES)
) -> Figure:
    """Probabilities of labels for one picture.

    Args:
        picture: a file, or a file's bytes.
        labels, templates: texts between semicolons; a template has `{}` where the label stands.
    Raises: LabError for fewer than two labels, a template without `{}`, or a picture that cannot be decoded.
    """
    found = classify(run, picture, split_texts(labels), split_texts(templates))
    shown = decode(picture)
    return zero_shot_bars([shown], list(found.index), found["probability"].to_numpy()[None])


def zero_shot_playground(gallery: Gallery, labels: str = "") -> Control:
    """Pick or upload a picture, write labels and templates between semicolons; the bars follow."""
    known = known_labels(gallery)
    first = next(iter(known), 0)
    some = _some_labels(known[first], set(known.values())) if known else SOME_LABELS

    def show(item: int, upload: Sequence[Any], **texts: str) -> Figure:
        picture = bytes(upload[-1]["content"]) if upload else gallery.dataset.pictures([item])[0]
        return zero_shot_figure(gallery.run, picture, **texts)

    return Control(
        show,
        item=_slider(len(gallery.image_id), "picture", first),
        upload=widgets.FileUpload(accept="image/*", description="or upload one", layout=AS_WIDE),
        labels=widgets.Text(labels or some, description="labels", layout=WIDE),
        templates=widgets.Text("; ".join(DEFAULT_TEMPLATES), description="templates", layout=WIDE),
    )


def _some_labels(own: str, names: set[str], count: int = 6) -> str:
    """A picture's own label and a few others, evenly spread over the alphabet."""
    others = sorted(names - {own})
    return "; ".join([own, *others[:: max(1, -(-len(others) // (count - 1)))]])


# --- attention and failures ---


def attention_figure(gallery: Gallery, first: int = 0, count: int = 4) -> Figure:
    """Where the pooling looks in `count` pictures. Raises: LabError without attention pooling."""
    items = list(range(first, min(first + count, len(gallery.image_id))))
    images = gallery.dataset.__getitems__(items)["image"]  # (count, 3, S, S)
    with torch.inference_mode():
        weights = gallery.run.model.attention(images.to(gallery.run.model.logit_scale.device))
    table, rows = gallery.dataset.table, gallery.dataset.rows[items]
    captions = [table.captions_of(int(row))[0] for row in rows]
    return attention_maps(list(images), list(weights.cpu()), captions)


def attention_explorer(gallery: Gallery, count: int = 4) -> Control:
    """Walk through the pictures and see where the pooling looks."""
    return Control(
        partial(attention_figure, gallery, count=count),
        first=_slider(len(gallery.image_id), "pictures", step=count),
    )


def failure_explorer(gallery: Gallery, count: int = 3) -> Control:
    """Walk from the worst caption on."""
    failed = len(worst_captions(gallery.ranks.t2i))
    return Control(
        partial(failure_figure, gallery, count=count), first=_slider(failed, "worst from", step=count)
    )


# --- Browsers of runs and of data ---


# --- runs ---


def runs_table(runs: Sequence[Run], baseline: Run | None = None) -> pd.DataFrame:
    """Recalls in percent with 95 % intervals, a row a run, on its first test split.

    With a baseline, also the difference of Recall@1 in points with the interval of the paired test over
    pictures, where both were measured on the same gallery.
    """
    rows = {}
    for run in runs:
        found = evaluate_run(run)[run.test_split]
        about = {"split": found["split"], "images": found["num_images"], "captions": found["num_texts"]}
        names = [name for name in recalls_of(found) if name.endswith("@1")] or list(figures_of(found))[:3]
        figures = {name: told(found, name) for name in names}
        against = {} if baseline is None else gains(run, baseline)
        rows[run.name] = {**about, **figures, **against, "best epoch": run.best_epoch}
    return pd.DataFrame.from_dict(rows, orient="index")


def gains(run: Run, baseline: Run) -> dict[str, str]:
    """Recall@1 over a baseline's in points, each way: `+1.3 [+0.2, +2.4]`."""
    column = "points over baseline, {}"
    ways = ("i2t", "t2i")
    if run.name == baseline.name:
        return {column.format(way): "baseline" for way in ways}
    split = run.test_split
    ours, theirs = run.metrics[split], baseline.metrics.get(split, {})
    if not recalls_of(ours) or ours.get("gallery", "none") != theirs.get("gallery"):
        return {column.format(way): "another gallery" for way in ways}
    found = {way: paired_test_of(run, baseline, f"{way}_recall@1") for way in ways}
    return {
        column.format(way): f"{100 * test.difference:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}]"
        for way, test in found.items()
    }


def runs_figure(runs: Sequence[Run]) -> Figure:
    """The learning curves of runs, laid over one another."""
    return learning_curves(
        {run.name: run.history for run in runs}, best_epoch={run.name: run.best_epoch for run in runs}
    )


def compare_chosen(
    known: Mapping[str, Run], names: Sequence[str], baseline: str
) -> tuple[Figure, pd.DataFrame]:
    """Curves and table of the runs of these names. Raises: LabError if none is named or one is unknown."""
    if not names:
        raise LabError("choose at least one run; Ctrl or Shift with a click adds another.")
    runs = [choose(known, name, "run") for name in names]
    against = choose(known, baseline, "run")
    evaluate_run(against)
    return runs_figure(runs), runs_table(runs, against)


def run_browser(runs_dir: str | Path = "runs", baseline: str = "") -> Control:
    """Choose finished runs and a baseline; table with intervals, curves, differences.

    Raises: LabError if no run is finished.
    """
    known = {run.name: run for run in finished_runs(runs_dir)}
    if not known:
        raise LabError(f"{runs_dir} holds no finished run; train one first.")
    names = list(known)
    wide = widgets.Layout(width="420px")
    return Control(
        partial(compare_chosen, known),
        names=widgets.SelectMultiple(
            options=names, value=names[:4], rows=min(8, len(names)), description="runs", layout=wide
        ),
        baseline=widgets.Dropdown(
            options=names, value=baseline or names[0], description="baseline", layout=wide
        ),
    )


# --- captioned pictures ---

PER_PAGE, FLAGS_PER_PAGE = 8, 32
WHOLE = {"description_width": "initial"}  # labels are not cut
PICTURES, FLAGS = "pictures", "what the check found"


def find_rows(table: CaptionTable, words: str = "") -> list[int]:
    """Rows of the images one of whose captions holds all the words."""
    wanted = words.lower().split()
    hits = [all(word in text.lower() for word in wanted) for text in table.captions]
    starts = table.offsets
    return [row for row in range(len(table)) if any(hits[starts[row] : starts[row + 1]])]


def browse_figure(
    table: CaptionTable, words: str = "", page: int = 1, bad: Collection[str] = ()
) -> tuple[Figure, pd.DataFrame]:
    """A page of pictures whose captions hold the words, and how many there are.

    Args:
        page: from 1; past the last one, the last.
        bad: paths that are not shown, since they cannot be decoded.
    Raises: LabError if there is none.
    """
    rows = [row for row in find_rows(table, words) if table.paths[row] not in bad]
    if not rows:
        raise LabError(f"no caption holds {words!r}; try fewer words.")
    pages = -(-len(rows) // PER_PAGE)
    page = min(page, pages)
    shown = rows[(page - 1) * PER_PAGE : page * PER_PAGE]
    figure = captioned_images(
        [table.path_of(row) for row in shown], [table.captions_of(row)[:2] for row in shown]
    )
    about = {"pictures found": len(rows), "of": len(table), "page": f"{page} of {pages}"}
    return figure, pd.DataFrame([about], index=[words or "all"])


def check_flags(report: Mapping[str, Any], words: str = "") -> pd.DataFrame:
    """What the data check flagged, a row a file: file, flag, detail.

    Args:
        report: of `data_check.check` or `load_report`.
        words: only rows that hold them all.
    """
    rows = [(path, "undecodable", cause) for path, cause in report["bad_images"].items()]
    for group in report["duplicates"]:
        splits = " = ".join(group["splits"])
        rows += [(path, "equal file in several splits", splits) for path in group["paths"]]
    rows += [(problem["where"], problem["kind"], problem["what"]) for problem in report["problems"]]
    wanted = words.lower().split()
    kept = [row for row in rows if all(word in " ".join(map(str, row)).lower() for word in wanted)]
    return pd.DataFrame(kept, columns=["file", "flag", "detail"]).set_index("file")


def data_browser(table: CaptionTable, report: Mapping[str, Any] | str | Path | None = None) -> Control:
    """Filter captions and see their pictures, or see what the check found.

    Args: report: of `check.check`, or the folder that `dataset.check_data` wrote it to; none: images alone.
    """
    if isinstance(report, (str, Path)):
        report = load_report(report)
    report = report or {"bad_images": {}, "duplicates": [], "problems": []}

    def browse(words: str, page: int, show: str) -> Any:
        if show == PICTURES:
            return browse_figure(table, words, page, report["bad_images"])
        flags = check_flags(report, words)
        if not len(flags):
            raise LabError("the check flagged no file" + (f" with {words!r}." if words else "."))
        return flags.iloc[(page - 1) * FLAGS_PER_PAGE : page * FLAGS_PER_PAGE]

    pages = max(1, -(-len(table) // PER_PAGE))
    return Control(
        browse,
        words=widgets.Text(description="captions with", style=WHOLE, layout=widgets.Layout(width="380px")),
        page=widgets.BoundedIntText(1, 1, pages, description="page"),
        show=widgets.ToggleButtons(options=[PICTURES, FLAGS], style={"button_width": "auto"}),
    )
