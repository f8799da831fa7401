"""CIFAR-10's and CIFAR-100's own files, as torchvision keeps them, read without executing pickled code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import LabError

SIDE = 32
ARRAY_PARTS = {("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
}
DAMAGE = (OSError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError)


class Pictures(NamedTuple):
    """images: (N, 3, 32, 32) uint8. labels: (N,) class of each. names: (C,) the classes. left_out: file -> cause."""

    images: Tensor
    labels: np.ndarray
    names: list[str]
    left_out: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Layout:
    """Names of a set's files by split, and of what stands in them."""

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
        for place in (Path(data_dir), Path(data_dir, layout.folder)):
            if (place / layout.meta).is_file():
                return place, layout
    return None


def read_cifar(data_dir: str | Path, split: str = "test") -> Pictures:
    """The pictures of split `train` or `test`.

    Raises: LabError if there are no such files, or one is damaged.
    """
    found = find_cifar(data_dir)
    if found is None:
        wanted = " or ".join(layout.folder for layout in LAYOUTS.values())
        raise LabError(f"{data_dir} holds no {wanted}; download CIFAR with torchvision, or fetch cifar100.")
    folder, layout = found
    if split not in layout.files:
        raise LabError(f"split {split!r} does not exist; CIFAR's files have {', '.join(layout.files)}.")
    names = [str(word).replace("_", " ") for word in _unpickle(folder / layout.meta, layout.names_key)]
    parts = [_read_part(folder / file, layout.labels_key, len(names)) for file in layout.files[split]]
    images, labels = zip(*parts, strict=True)
    return Pictures(torch.from_numpy(np.concatenate(images)), np.concatenate(labels), names)


def _read_part(path: Path, labels_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3, 32, 32) pixels and (N,) labels of one file."""
    data, labels = _unpickle(path, "data"), np.array(_unpickle(path, labels_key), dtype=np.int64)
    try:
        images = np.array(data, dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
    except DAMAGE as error:
        raise _damaged(path, error) from error
    if len(labels) != len(images) or not np.isin(labels, np.arange(classes)).all():
        raise LabError(f"{path} has labels without pictures or names; fetch the set again.")
    return images, labels


class _ArraysOnly(pickle.Unpickler):
    """Makes dictionaries, lists and NumPy arrays of a pickle, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ARRAY_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path, key: str) -> Any:
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()[key]
    except DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> LabError:
    return LabError(f"{path} is none of CIFAR's files ({error}); fetch the set again.")
