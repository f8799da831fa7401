"""The format of feature caches: write, verify, open; knows no model.

A cache is one safetensors file: `features` (N, width) float16, and a header of strings that says what
they are of and what made them. A file is written beside, flushed and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import LabError

Header = dict[str, str]


class StaleCacheError(LabError):
    """A cache that belongs to other inputs, another encoder, or is damaged."""


def fingerprint(items: Iterable[str]) -> str:
    """SHA-256 over strings in order; no two different lists collide by concatenation."""
    digest = hashlib.sha256()
    for item in items:
        data = item.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; flushed to disk and renamed to it if all went well.

    Raises: LabError if the disk is full; what stood at `path` is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise LabError(
            f"{path} could not be written ({error.strerror or error}); what was there is kept."
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def write_features(path: str | Path, features: Tensor, header: Header) -> None:
    """Write (N, width) features as float16 with their header. Raises: LabError if one is not finite."""
    features = features.to(torch.float16).contiguous().cpu()
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise LabError(f"row {row} of {path} is not finite in half precision; nothing was written.")
    with atomic_path(path) as beside:
        save_file({"features": features}, beside, metadata={"header": json.dumps(header, sort_keys=True)})


def open_features(path: str | Path, header: Header) -> Tensor:
    """(N, width) float16, memory-mapped.

    Raises: StaleCacheError if the file is damaged or its header is another, naming what differs.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("header", "{}"))
            features = file.get_tensor("features")
    except (SafetensorError, OSError, ValueError) as error:
        raise StaleCacheError(f"cache {path} is damaged ({error}); delete it and run again.") from error
    wrong = [name for name in sorted(header.keys() | found.keys()) if header.get(name) != found.get(name)]
    if wrong:
        raise StaleCacheError(f"cache {path} belongs to another {', '.join(wrong)}; delete it and run again.")
    return features


def cached_features(
    path: str | Path,
    header: Header,
    num_rows: int,
    compute: Callable[[Sequence[int]], Tensor],
    chunk: int = 2048,
) -> Tensor:
    """Open the cache at `path`, or fill it in chunks that survive an interruption, then open it.

    Args:
        compute: maps row numbers to their (n, width) features; called chunk by chunk in order.
        chunk: rows computed between two writes.
    Returns: (N, width) float16, memory-mapped.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # a second process waits, then finds it filled
        if path.exists():
            try:
                return open_features(path, header)
            except StaleCacheError as stale:
                print(f"{stale} It is rebuilt.")
                path.unlink()
        fill_share(path, header, num_rows, compute, chunk=chunk)
        pieces = [open_features(*_part(path, header, start, chunk)) for start in range(0, num_rows, chunk)]
        write_features(path, torch.cat(pieces), header)
        shutil.rmtree(path.with_suffix(".parts"))
        return open_features(path, header)


def fill_share(
    path: Path,
    header: Header,
    num_rows: int,
    compute: Callable[[Sequence[int]], Tensor],
    shard: tuple[int, int] = (0, 1),
    chunk: int = 2048,
) -> None:
    """Compute one process's share of a cache: the chunks from `rank` on, every `world`-th.

    `cached_features` joins the chunks of all, once they are there; a share that was cut goes on.

    Args: shard: (rank, world).
    """
    rank, world = shard
    if path.exists():
        return
    for start in range(rank * chunk, num_rows, world * chunk):
        part, part_header = _part(path, header, start, chunk)
        if not _is_good(part, part_header):
            write_features(part, compute(range(start, min(start + chunk, num_rows))), part_header)


def _part(path: Path, header: Header, start: int, chunk: int) -> tuple[Path, Header]:
    """File and header of the chunk that starts there."""
    name = path.with_suffix(".parts") / f"{start:09d}.safetensors"
    return name, {**header, "start": str(start), "chunk": str(chunk)}


def _is_good(path: Path, header: Header) -> bool:
    try:
        open_features(path, header)
    except StaleCacheError:
        return False
    return True


def as_rows(rows: Sequence[int] | np.ndarray) -> Tensor:
    """Row numbers as an index tensor, whatever sequence they come in."""
    return torch.as_tensor(np.asarray(rows, dtype=np.int64))
