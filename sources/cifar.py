"""Small labeled images: CIFAR's own files, read without running code in them, or class folders."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from core.errors import LabError
from core.files import read_bytes
from sources.image_cache import ImageCache
from sources.readers import read_captions

Content = TypeVar("Content")
SIDE = 32
MAX_BYTES = 2**30  # of one file; CIFAR-100's largest has 155 MB
VAL_EVERY = 10  # one in ten of each class's training images is held out if there is no val split
NUMPY_NAMES = {"_reconstruct", "ndarray", "dtype"}
DAMAGE = (
    LookupError, ValueError, TypeError, AttributeError, EOFError, MemoryError, OverflowError, pickle.UnpicklingError,
)  # fmt: skip


class LabeledImages(NamedTuple):
    """images: (N, 3, S, S) uint8. labels: (N,) class of each. names: the C classes. left_out: file -> cause."""

    images: Tensor
    labels: np.ndarray
    names: list[str]
    left_out: Mapping[str, str] = MappingProxyType({})

    def take(self, rows: np.ndarray) -> LabeledImages:
        """Some of the images."""
        return self._replace(images=self.images[torch.from_numpy(rows)], labels=self.labels[rows])


# --- CIFAR's own files ---


@dataclass(frozen=True)
class Layout:
    """Names of a set's files by split, and of what they contain."""

    folder: str
    files: Mapping[str, tuple[str, ...]]
    meta: str
    labels_key: str
    names_key: str


LAYOUTS: Mapping[str, Layout] = {
    "cifar10": Layout(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": Layout(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "meta",
        "fine_labels",
        "fine_label_names",
    ),
}


def find_cifar(data_dir: str | Path) -> tuple[Path, Layout] | None:
    """The folder of CIFAR's files, `data_dir` itself or the one torchvision makes in it; None without any."""
    for layout in LAYOUTS.values():
        for folder in (Path(data_dir), Path(data_dir, layout.folder)):
            if (folder / layout.meta).is_file():
                return folder, layout
    return None


def read_cifar(data_dir: str | Path, split: str = "test") -> LabeledImages:
    """The images of split `train` or `test`.

    Raises: LabError if there are no such files, or one is damaged.
    """
    location = find_cifar(data_dir)
    if location is None:
        folders = " or ".join(layout.folder for layout in LAYOUTS.values())
        raise LabError(f"{data_dir} has no {folders}; download CIFAR with torchvision, or fetch cifar100.")
    folder, layout = location
    if split not in layout.files:
        raise LabError(f"split {split!r} does not exist; CIFAR's files have {', '.join(layout.files)}.")
    names = _read_file(folder / layout.meta, lambda content: _names(content[layout.names_key]))
    parts = [
        _read_file(folder / file, lambda content: _part(content, layout.labels_key, len(names)))
        for file in layout.files[split]
    ]
    images, labels = zip(*parts, strict=True)
    return LabeledImages(torch.from_numpy(np.concatenate(images)), np.concatenate(labels), names)


def _names(words: Any) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("its class names are not a list of texts")
    return [word.replace("_", " ") for word in words]


def _part(content: Mapping[str, Any], labels_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3, 32, 32) pixels and (N,) labels of one file."""
    images, labels = _pixels(content["data"]), content[labels_key]
    known = isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)
    if not known or len(labels) != len(images):
        raise ValueError("it has labels without images or names")
    return images, np.array(labels, dtype=np.int64)


def _pixels(array: Any) -> np.ndarray:
    """(N, 3, 32, 32) uint8 of a pickled NumPy array; its shape follows from its bytes, not from the file."""
    _, _, dtype, fortran, data = array.state
    if dtype.args[0] not in ("u1", "uint8"):
        raise ValueError(f"its pixels are of type {dtype.args[0]!r}, not u1")
    data = data.encode("latin1") if isinstance(data, str) else data
    rows = np.frombuffer(data, dtype=np.uint8).reshape((-1, 3 * SIDE * SIDE), order="F" if fortran else "C")
    return rows.reshape(-1, 3, SIDE, SIDE)


def _read_file(path: Path, use: Callable[[Mapping[str, Any]], Content]) -> Content:
    """What `use` makes of a file's content. Raises: LabError if it is not a file of CIFAR."""
    data = read_bytes(path, MAX_BYTES)
    try:
        return use(_Unpickler(io.BytesIO(data), encoding="latin1").load())
    except DAMAGE as error:
        cause = str(error)[:120]
        raise LabError(f"{path} is not one of CIFAR's files ({cause}); download the set again.") from error


class _Object:
    """A NumPy object as the file describes it; NumPy is not called to make it."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, texts and numbers, and NumPy arrays as `_Object`; calls nothing a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if module.split(".")[0] == "numpy" and name in NUMPY_NAMES:
            return _Object
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# --- Either layout ---


def open_labeled_images(
    data_dir: str | Path, split: str = "train", *, size: int = SIDE, cache_dir: str | Path = "cache"
) -> LabeledImages:
    """The images of a split; no two splits share one.

    `data_dir` has CIFAR-100's or CIFAR-10's own files as torchvision stores them, or class folders as for the reader
    `class_folders`. Without a val split, a tenth of each class's training images is used as one.

    Args:
        size: side that images of class folders are cropped and scaled to; CIFAR's are 32 x 32.
        cache_dir: where decoded images of class folders are kept.
    Raises: LabError if there is neither, the split does not exist, or the size is not CIFAR's.
    """
    if find_cifar(data_dir) is None:
        return _read_class_folders(data_dir, split, size, cache_dir)
    if split not in ("train", "val", "test"):
        raise LabError(f"split {split!r} does not exist; CIFAR has train, val, test.")
    if size != SIDE:
        raise LabError(f"CIFAR's images are {SIDE} x {SIDE}; set image_size to {SIDE}, not {size}.")
    return _hold_out(read_cifar(data_dir, "test" if split == "test" else "train"), split)


def subset(images: LabeledImages, count: int) -> LabeledImages:
    """At most `count` images, two from each class in turn, so that every remaining class can form a pair."""
    within = np.empty(len(images.labels), dtype=np.int64)  # an image's number within its class
    order = np.argsort(images.labels, kind="stable")
    sizes = np.bincount(images.labels, minlength=len(images.names))
    within[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turns = np.lexsort([within % 2, images.labels, within // 2])
    return images.take(np.sort(turns[: count - count % 2]))


def _read_class_folders(data_dir: str | Path, split: str, size: int, cache_dir: str | Path) -> LabeledImages:
    table = read_captions("class_folders", data_dir)
    has_val = "val" in table.split_sizes()
    part = table.split("train" if split == "val" and not has_val else split)
    cache = ImageCache.open_or_build(part.root, part.paths, size=size, folder=Path(cache_dir) / "images")
    good = np.setdiff1d(np.arange(len(part)), list(cache.bad))
    names = np.unique(np.asarray(table.categories))
    labels = np.searchsorted(names, np.asarray(part.categories)[good])
    bad = {part.paths[row]: cause for row, cause in cache.bad.items()}
    images = LabeledImages(cache.gather(good).contiguous(), labels, names.tolist(), bad)
    return images if has_val else _hold_out(images, split)


def _hold_out(images: LabeledImages, split: str) -> LabeledImages:
    """Of training images those of `train`, or of `val`, which has the tenth, twentieth ... of each class."""
    if split not in ("train", "val"):
        return images
    held = np.zeros(len(images.labels), dtype=bool)
    for label in range(len(images.names)):
        held[np.flatnonzero(images.labels == label)[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return images.take(np.flatnonzero(held == (split == "val")))
