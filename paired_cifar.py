"""Pairs of pictures side by side, and a caption that names the left one and the right one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from errors import LabError
from image_cache import ImageCache
from readers import read_captions

TEMPLATE = "a photo of a {left} and a {right}"
SIDE = 32
VAL_EVERY = 10  # of each class's training pictures, one in ten is held out where no val split is there
ARRAY_PARTS = {("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
}
DAMAGE = (OSError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError)


class Pictures(NamedTuple):
    """images: (N, 3, 32, 32) uint8. labels: (N,) class of each. names: (C,) the classes."""

    images: Tensor
    labels: np.ndarray
    names: list[str]


class PairedPictures(Dataset):
    """Pairs drawn on the fly: pictures (3, 32, 64), captions, ids; batches as `COCOClipDataset` gives them.

    Pair `i` has a picture of its own on the left; which one stands on the right is drawn by (seed, epoch, i).
    A pair's id is that of its two classes in order, so every caption that is true of a picture matches it.

    Args:
        pictures: what to draw from.
        num_pairs: pairs an epoch; None: as many as pictures.
        different_class_prob: probability that the two pictures are of different classes.
        seed: of the draws.
        fixed: the same pairs in every epoch, for evaluation.
        template: the caption, with {left} and {right}; "a" before them becomes "an" where it must.
    Raises: LabError if a class has too few pictures for such pairs.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        num_pairs: int | None = None,
        different_class_prob: float = 0.5,
        seed: int = 0,
        fixed: bool = False,
        template: str = TEMPLATE,
    ) -> None:
        if not 0 <= different_class_prob <= 1:
            raise LabError(f"different_class_prob is a probability, not {different_class_prob}.")
        if "{left}" not in template or "{right}" not in template:
            raise LabError(f"template {template!r} must name {{left}} and {{right}}.")
        self.pictures, self.template, self.seed, self.fixed = pictures, template, seed, fixed
        self.different_class_prob, self.epoch = different_class_prob, 0
        self.num_pairs = len(pictures.images) if num_pairs is None else num_pairs
        self.counts = np.bincount(pictures.labels, minlength=len(pictures.names))  # (C,)
        self.starts = np.cumsum(self.counts) - self.counts
        self.by_class = np.argsort(pictures.labels, kind="stable")  # (N,) class after class
        self.places = np.argsort(self.by_class)  # (N,) where each picture stands in by_class
        self.lefts = np.random.default_rng(seed).permutation(len(pictures.images))
        if (self.counts[self.counts > 0] < 2).any() and different_class_prob < 1:
            raise LabError("a class with one picture makes no pair alone; set different_class_prob to 1.")
        if (self.counts > 0).sum() < 2 and different_class_prob > 0:
            raise LabError("pairs of different classes need two classes; set different_class_prob to 0.")

    def __len__(self) -> int:
        return self.num_pairs

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's pairs; nothing changes where they are fixed."""
        self.epoch = 0 if self.fixed else epoch

    def pair(self, item: int) -> tuple[int, int]:
        """Rows of the left and the right picture."""
        left = int(self.lefts[item % len(self.lefts)])
        label = self.pictures.labels[left]
        rng = np.random.default_rng((self.seed, self.epoch, item))
        start, count = self.starts[label], self.counts[label]
        if rng.random() < self.different_class_prob:
            place = rng.integers(len(self.lefts) - count)
            place += count * (place >= start)  # past the left one's class
        else:
            place = start + rng.integers(count - 1)
            place += place >= self.places[left]  # past the left one itself
        return left, int(self.by_class[place])

    def caption(self, left: int, right: int) -> str:
        """The caption of a class on the left and a class on the right."""
        text = self.template
        for side, label in (("left", left), ("right", right)):
            name = self.pictures.names[label]
            article = "an" if name[0].lower() in "aeiou" else "a"
            text = text.replace(f"a {{{side}}}", f"{article} {{{side}}}").replace(f"{{{side}}}", name)
        return text

    def captions(self) -> tuple[list[str], np.ndarray]:
        """All C * C captions, and their ids: what zero-shot retrieval searches."""
        ids = np.arange(len(self.pictures.names) ** 2)
        return [self.caption(*divmod(ident, len(self.pictures.names))) for ident in ids.tolist()], ids

    def __getitem__(self, item: int) -> dict[str, Any]:
        batch = self.__getitems__([item])
        return {**batch, "image": batch["image"][0]}

    def __getitems__(self, items: list[int]) -> dict[str, Any]:
        pairs = np.array([self.pair(item) for item in items])  # (B, 2)
        labels = self.pictures.labels[pairs]  # (B, 2)
        left, right = (self.pictures.images[torch.from_numpy(side)] for side in pairs.T)
        ids = torch.from_numpy(labels[:, 0] * len(self.pictures.names) + labels[:, 1])
        return {
            "image": torch.cat([left, right], dim=3),  # (B, 3, 32, 64)
            "text": [self.caption(*pair) for pair in labels.tolist()],
            "image_id": ids,
            "text_id": ids.clone(),
        }


def open_pictures(data_dir: str | Path, split: str = "train", *, cache_dir: str | Path = "cache") -> Pictures:
    """The pictures of a split, so that pairs of two splits never share one.

    `data_dir` holds CIFAR-100's own files (`cifar-100-python/train`, `test`, `meta`), or class folders
    as the reader `class_folders` takes them; their pictures are cut and scaled to 32 x 32. Without a val
    split, a tenth of each class's training pictures is it.

    Raises: LabError if neither is there, or the split does not exist.
    """
    places = (Path(data_dir), Path(data_dir, "cifar-100-python"))
    folders = [place for place in places if (place / "meta").is_file()]
    if not folders:
        return _read_class_folders(data_dir, split, cache_dir)
    if split not in ("train", "val", "test"):
        raise LabError(f"split {split!r} does not exist; CIFAR-100 has train, val, test.")
    return _hold_out(_read_cifar100(folders[0], "test" if split == "test" else "train"), split)


def _read_class_folders(data_dir: str | Path, split: str, cache_dir: str | Path) -> Pictures:
    table = read_captions("class_folders", data_dir)
    has_val = "val" in table.split_sizes()
    part = table.split("train" if split == "val" and not has_val else split)
    cache = ImageCache.open_or_build(part.root, part.paths, size=SIDE, folder=Path(cache_dir) / "images")
    good = np.setdiff1d(np.arange(len(part)), list(cache.bad))
    names = np.unique(np.asarray(table.categories))
    labels = np.searchsorted(names, np.asarray(part.categories)[good])
    pictures = Pictures(cache.gather(good).contiguous(), labels, names.tolist())
    return pictures if has_val else _hold_out(pictures, split)


def _hold_out(pictures: Pictures, split: str) -> Pictures:
    """Of training pictures those of `train` or of `val`, which has the tenth, twentieth ... of each class."""
    if split not in ("train", "val"):
        return pictures
    held = np.zeros(len(pictures.labels), dtype=bool)
    for label in range(len(pictures.names)):
        held[np.flatnonzero(pictures.labels == label)[VAL_EVERY - 1 :: VAL_EVERY]] = True
    mask = held == (split == "val")
    return Pictures(pictures.images[torch.from_numpy(mask)], pictures.labels[mask], pictures.names)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's files are pickles: dictionaries of lists and NumPy arrays, and nothing else is made of them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ARRAY_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return _ArraysOnly(file, encoding="latin1").load()


def _read_cifar100(folder: Path, name: str) -> Pictures:
    try:
        content, meta = _unpickle(folder / name), _unpickle(folder / "meta")
        images = np.array(content["data"], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
        labels = np.array(content["fine_labels"], dtype=np.int64)
        names = [word.replace("_", " ") for word in meta["fine_label_names"]]
    except DAMAGE as error:
        raise LabError(
            f"{folder / name} is none of CIFAR-100's files ({error}); fetch cifar100 again."
        ) from error
    if len(labels) != len(images) or not np.isin(labels, np.arange(len(names))).all():
        raise LabError(f"{folder / name} has labels without pictures or names; fetch cifar100 again.")
    return Pictures(torch.from_numpy(images), labels, names)
