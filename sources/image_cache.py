"""The two forms in which a cache keeps pictures: raw pixels, and small JPEGs."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from core.errors import LabError
from core.files import DamagedFileError, atomic_path, fingerprint, make_folder, read_json, write_json
from core.tensor_files import file_checksum
from sources.decode import FORMATS, UndecodableImage, decode_rgb
from sources.table import CaptionTable, stamp

JPEG_QUALITY = 90


class BaseStore:
    """Pictures in one file, by row: written by several processes, flushed by one, then read."""

    file_name: str

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.path = folder / self.file_name
        self.shape = (count, size, size, 3)
        self.file: FileIO

    def open(self) -> None:
        # no memory map: on a full disk writing to one is a SIGBUS, here it is an OSError
        self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()

    def close(self) -> None:
        self.file.close()

    def write(self, start: int, data: bytes) -> None:
        self.file.seek(start)
        left = memoryview(data)
        while left:  # an unbuffered write may stop short
            left = left[self.file.write(left) or 0 :]

    def place(self, row: int) -> tuple[int, int]:
        """Start and length of a row's bytes."""
        raise NotImplementedError

    def stored(self, row: int) -> memoryview:
        """A row's bytes as they are on disk."""
        start, length = self.place(row)
        return memoryview(self.map)[start : start + length]

    def flush(self) -> None:
        """Everything written so far reaches the disk, whichever process wrote it."""
        os.fsync(self.file.fileno())

    @cached_property
    def map(self) -> mmap.mmap:
        """The finished file."""
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class RawStore(BaseStore):
    """Pixels as they are, row after row; decoding processes write theirs in place."""

    file_name = "pictures.u8"

    @staticmethod
    def bytes_per_picture(size: int) -> int:
        return size * size * 3

    def present(self) -> np.ndarray:
        """(N,) bool: rows that lie inside the file."""
        return np.arange(self.shape[0]) < file_length(self.path) // self.bytes_per_picture(self.shape[1])

    def prepare(self, done: np.ndarray) -> None:
        """Make the file ready for the rows that are not `done`."""
        with open(self.path, "ab") as file:
            file.truncate(math.prod(self.shape))  # sparse until rows are written

    def place(self, row: int) -> tuple[int, int]:
        each = math.prod(self.shape[1:])
        return row * each, each

    @staticmethod
    def encode(picture: np.ndarray) -> bytes:
        """The bytes that are stored of an image."""
        return picture.tobytes()

    def pack(self, row: int, data: bytes) -> bytes:
        """In a decoding process: what the parent is to write, here nothing any more."""
        self.write(self.place(row)[0], data)
        return b""

    def commit(self, row: int, data: bytes) -> None:
        """In the parent: write what `pack` returned."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        if hasattr(mmap, "MADV_WILLNEED"):  # ask for all rows at once: 5 times as fast from a cold SSD
            each = math.prod(self.shape[1:])
            for start in (rows * each).tolist():
                before = start % mmap.PAGESIZE
                self.map.madvise(mmap.MADV_WILLNEED, start - before, each + before)
        return np.frombuffer(self.map, dtype=np.uint8).reshape(self.shape)[rows]  # (B, S, S, 3)


class JpegStore(BaseStore):
    """One JPEG a picture, in the order they were finished, and a table (N, 2) of starts and lengths."""

    file_name = "pictures.jpegs"

    def __init__(self, folder: Path, count: int, size: int) -> None:
        super().__init__(folder, count, size)
        self.table_path = folder / "table.i64"
        self.table = np.zeros((count, 2), dtype="<i8")
        if file_length(self.table_path) == self.table.nbytes:
            self.table = np.fromfile(self.table_path, dtype="<i8").reshape(count, 2)

    @staticmethod
    def bytes_per_picture(size: int) -> int:
        """An estimate with room to spare: Flickr8k at 224 px took 0.35 bytes a pixel, tables included."""
        return size * size // 2 + 700

    def present(self) -> np.ndarray:
        return (self.table[:, 1] > 0) & (self.table.sum(axis=1) <= file_length(self.path))

    def prepare(self, done: np.ndarray) -> None:
        self.table[~done] = 0
        self.end = int(self.table.sum(axis=1).max())
        with open(self.path, "ab") as file:
            file.truncate(self.end)  # what came after it has no bit

    def place(self, row: int) -> tuple[int, int]:
        start, length = self.table[row].tolist()
        return start, length

    @staticmethod
    def encode(picture: np.ndarray) -> bytes:
        return simplejpeg.encode_jpeg(picture, quality=JPEG_QUALITY, colorsubsampling="420")

    def pack(self, row: int, data: bytes) -> bytes:
        return data

    def commit(self, row: int, data: bytes) -> None:
        self.write(self.end, data)
        self.table[row] = self.end, len(data)
        self.end += len(data)

    def flush(self) -> None:
        super().flush()
        with atomic_path(self.table_path) as beside:
            self.table.tofile(beside)

    def read(self, rows: np.ndarray) -> np.ndarray:
        pictures = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)  # (B, S, S, 3)
        step = max(1, min(torch.get_num_threads(), len(rows)))
        with ThreadPoolExecutor(step) as pool:  # simplejpeg lets other threads run
            list(pool.map(lambda i: self._decode(rows[i::step], pictures[i::step]), range(step)))
        return pictures

    def _decode(self, rows: np.ndarray, pictures: np.ndarray) -> None:
        for (start, length), picture in zip(self.table[rows], pictures, strict=True):
            try:
                simplejpeg.decode_jpeg(self.map[start : start + length], buffer=picture)
            except ValueError as error:
                raise LabError(
                    f"{self.path} is damaged ({error}); delete its folder and run again."
                ) from error


def file_length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


Store = RawStore | JpegStore
FORMS: dict[str, type[RawStore] | type[JpegStore]] = {"raw": RawStore, "jpeg": JpegStore}


FORMAT_VERSION = 2  # raise it when the same file gives other pixels, or the layout changes
VERSIONS = {
    "format": FORMAT_VERSION,
    "pillow": PIL.__version__,
    "simplejpeg": simplejpeg.__version__,
    "reads": " ".join(FORMATS),
}
HEADER, BITMAP, CONTENTS = "header.json", "finished.bits", "rows.u64"
INDEX_FILES = (BITMAP, CONTENTS, "table.i64")
CHECKPOINT_SECONDS = 5.0  # a kill loses at most this much work
ROWS_PER_TASK = 16
DISK_MARGIN = 1.05  # free space wanted, as a multiple of what is still to be written

Digests = tuple[int, int]  # of an image file's bytes, and the CRC-32 of what is stored of it
Result = tuple[int, bytes | None, str, Digests]  # row, bytes for the parent to write, cause if undecodable


class ImageCache:
    """A finished cache: uint8 pictures by row, memory-mapped.

    Pictures lie on disk as (N, S, S, 3), as decoders write them. Rows are copied whole, so gathering is
    as fast as in (N, 3, S, S); the `channels_last` view it gives is resized twice as fast by torch on
    a CPU, and is the layout convolutions prefer.

    A row is checked against its CRC-32 on first use (0.05 ms an image of 224 px); a damaged one is decoded again.

    Args:
        folder: a cache's own folder; `open_or_build` finds or makes it.
        source: the image files, to decode damaged rows again.
    Attributes:
        bad: row -> cause, for pictures that could not be decoded; they have no pixels here.
        size: side S in pixels.
        form: `raw`, or `jpeg` for the small form.
    Raises: LabError if the folder holds no finished cache.
    """

    def __init__(self, folder: str | Path, source: _Source | None = None) -> None:
        self.folder, self._source = Path(folder), source
        header = _read_header(self.folder)
        if header is None:
            raise LabError(f"{folder} holds no finished image cache; make it with ImageCache.open_or_build.")
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
        """(N,) uint64 digest of each image file's bytes: equal for equal files, wherever they lie; 0 for bad ones."""
        return _read_contents(self.folder, len(self))[:, 0].copy()

    @cached_property
    def _checksums(self) -> list[int]:
        return _read_contents(self.folder, len(self))[:, 1].tolist()

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
        """Open the cache of these pictures below `folder`, or decode them into it first.

        A cache belongs to the paths, sizes and modification times of its pictures, the size, the resize
        rule and the decoders' versions, wherever `root` lies. A second process waits for the first.

        Args:
            root: the data's folder.
            paths: N picture files, relative to `root`; a picture's row is its place in this list.
            size: side of the square pictures.
            folder: where caches are kept, each in a folder of its own.
            resize: `crop` or `squash`, as in `pictures.decode_rgb`.
            num_workers: decoding processes; none: one a core.
            progress: show size, disk space and a progress bar.
            jpeg: keep pictures as JPEGs of quality 90, about an eighth of the bytes and slower to
                gather; none: only if the disk is too short for raw pixels.
        Raises: LabError if the disk is too short, or no picture at all can be decoded.
        """
        source = _Source(str(root), tuple(paths), size, resize)
        if not source.paths:
            raise LabError("an image cache needs at least one picture; the list of paths is empty.")
        forms = [form for form in FORMS if jpeg is None or jpeg == (form == "jpeg")]
        name = f"images_{size}px_{resize}_{source.key[:16]}"
        folders = {form: Path(folder) / f"{name}_{form}" for form in forms}
        finished = _find_finished(folders, source)
        if finished is None:
            with _lock(Path(folder) / f"{name}.lock", progress):
                finished = _find_finished(folders, source)  # by the process that was waited for
                if finished is None:
                    form = _choose_form(folders, source, progress)
                    finished = folders[form]
                    _build(source, finished, form, _cores() if num_workers is None else num_workers, progress)
        opened = cls(finished, source)
        if opened.bad and progress:
            causes = ", ".join(f"{cause}: {n:,}" for cause, n in Counter(opened.bad.values()).most_common())
            print(f"{len(opened.bad):,} of {len(opened):,} pictures are left out as undecodable ({causes}).")
        return opened

    def __len__(self) -> int:
        """Rows, those of bad pictures included."""
        return len(self._good)

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path]]:
        return ImageCache, (self.folder,)  # a worker process maps the file anew instead of copying it

    def gather(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """(B, 3, S, S) uint8 in memory format `channels_last`: a copy of these rows, in this order.

        Raises: LabError for the row of a bad picture, or of a damaged one that cannot be decoded again;
            IndexError for a row that does not exist.
        """
        index = np.asarray(rows, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"rows {index.min()} to {index.max()} are not all among {len(self)} rows")
        if not self._good[index].all():
            row = int(index[~self._good[index]][0])
            raise LabError(f"row {row} has no picture ({self.bad[row]}); leave out the rows in `bad`.")
        for row in index[~self._checked[index]].tolist():
            if zlib.crc32(self._store.stored(row)) != self._checksums[row]:
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
            picture = decode_rgb(os.path.join(source.root, source.paths[row]), source.size, source.resize)
            data = store.encode(np.ascontiguousarray(picture))
            if zlib.crc32(data) != self._checksums[row]:
                raise DamagedFileError(store.path, f"{source.paths[row]}, which is another file now", advice)
            store.open()
            with closing(store):
                store.write(store.place(row)[0], data)
                store.flush()
        except (UndecodableImage, OSError) as error:
            raise DamagedFileError(store.path, f"{source.paths[row]}: {error}", advice) from error
        print(f"{store.path} was damaged at {source.paths[row]}; that image is decoded again.")


@dataclass(frozen=True)
class _Source:
    """What is cached: picture files below a root, and how each is made square."""

    root: str
    paths: tuple[str, ...]
    size: int
    resize: str

    @cached_property
    def key(self) -> str:
        """SHA-256 of all that decides the pixels, and of nothing else: not of where the root lies."""
        settings = json.dumps({**VERSIONS, "size": self.size, "resize": self.resize})
        files = (f"{path}\0{stamp(os.path.join(self.root, path))}" for path in self.paths)
        return fingerprint([settings, *files])


# --- header and bitmap -----------------------------------------------------------------------------


def _read_header(folder: Path, source: _Source | None = None) -> dict[str, Any] | None:
    """The header of a finished cache, of `source` if given; None unless its files are all there."""
    try:
        header = read_json(folder / HEADER)
        store = FORMS[header["form"]](folder, header["count"], header["size"])
        absent = np.flatnonzero(~_read_done(store)).tolist()
        whole = absent == sorted(int(row) for row in header["bad"])
        whole = whole and all(file_checksum(folder / name) == code for name, code in header["files"].items())
        fits = header["format"] == FORMAT_VERSION and (source is None or header["fingerprint"] == source.key)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header if whole and fits else None


def _write_header(folder: Path, source: _Source, form: str, bad: dict[int, str]) -> None:
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


def _read_done(store: Store) -> np.ndarray:
    """(N,) bool: rows that the bitmap says are on disk, and that lie inside the files found there."""
    path, count = store.path.parent / BITMAP, store.shape[0]
    if file_length(path) != (count + 7) // 8 or file_length(path.with_name(CONTENTS)) != 16 * count:
        return np.zeros(count, dtype=bool)
    return np.unpackbits(np.fromfile(path, dtype=np.uint8), count=count).astype(bool) & store.present()


def _read_contents(folder: Path, count: int) -> np.ndarray:
    """(N, 2) digest of each file's bytes and CRC-32 of what is stored of it; zeros where there are not as many."""
    path = folder / CONTENTS
    fits = file_length(path) == 16 * count
    return (np.fromfile(path, dtype="<u8") if fits else np.zeros(2 * count, dtype="<u8")).reshape(count, 2)


def _write_contents(folder: Path, contents: np.ndarray) -> None:
    with atomic_path(folder / CONTENTS) as beside:
        contents.tofile(beside)


def _write_done(store: Store, done: np.ndarray) -> None:
    with atomic_path(store.path.parent / BITMAP) as beside:
        np.packbits(done).tofile(beside)


def _find_finished(folders: dict[str, Path], source: _Source) -> Path | None:
    return next((folder for folder in folders.values() if _read_header(folder, source)), None)


# --- building --------------------------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lock(path: Path, progress: bool) -> AcquireReturnProxy:
    """The lock of one cache, a context; it ends with its process, however that ends."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print("Another process is building this image cache; waiting for it.")
        return lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise LabError(
            f"{path.parent} cannot hold an image cache ({error}); set cache_dir to a local disk."
        ) from error


def _choose_form(folders: dict[str, Path], source: _Source, progress: bool) -> str:
    """The first form the disk has room for; unfinished builds of a larger form then make way for it."""
    count, parent = len(source.paths), next(iter(folders.values())).parent
    free = room = shutil.disk_usage(parent).free
    too_big: dict[str, str] = {}
    for form, folder in folders.items():
        each = FORMS[form].bytes_per_picture(source.size)
        missing = int((~_read_done(FORMS[form](folder, count, source.size))).sum())
        need = f"{missing * each / 1e9:.2f} GB as {form}"
        if missing * each * DISK_MARGIN <= room:
            for other in too_big:
                shutil.rmtree(folders[other], ignore_errors=True)
            if progress:
                note = f", too few for {', '.join(too_big.values())}" if too_big else ""
                print(
                    f"Image cache: {missing:,} pictures to decode take {need}; {free / 1e9:.1f} GB are free{note}."
                )
            return form
        room += (count - missing) * each
        too_big[form] = need
    raise LabError(
        f"the image cache needs {' or '.join(too_big.values())}, and {parent} has {free / 1e9:.2f} GB free; "
        "free some, set cache_dir to another disk, or choose a smaller image_size."
    )


def _build(source: _Source, folder: Path, form: str, num_workers: int, progress: bool) -> None:
    """Decode what the bitmap lacks, then write the header. Raises: LabError if it cannot be finished."""
    make_folder(folder)
    for leftover in (folder / HEADER, *folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)
    store = FORMS[form](folder, len(source.paths), source.size)
    earlier = FORMS[form](folder, len(source.paths), source.size)
    done, contents = _read_done(earlier), _read_contents(folder, len(source.paths))
    for row in np.flatnonzero(done).tolist():  # what an earlier build wrote, or was damaged since
        done[row] = zlib.crc32(earlier.stored(row)) == contents[row, 1]
    _write_contents(folder, contents)
    _write_done(store, done)  # before a file that was cut is made whole again
    try:
        store.prepare(done)
        store.open()
        with closing(store):
            bad = _decode_missing(source, store, done, num_workers, progress)
    except BrokenProcessPool as error:
        raise LabError(
            "a decoding process was killed, most often for want of memory; run again with fewer num_workers, "
            "finished pictures are kept."
        ) from error
    except OSError as error:
        raise LabError(
            f"the image cache {folder} cannot be written ({error.strerror or error}); free some disk and run "
            "again, finished pictures are kept."
        ) from error
    if len(bad) == len(done):
        raise LabError(f"no picture can be decoded ({source.paths[0]}: {bad[0]}, ...); see data_dir.")
    _write_header(folder, source, form, bad)


def _decode_missing(
    source: _Source, store: Store, done: np.ndarray, num_workers: int, progress: bool
) -> dict[int, str]:
    """Fill the store and the bitmap `done`; returns row -> cause of the undecodable."""

    contents = _read_contents(store.path.parent, len(done))

    def checkpoint() -> float:
        store.flush()
        _write_contents(store.path.parent, contents)
        _write_done(store, done)
        return time.monotonic()

    bad: dict[int, str] = {}
    rows = np.flatnonzero(~done).tolist()
    start = len(done) - len(rows)
    bar = tqdm(total=len(done), initial=start, desc="image cache", unit="img", disable=not progress)
    saved = time.monotonic()
    with bar, closing(_results(source, store, rows, num_workers)) as results:
        try:
            for row, data, cause, digests in results:
                if data is None:
                    bad[row] = cause
                else:
                    store.commit(row, data)
                    done[row], contents[row] = True, digests
                bar.update()
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    saved = checkpoint()
        finally:
            checkpoint()
    return bad


def _results(
    source: _Source, store: Store, rows: list[int], num_workers: int
) -> Generator[Result, None, None]:
    """What became of each row, in order."""
    tasks = [rows[first : first + ROWS_PER_TASK] for first in range(0, len(rows), ROWS_PER_TASK)]
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        for task in tasks:
            yield from _decode(source, store, task)
        return
    # A fork starts at once and needs no guard in the user's script; elsewhere than on Linux it is unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    own = type(store)(store.path.parent, *store.shape[:2])  # each worker opens its own file
    with ProcessPoolExecutor(num_workers, context, _start_worker, (source, own)) as pool:
        for results in pool.map(_decode_in_worker, tasks):
            yield from results


def _decode(source: _Source, store: Store, rows: list[int]) -> list[Result]:
    results: list[Result] = []
    for row in rows:
        try:
            path = os.path.join(source.root, source.paths[row])
            picture = decode_rgb(path, source.size, source.resize)  # (S, S, 3)
        except UndecodableImage as error:
            results.append((row, None, error.cause, (0, 0)))
        else:
            data = store.encode(np.ascontiguousarray(picture))
            digests = content_digest(path), zlib.crc32(data)
            results.append((row, store.pack(row, data), "", digests))
    return results


def content_digest(path: str | os.PathLike[str]) -> int:
    """The first 64 bits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:8], "little")


_worker: tuple[_Source, Store]  # what a worker process works on


def _start_worker(source: _Source, store: Store) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers an interrupt
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    store.open()
    _worker = source, store


def _exit_with_parent() -> None:
    """A parent that was killed leaves no worker behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _decode_in_worker(rows: list[int]) -> list[Result]:
    return _decode(*_worker, rows)


def open_images(
    table: CaptionTable, cache_dir: str | Path, size: int, resize: str, num_workers: int = 0
) -> ImageCache:
    """The table's pictures, decoded once."""
    folder = Path(cache_dir) / "images"
    return ImageCache.open_or_build(
        table.root, table.paths, size=size, resize=resize, folder=folder, num_workers=num_workers or None
    )
