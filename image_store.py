"""The two forms in which a cache keeps pictures: raw pixels, and small JPEGs."""

from __future__ import annotations

import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from errors import LabError
from files import atomic_path

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
