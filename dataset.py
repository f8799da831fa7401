"""The data sets: images with their captions, their batches and how they are opened, downloaded and checked."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from interface import cli

    cli.dataset()
    raise SystemExit
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.devices import encode_in_batches  # before torchvision

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from config import Config
from core.errors import LabError, choose
from core.files import fingerprint
from core.ids import Batch, ImageTextDataset, WholeBatch
from models import CLIPModel
from retrieval.mining import NONE, check_negatives, mine_random, mine_semantic
from sources.check import check, report_table, save_report
from sources.cifar import open_labeled_images, subset
from sources.drawing import write_scenes, write_shapes
from sources.embeddings import (
    Pairs,
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
from sources.readers import LAYOUTS, READERS, read_captions, recognize
from sources.side_by_side import PairedImages
from sources.table import CaptionTable
from towers.features import cached_image_features, cached_text_features
from towers.image import build_image_tower
from towers.text import TEXT_SETTINGS, build_text_tower, text_tokenizer
from training.augment import speaks_of_sides, swap_sides, uniforms, variation_number, vary
from training.distributed import is_main
from training.identity import identity
from training.optim import autocast
from training.order import (
    Balance,
    EpochBatches,
    evenly_spread,
    nearest_images,
    neighbour_order,
    small_categories,
)


class COCOClipDataset(ImageTextDataset):
    """Images with all their captions, from decoded images or cached features.

    An item is `{"image", "text", "image_id": (1,), "text_id": (T,)}`, with categories also `image_match` and
    `text_match` (see CaptionTable.match_ids). `__getitems__` returns several items as one batch: images
    (I, 3, S, S) uint8 or (I, width), texts a list of T captions or (T, width).
    Images that cannot be decoded or have no caption are left out and listed in `left_out`.

    Args:
        split: name of the split, or several joined by "+".
        table: images and captions; None: read from `data_dir` by `reader`.
        images: an ImageCache or (I, width) features, one row per image of the table; None: an ImageCache of
            the table's images, built at the first use.
        decoded: the images that the features in `images` were computed from; None: computed elsewhere.
        text_features: (T, width), one row per caption of the table; None: captions as text.
        captions_per_image: draw this many of an image's captions in each epoch; None: all.
        seed: of these draws.
        split_seed: of the division by image, where the data has no splits of its own.
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
        reader: str = "auto",
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
        self.left_out: dict[str, str] = {table.paths[row]: cause for row, cause in bad.items()}
        silent = np.flatnonzero(np.diff(table.offsets) == 0)
        self.left_out.update({table.paths[row]: "no caption" for row in silent.tolist()})
        dropped = np.union1d(np.fromiter(bad, dtype=np.int64, count=len(bad)), silent)
        self.rows = np.setdiff1d(np.arange(len(table)), dropped)  # items are rows of the table
        if not len(self.rows):
            raise LabError(
                f"split {split!r} in {table.root} has no usable image; run `python dataset.py check {table.root}`."
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_captions(self) -> int:
        """Captions of the images in use."""
        return int(np.diff(self.table.offsets)[self.rows].sum())

    @property
    def caption_match_ids(self) -> np.ndarray:
        return self.table.caption_match_ids

    def describe(self) -> dict[str, Any]:
        """Sizes, what was left out, and a digest of the content.

        The digest covers ids, captions, which images are in use and their content. It does not depend on paths
        or times: a copy of the data has the same digest.
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
        if self.decoded is None and self.text_features is not None:  # not computed from the captions
            parts.append(row_digests(self.text_features, np.arange(len(self.text_features))))
        digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in parts]
        in_use = [table.paths[row] for row in self.rows.tolist()]
        return fingerprint([*digests, *in_use, *table.captions])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the draws; has an effect only with `captions_per_image`."""
        self.epoch = epoch

    def caption_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the captions of the table's images `rows`."""
        if self.captions_per_image is None:
            return self.table.caption_rows(rows)
        return np.concatenate([self._draw(row) for row in rows.tolist()])

    def _draw(self, row: int) -> np.ndarray:
        """Some of the caption rows of an image."""
        start, stop = self.table.offsets[row : row + 2]
        rng = np.random.default_rng((self.seed, self.epoch, int(self.table.image_ids[row])))
        return start + rng.permutation(stop - start)[: self.captions_per_image]

    def __getitem__(self, item: int) -> Batch:
        batch = self.batch([item])
        return {**batch, "image": batch["image"][0]}

    def __getitems__(self, items: list[int]) -> Batch:
        """What a DataLoader calls: one batch, collated from single items where a subclass has its own `__getitem__`."""
        if type(self).__getitem__ is not COCOClipDataset.__getitem__:
            return WholeBatch(collate([self[item] for item in items]))
        return WholeBatch(self.batch(items))

    def text_rows(self, items: np.ndarray) -> np.ndarray:
        """Rows of the captions that a batch of these items contains."""
        return self.caption_rows(self.rows[items])

    def batch(self, items: list[int]) -> Batch:
        """Some items as one batch."""
        rows, texts = self.rows[np.asarray(items)], self.text_rows(np.asarray(items))
        batch = {
            "image": self._images(rows),
            "text": self._texts(texts),
            "image_id": torch.from_numpy(self.table.image_ids[rows]),
            "text_id": torch.from_numpy(self.table.caption_image_ids[texts]),
        }
        if self.table.categories is None:
            return batch
        # Compared in place of ids: equal captions of one class are not each other's negatives.
        image, text = self.table.match_ids[rows], self.table.caption_match_ids[texts]
        return {**batch, "image_match": torch.from_numpy(image), "text_match": torch.from_numpy(text)}

    def _images(self, rows: np.ndarray) -> Tensor:
        return self.images.gather(rows) if isinstance(self.images, ImageCache) else self.images[as_rows(rows)]

    def _texts(self, rows: np.ndarray) -> list[str] | Tensor:
        if self.text_features is not None:
            return self.text_features[as_rows(rows)]
        return [self.table.captions[row] for row in rows.tolist()]

    def image_files(self, items: list[int]) -> list[Path]:
        """Image files of some items, for figures."""
        return [self.table.path_of(int(row)) for row in self.rows[np.asarray(items, dtype=np.int64)]]


def collate(items: Any) -> Batch:
    """Single items as one batch; a complete batch is returned unchanged.

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
    texts = [_several(item["text"]) for item in items]
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


def _several(text: Any) -> Any:
    """An item's captions, where it may have a single one."""
    if isinstance(text, str):
        return [text]
    return text[None] if isinstance(text, Tensor) and text.ndim == 1 else text


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
    dataset = with_defaults(dataset)
    count = dataset.items_per_epoch if shuffle else len(dataset)

    def order(epoch: int) -> np.ndarray:
        return dataset.epoch_order(epoch, seed) if shuffle else np.arange(count)

    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(count, batch_size, order, rank=rank, world_size=world_size),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
    )


OFF: dict[str, Any] = {
    "captions_per_image": None,
    "balance_by": "none",
    "augment_flip": 0.0,
    "augment_word_dropout": 0.0,
    "augment_reorder": 0.0,
    "mining": "none",
    "mining_neighbour_batches": False,
}
"""Settings of training alone, each turned off, as a split is opened for evaluation."""


def open_dataset(
    config: Config, splits: Sequence[str], *, evaluation: bool = False, progress: bool = True
) -> Any:
    """The data set of some splits, a COCOClipDataset or PairedImages, its images decoded and its features cached.

    Args: evaluation: without the settings of training alone, even for a split that is trained on.
    Raises: LabError on an unknown reader, or if a split is both trained on and validated on.
    """
    shared = sorted(set(config.train_splits) & set(config.val_splits))
    if shared:
        raise LabError(
            f"train_splits and val_splits share {', '.join(shared)}; the epoch must be chosen on images that are not "
            "trained on."
        )
    openers = {**dict.fromkeys(READERS, _open_captioned), **OPENERS}
    open_splits = choose(openers, config.reader.removeprefix("auto:"), "reader")
    config = config.updated(**OFF) if evaluation else config
    trains = tuple(splits) == config.train_splits and not evaluation
    return open_splits(config, tuple(splits), trains, progress)


DRAWN: dict[str, Callable[[Path], Path]] = {"scenes": write_scenes, "shapes": write_shapes}
"""Sources that are generated on the spot."""


def prepare_data(config: Config) -> Path:
    """Generate or download a configuration's data where its folder is missing and named after the source.

    An interrupted fetch is resumed, whichever set it is; files already on disk are not downloaded again. A reader
    that is recognized is printed.
    Raises: LabError if another folder was named and does not exist, the fetch fails, or no reader is recognized.
    """
    folder = _fetched(config)
    reader = recognized(config).reader.removeprefix("auto:")
    if config.reader == "auto" and is_main():
        print(f"{folder} is read by reader {reader!r}: {LAYOUTS[reader][0]}")
    return folder


def _fetched(config: Config) -> Path:
    folder, source = config.data_dir, config.source
    if is_interrupted(folder):
        return fetch(folder.name, folder.parent)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return folder
    if source is None or folder.name != source:
        raise LabError(
            f"data_dir {folder} does not exist or is empty; give the folder of a captioned image set."
        )
    return DRAWN[source](folder) if source in DRAWN else fetch(source, folder.parent)


def recognized(config: Config) -> Config:
    """The configuration with the reader recognized, as `auto:json`, if it is `auto`."""
    if config.reader != "auto":
        return config
    return config.updated(reader=f"auto:{recognize(config.data_dir, **_files(config))}")


def _files(config: Config) -> dict[str, Any]:
    """What `read_captions` and `recognize` need of a configuration."""
    return {
        "follow_links": is_linked(config.data_dir),
        "image_root": config.image_root,
        "karpathy_file": config.karpathy_file,
        "annotation_file": config.annotation_file,
    }


def load_table(config: Config, splits: tuple[str, ...] | None = None) -> CaptionTable:
    """A configuration's images and captions, of all splits or the named ones; `max_samples` limits each split."""
    table = read_captions(
        config.reader,
        config.data_dir,
        split_seed=config.split_seed,
        cache_dir=config.cache_dir / "captions",
        **{name: config[name] for name in ("image_column", "caption_column", "split_column")},
        **_files(config),
    )
    if splits is None:
        splits = tuple(table.split_sizes())
    rows = []
    for split in splits:
        table.split(split)  # an error that lists the splits, where this one is empty
        in_split = np.flatnonzero(table.splits == split)
        rows.append(in_split[evenly_spread(len(in_split), config.max_samples)])
    return table.take(np.concatenate(rows))


# --- Openers, by reader ---


def _open_captioned(config: Config, splits: tuple[str, ...], trains: bool, progress: bool) -> COCOClipDataset:
    """Images with captions; either side may be cached features."""
    table = load_table(config, splits)
    texts = None
    if config.text_tower_mode == "cached":
        texts = cached_text_features(config, table.captions, progress=progress)
    images: Any
    if config.image_tower_mode == "cached":
        images, decoded = cached_image_features(config, table, progress=progress)
    else:
        images = decoded = open_images(
            table, config.cache_dir, config.image_size, config.image_resize, config.num_workers
        )
    return _captioned(
        config, splits, trains, table=table, images=images, decoded=decoded, text_features=texts
    )


def _open_embeddings(
    config: Config, splits: tuple[str, ...], trains: bool, progress: bool
) -> COCOClipDataset:
    """Splits of pre-encoded embeddings, see `sources.embeddings.read_pairs`."""
    _refuse_leaks(config)
    parts = [read_pairs(config.data_dir, split, config.image_root) for split in splits]
    pairs = joined([part.take(evenly_spread(len(part.table), config.max_samples)) for part in parts])
    _check_widths(config, pairs)
    return _captioned(config, splits, trains, **pairs._asdict())


def _captioned(config: Config, splits: tuple[str, ...], trains: bool, **parts: Any) -> COCOClipDataset:
    """A TrainingSet where the settings of training need one, else a COCOClipDataset.

    Raises: LabError if more negatives are asked for than there are images.
    """
    name = "+".join(splits)
    draws: dict[str, Any] = {"captions_per_image": config.captions_per_image, "seed": config.seed}
    varies = any(config[field] != off for field, off in OFF.items() if field not in draws)
    dataset = (
        TrainingSet(name, config, **parts) if trains and varies else COCOClipDataset(name, **draws, **parts)
    )
    if trains:
        check_negatives(config, len(dataset))
    return dataset


def _open_side_by_side(config: Config, splits: tuple[str, ...], trains: bool, progress: bool) -> PairedImages:
    """Pairs that are drawn in each epoch for training, else one fixed pair per image for every run and seed."""
    if len(splits) != 1:
        raise LabError(f"side-by-side images have one split at a time, not {', '.join(splits)}.")
    singles = open_labeled_images(
        config.data_dir, splits[0], size=config.image_size, cache_dir=config.cache_dir
    )
    draws: Any = {"num_pairs": config.pairs_per_epoch, "seed": config.seed} if trains else {"fixed": True}
    pairs = PairedImages(
        singles if config.max_samples is None else subset(singles, config.max_samples),
        split=splits[0],
        different_class_prob=config.different_class_prob,
        swapped_captions=config.swap_weight > 0,
        **draws,
    )
    if config.text_tower_mode == "cached":
        pairs.text_features = cached_text_features(config, pairs.captions, progress=progress)
    return pairs


OPENERS: dict[str, Callable[..., Any]] = {
    "auto": _open_captioned,
    "pairs": _open_embeddings,
    "paired_cifar": _open_side_by_side,
}
"""Layouts other than a reader's, by `config.reader`: `open(config, splits, trains, progress)`."""


def _check_widths(config: Config, pairs: Pairs) -> None:
    """Raises: LabError if the embeddings have another width than the configuration's towers."""
    sides = (("image", pairs.images, build_image_tower), ("text", pairs.text_features, build_text_tower))
    for side, rows, build in sides:
        if config[f"{side}_tower_mode"] != "cached":
            raise LabError(f"reader {config.reader!r} reads embeddings; set {side}_tower_mode to 'cached'.")
        expected: Any = build(config).width
        width = rows.shape[1]
        if width != expected:
            tower = config[f"{side}_tower"]
            raise LabError(
                f"{side} embeddings in {config.data_dir} have width {width}, but {side}_tower {tower!r} has "
                f"{expected}; name the tower that made them, or set {side}_tower to 'embeddings' and {side}_width "
                f"to {width}."
            )


def _refuse_leaks(config: Config) -> None:
    """Raises: LabError if two of a configuration's groups of splits share images."""
    ids = {
        splits: np.concatenate([image_ids(config.data_dir, split) for split in splits])
        for splits in config.split_groups()
    }
    for first, second in itertools.combinations(ids, 2):
        shared = np.intersect1d(ids[first], ids[second])
        if len(shared):
            raise LabError(
                f"splits {'+'.join(first)} and {'+'.join(second)} in {config.data_dir} share {len(shared):,} "
                f"images, such as {shared[0]}; choose other splits, or divide the folder with "
                "`python encode.py split`."
            )


def embeddings_at(path: str | Path) -> dict[str, Any]:
    """The configuration's fields for the pre-encoded embeddings in a folder.

    Returns: data_dir, reader, the splits, and the towers or their widths.
    Raises: LabError if it has no such files, or no splits train and val.
    """
    folder = Path(path)
    names = list(read_division(folder).get("splits", {})) or file_splits(folder)
    missing = [name for name in ("train", "val") if name not in names]
    if missing:
        raise LabError(
            f"{folder} has the splits {', '.join(names)} but no {' or '.join(missing)}; divide it with "
            f"`python encode.py split {folder}`."
        )
    tests = tuple(name for name in names if name not in ("train", "tune", "val"))
    splits = {"train_splits": ("train",), "val_splits": ("val",), "test_splits": tests or ("val",)}
    towers = encoders(folder)
    if not towers:
        _, images, texts = read_pairs(folder, "train")
        towers = {"image_tower": "embeddings", "image_width": images.shape[1]}
        towers |= {"text_tower": "embeddings", "text_width": texts.shape[1]}
    return {"data_dir": folder, "reader": "pairs", **splits, **towers}


# --- What training adds, and data sets of your own ---


class TrainingSet(COCOClipDataset):
    """A COCOClipDataset with balanced categories, varied captions, flips and mined captions; see config.Config.

    Mined captions are additional texts of a batch with their own images' ids, so a mined caption whose image is
    in the same batch is a match. Where images may be flipped, a batch also has `flip` (I,).

    With balance_by "category" all categories are drawn equally often; images of a category with fewer than
    `min_per_category` are left out, and an epoch has `max_per_category` of each (default: the median). An image
    whose captions name a side is not flipped, unless `augment_swap_sides` exchanges left and right in them.

    Args: options: of COCOClipDataset.
    Raises: LabError if captions should vary but are cached features, or categories are missing.
    """

    def __init__(self, split: str, config: Config, **options: Any) -> None:
        super().__init__(split, captions_per_image=config.captions_per_image, seed=config.seed, **options)
        self.balance: Balance | None = None
        if config.balance_by != "none":
            self._balance(config.min_per_category, config.max_per_category)
        self.word_dropout, self.reorder = config.augment_word_dropout, config.augment_reorder
        self.variations = config.max_caption_variations if self.word_dropout or self.reorder else 1
        self.flip = config.augment_flip if isinstance(self.images, ImageCache) else 0.0
        self.swap_sides = config.augment_swap_sides and self.flip > 0
        self._check_captions()
        self.upright = np.array([]) if self.swap_sides or not self.flip else self._naming_sides()
        self.mined = np.empty((len(self), 0), dtype=np.int64)  # rows of captions for each item
        self.neighbours = np.empty((len(self), 0), dtype=np.int64)
        self.mined_in: int | None = None  # the epoch
        self.seconds = 0.0

    def _balance(self, minimum: int, maximum: int | None) -> None:
        if self.table.categories is None:
            raise LabError(
                f"balance_by 'category' needs categories, but {self.table.root} has none; add them or set "
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
        varies = self.word_dropout or self.reorder
        if self.text_features is not None and (varies or self.swap_sides):
            name = "augment_word_dropout or augment_reorder" if varies else "augment_swap_sides"
            raise LabError(
                f"{name} changes captions, but the captions are cached features; set text_tower_mode to 'frozen' "
                "or 'trainable'."
            )
        if varies and self.variations < 2:
            raise LabError(
                "augment_word_dropout and augment_reorder need several variations per caption; set "
                "max_caption_variations to 2 or more."
            )

    def _naming_sides(self) -> np.ndarray:
        """Ids of the images whose captions name left or right."""
        named = [speaks_of_sides(caption) for caption in self.table.captions]
        return np.unique(self.table.caption_image_ids[named])

    @property
    def items_per_epoch(self) -> int:
        return len(self) if self.balance is None else len(self.balance)

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """(items_per_epoch,) items, balanced and with neighbours side by side where the settings say so."""
        plain = (
            super().epoch_order(epoch, seed)
            if self.balance is None
            else self.balance.sample_epoch(epoch, seed)
        )
        return neighbour_order(plain, self.neighbours, epoch, seed) if self.neighbours.size else plain

    def text_rows(self, items: np.ndarray) -> np.ndarray:
        """Captions of some items, then those of their mined captions that are not among them."""
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

    def refresh(self, model: CLIPModel, epoch: int, config: Config) -> None:
        """Mine captions with the current model, every `mining_refresh_epochs`.

        Afterwards `seconds` is the time this took, 0 in an epoch that uses earlier results.
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
        captions = [self.table.captions[row] for row in texts.tolist()]
        task: Any = (image_id, text_id, captions, config.num_mined)
        mined = np.empty((len(self), 0), dtype=np.int64)
        if config.mining == "random":
            mined = mine_random(*task, seed=self.seed, epoch=epoch)
        if config.mining == "semantic" or config.mining_neighbour_batches:
            images = _mining_features(model, model.encode_image, self._images, self.rows, config)
        if config.mining == "semantic":
            features = _mining_features(model, model.encode_text, super()._texts, texts, config)
            limits: Any = {"margin": config.mining_margin, "seed": self.seed, "epoch": epoch}
            mined = mine_semantic(images, features, *task, **limits)
        if config.mining_neighbour_batches:
            self.neighbours = nearest_images(images)
        self.mined = np.where(mined >= 0, texts[mined], NONE)

    def mined_captions(self, item: int) -> list[str]:
        """The captions mined for an item, nearest first."""
        return [self.table.captions[row] for row in self.mined[item].tolist() if row != NONE]

    def log(self) -> dict[str, float]:
        return {"mining_seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """The mined captions and their epoch, for a resumed run."""
        return {
            "mined": torch.from_numpy(self.mined),
            "neighbours": torch.from_numpy(self.neighbours),
            "mined_in": self.mined_in,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: LabError if it has another number of images."""
        if len(state["mined"]) != len(self):
            raise LabError(
                f"the checkpoint's mined captions are for {len(state['mined'])} images, not {len(self)}; "
                "set resume to 'never'."
            )
        self.mined, self.neighbours = (state[name].cpu().numpy() for name in ("mined", "neighbours"))
        self.mined_in, self.seconds = state["mined_in"], state["seconds"]


def _mining_features(
    model: CLIPModel,
    encode: Callable[[Any], Tensor],
    inputs: Callable[[np.ndarray], Any],
    rows: np.ndarray,
    config: Config,
) -> Tensor:
    """(len(rows), D) features by the model in eval mode; the model's mode is restored."""
    training, device = model.training, model.logit_scale.device
    size = config.micro_batch_size or config.batch_size
    starts = tqdm(range(0, len(rows), size), desc="mining", unit="batch", delay=2, leave=False)
    model.eval()
    with autocast(config, device):
        features = encode_in_batches(encode, (inputs(rows[start : start + size]) for start in starts), device)
    model.train(training)
    return features


class PlainDataset(ImageTextDataset):
    """Any of torch's data sets whose items are as `collate` takes them."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> Any:
        return self.items[item]

    def __getitems__(self, items: list[int]) -> Any:
        fetch = getattr(self.items, "__getitems__", None)
        return [self.items[item] for item in items] if fetch is None else fetch(items)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.items, "set_epoch"):
            self.items.set_epoch(epoch)

    def describe(self) -> dict[str, Any]:
        """Its class, length and identity."""
        sha256 = identity(self.items) or f"{len(self)}"
        sizes = {"images": len(self), "captions": len(self)}
        return {"splits": type(self.items).__name__, **sizes, "sha256": sha256, "form": "own"}


def with_defaults(dataset: Any) -> ImageTextDataset:
    """A data set that answers all that training and evaluation ask; one of ours is returned unchanged."""
    return dataset if isinstance(dataset, ImageTextDataset) else PlainDataset(dataset)


# --- Reports and the command line ---


def split_sizes(config: Config) -> pd.DataFrame:
    """Images in use, their captions and images left out: one row per split. Decodes the images the first time."""
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
    """Problems of a configuration's images and captions as a table; report and figure are written to `folder`."""
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
    config = Config(**fields)
    prepare_data(config)
    print(check_data(config, folder).to_string())
    print(f"{folder}: data_report.json, data_report.png")
