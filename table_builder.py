"""Gathers a reader's images and captions, and checks them before they become a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from captions import CaptionTable, Strings, clean_text
from data_folder import DataFolder
from errors import LabError

NAMES_SHOWN = 5  # of many wrong images, how many a message names
CAUSES = ("refused path", "malformed row", "no caption")  # why no image may be left, the likeliest first
SMALL_SET = 5000  # below this many images, a seeded split holds out a tenth instead of 1,000


class _Image:
    __slots__ = ("captions", "category", "image_id", "split")

    def __init__(self, split: str, image_id: Any, category: str | None) -> None:
        self.split, self.image_id, self.category = split, image_id, category
        self.captions: list[str] = []


class TableBuilder:
    """Images by path and their captions; whatever is wrong with a row is noted and the row left out.

    Args:
        folder: where the pictures are; its problems are the table's.
        strict_ids: whether two images with one id are an error, or ids are then positions.
    """

    def __init__(self, folder: DataFolder, *, strict_ids: bool = True) -> None:
        self.folder = folder
        self.strict_ids = strict_ids
        self.images: dict[str, _Image] = {}
        self.split_source = "the data's own"
        self.leaks: dict[str, list[str]] = {}

    def malformed(self, file: str, place: str, what: str) -> None:
        self.folder.problems.add("malformed row", file, what, place)

    def relative(self, path: Any, file: str, place: str) -> str:
        """An image path that stays below the data folder (or `image_root`), or "" with the refusal noted."""
        safe, refusal = self.folder.relative(path)
        if refusal:
            kind = "refused path" if isinstance(path, str) and path.strip() else "malformed row"
            self.folder.problems.add(kind, file, refusal, place)
        return safe

    def add_image(self, path: str, split: str, image_id: Any = None, category: Any = None) -> None:
        """Add the image under the name it has on the disk, or see that it is the one added before."""
        path = self.folder.true_path(path)
        known = self.images.get(path)
        if known is None:
            self.images[path] = _Image(split, image_id, self._category(path, category))
        elif known.split != split:
            self.leaks.setdefault(path, []).extend([known.split, split])

    def _category(self, path: str, value: Any) -> str | None:
        """A category's name; whole numbers are names too, also written as 3.0."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        self.malformed(path, "", "the category is neither text nor a whole number")
        return None

    def add_caption(self, path: str, caption: Any, file: str, place: str) -> None:
        """Add a caption to an image that `add_image` has taken."""
        if not isinstance(caption, str):
            self.malformed(file, place, f"the caption is of type {type(caption).__name__}, not text")
            return
        text, repaired = clean_text(caption)
        if repaired:
            self.folder.problems.add("repaired text", file, repaired, place)
        if text:
            path = path if path in self.images else self.folder.true_path(path)
            self.images[path].captions.append(text)
        else:
            self.folder.problems.add("empty caption", file, "the caption is empty", place)

    def split_by_seed(self, seed: int) -> None:
        """A split by image: 1,000 for val and for test, or a tenth each of a small set; the rest trains."""
        paths = sorted(self.images)
        held = 1000 if len(paths) >= SMALL_SET else len(paths) // 10
        names = np.full(len(paths), "train", dtype=object)
        order = np.random.default_rng(seed).permutation(len(paths))
        names[order[:held]] = "val"
        names[order[held : 2 * held]] = "test"
        for path, split in zip(paths, names.tolist(), strict=True):
            self.images[path].split = split
        self.split_source = f"drawn by image, split_seed {seed}"

    def build(self) -> CaptionTable:
        """The table of the images that exist and have captions.

        Raises: LabError if a split leaks, ids repeat, or no image is left.
        """
        self._refuse_leaks()
        ids = self._ids()
        listed = len(self.images)
        missing = self._drop(lambda path, image: not self.folder.has_file(path))
        self._note_dropped("missing image", "listed, but no such file", missing)
        if listed and not self.images:
            raise LabError(
                f"none of the {listed:,} images listed for {self.folder.root} exists (such as {missing[0]}); "
                f"unpack the images there or correct data_dir{self.folder.problems.first(*CAUSES)}"
            )
        self._note_dropped(
            "no caption", "an image without captions", self._drop(lambda _, image: not image.captions)
        )
        if not self.images:
            raise LabError(
                f"{self.folder.root} holds no image with a caption; check data_dir and the reader"
                f"{self.folder.problems.first(*CAUSES)}"
            )
        return self._table(ids)

    def _refuse_leaks(self) -> None:
        if self.leaks:
            shown = [
                f"{path} ({', '.join(dict.fromkeys(splits))})" for path, splits in sorted(self.leaks.items())
            ]
            more = ", ..." if len(shown) > NAMES_SHOWN else ""
            raise LabError(
                f"{len(shown):,} images are in more than one split: {', '.join(shown[:NAMES_SHOWN])}{more}; "
                "take each out of all splits but one"
            )

    def _ids(self) -> dict[str, int]:
        """The source's own ids, or the position among all listed images where it has none."""
        own = {path: image.image_id for path, image in self.images.items()}
        positions = {path: row for row, path in enumerate(own)}
        if not all(map(is_id, own.values())):
            return positions
        first: dict[int, str] = {}
        for path, image_id in own.items():
            if first.setdefault(image_id, path) != path:
                if not self.strict_ids:
                    return positions
                both = f"{first[image_id]} and {path}"
                raise LabError(f"images {both} have the same id {image_id}; give each image its own id")
        return own

    def _drop(self, unwanted: Callable[[str, _Image], bool]) -> list[str]:
        dropped = [path for path, image in self.images.items() if unwanted(path, image)]
        for path in dropped:
            del self.images[path]
        return dropped

    def _note_dropped(self, kind: str, what: str, paths: list[str]) -> None:
        for path in paths:
            folder, _, name = path.rpartition("/")
            self.folder.problems.add(kind, folder, what, name)

    def _table(self, ids: dict[str, int]) -> CaptionTable:
        images = self.images.values()
        image_ids = np.array([ids[path] for path in self.images], dtype=np.int64)
        categories = [image.category for image in images]
        return CaptionTable(
            root=self.folder.root,
            image_ids=image_ids,
            paths=list(self.images),
            splits=np.array([image.split for image in images]),
            captions=Strings.pack(caption for image in images for caption in image.captions),
            caption_image_ids=np.repeat(image_ids, [len(image.captions) for image in images]),
            categories=np.array([name or "" for name in categories]) if any(categories) else None,
            problems=self.folder.problems.rows(),
            split_source=self.split_source,
        )


def is_id(value: Any) -> bool:
    """Whether a value may be an image's id; -1 never matches anything, so ids are not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
