"""Which wrong captions an image should learn from, and which images should meet in a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from core.errors import LabError
from retrieval.index import build_index

NEIGHBOURS_KEPT = 16
GROUP = 8  # images that are put side by side because they are neighbours


# --- batches of neighbours ---


def nearest_images(image_features: Tensor, k: int = NEIGHBOURS_KEPT) -> np.ndarray:
    """(I, k) each image's nearest others, or all others where there are fewer."""
    items = torch.arange(len(image_features))
    index = build_index(image_features, items)
    return index.neighbors(image_features, items, min(k, len(items) - 1)).rows.numpy()


def neighbour_order(items: np.ndarray, neighbours: np.ndarray, epoch: int, seed: int) -> np.ndarray:
    """The same items, neighbours side by side in groups of at most GROUP, the groups in random order.

    Args:
        items: (N,) in random order; an item may stand there several times.
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
    """Categories with fewer images than `minimum`, and how many they have; "" is no category.

    Args: categories: (I,) names.
    """
    names, counts = np.unique(categories, return_counts=True)
    return {
        str(name): int(count)
        for name, count in zip(names, counts, strict=True)
        if count < minimum or not name
    }


class Balance:
    """Draws an epoch's items so that each category brings as many: its quota.

    A larger category brings other items each epoch; a smaller one repeats its own, each as often as any
    other, give or take one.

    Args:
        categories: (N,) the items' categories.
        quota: items a category brings to an epoch; None: the median category's size.
    Raises: LabError if there are fewer than two categories.
    """

    def __init__(self, categories: np.ndarray, quota: int | None = None) -> None:
        names, self.labels, counts = np.unique(categories, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise LabError(
                f"balancing takes at least two categories, not {len(names)}; set balance_by to 'none' or lower "
                "min_per_category."
            )
        self.quota = int(np.median(counts)) if quota is None else quota
        self.num_categories = len(names)

    def __len__(self) -> int:
        """Items of an epoch."""
        return self.quota * self.num_categories

    def draw(self, epoch: int, seed: int) -> np.ndarray:
        """(len(self),) an epoch's items, in random order."""
        rng = np.random.default_rng((seed, epoch))
        drawn = [self._of(np.flatnonzero(self.labels == k), rng) for k in range(self.num_categories)]
        return rng.permutation(np.concatenate(drawn))

    def _of(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rounds = -(-self.quota // len(items))
        return np.concatenate([rng.permutation(items) for _ in range(rounds)])[: self.quota]
