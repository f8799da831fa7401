"""The table of images and captions that every reader makes; rows of the files that captions come in, however quoted."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_folder import PICTURE_SUFFIXES, DataFolder
from errors import LabError, nearest

# --- The table ---


UNUSED = "unused"  # split of images that belong to none
SPLIT_ORDER = ("train", "restval", "val", "test")  # others come after, by name
_SPLIT_NAME = re.compile(r"\w[\w .-]{0,63}")  # no "+", which joins names of splits


class Strings(Sequence[str]):
    """Many strings as one UTF-8 buffer, decoded when asked for.

    414,113 captions take 28 MB instead of the 45 MB of a list, and worker processes share them
    without touching reference counts. An integer index gives a string; a slice, a mask or an index
    array gives another view of the same buffer.

    Args:
        buffer: (B,) uint8, the strings' UTF-8 bytes.
        starts: (N,) first byte of each string.
        ends: (N,) one past the last byte of each string.
    """

    def __init__(self, buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.buffer, self.starts, self.ends = buffer, starts, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Strings:
        encoded = [text.encode("utf-8") for text in texts]
        bounds = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(item) for item in encoded], out=bounds[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), bounds[:-1], bounds[1:])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (int, np.integer)):
            return self.buffer[self.starts[index] : self.ends[index]].tobytes().decode("utf-8")
        return Strings(self.buffer, self.starts[index], self.ends[index])

    def __iter__(self) -> Iterator[str]:
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield self.buffer[start:end].tobytes().decode("utf-8")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(text) for text in self[:3])
        return f"Strings({len(self):,}: {shown}{', ...' if len(self) > 3 else ''})"


@dataclass(frozen=True, eq=False)
class CaptionTable:
    """I images and their T captions; an image and a caption match where their ids are equal.

    Args:
        root: folder that the paths are relative to.
        image_ids: (I,) int64, unique and not negative.
        paths: (I,) path of each image below `root`, with forward slashes.
        splits: (I,) name of each image's split.
        captions: (T,) texts, grouped by image in the order of `image_ids`.
        caption_image_ids: (T,) int64, the image that each caption belongs to.
        categories: (I,) name of each image's category, or None.
        problems: what was left out or repaired, {"kind", "where", "what", "count"} each.
        split_source: where the splits come from; a published protocol holds for some sources only.
    Raises: LabError if a split's name cannot be part of a file's name.
    """

    root: Path
    image_ids: np.ndarray
    paths: Sequence[str]
    splits: np.ndarray
    captions: Sequence[str]
    caption_image_ids: np.ndarray
    categories: np.ndarray | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)
    split_source: str = ""

    def __post_init__(self) -> None:
        for name in set(self.splits.tolist()):
            if not _SPLIT_NAME.fullmatch(str(name)):  # reports and features are written under it
                raise LabError(
                    f"split {name[:80]!r} in {self.root} cannot name a file; rename it with letters, digits, "
                    "spaces, '-', '_' and '.' (64 at most)"
                )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __repr__(self) -> str:
        splits = ", ".join(f"{name} {count:,}" for name, count in self.split_sizes().items())
        return f"CaptionTable({len(self):,} images ({splits}), {len(self.captions):,} captions)"

    @cached_property
    def offsets(self) -> np.ndarray:
        """(I + 1,) captions `offsets[row]:offsets[row + 1]` belong to image `row`."""
        order = np.argsort(self.image_ids, kind="stable")
        rows = order[np.searchsorted(self.image_ids, self.caption_image_ids, sorter=order)]  # (T,)
        if not (self.image_ids[rows] == self.caption_image_ids).all() or (np.diff(rows) < 0).any():
            raise LabError("captions must be grouped by image, in the order of image_ids")
        counts = np.bincount(rows, minlength=len(self))
        return np.concatenate([[0], np.cumsum(counts)])

    def captions_of(self, row: int) -> list[str]:
        """The captions of image `row`, in the source's order."""
        return list(self.captions[self.offsets[row] : self.offsets[row + 1]])

    def path_of(self, row: int) -> Path:
        """The picture file of image `row`."""
        return self.root / self.paths[row]

    def split_sizes(self) -> dict[str, int]:
        """Images in each split, train first."""
        sizes = Counter(self.splits.tolist())
        return {name: sizes[name] for name in sorted(sizes, key=split_rank)}

    def split(self, *names: str) -> CaptionTable:
        """The images of these splits.

        Raises: LabError if a name is not a split here.
        """
        sizes = self.split_sizes()
        for name in names:
            if name not in sizes:
                present = ", ".join(f"{known} ({count:,} images)" for known, count in sizes.items())
                raise LabError(
                    f"split {name!r} holds no image{nearest(name, list(sizes)) or '.'} "
                    f"Splits in {self.root}: {present or 'none'}."
                )
        return self.take(np.flatnonzero(np.isin(self.splits, names)))

    def take(self, rows: Any) -> CaptionTable:
        """The images at `rows` (indices or a mask), with their captions, in that order."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        starts, counts = self.offsets[rows], np.diff(self.offsets)[rows]
        first = np.cumsum(counts) - counts  # (len(rows),) where each image's captions start afterwards
        picked = np.repeat(starts - first, counts) + np.arange(counts.sum())
        captions = self.captions if isinstance(self.captions, Strings) else Strings.pack(self.captions)
        return CaptionTable(
            root=self.root,
            image_ids=self.image_ids[rows],
            paths=[self.paths[row] for row in rows.tolist()],
            splits=self.splits[rows],
            captions=captions[picked],
            caption_image_ids=self.caption_image_ids[picked],
            categories=None if self.categories is None else self.categories[rows],
            problems=self.problems,
            split_source=self.split_source,
        )

    def problem_counts(self) -> dict[str, int]:
        """How often each kind of problem was met."""
        counts: Counter[str] = Counter()
        for problem in self.problems:
            counts[problem["kind"]] += problem["count"]
        return dict(counts)


def split_rank(name: str) -> tuple[int, str]:
    """Sort key of a split's name: train, restval, val, test, then others."""
    return (SPLIT_ORDER.index(name) if name in SPLIT_ORDER else len(SPLIT_ORDER)), name


def clean_text(text: str) -> tuple[str, str]:
    """A caption on one line without control characters, and what had to be repaired ("" if nothing).

    White space of every kind becomes single spaces; this alone is no repair.
    """
    text = " ".join(text.split())
    if text.isprintable():
        return text, ""
    repairs = []
    if any("\ud800" <= char <= "\udfff" for char in text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        repairs.append("lone surrogates became U+FFFD")
    kept = "".join(char for char in text if unicodedata.category(char) != "Cc")
    if kept != text:
        text = " ".join(kept.split())
        repairs.append("control characters removed")
    return text, ", ".join(repairs)


# --- Rows of caption files ---


Row = tuple[int, str, str]  # line, image, caption
_SUFFIXES = "|".join(suffix[1:] for suffix in PICTURE_SUFFIXES)
_NEW_ROW = re.compile(rf'"?[^",\n]+\.({_SUFFIXES})"?\s*,', re.IGNORECASE)
_LONGEST_RECORD = 50  # lines that a quoted caption may go on over


def csv_rows(folder: DataFolder, file: str) -> Iterator[Row]:
    """Rows of a CSV file whose header names image and caption; malformed ones are noted and left out.

    Raises: LabError if a column is missing.
    """
    records = _records(folder.read_text(file))
    columns = next(_fields(next(records, (1, ""))[1]), [])
    names = [name.strip().lower() for name in columns]
    if "image" not in names or "caption" not in names:
        raise LabError(
            f"{folder.root / file} has the columns {columns}; its first line must be image,caption"
        )
    image, caption = names.index("image"), names.index("caption")
    for number, record in records:
        try:
            row = next(_fields(record), [])
        except csv.Error as error:
            folder.problems.add("malformed row", file, f"no CSV row ({error})", f"line {number}")
            continue
        if len(row) > 2 and names == ["image", "caption"] and '"' not in record:
            row = record.split(",", 1)  # commas that nobody quoted
        if len(row) == len(names):
            yield number, row[image].strip(), row[caption]
        elif record.strip():
            what = f"{len(row)} columns in place of {len(names)}"
            folder.problems.add("malformed row", file, what, f"line {number}")


def _fields(record: str) -> Iterator[list[str]]:
    return csv.reader([record], strict=True)


def _records(text: str) -> Iterator[tuple[int, str]]:
    """(line, record) pairs: a quoted caption goes on over lines, but a stray quote swallows no rows."""
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        first, record = number, lines[number]
        number += 1
        last = min(len(lines), first + _LONGEST_RECORD)
        while record.count('"') % 2 and number < last and not _NEW_ROW.match(lines[number]):
            record += "\n" + lines[number]
            number += 1
        yield first + 1, record


def piped_rows(folder: DataFolder, file: str) -> Iterator[Row]:
    """Rows `image_name| comment_number| comment`; a caption may hold more bars.

    Flickr30k's own file has one row without its second bar; it is noted and left out like others.
    Raises: LabError if a column is missing.
    """
    lines = folder.read_text(file).split("\n")
    columns = [name.strip() for name in lines[0].split("|")]
    if columns != ["image_name", "comment_number", "comment"]:
        expected = "image_name| comment_number| comment"
        raise LabError(f"{folder.root / file} has the columns {columns}; its first line must be {expected}")
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("|", 2)
        if len(fields) == 3:
            yield number, fields[0].strip(), fields[2]
        elif line.strip():
            what = f"{len(fields)} columns in place of 3"
            folder.problems.add("malformed row", file, what, f"line {number}")


def karpathy_object(record: dict[str, Any]) -> Any:
    """Of an object in Karpathy's files what a table needs; his token lists are most of the file."""
    if "raw" in record:
        return record["raw"]
    if "sentences" not in record:
        return record
    kept = {key: record.get(key) for key in ("split", "filepath", "filename", "sentences")}
    return {**kept, "id": record.get("cocoid", record.get("imgid"))}
