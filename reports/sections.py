"""The sections of a report on one evaluated split: tables and figures, each with its caption."""

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
from plots.ranks import confusion_matrix, gallery_size_curves, hub_curves, rank_histogram, reliability_diagram
from plots.style import SavePath
from reports.gallery import Gallery, fitting_protocols
from reports.hubs import split_corrections
from reports.zero_shot import DEFAULT_TEMPLATES, ZeroShot, measure_gallery, summary_table
from retrieval.figures import MEASURES, feature_geometry, recall_by_gallery_size
from retrieval.hubness import RULES, times_retrieved
from retrieval.ranks import QueryRanks
from training.order import evenly_spread

DIRECTIONS = {"i2t": "image-to-text", "t2i": "text-to-image"}
NUM_IMAGES = 8  # in the figures of similarities and attention
NUM_THUMBNAILS = 24
NUM_FAILURES = 4


@dataclass(frozen=True)
class Section:
    """A table, or a figure's file, or a reason why there is neither; `name` is unique in its split."""

    name: str
    caption: str
    table: pd.DataFrame | None = None
    figure: Path | None = None


def split_sections(gallery: Gallery, folder: Path, *, show: bool = True) -> list[Section]:
    """Every table and figure of a split; one that is impossible is a section that says why.

    Args: folder: of the figures, which are saved as `NAME_SPLIT.png`.
    """
    functions = FOR_ALL_DATA if gallery.measures_itself else {**FOR_RETRIEVAL, **FOR_ALL_DATA}
    sections: list[Section] = []
    bar = tqdm(functions.items(), disable=not show)
    for name, function in bar:
        bar.set_description(f"{gallery.split}: {name}")
        try:
            sections += function(gallery, folder)
        except LabError as reason:
            sections.append(Section(name, f"{name} is not shown: {reason}"))
    return sections


def _file(folder: Path, name: str, gallery: Gallery) -> Path:
    return folder / f"{name}_{gallery.split}.png"


# --- for retrieval ---


def protocols(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """Recalls under every protocol that fits, beside chance."""
    rows = []
    for name in fitting_protocols(gallery):
        metrics: dict[str, Any] = evaluate_protocol(name, **gallery.features, ks=gallery.recall_ks)
        about = {"protocol": name, "images": metrics["num_images"], "captions": metrics["num_texts"]}
        for row, figures in {"model": recalls_of(metrics), "chance": chance(metrics)}.items():
            texts = {key: as_text(key, value) for key, value in figures.items()}
            rows.append({**about, "": row, **texts, "what it is": metrics["protocol_description"]})
    table = pd.DataFrame(rows).set_index(["protocol", "images", "captions", ""])
    caption = f"Split {gallery.split} under every protocol that fits it; recalls in percent."
    yield Section("protocols", caption, table)


def every_figure(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """All figures, one column per direction."""
    metrics = gallery.run.metrics[gallery.split]
    names = [
        name.removeprefix("i2t_") for name in metrics if re.fullmatch(r"i2t_.*(?<!_low)(?<!_high)", name)
    ]
    columns = {
        words: [as_text(name, metrics[f"{direction}_{name}"]) for name in names]
        for direction, words in DIRECTIONS.items()
    }
    labels = [f"{name} (%)" if "recall@" in name or "chance@" in name else name for name in names]
    caption = (
        f"Every figure of split {gallery.split}, protocol {metrics['protocol']}: {metrics['num_images']:,} images, "
        f"{metrics['num_texts']:,} captions. Ranks start at 1; figures that are neither ranks nor in percent are "
        "between 0 and 1."
    )
    yield Section("every figure", caption, pd.DataFrame(columns, index=pd.Index(labels, name="figure")))


def by_gallery_size(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """Recall@1 if only some of the images were the gallery, both ways, beside published systems."""
    count = gallery.ranks.num_images
    sizes = np.unique(np.geomspace(min(10, count), count, 24).round().astype(int)).tolist()
    curves = recall_by_gallery_size(gallery.ranks, sizes)
    generated = gallery.dataset.table is not None and (gallery.dataset.table.root / "scenes.json").is_file()
    note = "" if generated else " Diamonds: published systems on their own test sets, at those sets' sizes."
    for direction, words in DIRECTIONS.items():
        path = _file(folder, f"recall_by_gallery_size_{direction}", gallery)
        points = [] if generated else published_points(direction)
        gallery_size_curves({gallery.run.name: curves}, points, path, direction=direction)
        caption = (
            f"Expected {words} Recall@1 if only so many of split {gallery.split}'s images were searched, computed "
            f"exactly from the ranks in the full gallery.{note}"
        )
        yield Section(f"recall by gallery size, {words}", caption, figure=path)
    columns = {words: 100 * curves[direction] for direction, words in DIRECTIONS.items()}
    table = pd.DataFrame(columns, index=pd.Index(sizes, name="images"))
    caption = f"Expected Recall@1 in percent by gallery size, split {gallery.split}."
    yield Section("recall by gallery size", caption, table.iloc[::-3][::-1].round(1))


def rank_histograms(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """The rank of each query's nearest match."""
    ranks = {direction: getattr(gallery.ranks, direction) for direction in DIRECTIONS}
    sizes = {name: (each.gallery_size, round(float(each.counts.mean()))) for name, each in ranks.items()}
    path = _file(folder, "ranks", gallery)
    rank_histogram({name: each.best for name, each in ranks.items()}, path, sizes)
    yield Section("ranks", f"Rank of each query's nearest match, split {gallery.split}.", figure=path)


def hubs(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """How often each image is among the first answers, before and after the correction of hubs."""
    made = split_corrections(gallery, show=False)
    k = min(10, len(gallery.image_id))
    counts = {"cosine": times_retrieved(gallery.text_features, gallery.image_features, k)}
    for rule, (_, correction) in made.items():
        searched = correction["t2i"].extended(gallery.text_features, gallery.image_features)
        counts[RULES[rule].label] = times_retrieved(*searched, k)
    path = _file(folder, "hubs", gallery)
    hub_curves(counts, k, path)
    chosen = "; ".join(
        f"{RULES[rule].label}, {DIRECTIONS[way]}: "
        + ", ".join(f"{name} {value:g}" for name, value in values.items())
        for rule, (parameters, _) in made.items()
        for way, values in parameters.items()
    )
    caption = (
        f"How many of split {gallery.split}'s captions find each image among their first {k}: images that are found "
        "by far more captions than others are hubs. Nearest Neighbor Normalization (NNN) and QB-Norm correct them "
        f"without training, with captions and images of the training split. Chosen on the validation split: {chosen}."
    )
    yield Section("hubs", caption, figure=path)


def worst_failures(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """The captions whose own image has the worst rank, and the images ranked above it."""
    _require_images(gallery)
    path = _file(folder, "failures", gallery)
    failure_figure(gallery, count=NUM_FAILURES, above=NUM_FAILURES, path=path)
    caption = f"The worst captions of split {gallery.split}: their own image, and the images ranked above it."
    yield Section("failures", caption, figure=path)


def failure_figure(
    gallery: Gallery, first: int = 0, count: int = 3, above: int = 3, path: SavePath = None
) -> Figure:
    """The captions whose own image ranks worst, one per image, from the `first`-worst on, and what ranks above.

    Raises: LabError if every caption finds its image first.
    """
    ranks = gallery.ranks.t2i
    worst = worst_captions(ranks)[first : first + count]
    if not len(worst):
        raise LabError("every caption finds its own image first; there is no failure to show.")
    rows = []
    for row, image_id, rank in zip(ranks.rows[worst], ranks.image_id[worst], ranks.best[worst], strict=True):
        own = int((gallery.image_id == int(image_id)).nonzero()[0])
        scores = gallery.image_features @ gallery.text_features[row]  # (I,)
        nearest = [item for item in scores.argsort(descending=True).tolist() if item != own]
        items = [own, *nearest[: min(above, int(rank) - 1)]]
        image, *wrong = gallery.dataset.image_files(items)
        rows.append(Failure(gallery.captions[row], image, int(rank), wrong, scores[items].tolist()))
    return failures(rows, len(gallery.image_id), path)


def worst_captions(ranks: QueryRanks) -> np.ndarray:
    """Positions of each image's worst caption, the worst of all first; images always found first are left out."""
    order = np.argsort(-ranks.best, kind="stable")
    failed = order[ranks.best[order] > 1]
    _, places = np.unique(ranks.image_id[failed], return_index=True)
    return failed[np.sort(places)]


def similarities(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """Cosine similarities of a few images and a caption of each."""
    _require_images(gallery)
    items = evenly_spread(len(gallery.image_id), NUM_IMAGES).tolist()
    text_ids = gallery.text_id.tolist()
    rows = [text_ids.index(ident) for ident in gallery.image_id[items].tolist() if ident in text_ids]
    path = _file(folder, "similarity", gallery)
    scores = gallery.image_features[items] @ gallery.text_features[rows].T  # (I, T)
    matches = gallery.image_id[items][:, None] == gallery.text_id[rows][None]
    captions = [gallery.captions[row] for row in rows]
    similarity_matrix(scores, captions, gallery.dataset.image_files(items), matches, path)
    caption = f"Cosine similarities of {len(items)} images of split {gallery.split}."
    yield Section("similarity", caption, figure=path)


def geometry(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """Modality gap, alignment, uniformity."""
    measures = feature_geometry(**gallery.features, most=None)
    table = pd.DataFrame({"value": measures}).round(3).rename_axis("measure")
    caption = (
        "Distance of the two modalities' means (Liang et al. 2022); mean squared distance of matching pairs and "
        "spread of each modality, lower is closer and more spread out (Wang & Isola 2020)."
    )
    yield Section("geometry", caption, table)
    if set(MEASURES) <= set(gallery.run.history):
        path = _file(folder, "geometry", gallery)
        modality_gap(gallery.run.history, path)
        caption = "The same during training, on the validation split."
        yield Section("geometry over training", caption, figure=path)


# --- for all data ---


def maps(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """Both modalities in one plane."""
    pairs, thumbnails = None, None
    if gallery.has_images:
        items = evenly_spread(len(gallery.image_id), NUM_THUMBNAILS).tolist()
        thumbnails = dict(zip(items, gallery.dataset.image_files(items), strict=True))
        pairs = [(n, row) for n in items for row in np.flatnonzero(gallery.text_id == gallery.image_id[n])]
    for method, words in {"pca": "principal components", "tsne": "t-SNE"}.items():
        path = _file(folder, f"map_{method}", gallery)
        modality_map(gallery.image_features, gallery.text_features, path, method, thumbnails, pairs)
        yield Section(f"map, {words}", f"Images and texts of split {gallery.split} by {words}.", figure=path)


def attention(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """The weights of attention pooling, or the attention of the built-in vision transformer."""
    _require_images(gallery)
    model = gallery.run.model
    tower_maps = getattr(model.image_encoder, "attention_maps", None)
    weigh = model.attention if model.image_pooling is not None else tower_maps
    if weigh is None or gallery.run.config.image_tower_mode == "cached":
        raise LabError("this run's image tower averages over positions, or its features are cached.")
    images = gallery.dataset.__getitems__(evenly_spread(len(gallery.image_id), NUM_IMAGES).tolist())["image"]
    with torch.inference_mode():
        weights = weigh(images.to(model.logit_scale.device)).cpu().numpy()
    path = _file(folder, "attention", gallery)
    attention_maps(list(images), list(weights), path=path)
    yield Section("attention", f"Pooling weights over images of split {gallery.split}.", figure=path)


def zero_shot_classes(gallery: Gallery, folder: Path) -> Iterator[Section]:
    """Accuracy on every set of labels that the data has."""
    results = measure_gallery(gallery)
    if not results:
        raise LabError("the data has no labels; name a folder of labelled images (--labelled).")
    yield from zero_shot_sections(results, folder, gallery.split)


def zero_shot_sections(results: Sequence[ZeroShot], folder: Path, where: str) -> Iterator[Section]:
    """Summary, then per class, confusions and calibration of each labelled set."""
    templates = ", ".join(f"“{template}”" for template in DEFAULT_TEMPLATES)
    caption = f"Zero-shot classification, {where}; prompts {templates}; chance: a random first choice."
    yield Section("zero-shot", caption, summary_table(results))
    for result in results:
        name, title = result.name.replace(" ", "_"), f"{result.name}, {where}"
        caption = f"{title}: accuracy by class, in [0, 1]."
        yield Section(f"classes, {result.name}", caption, result.per_class.round(3))
        if result.confusion.any():
            path = folder / f"confusion_{name}_{where}.png"
            confusion_matrix(result.confusion, result.labels, path)
            caption = f"{title}: confusions among images with one label."
            yield Section(f"confusions, {title}", caption, figure=path)
        path = folder / f"calibration_{name}_{where}.png"
        reliability_diagram(result.confidence, result.correct, path)
        caption = f"{title}: how often a first choice of this confidence is correct."
        yield Section(f"calibration, {title}", caption, figure=path)


def _require_images(gallery: Gallery) -> None:
    if not gallery.has_images:
        raise LabError(
            f"no image files in {gallery.dataset.table.root}; set image_root to the folder that contains them."
            if gallery.dataset.table is not None
            else "this data set has no image files."
        )


SectionFunction = Callable[[Gallery, Path], Iterator[Section]]
FOR_RETRIEVAL: Mapping[str, SectionFunction] = {
    "protocols": protocols,
    "every figure": every_figure,
    "recall by gallery size": by_gallery_size,
    "ranks": rank_histograms,
    "hubs": hubs,
    "failures": worst_failures,
    "similarities": similarities,
    "geometry": geometry,
}
FOR_ALL_DATA: Mapping[str, SectionFunction] = {
    "maps (t-SNE takes some seconds)": maps,
    "attention": attention,
    "zero-shot classes": zero_shot_classes,
}
