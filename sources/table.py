"""A data set's folder, which nothing outside it is read from, and the table of its images and captions."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import LabError, nearest
from core.files import read_bytes

# Every file that looks like an image is listed; those that cannot be decoded are counted by cause.
IMAGE_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .avif .heic .heif .hif .jp2 .jxl .tga "
    ".psd .svg .dng .cr2 .nef .arw"
).split()
LONGEST_PATH = 1000
MAX_EXAMPLES = 100  # problems of one kind in one file that are listed; the others are counted
ABSENT = (-1, -1)  # the stamp of a file that does not exist


def stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file or folder, or `ABSENT`."""
    try:
        status = os.stat(path)
    except OSError:
        return ABSENT
    return status.st_size, status.st_mtime_ns


def is_image(name: str) -> bool:
    return name.lower().endswith(tuple(IMAGE_SUFFIXES)) and not name.startswith(".")


def same_name(name: str) -> str:
    """A file's name in a form that is the same on every system: composed letters, a lower-case extension."""
    stem, dot, ending = unicodedata.normalize("NFC", name).rpartition(".")
    return f"{stem}{dot}{ending.lower()}"


def safe_relative(path: Any) -> tuple[str, str]:
    """`path` with forward slashes and without `.` parts, and why it is refused ("" if it is not)."""
    if not isinstance(path, str) or not path.strip():
        return "", "the image path is missing"
    if len(path) > LONGEST_PATH:
        return "", f"the image path {path[:40]!r}... is longer than {LONGEST_PATH:,} characters"
    if not path.isprintable() and any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        return "", f"the image path {path!r} has control characters"
    path = path.strip().replace("\\", "/")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return (
            "",
            f"the image path {path!r} is absolute and not below data_dir; set image_root to a folder above it",
        )
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        return "", f"the image path {path!r} leads outside the data folder"
    return "/".join(parts), ""


def decode_text(data: bytes) -> tuple[str, list[int]]:
    """The text of a file with plain newlines, and the numbers of the lines that are not UTF-8.

    A byte order mark says UTF-16; a line that is not UTF-8 is read as Windows-1252, Latin-1 with quotes and dashes.
    """
    not_utf8 = []
    try:
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        lines = []
        for number, line in enumerate(data.split(b"\n"), start=1):
            try:
                lines.append(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                lines.append(line.decode("cp1252", "replace"))
                not_utf8.append(number)
        text = "\n".join(lines)
    return text.replace("\r\n", "\n").replace("\r", "\n"), not_utf8


class Problems:
    """What was left out or repaired while reading, bounded in memory however bad the files are."""

    def __init__(self) -> None:
        self._examples: list[dict[str, Any]] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, file: str, what: str, place: str = "") -> None:
        """Note a problem of this kind in this file; `place` is a line, a row or an image."""
        self._counts[kind, file] += 1
        if self._counts[kind, file] <= MAX_EXAMPLES:
            where = ": ".join(part for part in (file, place) if part)
            self._examples.append({"kind": kind, "where": where, "what": what, "count": 1})

    def rows(self) -> list[dict[str, Any]]:
        return self._examples + [
            {"kind": kind, "where": file, "what": "more of the same", "count": count - MAX_EXAMPLES}
            for (kind, file), count in self._counts.items()
            if count > MAX_EXAMPLES
        ]

    def first(self, *kinds: str) -> str:
        """`" (refused path: 3, such as a.jpg: a link ...)"`, of the first kind that occurred, or ""."""
        examples = [row for kind in kinds for row in self._examples if row["kind"] == kind]
        if not examples:
            return ""
        kind, where, what, _ = examples[0].values()
        count = sum(count for (each, _), count in self._counts.items() if each == kind)
        return f" ({kind}: {count:,}, such as {where}: {what})"


class DataFolder:
    """Reads and lists files below one folder, refuses what leads outside, and remembers what it looked at.

    Args:
        root: the data set's folder.
        follow_links: use files and folders that are links to places outside `root`.
        image_root: another folder that links and absolute image paths may lead into.
    Raises: LabError if `root` or `image_root` is not a folder.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        follow_links: bool = False,
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = Path(root)
        self.follow_links = follow_links
        self.problems = Problems()
        self.stamps: dict[str, tuple[int, int]] = {}  # every file and folder that was looked at
        self._listings: dict[str, dict[str, bool]] = {}
        self._alike: dict[str, dict[str, str]] = {}  # folder -> same_name of each file -> its name
        if not self.root.is_dir():
            raise LabError(
                f"data folder {str(root)!r} does not exist; set data_dir to the folder of the data set, "
                "or download it with `python dataset.py fetch NAME`"
            )
        if image_root is not None and not os.path.isdir(image_root):
            raise LabError(
                f"image_root {str(image_root)!r} is not a folder; set it to the folder of the images"
            )
        self._bases = [os.path.abspath(base) for base in (self.root, image_root) if base is not None]
        self._real_bases = [os.path.realpath(base) for base in self._bases]

    def look(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file or folder exists; its size and time become part of what a cached table depends on."""
        full = os.path.join(self.root, path)  # an absolute path, which the user gave, stays as it is
        if full not in self.stamps:
            self.stamps[full] = stamp(full)
        return self.stamps[full] != ABSENT

    def user_path(self, path: str | os.PathLike[str]) -> str:
        """A path that the user gave: below the data folder if it exists there, else unchanged."""
        if not os.path.isabs(path) and (self.look(path) or not os.path.exists(path)):
            return os.fspath(path)
        self._real_bases.append(os.path.realpath(path))
        return os.path.abspath(path)

    def relative(self, path: Any) -> tuple[str, str]:
        """`safe_relative` of an image path from a file; an absolute one may be below the root or `image_root`.

        Below `image_root` it stays absolute, and joining it with the root changes nothing.
        """
        if isinstance(path, str) and os.path.isabs(path.strip()):
            full = os.path.normpath(path.strip())
            for base in dict.fromkeys([*self._bases, *self._real_bases]):
                if is_below(full, base):
                    below, refusal = safe_relative(os.path.relpath(full, base))
                    inside = base in (self._bases[0], self._real_bases[0])
                    return (below if inside or refusal else full), refusal
        return safe_relative(path)

    def true_path(self, path: str) -> str:
        """`path` as the disk spells it: other composed letters or a .JPG for .jpg; else `path` itself."""
        folder, _, name = path.rpartition("/")
        if name in self.listing(folder):
            return path
        if folder and not os.path.isabs(folder) and not self.listing(folder):
            folder = self.true_path(folder)
        if folder not in self._alike:
            names = sorted(self.listing(folder))
            counts = Counter(map(same_name, names))
            self._alike[folder] = {key: each for each in names if counts[key := same_name(each)] == 1}
        return join(folder, self._alike[folder].get(same_name(name), name))

    def in_one_of(self, folders: Sequence[str], path: str) -> str:
        """`path` below the first of the folders that has it, or below the first of them."""
        paths = [join(folder, path) for folder in folders]
        return next((each for each in paths if self.has_file(self.true_path(each))), paths[0])

    def first(self, *candidates: str) -> str | None:
        """The first of these files or folders that exists, or None."""
        return next((path for path in candidates if self.look(path)), None)

    def listing(self, folder: str) -> dict[str, bool]:
        """Names in a folder, each with whether it is a folder; links that lead outside are left out.

        One scandir per folder: a stat per file would take seconds for 120,000 images.
        """
        if folder not in self._listings:
            self._listings[folder] = self._scan(folder) if self.look(folder) else {}
        return self._listings[folder]

    def _scan(self, folder: str) -> dict[str, bool]:
        full = os.path.join(self.root, folder)
        if not os.path.isdir(full) or self._leads_outside(folder):
            return {}
        with os.scandir(full) as entries:
            return {entry.name: entry.is_dir() for entry in entries if self._is_usable(folder, entry)}

    def _is_usable(self, folder: str, entry: os.DirEntry[str]) -> bool:
        """Whether an entry's name is text, and it is not a link that leads outside or nowhere."""
        if not entry.name.isprintable() and any("\ud800" <= char <= "\udfff" for char in entry.name):
            readable = entry.name.encode("utf-8", "replace").decode()
            self.problems.add("refused path", folder, "the file's name is not UTF-8; rename it", readable)
            return False
        return not entry.is_symlink() or (
            not self._leads_outside(join(folder, entry.name)) and os.path.exists(entry.path)
        )

    def _leads_outside(self, path: str) -> bool:
        """Whether a path is a link out of the root, `image_root` and the paths that the user gave; noted if so."""
        real = os.path.realpath(self.root / path)
        if self.follow_links or any(is_below(real, base) for base in self._real_bases):
            return False
        what = f"a link that leads outside the data folder, to {real}; set image_root to a folder above it"
        self.problems.add("refused path", path, what)
        return True

    def has_file(self, path: str) -> bool:
        """Whether the file of a `safe_relative` path exists below the root."""
        folder, _, name = path.rpartition("/")
        return self.listing(folder).get(name) is False

    def with_images(self, *candidates: str) -> str:
        """The first of these folders that has an image, or the first of them."""
        return next((name for name in candidates if any(map(is_image, self.listing(name)))), candidates[0])

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in a folder, sorted, without hidden ones and macOS's metadata."""
        names = self.listing(folder)
        return sorted(name for name in names if names[name] and not name.startswith((".", "__MACOSX")))

    def images(self, folder: str = "", walked: frozenset[str] = frozenset()) -> Iterator[str]:
        """Paths of all images in a folder and the folders in it, sorted; loops of links are not followed."""
        real = os.path.realpath(self.root / folder)
        if real in walked:
            return
        names = self.listing(folder)
        yield from (join(folder, name) for name in sorted(names) if is_image(name) and not names[name])
        for name in self.folders(folder):
            yield from self.images(join(folder, name), walked | {real})

    def read_text(self, path: str) -> str:
        """A text file's content; lines that are not UTF-8 are noted.

        Raises: LabError if the file cannot be read, or is a link that leads outside.
        """
        if self.look(path) and not os.path.isabs(path) and not self.has_file(path):
            raise LabError(
                f"{self.root / path} is a link that leads outside the data folder; set image_root to a folder "
                "above its target, or copy the file"
            )
        text, not_utf8 = decode_text(read_bytes(self.root / path))
        for number in not_utf8:
            self.problems.add("repaired text", path, "not UTF-8, read as Latin-1", f"line {number}")
        return text

    def read_json(self, path: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
        """A JSON file's content; `object_hook` may reduce each object to what is needed.

        Raises: LabError if it is not JSON, with the position.
        """
        try:
            return json.loads(self.read_text(path), object_hook=object_hook, strict=False)
        except LabError:
            raise
        except (ValueError, RecursionError, MemoryError) as error:
            cause = str(error)[:120] or "out of memory"
            message = f"{self.root / path} is not valid JSON ({cause}); download or write it again"
            raise LabError(message) from error


def is_below(path: str, base: str) -> bool:
    """Whether an absolute path is this folder or something in it."""
    return path == base or path.startswith(base.rstrip(os.sep) + os.sep)


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and not os.path.isabs(name) else name


# --- The table ---


UNUSED = "unused"  # split of images that belong to no other
SPLIT_ORDER = ("train", "restval", "val", "test")  # others come after, by name
_SPLIT_NAME = re.compile(r"\w[\w .-]{0,63}")  # no "+", which joins names of splits


@dataclass(frozen=True, eq=False)
class CaptionTable:
    """I images and their T captions; an image and a caption match if their ids are equal.

    Args:
        root: folder that the paths are relative to.
        image_ids: (I,) int64, unique and not negative.
        paths: I paths of the images below `root`, with forward slashes.
        splits: (I,) name of each image's split.
        captions: T texts, grouped by image in the order of `image_ids`.
        caption_image_ids: (T,) int64, the image that each caption belongs to.
        categories: (I,) name of each image's category, or None.
        problems: what was left out or repaired, each {"kind", "where", "what", "count"}.
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
            if not _SPLIT_NAME.fullmatch(str(name)):  # files are named after it
                raise LabError(
                    f"split {name[:80]!r} in {self.root} cannot be part of a file's name; rename it with "
                    "letters, digits, spaces, '-', '_' and '.' (64 characters at most)"
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
        """(I,) int64 the image ids, but one id for images of one category with equal captions, as in class folders."""
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
        """The file of image `row`."""
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
                    f"split {name!r} has no image{nearest(name, list(sizes)) or '.'} "
                    f"Splits in {self.root}: {present or 'none'}."
                )
        return self.take(np.flatnonzero(np.isin(self.splits, names)))

    def caption_rows(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these images' captions, image by image."""
        counts = np.diff(self.offsets)[rows]
        first = np.cumsum(counts) - counts  # (len(rows),) where each image's captions start in the result
        return np.repeat(self.offsets[rows] - first, counts) + np.arange(counts.sum())

    def take(self, rows: Any) -> CaptionTable:
        """The images at `rows` (indices or a mask), with their captions, in that order."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        texts = self.caption_rows(rows)
        return replace(
            self,
            image_ids=self.image_ids[rows],
            paths=[self.paths[row] for row in rows.tolist()],
            splits=self.splits[rows],
            captions=[self.captions[text] for text in texts.tolist()],
            caption_image_ids=self.caption_image_ids[texts],
            categories=None if self.categories is None else self.categories[rows],
        )

    def problem_counts(self) -> dict[str, int]:
        """How often each kind of problem occurred."""
        counts: Counter[str] = Counter()
        for problem in self.problems:
            counts[problem["kind"]] += problem["count"]
        return dict(counts)


def split_rank(name: str) -> tuple[int, str]:
    """Sort key of a split's name: train, restval, val, test, then others."""
    return (SPLIT_ORDER.index(name) if name in SPLIT_ORDER else len(SPLIT_ORDER)), name


def clean_text(text: str) -> tuple[str, str]:
    """A caption on one line without control characters, and what had to be repaired ("" if nothing).

    White space of every kind becomes single spaces; that alone does not count as a repair.
    """
    text = " ".join(text.split())
    if text.isprintable():
        return text, ""
    repairs = []
    if any("\ud800" <= char <= "\udfff" for char in text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        repairs.append("lone surrogates became U+FFFD")
    printable = "".join(char for char in text if unicodedata.category(char) != "Cc")
    if printable != text:
        text = " ".join(printable.split())
        repairs.append("control characters removed")
    return text, ", ".join(repairs)


NAMES_SHOWN = 5  # at most, in a message about wrong images
CAUSES = ("refused path", "malformed row", "no caption")  # of a table without images, the likeliest first
SMALL_SET = 5000  # below this many images, a seeded split holds out a tenth instead of 1,000


@dataclass(slots=True)
class _Image:
    split: str | None
    image_id: Any
    category: str | None
    captions: list[str] = field(default_factory=list)


class TableBuilder:
    """Images by path and their captions; a row with something wrong is noted and left out.

    Args:
        folder: the folder of the images; its problems become the table's.
        strict_ids: two images with one id are an error; else positions then replace all ids.
    """

    def __init__(self, folder: DataFolder, *, strict_ids: bool = True) -> None:
        self.folder = folder
        self.strict_ids = strict_ids
        self.images: dict[str, _Image] = {}
        self.split_source = "the data's own"
        self.leaks: dict[
            str, dict[str | None, None]
        ] = {}  # path -> the splits of an image that is in several

    def malformed(self, file: str, place: str, what: str) -> None:
        self.folder.problems.add("malformed row", file, what, place)

    def relative(self, path: Any, file: str, place: str) -> str:
        """An image path that stays below the data folder (or `image_root`), or "" with the refusal noted."""
        safe, refusal = self.folder.relative(path)
        if refusal:
            kind = "refused path" if isinstance(path, str) and path.strip() else "malformed row"
            self.folder.problems.add(kind, file, refusal, place)
        return safe

    def add(
        self,
        path: Any,
        split: str | None,
        captions: Iterable[Any],
        file: str,
        place: str,
        image_id: Any = None,
        category: Any = None,
        *,
        folders: Sequence[str] = ("",),
    ) -> None:
        """Add an image and its captions, listed in `file` at `place`; its path is below one of the `folders`."""
        if below := self.relative(path, file, place):
            path = self.folder.in_one_of(folders, below)
            self.add_image(path, split, image_id, category)
            for caption in captions:
                self.add_caption(path, caption, file, place)

    def add_image(self, path: str, split: str | None, image_id: Any = None, category: Any = None) -> None:
        """Add the image under the name it has on disk, unless it has been added before; split None: not known."""
        path = self.folder.true_path(path)
        known = self.images.get(path)
        if known is None:
            self.images[path] = _Image(split, image_id, self._category(path, category))
        elif known.split != split:
            self.leaks.setdefault(path, {known.split: None})[split] = None

    def _category(self, path: str, value: Any) -> str | None:
        """A category's name; whole numbers, also written as 3.0, are names too."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        self.malformed(path, "", "the category is neither text nor a whole number")
        return None

    def add_caption(self, path: str, caption: Any, file: str, place: str) -> None:
        """Add a caption to an image that `add_image` has added."""
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
        num_held_out = 1000 if len(paths) >= SMALL_SET else len(paths) // 10
        order = np.random.default_rng(seed).permutation(len(paths)).tolist()
        for position, row in enumerate(order):
            part = position // num_held_out if num_held_out else 2
            self.images[paths[row]].split = ("val", "test")[part] if part < 2 else "train"
        self.split_source = f"drawn by image, split_seed {seed}"

    def build(self, split_seed: int = 0) -> CaptionTable:
        """The table of the images that exist and have captions; splits that are all None are seeded.

        Raises: LabError if a split leaks, ids repeat, or no image is left.
        """
        if self.leaks:
            examples = [
                f"{path} ({', '.join(map(str, splits))})" for path, splits in sorted(self.leaks.items())
            ]
            more = ", ..." if len(examples) > NAMES_SHOWN else ""
            raise LabError(
                f"{len(examples):,} images are in more than one split: {', '.join(examples[:NAMES_SHOWN])}{more}; "
                "leave each in one split only"
            )
        self._set_ids()
        if all(image.split is None for image in self.images.values()):
            self.split_by_seed(split_seed)
        listed = list(self.images)
        self._leave_out(
            "missing image", "listed, but no such file", lambda path: not self.folder.has_file(path)
        )
        if listed and not self.images:
            raise LabError(
                f"none of the {len(listed):,} images listed for {self.folder.root} exists (such as {listed[0]}); "
                f"unpack the images there or correct data_dir{self.folder.problems.first(*CAUSES)}"
            )
        self._leave_out(
            "no caption", "an image without captions", lambda path: not self.images[path].captions
        )
        if not self.images:
            raise LabError(
                f"{self.folder.root} has no image with a caption; check data_dir and the reader"
                f"{self.folder.problems.first(*CAUSES)}"
            )
        return self._table()

    def _set_ids(self) -> None:
        """Give the images positions as ids, unless the source has an id of its own for each."""
        images = self.images.values()
        own = [image.image_id for image in images]
        if all(map(is_id, own)) and len(set(own)) == len(own):
            return
        if all(map(is_id, own)) and self.strict_ids:
            same, _ = Counter(own).most_common(1)[0]
            both = [path for path, image in self.images.items() if image.image_id == same]
            raise LabError(
                f"images {both[0]} and {both[1]} have the same id {same}; give each image its own id"
            )
        for position, image in enumerate(images):
            image.image_id = position

    def _leave_out(self, kind: str, what: str, condition: Callable[[str], bool]) -> None:
        """Remove and note the images whose path fulfills `condition`."""
        for path in list(filter(condition, self.images)):
            del self.images[path]
            folder, _, name = path.rpartition("/")
            self.folder.problems.add(kind, folder, what, name)

    def _table(self) -> CaptionTable:
        images = self.images.values()
        image_ids = np.array([image.image_id for image in images], dtype=np.int64)
        categories = [image.category for image in images]
        return CaptionTable(
            root=self.folder.root,
            image_ids=image_ids,
            paths=list(self.images),
            splits=np.array([image.split for image in images]),
            captions=[caption for image in images for caption in image.captions],
            caption_image_ids=np.repeat(image_ids, [len(image.captions) for image in images]),
            categories=np.array([name or "" for name in categories]) if any(categories) else None,
            problems=self.folder.problems.rows(),
            split_source=self.split_source,
        )


def is_id(value: Any) -> bool:
    """Whether a value may be an image's id; -1 never matches anything, so ids are not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
