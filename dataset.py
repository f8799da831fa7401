"""Pairs of small pictures side by side with a caption that names left and right: files, batches and their measure."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from interface import cli

    cli.dataset()
    raise SystemExit

import functools
import hashlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import core.devices  # noqa: F401  before torchvision

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.collate import default_collate_fn_map
from tqdm.auto import tqdm

from config import Config
from core.errors import LabError, choose
from core.files import fingerprint
from core.ids import SWAPPED
from models import CLIPModel
from retrieval.mining import NONE, check_negatives, mine_random, mine_semantic
from sources.check import check, report_table, save_report
from sources.drawing import write_scenes, write_shapes
from sources.embeddings import (
    Pairs,
    Rows,
    as_rows,
    encoders,
    file_splits,
    image_ids,
    joined,
    read_division,
    read_pairs,
    row_digests,
)
from sources.fetch import fetch, is_interrupted, is_linked
from sources.image_cache import ImageCache, open_images
from sources.readers import READERS, read_captions
from sources.side_by_side import (
    TEMPLATE,
    LabeledImages,
    PairRanks,
    open_labeled_images,
    pair_caption,
    rank_pairs,
    subset,
    swapped,
)
from sources.table import CaptionTable
from towers.features import cached_image_features, cached_text_features
from towers.image import build_image_tower
from towers.text import TEXT_SETTINGS, build_text_tower, text_tokenizer
from training.augment import speaks_of_sides, swap_sides, uniforms, variation_number, vary
from training.optim import autocast
from training.order import Balance, nearest_images, neighbour_order, small_categories

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
        pictures: LabeledImages,
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

    def metrics(
        self, model: CLIPModel, features: dict[str, Tensor], config: Config, *, intervals: bool = False
    ) -> dict[str, float]:
        """`PairRanks.figures`, or with intervals `PairRanks.summary`, in place of retrieval metrics."""
        ranks = self.ranks(model, features)
        return ranks.summary() if intervals else ranks.figures()


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
    pictures = open_labeled_images(config.data_dir, split, size=config.image_size, cache_dir=config.cache_dir)
    pairs = PairedPictures(
        pictures if config.max_samples is None else subset(pictures, config.max_samples),
        split=split,
        different_class_prob=config.different_class_prob,
        swapped_captions=config.swap_weight > 0,
        **draws,
    )
    if config.text_tower_mode == "cached":
        pairs.text_features = cached_text_features(config, pairs.captions, progress=progress)
    return pairs


def open_captioned(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """The dataset of some splits, its pictures decoded and its cached features filled."""
    table = load_table(config, tuple(splits))
    texts = (
        cached_text_features(config, table.captions, progress=progress)
        if config.text_tower_mode == "cached"
        else None
    )
    parts: dict[str, Any]
    if config.image_tower_mode == "cached":
        features, images = cached_image_features(config, table, progress=progress)
        parts = {"images": features, "decoded": images}
    else:
        images = open_images(
            table, config.cache_dir, config.image_size, config.image_resize, config.num_workers
        )
        parts = {"images": images}
    return captioned_set(config, tuple(splits), table=table, **parts, text_features=texts)


Batch = dict[str, Any]
"""`image`, `text`, `image_id` (I,), `text_id` (T,); see `COCOClipDataset`."""


class WholeBatch(dict[str, Any]):
    """A batch that torch's own collate function leaves whole: it looks at the first of the items it is given."""

    def __getitem__(self, name: Any) -> Any:
        return self if isinstance(name, int) else super().__getitem__(name)


default_collate_fn_map[WholeBatch] = lambda batch, **options: batch


class COCOClipDataset(Dataset):
    """Images with all their captions, from decoded pictures or cached features.

    An item is `{"image", "text", "image_id": (1,), "text_id": (T,)}`, with categories also `image_match` and
    `text_match` (see CaptionTable.match_ids); `__getitems__` gives many as one
    batch, images (I, 3, S, S) uint8 or (I, width), texts a list of T captions or (T, width).
    Images that cannot be decoded and images without a caption are left out and listed in `left_out`.

    Args:
        split: name of the split, or several joined by "+".
        table: images and captions; None: read from `data_dir` by `reader`.
        images: an ImageCache or (I, width) features, a row for each of the table's images; None: an
            ImageCache of the table's pictures, built at the first use.
        decoded: the images that `images` are features of; None: features made elsewhere.
        text_features: (T, width), a row for each of the table's captions; None: captions as text.
        captions_per_image: draw this many of an image's captions, anew each epoch; None: all.
        seed: of the draw.
        split_seed: of the split by image, where the data has none of its own.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        table: CaptionTable | None = None,
        images: ImageCache | Tensor | None = None,
        decoded: ImageCache | None = None,
        text_features: Tensor | None = None,
        data_dir: str | Path = "data/coco2014",
        reader: str = "coco",
        cache_dir: str | Path = "cache",
        image_size: int = 224,
        image_resize: str = "crop",
        captions_per_image: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        if table is None:
            table = read_captions(reader, data_dir, split_seed=split_seed).split(*split.split("+"))
        if images is None:
            images = open_images(table, cache_dir, image_size, image_resize)
        if len(images) != len(table) or (
            text_features is not None and len(text_features) != len(table.captions)
        ):
            raise LabError(
                "images and text_features need one row for each of the table's images and captions."
            )
        self.split, self.table, self.images, self.text_features = split, table, images, text_features
        self.captions_per_image, self.seed, self.epoch = captions_per_image, seed, 0
        self.decoded = images if isinstance(images, ImageCache) else decoded
        bad = self.decoded.bad if self.decoded is not None else {}
        self.left_out = {table.paths[row]: cause for row, cause in bad.items()}
        silent = np.flatnonzero(np.diff(table.offsets) == 0)
        self.left_out.update({table.paths[row]: "no caption" for row in silent.tolist()})
        dropped = np.union1d(np.fromiter(bad, dtype=np.int64, count=len(bad)), silent)
        self.rows = np.setdiff1d(np.arange(len(table)), dropped)  # items are rows of the table
        if not len(self.rows):
            raise LabError(
                f"split {split!r} in {table.root} holds no usable image; see left_out or run the data check."
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_captions(self) -> int:
        """Captions of the images in use."""
        return int(np.diff(self.table.offsets)[self.rows].sum())

    @property
    def items_per_epoch(self) -> int:
        """Items that training sees in an epoch."""
        return len(self)

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """(items_per_epoch,) item numbers in the order that training sees them in an epoch."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def describe(self) -> dict[str, Any]:
        """What it holds, and a digest that tells it from another.

        The digest covers ids, captions, which images are in use and what these images hold. It does not depend on
        the folder's place or on times, so that a copy of the data is the same data.
        """
        return {
            "splits": self.split,
            "split_source": self.table.split_source,
            "images": len(self),
            "captions": self.num_captions,
            "left_out": self.left_out,
            "sha256": self._digest,
            "form": "features" if self.decoded is None else self.decoded.form,
        }

    @functools.cached_property
    def image_digests(self) -> np.ndarray:
        """(len(self),) uint64 digest of each image in use: of its file, or of its features where it has no file."""
        if self.decoded is None:
            features: Any = self.images
            return row_digests(features, self.rows)
        return self.decoded.contents[self.rows]

    @functools.cached_property
    def _digest(self) -> str:
        table, parts = self.table, [self.image_digests, self.table.image_ids, self.table.caption_image_ids]
        if self.decoded is None and self.text_features is not None:  # not made from the captions here
            parts.append(row_digests(self.text_features, np.arange(len(self.text_features))))
        digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in parts]
        in_use = [table.paths[row] for row in self.rows.tolist()]
        return fingerprint([*digests, *in_use, *table.captions])

    def set_epoch(self, epoch: int) -> None:
        """Draw captions for this epoch; matters only with `captions_per_image`."""
        self.epoch = epoch

    def caption_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the captions of table rows `rows`, and how many each image brings."""
        starts, counts = self.table.offsets[rows], np.diff(self.table.offsets)[rows]
        if self.captions_per_image is None:
            first = np.cumsum(counts) - counts
            return np.repeat(starts - first, counts) + np.arange(counts.sum()), counts
        drawn = [
            self._draw(int(row), int(count)) + start
            for row, start, count in zip(rows, starts, counts, strict=True)
        ]
        return np.concatenate(drawn), np.array([len(some) for some in drawn])

    def _draw(self, row: int, count: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.epoch, int(self.table.image_ids[row])))
        return rng.permutation(count)[: self.captions_per_image]

    def __getitem__(self, item: int) -> Batch:
        batch = self.batch([item])
        return {**batch, "image": batch["image"][0]}

    def __getitems__(self, items: list[int]) -> Batch:
        """What a DataLoader asks for: a whole batch, of a subclass's own items where it makes them itself."""
        if type(self).__getitem__ is not COCOClipDataset.__getitem__:
            return WholeBatch(collate([self[item] for item in items]))
        return WholeBatch(self.batch(items))

    def text_rows(self, items: np.ndarray) -> np.ndarray:
        """Rows of the captions that a batch of some items brings."""
        return self.caption_rows(self.rows[items])[0]

    def batch(self, items: list[int]) -> Batch:
        """Some items as one batch."""
        rows, texts = self.rows[np.asarray(items)], self.text_rows(np.asarray(items))
        return {
            "image": self._images(rows),
            "text": self._texts(texts),
            "image_id": torch.from_numpy(self.table.image_ids[rows]),
            "text_id": torch.from_numpy(self.table.caption_image_ids[texts]),
            **({} if self.table.categories is None else self._matches(rows, texts)),
        }

    def _matches(self, rows: np.ndarray, texts: np.ndarray) -> Batch:
        """What losses compare in place of ids, so that equal captions of one class are not each other's negatives."""
        image, text = self.table.match_ids[rows], self.table.caption_match_ids[texts]
        return {"image_match": torch.from_numpy(image), "text_match": torch.from_numpy(text)}

    def _images(self, rows: np.ndarray) -> Tensor:
        return self.images.gather(rows) if isinstance(self.images, ImageCache) else self.images[as_rows(rows)]

    def _texts(self, rows: np.ndarray) -> list[str] | Tensor:
        if self.text_features is not None:
            return self.text_features[as_rows(rows)]
        return [self.table.captions[row] for row in rows.tolist()]

    def pictures(self, items: list[int]) -> list[Path]:
        """Files of some items' pictures, for figures."""
        return [self.table.path_of(int(row)) for row in self.rows[np.asarray(items, dtype=np.int64)]]


class EpochBatches(Sampler[list[int]]):
    """Batches of item numbers: an order by seed and epoch, from any step on, or one process's share of it.

    The last batch is short; one of a single item, which BatchNorm refuses, joins the batch before it.

    Args:
        batch_size: of all processes together.
        order: epoch -> item numbers in their order; the same count every epoch.
        num_items: how many that are.
        rank, world_size: each of `world_size` processes takes its own run of every batch.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        order: Callable[[int], np.ndarray],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_items, self.batch_size, self.order = num_items, batch_size, order
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        full, rest = divmod(self.num_items, self.batch_size)
        return max(1, full + (rest > 1))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        for step in range(self.start, len(self)):
            stop = self.num_items if step == len(self) - 1 else (step + 1) * self.batch_size
            batch = order[step * self.batch_size : stop]
            yield np.array_split(batch, self.world_size)[self.rank].tolist()


def collate(items: Any) -> Batch:
    """A batch of single items; a whole batch stays as it is.

    Args: items: dictionaries of `image` (3, S, S) or (width,), `text` (a caption, a list of them, (width,) or
        (T, width) features) and `image_id`; `text_id` (T,) where it is not the image's. More keys hold tensors.
    Raises: LabError if an item is something else.
    """
    if isinstance(items, dict):
        return items
    needed = {"image", "text", "image_id"}
    for item in items:
        if not isinstance(item, dict) or not needed <= item.keys():
            raise LabError(
                "an item of a data set is a dictionary with image, text and image_id (a whole number that no other "
                f"image has), not a {type(item).__name__}"
                + (f" of {', '.join(map(str, item))}." if isinstance(item, dict) else ".")
            )
    texts: list[Any] = [
        [text]
        if isinstance(text, str)
        else text[None]
        if isinstance(text, Tensor) and text.ndim == 1
        else text
        for text in (item["text"] for item in items)
    ]
    image_id = torch.tensor([int(item["image_id"]) for item in items])
    text_ids = [
        torch.as_tensor(item.get("text_id", [number] * len(text)))
        for item, number, text in zip(items, image_id.tolist(), texts, strict=True)
    ]
    return {
        "image": torch.stack([torch.as_tensor(item["image"]) for item in items]),
        "text": torch.cat(texts)
        if isinstance(texts[0], Tensor)
        else list(itertools.chain.from_iterable(texts)),
        "image_id": image_id,
        "text_id": torch.cat(text_ids),
        **{
            name: torch.cat([item[name] for item in items]) for name in items[0].keys() - needed - {"text_id"}
        },
    }


def make_loader(
    dataset: Any,
    batch_size: int = 128,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of images, each with its captions; `loader.batch_sampler.epoch` chooses the order.

    Args: dataset: ours, or any of torch's whose items are as `collate` takes them.
    """
    items = getattr(dataset, "items_per_epoch", len(dataset)) if shuffle else len(dataset)

    def order(epoch: int) -> np.ndarray:
        if not shuffle:
            return np.arange(items)
        if hasattr(dataset, "epoch_order"):
            return dataset.epoch_order(epoch, seed)
        return np.random.default_rng((seed, epoch)).permutation(items)

    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(items, batch_size, order, rank=rank, world_size=world_size),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
    )


def load_table(config: Config, splits: tuple[str, ...] | None = None) -> CaptionTable:
    """A configuration's images and captions: all splits, or the named ones.

    With `max_samples`, that many images of each split, evenly spread over it.
    """
    table = read_captions(
        config.reader,
        config.data_dir,
        split_seed=config.split_seed,
        cache_dir=config.cache_dir / "captions",
        follow_links=is_linked(config.data_dir),
        image_root=config.image_root,
        karpathy_file=config.karpathy_file,
        annotation_file=config.annotation_file,
    )
    if splits is None:
        splits = tuple(table.split_sizes())
    rows = []
    for split in splits:
        table.split(split)  # raises the one explanation where it is empty
        found = np.flatnonzero(table.splits == split)
        if config.max_samples is not None and len(found) > config.max_samples:
            found = found[np.linspace(0, len(found) - 1, config.max_samples).astype(np.int64)]
        rows.append(found)
    return table.take(np.concatenate(rows))


DRAWN: dict[str, Callable[[Path], Path]] = {"scenes": write_scenes, "shapes": write_shapes}
"""Sources that are generated on the spot."""


def prepare_data(config: Config) -> Path:
    """Generate or fetch a configuration's data where its folder is missing and is the source's own.

    An interrupted fetch is resumed, whichever set it is; files already on disk are not downloaded again.
    Raises: LabError if another folder was named and does not exist, or the fetch fails.
    """
    folder, source = config.data_dir, config.source
    if (folder / "scenes.unfinished.json").is_file():
        return write_scenes(folder)
    if is_interrupted(folder):
        return fetch(folder.name, folder.parent)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return folder
    if source is None or folder.name != source:
        raise LabError(
            f"data_dir {folder} does not exist or is empty; give the folder of a captioned image set."
        )
    return DRAWN[source](folder) if source in DRAWN else fetch(source, folder.parent)


def split_sizes(config: Config) -> pd.DataFrame:
    """Images in use, their captions and images left out, a row a split; decodes pictures the first time."""
    rows = {}
    for splits in config.split_groups():
        table = load_table(config, splits)
        images = open_images(
            table, config.cache_dir, config.image_size, config.image_resize, config.num_workers
        )
        dataset = COCOClipDataset("+".join(splits), table=table, images=images)
        rows[dataset.split] = [len(dataset), dataset.num_captions, len(dataset.left_out)]
    return pd.DataFrame(rows, index=["images", "captions", "left out"]).T


def check_data(config: Config, folder: str | Path = "outputs/data_check") -> pd.DataFrame:
    """What is wrong with a configuration's pictures and captions, as a table; report and figure in `folder`."""
    from plots.figures import data_report  # imports matplotlib

    tower = text_tokenizer(config.text_tower, config.text_model)
    _, max_length = TEXT_SETTINGS[config.text_tower]
    report = check(load_table(config), tokenizer=tower, max_length=max_length)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_report(report, folder)
    data_report(report, Path(folder) / "data_report.png")
    return report_table(report).set_index("finding")


def fetch_command(name: str, **options: Any) -> None:
    """Download a data set and print its folder."""
    print(fetch(name, **options))


def check_command(folder: str, **fields: Any) -> None:
    """Check a folder of images and captions and print the report."""
    print(check_data(Config(**fields), folder).to_string())
    print(f"{folder}: data_report.json, data_report.png")


# --- The training set ---


OFF: dict[str, Any] = {
    "captions_per_image": None,
    "balance_by": "none",
    "augment_flip": 0.0,
    "augment_word_dropout": 0.0,
    "augment_reorder": 0.0,
    "mining": "none",
    "mining_neighbour_batches": False,
}
"""What only training does, each turned off: a split that is evaluated is opened so."""


class TrainingSet(COCOClipDataset):
    """A COCOClipDataset that training may balance, vary and extend by mined captions; see config.Config.

    Mined captions are further texts of a batch under their own images' ids, so one whose image is in the
    batch too is a match. Where pictures may be flipped, a batch also has `flip` (I,), which of them are.

    Args:
        balance_by: "category" to draw items so that categories come equally often; images of a category
            with fewer than `min_per_category` are left out, and an epoch has at most `max_per_category` of each.
        augment_flip: probability that a picture is flipped; one whose captions name a side is not, unless
            augment_swap_sides exchanges left and right in them.
        augment_word_dropout, augment_reorder, max_caption_variations: of captions as texts.
    Raises: LabError if captions are to be changed but are cached, or categories are missing.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        balance_by: str = "none",
        min_per_category: int = 2,
        max_per_category: int | None = None,
        augment_flip: float = 0.0,
        augment_swap_sides: bool = False,
        augment_word_dropout: float = 0.0,
        augment_reorder: float = 0.0,
        max_caption_variations: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        self.balance: Balance | None = None
        if balance_by != "none":
            self._balance(min_per_category, max_per_category)
        self.word_dropout, self.reorder = augment_word_dropout, augment_reorder
        self.variations = max_caption_variations if augment_word_dropout or augment_reorder else 1
        self.flip = augment_flip if isinstance(self.images, ImageCache) else 0.0
        self.swap_sides = augment_swap_sides and self.flip > 0
        self._check_captions()
        self.upright = np.array([]) if self.swap_sides or not self.flip else self._naming_sides()
        self.mined = np.empty((len(self), 0), dtype=np.int64)  # rows of captions for each item
        self.neighbours = np.empty((len(self), 0), dtype=np.int64)
        self.mined_in: int | None = None  # the epoch
        self.seconds = 0.0

    def _balance(self, minimum: int, maximum: int | None) -> None:
        if self.table.categories is None:
            raise LabError(
                f"balance_by 'category' needs categories, which {self.table.root} does not give; add them or set "
                "balance_by to 'none'."
            )
        categories = self.table.categories[self.rows]
        small = small_categories(categories, minimum)
        for row, name in zip(self.rows.tolist(), categories.tolist(), strict=True):
            if name in small:
                cause = f"category {name!r} has {small[name]} training images, fewer than {minimum}"
                self.left_out[self.table.paths[row]] = cause if name else "no category"
        self.rows = self.rows[~np.isin(categories, list(small))]
        self.balance = Balance(self.table.categories[self.rows], maximum)

    def _check_captions(self) -> None:
        changes = {"augment_word_dropout or augment_reorder": self.word_dropout or self.reorder}
        changes["augment_swap_sides"] = self.swap_sides
        for name, on in changes.items():
            if on and self.text_features is not None:
                raise LabError(
                    f"{name} changes captions, but theirs are cached features; set text_tower_mode to 'frozen' or "
                    "'trainable'."
                )
        if (self.word_dropout or self.reorder) and self.variations < 2:
            raise LabError(
                "augment_word_dropout and augment_reorder make variations of captions; set max_caption_variations "
                "to 2 or more."
            )

    def _naming_sides(self) -> np.ndarray:
        """Ids of the images whose captions name left or right."""
        named = [speaks_of_sides(caption) for caption in self.table.captions]
        return np.unique(self.table.caption_image_ids[named])

    # --- order ---

    @property
    def items_per_epoch(self) -> int:
        return len(self) if self.balance is None else len(self.balance)

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """(items_per_epoch,) items: balanced and neighbours side by side, where asked for."""
        plain = super().epoch_order(epoch, seed) if self.balance is None else self.balance.draw(epoch, seed)
        return neighbour_order(plain, self.neighbours, epoch, seed) if self.neighbours.size else plain

    # --- batches ---

    def text_rows(self, items: np.ndarray) -> np.ndarray:
        """Captions of some items, then their mined ones that are not among them."""
        own = super().text_rows(items)
        mined = np.setdiff1d(self.mined[items], [*own, NONE])
        return np.concatenate([own, mined])

    def _texts(self, rows: np.ndarray) -> list[str] | Tensor:
        if self.variations == 1 or self.text_features is not None:
            return super()._texts(rows)
        return [self._varied(row) for row in rows.tolist()]

    def _varied(self, row: int) -> str:
        number = variation_number(row, self.variations, seed=self.seed, epoch=self.epoch)
        options = {"word_dropout": self.word_dropout, "reorder": self.reorder}
        return vary(self.table.captions[row], number, row, seed=self.seed, **options)

    def batch(self, items: list[int]) -> Batch:
        batch = super().batch(items)
        if not self.flip:
            return batch
        ids = batch["image_id"].numpy()
        flips = uniforms(ids, seed=self.seed, epoch=self.epoch)["flip"] < self.flip
        flips &= ~np.isin(ids, self.upright)
        if self.swap_sides:
            mirrored = np.isin(batch["text_id"].numpy(), ids[flips]).tolist()
            texts = zip(batch["text"], mirrored, strict=True)
            batch["text"] = [swap_sides(text) if turned else text for text, turned in texts]
        return {**batch, "flip": torch.from_numpy(flips)}

    # --- mining ---

    def refresh(self, model: CLIPModel, epoch: int, config: Config) -> None:
        """Mine for the coming epochs under the model as it is, every `mining_refresh_epochs`.

        `seconds` says how long it took; 0 in an epoch that uses what was mined before.
        """
        if epoch == self.mined_in or not (config.mining != "none" or config.mining_neighbour_batches):
            return
        self.seconds = 0.0
        if self.mined_in is not None and epoch < self.mined_in + config.mining_refresh_epochs:
            return
        start = time.perf_counter()
        self._mine(model, epoch, config)
        self.mined_in, self.seconds = epoch, time.perf_counter() - start

    def _mine(self, model: CLIPModel, epoch: int, config: Config) -> None:
        image_id = self.table.image_ids[self.rows]
        texts = np.flatnonzero(np.isin(self.table.caption_image_ids, image_id))  # rows of the table
        text_id = self.table.caption_image_ids[texts]
        told = [self.table.captions[row] for row in texts.tolist()]
        about: Any = (image_id, text_id, told, config.num_mined)
        found = np.empty((len(self), 0), dtype=np.int64)
        if config.mining == "random":
            found = mine_random(*about, seed=self.seed, epoch=epoch)
        if config.mining == "semantic" or config.mining_neighbour_batches:
            images = encode_rows(model.encode_image, self._images, self.rows, model, config)
        if config.mining == "semantic":
            captions = encode_rows(model.encode_text, super()._texts, texts, model, config)
            limits: Any = {"margin": config.mining_margin, "seed": self.seed, "epoch": epoch}
            found = mine_semantic(images, captions, *about, **limits)
        if config.mining_neighbour_batches:
            self.neighbours = nearest_images(images)
        self.mined = np.where(found >= 0, texts[found], NONE)

    def mined_captions(self, item: int) -> list[str]:
        """The captions mined for an item, nearest first."""
        return [self.table.captions[row] for row in self.mined[item].tolist() if row != NONE]

    def state_dict(self) -> dict[str, Any]:
        """What was mined, and when, so that a resumed run goes on with it."""
        return {
            "mined": torch.from_numpy(self.mined),
            "neighbours": torch.from_numpy(self.neighbours),
            "mined_in": self.mined_in,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises: LabError if it is of another number of images."""
        if len(state["mined"]) != len(self):
            raise LabError(
                f"the checkpoint's mined captions are for {len(state['mined'])} images, not {len(self)}; "
                "set resume to 'never'."
            )
        self.mined, self.neighbours = (state[name].cpu().numpy() for name in ("mined", "neighbours"))
        self.mined_in, self.seconds = state["mined_in"], state["seconds"]


@torch.inference_mode()
def encode_rows(
    encode: Callable[[Any], Tensor],
    inputs: Callable[[np.ndarray], Any],
    rows: np.ndarray,
    model: CLIPModel,
    config: Config,
) -> Tensor:
    """(len(rows), D) features under the model in eval mode, on the CPU; the model's mode is put back.

    Args:
        encode: `model.encode_image` or `model.encode_text`.
        inputs: what it takes, of some of the rows.
    """
    training, device = model.training, model.logit_scale.device
    model.eval()
    size = config.micro_batch_size or config.batch_size
    parts = []
    for start in tqdm(range(0, len(rows), size), desc="mining", unit="batch", delay=2, leave=False):
        given = inputs(rows[start : start + size])
        with autocast(config, device):
            parts.append(encode(given.to(device) if isinstance(given, Tensor) else given).float().cpu())
    model.train(training)
    return torch.cat(parts)


def captioned_set(config: Config, splits: tuple[str, ...], **parts: Any) -> COCOClipDataset:
    """The dataset of some splits: a TrainingSet of those trained on, where the configuration asks for one.

    Args: parts: table, images and text_features, as COCOClipDataset takes them.
    Raises: LabError if more negatives are asked for than there are images to bring them.
    """
    parts = {"captions_per_image": config.captions_per_image, "seed": config.seed, **parts}
    if splits != config.train_splits:
        return COCOClipDataset("+".join(splits), **parts)
    wanted = any(config[name] != off for name, off in OFF.items() if name != "captions_per_image")
    taken = inspect.signature(TrainingSet).parameters.keys() & config.keys()
    options = {name: config[name] for name in taken} if wanted else {}
    dataset = (TrainingSet if wanted else COCOClipDataset)("+".join(splits), **{**options, **parts})
    check_negatives(config, len(dataset))
    return dataset


FEATURES_FILE = "features.safetensors"


def open_pairs(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """Splits of the pairwise layout (see `preencoded.read_pairs`).

    Raises: LabError as `read_pairs`, or if an image is both in a split that is trained on and in one that
        is validated or tested on.
    """
    _refuse_leaks(config)
    parts = [read_pairs(config.data_dir, split, config.image_root) for split in splits]
    return _dataset(config, parts, splits)


def open_features(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """Splits of a captioned set in Flickr8k's layout with a file of features beside it.

    `features.safetensors` holds `image_features` (I, W), rows in ascending order of file names, and
    `text_features` (T, V), each image's captions in the order of the captions' file.
    Raises: LabError if the file is missing or does not fit the captions.
    """
    whole = _read_features(config)
    pairs = [whole.take(np.flatnonzero(whole.table.splits == split)) for split in splits]
    for split in splits:
        whole.table.split(split)  # raises the one explanation where it is empty
    return _dataset(config, pairs, splits)


def _read_features(config: Config) -> Pairs:
    folder = config.data_dir
    table = read_captions(
        "flickr8k", folder, split_seed=config.split_seed, cache_dir=config.cache_dir / "captions"
    )
    table = table.take(np.argsort(np.array(table.paths), kind="stable"))
    path = folder / FEATURES_FILE
    try:
        with safe_open(str(path), framework="pt") as file:
            images, texts = file.get_tensor("image_features"), file.get_tensor("text_features")
    except (SafetensorError, OSError) as error:
        raise LabError(
            f"{path} cannot be read ({error}); it needs image_features and text_features."
        ) from error
    if (len(images), len(texts)) != (len(table), len(table.captions)):
        raise LabError(
            f"{path} has {len(images):,} images and {len(texts):,} texts, but {folder} has {len(table):,} and "
            f"{len(table.captions):,}; encode the set anew."
        )
    return Pairs(table, Rows([images]), Rows([texts]))


def _dataset(config: Config, parts: Sequence[Pairs], splits: Sequence[str]) -> COCOClipDataset:
    pairs = joined([_thinned(part, config.max_samples) for part in parts])
    _check_widths(config, pairs)
    return captioned_set(config, tuple(splits), **pairs._asdict())


def _check_widths(config: Config, pairs: Pairs) -> None:
    """Raises: LabError if embeddings have another width than the configuration's towers."""
    sides = (("image", pairs.images, build_image_tower), ("text", pairs.text_features, build_text_tower))
    for side, rows, build in sides:
        if config[f"{side}_tower_mode"] != "cached":
            raise LabError(f"reader {config.reader!r} brings embeddings; set {side}_tower_mode to 'cached'.")
        wanted: Any = build(config).width
        found = rows.shape[1]
        if wanted != found:
            tower = config[f"{side}_tower"]
            raise LabError(
                f"{side} embeddings in {config.data_dir} are {found} numbers wide, but {side}_tower {tower!r} has "
                f"{wanted}; name the tower that made them, or set {side}_tower to 'embeddings' and {side}_width "
                f"to {found}."
            )


def _thinned(pairs: Pairs, max_samples: int | None) -> Pairs:
    """At most so many images, evenly spread."""
    count = len(pairs.table)
    if max_samples is None or count <= max_samples:
        return pairs
    return pairs.take(np.linspace(0, count - 1, max_samples).astype(np.int64))


def _refuse_leaks(config: Config) -> None:
    """Raises: LabError if two of a configuration's groups of splits share images."""
    ids = {
        splits: np.concatenate([image_ids(config.data_dir, split) for split in splits])
        for splits in config.split_groups()
    }
    for first, second in combinations(ids, 2):
        shared = np.intersect1d(ids[first], ids[second])
        if len(shared):
            raise LabError(
                f"splits {'+'.join(first)} and {'+'.join(second)} in {config.data_dir} share {len(shared):,} "
                f"images, such as {shared[0]}; choose other splits, or divide the folder with "
                "`python encode.py split`."
            )


def embeddings_at(path: str | Path) -> dict[str, Any]:
    """The fields of a configuration that open the embeddings at a path.

    Args: path: a folder of the pairwise layout, divided or not, or a features file beside a captioned set.
    Returns: data_dir, reader, the splits, and the towers as far as the files name them.
    Raises: LabError if nothing of the kind is there.
    """
    path = Path(path)
    folder = path.parent if path.name == FEATURES_FILE else path
    if (folder / FEATURES_FILE).is_file():
        return {"data_dir": folder, "reader": "features", "test_splits": ("test",)}
    names = list(read_division(folder).get("splits", {})) or file_splits(folder)
    missing = [name for name in ("train", "val") if name not in names]
    if missing:
        raise LabError(
            f"{folder} has the splits {', '.join(names)} and no {' or '.join(missing)}; divide it with "
            f"`python encode.py split {folder}`."
        )
    tests = tuple(name for name in names if name not in ("train", "tune", "val"))
    splits = {"train_splits": ("train",), "val_splits": ("val",), "test_splits": tests or ("val",)}
    return {"data_dir": folder, "reader": "pairs", **splits, **_towers_of(folder)}


def _towers_of(folder: Path) -> dict[str, Any]:
    """The encoders that a folder's metadata names, or their widths."""
    named = encoders(folder)
    if named:
        return named
    pairs = read_pairs(folder, "train")
    return {
        "image_tower": "embeddings",
        "image_width": pairs.images.shape[1],
        "text_tower": "embeddings",
        "text_width": pairs.text_features.shape[1],
    }


OPENERS: dict[str, Callable[..., Any]] = {
    "pairs": open_pairs,
    "features": open_features,
    "paired_cifar": open_paired,
}
"""Layouts that are no captioned pictures, by `config.reader`: `open(config, splits, progress=True)`."""


def open_dataset(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """The dataset of some splits, its images decoded and its cached features filled.

    Raises: LabError on an unknown reader, or if a split is both trained on and validated on.
    """
    shared = sorted(set(config.train_splits) & set(config.val_splits))
    if shared:
        raise LabError(
            f"train_splits and val_splits share {', '.join(shared)}; the epoch must be chosen on images that are not "
            "trained on."
        )
    openers = {**dict.fromkeys(READERS, open_captioned), **OPENERS}
    return choose(openers, config.reader, "reader")(config, splits, progress=progress)
