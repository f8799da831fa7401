"""Pictures whose labels are known, encoded by a run: class folders, CIFAR, COCO's categories, scenes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from captions import CaptionTable
from cifar_files import find_cifar, read_cifar
from dataset import open_images
from encode import PIXELS_PER_BATCH
from errors import LabError
from gallery import Gallery
from models import build_image_tower
from readers import read_captions
from runs import Run
from scenes import Scene, load_scenes

ONE_LABEL = "one label a picture"
MANY_LABELS = "a picture counts once for each label it shows; right is a first choice among them"


@dataclass(frozen=True)
class Labelled:
    """Pictures of known labels, encoded by a run.

    Args:
        name: of the set, for tables and files.
        labels: C texts.
        truth: (N, C) bool; several labels a picture where it shows several things.
        features: (N, D), normalised.
        left_out: pictures that cannot be decoded, or show none of the labels.
    """

    name: str
    labels: list[str]
    truth: np.ndarray
    features: Tensor
    left_out: int = 0

    @property
    def rule(self) -> str:
        """What counts as right."""
        return MANY_LABELS if (self.truth.sum(axis=1) > 1).any() else ONE_LABEL


# --- labels of a gallery's own pictures ---


def labelled_of(gallery: Gallery) -> list[Labelled]:
    """Every labelling that a gallery's data bring, of the pictures that show a label."""
    sets = [_of_gallery(gallery, name, shown) for name, shown in shown_labels(gallery).items()]
    return [labelled for labelled in sets if len(labelled.labels) > 1]


def known_labels(gallery: Gallery) -> dict[int, str]:
    """Item -> its one true label, where the data says; pictures that show several are not in it."""
    first = next(iter(shown_labels(gallery).values()), [])
    return {item: label for item, labels in enumerate(first) if len(labels) == 1 for label in labels}


def shown_labels(gallery: Gallery) -> dict[str, list[set[str]]]:
    """Labelling -> what each picture shows: generated scenes' objects, the table's categories, or COCO's."""
    table = getattr(gallery.dataset, "table", None)
    if table is None:
        return {}
    if (table.root / "scenes.json").is_file():
        return _scene_labels(gallery)
    if table.categories is not None:
        names = table.categories[gallery.dataset.rows]
        return {"categories": [{str(name)} if name else set() for name in names]}
    return _coco_categories(gallery)


def _of_gallery(gallery: Gallery, name: str, shown: Sequence[set[str]]) -> Labelled:
    """The pictures that show a label, of what each shows."""
    items = [item for item, labels in enumerate(shown) if labels]
    labels = sorted(set().union(*shown))
    truth = np.array([[label in shown[item] for label in labels] for item in items], dtype=bool)
    features = gallery.image_features[items]
    return Labelled(name, labels, truth.reshape(len(items), len(labels)), features, len(shown) - len(items))


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
    shown = [scenes[ident] for ident in gallery.image_id.tolist()]
    return {name: [labels_of(scene) for scene in shown] for name, labels_of in SCENE_LABELS.items()}


def _coco_categories(gallery: Gallery) -> dict[str, list[set[str]]]:
    """Names of the categories in each picture, of COCO's instances_*.json beside the pictures; {} without."""
    table = gallery.dataset.table
    names = sorted({Path(table.paths[row]).parent.name for row in gallery.dataset.rows.tolist()})
    places = [table.root / top / "annotations" for top in ("", "coco2014")]
    files = [
        file for place in places for name in names if (file := place / f"instances_{name}.json").is_file()
    ]
    shown: dict[int, set[str]] = {}
    for file in tqdm(files, "reading categories", delay=2, leave=False):
        for image_id, category in read_instances(file):
            shown.setdefault(image_id, set()).add(category)
    own = [shown.get(ident, set()) for ident in gallery.image_id.tolist()]
    return {"COCO categories": own} if shown else {}


@functools.lru_cache(maxsize=2)
def read_instances(file: Path) -> list[tuple[int, str]]:
    """(image id, category's name) of every object in one of COCO's instances_*.json.

    Raises: LabError if it is no such file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=_coco_object)
        names = {category["id"]: category["name"] for category in content["categories"]}
        return [(image_id, names[category]) for image_id, category in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{file} is none of COCO's instances files ({error!r}); unpack it again.") from error


def _coco_object(record: dict[str, Any]) -> Any:
    """Of an annotation its two ids alone: outlines are most of the file."""
    return (record["image_id"], record["category_id"]) if "category_id" in record else record


# --- labelled pictures from elsewhere ---


def open_labelled(run: Run, folder: str | Path, *, show: bool = True) -> Labelled:
    """The labelled pictures of a folder, encoded by a run: CIFAR's files, or class folders.

    CIFAR-10 and CIFAR-100 are found as torchvision keeps them, and their test pictures taken. Of class
    folders below `train/` and `test/` those of `test` are taken, else all. `max_samples` holds here too.
    Raises: LabError if the folder holds neither.
    """
    return (_open_cifar if find_cifar(folder) else _open_class_folders)(run, Path(folder), show)


def _open_cifar(run: Run, folder: Path, show: bool) -> Labelled:
    pictures = read_cifar(folder)
    rows = _at_most(len(pictures.labels), run.config.max_samples)
    size = run.config.image_size

    def gather(some: np.ndarray) -> Tensor:
        pixels = pictures.images[torch.from_numpy(some)].float()
        scaled = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return scaled.round().clamp(0, 255).to(torch.uint8)  # (B, 3, S, S)

    truth = pictures.labels[rows][:, None] == np.arange(len(pictures.names))
    return Labelled(folder.name, pictures.names, truth, _encode(run, gather, rows, show))


def _open_class_folders(run: Run, folder: Path, show: bool) -> Labelled:
    config = run.config
    table: CaptionTable = read_captions("class_folders", folder)
    if (folder / "test").is_dir():
        table = table.split("test")
    table = table.take(_at_most(len(table), config.max_samples))
    images = open_images(table, config.cache_dir, config.image_size, config.image_resize, config.num_workers)
    rows = np.setdiff1d(np.arange(len(table)), list(images.bad))
    assert table.categories is not None
    labels = sorted(set(table.categories.tolist()))
    truth = table.categories[rows][:, None] == np.array(labels)
    return Labelled(folder.name, labels, truth, _encode(run, images.gather, rows, show), len(images.bad))


def _at_most(count: int, limit: int | None) -> np.ndarray:
    """Rows of `count`, at most `limit` of them, spread evenly."""
    kept = count if limit is None else min(count, limit)
    return np.linspace(0, count - 1, kept).astype(np.int64)


@torch.inference_mode()
def _encode(run: Run, gather: Callable[[np.ndarray], Tensor], rows: np.ndarray, show: bool) -> Tensor:
    """(len(rows), D) features of decoded pictures; a cached image tower is loaded for them once."""
    model, config = run.model, run.config
    device = model.logit_scale.device
    tower: Callable[[Tensor], Tensor] = torch.nn.Identity()
    if config.image_tower_mode == "cached":
        tower = build_image_tower(config.updated(image_tower_mode="frozen")).to(device).eval()
    batch = max(1, PIXELS_PER_BATCH.get(device.type, 256 * 224**2) // config.image_size**2)
    parts = np.array_split(rows, max(1, -(-len(rows) // batch)))
    bar = tqdm(parts, "labelled pictures", unit="batch", disable=not show, delay=1)
    return torch.cat([model.encode_image(tower(gather(part).to(device))).float().cpu() for part in bar])
