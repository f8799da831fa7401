"""A data set's folder: text and picture files are found and read here, and nothing outside it."""

from __future__ import annotations

import codecs
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from errors import LabError
from files import read_bytes

# Everything that looks like an image is taken; what cannot be decoded here is counted by cause.
PICTURE_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .avif .heic .heif .hif .jp2 .jxl .tga "
    ".psd .svg .dng .cr2 .nef .arw"
).split()
LONGEST_PATH = 1000
EXAMPLES_KEPT = 100  # problems of one kind in one file that are kept one by one; the rest is a count
ABSENT = (-1, -1)  # the stamp of a file that is not there
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file or folder, or `ABSENT`."""
    try:
        status = os.stat(path)
    except OSError:
        return ABSENT
    return status.st_size, status.st_mtime_ns


def is_picture(name: str) -> bool:
    return name.lower().endswith(tuple(PICTURE_SUFFIXES)) and not name.startswith(".")


def same_name(name: str) -> str:
    """What a file's name has in common with itself on another system: composed letters, a lower-case ending."""
    stem, dot, ending = unicodedata.normalize("NFC", name).rpartition(".")
    return f"{stem}{dot}{ending.lower()}"


def safe_relative(path: Any) -> tuple[str, str]:
    """`path` with forward slashes and without `.` parts, and why it is refused ("" if it is not)."""
    if not isinstance(path, str) or not path.strip():
        return "", "the image path is missing"
    if len(path) > LONGEST_PATH:
        return "", f"the image path {path[:40]!r}... is longer than {LONGEST_PATH:,} characters"
    if not path.isprintable() and any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        return "", f"the image path {path!r} holds control characters"
    path = path.strip().replace("\\", "/")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return (
            "",
            f"the image path {path!r} is absolute and not below data_dir; set image_root to a folder that holds it",
        )
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        return "", f"the image path {path!r} leads outside the data folder"
    return "/".join(parts), ""


def decode_text(data: bytes) -> tuple[str, dict[int, str]]:
    """The text of a file with plain newlines, and what was repaired in which line.

    Marks of byte order are obeyed; a line that is no UTF-8 is read as Latin-1; NULs are taken out.
    """
    mark = next((mark for mark in _BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    repaired: dict[int, str] = {}
    try:
        text = data.decode(_BYTE_ORDER_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError:
        lines = data.removeprefix(mark).split(b"\n")
        text = "\n".join(_decode_line(line, number, repaired) for number, line in enumerate(lines, start=1))
    text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    if "\0" in text:
        repaired.update(
            {n: "NUL removed" for n, line in enumerate(text.split("\n"), start=1) if "\0" in line}
        )
        text = text.replace("\0", "")
    return text, repaired


def _decode_line(line: bytes, number: int, repaired: dict[int, str]) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        repaired[number] = "not UTF-8, read as Latin-1"
    try:
        return line.decode("cp1252")  # Latin-1 with the quotes and dashes that Windows puts in its gap
    except UnicodeDecodeError:
        return line.decode("latin-1")


class Problems:
    """What was left out or repaired while reading, bounded in memory however bad the files are."""

    def __init__(self) -> None:
        self._shown: list[dict[str, Any]] = []
        self._seen: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, file: str, what: str, place: str = "", count: int = 1) -> None:
        """Note a problem of this kind in this file; `place` is a line, a row or an image."""
        self._seen[kind, file] += 1
        if self._seen[kind, file] <= EXAMPLES_KEPT:
            where = ": ".join(part for part in (file, place) if part)
            self._shown.append({"kind": kind, "where": where, "what": what, "count": count})

    def rows(self) -> list[dict[str, Any]]:
        more = [
            {"kind": kind, "where": file, "what": "more of the same", "count": seen - EXAMPLES_KEPT}
            for (kind, file), seen in self._seen.items()
            if seen > EXAMPLES_KEPT
        ]
        return self._shown + more

    def first(self, *kinds: str) -> str:
        """`" (3 of kind refused path, such as a.jpg: a link ...)"` of the first kind that was met, or ""."""
        for kind in kinds:
            count = sum(seen for (known, _), seen in self._seen.items() if known == kind)
            if count:
                row = next(row for row in self._shown if row["kind"] == kind)
                return f" ({kind}: {count:,}, such as {row['where']}: {row['what']})"
        return ""


class DataFolder:
    """Reads and lists below one folder, refuses what leads outside, and remembers what it looked at.

    Args:
        root: the data set's folder.
        follow_links: take files and folders that are links to places outside `root`.
        image_root: a further folder in which links and absolute image paths may end.
    Raises: LabError if `root` or `image_root` is no folder.
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
                f"data folder {str(root)!r} does not exist; set data_dir to where the data set is, "
                "or fetch it with `python dataset.py fetch NAME`"
            )
        if image_root is not None and not os.path.isdir(image_root):
            raise LabError(
                f"image_root {str(image_root)!r} is no folder; set it to one that holds the images"
            )
        self._bases = [os.path.abspath(base) for base in (self.root, image_root) if base is not None]
        self._real_bases = [os.path.realpath(base) for base in self._bases]

    def look(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file or folder is there; the answer counts for the cache's freshness."""
        full = os.path.join(self.root, path)  # an absolute path, given by the user, stays as it is
        if full not in self.stamps:
            self.stamps[full] = stamp(full)
        return self.stamps[full] != ABSENT

    def user_path(self, path: str | os.PathLike[str], folder: str = "") -> str:
        """A path that the user gave: below the data folder where it exists there, else as it stands."""
        below = os.path.join(folder, path)
        if not os.path.isabs(below) and (self.look(below) or not os.path.exists(path)):
            return below
        self._real_bases.append(os.path.realpath(path))
        return os.path.abspath(path)

    def relative(self, path: Any) -> tuple[str, str]:
        """`safe_relative` of an image path from a file; an absolute one may lie below the root or `image_root`.

        Below `image_root` it stays absolute, which joins with the root to itself.
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
        """`path` below the first of the folders that holds it, or below the first of them."""
        tried = [join(folder, path) for folder in folders]
        return next((each for each in tried if self.has_file(self.true_path(each))), tried[0])

    def first(self, *candidates: str) -> str | None:
        """The first of these files or folders that exists, or None."""
        return next((path for path in candidates if self.look(path)), None)

    def listing(self, folder: str) -> dict[str, bool]:
        """Names in a folder, each with whether it is a folder itself; links that lead outside are left out.

        One scandir a folder: at 120,000 images a stat each would take seconds.
        """
        if folder not in self._listings:
            self._listings[folder] = self._scan(folder) if self.look(folder) else {}
        return self._listings[folder]

    def _scan(self, folder: str) -> dict[str, bool]:
        full = os.path.join(self.root, folder)
        if not os.path.isdir(full) or self._leads_outside(folder):
            return {}
        with os.scandir(full) as entries:
            return {
                entry.name: entry.is_dir()
                for entry in entries
                if self._is_text(folder, entry.name)
                and (not entry.is_symlink() or self._usable_link(join(folder, entry.name)))
            }

    def _is_text(self, folder: str, name: str) -> bool:
        readable = name.isprintable() or not any("\ud800" <= char <= "\udfff" for char in name)
        if not readable:
            shown = name.encode("utf-8", "replace").decode()
            self.problems.add("refused path", folder, "the file's name is not UTF-8; rename it", shown)
        return readable

    def _usable_link(self, path: str) -> bool:
        return not self._leads_outside(path) and (self.root / path).exists()

    def _leads_outside(self, path: str) -> bool:
        """Whether a path is a link to elsewhere than the root, `image_root` or a place that the user named."""
        if self.follow_links:
            return False
        real = os.path.realpath(self.root / path)
        outside = not any(is_below(real, base) for base in self._real_bases)
        if outside:
            what = f"a link that leads outside the data folder, to {real}; set image_root to a folder that holds it"
            self.problems.add("refused path", path, what)
        return outside

    def has_file(self, path: str) -> bool:
        """Whether the file of a `safe_relative` path exists below the root."""
        folder, _, name = path.rpartition("/")
        return self.listing(folder).get(name) is False

    def with_pictures(self, *candidates: str) -> str:
        """The first of these folders that holds an image, or the first of them."""
        return next((name for name in candidates if any(map(is_picture, self.listing(name)))), candidates[0])

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in a folder, sorted, without hidden ones and macOS's shadows."""
        names = self.listing(folder)
        return sorted(name for name in names if names[name] and not name.startswith((".", "__MACOSX")))

    def pictures(self, folder: str = "", walked: frozenset[str] = frozenset()) -> Iterator[str]:
        """Paths of all pictures in a folder and the folders in it, sorted; loops of links are not followed."""
        real = os.path.realpath(self.root / folder)
        if real in walked:
            return
        names = self.listing(folder)
        yield from (join(folder, name) for name in sorted(names) if is_picture(name) and not names[name])
        for name in self.folders(folder):
            yield from self.pictures(join(folder, name), walked | {real})

    def read_text(self, path: str) -> str:
        """A text file's content; what `decode_text` repaired is noted.

        Raises: LabError if the file cannot be read, or is a link that leads outside.
        """
        text, repaired = decode_text(self._read_bytes(path))
        for number, what in repaired.items():
            self.problems.add("repaired text", path, what, f"line {number}")
        return text

    def _read_bytes(self, path: str) -> bytes:
        if self.look(path) and not os.path.isabs(path) and not self.has_file(path):
            raise LabError(
                f"{self.root / path} is a link that leads outside the data folder; set image_root to a folder that "
                "holds its target, or copy the file"
            )
        return read_bytes(self.root / path)

    def read_json(self, path: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
        """A JSON file's content; `object_hook` may keep of each object only what is needed.

        Raises: LabError if it is no JSON, with the place.
        """
        try:
            return json.loads(self.read_text(path), object_hook=object_hook, strict=False)
        except LabError:
            raise
        except (ValueError, RecursionError, MemoryError) as error:
            cause = str(error)[:120] or "out of memory"
            raise LabError(
                f"{self.root / path} is no valid JSON ({cause}); fetch or write it again"
            ) from error


def is_below(path: str, base: str) -> bool:
    """Whether an absolute path is a folder or lies in it."""
    return path == base or path.startswith(base.rstrip(os.sep) + os.sep)


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and not os.path.isabs(name) else name
