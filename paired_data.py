"""Pairs of small pictures side by side with a caption that names left and right: files, batches and their measure."""

from __future__ import annotations

import functools
import hashlib
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache import as_rows, row_digests
from config import Config
from dataset import Batch, WholeBatch
from encode import cached_text_features
from errors import LabError
from files import fingerprint, read_bytes
from image_cache import ImageCache
from losses import SWAPPED
from models import CLIPModel
from pair_ranks import PairRanks, rank_pairs, swapped
from readers import read_captions

# --- CIFAR's own files, read without executing pickled code ---

Read = TypeVar("Read")
SIDE = 32
MAX_BYTES = 2**30  # of one file; CIFAR-100's largest has 155 MB
OBJECTS = {"_codecs encode", "numpy ndarray", "numpy dtype"} | {
    f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")
}
DAMAGE = (LookupError, ValueError, TypeError, AttributeError)


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
    names = _read_file(folder / layout.meta, lambda content: _names(content[layout.names_key]))
    parts = [
        _read_file(folder / file, lambda content: _part(content, layout.labels_key, len(names)))
        for file in layout.files[split]
    ]
    images, labels = zip(*parts, strict=True)
    return Pictures(torch.from_numpy(np.concatenate(images)), np.concatenate(labels), names)


def _names(words: Any) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("its class names are no list of texts")
    return [word.replace("_", " ") for word in words]


def _part(content: Mapping[str, Any], labels_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3, 32, 32) pixels and (N,) labels of one file."""
    images, labels = _pixels(content["data"]), content[labels_key]
    known = isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)
    if not known or len(labels) != len(images):
        raise ValueError("it has labels without pictures or names")
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
    """What `use` makes of a file's content. Raises: LabError if the file is none of CIFAR's."""
    data = read_bytes(path, MAX_BYTES)
    try:
        return use(_described(data))
    except DAMAGE as error:
        cause = str(error)[:120]
        raise LabError(f"{path} is none of CIFAR's files ({cause}); fetch the set again.") from error


class _Object:
    """An object in a pickle, as the file describes it; nothing is called to make it."""

    def __init__(self, args: Any) -> None:
        self.args, self.state = args, ()


def _described(data: bytes) -> Any:
    """What a pickle describes: dictionaries, lists, tuples, texts, numbers, and NumPy arrays as `_Object`.

    pickle.Unpickler would call what the file names, reserve the sizes it states, and hash nested tuples without
    end; here each of the file's operations makes at most one value of its own size.
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
        raise ValueError("a dictionary has a key that is no text")
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


# --- Small pictures by class ---


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


# --- Pairs ---


CAPTIONS_AT_ONCE = 4096


class PairedPictures(Dataset):
    """Pairs drawn on the fly: pictures (3, S, 2S), captions, ids; batches as `COCOClipDataset` gives them.

    Pair `i` has a picture of its own on the left; which one stands on the right is drawn by (seed, epoch, i).
    A pair's id is left class * C + right class, so every caption that is true of a picture matches it. A batch
    also holds `view_id` (B, 2), numbers that no other half of the epoch has, for augmentation half by half.

    Args:
        pictures: what to draw from.
        split: its name.
        num_pairs: pairs an epoch; None: as many as pictures.
        different_class_prob: probability that the two pictures are of different classes.
        seed: of the draws.
        fixed: the same pairs in every epoch, for evaluation.
        swapped_captions: end a batch with the captions of its pairs with left and right swapped, under the ids
            that swap_loss.SwapMarginLoss looks for.
        text_features: (C * C, width) of all captions in the order of ids; None: captions as texts.
        template: the caption, with {left} and {right}; "a" before them becomes "an" where it must.
    Raises: LabError if a class has too few pictures for such pairs.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        split: str = "train",
        num_pairs: int | None = None,
        different_class_prob: float = 0.5,
        seed: int = 0,
        fixed: bool = False,
        swapped_captions: bool = False,
        text_features: Tensor | None = None,
        template: str = TEMPLATE,
    ) -> None:
        if not 0 <= different_class_prob <= 1:
            raise LabError(f"different_class_prob is a probability, not {different_class_prob}.")
        if "{left}" not in template or "{right}" not in template:
            raise LabError(f"template {template!r} must name {{left}} and {{right}}.")
        self.pictures, self.template, self.split = pictures, template, split
        self.seed, self.fixed, self.epoch = seed, fixed, 0
        self.different_class_prob, self.swapped_captions = different_class_prob, swapped_captions
        self.text_features = text_features
        self.left_out = dict(pictures.left_out)
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

    # --- what it holds ---

    def __len__(self) -> int:
        return self.num_pairs

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.pictures.names)

    @property
    def captions(self) -> list[str]:
        """All C * C captions; a caption's place is its id."""
        names = self.pictures.names
        return [pair_caption(left, right, self.template) for left in names for right in names]

    @property
    def caption_image_ids(self) -> np.ndarray:
        """(C * C,) ids of all captions, as rows of `text_features`."""
        return np.arange(self.num_classes**2)

    def describe(self) -> dict[str, Any]:
        """What it holds, and a digest that tells it from another."""
        pixels = hashlib.sha256(self.pictures.images.contiguous().numpy().tobytes()).hexdigest()
        draws = [str(self.num_pairs), str(self.different_class_prob), str(self.fixed), str(self.seed)]
        told = [*self.captions, *map(str, self.pictures.labels.tolist()), *draws, pixels]
        return {
            "splits": self.split,
            "images": len(self),
            "captions": self.num_classes**2,
            "pictures": len(self.pictures.images),
            "left_out": self.left_out,
            "sha256": fingerprint(told),
            "form": "raw",
        }

    @functools.cached_property
    def image_digests(self) -> np.ndarray:
        """(N,) uint64 digest of each image's pixels."""
        return row_digests(self.pictures.images.flatten(1), np.arange(len(self.pictures.images)))

    # --- draws ---

    @property
    def items_per_epoch(self) -> int:
        """Items that training sees in an epoch."""
        return len(self)

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """(items_per_epoch,) item numbers in the order that training sees them in an epoch."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's pairs; nothing changes where they are fixed."""
        self.epoch = 0 if self.fixed else epoch

    def pair(self, item: int) -> tuple[int, int]:
        """Rows of the left and the right picture."""
        left = int(self.lefts[(self.epoch * self.num_pairs + item) % len(self.lefts)])
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

    # --- batches ---

    def __getitem__(self, item: int) -> Batch:
        batch = self.__getitems__([item])
        return {**batch, "image": batch["image"][0]}

    def __getitems__(self, items: list[int]) -> Batch:
        pairs = np.array([self.pair(item) for item in items])  # (B, 2)
        labels = self.pictures.labels[pairs]  # (B, 2)
        ids = labels[:, 0] * self.num_classes + labels[:, 1]  # (B,)
        rows, text_id = self._told(ids)
        halves = [self.pictures.images[as_rows(side)] for side in pairs.T]
        batch = {
            "image": torch.cat(halves, dim=3),  # (B, 3, S, 2S)
            "text": self._texts(rows),
            "image_id": torch.from_numpy(ids),
            "text_id": torch.from_numpy(text_id),
            "view_id": 2 * torch.tensor(items)[:, None] + torch.arange(2),
        }
        return WholeBatch(batch)

    def _told(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Captions of some pairs, as rows of all captions, and the ids they go by in the batch."""
        if not self.swapped_captions:
            return ids, ids
        mirrored = swapped(ids, self.num_classes)
        ordered = mirrored != ids
        rows = np.concatenate([ids, mirrored[ordered]])
        return rows, np.concatenate([ids, SWAPPED - ids[ordered]])

    def _texts(self, rows: np.ndarray) -> list[str] | Tensor:
        if self.text_features is not None:
            return self.text_features[as_rows(rows)]
        names = self.pictures.names
        sides = [divmod(row, self.num_classes) for row in rows.tolist()]
        return [pair_caption(names[left], names[right], self.template) for left, right in sides]

    # --- measure ---

    @torch.inference_mode()
    def caption_features(self, model: CLIPModel) -> Tensor:
        """(C * C, D) of all captions under a model, on the CPU."""
        device = model.logit_scale.device
        texts: Any = self.captions if self.text_features is None else self.text_features
        pieces = []
        for start in range(0, len(texts), CAPTIONS_AT_ONCE):
            some = texts[start : start + CAPTIONS_AT_ONCE]
            pieces.append(model.encode_text(some.to(device) if isinstance(some, Tensor) else some).cpu())
        return torch.cat(pieces).float()

    def ranks(self, model: CLIPModel, features: dict[str, Tensor]) -> PairRanks:
        """Every picture against all captions.

        Args: features: image_features (P, D) and image_id (P,), as `utils.encode_loader` gives them.
        """
        captions = self.caption_features(model)
        return rank_pairs(features["image_features"], captions, features["image_id"])

    def validation_metrics(
        self, model: CLIPModel, features: dict[str, Tensor], config: Config
    ) -> dict[str, float]:
        """What `pair_ranks.PairRanks.figures` tells; the engine asks for it in place of Recall@K."""
        return self.ranks(model, features).figures()


def open_paired(config: Config, splits: Sequence[str], *, progress: bool = True) -> PairedPictures:
    """The pairs of a split: drawn anew each epoch where it is trained on, else fixed, one for each picture."""
    if len(splits) != 1:
        raise LabError(f"pairs are of one split, not {', '.join(splits)}; name one split at a time.")
    if tuple(splits) != config.train_splits:
        return fixed_pairs(config, splits[0], progress=progress)
    return _open(config, splits[0], progress, num_pairs=config.pairs_per_epoch, seed=config.seed)


def fixed_pairs(
    config: Config, split: str, num_pairs: int | None = None, *, progress: bool = True
) -> PairedPictures:
    """A split's pairs for evaluation, the training split's as well: the same list for every run and seed."""
    return _open(config, split, progress, num_pairs=num_pairs, fixed=True)


def _open(config: Config, split: str, progress: bool, **draws: Any) -> PairedPictures:
    pictures = open_pictures(config.data_dir, split, size=config.image_size, cache_dir=config.cache_dir)
    pairs = PairedPictures(
        pictures if config.max_samples is None else few(pictures, config.max_samples),
        split=split,
        different_class_prob=config.different_class_prob,
        swapped_captions=config.swap_weight > 0,
        **draws,
    )
    if config.text_tower_mode == "cached":
        pairs.text_features = cached_text_features(config, pairs.captions, progress=progress)
    return pairs
