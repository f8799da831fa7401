"""The format of feature caches: write, verify, open; knows no model.

A cache is one safetensors file: `features` (N, width) float16, and a header of strings that says what
they are of and what made them. A file is written beside, flushed and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captions import CaptionTable
from errors import LabError
from files import DamagedFileError, locked, sweep
from tensor_files import load_tensors, save_tensors

# --- Files ---


Header = dict[str, str]


class StaleCacheError(LabError):
    """A cache that belongs to other inputs, another encoder, or is damaged."""


def write_features(path: str | Path, features: Tensor, header: Header) -> None:
    """Write (N, width) features as float16 with their header. Raises: LabError if one is not finite."""
    features = features.to(torch.float16).contiguous().cpu()
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise LabError(f"row {row} of {path} is not finite in half precision; nothing was written.")
    save_tensors(path, {"features": features}, {"header": json.dumps(header, sort_keys=True)})


def open_features(path: str | Path, header: Header) -> Tensor:
    """(N, width) float16, memory-mapped.

    Raises: StaleCacheError if the file is damaged or its header is another, naming what differs.
    """
    try:
        tensors, metadata = load_tensors(path, "delete it and run again")
        found, features = json.loads(metadata.get("header", "{}")), tensors["features"]
    except DamagedFileError as error:
        raise StaleCacheError(f"cache {error}") from error
    except (OSError, ValueError, KeyError) as error:
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
    with locked(f"{path}.lock"):
        sweep(path.parent)
        # a second process waits, then finds it filled
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


# --- Views of features that stay on disk ---


ROWS_AT_ONCE = 65_536


class Rows:
    """Some rows of tensors that stay where they are, on disk or shared; indexing copies the rows asked for.

    Args:
        parts: tensors of one width, their rows numbered through.
        numbers: (N,) which of these rows, in which order; None: all.
    Raises: LabError if the widths differ.
    """

    def __init__(self, parts: Sequence[Tensor], numbers: np.ndarray | None = None) -> None:
        widths = {part.shape[1] for part in parts}
        if len(widths) > 1:
            raise LabError(
                f"embeddings are {sorted(widths)} numbers wide; one encoder gives all of them one width."
            )
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.numbers = np.arange(self.starts[-1]) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.parts[0].shape[1]

    def take(self, rows: np.ndarray) -> Rows:
        """Some of these rows, as another view."""
        return Rows(self.parts, self.numbers[rows])

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, (at most size, width) at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def __getitem__(self, index: Any) -> Tensor:
        """(n, width) rows by index tensor, array, slice or mask."""
        numbers = self.numbers[index.numpy() if isinstance(index, Tensor) else index]
        if len(self.parts) == 1:
            return self.parts[0][as_rows(numbers)]
        found = torch.empty(len(numbers), self.shape[1], dtype=self.parts[0].dtype)
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        for owner in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == owner)
            found[as_rows(mine)] = self.parts[owner][as_rows(numbers[mine] - self.starts[owner])].to(
                found.dtype
            )
        return found


def stacked(views: Sequence[Rows]) -> Rows:
    """Views one after another as one view."""
    parts = [part for view in views for part in view.parts]
    before = np.cumsum([0, *(view.starts[-1] for view in views)])
    return Rows(parts, np.concatenate([view.numbers + b for view, b in zip(views, before, strict=False)]))


def row_digests(features: Tensor | Rows, rows: np.ndarray) -> np.ndarray:
    """(len(rows),) uint64, a digest of each of these rows' bytes."""
    digests = [
        hashlib.blake2b(row.tobytes(), digest_size=8).digest()
        for start in range(0, len(rows), ROWS_AT_ONCE)
        for row in features[as_rows(rows[start : start + ROWS_AT_ONCE])]
        .contiguous()
        .view(torch.uint8)
        .numpy()
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def same_rows(images: Rows) -> np.ndarray:
    """(I,) a number of each row, the same where two rows are the same to the bit."""
    return np.unique(row_digests(images, np.arange(len(images))), return_inverse=True)[1]


def divide(table: CaptionTable, same: np.ndarray, wanted: dict[str, int]) -> dict[str, Any]:
    """Pairs and image ids of each split, drawn by seed.

    Args:
        same: (I,) number of each image; images of one number stay together.
        wanted: pairs of `train`, `tune`, `val`, `test`, and the `seed`.
    Raises: LabError if a split would hold no image.
    """
    counts = np.diff(table.offsets)  # (I,) captions of each image
    group_counts = np.bincount(same, weights=counts).astype(np.int64)
    order = np.random.default_rng(wanted["seed"]).permutation(len(group_counts))
    before = np.empty_like(group_counts)  # pairs drawn before each group
    before[order] = np.cumsum(group_counts[order]) - group_counts[order]
    drawn = before[same]  # (I,) the same of each image
    total = int(counts.sum())
    test, val = (min(wanted[name], total // 10) for name in ("test", "val"))
    train = min(wanted["train"], total - test - val)
    tune = min(wanted["tune"], train // 4)
    start = test + val
    ranges = {
        "train": (start, start + train),
        "tune": (start, start + tune),
        "val": (test, start),
        "test": (0, test),
        "unused": (start + train, total),
    }
    chosen = {name: (drawn >= low) & (drawn < high) for name, (low, high) in ranges.items()}
    if not all(chosen[name].any() for name in ranges if name != "unused"):
        raise LabError(f"{len(group_counts)} different images are too few to divide; bring at least 40.")
    return {
        "pairs": {name: int(counts[mask].sum()) for name, mask in chosen.items()},
        "splits": {name: table.image_ids[mask].tolist() for name, mask in chosen.items() if name != "unused"},
    }
