"""Zero-shot classification: class names and templates make a classifier, which is measured on labelled images."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from core.errors import LabError
from plots.ranks import calibration_bins, calibration_error
from reports.gallery import Gallery
from reports.search import as_image, encode_image
from sources.cifar import find_cifar, read_cifar
from sources.drawing import load_scenes
from sources.image_cache import open_images
from sources.readers import read_captions
from sources.scenes import Scene
from sources.table import CaptionTable, stamp
from towers.features import PIXELS_PER_BATCH, image_features, text_features
from training.order import evenly_spread
from utils import Run

# --- the classifier ---

DEFAULT_TEMPLATES = ("a photo of {}.", "a picture of {}.", "an image with {} in it.")


def class_features(run: Run, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """(L, D) classifier: each label's feature averaged over the templates.

    Args: templates: texts with `{}` where the label stands.
    Raises: LabError if a label is empty or given twice, a template lacks `{}`, or a feature is not finite.
    Source: prompt ensembles, Radford et al. 2021, section 3.1.4.
    """
    labels = [label.strip() for label in labels]
    if len(set(labels)) < max(2, len(labels)) or not all(labels):
        raise LabError("zero-shot labels must be at least two, none empty and none given twice.")
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise LabError("prompt templates are a list, and every one needs {} where the label stands.")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    features = text_features(run.model, run.config, texts).view(len(labels), len(templates), -1)
    _check_finite(features, "label")
    return torch.nn.functional.normalize(features.mean(dim=1), dim=-1)


def _check_finite(features: Tensor, what: str) -> None:
    if not torch.isfinite(features).all():
        raise LabError(f"a {what}'s feature holds NaN or infinite values; look for a diverged run.")


@torch.inference_mode()
def probabilities(run: Run, features: Tensor, classes: Tensor) -> Tensor:
    """(N, L) probabilities of labels for image features (N, D), at the model's temperature.

    The bias of a sigmoid loss changes nothing here. Raises: LabError if a feature is not finite.
    """
    _check_finite(features, "image")
    scale = run.model.logit_parts()["logit_scale"].cpu()
    return (scale * features @ classes.T).softmax(dim=1)


def classify(
    run: Run, image: Any, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> pd.DataFrame:
    """Labels of any image, most probable first: `probability` in [0, 1] and cosine `similarity`, by `label`.

    Args: image: a file's path or bytes (such as an upload's), a PIL image, or uint8 pixels (H, W, 3).
    Raises: LabError on labels as in `class_features`; UndecodableImage if the image cannot be read.
    """
    feature = encode_image(run, as_image(image))[None]
    classes = class_features(run, labels, templates)
    columns = {
        "probability": probabilities(run, feature, classes)[0].numpy(),
        "similarity": (feature @ classes.T)[0].numpy(),
    }
    names = pd.Index([label.strip() for label in labels], name="label")
    return pd.DataFrame(columns, index=names).sort_values("probability", ascending=False)


# --- measuring ---


@dataclass(frozen=True)
class ZeroShot:
    """The results of a classifier on a labelled set.

    Args:
        summary: `top1` and `top5` in [0, 1], `chance` of a random first choice, `calibration_error`,
            `images`, `labels`, `left_out`, and the `rule` of what counts as correct.
        per_class: by `label`, how many `images` show it and the `accuracy`: in how many of them it is among the R
            most probable labels, where R is the number of labels that the image shows.
        confusion: (L, L) counts, row the true label, of images with one label.
        confidence, correct: (N,) probability of each image's first choice, and whether it is correct.
    """

    name: str
    labels: list[str]
    summary: dict[str, Any]
    per_class: pd.DataFrame
    confusion: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def measure(run: Run, labelled: Labelled, templates: Sequence[str] = DEFAULT_TEMPLATES) -> ZeroShot:
    """Classify a labelled set and count. Raises: LabError as `class_features` and `probabilities`."""
    classes = class_features(run, labelled.labels, templates)
    scores = probabilities(run, labelled.features, classes).numpy()  # (N, L)
    order, truth = np.argsort(-scores, axis=1, kind="stable"), labelled.truth
    hits = np.take_along_axis(truth, order, axis=1)  # (N, L) whether the label at each place is true
    confidence, correct = scores.max(axis=1), hits[:, 0]
    summary = {
        "top1": float(correct.mean()),
        "top5": float(hits[:, :5].any(axis=1).mean()),
        "chance": float(truth.mean()),
        "calibration_error": calibration_error(calibration_bins(confidence, correct)),
        "images": len(truth),
        "labels": len(labelled.labels),
        "left_out": labelled.left_out,
        "rule": labelled.rule,
    }
    return ZeroShot(
        labelled.name,
        labelled.labels,
        summary,
        _per_class(truth, order, labelled.labels),
        _confusion(truth, order[:, 0]),
        confidence,
        correct,
    )


def _per_class(truth: np.ndarray, order: np.ndarray, labels: list[str]) -> pd.DataFrame:
    places = np.argsort(order, axis=1)  # (N, L) place of each label, 0 is the most probable
    named = truth & (places < truth.sum(axis=1, keepdims=True))
    images = truth.sum(axis=0)
    with np.errstate(invalid="ignore"):
        columns = {"images": images, "accuracy": named.sum(axis=0) / images}
    return pd.DataFrame(columns, index=pd.Index(labels, name="label"))


def _confusion(truth: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(L, L) counts over the images with one label."""
    single = truth.sum(axis=1) == 1
    counts = np.zeros((truth.shape[1],) * 2, dtype=np.int64)
    np.add.at(counts, (truth[single].argmax(axis=1), chosen[single]), 1)
    return counts


def measure_gallery(gallery: Gallery, templates: Sequence[str] = DEFAULT_TEMPLATES) -> list[ZeroShot]:
    """The results on every set of labels that a gallery's data has."""
    return [measure(gallery.run, labelled, templates) for labelled in labelled_images(gallery)]


def summary_table(results: Sequence[ZeroShot]) -> pd.DataFrame:
    """One row per labelled set, accuracies and calibration error in percent."""
    shares = ["top1", "top5", "chance", "calibration_error"]
    counts = ["images", "labels", "left_out", "rule"]
    names = pd.Index([result.name for result in results], name="set")
    table = pd.DataFrame([result.summary for result in results], names, [*shares, *counts])
    table[shares] = (100 * table[shares].astype(float)).round(1)
    return table.rename(columns={name: f"{name} (%)" for name in shares})


# --- images with known labels ---

ONE_LABEL = "one label per image"
MANY_LABELS = "several labels per image; correct if the first choice is one of them"


@dataclass(frozen=True)
class Labelled:
    """Images with known labels, encoded by a run.

    Args:
        name: of the set, for tables and files.
        labels: C texts.
        truth: (N, C) bool; an image may show several labels.
        features: (N, D), normalized.
        left_out: number of images that cannot be decoded or show none of the labels.
    """

    name: str
    labels: list[str]
    truth: np.ndarray
    features: Tensor
    left_out: int = 0

    @property
    def rule(self) -> str:
        """What counts as correct."""
        return MANY_LABELS if (self.truth.sum(axis=1) > 1).any() else ONE_LABEL


# --- labels of a gallery's own images ---


def labelled_images(gallery: Gallery) -> list[Labelled]:
    """Every set of labels that a gallery's data has, with the images that show a label."""
    sets = []
    for name, labels_of in label_sets(gallery).items():
        items = [item for item, labels in enumerate(labels_of) if labels]
        labels = sorted(set().union(*labels_of))
        truth = np.array([[label in labels_of[item] for label in labels] for item in items], dtype=bool)
        left_out = len(labels_of) - len(items)
        if len(labels) > 1:
            sets.append(Labelled(name, labels, truth, gallery.image_features[items], left_out))
    return sets


def known_labels(gallery: Gallery) -> dict[int, str]:
    """Item -> its label, for the images with exactly one label in the first set of labels."""
    first = next(iter(label_sets(gallery).values()), [])
    return {item: label for item, labels in enumerate(first) if len(labels) == 1 for label in labels}


def label_sets(gallery: Gallery) -> dict[str, list[set[str]]]:
    """Set of labels -> what each image shows: generated scenes' objects, the table's categories, or COCO's."""
    table = gallery.dataset.table
    if table is None:
        return {}
    if (table.root / "scenes.json").is_file():
        return _scene_labels(gallery)
    if table.categories is not None:
        names = table.categories[gallery.dataset.rows]
        return {"categories": [{str(name)} if name else set() for name in names]}
    return _coco_categories(gallery)


def _single_object(scene: Scene) -> set[str]:
    first, *others = scene.objects
    return set() if others else {f"{first.colour} {first.shape}"}


SCENE_LABELS: Mapping[str, Callable[[Scene], set[str]]] = {
    "single objects": _single_object,
    "shapes": lambda scene: {thing.shape for thing in scene.objects},
    "colours": lambda scene: {thing.colour for thing in scene.objects},
}


def _scene_labels(gallery: Gallery) -> dict[str, list[set[str]]]:
    scenes = load_scenes(gallery.dataset.table.root, gallery.split)
    own = [scenes[ident] for ident in gallery.image_id.tolist()]
    return {name: [labels_of(scene) for scene in own] for name, labels_of in SCENE_LABELS.items()}


def _coco_categories(gallery: Gallery) -> dict[str, list[set[str]]]:
    """Names of the categories in each image, from COCO's instances_*.json beside the images; {} without these."""
    table = gallery.dataset.table
    names = sorted({Path(table.paths[row]).parent.name for row in gallery.dataset.rows.tolist()})
    places = [table.root / top / "annotations" for top in ("", "coco2014", "coco2017")]
    files = [
        file for place in places for name in names if (file := place / f"instances_{name}.json").is_file()
    ]
    categories: dict[int, set[str]] = {}
    for file in tqdm(files, "reading categories", delay=2, leave=False):
        for image_id, category in read_instances(file):
            categories.setdefault(image_id, set()).add(category)
    own = [categories.get(ident, set()) for ident in gallery.image_id.tolist()]
    return {"COCO categories": own} if categories else {}


def read_instances(file: Path) -> list[tuple[int, str]]:
    """(image id, category name) of every object in one of COCO's instances_*.json, read again only if it changes.

    Raises: LabError if it is not such a file.
    """
    return _read_instances(file, stamp(file))


@functools.lru_cache(maxsize=2)
def _read_instances(file: Path, stamp: tuple[int, int]) -> list[tuple[int, str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=_coco_object)
        names = {category["id"]: category["name"] for category in content["categories"]}
        return [(image_id, names[category]) for image_id, category in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{file} is not a COCO instances file ({error!r}); unpack it again.") from error


def _coco_object(record: dict[str, Any]) -> Any:
    """Only the two ids of an annotation: outlines are most of the file."""
    return (record["image_id"], record["category_id"]) if "category_id" in record else record


# --- folders of labelled images ---


def open_labelled(run: Run, folder: str | Path, *, show: bool = True) -> Labelled:
    """The labelled images of a folder, encoded by a run: CIFAR's files, or class folders.

    CIFAR-10 and CIFAR-100 are read in torchvision's layout, their test images only. Of class folders below `train/`
    and `test/` those of `test` are read, otherwise all. `max_samples` applies here too.
    Raises: LabError if the folder has neither.
    """
    return (_open_cifar if find_cifar(folder) else _open_class_folders)(run, Path(folder), show)


def _open_cifar(run: Run, folder: Path, show: bool) -> Labelled:
    cifar = read_cifar(folder)
    rows = evenly_spread(len(cifar.labels), run.config.max_samples)
    size = run.config.image_size

    def gather(rows: np.ndarray) -> Tensor:
        pixels = cifar.images[torch.from_numpy(rows)].float()
        scaled = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return scaled.round().clamp(0, 255).to(torch.uint8)  # (B, 3, S, S)

    truth = cifar.labels[rows][:, None] == np.arange(len(cifar.names))
    return Labelled(folder.name, cifar.names, truth, _encode(run, gather, rows, show))


def _open_class_folders(run: Run, folder: Path, show: bool) -> Labelled:
    config = run.config
    table: CaptionTable = read_captions("class_folders", folder)
    if not table.split_source.startswith("drawn") and "test" in table.split_sizes():
        table = table.split("test")
    table = table.take(evenly_spread(len(table), config.max_samples))
    images = open_images(table, config.cache_dir, config.image_size, config.image_resize, config.num_workers)
    rows = np.setdiff1d(np.arange(len(table)), list(images.bad))
    assert table.categories is not None
    labels = sorted(set(table.categories.tolist()))
    truth = table.categories[rows][:, None] == np.array(labels)
    return Labelled(folder.name, labels, truth, _encode(run, images.gather, rows, show), len(images.bad))


def _encode(run: Run, gather: Callable[[np.ndarray], Tensor], rows: np.ndarray, show: bool) -> Tensor:
    """(len(rows), D) features of decoded images."""
    device, size = run.model.logit_scale.device, run.config.image_size
    batch = max(1, PIXELS_PER_BATCH.get(device.type, 256 * 224**2) // size**2)
    parts = np.array_split(rows, max(1, -(-len(rows) // batch)))
    bar = tqdm(parts, "labelled images", unit="batch", disable=not show, delay=1)
    return torch.cat([image_features(run.model, run.config, gather(part)) for part in bar])
