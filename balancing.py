"""Epochs in which every category comes equally often."""

from __future__ import annotations

import numpy as np

from errors import LabError


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
