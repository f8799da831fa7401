"""What fine-tuning changed: retrieval before and after, what was forgotten, which queries gained and lost.

`python -m labs.finetune runs/NAME [--labelled DIR] [--save_predictions]` writes the tables and grids
into the run's folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.devices import get_device

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from core.errors import LabError
from core.files import csv_text, write_text
from evaluate import open_gallery
from interface.cli import Parser, one_sentence
from models import build_model
from plots.style import Cell, SavePath, image_rows, saved
from reports.gallery import Gallery, encode_split
from reports.zero_shot import DEFAULT_TEMPLATES, ZeroShot, measure, measure_gallery, open_labelled
from retrieval.index import build_index
from retrieval.statistics import bootstrap_intervals, paired_test
from sources.drawing import load_scenes
from sources.scenes import swap_captions
from towers.features import text_features
from utils import Run, goodness, load_run, load_start

# --- Which weights were kept ---


def mixtures(run: Run) -> pd.DataFrame:
    """`score` on validation, more is better, by `share` of the trained weights in a mixture with the starting ones;
    of the trained weights alone where `interpolate_weights` was off."""
    path = run.folder / "interpolation.csv"
    if path.is_file():
        return pd.read_csv(path).set_index("share")
    best = goodness(run.history[run.config.best_metric], run.config.best_metric).max()
    return pd.DataFrame({"score": [best]}, index=pd.Index([1.0], name="share"))


def better_on_validation(first: Run, second: Run) -> Run:
    """The one of two runs whose kept weights validate better; of equals the first."""
    return max(first, second, key=lambda run: mixtures(run)["score"].max())


# --- The order of words: a true caption against a false one of the same words ---


def order_margins(gallery: Gallery) -> pd.DataFrame:
    """How much nearer each generated picture is to its true caption than to the exchanged one.

    Left and right (or above and below) are turned round in one, two colours exchanged in the other; see
    `scene_plan.swap_captions`.

    Returns: one row per pair of captions: `image_id`, `kind` ("relation" or "colour"), `margin` (cosine).
    Raises: LabError if the gallery's pictures are not generated scenes.
    """
    scenes = load_scenes(gallery.dataset.table.root, gallery.split)
    found = [
        (item, ident, swap)
        for item, ident in enumerate(gallery.image_id.tolist())
        for swap in swap_captions(scenes[ident])
    ]
    if not found:
        raise LabError(f"split {gallery.split!r} has no scene of two objects; choose another.")
    texts = [text for *_, swap in found for text in (swap.right, swap.wrong)]
    right, wrong = (
        text_features(gallery.run.model, gallery.run.config, texts).view(len(found), 2, -1).unbind(1)
    )
    images = gallery.image_features[torch.tensor([item for item, *_ in found])]
    margins = (images * (right - wrong)).sum(dim=1)
    columns = {"image_id": [ident for _, ident, _ in found], "kind": [swap.kind for *_, swap in found]}
    return pd.DataFrame({**columns, "margin": margins.numpy()})


def order_table(margins: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of pairs in [0, 1] whose true caption is nearer, chance being 0.5, of several models; a row each.

    The first one is the baseline. Intervals are the normal ones over pairs; the difference is paired.

    Args: margins: model -> its `order_margins` of the same pictures.
    Returns: by model and `kind` the `pairs`, `accuracy` and `difference`, these with their `_low` and `_high`.
    Raises: LabError if there is no model, or no pair of captions.
    """
    base = next(iter(margins.values()), pd.DataFrame())
    if base.empty:
        raise LabError(
            "there is no pair of captions to compare models on; measure order_margins of each first."
        )
    rows: list[dict[str, Any]] = []
    for name, found in margins.items():
        for kind, part in found.groupby("kind", sort=False):
            right = (part["margin"] > 0).to_numpy(float)
            base_right = (base.loc[base["kind"] == kind, "margin"] > 0).to_numpy(float)
            row = {"model": name, "kind": kind, "pairs": len(part)}
            gain = mean_with_ends("difference", right - base_right)
            rows.append({**row, **mean_with_ends("accuracy", right), **gain})
    return pd.DataFrame(rows).set_index(["model", "kind"])


# --- Before and after ---


KS = (1, 5, 10, 20)
DEPTH = 20  # answers of each query that are written down
NORMAL_95 = 1.96


def starting_run(run: Run) -> Run:
    """The same run as it was before its first step: `start_from`'s weights, or the towers' own.

    Raises: LabError if `start_from` is gone.
    """
    start: Any = dataclasses.replace(run, history=run.history.iloc[:0], metrics={}, training={})
    model = build_model(run.config)
    if run.config.start_from is not None:
        load_start(model, run.config.start_from)
    start.model = model.to(get_device(run.config.device)).eval()
    return start


def before_and_after(run: Run, split: str, *, show: bool = True) -> tuple[Gallery, Gallery]:
    """A split encoded by a run's starting weights, and by its best ones."""
    after = open_gallery(run, split, show=show)
    return encode_split(starting_run(run), after.dataset, show=show), after


# --- retrieval ---


def changes(before: Gallery, after: Gallery, ks: Sequence[int] = KS) -> pd.DataFrame:
    """Recall@K, mAP and NDCG both ways, in [0, 1], with 95 % intervals and the paired test; one row per figure.

    A K over the gallery's size is left out. Intervals and test are over test images alone; another seed's
    training is not in them.

    Returns: `before`, `after` and `difference`, each with its `_low` and `_high`, and `p_value`.
    Raises: LabError if the two are not of the same images and captions.
    """
    ks = [k for k in ks if k <= len(before.image_id)]
    kinds = [*(f"recall@{k}" for k in ks), "map", f"ndcg@{ks[-1]}"]
    names = [f"{way}_{kind}" for way in ("i2t", "t2i") for kind in kinds]
    rows = []
    intervals = [bootstrap_intervals(gallery.ranks, names) for gallery in (before, after)]
    for name in names:
        test = paired_test(after.ranks, before.ranks, name)
        row = {"figure": name}
        for side, found in zip(("before", "after"), intervals, strict=True):
            row |= _with_ends(side, found[name].value, found[name].low, found[name].high)
        row |= _with_ends("difference", test.difference, test.low, test.high)
        rows.append({**row, "p_value": test.p_value})
    return pd.DataFrame(rows).set_index("figure")


def _with_ends(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def mean_with_ends(name: str, values: np.ndarray) -> dict[str, Any]:
    """The mean of (N,) values under `name`, and its normal 95 % interval."""
    reach = NORMAL_95 * values.std(ddof=1) / len(values) ** 0.5
    return _with_ends(name, float(values.mean()), float(values.mean() - reach), float(values.mean() + reach))


def in_percent(table: pd.DataFrame) -> pd.DataFrame:
    """A table of figures and their `_low` and `_high` ends, to read: `23.4 [21.0, 25.9]`."""
    shown: dict[str, list[Any]] = {}
    for column in map(str, table):
        if f"{column}_low" in table:
            ends = table[[column, f"{column}_low", f"{column}_high"]].to_numpy() * 100
            sign = "+" if column == "difference" else ""
            shown[f"{column} (%)"] = [f"{v:{sign}.1f} [{low:.1f}, {high:.1f}]" for v, low, high in ends]
        elif not column.endswith(("_low", "_high")):
            shown[column] = table[column].round(4).tolist()
    return pd.DataFrame(shown, index=table.index)


# --- what was forgotten ---


def forgetting(before: Sequence[ZeroShot], after: Sequence[ZeroShot]) -> pd.DataFrame:
    """Zero-shot top-1 accuracy in [0, 1] of the same labelled sets before and after; one row per set.

    Intervals are the normal ones over pictures; the difference is paired.

    Raises: LabError if there is no set, or the sets differ.
    """
    if not before:
        raise LabError("no labelled picture to look for forgetting on; name folders of labelled pictures.")
    if [(one.name, len(one.correct)) for one in before] != [(one.name, len(one.correct)) for one in after]:
        raise LabError(
            "forgetting compares the same labelled sets before and after; measure both on the same."
        )
    rows = []
    for one, other in zip(before, after, strict=True):
        old, new = one.correct.astype(float), other.correct.astype(float)
        sides = {"before": old, "after": new, "difference": new - old}
        row: dict[str, Any] = {"set": one.name}
        for name, values in sides.items():
            row |= mean_with_ends(name, values)
        rows.append({**row, **{name: one.summary[name] for name in ("chance", "pictures", "labels")}})
    return pd.DataFrame(rows).set_index("set")


def zero_shots(
    gallery: Gallery, folders: Sequence[str | Path] = (), templates: Sequence[str] = DEFAULT_TEMPLATES
) -> list[ZeroShot]:
    """A gallery's own labels, and those of other folders of labelled pictures, classified by its run."""
    run = gallery.run
    return [
        *measure_gallery(gallery, templates),
        *(measure(run, open_labelled(run, folder), templates) for folder in folders),
    ]


# --- every query ---


def rankings(gallery: Gallery, k: int = DEPTH) -> pd.DataFrame:
    """The k nearest answers of every query, both ways; a row an answer.

    Returns: `direction`, `query_id` (its image's id), `query`, `place` from 1, `answer_id`, `answer`,
        `score` (cosine), `correct`.
    """
    texts = {"ids": gallery.text_id, "features": gallery.text_features, "names": captions_in(gallery)}
    images = {"ids": gallery.image_id, "features": gallery.image_features, "names": _files(gallery)}
    ways = {"i2t": (images, texts), "t2i": (texts, images)}
    return pd.concat([_answers(way, *sides, k) for way, sides in ways.items()], ignore_index=True)


def _answers(direction: str, queries: dict[str, Any], answers: dict[str, Any], k: int) -> pd.DataFrame:
    k = min(k, len(answers["ids"]))
    index = build_index(answers["features"], answers["ids"], kind="exact")
    hits = index.query(queries["features"], k)
    query_id = np.repeat(queries["ids"].numpy(), k)
    columns = {
        "direction": direction,
        "query_id": query_id,
        "query": np.repeat(queries["names"], k),
        "place": np.tile(np.arange(1, k + 1), len(queries["ids"])),
        "answer_id": hits.ids.numpy().reshape(-1),
        "answer": answers["names"][hits.rows.numpy().reshape(-1)],
        "score": hits.scores.numpy().reshape(-1).round(5),
    }
    return pd.DataFrame(columns).assign(correct=columns["answer_id"] == query_id)


def save_rankings(gallery: Gallery, path: str | Path, k: int = DEPTH) -> Path:
    """Write `rankings` as CSV, whole or not at all."""
    write_text(path, csv_text(rankings(gallery, k), index=False))
    return Path(path)


def captions_in(gallery: Gallery) -> np.ndarray:
    """(T,) the gallery's captions, in the order of its text features."""
    dataset = gallery.dataset
    rows = dataset.caption_rows(dataset.rows)
    return np.array([dataset.table.captions[row] for row in rows.tolist()], dtype=object)


def _files(gallery: Gallery) -> np.ndarray:
    dataset = gallery.dataset
    return np.array([dataset.table.paths[row] for row in dataset.rows.tolist()], dtype=object)


# --- which queries gained and lost ---


def changed_queries(before: Gallery, after: Gallery, n: int = 3) -> dict[str, pd.DataFrame]:
    """The text queries that gained and lost most, by the reciprocal rank of their own picture.

    Returns: "improved" and "worse", each up to n rows: `row` of the text, `query`, `before` and `after`, the
        ranks of its picture, 1 is nearest.
    Raises: LabError if the two are not of the same images and captions.
    """
    if before.fingerprint != after.fingerprint:
        raise LabError("the two galleries are not of the same images and captions; encode one split by both.")
    old, new = before.ranks.t2i, after.ranks.t2i
    table = pd.DataFrame({"row": old.rows, "before": old.best, "after": new.best})
    table.insert(1, "query", captions_in(before)[old.rows])
    gain = 1 / table["after"] - 1 / table["before"]
    order = gain.sort_values(kind="stable").index
    kept = {"improved": [i for i in order[::-1] if gain[i] > 0], "worse": [i for i in order if gain[i] < 0]}
    return {name: table.loc[rows[:n]].reset_index(drop=True) for name, rows in kept.items()}


def change_grid(
    before: Gallery, after: Gallery, queries: pd.DataFrame, path: SavePath = None, k: int = 5, title: str = ""
) -> Figure:
    """For each query of `changed_queries` the pictures it found before and after, its own marked.

    Raises: LabError if there is no query.
    """
    if not len(queries):
        raise LabError("no query changed in this direction; there is nothing to draw.")
    rows = []
    for query in queries.to_dict("records"):
        for name, gallery in (("before", before), ("after", after)):
            heading = f"“{query['query']}”   {name}: its picture at place {query[name]}"
            rows.append((heading, _found(gallery, query["row"], k)))
    return saved(image_rows(rows, title), path)


def _found(gallery: Gallery, row: int, k: int) -> list[Cell]:
    scores = gallery.image_features @ gallery.text_features[row]  # (I,)
    best, items = scores.topk(min(k, len(scores)))
    right = (gallery.image_id[items] == gallery.text_id[row]).tolist()
    texts = [f"{place}  ·  {score:.3f}" for place, score in enumerate(best.tolist(), start=1)]
    pictures = gallery.dataset.image_files(items.tolist())
    return [Cell(*parts) for parts in zip(pictures, texts, right, strict=True)]


# --- all of it ---


def report_changes(
    run: Run, split: str, labelled: Sequence[str | Path] = (), *, save_predictions: bool = False
) -> tuple[pd.DataFrame, Path]:
    """Write `changes`, `forgetting` and the grids of a split into the run's folder.

    Args:
        labelled: folders of labelled pictures to look for forgetting on, beside the split's own labels.
        save_predictions: every query's ranking too.
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
    parser.add_argument("run", metavar="RUN", help="a finished run's folder")
    parser.add_argument("--split", help="none: the run's first test split")
    parser.add_argument("--labelled", nargs="*", default=[], metavar="DIR", help="class folders or CIFAR")
    parser.add_argument("--save_predictions", action="store_true", help="every query's ranking as CSV")
    given = parser.parse_args()
    with one_sentence():
        run = load_run(given.run)
        split = given.split or run.test_split
        table, folder = report_changes(run, split, given.labelled, save_predictions=given.save_predictions)
    print(in_percent(table).to_string())
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
