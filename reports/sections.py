"""Everything that can be said of one evaluated split: tables and figures, each with its caption."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from core.errors import LabError
from metrics import as_text, chance, evaluate_protocol, published_points, recalls_of
from plots.features import Failure, failures, modality_gap, modality_map, similarity_matrix
from plots.figures import attention_maps
from plots.ranks import confusion_matrix, gallery_size_curves, reliability_diagram
from plots.ranks import rank_histogram as rank_histogram_figure
from plots.style import SavePath
from reports.gallery import Gallery, fitting_protocols
from reports.zero_shot import DEFAULT_TEMPLATES, ZeroShot, measure_gallery, summary_table
from retrieval.figures import MEASURES, feature_geometry, recall_by_gallery_size
from retrieval.ranks import QueryRanks
from training.order import evenly_spread

WAYS = {"i2t": "image-to-text", "t2i": "text-to-image"}
SHOWN_PICTURES = 8
THUMBNAILS = 24
WORST = 4


@dataclass(frozen=True)
class Exhibit:
    """A table, or a figure's file, or a reason why there is neither; `name` is unique in its split."""

    name: str
    caption: str
    table: pd.DataFrame | None = None
    figure: Path | None = None


Examination = Callable[[Gallery, Path], Iterator[Exhibit]]


def examine(gallery: Gallery, folder: Path, *, show: bool = True) -> list[Exhibit]:
    """Every table and figure that a gallery allows; what it does not allow is an exhibit that says why.

    Args: folder: where figures go, as `NAME_SPLIT.png`.
    """
    wanted = OF_ANY if gallery.measures_itself else {**OF_RETRIEVAL, **OF_ANY}
    exhibits: list[Exhibit] = []
    bar = tqdm(wanted.items(), disable=not show)
    for name, examination in bar:
        bar.set_description(f"{gallery.split}: {name}")
        try:
            exhibits += examination(gallery, folder)
        except LabError as reason:
            exhibits.append(Exhibit(name, f"{name} is not shown: {reason}"))
    return exhibits


def _file(folder: Path, name: str, gallery: Gallery) -> Path:
    return folder / f"{name}_{gallery.split}.png"


# --- of retrieval ---


def protocols(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """Recalls under every protocol that fits, beside chance."""
    rows = []
    for name in fitting_protocols(gallery):
        found: dict[str, Any] = evaluate_protocol(name, **gallery.features, ks=gallery.recall_ks)
        about = {"protocol": name, "images": found["num_images"], "captions": found["num_texts"]}
        what = {"what it is": found["protocol_description"]}
        for row, figures in {"model": recalls_of(found), "chance": chance(found)}.items():
            texts = {key: as_text(key, value) for key, value in figures.items()}
            rows.append({**about, "": row, **texts, **what})
    table = pd.DataFrame(rows).set_index(["protocol", "images", "captions", ""])
    caption = f"Split {gallery.split} under every protocol that fits it; recalls in percent."
    yield Exhibit("protocols", caption, table)


def every_figure(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """All figures, one column per direction."""
    found = gallery.run.metrics[gallery.split]
    names = [name.removeprefix("i2t_") for name in found if re.fullmatch(r"i2t_.*(?<!_low)(?<!_high)", name)]
    columns = {told: [as_text(name, found[f"{way}_{name}"]) for name in names] for way, told in WAYS.items()}
    labels = [f"{name} (%)" if "recall@" in name or "chance@" in name else name for name in names]
    caption = (
        f"Every figure of split {gallery.split}, protocol {found['protocol']}: {found['num_images']:,} images, "
        f"{found['num_texts']:,} captions. Ranks start at 1; what is not in percent and no rank lies in [0, 1]."
    )
    yield Exhibit("every figure", caption, pd.DataFrame(columns, index=pd.Index(labels, name="figure")))


def by_gallery_size(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """Recall@1 if only some of the images were the gallery, both ways, beside published systems."""
    count = gallery.ranks.num_images
    sizes = np.unique(np.geomspace(min(10, count), count, 24).round().astype(int)).tolist()
    curves = recall_by_gallery_size(gallery.ranks, sizes)
    drawn = gallery.dataset.table is not None and (gallery.dataset.table.root / "scenes.json").is_file()
    note = "" if drawn else " Diamonds: published systems on their own test sets, at those sets' sizes."
    for way, told in WAYS.items():
        path = _file(folder, f"recall_by_gallery_size_{way}", gallery)
        points = [] if drawn else published_points(way)
        gallery_size_curves({gallery.run.name: curves}, points, path, direction=way)
        caption = (
            f"Expected {told} Recall@1 if only so many of split {gallery.split}'s images were searched, computed "
            f"exactly from the ranks in the full gallery.{note}"
        )
        yield Exhibit(f"recall by gallery size, {told}", caption, figure=path)
    table = pd.DataFrame({WAYS[way]: 100 * curves[way] for way in WAYS}, index=pd.Index(sizes, name="images"))
    caption = f"Expected Recall@1 in percent by gallery size, split {gallery.split}."
    yield Exhibit("recall by gallery size", caption, table.iloc[::-3][::-1].round(1))


def rank_histogram(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """How far down the nearest match stands."""
    ranks, path = gallery.ranks, _file(folder, "ranks", gallery)
    matches = {way: round(float(getattr(ranks, way).counts.mean())) for way in WAYS}
    galleries = {way: (getattr(ranks, way).gallery_size, matches[way]) for way in WAYS}
    rank_histogram_figure({way: getattr(ranks, way).best for way in WAYS}, path, galleries)
    yield Exhibit("ranks", f"Rank of each query's nearest match, split {gallery.split}.", figure=path)


def worst_failures(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """The captions whose own picture stands furthest down, one an image, and what stands above it."""
    _need_pictures(gallery)
    path = _file(folder, "failures", gallery)
    failure_figure(gallery, count=WORST, above=WORST, path=path)
    caption = f"The worst captions of split {gallery.split}: their own picture, and those ranked above it."
    yield Exhibit("failures", caption, figure=path)


def failure_figure(
    gallery: Gallery, first: int = 0, count: int = 3, above: int = 3, path: SavePath = None
) -> Figure:
    """The captions whose own picture ranks worst, one a picture, from the `first`-worst on, and what ranks above.

    Raises: LabError if every caption finds its picture first.
    """
    ranks = gallery.ranks.t2i
    worst = worst_captions(ranks)[first : first + count]
    if not len(worst):
        raise LabError("every caption finds its own picture first; there is no failure to show.")
    rows = ranks.rows[worst].tolist()
    scores = gallery.text_features[rows] @ gallery.image_features.T  # (count, I)
    items_of = {int(number): item for item, number in enumerate(gallery.image_id)}
    failed = []
    for place, row in enumerate(rows):
        rank, own = int(ranks.best[worst[place]]), items_of[int(ranks.image_id[worst[place]])]
        order = scores[place].argsort(descending=True).tolist()
        items = [own, *[item for item in order if item != own][: min(above, rank - 1)]]
        image, *wrong = gallery.dataset.image_files(items)
        failed.append(Failure(gallery.captions[row], image, rank, wrong, scores[place, items].tolist()))
    return failures(failed, len(gallery.image_id), path)


def worst_captions(ranks: QueryRanks) -> np.ndarray:
    """Positions of each picture's worst caption, the worst of all first; pictures always found are left out."""
    order = np.argsort(-ranks.best, kind="stable")
    failed = order[ranks.best[order] > 1]
    _, places = np.unique(ranks.image_id[failed], return_index=True)
    return failed[np.sort(places)]


def similarities(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """Cosine similarities of a few pictures and a caption of each."""
    _need_pictures(gallery)
    items = evenly_spread(len(gallery.image_id), SHOWN_PICTURES).tolist()
    text_ids = gallery.text_id.tolist()
    rows = [text_ids.index(ident) for ident in gallery.image_id[items].tolist() if ident in text_ids]
    path = _file(folder, "similarity", gallery)
    scores = gallery.image_features[items] @ gallery.text_features[rows].T  # (I, T)
    matches = gallery.image_id[items][:, None] == gallery.text_id[rows][None]
    captions = [gallery.captions[row] for row in rows]
    similarity_matrix(scores, captions, gallery.dataset.image_files(items), matches, path)
    yield Exhibit(
        "similarity", f"Cosine similarities of {len(items)} pictures of split {gallery.split}.", figure=path
    )


def geometry(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """Modality gap, alignment, uniformity."""
    found = feature_geometry(**gallery.features, most=None)
    table = pd.DataFrame({"value": found}).round(3).rename_axis("measure")
    caption = (
        "Distance of the two modalities' means (Liang et al. 2022); mean squared distance of matching pairs and "
        "spread of each modality, lower is closer and more spread out (Wang & Isola 2020)."
    )
    yield Exhibit("geometry", caption, table)
    if set(MEASURES) <= set(gallery.run.history):
        path = _file(folder, "geometry", gallery)
        modality_gap(gallery.run.history, path)
        told = "The same over training, on the validation split."
        yield Exhibit("geometry over training", told, figure=path)


# --- of any data set ---


def maps(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """Both modalities in one plane."""
    joined, thumbnails = None, None
    if gallery.has_images:
        items = evenly_spread(len(gallery.image_id), THUMBNAILS).tolist()
        thumbnails = dict(zip(items, gallery.dataset.image_files(items), strict=True))
        joined = [(n, row) for n in items for row in np.flatnonzero(gallery.text_id == gallery.image_id[n])]
    for method, told in {"pca": "principal components", "tsne": "t-SNE"}.items():
        path = _file(folder, f"map_{method}", gallery)
        modality_map(gallery.image_features, gallery.text_features, path, method, thumbnails, joined)
        yield Exhibit(f"map, {told}", f"Images and texts of split {gallery.split} by {told}.", figure=path)


def attention(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """Where attention pooling, or the built-in vision transformer, looks."""
    _need_pictures(gallery)
    model = gallery.run.model
    tower_maps = getattr(model.image_encoder, "attention_maps", None)
    look = model.attention if model.image_pooling is not None else tower_maps
    if look is None or gallery.run.config.image_tower_mode == "cached":
        raise LabError("this run's image tower averages over positions, or its features are cached.")
    items = evenly_spread(len(gallery.image_id), SHOWN_PICTURES).tolist()
    pictures = gallery.dataset.__getitems__(items)["image"]
    with torch.inference_mode():
        weights = look(pictures.to(model.logit_scale.device)).cpu().numpy()
    path = _file(folder, "attention", gallery)
    attention_maps(list(pictures), list(weights), path=path)
    yield Exhibit("attention", f"Pooling weights over pictures of split {gallery.split}.", figure=path)


def zero_shot_classes(gallery: Gallery, folder: Path) -> Iterator[Exhibit]:
    """Accuracy over every labelling the data bring."""
    results = measure_gallery(gallery)
    if not results:
        raise LabError("the data know no labels; name a folder of labelled pictures (--labelled).")
    yield from zero_shot_exhibits(results, folder, gallery.split)


OF_RETRIEVAL: Mapping[str, Examination] = {
    "protocols": protocols,
    "every figure": every_figure,
    "recall by gallery size": by_gallery_size,
    "ranks": rank_histogram,
    "failures": worst_failures,
    "similarities": similarities,
    "geometry": geometry,
}
OF_ANY: Mapping[str, Examination] = {
    "maps (t-SNE takes some seconds)": maps,
    "attention": attention,
    "zero-shot classes": zero_shot_classes,
}


def zero_shot_exhibits(results: Sequence[ZeroShot], folder: Path, where: str) -> Iterator[Exhibit]:
    """Summary, then per class, confusions and calibration of each labelled set."""
    templates = ", ".join(f"“{template}”" for template in DEFAULT_TEMPLATES)
    caption = f"Zero-shot classification, {where}; prompts {templates}; chance: a random first choice."
    yield Exhibit("zero-shot", caption, summary_table(results))
    for result in results:
        name, told = result.name.replace(" ", "_"), f"{result.name}, {where}"
        accuracy = f"{told}: accuracy by class, in [0, 1]."
        yield Exhibit(f"classes, {result.name}", accuracy, result.per_class.round(3))
        if result.confusion.any():
            path = folder / f"confusion_{name}_{where}.png"
            confusion_matrix(result.confusion, result.labels, path)
            yield Exhibit(
                f"confusions, {told}", f"{told}: confusions among pictures of one label.", figure=path
            )
        path = folder / f"calibration_{name}_{where}.png"
        reliability_diagram(result.confidence, result.correct, path)
        yield Exhibit(f"calibration, {told}", f"{told}: is a confident first choice right?", figure=path)


def _need_pictures(gallery: Gallery) -> None:
    if not gallery.has_images:
        raise LabError(
            f"no image files in {gallery.dataset.table.root}; set image_root to the folder that holds them."
            if gallery.dataset.table is not None
            else "this data set has no image files."
        )
