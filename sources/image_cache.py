"""Images decoded once and kept on disk by row: as raw pixels, or as small JPEGs where the disk is short."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import simplejpeg
import torch
from torch import Tensor
from tqdm.auto import tqdm

from core.errors import LabError
from core.files import DamagedFileError, atomic_path, fingerprint, locked, make_folder, read_json, write_json
from core.processes import in_processes
from core.tensor_files import file_checksum
from sources.decode import FORMATS, UndecodableImage, decode_rgb
from sources.table import CaptionTable, stamp

# --- The two forms on disk ---


JPEG_QUALITY = 90
HEADER, BITMAP, CONTENTS, SPANS = "header.json", "finished.bits", "rows.u64", "table.i64"


class RawStore:
    """The files of a cache: N square images as pixels by row, which rows are finished, and their digests."""

    file_name = "pictures.u8"

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.folder, self.path = folder, folder / self.file_name
        self.shape = (count, size, size, 3)

    @staticmethod
    def bytes_per_image(size: int) -> int:
        """Disk space that an image of this side takes."""
        return size * size * 3

    @staticmethod
    def encode(image: np.ndarray) -> bytes:
        """The bytes that are stored of an image."""
        return image.tobytes()

    @cached_property
    def digests(self) -> np.ndarray:
        """(N, 2) uint64: the digest of each image's file, and the CRC-32 of its stored bytes."""
        return self._read_numbers(CONTENTS, "<u8")

    @cached_property
    def spans(self) -> np.ndarray:
        """(N, 2) int64: start and length of each row's bytes."""
        length = math.prod(self.shape[1:])
        return np.stack([np.arange(self.shape[0]) * length, np.full(self.shape[0], length)], axis=1)

    @cached_property
    def finished(self) -> np.ndarray:
        """(N,) bool: rows that the bitmap says are on disk, and that are inside the files there."""
        path, count = self.folder / BITMAP, self.shape[0]
        if file_length(path) != (count + 7) // 8 or file_length(self.folder / CONTENTS) != 16 * count:
            return np.zeros(count, dtype=bool)
        bits = np.unpackbits(np.fromfile(path, dtype=np.uint8), count=count).astype(bool)
        return bits & (self.spans[:, 1] > 0) & (self.spans.sum(axis=1) <= file_length(self.path))

    def _read_numbers(self, name: str, dtype: str) -> np.ndarray:
        """(N, 2) of a file of 8-byte numbers; zeros where it does not have as many."""
        if file_length(self.folder / name) != 16 * self.shape[0]:
            return np.zeros((self.shape[0], 2), dtype=dtype)
        return np.fromfile(self.folder / name, dtype=dtype).reshape(-1, 2)

    def _write_array(self, name: str, array: np.ndarray) -> None:
        with atomic_path(self.folder / name) as beside:
            beside.write_bytes(array.tobytes())  # tofile ignores a full disk

    @cached_property
    def map(self) -> mmap.mmap:
        """The file of the images."""
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def stored(self, row: int) -> memoryview:
        """A row's bytes as they are on disk."""
        start, length = self.spans[row].tolist()
        return memoryview(self.map)[start : start + length]

    def is_whole(self, row: int) -> bool:
        """Whether a row's bytes are those that were written."""
        return zlib.crc32(self.stored(row)) == self.digests[row, 1]

    def prepare(self) -> None:
        """Keep the finished rows that are whole, and make the file ready for the others."""
        for row in np.flatnonzero(self.finished).tolist():
            self.finished[row] = self.is_whole(row)
        self.write_index()  # before a file that was cut gets its full length again
        with open(self.path, "ab") as file:
            file.truncate(self._length())

    def _length(self) -> int:
        return math.prod(self.shape)  # sparse until rows are written

    def put(self, row: int, data: bytes, digests: tuple[int, int]) -> None:
        """Write a row, which `checkpoint` then marks as finished on disk."""
        self.write(self.spans[row, 0], data)
        self.digests[row], self.finished[row] = digests, True

    def write(self, start: int, data: bytes) -> None:
        # no memory map: on a full disk writing to one is a SIGBUS, here it is an OSError
        with open(self.path, "r+b") as file:
            file.seek(start)
            file.write(data)

    def checkpoint(self) -> None:
        """The rows reach the disk before the bitmap that names them."""
        with open(self.path, "r+b") as file:
            os.fsync(file.fileno())
        self.write_index()

    def write_index(self) -> None:
        self._write_array(CONTENTS, self.digests)
        self._write_array(BITMAP, np.packbits(self.finished))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8."""
        if hasattr(mmap, "MADV_WILLNEED"):  # ask for all rows at once: 5 times as fast from a cold SSD
            for start, length in self.spans[rows].tolist():
                before = start % mmap.PAGESIZE
                self.map.madvise(mmap.MADV_WILLNEED, start - before, length + before)
        return np.frombuffer(self.map, dtype=np.uint8).reshape(self.shape)[rows]


class JpegStore(RawStore):
    """One JPEG per image, in the order they were finished."""

    file_name = "pictures.jpegs"

    @staticmethod
    def bytes_per_image(size: int) -> int:
        # generous: Flickr8k at 224 px took 0.35 bytes per pixel, tables included
        return size * size // 2 + 700

    @staticmethod
    def encode(image: np.ndarray) -> bytes:
        return simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorsubsampling="420")

    @cached_property
    def spans(self) -> np.ndarray:
        return self._read_numbers(SPANS, "<i8")

    def _length(self) -> int:
        self.spans[~self.finished] = 0
        self.end = int(self.spans.sum(axis=1).max())
        return self.end

    def put(self, row: int, data: bytes, digests: tuple[int, int]) -> None:
        self.spans[row] = self.end, len(data)
        self.end += len(data)
        super().put(row, data, digests)

    def write_index(self) -> None:
        self._write_array(SPANS, self.spans)
        super().write_index()

    def read(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)  # (B, S, S, 3)
        step = max(1, min(torch.get_num_threads(), len(rows)))
        with ThreadPoolExecutor(step) as pool:  # simplejpeg lets other threads run
            list(pool.map(lambda i: self._decode(rows[i::step], images[i::step]), range(step)))
        return images

    def _decode(self, rows: np.ndarray, images: np.ndarray) -> None:
        for row, image in zip(rows.tolist(), images, strict=True):
            try:
                simplejpeg.decode_jpeg(self.stored(row), buffer=image)
            except ValueError as error:
                raise DamagedFileError(self.path, str(error), "delete its folder and run again") from error


def file_length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


FORMS: dict[str, type[RawStore]] = {"raw": RawStore, "jpeg": JpegStore}

# --- The cache ---


FORMAT_VERSION = 2  # raise it when the same file gives other pixels, or the layout changes
VERSIONS = {
    "format": FORMAT_VERSION,
    "pillow": PIL.__version__,
    "simplejpeg": simplejpeg.__version__,
    "reads": " ".join(FORMATS),
}
INDEX_FILES = (BITMAP, CONTENTS, SPANS)
CHECKPOINT_SECONDS = 5.0  # a kill loses at most this much work
ROWS_PER_TASK = 16
DISK_MARGIN = 1.05  # free space that a build needs, as a multiple of what is still to be written


class ImageCache:
    """A finished cache: uint8 images by row, memory-mapped.

    Images are stored as (N, S, S, 3), as decoders write them. Rows are copied whole, so gathering is as fast as in
    (N, 3, S, S); the `channels_last` view it gives is resized twice as fast by torch on a CPU, and is the layout
    that convolutions prefer.

    A row is checked against its CRC-32 on first use (0.05 ms per image of 224 px); a damaged one is decoded again.

    Args:
        folder: a cache's own folder; `open_or_build` finds or makes it.
        source: the image files, to decode damaged rows again.
    Attributes:
        bad: row -> cause, for images that could not be decoded; they have no pixels here.
        size: side S in pixels.
        form: `raw` or `jpeg`.
    Raises: LabError if the folder has no finished cache.
    """

    def __init__(self, folder: str | Path, source: Source | None = None) -> None:
        self.folder, self._source = Path(folder), source
        header = _read_header(self.folder)
        if header is None:
            raise LabError(f"{folder} has no finished image cache; make it with ImageCache.open_or_build.")
        self.size: int = header["size"]
        self.form: str = header["form"]
        self.resize: str = header["resize"]
        self.bad: dict[int, str] = {int(row): cause for row, cause in header["bad"].items()}
        self._store = FORMS[self.form](self.folder, header["count"], self.size)
        self._good = np.ones(header["count"], dtype=bool)
        self._good[list(self.bad)] = False
        self._checked = np.zeros(header["count"], dtype=bool)

    @cached_property
    def contents(self) -> np.ndarray:
        """(N,) uint64 digest of each image file's bytes: equal for equal files, whatever their path; 0 for bad ones."""
        return self._store.digests[:, 0].copy()

    @property
    def identity(self) -> str:
        """What the pixels are: of which files, made square how, in which form; not where or when."""
        settings = json.dumps({**VERSIONS, "size": self.size, "resize": self.resize, "form": self.form})
        return fingerprint([settings, self.contents.tobytes().hex()])

    @classmethod
    def open_or_build(
        cls,
        root: str | Path,
        paths: Sequence[str],
        *,
        size: int,
        folder: str | Path,
        resize: str = "crop",
        num_workers: int | None = None,
        progress: bool = True,
        jpeg: bool | None = None,
    ) -> ImageCache:
        """Open the cache of these images below `folder`, or decode them into it first.

        A cache belongs to the paths, sizes and modification times of its image files, the size, the resize rule and
        the decoders' versions, wherever `root` is. A second process waits for the first. JPEGs that were kept because
        the disk was short are replaced as soon as raw pixels fit, whatever the disk was earlier.

        Args:
            root: the data's folder.
            paths: N image files, relative to `root`; an image's row is its position in this list.
            size: side of the square images.
            folder: where caches are kept, each in a folder of its own.
            resize: `crop` or `squash`, as in `decode.decode_rgb`.
            num_workers: decoding processes; None: one per core.
            progress: show size, disk space and a progress bar.
            jpeg: keep images as JPEGs of quality 90, about an eighth of the bytes and slower to gather; None: only if
                the disk is too short for raw pixels.
        Raises: LabError if the disk is too short, or no image at all can be decoded.
        """
        source = Source(str(root), tuple(paths), size, resize)
        if not source.paths:
            raise LabError("an image cache needs at least one image; the list of paths is empty.")
        name = f"images_{size}px_{resize}_{source.key[:16]}"
        forms = [form for form in FORMS if jpeg is None or jpeg == (form == "jpeg")]
        folders = {form: make_folder(folder) / f"{name}_{form}" for form in forms}
        form, finished, message = _choose_form(folders, source)
        if not finished:
            waiting = "Another process is building this image cache; waiting for it." if progress else ""
            with locked(Path(folder) / f"{name}.lock", waiting=waiting):
                form, finished, message = _choose_form(folders, source)
                if not finished:
                    _build(source, folders, form, message, num_workers, progress)
        cache = cls(folders[form], source)
        if cache.bad and progress:
            causes = ", ".join(f"{cause}: {n:,}" for cause, n in Counter(cache.bad.values()).most_common())
            print(
                f"{len(cache.bad):,} of {len(cache):,} images cannot be decoded and are left out ({causes})."
            )
        return cache

    def __len__(self) -> int:
        """Rows, those of bad images included."""
        return len(self._good)

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path]]:
        return ImageCache, (self.folder,)  # a worker process maps the file again instead of copying it

    def gather(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """(B, 3, S, S) uint8 in memory format `channels_last`: a copy of these rows, in this order.

        Raises: LabError for the row of a bad image, or of a damaged one that cannot be decoded again; IndexError for
            a row that does not exist.
        """
        index = np.asarray(rows, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"rows {index.min()} to {index.max()} are not all among {len(self)} rows")
        if not self._good[index].all():
            row = int(index[~self._good[index]][0])
            raise LabError(f"row {row} has no image ({self.bad[row]}); leave out the rows in `bad`.")
        for row in index[~self._checked[index]].tolist():
            if not self._store.is_whole(row):
                self._repair(row)
            self._checked[row] = True
        return torch.from_numpy(self._store.read(index)).permute(0, 3, 1, 2)  # (B, 3, S, S)

    def _repair(self, row: int) -> None:
        """Decode a row again whose bytes on disk are not what was written. Raises: LabError if that fails."""
        source, store = self._source, self._store
        advice = f"delete {self.folder} and run again"
        if source is None:
            raise DamagedFileError(store.path, f"row {row}", advice)
        try:
            image = decode_rgb(os.path.join(source.root, source.paths[row]), source.size, source.resize)
            data = store.encode(np.ascontiguousarray(image))
            if zlib.crc32(data) != store.digests[row, 1]:
                raise DamagedFileError(store.path, f"{source.paths[row]}, whose file has changed", advice)
            store.write(store.spans[row, 0], data)
        except (UndecodableImage, OSError) as error:
            raise DamagedFileError(store.path, f"{source.paths[row]}: {error}", advice) from error
        print(f"{store.path} was damaged at {source.paths[row]}; that image is decoded again.")


@dataclass(frozen=True)
class Source:
    """What is cached: image files below a root, and how each is made square."""

    root: str
    paths: tuple[str, ...]
    size: int
    resize: str

    @cached_property
    def key(self) -> str:
        """SHA-256 of all that decides the pixels, and of nothing else: not of where the root is."""
        settings = json.dumps({**VERSIONS, "size": self.size, "resize": self.resize})
        files = (f"{path}\0{stamp(os.path.join(self.root, path))}" for path in self.paths)
        return fingerprint([settings, *files])

    def store(self, folder: Path, form: str) -> RawStore:
        return FORMS[form](folder, len(self.paths), self.size)


# --- Building ---


def _read_header(folder: Path, source: Source | None = None) -> dict[str, Any] | None:
    """The header of a finished cache, of `source` if given; None unless its files are all there."""
    try:
        header = read_json(folder / HEADER)
        store = FORMS[header["form"]](folder, header["count"], header["size"])
        absent = np.flatnonzero(~store.finished).tolist()
        complete = absent == sorted(int(row) for row in header["bad"]) and all(
            file_checksum(folder / name) == code for name, code in header["files"].items()
        )
        fits = header["format"] == FORMAT_VERSION and (source is None or header["fingerprint"] == source.key)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header if complete and fits else None


def write_header(folder: Path, source: Source, form: str, bad: dict[int, str]) -> None:
    header = {
        **VERSIONS,
        "fingerprint": source.key,
        "count": len(source.paths),
        "size": source.size,
        "resize": source.resize,
        "form": form,
        "bad": bad,
        "files": {name: file_checksum(folder / name) for name in INDEX_FILES if (folder / name).is_file()},
    }
    write_json(folder / HEADER, header, seal=True)


def _choose_form(folders: dict[str, Path], source: Source) -> tuple[str, bool, str]:
    """The first form that is finished or that the disk has room for, whether it is finished, and what it needs.

    Rows of an unfinished form that are on disk already give their room to the next form. The form is "" if none fits.
    """
    parent = next(iter(folders.values())).parent
    free = room = shutil.disk_usage(parent).free
    too_big: list[str] = []
    for form, folder in folders.items():
        if _read_header(folder, source):
            return form, True, ""
        store = source.store(folder, form)
        each, done = store.bytes_per_image(source.size), int(store.finished.sum())
        missing = len(source.paths) - done
        need = f"{missing * each / 1e9:.2f} GB as {form}"
        if missing * each * DISK_MARGIN <= room:
            note = f", too little for {', '.join(too_big)}" if too_big else ""
            message = (
                f"Image cache: {missing:,} images to decode take {need}; {free / 1e9:.1f} GB are free{note}."
            )
            return form, False, message
        room += done * each
        too_big.append(need)
    message = (
        f"the image cache needs {' or '.join(too_big)}, and {parent} has {free / 1e9:.2f} GB free; "
        "free some space, set cache_dir to another disk, or choose a smaller image_size."
    )
    return "", False, message


def _build(
    source: Source,
    folders: dict[str, Path],
    form: str,
    message: str,
    num_workers: int | None,
    progress: bool,
) -> None:
    """Decode what the form lacks, write its header and delete the other forms.

    Raises: LabError if the form is "", or it cannot be finished.
    """
    if not form:
        raise LabError(message)
    if progress:
        print(message)
    order, folder = list(folders), make_folder(folders[form])
    for larger in order[: order.index(form)]:  # unfinished; their room is needed
        shutil.rmtree(folders[larger], ignore_errors=True)
    for leftover in (folder / HEADER, *folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)
    store = source.store(folder, form)
    try:
        store.prepare()
        bad = _decode_missing(source, store, num_workers, progress)
    except OSError as error:
        raise LabError(
            f"the image cache {folder} cannot be written ({error.strerror or error}); free some disk space and run "
            "again, images that are finished are kept."
        ) from error
    if len(bad) == len(source.paths):
        raise LabError(f"no image can be decoded ({source.paths[0]}: {bad[0]}, ...); see data_dir.")
    write_header(folder, source, form, bad)
    for smaller in order[order.index(form) + 1 :]:
        shutil.rmtree(folders[smaller], ignore_errors=True)


def _decode_missing(
    source: Source, store: RawStore, num_workers: int | None, progress: bool
) -> dict[int, str]:
    """Decode and store the rows that are not finished; returns row -> cause of those that cannot be decoded."""
    rows = np.flatnonzero(~store.finished).tolist()
    files = [(row, os.path.join(source.root, source.paths[row])) for row in rows]
    decode = partial(_decode_row, store.encode, source.size, source.resize)
    results = in_processes(decode, files, num_workers, chunk_size=ROWS_PER_TASK)
    count = len(source.paths)
    bar = tqdm(results, "image cache", count, initial=count - len(rows), unit="img", disable=not progress)
    bad: dict[int, str] = {}
    saved = time.monotonic()
    with closing(results), bar:
        try:
            for row, cause, data, digests in bar:
                if cause:
                    bad[row] = cause
                    continue
                store.put(row, data, digests)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    store.checkpoint()
                    saved = time.monotonic()
        finally:
            store.checkpoint()
    return bad


class _Decoded(NamedTuple):
    """A row's outcome: why it cannot be decoded or "", the bytes to store, digests of the file and of these bytes."""

    row: int
    cause: str
    data: bytes = b""
    digests: tuple[int, int] = (0, 0)


def _decode_row(
    encode: Callable[[np.ndarray], bytes], size: int, resize: str, file: tuple[int, str]
) -> _Decoded:
    row, path = file
    try:
        image = decode_rgb(path, size, resize)  # (S, S, 3)
    except UndecodableImage as error:
        return _Decoded(row, error.cause)
    data = encode(np.ascontiguousarray(image))
    return _Decoded(row, "", data, (content_digest(path), zlib.crc32(data)))


def content_digest(path: str | os.PathLike[str]) -> int:
    """The first 64 bits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:8], "little")


def open_images(
    table: CaptionTable, cache_dir: str | Path, size: int, resize: str, num_workers: int = 0
) -> ImageCache:
    """The table's images, decoded once."""
    folder = Path(cache_dir) / "images"
    return ImageCache.open_or_build(
        table.root, table.paths, size=size, resize=resize, folder=folder, num_workers=num_workers or None
    )
