"""Writes what a finished run, or a comparison of runs, has to show: tables, figures, one page to hand in."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import plots
import zero_shot
from comparison import (
    Page,
    Setting,
    comparison_table,
    differing_fields,
    group_settings,
    judged_figures,
    markdown_table,
    opened,
    readable,
    save_table,
)
from config import DEFAULT_CONFIG, NOT_IN_NAME, make_config
from errors import LabError, choose
from files import csv_text, write_json, write_text
from gallery import INTERVALS, evaluate_run, measured_split, metrics_table, open_gallery, results_of
from looking_inside import Exhibit, examine, zero_shot_exhibits
from runs import Run
from uncertainty import TEST_SAMPLE_ONLY
from zero_shot import open_labelled

LEFT_OUT_SHOWN = 50
CURVES_SHOWN = 7


def report_run(
    run: Run,
    *,
    comprehensive: bool = False,
    labelled: Sequence[str | Path] = (),
    again: bool = False,
    output_file: str | Path | None = None,
    show: bool = True,
) -> Path:
    """Evaluate a run and write metrics.json, tables (CSV and Markdown), figures and report.html into its folder.

    Args:
        comprehensive: also every protocol that fits, recall by gallery size, ranks, failures, maps, similarities,
            attention, zero-shot classes.
        labelled: folders of class folders or of CIFAR's files to classify.
        again: measure anew what metrics.json holds.
        output_file: a further copy: the page (.html), the metrics (.json) or the table of results (.csv, .md).
    Returns: the page.
    Raises: LabError if output_file has another ending.
    """
    write_copy = (
        None if output_file is None else choose(COPIES, Path(output_file).suffix, "output_file ending")
    )
    before = {found.get("weights") for found in run.metrics.values()}
    if before and before != {run.weights}:  # nothing of other weights stays beside the new figures
        for name in ("figures", "tables"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
    exhibits = {split: _examined(run, split, again, show) for split in run.config.test_splits * comprehensive}
    evaluate_run(run, again=again and not comprehensive, show=show)
    results = results_of(run)
    figures = results / "figures"
    for folder in dict.fromkeys(Path(each).resolve() for each in labelled):
        name = free_name(folder, {*exhibits, *run.config.test_splits})
        found = zero_shot.measure(run, replace(open_labelled(run, folder, show=show), name=name))
        exhibits[found.name] = list(zero_shot_exhibits([found], figures, found.name))
    for where, shown in exhibits.items():
        _save_tables(shown, results / "tables", where)
    page = run_page(run, exhibits)
    save_table(metrics_table(run.metrics), results / "tables" / "results")
    saved = page.save(results / "report.html")
    if output_file is not None and write_copy is not None:
        write_copy(run, Path(output_file))
    return saved


def free_name(folder: Path, taken: Collection[str]) -> str:
    """A folder's name, with as many of its parents' before it as tell it from those taken."""
    parts = folder.parts[1:]
    names = ("_".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(name for name in names if name not in taken)


def _examined(run: Run, split: str, again: bool, show: bool) -> list[Exhibit]:
    """A split's exhibits, from one encoding of it that also measures it where that is due."""
    gallery = open_gallery(run, split, show=show)
    run.metrics[split] = measured_split(run, split, gallery=gallery, again=again)
    return examine(gallery, results_of(run) / "figures", show=show)


def _save_tables(exhibits: Sequence[Exhibit], folder: Path, where: str) -> None:
    for exhibit in exhibits:
        if exhibit.table is not None:
            name = re.sub(r"\W+", "_", exhibit.name).strip("_")
            save_table(exhibit.table, folder / f"{name}_{where}")


COPIES: Mapping[str, Callable[[Run, Path], Any]] = {
    ".html": lambda run, path: write_text(
        path, (results_of(run) / "report.html").read_text(encoding="utf-8")
    ),
    ".json": lambda run, path: write_json(path, run.metrics),
    ".csv": lambda run, path: write_text(path, csv_text(metrics_table(run.metrics))),
    ".md": lambda run, path: write_text(path, markdown_table(metrics_table(run.metrics))),
}


# --- the page of one run ---


def run_page(run: Run, exhibits: Mapping[str, Sequence[Exhibit]]) -> Page:
    """The report of an evaluated run: facts, results, training, exhibits, files left out, configuration."""
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
        "Intervals answer what other test images would have given; another seed's training is not in them. "
        "Every image of a split is searched once, all its captions count as right."
    )
    figures = results_of(run) / "figures"
    for split in run.metrics:
        if (figures / f"recall_{split}.png").is_file():
            page.figure(figures / f"recall_{split}.png", f"Recall@K on split {split}, dotted: chance.")
    page.heading("Training")
    page.figure(
        figures / "learning_curves.png", "Training and validation; the star is the epoch that was kept."
    )
    for part, shown in exhibits.items():
        page.heading(f"Looking inside: {part}")
        for exhibit in shown:
            _show(page, exhibit)
    page.heading("Files left out")
    _show_left_out(page, run)
    page.heading("Configuration")
    _show_configuration(page, run)
    return page


def _show(page: Page, exhibit: Exhibit) -> None:
    if exhibit.table is not None:
        page.table(exhibit.table, exhibit.caption)
    elif exhibit.figure is not None:
        page.figure(exhibit.figure, exhibit.caption)
    else:
        page.text(exhibit.caption)


def facts(run: Run) -> pd.DataFrame:
    """What was trained on what, for how long, on which machine."""
    config, training = run.config, dict(run.training)
    data = {part: f"{about['splits']}: {about['images']:,} images, {about['captions']:,} captions"
            for part, about in training.pop("data", {}).items()}  # fmt: skip
    split_source = run.training.get("data", {}).get("train", {}).get("split_source", "")
    told = {
        "preset, seed": f"{config.preset}, {config.seed}",
        "data": f"{config.data_dir.resolve().name}, reader {config.reader}",
        **({"split": split_source} if split_source else {}),
        "trained on": data.get("train", "+".join(config.train_splits)),
        "epoch chosen on": f"{data.get('val', '+'.join(config.val_splits))}, by {config.best_metric}",
        "image tower": f"{config.image_tower} ({config.image_tower_mode}), head {config.image_head}",
        "text tower": f"{config.text_tower} ({config.text_tower_mode}), head {config.text_head}",
        "loss": f"{config.loss}, batches of {config.batch_size} images",
        "epochs": f"{training.pop('epochs', len(run.history))} of {config.num_epochs}, number {run.best_epoch} kept",
        "training time": duration(training.pop("train_seconds", 0.0)),
        "training finished": "yes"
        if training.pop("finished", False)
        else "no: these figures are of its best so far",
    }
    others = {
        key.replace("_", " "): value
        for key, value in training.items()
        if isinstance(value, (str, int, float))
    }
    return pd.DataFrame({"value": {**told, **others}}).rename_axis("fact")


def duration(seconds: float) -> str:
    """`97 s`, `12 min 30 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def _show_left_out(page: Page, run: Run) -> None:
    """Files of training, validation and test that were left out, with their causes; all of them as a CSV too."""
    of_training = {part: about.get("left_out", {}) for part, about in run.training.get("data", {}).items()}
    of_tests = {split: found.get("left_out_files", {}) for split, found in run.metrics.items()}
    rows = [
        {"split": split, "file": path, "cause": cause}
        for split, files in {**of_training, **of_tests}.items()
        for path, cause in files.items()
    ]
    if not rows:
        page.text("None: every picture could be decoded and has a caption.")
        return
    table = pd.DataFrame(rows).set_index("split")
    save_table(table, results_of(run) / "tables" / "left_out")
    more = (
        f"; the first {LEFT_OUT_SHOWN} of them, all in tables/left_out.csv"
        if len(rows) > LEFT_OUT_SHOWN
        else ""
    )
    page.table(table[:LEFT_OUT_SHOWN], f"{len(rows):,} pictures were left out, none replaced{more}.")


def _show_configuration(page: Page, run: Run) -> None:
    config = run.config
    ours = {run.name: config, f"preset {config.preset}": make_config(config.preset)}
    table = differing_fields({**ours, "documented lab": DEFAULT_CONFIG}).rename_axis("field")
    page.table(table, "Fields that differ from the preset, or the preset's from the documented lab.")
    machine = pd.DataFrame({"value": {name: str(config[name]) for name in sorted(NOT_IN_NAME)}})
    page.table(machine.rename_axis("field"), "Fields that change where or how fast a run is computed.")


# --- the page of a comparison ---


def report_comparison(
    runs: Sequence[Run], folder: str | Path, baseline: str | None = None, *, show: bool = True
) -> Path:
    """Compare runs and write comparison.csv and .md, figures and report.html into a folder.

    Args: baseline: a setting's label or a run's name that the others are judged against; None: the first.
    Returns: the page.
    """
    folder = Path(folder)
    settings = group_settings(runs, show=show)
    table = comparison_table(settings, baseline)
    save_table(table, folder / "comparison")
    page = Page("Comparison of runs")
    shown, alike = without_constants(readable(table))
    caption = (
        f"Mean ± standard deviation over seeds, recalls in percent; baseline: {baseline or table.index[0]}"
    )
    page.table(shown, f"{caption}{alike}.")
    page.text(
        "A setting is called higher or lower only where both have three seeds or more and Welch's 95 % interval "
        "of the difference leaves out zero. Between two single runs a paired test over the test images stands in "
        "its place, marked test sample only: it says nothing of another seed's training."
    )
    page.heading("Figures")
    for path, words in _comparison_figures(settings, table, folder).items():
        page.figure(path, words)
    page.heading("Configuration")
    page.table(
        differing_fields({setting.label: setting.runs[0].config for setting in settings}).rename_axis(
            "field"
        ),
        "Fields in which the settings differ.",
    )
    page.heading("Runs")
    page.table(_runs_table(settings), "Every run, its seed, time and machine.")
    return page.save(folder / "report.html")


def without_constants(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The table without what all rows share of their gallery, and that in words: `; split: test`."""
    shared = [name for name in ("split", "protocol", "images", "captions") if table[name].nunique() == 1]
    words = "".join(f"; {name}: {table[name].iloc[0]}" for name in shared)
    return table.drop(columns=shared), words


def _comparison_figures(settings: Sequence[Setting], table: pd.DataFrame, folder: Path) -> dict[Path, str]:
    judged = judged_figures(settings)
    bars, whiskers = with_intervals(settings, table, judged)
    plots.comparison_bars(bars, folder / "comparison.png", metrics=judged, whiskers=whiskers)
    shown = settings[:CURVES_SHOWN]
    histories = {setting.label: setting.runs[0].history for setting in shown}
    best = {setting.label: setting.runs[0].best_epoch for setting in shown}
    plots.learning_curves(histories, folder / "learning_curves.png", best_epoch=best)
    of_how_many = "" if len(shown) == len(settings) else f"; {len(shown)} of {len(settings)} settings"
    return {
        folder / "comparison.png": f"{' and '.join(judged)}; whiskers: {whiskers}.",
        folder
        / "learning_curves.png": f"Training and validation, the first seed of each setting{of_how_many}.",
    }


def with_intervals(
    settings: Sequence[Setting], table: pd.DataFrame, metrics: Sequence[str]
) -> tuple[pd.DataFrame, str]:
    """The table with single runs' intervals as whiskers, and what the whiskers are."""
    single = [len(setting.runs) == 1 for setting in settings]
    table = table.copy()
    for metric in metrics:
        for end in ("low", "high"):
            found = [setting.runs[0].metrics[setting.split].get(f"{metric}_{end}") for setting in settings]
            table[f"{metric}_{end}"] = [
                value if alone else None for value, alone in zip(found, single, strict=True)
            ]
            table[f"{metric}_{end}"] = table[f"{metric}_{end}"].astype(float)
    kinds = {
        False: "± 1 standard deviation over seeds",
        True: f"one seed: 95 % interval, {TEST_SAMPLE_ONLY}",
    }
    return table, "; ".join(kinds[alone] for alone in sorted(set(single)))


def _runs_table(settings: Sequence[Setting]) -> pd.DataFrame:
    rows = []
    for setting in settings:
        for run in setting.runs:
            seconds = duration(run.training.get("train_seconds", 0.0))
            about = {"setting": setting.label, "seed": run.config.seed, "training time": seconds}
            rows.append({"run": run.name, **about, "machine": run.training.get("machine", "")})
    return pd.DataFrame(rows).set_index("run")


def open_runs(folders: Sequence[str | Path], load: Callable[[Path], Run]) -> list[Run]:
    """The finished runs among some folders; what is none is named and passed over.

    Raises: LabError if none is left.
    """
    runs = []
    for folder in map(Path, folders):
        if not (folder / "config.yaml").is_file():
            print(f"{folder} is left out: it is not a run.")
        elif (run := opened(folder, load)) is not None and run.finished:
            runs.append(run)
        elif run is not None:
            print(f"{folder} is left out: its training is not finished.")
    if not runs:
        raise LabError("there is no finished run to compare; train one first.")
    return runs
