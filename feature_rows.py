"""Views of features that stay on disk, and images divided among splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import as_rows
from captions import CaptionTable
from errors import LabError

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


def same_rows(images: Rows) -> np.ndarray:
    """(I,) a number of each row, the same where two rows are the same to the bit."""
    digests = [
        hashlib.blake2b(row.tobytes(), digest_size=8).digest()
        for block in images.split(ROWS_AT_ONCE)
        for row in block.contiguous().view(torch.uint8).numpy()
    ]
    return np.unique(np.frombuffer(b"".join(digests), dtype=np.uint64), return_inverse=True)[1]


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
