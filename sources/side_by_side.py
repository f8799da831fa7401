"""Side-by-side images (lab 2): the labeled images they consist of, and the rank of the right caption among C * C."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from core.errors import LabError
from core.files import read_bytes
from retrieval.statistics import bootstrap_ends
from sources.image_cache import ImageCache
from sources.readers import read_captions

KS = (1, 10, 100)
ROWS_AT_ONCE = 1024  # images scored together: 40 MB against 10,000 captions
Figure = tuple[np.ndarray, np.ndarray]  # (P,) what each image adds, (P,) whether it counts


@dataclass(frozen=True)
class PairRanks:
    """Results of P images against the captions of all ordered pairs of C classes.

    Args:
        truth: (P,) left class * C + right class of each image.
        rank: (P,) of the right caption, 1 is the nearest; ties count against it.
        first: (P,) the nearest caption, as `truth`.
        in_order: (P,) whether the right caption scores above the one with left and right swapped.
        num_classes: C.
    """

    truth: np.ndarray
    rank: np.ndarray
    first: np.ndarray
    in_order: np.ndarray
    num_classes: int

    @property
    def different(self) -> np.ndarray:
        """(P,) whether left and right are of different classes; only then can the order be wrong."""
        return self.truth != swapped(self.truth, self.num_classes)

    @property
    def is_swapped(self) -> np.ndarray:
        """(P,) whether the nearest caption is the right pair in the wrong order."""
        return self.different & (self.first == swapped(self.truth, self.num_classes))

    def values(self) -> dict[str, Figure]:
        """Each figure as what images add to it and which images count."""
        everywhere, different = np.ones(len(self.truth), dtype=bool), self.different
        hits = {k: self.rank <= k for k in KS if k < self.num_classes**2}
        figures = {f"top{k}": (hit, everywhere) for k, hit in hits.items()} | {
            "top1_same": (hits[1], ~different),
            "top1_different": (hits[1], different),
            "swapped": (self.is_swapped, different),
            "order": (self.in_order, different),
        }
        return {name: (value.astype(float), mask) for name, (value, mask) in figures.items() if mask.any()}

    def figures(self) -> dict[str, float]:
        """Shares of images, in [0, 1].

        `top1`, `top10`, `top100`: the right caption is among the nearest. `top1_same`, `top1_different`: the same
        for images of one class twice, and of two classes. Of the latter, `swapped`: the nearest caption is the
        right pair in the wrong order; `order`: the right order scores above the wrong one, 0.5 by chance.
        """
        return {name: float(value[mask].mean()) for name, (value, mask) in self.values().items()}

    def intervals(
        self, samples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals over images; variation between training seeds is not included.

        Source: Efron & Tibshirani 1993, chapter 13.
        """
        figures = self.values()

        def shares(counts: np.ndarray) -> np.ndarray:  # never over 0 in practice: a figure has many images
            parts = [
                counts @ (value * mask) / np.maximum(counts @ mask, 1) for value, mask in figures.values()
            ]
            return np.stack(parts)

        ends = bootstrap_ends(len(self.truth), shares, samples, level, seed)
        return {name: (float(low), float(high)) for name, low, high in zip(figures, *ends, strict=True)}

    def summary(self) -> dict[str, float]:
        """The figures with the ends of their 95 % intervals, chance levels, and counts."""
        figures, captions = self.figures(), self.num_classes**2
        ends = {f"{name}_{end}": value for name, of in self.intervals().items()
                for end, value in zip(("low", "high"), of, strict=True)}  # fmt: skip
        chance = {f"top{k}_chance": k / captions for k in KS if f"top{k}" in figures}
        counts = {"num_different": int(self.different.sum()), "num_swapped": int(self.is_swapped.sum())}
        return {**figures, **ends, **chance, "num_texts": captions, **counts}

    def by_class(self, names: Sequence[str]) -> pd.DataFrame:
        """One row per class, shares in [0, 1]: how many images show it, their top-1, how often the nearest caption
        names it on the left and on the right if it is there; of images with two classes, the share swapped."""
        left, right = np.divmod(self.truth, self.num_classes)
        named_left, named_right = np.divmod(self.first, self.num_classes)
        rows = []
        for label, name in enumerate(names):
            shows_it = (left == label) | (right == label)
            rows.append(
                {
                    "class": name,
                    "images": int(shows_it.sum()),
                    "top1": _mean(self.rank[shows_it] == 1),
                    "named on the left": _mean(named_left[left == label] == label),
                    "named on the right": _mean(named_right[right == label] == label),
                    "swapped": _mean(self.is_swapped[shows_it & self.different]),
                }
            )
        return pd.DataFrame(rows).set_index("class")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def swapped(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """The ids of the same pairs with left and right exchanged."""
    left, right = np.divmod(ids, num_classes)
    return right * num_classes + left


def rank_pairs(image_features: Tensor, caption_features: Tensor, image_id: Tensor) -> PairRanks:
    """Rank every caption for every image.

    Args:
        image_features: (P, D). caption_features: (C * C, D), row left * C + right. Both normalized.
        image_id: (P,) left * C + right of each image.
    Raises: LabError if the captions are not of all ordered pairs, or features are not finite.
    """
    num_classes = round(len(caption_features) ** 0.5)
    if num_classes**2 != len(caption_features):
        raise LabError(
            f"{len(caption_features)} captions are not those of all ordered pairs of classes; give C * C rows."
        )
    truth = image_id.cpu().numpy()
    mirrored = torch.from_numpy(swapped(truth, num_classes))
    pieces = [
        _score(image_features[rows], caption_features, image_id[rows], mirrored[rows])
        for rows in torch.arange(len(truth)).split(ROWS_AT_ONCE)
    ]
    rank, first, in_order = (torch.cat(part).numpy() for part in zip(*pieces, strict=True))
    return PairRanks(truth, rank, first, in_order, num_classes)


def _score(images: Tensor, captions: Tensor, own: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rank, nearest caption and order of some images."""
    scores = images @ captions.T  # (p, C * C)
    if not torch.isfinite(scores).all():
        raise LabError("features are not finite; lower learning_rate and train again.")
    score = scores.gather(1, own[:, None])  # (p, 1)
    rank = (scores >= score).sum(dim=1)  # itself and all that score at least as high
    rival = scores.scatter(1, own[:, None], -torch.inf).argmax(dim=1)
    first = torch.where(rank == 1, own, rival)
    return rank, first, (score > scores.gather(1, mirrored[:, None]))[:, 0]


# --- CIFAR's own files, read without executing pickled code ---

Read = TypeVar("Read")
SIDE = 32
MAX_BYTES = 2**30  # of one file; CIFAR-100's largest has 155 MB
OBJECTS = {"_codecs encode", "numpy ndarray", "numpy dtype"} | {
    f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")
}
DAMAGE = (LookupError, ValueError, TypeError, AttributeError)


class LabeledImages(NamedTuple):
    """images: (N, 3, 32, 32) uint8. labels: (N,) class of each. names: the C classes. left_out: file -> cause."""

    images: Tensor
    labels: np.ndarray
    names: list[str]
    left_out: Mapping[str, str] = MappingProxyType({})


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
        for place in (Path(data_dir), Path(data_dir, layout.folder)):
            if (place / layout.meta).is_file():
                return place, layout
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


def _read_file(path: Path, use: Callable[[Mapping[str, Any]], Read]) -> Read:
    """What `use` makes of a file's content. Raises: LabError if it is not a file of CIFAR."""
    data = read_bytes(path, MAX_BYTES)
    try:
        return use(_described(data))
    except DAMAGE as error:
        cause = str(error)[:120]
        raise LabError(f"{path} is not one of CIFAR's files ({cause}); download the set again.") from error


class _Object:
    """An object in a pickle, as the file describes it; nothing is called to make it."""

    def __init__(self, args: Any) -> None:
        self.args, self.state = args, ()


def _described(data: bytes) -> Any:
    """What a pickle describes: dictionaries, lists, tuples, texts, numbers, and NumPy arrays as `_Object`.

    pickle.Unpickler would call what the file names, reserve the sizes it states, and hash nested tuples
    endlessly; here each of the file's operations makes at most one value of its own size.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def popped(start: int) -> list[Any]:
        values = stack[start:]
        del stack[start:]
        return values

    for operation, value, _ in pickletools.genops(data):
        name = operation.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE" or name.endswith("PUT"):
            memo[int(len(memo) if value is None else value)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[int(value or 0)])
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in COLLECTIONS:
            start = len(stack) - int(name[-1]) if name[-1].isdigit() else marks.pop()
            stack.append(COLLECTIONS[name](popped(start)))
        elif name in ("APPEND", "APPENDS"):
            values = popped(marks.pop() if name == "APPENDS" else len(stack) - 1)
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = popped(marks.pop() if name == "SETITEMS" else len(stack) - 2)
            stack[-1].update(_dictionary(values))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            value = " ".join(popped(len(stack) - 2)) if value is None else value
            if value not in OBJECTS:
                raise ValueError(f"it asks for {value.replace(' ', '.')}")
            stack.append(value)
        elif name == "REDUCE":
            function, args = popped(len(stack) - 2)
            stack.append(args[0].encode("latin1") if function == "_codecs encode" else _Object(args))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif isinstance(value, (str, bytes, int)):
            stack.append(value)
        else:
            raise ValueError(f"it asks for the operation {name}")
    return stack[-1]


def _dictionary(values: list[Any]) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in values[::2]):
        raise ValueError("a dictionary has a key that is not text")
    return dict(zip(values[::2], values[1::2], strict=True))


CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
COLLECTIONS: Mapping[str, Callable[[list[Any]], Any]] = {
    "LIST": list,
    "DICT": _dictionary,
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), tuple),
}

TEMPLATE = "a photo of a {left} and a {right}"
VAL_EVERY = 10  # one in ten of each class's training images is held out if there is no val split


def pair_caption(left: str, right: str, template: str = TEMPLATE) -> str:
    """The caption of two classes; `a` before a name becomes `an` where English needs it."""
    text = template
    for side, name in (("left", left), ("right", right)):
        article = "an" if name[0].lower() in "aeiou" else "a"
        text = text.replace(f"a {{{side}}}", f"{article} {{{side}}}").replace(f"{{{side}}}", name)
    return text


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
    return _rows(images, np.sort(turns[: count - count % 2]))


def _rows(images: LabeledImages, rows: np.ndarray) -> LabeledImages:
    return images._replace(images=images.images[torch.from_numpy(rows)], labels=images.labels[rows])


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
    return _rows(images, np.flatnonzero(held == (split == "val")))
