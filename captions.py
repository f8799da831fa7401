"""The table of images and captions that every reader makes; rows of the files that captions come in, however quoted."""

from __future__ import annotations

import csv
import json
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

    @cached_property
    def match_ids(self) -> np.ndarray:
        """(I,) int64 equal for images of one category with equal captions, which describe each other too.

        Such as class folders, where all images of a class have the same caption; else the image ids themselves.
        """
        if self.categories is None:
            return self.image_ids
        first: dict[tuple[str, ...], int] = {}
        named = zip(self.categories.tolist(), self.image_ids.tolist(), strict=True)
        ids = [
            first.setdefault((name, *self.captions_of(row)), ident) if name else ident
            for row, (name, ident) in enumerate(named)
        ]
        return np.array(ids, dtype=np.int64)

    @cached_property
    def caption_match_ids(self) -> np.ndarray:
        """(T,) the match id of each caption's image."""
        return np.repeat(self.match_ids, np.diff(self.offsets))

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


Row = tuple[int, str, str, str]  # line, image, caption, split or ""
IMAGE_COLUMNS = ("image", "image_name", "image_path", "filepath", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "comment", "title", "text", "raw")
_SUFFIXES = "|".join(suffix[1:] for suffix in PICTURE_SUFFIXES)
_NEW_ROW = re.compile(rf'(\d*[,;\t])?"?[^",;\t\n]+\.({_SUFFIXES})"?\s*[,;\t]', re.IGNORECASE)
_TOKEN_ROW = re.compile(r"\S[^\t]*#\d+\t")
_LONGEST_RECORD = 50  # lines that a quoted caption may go on over


def caption_rows(folder: DataFolder, file: str) -> Iterator[Row]:
    """Rows of a file of captions; malformed ones are noted and left out.

    Takes Flickr's token files (`name.jpg#0`, a tab, the caption) and tables whose first line names the columns
    (`IMAGE_COLUMNS`, `CAPTION_COLUMNS`, perhaps `split`), separated by commas, tabs, semicolons or bars. A caption
    in the last column may hold separators without quotes; a cell of column `raw` may be a JSON list of captions.
    Raises: LabError if a column is missing.
    """
    text = folder.read_text(file)
    if _TOKEN_ROW.match(text):
        yield from _token_rows(folder, file, text)
        return
    separator, names = _columns(text.partition("\n")[0])
    image, caption = (next((n for n in of if n in names), "") for of in (IMAGE_COLUMNS, CAPTION_COLUMNS))
    if not image or not caption:
        raise LabError(
            f"{folder.root / file} has the columns {names}; its first line must be image,caption or "
            "image_name| comment_number| comment"
        )
    # Flickr30k's own file, whose fields are parted by bars, quotes nothing.
    records = enumerate(text.split("\n"), start=1) if separator == "|" else _records(text)
    for number, record in records:
        if number == 1 or not record.strip():
            continue
        try:
            row = _fields(record, separator, len(names), last=caption == names[-1])
        except csv.Error as error:
            folder.problems.add("malformed row", file, f"no CSV row ({error})", f"line {number}")
            continue
        if len(row) != len(names):
            what = f"{len(row)} columns in place of {len(names)}"
            folder.problems.add("malformed row", file, what, f"line {number}")
            continue
        cells = dict(zip(names, row, strict=True))
        for each in _listed(cells[caption]) if caption == "raw" else [cells[caption]]:
            yield number, cells[image].strip(), each, cells.get("split", "").strip()


def _columns(header: str) -> tuple[str, list[str]]:
    """The separator of a first line and the names in it; those between commas where no separator fits."""
    found = {}
    for separator in ",\t;|":
        try:
            row = next(csv.reader([header], delimiter=separator), [])
        except csv.Error:
            row = [header]
        found[separator] = names = [name.strip().lower() for name in row]
        if set(names) & set(IMAGE_COLUMNS) and set(names) & set(CAPTION_COLUMNS):
            return separator, names
    return ",", found[","]


def _fields(record: str, separator: str, count: int, last: bool) -> list[str]:
    """The cells of a row. Raises: csv.Error if its quotes do not fit, or a cell is far too long."""
    parts = record.split(separator, count - 1)
    quoted = separator != "|" and any(part.lstrip().startswith('"') for part in parts)
    if last and not quoted and len(record) < csv.field_size_limit():
        return parts
    return next(csv.reader([record], strict=True, delimiter=separator), [])


def _listed(cell: str) -> list[str]:
    """The texts of a cell that holds a JSON list of them, else the cell itself."""
    try:
        captions = json.loads(cell)
    except (ValueError, RecursionError):
        return [cell]
    return captions if isinstance(captions, list) else [cell]


def _token_rows(folder: DataFolder, file: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if _TOKEN_ROW.match(line):
            image, _, caption = line.partition("\t")
            yield number, image.rpartition("#")[0], caption, ""
        elif line.strip():
            folder.problems.add("malformed row", file, "no name#number and tab", f"line {number}")


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


def karpathy_object(record: dict[str, Any]) -> Any:
    """Of an object in Karpathy's files what a table needs; his token lists are most of the file."""
    if "raw" in record:
        return record["raw"]
    if "sentences" not in record:
        return record
    kept = {key: record.get(key) for key in ("split", "filepath", "filename", "sentences")}
    return {**kept, "id": record.get("cocoid", record.get("imgid"))}
