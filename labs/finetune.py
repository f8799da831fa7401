"""Lab 3, what fine-tuning changed: retrieval before and after, what was forgotten, which queries gained and lost.

`python -m labs.finetune runs/NAME [--labelled DIR] [--save_predictions]` writes the tables and figures into the run's
folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from core.errors import LabError
from core.files import csv_text, write_text
from evaluate import open_gallery
from interface.cli import Parser, one_sentence
from metrics import as_text
from models import build_model
from plots.style import Cell, SavePath, image_rows, saved
from reports.gallery import Gallery, encode_split
from reports.zero_shot import DEFAULT_TEMPLATES, ZeroShot, measure, measure_gallery, open_labelled
from retrieval.index import nearest_rows
from retrieval.statistics import bootstrap_intervals, paired_test
from sources.drawing import load_scenes
from sources.scenes import swap_captions
from towers.features import text_features
from towers.image import choose_device
from utils import Run, goodness, load_run, load_start

KS = (1, 5, 10, 20)
DEPTH = 20  # answers of each query that are saved
NORMAL_95 = 1.96
OTHER_DATA = "the two galleries have different images or captions; encode the same split with both."

# --- which weights were kept ---


def mixtures(run: Run) -> pd.DataFrame:
    """`score` on validation, higher is better, by `share` of the trained weights in a mixture with the starting ones.

    Only for share 1 if `interpolate_weights` was off.
    """
    path = run.folder / "interpolation.csv"
    if path.is_file():
        return pd.read_csv(path).set_index("share")
    best = goodness(run.history[run.config.best_metric], run.config.best_metric).max()
    return pd.DataFrame({"score": [best]}, index=pd.Index([1.0], name="share"))


def better_on_validation(first: Run, second: Run) -> Run:
    """The run whose kept weights score higher on validation; the first if they are equal."""
    return max(first, second, key=lambda run: mixtures(run)["score"].max())


# --- word order: a true caption against a false one with the same words ---


def order_margins(gallery: Gallery) -> pd.DataFrame:
    """How much closer each generated image is to its true caption than to the swapped one.

    The swapped caption exchanges left and right (or above and below), or two colors; see
    `sources.scenes.swap_captions`.

    Returns: one row per pair of captions: `image_id`, `kind` ("relation" or "colour"), `margin` (cosine).
    Raises: LabError if the gallery's images are not generated scenes.
    """
    scenes = load_scenes(gallery.dataset.table.root, gallery.split)
    swaps = [
        (item, ident, swap)
        for item, ident in enumerate(gallery.image_id.tolist())
        for swap in swap_captions(scenes[ident])
    ]
    if not swaps:
        raise LabError(f"split {gallery.split!r} has no scene with two objects; choose another.")
    texts = [text for *_, swap in swaps for text in (swap.right, swap.wrong)]
    features = text_features(gallery.run.model, gallery.run.config, texts).view(len(swaps), 2, -1)
    images = gallery.image_features[torch.tensor([item for item, *_ in swaps])]
    margins = (images * (features[:, 0] - features[:, 1])).sum(dim=1)
    columns = {"image_id": [ident for _, ident, _ in swaps], "kind": [swap.kind for *_, swap in swaps]}
    return pd.DataFrame({**columns, "margin": margins.numpy()})


def order_table(margins: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of pairs in [0, 1] whose true caption is closer, chance being 0.5; one row per model and kind.

    The first model is the baseline. Intervals are normal ones over pairs; the difference is paired.

    Args: margins: model -> its `order_margins` of the same images.
    Returns: by model and `kind` the `pairs`, `accuracy` and `difference`, the last two with `_low` and `_high`.
    Raises: LabError if there is no model, or no pair of captions.
    """
    base = next(iter(margins.values()), pd.DataFrame())
    if base.empty:
        raise LabError(
            "there is no pair of captions to compare models on; measure order_margins of each first."
        )
    rows: list[dict[str, Any]] = []
    for name, table in margins.items():
        for kind, part in table.groupby("kind", sort=False):
            right = (part["margin"] > 0).to_numpy(float)
            base_right = (base.loc[base["kind"] == kind, "margin"] > 0).to_numpy(float)
            row = {"model": name, "kind": kind, "pairs": len(part)}
            gain = mean_with_interval("difference", right - base_right)
            rows.append({**row, **mean_with_interval("accuracy", right), **gain})
    return pd.DataFrame(rows).set_index(["model", "kind"])


# --- before and after ---


def starting_run(run: Run) -> Run:
    """The same run as it was before its first step: `start_from`'s weights, or the towers' own.

    Raises: LabError if `start_from` is gone.
    """
    start: Any = dataclasses.replace(run, history=run.history.iloc[:0], metrics={}, training={})
    model = build_model(run.config)
    if run.config.start_from is not None:
        load_start(model, run.config.start_from)
    start.model = model.to(choose_device(run.config)).eval()
    return start


def before_and_after(run: Run, split: str, *, show: bool = True) -> tuple[Gallery, Gallery]:
    """A split encoded by a run's starting weights, and by its best ones."""
    after = open_gallery(run, split, show=show)
    return encode_split(starting_run(run), after.dataset, show=show), after


def changes(before: Gallery, after: Gallery, ks: Sequence[int] = KS) -> pd.DataFrame:
    """Recall@K, mAP and NDCG both ways, in [0, 1], with 95 % intervals and the paired test; one row per figure.

    A K over the gallery's size is left out. Intervals and test are over test images; variation between training seeds
    is not included.

    Returns: `before`, `after` and `difference`, each with its `_low` and `_high`, and `p_value`.
    Raises: LabError if the two have different images or captions.
    """
    ks = [k for k in ks if k <= len(before.image_id)]
    kinds = [*(f"recall@{k}" for k in ks), "map", f"ndcg@{ks[-1]}"]
    names = [f"{way}_{kind}" for way in ("i2t", "t2i") for kind in kinds]
    sides = {"before": before, "after": after}
    intervals = {side: bootstrap_intervals(gallery.ranks, names) for side, gallery in sides.items()}
    rows = []
    for name in names:
        test = paired_test(after.ranks, before.ranks, name)
        row = {"figure": name}
        for side in sides:
            interval = intervals[side][name]
            row |= _with_ends(side, interval.value, interval.low, interval.high)
        row |= _with_ends("difference", test.difference, test.low, test.high)
        rows.append({**row, "p_value": test.p_value})
    return pd.DataFrame(rows).set_index("figure")


def _with_ends(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def mean_with_interval(name: str, values: np.ndarray) -> dict[str, Any]:
    """The mean of (N,) values under `name`, and its normal 95 % interval."""
    mean, reach = float(values.mean()), NORMAL_95 * values.std(ddof=1) / len(values) ** 0.5
    return _with_ends(name, mean, mean - reach, mean + reach)


def in_percent(table: pd.DataFrame) -> pd.DataFrame:
    """A table of figures and their `_low` and `_high` ends for people: `23.4 [21.0, 25.9]`."""
    texts: dict[str, list[Any]] = {}
    for column in map(str, table):
        if f"{column}_low" in table:
            ends = table[[f"{column}_low", f"{column}_high"]].to_numpy()
            sign = "+" if column == "difference" else ""
            pairs = zip(table[column], ends, strict=True)
            texts[f"{column} (%)"] = [as_text("%", value, tuple(both), sign=sign) for value, both in pairs]
        elif not column.endswith(("_low", "_high")):
            texts[column] = table[column].round(4).tolist()
    return pd.DataFrame(texts, index=table.index)


# --- what was forgotten ---


def forgetting(before: Sequence[ZeroShot], after: Sequence[ZeroShot]) -> pd.DataFrame:
    """Zero-shot top-1 accuracy in [0, 1] on the same labelled sets before and after; one row per set.

    Intervals are normal ones over images; the difference is paired.

    Raises: LabError if there is no set, or the sets differ.
    """
    if not before:
        raise LabError(
            "there are no labelled images to measure forgetting on; name folders of labelled images."
        )
    if [(one.name, len(one.correct)) for one in before] != [(one.name, len(one.correct)) for one in after]:
        raise LabError(
            "forgetting compares the same labelled sets before and after; measure both on the same."
        )
    rows = []
    for one, other in zip(before, after, strict=True):
        old, new = one.correct.astype(float), other.correct.astype(float)
        row: dict[str, Any] = {"set": one.name}
        for name, values in {"before": old, "after": new, "difference": new - old}.items():
            row |= mean_with_interval(name, values)
        rows.append({**row, **{name: one.summary[name] for name in ("chance", "images", "labels")}})
    return pd.DataFrame(rows).set_index("set")


def zero_shots(
    gallery: Gallery, folders: Sequence[str | Path] = (), templates: Sequence[str] = DEFAULT_TEMPLATES
) -> list[ZeroShot]:
    """A gallery's own labels, and those of other folders of labelled images, classified by its run."""
    run = gallery.run
    others = [measure(run, open_labelled(run, folder), templates) for folder in folders]
    return [*measure_gallery(gallery, templates), *others]


# --- every query ---


def rankings(gallery: Gallery, k: int = DEPTH) -> pd.DataFrame:
    """The k nearest answers of every query, both ways; one row per answer.

    Returns: `direction`, `query_id` (its image's id), `query`, `place` from 1, `answer_id`, `answer`,
        `score` (cosine), `correct`.
    """
    table, rows = gallery.dataset.table, gallery.dataset.rows.tolist()
    images = (gallery.image_features, gallery.image_id, [table.paths[row] for row in rows])
    texts = (gallery.text_features, gallery.text_id, gallery.captions)
    directions = {"i2t": (images, texts), "t2i": (texts, images)}
    return pd.concat([_answers(name, *sides, k) for name, sides in directions.items()], ignore_index=True)


def _answers(direction: str, queries: tuple[Any, ...], answers: tuple[Any, ...], k: int) -> pd.DataFrame:
    """Args: queries, answers: features, ids and names of each."""
    (features, query_ids, queries_named), (gallery, ids, names) = queries, answers
    scores, rows = nearest_rows(features, gallery, min(k, len(ids)))  # (Q, k)
    k = rows.shape[1]
    columns = {
        "direction": direction,
        "query_id": np.repeat(query_ids.numpy(), k),
        "query": np.repeat(np.array(queries_named, dtype=object), k),
        "place": np.tile(np.arange(1, k + 1), len(rows)),
        "answer_id": ids[rows].numpy().reshape(-1),
        "answer": np.array(names, dtype=object)[rows.numpy().reshape(-1)],
        "score": scores.numpy().reshape(-1).round(5),
    }
    return pd.DataFrame(columns).assign(correct=columns["answer_id"] == columns["query_id"])


def save_rankings(gallery: Gallery, path: str | Path, k: int = DEPTH) -> Path:
    """Write `rankings` as CSV."""
    return write_text(path, csv_text(rankings(gallery, k), index=False))


# --- which queries gained and lost ---


def changed_queries(before: Gallery, after: Gallery, n: int = 3) -> dict[str, pd.DataFrame]:
    """The text queries that gained and lost most, by the reciprocal rank of their own image.

    Returns: "improved" and "worse", each up to n rows: `row` of the text, `query`, `before` and `after`, the
        ranks of its image, 1 is nearest.
    Raises: LabError if the two have different images or captions.
    """
    if before.fingerprint != after.fingerprint:
        raise LabError(OTHER_DATA)
    old, new = before.ranks.t2i, after.ranks.t2i
    queries = [before.captions[row] for row in old.rows]
    table = pd.DataFrame({"row": old.rows, "query": queries, "before": old.best, "after": new.best})
    gain = 1 / table["after"] - 1 / table["before"]
    order = gain.sort_values(kind="stable").index
    rows = {"improved": [i for i in order[::-1] if gain[i] > 0], "worse": [i for i in order if gain[i] < 0]}
    return {name: table.loc[some[:n]].reset_index(drop=True) for name, some in rows.items()}


def change_grid(
    before: Gallery, after: Gallery, queries: pd.DataFrame, path: SavePath = None, k: int = 5, title: str = ""
) -> Figure:
    """For each query of `changed_queries` the images that it found before and after, its own marked.

    Raises: LabError if there is no query.
    """
    if not len(queries):
        raise LabError("no query changed in this direction; there is nothing to draw.")
    rows = []
    for query in queries.to_dict("records"):
        for name, gallery in (("before", before), ("after", after)):
            heading = f"“{query['query']}”   {name}: its image at rank {query[name]}"
            rows.append((heading, _nearest_images(gallery, query["row"], k)))
    return saved(image_rows(rows, title), path)


def _nearest_images(gallery: Gallery, row: int, k: int) -> list[Cell]:
    scores = gallery.image_features @ gallery.text_features[row]  # (I,)
    best, items = scores.topk(min(k, len(scores)))
    correct = (gallery.image_id[items] == gallery.text_id[row]).tolist()
    texts = [f"{rank}  ·  {score:.3f}" for rank, score in enumerate(best.tolist(), start=1)]
    files = gallery.dataset.image_files(items.tolist())
    return [Cell(*parts) for parts in zip(files, texts, correct, strict=True)]


# --- the command ---


def report_changes(
    run: Run, split: str, labelled: Sequence[str | Path] = (), *, save_predictions: bool = False
) -> tuple[pd.DataFrame, Path]:
    """Write `changes`, `forgetting` and the figures of a split into the run's folder.

    Args:
        labelled: folders of labelled images to measure forgetting on, beside the split's own labels.
        save_predictions: also the ranking of every query.
    Returns: the table of changes, and the folder.
    """
    folder = run.folder / f"before_after_{split}"
    before, after = before_and_after(run, split)
    table = changes(before, after)
    write_text(folder / "changes.csv", csv_text(table))
    shots = [zero_shots(gallery, labelled) for gallery in (before, after)]
    if shots[0]:
        write_text(folder / "forgetting.csv", csv_text(forgetting(*shots)))
    for name, queries in changed_queries(before, after).items():
        if len(queries):
            change_grid(before, after, queries, folder / f"{name}.png", title=f"Queries that {name}")
    if save_predictions:
        save_rankings(before, folder / "predictions_before.csv")
        save_rankings(after, folder / "predictions_after.csv")
    return table, folder


def main() -> None:
    """Report a run's changes from a shell."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--split", help="(default: the run's first test split)")
    parser.add_argument(
        "--labelled", nargs="*", default=[], metavar="DIR", help="class folders or CIFAR files"
    )
    parser.add_argument(
        "--save_predictions", action="store_true", help="also the ranking of every query, as CSV"
    )
    given = parser.parse_args()
    with one_sentence():
        run = load_run(given.run)
        split = given.split or run.test_split
        table, folder = report_changes(run, split, given.labelled, save_predictions=given.save_predictions)
    print(in_percent(table).to_string())
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
