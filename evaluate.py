"""A split encoded by a finished run's model: exact ranks, protocol, figures; a run measured once on its test splits."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from interface import cli

    cli.evaluate()
    raise SystemExit

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from core.errors import LabError, choose
from core.files import csv_text, fingerprint, make_folder, write_json, write_text
from metrics import chance, figures_of, is_recall, metrics_table, recalls_of
from plots.figures import learning_curves, recall_bars
from reports.compare import (
    BASELINE,
    OTHER_GALLERY,
    TOO_FEW,
    WORDS,
    Setting,
    _baseline,
    _mean_and_spread,
    differing_fields,
    judged_figures,
    opened,
    settings_label,
    verdict_of,
)
from reports.export import FORMATS, _largest, model_card
from reports.gallery import (
    Gallery,
    data_digest,
    kept_features,
    known_gallery,
    load_or_encode,
    open_split,
    results_folder,
    results_of,
)
from reports.report import (
    Page,
    _comparison_figures,
    _runs_table,
    _save_tables,
    free_name,
    markdown_table,
    run_page,
    save_table,
    without_constants,
)
from reports.search import GallerySearch, check_captioned, file_name, found_table, search_grid
from reports.sections import Exhibit, examine, zero_shot_exhibits
from reports.zero_shot import DEFAULT_TEMPLATES, Labelled, known_labels, measure, open_labelled
from retrieval.ranks import Ranks, match_ranks
from retrieval.statistics import MIN_SEEDS, PairedTest, compare_settings, paired_test
from training.checkpoints import evaluation_lock, read_metrics
from utils import Run, load_run


def open_gallery(run: Run, split: str, *, show: bool = True) -> Gallery:
    """A split encoded by a run's best model; features that are kept in the run's folder are read.

    Raises: LabError if the split does not exist or the run has no weights yet.
    """
    return load_or_encode(run, open_split(run, split, show=show), show=show)


def evaluate_run(run: Run, *, again: bool = False, show: bool = True) -> dict[str, dict[str, Any]]:
    """Metrics of a run's test splits, and their figures.

    They are kept in metrics.json, and measured again where the weights, the data or recall_ks are others now.
    Figures of other data than the run's own go into a folder of their own, see `results_folder`.

    Args:
        again: measure again in any case.
    Returns: split -> metrics; recalls in [0, 1].
    Raises: LabError if a test split does not exist, or data_dir was named and does not exist.
    """
    measured(run, again=again, show=show)
    figures = results_of(run) / "figures"
    learning_curves({run.name: run.history}, figures / "learning_curves.png", best_epoch=run.best_epoch)
    for split in run.config.test_splits:
        found = run.metrics[split]
        if recalls_of(found):
            recall_bars(found, figures / f"recall_{split}.png", chance=chance(found))
    return run.metrics


def measured(run: Run, *, again: bool = False, show: bool = True) -> dict[str, dict[str, Any]]:
    """`evaluate_run` without figures."""
    found = {split: measured_split(run, split, again=again, show=show) for split in run.config.test_splits}
    run.metrics = found
    return found


def measured_split(
    run: Run, split: str, *, gallery: Gallery | None = None, again: bool = False, show: bool = True
) -> dict[str, Any]:
    """One split's metrics under the run's weights, on the data as they are now.

    Args: gallery: the split, where it is encoded already.
    """
    kept = run.metrics.get(split, {})
    try:
        dataset = open_split(run, split, show=show) if gallery is None else gallery.dataset
    except LabError:
        if not run.own_data or run.config.data_dir.exists() or kept.get("weights") != run.weights:
            raise
        print(
            f"{run.config.data_dir} is gone: split {split!r} of {run.name} is shown as it was measured there."
        )
        return kept
    digest = data_digest(dataset)
    if run.results is None:
        run.results = results_folder(run, known_gallery(run, split), digest)
    if run.results != run.folder:
        kept = read_metrics(run.results / "metrics.json").get(split, {})
    same = (kept.get("weights"), kept.get("gallery")) == (run.weights, digest)
    if again or not same or kept.get("recall_ks") != list(run.config.recall_ks):
        return keep_measured(gallery or load_or_encode(run, dataset, again=again, show=show))
    return kept


def keep_measured(gallery: Gallery) -> dict[str, Any]:
    """Measure a gallery and write its figures into metrics.json in its run's results.

    Figures of other weights in that file are dropped.
    """
    run = gallery.run
    run.results = run.results or results_folder(run, known_gallery(run, gallery.split), gallery.fingerprint)
    path = run.results / "metrics.json"
    found = {**gallery.metrics(), "weights": run.weights}
    others = {
        name: of for name, of in read_metrics(path, show=False).items() if of.get("weights") == run.weights
    }
    write_json(path, {**others, gallery.split: found}, seal=True)
    run.metrics[gallery.split] = found
    return found


def ranks_of(run: Run, split: str, *, show: bool = True) -> Ranks:
    """The ranks behind a split's metrics, from its kept features; encoded again only where these are missing."""
    metrics = run.metrics.get(split, {})
    features = kept_features(run, split, metrics.get("weights", ""), metrics.get("gallery", ""))
    return open_gallery(run, split, show=show).ranks if features is None else match_ranks(**features)


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
    found = measure(gallery.run, labelled, templates).summary
    return {name: found[name] for name in ("top1", "top5", "chance", "pictures", "labels")}


# --- search ---


def open_search(run: Run, split: str | None = None, *, show: bool = True) -> GallerySearch:
    """A split of a run, ready to be searched. Args: split: None: the first test split."""
    dataset = open_split(run, split or run.test_split, show=show)
    check_captioned(dataset)
    return GallerySearch(load_or_encode(run, dataset, show=show))


def search_command(
    run: Run | str | Path,
    text: str = "",
    image: str | Path | None = None,
    minus: str = "",
    k: int = 10,
    folder: str | Path | None = None,
) -> Path:
    """Search a run's first test split and write the grid as PNG, and beside it the table as CSV.

    Args:
        text, image: what is wanted; both together are added.
        minus: what is not wanted.
        folder: None: `search/` in the run's folder.
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
    search = open_search(run)
    if len(terms) > 1:
        found = search.combined(terms, k)
    else:
        found = (search.by_text([text], k) if image is None else search.by_picture([Path(image)], k))[0]
    folder = results_of(run) / "search" if folder is None else Path(folder)
    path = folder / f"{file_name(found.query)}.png"
    search_grid([found], path, f"{run.name}, {search.gallery.split}: {len(search.images):,} pictures")
    write_text(path.with_suffix(".csv"), csv_text(found_table([found]), index=False))
    return path


def finished_runs(runs_dir: str | Path, preset: str | None = None) -> list[Run]:
    """Every finished run of a preset, or of all, by name."""
    folders = sorted(path.parent for path in Path(runs_dir).glob("*/training.json"))
    runs = [run for folder in folders if (run := opened(folder, load_run)) is not None]
    return [run for run in runs if run.finished and preset in (None, run.config.preset)]


def group_settings(runs: Sequence[Run], *, show: bool = True) -> list[Setting]:
    """Runs that differ in nothing but the seed, together, in the order given; evaluated where they are not yet.

    A run that cannot be evaluated is left out, which is said.
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
            found = measured(run, show=show)[run.test_split]
        except LabError as error:
            if run is runs[-1] and not groups:
                raise
            print(f"{run.name} is left out: {error}")
            continue
        label = ", ".join([label, *run.training.get("own", {}).values()])
        about = run.training.get("data", {}).get("train", {})
        trained = fingerprint([about.get("sha256", ""), about.get("form", "")])
        groups.setdefault((label, found["gallery"], trained), []).append(run)
    twice = Counter(label for label, *_ in groups)
    return [
        _setting(
            label if twice[label] == 1 else f"{label}, on {gallery[:6]}, from {trained[:6]}", group, gallery
        )
        for (label, gallery, trained), group in groups.items()
    ]


def _setting(label: str, runs: list[Run], gallery: str) -> Setting:
    figures = [figures_of(run.metrics[run.test_split]) for run in runs]
    return Setting(label, runs, pd.DataFrame(figures, index=[run.name for run in runs]), gallery)


def compare_runs(
    runs: Sequence[Run],
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    *,
    show: bool = True,
) -> pd.DataFrame:
    """One row a setting: protocol, seeds, mean and standard deviation of its figures, and verdicts.

    Figures are of the first test split, recalls in [0, 1]; `_std` over seeds is nan for a single one. Each of
    `metrics` has a column `_verdict` against the baseline: `higher`, `lower` or `no significant difference` where both
    have three seeds or more (Welch's interval of the difference of means); for two single runs on one gallery the
    paired test, marked `test sample only`: it says nothing about variation between seeds; else `too few seeds`.

    Args:
        baseline: a setting's label or a run's name; None: the first.
        metrics: figures to judge; None: Recall@1 both ways, or the first two figures where there is none.
    Raises: LabError if there is no run or no such baseline.
    """
    return comparison_table(group_settings(runs, show=show), baseline, metrics)


def comparison_table(
    settings: Sequence[Setting], baseline: str | None = None, metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """`compare_runs` of runs that are grouped already."""
    base = _baseline(settings, baseline)
    judged = metrics or judged_figures(settings)
    rows = []
    for setting in settings:
        spread = setting.figures.std().add_suffix("_std")
        verdicts = {f"{name}_verdict": verdict(setting, base, name) for name in judged}
        means = setting.figures.mean()
        rows.append({"run": setting.label, **setting.about, **means, **spread, **verdicts})
    return pd.DataFrame(rows).set_index("run")


def verdict(setting: Setting, base: Setting, metric: str) -> str:
    """What may be said of a figure of a setting against the baseline's; see `compare_runs`."""
    if setting is base:
        return BASELINE
    if setting.gallery != base.gallery:
        return OTHER_GALLERY
    if metric not in setting.figures or metric not in base.figures:
        return f"not compared: {metric} is not known of both"
    counts = {len(setting.runs), len(base.runs)}
    if min(counts) >= MIN_SEEDS:
        found = compare_settings(setting.figures[metric].tolist(), base.figures[metric].tolist())
        return WORDS[found.difference > 0 if found.is_difference else None]
    if counts == {1} and is_recall(metric):
        return verdict_of(paired_test_of(setting.runs[0], base.runs[0], metric))
    return TOO_FEW


def paired_test_of(first: Run, second: Run, metric: str = "i2t_recall@1") -> PairedTest:
    """The paired test of two runs on their first test split, from the ranks they kept; nothing is encoded again.

    Raises: LabError if they were measured on different galleries.
    """
    splits = [run.test_split for run in (first, second)]
    galleries = [run.metrics[split]["gallery"] for run, split in zip((first, second), splits, strict=True)]
    if galleries[0] != galleries[1]:
        raise LabError(
            f"{first.name} and {second.name} were measured on different galleries; evaluate both on the same data."
        )
    return paired_test(ranks_of(first, splits[0]), ranks_of(second, splits[1]), metric)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare_runs` for people: recalls in percent as `mean ± std`, verdicts beside them."""
    shown = table[["split", "protocol", "images", "captions", "seeds"]].copy()
    shown["training (s)"] = table["seconds"].round()
    for name in [str(name) for name in table if f"{name}_std" in table]:
        shown[name] = [_mean_and_spread(row, name) for _, row in table.iterrows()]
        if f"{name}_verdict" in table:
            shown[f"{name} against {BASELINE}"] = table[f"{name}_verdict"]
    return shown


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
        found = measure(run, replace(open_labelled(run, folder, show=show), name=name))
        exhibits[found.name] = list(zero_shot_exhibits([found], figures, found.name))
    for where, shown in exhibits.items():
        _save_tables(shown, results / "tables", where)
    page = run_page(run, exhibits)
    save_table(metrics_table(run.metrics), results / "tables" / "results")
    saved = page.save(results / "report.html")
    if output_file is not None and write_copy is not None:
        write_copy(run, Path(output_file))
    return saved


def _examined(run: Run, split: str, again: bool, show: bool) -> list[Exhibit]:
    """A split's exhibits, from one encoding of it that also measures it where that is due."""
    gallery = open_gallery(run, split, show=show)
    run.metrics[split] = measured_split(run, split, gallery=gallery, again=again)
    return examine(gallery, results_of(run) / "figures", show=show)


COPIES: Mapping[str, Callable[[Run, Path], Any]] = {
    ".html": lambda run, path: write_text(
        path, (results_of(run) / "report.html").read_text(encoding="utf-8")
    ),
    ".json": lambda run, path: write_json(path, run.metrics),
    ".csv": lambda run, path: write_text(path, csv_text(metrics_table(run.metrics))),
    ".md": lambda run, path: write_text(path, markdown_table(metrics_table(run.metrics))),
}


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
        "A setting is called higher or lower only if both have at least three seeds and Welch's 95 % interval of "
        "the difference excludes zero. Two single runs are compared by a paired test over the test images, marked "
        "test sample only: variation between training seeds is not included."
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


def export_run(run: Run, folder: str | Path) -> list[Path]:
    """Write every format that fits the run's model, and a model card that says why others do not.

    `clip/` for transformers' CLIPModel, `text/` for sentence-transformers, `model/` as safetensors with a
    loader of its own. Each is read back, and kept only if it gives the model's features to 1e-5.

    Returns: the card, and the folder of each format written.
    Raises: LabError if the run has no weights.
    """
    folder = make_folder(folder)
    written: list[Path] = []
    notes: list[str] = []
    run.model  # noqa: B018  a run without weights is no matter of formats
    for name, (write, what) in FORMATS.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        try:
            difference = _largest(write(run, folder / name), folder / name)
        except LabError as error:
            shutil.rmtree(folder / name, ignore_errors=True)
            notes.append(f"- `{name}/` is left out: {error}")
            print(notes[-1])
        else:
            written.append(folder / name)
            notes.append(f"- `{name}/`: {what} Largest difference from the run's features: {difference:.0e}.")
    card = folder / "README.md"
    write_text(card, model_card(run, notes))
    return [card, *written]


def evaluate_command(folder: str, places: dict[str, Any], **options: Any) -> None:
    """Evaluate a run, print its table, and print the output paths."""
    with evaluation_lock(Path(folder)):
        run = load_run(folder, **places)
        report_run(run, **options)
    print(metrics_table(run.metrics).T.to_string())
    print(f"{results_of(run)}: metrics.json, tables/, figures/, report.html")


def compare_command(folders: list[str], folder: str, baseline: str | None, places: dict[str, Any]) -> None:
    """Compare runs, print the table, and print the output paths."""
    runs = open_runs(folders, partial(load_run, **places))
    report_comparison(runs, folder, baseline)
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
