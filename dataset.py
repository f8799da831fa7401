"""Datasets and batches: one item is an image with all its captions; ids say what matches."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.collate import default_collate_fn_map

import data_check
import plots_data
import towers
from cache import as_rows, row_digests
from captions import CaptionTable
from cli import Parser, one_sentence
from config import Config
from errors import LabError
from files import fingerprint
from image_cache import ImageCache
from readers import READERS, read_captions
from scenes import write_scenes, write_shapes
from sources import SOURCES, fetch, is_interrupted, is_linked

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
    Pictures that cannot be decoded and images without a caption are left out and listed in `left_out`.

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


def open_images(
    table: CaptionTable, cache_dir: str | Path, size: int, resize: str, num_workers: int = 0
) -> ImageCache:
    """The table's pictures, decoded once."""
    folder = Path(cache_dir) / "images"
    return ImageCache.open_or_build(
        table.root, table.paths, size=size, resize=resize, folder=folder, num_workers=num_workers or None
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
    tower = towers.text_tokenizer(config.text_tower, config.text_model)
    _, max_length = towers.TEXT_SETTINGS[config.text_tower]
    report = data_check.check(load_table(config), tokenizer=tower, max_length=max_length)
    Path(folder).mkdir(parents=True, exist_ok=True)
    data_check.save_report(report, folder)
    plots_data.data_report(report, Path(folder) / "data_report.png")
    return data_check.report_table(report).set_index("finding")


def main() -> None:
    """`python dataset.py fetch NAME` and `python dataset.py check DIR`."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="bring a data set to data/NAME")
    fetching.add_argument("name", help=", ".join(SOURCES))
    fetching.add_argument("--data_dir", default="data", help="folder of the data sets' folders")
    fetching.add_argument("--karpathy", action="store_true", help="Karpathy's split file too")
    checking = commands.add_parser("check", help="say what is wrong with a folder's pictures and captions")
    checking.add_argument("data_dir", metavar="DIR")
    checking.add_argument("--reader", default="coco", help=", ".join(READERS))
    for name in ("karpathy_file", "annotation_file", "image_root"):
        checking.add_argument(f"--{name}", help=Config.model_fields[name].description)
    checking.add_argument("--split_seed", type=int, default=0)
    checking.add_argument("--text_tower", default="minilm", help="whose tokenizer measures captions")
    checking.add_argument("--folder", default="outputs/data_check", help="where report and figure go")
    given = vars(parser.parse_args())
    with one_sentence():
        if given.pop("command") == "fetch":
            print(fetch(**given))
            return
        folder = given.pop("folder")
        print(check_data(Config(**given), folder).to_string())
        print(f"{folder}: data_report.json, data_report.png")


if __name__ == "__main__":
    main()
