"""Evaluating, comparing, searching and exporting finished runs."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from interface import cli

    cli.evaluate()
    raise SystemExit

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from config import load_config, run_name
from core.errors import LabError, choose
from core.files import csv_text, file_digest, fingerprint, make_folder, write_json, write_text
from core.tensor_files import save_tensors
from metrics import as_text, chance, figures_of, metrics_table, recalls_of
from plots.figures import learning_curves, recall_bars
from reports.compare import BASELINE, Setting, comparison_table, settings_label
from reports.export import FORMATS, model_card, write_format
from reports.gallery import Gallery, data_digest, load_or_encode, open_split, results_folder, results_of
from reports.hubs import scoring_figures, split_corrections
from reports.report import COPIES, comparison_page, free_name, run_page, save_sections, save_table
from reports.search import GallerySearch, check_captioned, file_name, search_grid
from reports.sections import Section, split_sections, zero_shot_sections
from reports.zero_shot import DEFAULT_TEMPLATES, Labelled, known_labels, measure, open_labelled
from retrieval.hubness import RULES
from training.checkpoints import evaluation_lock, load_any_weights, read_metrics
from utils import Run, load_run

# --- measuring ---


def open_gallery(run: Run, split: str, *, show: bool = True) -> Gallery:
    """A split encoded by a run's best model; features that are saved in the run's folder are read.

    Raises: LabError if the split does not exist or the run has no weights yet.
    """
    return load_or_encode(run, open_split(run, split, show=show), show=show)


def evaluate_run(run: Run, *, again: bool = False, show: bool = True) -> dict[str, dict[str, Any]]:
    """Metrics of a run's test splits, and their figures.

    Metrics are saved in metrics.json, and measured again if the weights, the data or recall_ks have changed.
    Results on data other than the run's own go into a folder of their own, see `results_folder`.

    Args:
        again: measure again in any case.
    Returns: split -> metrics; recalls in [0, 1].
    Raises: LabError if a test split does not exist, or data_dir was given and does not exist.
    """
    measure_run(run, again=again, show=show)
    figures = results_of(run) / "figures"
    learning_curves({run.name: run.history}, figures / "learning_curves.png", best_epoch=run.best_epoch)
    for split, metrics in run.metrics.items():
        if recalls_of(metrics):
            recall_bars(metrics, figures / f"recall_{split}.png", chance=chance(metrics))
    return run.metrics


def measure_run(run: Run, *, again: bool = False, show: bool = True) -> dict[str, dict[str, Any]]:
    """`evaluate_run` without figures."""
    run.metrics = {
        split: measure_split(run, split, again=again, show=show) for split in run.config.test_splits
    }
    return run.metrics


def measure_split(
    run: Run, split: str, *, gallery: Gallery | None = None, again: bool = False, show: bool = True
) -> dict[str, Any]:
    """One split's metrics under the run's weights, on the data as they are now.

    Args: gallery: the split, if it is encoded already.
    """
    saved = run.metrics.get(split, {})
    try:
        dataset = open_split(run, split, show=show) if gallery is None else gallery.dataset
    except LabError:
        if not run.own_data or run.config.data_dir.exists() or saved.get("weights") != run.weights:
            raise
        print(
            f"{run.config.data_dir} is gone: split {split!r} of {run.name} is shown as it was measured there."
        )
        return saved
    digest = data_digest(dataset)
    folder = results_folder(run, split, digest)
    if folder != run.folder:
        saved = read_metrics(folder / "metrics.json").get(split, {})
    expected = {"weights": run.weights, "gallery": digest, "recall_ks": list(run.config.recall_ks)}
    if again or any(saved.get(name) != value for name, value in expected.items()):
        return save_metrics(gallery or load_or_encode(run, dataset, again=again, show=show))
    return saved


def save_metrics(gallery: Gallery) -> dict[str, Any]:
    """Measure a gallery and write its metrics into metrics.json in the folder of the run's results.

    Metrics of other weights in that file are dropped.
    """
    return _write_metrics(gallery, {**gallery.metrics(), "weights": gallery.run.weights})


def _write_metrics(gallery: Gallery, metrics: dict[str, Any]) -> dict[str, Any]:
    run = gallery.run
    path = results_folder(run, gallery.split, gallery.fingerprint) / "metrics.json"
    earlier = read_metrics(path, show=False).items()
    others = {split: other for split, other in earlier if other.get("weights") == run.weights}
    write_json(path, {**others, gallery.split: metrics}, seal=True)
    run.metrics[gallery.split] = metrics
    return metrics


def measure_scorings(gallery: Gallery, *, show: bool = True) -> None:
    """Add figures by the scoring rules of `retrieval.hubness` to a measured split's metrics, as `scorings`.

    They are left out with a printed message where the training or validation data cannot be opened.
    """
    metrics = gallery.run.metrics[gallery.split]
    if gallery.measures_itself or "scorings" in metrics:
        return
    try:
        scorings = scoring_figures(gallery, show=show)
    except LabError as reason:
        print(f"split {gallery.split!r} is measured by cosine similarity alone: {reason}")
    else:
        _write_metrics(gallery, {**metrics, "scorings": scorings})


def zero_shot_accuracy(gallery: Gallery, templates: Sequence[str] = DEFAULT_TEMPLATES) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] over the images with one known label, among all labels that occur.

    Empty where the data set knows fewer than two labels.
    """
    known = known_labels(gallery)
    labels = sorted(set(known.values()))
    if len(labels) < 2:
        return {}
    truth = np.array([[label == name for name in labels] for label in known.values()])
    labelled = Labelled(gallery.split, labels, truth, gallery.image_features[list(known)])
    summary = measure(gallery.run, labelled, templates).summary
    return {name: summary[name] for name in ("top1", "top5", "chance", "images", "labels")}


# --- search ---


def open_search(
    run: Run, split: str | None = None, scoring: str = "cosine", *, show: bool = True
) -> GallerySearch:
    """A split of a run, ready to be searched.

    Args: split: None: the first test split; scoring: `cosine`, or a rule of `retrieval.hubness.RULES`.
    """
    choose({"cosine": None, **RULES}, scoring, "scoring")
    dataset = open_split(run, split or run.test_split, show=show)
    check_captioned(dataset)
    gallery = load_or_encode(run, dataset, show=show)
    if scoring == "cosine":
        return GallerySearch(gallery)
    return GallerySearch(gallery, split_corrections(gallery, [scoring], show=show)[scoring][1]["t2i"])


def search_command(
    run: Run | str | Path,
    text: str = "",
    image: str | Path | None = None,
    minus: str = "",
    k: int | None = None,
    folder: str | Path | None = None,
    scoring: str = "cosine",
) -> Path:
    """Search a run's first test split and write the images found as PNG, and a table as CSV beside it.

    Args:
        text, image: what the images should show; both together are added.
        minus: what they should not show.
        k: number of images; None: 10, or all if there are fewer.
        folder: None: `search/` in the run's folder.
        scoring: as in `open_search`; part of the file's name if it is not `cosine`.
    Returns: the path of the PNG.
    Raises: LabError if neither text nor image is given; see `GallerySearch`.
    """
    terms: list[tuple[Any, float]] = [(text, 1.0)] if text.strip() else []
    terms += [(Path(image), 1.0)] if image is not None else []
    if not terms:
        raise LabError(
            'there is nothing to search for; give a text such as "a dog in the snow", or --image FILE.'
        )
    terms += [(minus, -1.0)] if minus.strip() else []
    run = run if isinstance(run, Run) else load_run(run)
    search = open_search(run, scoring=scoring)
    k = max(1, min(10, len(search.images) - (image is not None))) if k is None else k
    result = search.combined(terms, k)
    folder = results_of(run) / "search" if folder is None else Path(folder)
    rule = "" if scoring == "cosine" else f", {RULES[scoring].label}"
    path = folder / f"{file_name(result.query + rule)}.png"
    search_grid([result], path, f"{run.name}, {search.gallery.split}: {len(search.images):,} images{rule}")
    write_text(path.with_suffix(".csv"), csv_text(result.table(), index=False))
    return path


# --- comparing ---


def finished_runs(runs_dir: str | Path, preset: str | None = None) -> list[Run]:
    """Every finished run of a preset, or of all, by name."""
    folders = sorted(path.parent for path in Path(runs_dir).glob("*/training.json"))
    runs = [run for folder in folders if (run := _load(folder)) is not None]
    return [run for run in runs if run.finished and preset in (None, run.config.preset)]


def _load(folder: Path, **places: Any) -> Run | None:
    """A run, or None with a printed message if its folder is damaged, so that the other runs are still compared."""
    try:
        return load_run(folder, **places)
    except LabError as error:
        print(f"{folder} is left out: {error}")
        return None


def open_runs(folders: Sequence[str | Path], **places: Any) -> list[Run]:
    """The finished runs among some folders; the others are named and left out.

    Args: places: as in `load_run`.
    Raises: LabError if there is none.
    """
    runs = []
    for folder in map(Path, folders):
        if not (folder / "config.yaml").is_file():
            print(f"{folder} is left out: it is not a run.")
        elif (run := _load(folder, **places)) is not None and run.finished:
            runs.append(run)
        elif run is not None:
            print(f"{folder} is left out: its training is not finished.")
    if not runs:
        raise LabError("there is no finished run to compare; train one first.")
    return runs


def group_settings(runs: Sequence[Run], *, show: bool = True) -> list[Setting]:
    """Runs grouped by configuration, seeds aside, in the order given; evaluated if they are not yet.

    A run that cannot be evaluated is left out with a printed message.
    Raises: LabError if there is no run, or none can be evaluated.
    """
    if not runs:
        raise LabError("there is no finished run to compare; train one first.")
    several = len({run.config.preset for run in runs}) > 1
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        label = settings_label(run.config)
        label = f"{run.config.preset}: {label}" if several else label
        try:
            metrics = measure_run(run, show=show)[run.test_split]
        except LabError as error:
            if run is runs[-1] and not groups:
                raise
            print(f"{run.name} is left out: {error}")
            continue
        label = ", ".join([label, *run.training.get("own", {}).values()])
        about = run.training.get("data", {}).get("train", {})
        trained = fingerprint([about.get("sha256", ""), about.get("form", "")])
        groups.setdefault((label, metrics["gallery"], trained), []).append(run)
    number = Counter(label for label, *_ in groups)
    settings = []
    for (label, gallery, trained), group in groups.items():
        label = label if number[label] == 1 else f"{label}, on {gallery[:6]}, from {trained[:6]}"
        figures = [figures_of(run.metrics[run.test_split]) for run in group]
        table = pd.DataFrame(figures, index=[run.name for run in group])
        settings.append(Setting(label, group, table, gallery))
    return settings


def effect_of(runs: Sequence[Run], flag: str, metric: str = "t2i_recall@1") -> float:
    """Mean change of a figure on the test split between runs that differ in a flag alone; nan without such runs."""
    by_name = {run.name: run.metrics.get(run.test_split, {}).get(metric, math.nan) for run in runs}
    changes = [
        by_name[run.name] - by_name.get(run_name(run.config.updated(**{flag: False})), math.nan)
        for run in runs
        if run.config[flag]
    ]
    return float(np.mean(changes)) if changes else math.nan


def compare_runs(
    runs: Sequence[Run],
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    *,
    show: bool = True,
) -> pd.DataFrame:
    """One row per setting: protocol, seeds, mean and standard deviation of its figures, and verdicts.

    Figures are of the first test split, recalls in [0, 1]; `_std` over seeds is nan for a single one. Each of
    `metrics` has a column `_verdict` against the baseline: `higher`, `lower` or `no significant difference` where both
    have three seeds or more (Welch's interval of the difference of means); for two single runs on one gallery the
    paired test, marked `test images only`: it says nothing about variation between seeds; else `too few seeds`.

    Args:
        baseline: a setting's label or a run's name; None: the first.
        metrics: figures to judge; None: Recall@1 both ways, or the first two figures where there is none.
    Raises: LabError if there is no run or no such baseline.
    """
    return comparison_table(group_settings(runs, show=show), baseline, metrics)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare_runs` for people: recalls in percent as `mean ± std`, verdicts beside them."""
    texts = table[["split", "protocol", "images", "captions", "seeds"]].copy()
    texts["training (s)"] = table["seconds"].round()
    for name in [str(name) for name in table if f"{name}_std" in table]:
        pairs = zip(table[name], table[f"{name}_std"], strict=True)
        texts[name] = [as_text(name, mean, std=std) for mean, std in pairs]
        if f"{name}_verdict" in table:
            texts[f"{name} against {BASELINE}"] = table[f"{name}_verdict"]
    return texts


# --- reports ---


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
        again: measure again what metrics.json holds.
        output_file: a further copy: the page (.html), the metrics (.json) or the table of results (.csv, .md).
    Returns: the page.
    Raises: LabError if output_file has another ending.
    """
    copy = None if output_file is None else choose(COPIES, Path(output_file).suffix, "output_file ending")
    weights = {metrics.get("weights") for metrics in run.metrics.values()}
    if weights and weights != {run.weights}:  # figures of other weights do not stay beside the new ones
        for name in ("figures", "tables"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
    sections: dict[str, list[Section]] = {}
    for split in run.config.test_splits * comprehensive:  # encoded once, for the metrics too
        gallery = open_gallery(run, split, show=show)
        run.metrics[split] = measure_split(run, split, gallery=gallery, again=again)
        measure_scorings(gallery, show=show)
        sections[split] = split_sections(gallery, results_of(run) / "figures", show=show)
    evaluate_run(run, again=again and not comprehensive, show=show)
    results = results_of(run)
    for folder in dict.fromkeys(Path(each).resolve() for each in labelled):
        name = free_name(folder, {*sections, *run.config.test_splits})
        result = measure(run, replace(open_labelled(run, folder, show=show), name=name))
        sections[name] = list(zero_shot_sections([result], results / "figures", name))
    for where, parts in sections.items():
        save_sections(parts, results / "tables", where)
    save_table(metrics_table(run.metrics), results / "tables" / "results")
    page = run_page(run, sections).save(results / "report.html")
    if output_file is not None and copy is not None:
        write_text(output_file, copy(run))
    return page


def report_comparison(
    runs: Sequence[Run], folder: str | Path, baseline: str | None = None, *, show: bool = True
) -> Path:
    """Compare runs and write comparison.csv and .md, figures and report.html into a folder.

    Args: baseline: a setting's label or a run's name that the others are compared with; None: the first.
    Returns: the page.
    """
    settings = group_settings(runs, show=show)
    table = comparison_table(settings, baseline)
    save_table(table, Path(folder) / "comparison")
    page = comparison_page(settings, table, readable(table), Path(folder), baseline)
    return page.save(Path(folder) / "report.html")


def export_run(run: Run, folder: str | Path) -> list[Path]:
    """Write every format that fits the run's model, and a model card that says why others do not.

    `clip/` for transformers' CLIPModel, `text/` for sentence-transformers, `model/` as safetensors with a
    loader of its own. Each is read back, and kept only if its features equal the model's to 1e-5.

    Returns: the card, and the folder of each format written.
    Raises: LabError if the run has no weights.
    """
    folder = make_folder(folder)
    written: list[Path] = []
    notes: list[str] = []
    run.model  # noqa: B018  raises if the run has no weights
    for name in FORMATS:
        try:
            notes.append(f"- `{name}/`: {write_format(run, name, folder / name)}")
            written.append(folder / name)
        except LabError as error:
            notes.append(f"- `{name}/` is left out: {error}")
            print(notes[-1])
    return [write_text(folder / "README.md", model_card(run, notes)), *written]


# --- commands ---


def evaluate_command(folder: str, places: dict[str, Any], **options: Any) -> None:
    """Evaluate a run, print its table, and print the output paths."""
    with evaluation_lock(Path(folder)):
        run = load_run(folder, **places)
        report_run(run, **options)
    print(metrics_table(run.metrics).T.to_string())
    print(f"{results_of(run)}: metrics.json, tables/, figures/, report.html")


def evaluate_weights(
    model_path: str,
    config_path: str | None,
    places: dict[str, Any],
    *,
    comprehensive: bool = False,
    output_file: str | None = None,
) -> None:
    """Evaluate a file of weights that is in no run's folder, and print its table and the output paths.

    Its own folder in `runs_dir` holds a copy, the settings and the results; there is no report without a history.
    """
    copy = None if output_file is None else choose(COPIES, Path(output_file).suffix, "output_file ending")
    path = Path(model_path)
    settings = Path(config_path) if config_path else path.parent / "config.yaml"
    config = load_config(settings).updated(**places)
    folder = config.runs_dir / f"{path.stem}_{file_digest(path)[:6]}"
    config.save(folder / "config.yaml")
    save_tensors(folder / "best.safetensors", load_any_weights(path), {"copy_of": path.name})
    run = load_run(folder)
    measure_run(run)
    for split in config.test_splits * comprehensive:
        gallery = open_gallery(run, split)
        measure_scorings(gallery)
        sections = split_sections(gallery, results_of(run) / "figures")
        save_sections(sections, results_of(run) / "tables", split)
    if output_file is not None and copy is not None:
        write_text(output_file, copy(run))
    print(metrics_table(run.metrics).T.to_string())
    print(f"{results_of(run)}: metrics.json{', tables/, figures/' * comprehensive}")


def compare_command(folders: list[str], folder: str, baseline: str | None, places: dict[str, Any]) -> None:
    """Compare runs, print the table, and print the output paths."""
    report_comparison(open_runs(folders, **places), folder, baseline)
    print(Path(folder, "comparison.md").read_text(encoding="utf-8"))
    print(f"{folder}: comparison.csv, comparison.md, comparison.png, learning_curves.png, report.html")


def search_run(folder: str, text: str, places: dict[str, Any], **options: Any) -> None:
    """Search a run's test images and print the path of the figure."""
    with evaluation_lock(Path(folder)):
        print(search_command(load_run(folder, **places), text, **options))


def export_command(folder: str, output: str | None, places: dict[str, Any]) -> None:
    """Export a run's model, and print the paths of its files."""
    run = load_run(folder, **places)
    for path in export_run(run, Path(output) if output else run.folder / "export"):
        print(path)
