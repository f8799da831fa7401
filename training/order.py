"""The order of an epoch: batches, neighbours in one batch, balanced categories, evenly spread samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from core.errors import LabError
from retrieval.index import build_index

NEIGHBOURS_KEPT = 16
GROUP = 8  # images that are put side by side because they are neighbours


class EpochBatches(Sampler[list[int]]):
    """Batches of item numbers in the order of an epoch, from any step on, or one process's share of them.

    The last batch may be short; a single item left over, which BatchNorm refuses, joins the batch before it.

    Args:
        batch_size: of all processes together.
        order: epoch -> item numbers in their order; the same number in every epoch.
        num_items: how many that are.
        rank, world_size: each of `world_size` processes takes its part of every batch.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        order: Callable[[int], np.ndarray],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_items, self.batch_size, self.order = num_items, batch_size, order
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        full, rest = divmod(self.num_items, self.batch_size)
        return max(1, full + (rest > 1))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        for step in range(self.start, len(self)):
            stop = self.num_items if step == len(self) - 1 else (step + 1) * self.batch_size
            batch = order[step * self.batch_size : stop]
            yield np.array_split(batch, self.world_size)[self.rank].tolist()


def evenly_spread(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of `count` items, evenly spread, in ascending order; None: all."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).astype(np.int64)


# --- Batches of neighbors ---


def nearest_images(image_features: Tensor, k: int = NEIGHBOURS_KEPT) -> np.ndarray:
    """(I, k) nearest other images of each image, or all others where there are fewer."""
    items = torch.arange(len(image_features))
    index = build_index(image_features, items)
    return index.query(image_features, min(k, len(items) - 1), items).rows.numpy()


def neighbour_order(items: np.ndarray, neighbours: np.ndarray, epoch: int, seed: int) -> np.ndarray:
    """The same items in groups of at most GROUP neighbors, the groups in random order.

    Args:
        items: (N,) in random order; an item may appear several times.
        neighbours: (I, k) items near each item.
    """
    left = np.bincount(items, minlength=len(neighbours))
    groups = []
    for item in items.tolist():
        if left[item]:
            left[item] -= 1
            near = neighbours[item][left[neighbours[item]] > 0][: GROUP - 1]
            left[near] -= 1
            groups.append(np.array([item, *near]))
    order = np.random.default_rng((seed, epoch)).permutation(len(groups))
    return np.concatenate([groups[number] for number in order])


# --- Balanced epochs ---


def small_categories(categories: np.ndarray, minimum: int) -> dict[str, int]:
    """Number of images of the categories with fewer than `minimum`, and of images without a category ("").

    Args: categories: (I,) names.
    """
    names, counts = np.unique(categories, return_counts=True)
    return {
        str(name): int(count)
        for name, count in zip(names, counts, strict=True)
        if count < minimum or not name
    }


class Balance:
    """Samples each epoch so that every category has the same number of items, the quota.

    A larger category has other items in each epoch; a smaller one repeats its items equally often, up to a
    difference of one.

    Args:
        categories: (N,) the items' categories.
        quota: items per category and epoch; None: the median category's size.
    Raises: LabError if there are fewer than two categories.
    """

    def __init__(self, categories: np.ndarray, quota: int | None = None) -> None:
        names, self.labels, counts = np.unique(categories, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise LabError(
                f"balancing needs at least two categories, not {len(names)}; set balance_by to 'none' or lower "
                "min_per_category."
            )
        self.quota = int(np.median(counts)) if quota is None else quota
        self.num_categories = len(names)

    def __len__(self) -> int:
        """Items of an epoch."""
        return self.quota * self.num_categories

    def sample_epoch(self, epoch: int, seed: int) -> np.ndarray:
        """(len(self),) items of an epoch, in random order."""
        rng = np.random.default_rng((seed, epoch))
        drawn = [self._of(np.flatnonzero(self.labels == k), rng) for k in range(self.num_categories)]
        return rng.permutation(np.concatenate(drawn))

    def _of(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rounds = -(-self.quota // len(items))
        return np.concatenate([rng.permutation(items) for _ in range(rounds)])[: self.quota]
