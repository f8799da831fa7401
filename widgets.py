"""What notebooks show: the training view, search, zero-shot, attention, failures, and browsers of runs and data."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure

from config import Config, run_name
from core.errors import LabError, choose
from dataset import open_dataset
from evaluate import finished_runs
from interface.controls import Control, ExperimentForm, shown_bundle, uploaded
from metrics import as_text, figures_of, recalls_of, with_interval
from models import build_model
from plots.features import similarity_matrix
from plots.figures import attention_maps, captioned_images, learning_curves, zero_shot_bars
from reports.compare import paired_test_of
from reports.gallery import Gallery
from reports.search import GallerySearch, search_grid
from reports.sections import failure_figure, worst_captions
from reports.zero_shot import DEFAULT_TEMPLATES, classify, known_labels
from sources.check import load_report
from sources.decode import decode
from sources.table import CaptionTable
from towers.features import position_features, text_features, word_contributions
from training.checkpoints import seed_everything
from training.order import evenly_spread
from utils import Run


def experiment_form(config: Config) -> ExperimentForm:
    """A form that edits `config` in place; `config[name] = value` is the same as a plain line."""
    return ExperimentForm(config)


SECONDS_BETWEEN = 2.0  # a figure takes 0.2 s, as long as an epoch over cached features
STATUS = {
    "train_loss": ("loss", "{:.3f}"),
    "val_loss": ("validation loss", "{:.3f}"),
    "i2t_recall@1": ("image-to-text Recall@1", "{:.1%}"),
    "t2i_recall@1": ("text-to-image Recall@1", "{:.1%}"),
    "top1": ("top-1", "{:.1%}"),
    "learning_rate": ("learning rate", "{:.2g}"),
    "temperature": ("temperature", "{:.4f}"),
    "images_per_second": ("images per second", "{:,.0f}"),
}
"""Columns of the history in the line of numbers: heading and format."""


class Interrupted(LabError):  # noqa: N818  a state, not an error
    """A run has epochs left."""


class LiveView:
    """A callback for `fit(on_epoch=...)`: learning curves and the last epoch's numbers, updated in place.

    A saved notebook contains one figure and one line, however long the run. An existing run is drawn at once, so a
    cell that runs again continues its figure.

    Args:
        name: of the run, for the legend.
        history: epochs of earlier calls, one row per epoch.
        num_epochs: of the whole run, for the remaining time.
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
        """Draw the history so far, at most every two seconds; the last epoch is always drawn."""
        now, last = time.monotonic(), len(history) == self.num_epochs
        if not self.handles or last or now - self.drawn_at >= SECONDS_BETWEEN:
            self._draw(history)

    def finish(self, run: Run) -> None:
        """Draw the run with its best epoch marked.

        Raises: Interrupted if it has epochs left, so that no later cell measures an unfinished run.
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
        parts = (curves, self.status(history))
        if self.handles:
            for handle, part in zip(self.handles, parts, strict=True):
                handle.update(part)
        else:
            self.handles = [display(part, display_id=True) for part in parts]
        self.drawn_at = time.monotonic()

    def status(self, history: pd.DataFrame) -> pd.DataFrame:
        """One row: the last epoch, its numbers, and the remaining time."""
        last = history.ffill().iloc[-1]  # not every epoch is validated
        of = f" of {self.num_epochs}" if self.num_epochs else ""
        row = {"epoch": f"{last['epoch']:.0f}{of}"}
        row |= {label: form.format(last[name]) for name, (label, form) in STATUS.items() if name in last}
        if self.num_epochs and "train_seconds" in last:
            left = (self.num_epochs - len(history)) * history["train_seconds"].mean()
            row["training left"] = str(timedelta(seconds=round(left)))
        return pd.DataFrame([row], index=[self.name])


def live_training(
    config: Config, *, chance: float | None = None, chance_loss: float | None = None
) -> LiveView:
    """The training view of a configuration's run, with the epochs in its history.csv."""
    path = config.runs_dir / run_name(config) / "history.csv"
    history = pd.read_csv(path) if path.is_file() else None
    return LiveView(
        run_name(config), history, num_epochs=config.num_epochs, chance=chance, chance_loss=chance_loss
    )


# --- Explorers of one encoded split ---


WIDE, NARROW, AS_LABEL = (widgets.Layout(width=width) for width in ("440px", "300px", "auto"))
SOME_LABELS = "a dog; a child; a bicycle; a boat"


def split_texts(texts: str) -> list[str]:
    """The parts between semicolons, without the empty ones."""
    return [text.strip() for text in texts.split(";") if text.strip()]


def _slider(count: int, label: str, start: int = 0, step: int = 1) -> widgets.IntSlider:
    options: dict[str, Any] = {"description": label, "continuous_update": False, "layout": WIDE}
    return widgets.IntSlider(start, 0, max(0, count - 1), step, **options)


# --- search ---


def search_figure(
    search: GallerySearch, query: str, minus: str = "", k: int = 5, image: Any = None
) -> Figure:
    """The k nearest images of each text; several texts are separated by semicolons.

    Args:
        minus: what the images should not show, subtracted from each text.
        image: an image that is added to each text; without a text it is the query.
    Raises: LabError if there is no query, or k is not in 1..images; UndecodableImage.
    """
    if not split_texts(query) and image is None:
        raise LabError("describe the image, such as 'a dog in the snow'.")
    if not minus.strip() and image is None:
        return search_grid(search.by_text(split_texts(query), k))
    around = [(image, 1.0)] * (image is not None) + [(text, -1.0) for text in split_texts(minus)]
    queries: list[list[tuple[Any, float]]] = [[(text, 1.0)] for text in split_texts(query)] or [[]]
    return search_grid([search.combined([*terms, *around], k) for terms in queries])


def search_box(gallery: Gallery, query: str = "", k: int = 5) -> Control:
    """Search while typing; starts with `query`, or with a caption of the gallery."""
    first = query or gallery.dataset.table.captions_of(int(gallery.dataset.rows[0]))[0]
    most = max(1, min(10, len(gallery.image_id) - 1))
    search = GallerySearch(gallery)

    def show(upload: Any, **asked: Any) -> Figure:
        return search_figure(search, image=uploaded(upload), **asked)

    return Control(
        show,
        query=widgets.Text(first, description="search", layout=WIDE),
        minus=widgets.Text("", description="without", placeholder="nothing", layout=NARROW),
        k=widgets.IntSlider(min(k, most), 1, most, description="images", continuous_update=False),
        upload=widgets.FileUpload(accept="image/*", description="similar to image", layout=AS_LABEL),
    )


# --- zero-shot ---


def zero_shot_figure(
    run: Run, image: str | Path | bytes, labels: str, templates: str = "; ".join(DEFAULT_TEMPLATES)
) -> Figure:
    """Probabilities of labels for one image.

    Args:
        image: a file, or a file's bytes.
        labels, templates: texts separated by semicolons; `{}` in a template stands for the label.
    Raises: LabError for fewer than two labels, a template without `{}`, or an image that cannot be decoded.
    """
    probabilities = classify(run, image, split_texts(labels), split_texts(templates))
    return zero_shot_bars(
        [decode(image)], list(probabilities.index), probabilities["probability"].to_numpy()[None]
    )


def zero_shot_playground(gallery: Gallery, labels: str = "") -> Control:
    """Choose or upload an image, enter labels and templates separated by semicolons, see the probabilities."""
    known = known_labels(gallery)
    first = next(iter(known), 0)
    some = _some_labels(known[first], set(known.values())) if known else SOME_LABELS

    def show(item: int, upload: Any, **texts: str) -> Figure:
        image = uploaded(upload) or gallery.dataset.image_files([item])[0]
        return zero_shot_figure(gallery.run, image, **texts)

    return Control(
        show,
        item=_slider(len(gallery.image_id), "image", first),
        upload=widgets.FileUpload(accept="image/*", description="or upload one", layout=AS_LABEL),
        labels=widgets.Text(labels or some, description="labels", layout=WIDE),
        templates=widgets.Text("; ".join(DEFAULT_TEMPLATES), description="templates", layout=WIDE),
    )


def _some_labels(own: str, names: set[str], count: int = 6) -> str:
    """An image's own label and a few others, evenly spread over the alphabet."""
    others = sorted(names - {own})
    return "; ".join([own, *others[:: max(1, -(-len(others) // (count - 1)))]])


# --- attention and failures ---


def attention_figure(gallery: Gallery, first: int = 0, count: int = 4) -> Figure:
    """Where the pooling looks in `count` images. Raises: LabError without attention pooling."""
    items = list(range(first, min(first + count, len(gallery.image_id))))
    images = gallery.dataset.__getitems__(items)["image"]  # (count, 3, S, S)
    with torch.inference_mode():
        weights = gallery.run.model.attention(images.to(gallery.run.model.logit_scale.device))
    table, rows = gallery.dataset.table, gallery.dataset.rows[items]
    captions = [table.captions_of(int(row))[0] for row in rows]
    return attention_maps(list(images), list(weights.cpu()), captions)


def attention_explorer(gallery: Gallery, count: int = 4) -> Control:
    """Browse the images and see where the pooling looks."""
    return Control(
        partial(attention_figure, gallery, count=count),
        first=_slider(len(gallery.image_id), "images", step=count),
    )


def failure_explorer(gallery: Gallery, count: int = 3) -> Control:
    """Browse the failures, the worst caption first."""
    failed = len(worst_captions(gallery.ranks.t2i))
    return Control(
        partial(failure_figure, gallery, count=count), first=_slider(failed, "start at rank", step=count)
    )


# --- browsers of runs and of data ---


def runs_table(runs: Sequence[Run], baseline: Run | None = None) -> pd.DataFrame:
    """Recalls in percent with 95 % intervals on the first test split, one row per run.

    Only reads what `evaluate.evaluate_run` has measured. With a baseline, also the difference of Recall@1 in points
    with the interval of the paired test over images, if both were measured on the same gallery.
    """
    rows = {}
    for run in runs:
        rows[run.name] = {"split": run.test_split, "best epoch": run.best_epoch}
        metrics = run.metrics.get(run.test_split)
        if metrics is None:
            rows[run.name]["note"] = "not evaluated"
            continue
        names = [name for name in recalls_of(metrics) if name.endswith("@1")] or list(figures_of(metrics))[:3]
        rows[run.name] |= {"images": metrics["num_images"], "captions": metrics["num_texts"]}
        rows[run.name] |= {name: with_interval(metrics, name) for name in names}
        rows[run.name] |= {} if baseline is None else gains(run, baseline)
    return pd.DataFrame.from_dict(rows, orient="index")


def gains(run: Run, baseline: Run) -> dict[str, str]:
    """Difference of Recall@1 from a baseline's in points, in both directions: `+1.3 [+0.2, +2.4]`."""
    texts = {}
    for direction in ("i2t", "t2i"):
        column = f"points over baseline, {direction}"
        ours, theirs = (of.metrics.get(run.test_split, {}) for of in (run, baseline))
        if run.name == baseline.name:
            texts[column] = "baseline"
        elif not recalls_of(ours) or ours.get("gallery", "none") != theirs.get("gallery"):
            texts[column] = "another gallery" if theirs else "baseline not evaluated"
        else:
            test = paired_test_of(run, baseline, f"{direction}_recall@1")
            texts[column] = as_text("%", test.difference, (test.low, test.high), sign="+")
    return texts


def compare_chosen(
    known: Mapping[str, Run], names: Sequence[str], baseline: str
) -> tuple[Figure, pd.DataFrame]:
    """Curves and table of the runs of these names. Raises: LabError if none is named or one is unknown."""
    if not names:
        raise LabError("choose at least one run; click with Ctrl or Shift to add more.")
    runs = [choose(known, name, "run") for name in names]
    histories = {run.name: run.history for run in runs}
    curves = learning_curves(histories, best_epoch={run.name: run.best_epoch for run in runs})
    return curves, runs_table(runs, choose(known, baseline, "run"))


def run_browser(runs_dir: str | Path = "runs", baseline: str = "") -> Control:
    """Choose finished runs and a baseline, see their curves, metrics with intervals, and differences.

    Raises: LabError if no run is finished.
    """
    known = {run.name: run for run in finished_runs(runs_dir)}
    if not known:
        raise LabError(f"{runs_dir} contains no finished run; train one first.")
    options: dict[str, Any] = {"options": list(known), "layout": WIDE}
    first = list(known)[:4]
    return Control(
        partial(compare_chosen, known),
        names=widgets.SelectMultiple(value=first, rows=min(8, len(known)), description="runs", **options),
        baseline=widgets.Dropdown(value=baseline or first[0], description="baseline", **options),
    )


PER_PAGE, FLAGS_PER_PAGE = 8, 32
FULL_LABEL = {"description_width": "initial"}  # labels are not cut
IMAGES, FLAGS = "images", "problems found"


def find_rows(table: CaptionTable, words: str = "") -> list[int]:
    """Rows of the images with a caption that contains all the words."""
    hits = [_has_words(text, words) for text in table.captions]
    starts = table.offsets
    return [row for row in range(len(table)) if any(hits[starts[row] : starts[row + 1]])]


def _has_words(text: str, words: str) -> bool:
    return all(word in text.lower() for word in words.lower().split())


def browse_figure(
    table: CaptionTable, words: str = "", page: int = 1, bad: Collection[str] = ()
) -> tuple[Figure, pd.DataFrame]:
    """A page of images whose captions contain the words, and how many there are.

    Args:
        page: from 1; past the last one, the last.
        bad: paths of images that cannot be decoded and are left out.
    Raises: LabError if there is none.
    """
    rows = [row for row in find_rows(table, words) if table.paths[row] not in bad]
    if not rows:
        raise LabError(f"no caption contains {words!r}; try fewer words.")
    pages = -(-len(rows) // PER_PAGE)
    page = min(page, pages)
    on_page = rows[(page - 1) * PER_PAGE : page * PER_PAGE]
    figure = captioned_images(
        [table.path_of(row) for row in on_page], [table.captions_of(row)[:2] for row in on_page]
    )
    about = {"images found": len(rows), "of": len(table), "page": f"{page} of {pages}"}
    return figure, pd.DataFrame([about], index=[words or "all"])


def check_flags(report: Mapping[str, Any], words: str = "") -> pd.DataFrame:
    """What the data check flagged, one row per file: file, flag, detail.

    Args:
        report: of `check` or `load_report`.
        words: only rows that contain all of them.
    """
    rows = [(path, "undecodable", cause) for path, cause in report["bad_images"].items()]
    for group in report["duplicates"]:
        splits = " = ".join(group["splits"])
        rows += [(path, "equal file in several splits", splits) for path in group["paths"]]
    rows += [(problem["where"], problem["kind"], problem["what"]) for problem in report["problems"]]
    matching = [row for row in rows if _has_words(" ".join(map(str, row)), words)]
    return pd.DataFrame(matching, columns=["file", "flag", "detail"]).set_index("file")


def data_browser(table: CaptionTable, report: Mapping[str, Any] | str | Path | None = None) -> Control:
    """Filter captions and see their images, or see the problems that the data check found.

    Args: report: of `check.check`, or the folder that `dataset.check_data` wrote it to; none: images only.
    """
    if isinstance(report, (str, Path)):
        report = load_report(report)
    report = report or {"bad_images": {}, "duplicates": [], "problems": []}

    def browse(words: str, page: int, show: str) -> Any:
        if show == IMAGES:
            return browse_figure(table, words, page, report["bad_images"])
        flags = check_flags(report, words)
        if not len(flags):
            raise LabError("the check found no problem" + (f" with {words!r}." if words else "."))
        return flags.iloc[(page - 1) * FLAGS_PER_PAGE : page * FLAGS_PER_PAGE]

    pages = max(1, -(-len(table) // PER_PAGE))
    return Control(
        browse,
        words=widgets.Text(description="captions containing", style=FULL_LABEL, layout=WIDE),
        page=widgets.BoundedIntText(1, 1, pages, description="page"),
        show=widgets.ToggleButtons(options=[IMAGES, FLAGS], style={"button_width": "auto"}),
    )


# --- words and regions ---


def word_figure(gallery: Gallery, query: str, k: int = 4) -> tuple[Figure, pd.DataFrame]:
    """Where the k images nearest to a text match it, and what each of its words contributes.

    The map is the softmax over the image's positions of their cosines with the text, at the model's temperature. A
    word's contribution is what the mean cosine with these images loses without the word.
    Raises: LabError if the text is empty, or the data are no images.
    """
    if not query.strip():
        raise LabError("describe the image, such as 'a dog in the snow'.")
    run, dataset = gallery.run, gallery.dataset
    text = text_features(run.model, run.config, [query])  # (1, D)
    items = (gallery.image_features @ text[0]).topk(min(k, len(gallery.image_id))).indices
    images = dataset.decoded.gather(dataset.rows[items.numpy()])
    cosines = position_features(run.model, run.config, images) @ text[0]  # (k, h, w)
    weights = (cosines / run.model.temperature).flatten(1).softmax(1).view_as(cosines)
    found = [f"cosine {score:.2f}" for score in gallery.image_features[items] @ text[0]]
    label = "match (1: average position)"
    figure = attention_maps(list(images), list(weights), found, label=label)
    loses = word_contributions(run.model, run.config, query, gallery.image_features[items])
    table = pd.DataFrame([loses], columns=query.split(), index=["cosine lost without the word"]).round(3)
    return figure, table


def word_explorer(gallery: Gallery, query: str = "") -> Control:
    """Enter a text and see which regions of the nearest images match it, and which of its words matter."""
    first = query or gallery.dataset.table.captions_of(int(gallery.dataset.rows[0]))[0]
    return Control(partial(word_figure, gallery), query=widgets.Text(first, description="text", layout=WIDE))


# --- before and after training ---


@torch.inference_mode()
def similarity_figure(run: Run, split: str, count: int = 8) -> Figure:
    """Cosines of `count` images with one caption each, before training and after."""
    dataset = open_dataset(run.config, (split,), evaluation=True)
    items = evenly_spread(len(dataset), count).tolist()
    batch = dataset.batch(items)
    rows = [batch["text_id"].tolist().index(number) for number in batch["image_id"].tolist()]
    seed_everything(run.config.seed)
    cosines = {}
    for title, model in (
        ("before training", build_model(run.config).eval()),
        ("after training", run.model.cpu()),
    ):
        features = model(batch["image"], batch["text"])
        cosines[title] = features["image_features"] @ features["text_features"][rows].T
    table, rows = dataset.table, dataset.rows[items].tolist()
    captions = [table.captions_of(row)[0] for row in rows]
    return similarity_matrix(cosines, captions, [table.path_of(row) for row in rows])


# --- questions ---

QUESTIONS = Path(__file__).parent / "labs" / "questions"


class Prediction:
    """A question with an input; `compare` sets the answer beside what was measured. It may stay unanswered."""

    def __init__(self, question: str, unit: str = "") -> None:
        self.question, self.unit = question, unit
        self.input = widgets.Text(placeholder=f"your prediction {unit}".strip(), layout=NARROW)
        self.widget = widgets.VBox([widgets.HTML(f"<b>Predict:</b> {escape(question)}"), self.input])

    def compare(self, measured: float) -> pd.DataFrame:
        """One row: the prediction, what was measured, and their difference. A prediction that is no number is named."""
        text = self.input.value.strip()
        row: dict[str, Any] = {"measured": measured}
        if text:
            try:
                answer = float(text.rstrip("% ").replace(",", "."))
                row = {"predicted": answer, **row, "difference": measured - answer}
            except ValueError:
                row = {"predicted": f"{text!r} is no number", **row}
        unit = f" ({self.unit})" if self.unit else ""
        return pd.DataFrame([row], index=[self.question]).round(2).rename(columns=lambda name: name + unit)

    def _ipython_display_(self) -> None:
        display(shown_bundle(self.widget, html=f"<b>Predict:</b> {escape(self.question)}"), raw=True)


def quiz(lab: str) -> None:
    """The multiple-choice questions of a lab; each answer is explained. Raises: LabError if there is no such lab."""
    from jupyterquiz import display_quiz

    path = choose({path.stem: path for path in QUESTIONS.glob("*.json")}, lab, "lab")
    display_quiz(str(path), shuffle_answers=False)
