"""Small pictures by class, for pairs: CIFAR's own files or class folders, in splits that share no picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cifar_files import SIDE, Pictures, find_cifar, read_cifar
from errors import LabError
from image_cache import ImageCache
from readers import read_captions

__all__ = ["SIDE", "TEMPLATE", "Pictures", "few", "open_pictures", "pair_caption"]

TEMPLATE = "a photo of a {left} and a {right}"
VAL_EVERY = 10  # of each class's training pictures, one in ten is held out where no val split is there


def pair_caption(left: str, right: str, template: str = TEMPLATE) -> str:
    """The caption of two classes; `a` before a name becomes `an` where it must."""
    text = template
    for side, name in (("left", left), ("right", right)):
        article = "an" if name[0].lower() in "aeiou" else "a"
        text = text.replace(f"a {{{side}}}", f"{article} {{{side}}}").replace(f"{{{side}}}", name)
    return text


def open_pictures(
    data_dir: str | Path, split: str = "train", *, size: int = SIDE, cache_dir: str | Path = "cache"
) -> Pictures:
    """The pictures of a split, so that pairs of two splits never share one.

    `data_dir` holds CIFAR-100's or CIFAR-10's own files as torchvision keeps them, or class folders as the
    reader `class_folders` takes them. Without a val split, a tenth of each class's training pictures is it.

    Args:
        size: side that pictures of class folders are cut and scaled to; CIFAR's are 32 x 32.
        cache_dir: where decoded pictures of class folders are kept.
    Raises: LabError if neither is there, the split does not exist, or CIFAR is asked for another size.
    """
    if find_cifar(data_dir) is None:
        return _read_class_folders(data_dir, split, size, cache_dir)
    if split not in ("train", "val", "test"):
        raise LabError(f"split {split!r} does not exist; CIFAR has train, val, test.")
    if size != SIDE:
        raise LabError(f"CIFAR's pictures are {SIDE} x {SIDE}; set image_size to {SIDE}, not {size}.")
    return _hold_out(read_cifar(data_dir, "test" if split == "test" else "train"), split)


def few(pictures: Pictures, count: int) -> Pictures:
    """At most `count` pictures, two by two from each class in turn, so that every class left makes a pair."""
    within = np.empty(len(pictures.labels), dtype=np.int64)  # a picture's number within its class
    order = np.argsort(pictures.labels, kind="stable")
    sizes = np.bincount(pictures.labels, minlength=len(pictures.names))
    within[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turns = np.lexsort([within % 2, pictures.labels, within // 2])
    return _rows(pictures, np.sort(turns[: count - count % 2]))


def _rows(pictures: Pictures, rows: np.ndarray) -> Pictures:
    return pictures._replace(images=pictures.images[torch.from_numpy(rows)], labels=pictures.labels[rows])


def _read_class_folders(data_dir: str | Path, split: str, size: int, cache_dir: str | Path) -> Pictures:
    table = read_captions("class_folders", data_dir)
    has_val = "val" in table.split_sizes()
    part = table.split("train" if split == "val" and not has_val else split)
    cache = ImageCache.open_or_build(part.root, part.paths, size=size, folder=Path(cache_dir) / "images")
    good = np.setdiff1d(np.arange(len(part)), list(cache.bad))
    names = np.unique(np.asarray(table.categories))
    labels = np.searchsorted(names, np.asarray(part.categories)[good])
    bad = {part.paths[row]: cause for row, cause in cache.bad.items()}
    pictures = Pictures(cache.gather(good).contiguous(), labels, names.tolist(), bad)
    return pictures if has_val else _hold_out(pictures, split)


def _hold_out(pictures: Pictures, split: str) -> Pictures:
    """Of training pictures those of `train` or of `val`, which has the tenth, twentieth ... of each class."""
    if split not in ("train", "val"):
        return pictures
    held = np.zeros(len(pictures.labels), dtype=bool)
    for label in range(len(pictures.names)):
        held[np.flatnonzero(pictures.labels == label)[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return _rows(pictures, np.flatnonzero(held == (split == "val")))
