"""Reports of a finished run and of a comparison of runs: tables, figures and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from config import DEFAULT_CONFIG, NOT_IN_NAME, make_config
from core.files import csv_text, write_text
from metrics import metrics_table
from plots.figures import comparison_bars, learning_curves
from reports.compare import Setting, differing_fields, judged_figures
from reports.gallery import INTERVALS, results_of
from reports.sections import Section
from retrieval.statistics import TEST_IMAGES_ONLY
from utils import Run

FOLD_ROWS = 20
NUMBER = re.compile(r"-?[\d.,]+( %)?( ± [\d.,]+)?( \[.*\])?")  # with its spread or interval
MAX_LEFT_OUT = 50
MAX_CURVES = 7


# --- tables and pages ---


class Page:
    """A self-contained HTML report, built part by part from top to bottom; `page.html` is its template.

    >>> page = Page("Report")
    >>> page.heading("Results")
    >>> page.text("Recall is in percent.")
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        self.parts.append({"heading": text})

    def text(self, text: str) -> None:
        self.parts.append({"text": text})

    def table(self, table: pd.DataFrame, caption: str = "") -> None:
        """A table with its index as first columns; more than `FOLD_ROWS` rows are folded under the caption."""
        columns, rows = _cells(table)
        numeric = [all(NUMBER.fullmatch(cell) for cell in cells if cell) for cells in zip(*rows, strict=True)]
        self.parts.append({"columns": columns, "rows": rows, "numeric": numeric, "caption": caption})

    def figure(self, path: Path, caption: str) -> None:
        """A PNG file, embedded."""
        self.parts.append({"png": base64.b64encode(path.read_bytes()).decode("ascii"), "caption": caption})

    def save(self, path: str | Path) -> Path:
        """Write the page as one HTML file; every text is escaped."""
        folder = FileSystemLoader(Path(__file__).parent)
        template = Environment(loader=folder, autoescape=True).get_template("page.html")
        return write_text(path, template.render(title=self.title, parts=self.parts, fold_rows=FOLD_ROWS))


def _cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The names of a table's columns and its rows as text, the index first."""
    whole = table.reset_index() if any(table.index.names) else table.reset_index(names="")
    rows = [[_text(value) for value in row] for row in whole.itertuples(index=False)]
    return [str(name) for name in whole.columns], rows


def _text(value: object) -> str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown, its index first; pipes and line breaks in cells are escaped."""
    header, rows = _cells(table)
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[" ".join(cell.replace("|", r"\|").split()) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def save_table(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write a table as CSV and as Markdown: `path` with both endings."""
    files = {".csv": csv_text(table), ".md": markdown_table(table)}
    return [write_text(path.with_suffix(ending), content) for ending, content in files.items()]


def free_name(folder: Path, taken: Collection[str]) -> str:
    """A folder's name, preceded by as many parent folders as make it different from the names taken."""
    parts = folder.parts[1:]
    names = ("_".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(name for name in names if name not in taken)


def save_sections(sections: Sequence[Section], folder: Path, where: str) -> None:
    """Write the tables of a split's sections, each as `NAME_WHERE`."""
    for section in sections:
        if section.table is not None:
            name = re.sub(r"\W+", "_", section.name).strip("_")
            save_table(section.table, folder / f"{name}_{where}")


# --- the page of one run ---


def run_page(run: Run, sections: Mapping[str, Sequence[Section]]) -> Page:
    """The report of an evaluated run: facts, results, training, sections by split, files left out, configuration."""
    page = Page(f"Run {run.name}")
    page.table(facts(run))
    page.heading("Results")
    if not run.metrics:
        page.text(
            "There is no test split, so nothing was measured; set test_splits, for example to the val splits."
        )
    page.table(
        metrics_table(run.metrics),
        f"Recalls in percent; i2t: image-to-text, t2i: text-to-image; brackets: {INTERVALS}.",
    )
    page.text(
        "Every image of the split is in the gallery once. Each of its captions counts as a correct match."
    )
    figures = results_of(run) / "figures"
    for split in run.metrics:
        if (figures / f"recall_{split}.png").is_file():
            page.figure(figures / f"recall_{split}.png", f"Recall@K on split {split}; dotted lines: chance.")
    page.heading("Training")
    page.figure(
        figures / "learning_curves.png",
        "Training and validation; the star marks the epoch whose weights were kept.",
    )
    for where, parts in sections.items():
        page.heading(f"Details: {where}")
        for section in parts:
            if section.table is not None:
                page.table(section.table, section.caption)
            elif section.figure is not None:
                page.figure(section.figure, section.caption)
            else:
                page.text(section.caption)
    page.heading("Files left out")
    _add_left_out(page, run)
    page.heading("Configuration")
    config = run.config
    configs = {run.name: config, f"preset {config.preset}": make_config(config.preset)}
    differing = differing_fields({**configs, "documented lab": DEFAULT_CONFIG})
    page.table(differing, "Fields that differ between this run, its preset and the documented lab.")
    others = pd.DataFrame({"value": {name: str(config[name]) for name in sorted(NOT_IN_NAME)}})
    page.table(others.rename_axis("field"), "Fields that are not part of the run's name.")
    return page


def facts(run: Run) -> pd.DataFrame:
    """What was trained, on which data, for how long and on which machine."""
    config, training = run.config, dict(run.training)
    data = training.pop("data", {})
    sizes = {
        part: f"{about['splits']}: {about['images']:,} images, {about['captions']:,} captions"
        for part, about in data.items()
    }
    split_source = data.get("train", {}).get("split_source", "")
    epochs = training.pop("epochs", len(run.history))
    finished = training.pop("finished", False)
    rows = {
        "preset, seed": f"{config.preset}, {config.seed}",
        "data": f"{config.data_dir.resolve().name}, reader {config.reader}",
        **({"split": split_source} if split_source else {}),
        "trained on": sizes.get("train", "+".join(config.train_splits)),
        "best epoch chosen on": f"{sizes.get('val', '+'.join(config.val_splits))}, by {config.best_metric}",
        "image tower": f"{config.image_tower} ({config.image_tower_mode}), head {config.image_head}",
        "text tower": f"{config.text_tower} ({config.text_tower_mode}), head {config.text_head}",
        "loss": f"{config.loss}, batches of {config.batch_size} images",
        "epochs": f"{epochs} of {config.num_epochs}, epoch {run.best_epoch} kept",
        "training time": duration(training.pop("train_seconds", 0.0)),
        "training finished": "yes" if finished else "no: these are the results of its best epoch so far",
    }
    plain = {name: value for name, value in training.items() if isinstance(value, (str, int, float))}
    rows.update({name.replace("_", " "): value for name, value in plain.items()})
    return pd.DataFrame({"value": rows}).rename_axis("fact")


def duration(seconds: float) -> str:
    """`97 s`, `12 min 30 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def _add_left_out(page: Page, run: Run) -> None:
    """Files of training, validation and test that were left out, with the reasons; also saved as tables/left_out."""
    of_training = {part: data.get("left_out", {}) for part, data in run.training.get("data", {}).items()}
    of_tests = {split: metrics.get("left_out_files", {}) for split, metrics in run.metrics.items()}
    rows = [
        {"split": split, "file": path, "cause": cause}
        for split, files in {**of_training, **of_tests}.items()
        for path, cause in files.items()
    ]
    if not rows:
        page.text("None: every image could be decoded and has a caption.")
        return
    table = pd.DataFrame(rows).set_index("split")
    save_table(table, results_of(run) / "tables" / "left_out")
    number = f"{len(rows):,} images were" if len(rows) > 1 else "1 image was"
    more = f" The first {MAX_LEFT_OUT}; all are in tables/left_out.csv." if len(rows) > MAX_LEFT_OUT else ""
    page.table(table[:MAX_LEFT_OUT], f"{number} left out and not replaced by others.{more}")


COPIES: Mapping[str, Callable[[Run], str]] = {
    ".html": lambda run: (results_of(run) / "report.html").read_text(encoding="utf-8"),
    ".json": lambda run: json.dumps(run.metrics, indent=1, default=str),
    ".csv": lambda run: csv_text(metrics_table(run.metrics)),
    ".md": lambda run: markdown_table(metrics_table(run.metrics)),
}
"""Ending of a copy of a run's report -> its content."""


# --- the page of a comparison ---


def comparison_page(
    settings: Sequence[Setting],
    table: pd.DataFrame,
    texts: pd.DataFrame,
    folder: Path,
    baseline: str | None = None,
) -> Page:
    """The report of a comparison; its figures are written to `folder`.

    Args: table: by `evaluate.compare_runs`; texts: the same by `evaluate.readable`.
    """
    page = Page("Comparison of runs")
    shared = [name for name in ("split", "protocol", "images", "captions") if texts[name].nunique() == 1]
    caption = "; ".join(
        [
            f"Mean ± standard deviation over seeds, recalls in percent; baseline: {baseline or table.index[0]}",
            *(f"{name}: {texts[name].iloc[0]}" for name in shared),
        ]
    )
    page.table(texts.drop(columns=shared), f"{caption}.")
    page.text(
        "A setting is called higher or lower only if both have at least three seeds and Welch's 95 % interval of "
        "the difference excludes zero. Two single runs are compared by a paired test over the test images, marked "
        f"{TEST_IMAGES_ONLY}: variation between training seeds is not included."
    )
    page.heading("Figures")
    judged = judged_figures(settings)
    bars, whiskers = _with_intervals(settings, table, judged)
    comparison_bars(bars, folder / "comparison.png", metrics=judged, whiskers=whiskers)
    page.figure(folder / "comparison.png", f"{' and '.join(judged)}; whiskers: {whiskers}.")
    drawn = {setting.label: setting.runs[0] for setting in settings[:MAX_CURVES]}
    histories = {label: run.history for label, run in drawn.items()}
    best_epochs = {label: run.best_epoch for label, run in drawn.items()}
    learning_curves(histories, folder / "learning_curves.png", best_epoch=best_epochs)
    of_how_many = "" if len(drawn) == len(settings) else f"; {len(drawn)} of {len(settings)} settings"
    page.figure(
        folder / "learning_curves.png",
        f"Training and validation, the first seed of each setting{of_how_many}.",
    )
    page.heading("Configuration")
    configs = {setting.label: setting.runs[0].config for setting in settings}
    page.table(differing_fields(configs), "Fields in which the settings differ.")
    page.heading("Runs")
    rows = {
        run.name: {
            "setting": setting.label,
            "seed": run.config.seed,
            "training time": duration(run.training.get("train_seconds", 0.0)),
            "machine": run.training.get("machine", ""),
        }
        for setting in settings
        for run in setting.runs
    }
    runs = pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")
    page.table(runs, "Every run, its seed, time and machine.")
    return page


def _with_intervals(
    settings: Sequence[Setting], table: pd.DataFrame, metrics: Sequence[str]
) -> tuple[pd.DataFrame, str]:
    """The table with the intervals of single runs as whiskers, and what the whiskers are."""
    table = table.copy()
    single = [len(setting.runs) == 1 for setting in settings]
    for name in [f"{metric}_{end}" for metric in metrics for end in ("low", "high")]:
        ends = [setting.runs[0].metrics[setting.split].get(name) for setting in settings]
        table[name] = pd.Series(ends, table.index, dtype=float).where(pd.Series(single, table.index))
    kinds = {False: "several seeds: ± 1 standard deviation", True: f"one seed: {INTERVALS}"}
    return table, "; ".join(kinds[alone] for alone in sorted(set(single)))
