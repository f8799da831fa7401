"""Where the right caption of a pair of pictures stands among all C * C, and what is confused with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from errors import LabError
from uncertainty import bootstrap_ends

KS = (1, 10, 100)
ROWS_AT_ONCE = 1024  # pictures scored together: 40 MB against 10,000 captions
Figure = tuple[np.ndarray, np.ndarray]  # (P,) what each picture adds, (P,) whether it counts


@dataclass(frozen=True)
class PairRanks:
    """Results of P pictures against the captions of all ordered pairs of C classes.

    Args:
        truth: (P,) left class * C + right class of each picture.
        rank: (P,) of the right caption, 1 is nearest; ties count against it.
        first: (P,) the nearest caption, as `truth`.
        in_order: (P,) whether the right caption scores above the one with left and right swapped.
        num_classes: C.
    """

    truth: np.ndarray
    rank: np.ndarray
    first: np.ndarray
    in_order: np.ndarray
    num_classes: int

    @property
    def different(self) -> np.ndarray:
        """(P,) whether left and right are of different classes; only then is there an order to mistake."""
        return self.truth != swapped(self.truth, self.num_classes)

    @property
    def is_swapped(self) -> np.ndarray:
        """(P,) whether the nearest caption is the right pair in the wrong order."""
        return self.different & (self.first == swapped(self.truth, self.num_classes))

    def values(self) -> dict[str, Figure]:
        """Each figure as what pictures add to it and which of them count."""
        everywhere, different = np.ones(len(self.truth), dtype=bool), self.different
        hits = {k: self.rank <= k for k in KS if k < self.num_classes**2}
        found = {f"top{k}": (hit, everywhere) for k, hit in hits.items()}
        found["top1_same"] = (hits[1], ~different)
        found["top1_different"] = (hits[1], different)
        found["swapped"] = (self.is_swapped, different)
        found["order"] = (self.in_order, different)
        return {name: (value.astype(float), mask) for name, (value, mask) in found.items() if mask.any()}

    def figures(self) -> dict[str, float]:
        """Shares of pictures, in [0, 1].

        `top1`, `top10`, `top100`: the right caption is among the nearest. `top1_same`, `top1_different`: the same
        of pictures of one class twice, and of two classes. Of the latter, `swapped`: the nearest caption is the
        right pair in the wrong order; `order`: the right order scores above the wrong one, 0.5 by chance.
        """
        return {name: float(value[mask].mean()) for name, (value, mask) in self.values().items()}

    def intervals(
        self, samples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of the figures over pictures; another training is not in them.

        Source: Efron & Tibshirani 1993, chapter 13.
        """
        figures = self.values()

        def shares(counts: np.ndarray) -> np.ndarray:  # never over 0 in practice: a figure has many images
            parts = [
                counts @ (value * mask) / np.maximum(counts @ mask, 1) for value, mask in figures.values()
            ]
            return np.stack(parts)

        ends = bootstrap_ends(len(self.truth), shares, samples, level, seed)
        return {name: (float(low), float(high)) for name, low, high in zip(figures, *ends, strict=True)}

    def by_class(self, names: Sequence[str]) -> pd.DataFrame:
        """A row a class, in [0, 1]: of the pictures that show it, how many, top-1, and how often it is named where
        it stands on the left and on the right; of those with two classes, the share swapped."""
        left, right = np.divmod(self.truth, self.num_classes)
        named_left, named_right = np.divmod(self.first, self.num_classes)
        rows = []
        for label, name in enumerate(names):
            shown = (left == label) | (right == label)
            rows.append(
                {
                    "class": name,
                    "pictures": int(shown.sum()),
                    "top1": _mean(self.rank[shown] == 1),
                    "named on the left": _mean(named_left[left == label] == label),
                    "named on the right": _mean(named_right[right == label] == label),
                    "swapped": _mean(self.is_swapped[shown & self.different]),
                }
            )
        return pd.DataFrame(rows).set_index("class")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def swapped(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """The ids of the same pairs with left and right exchanged."""
    left, right = np.divmod(ids, num_classes)
    return right * num_classes + left


def rank_pairs(image_features: Tensor, caption_features: Tensor, image_id: Tensor) -> PairRanks:
    """Rank every caption for every picture.

    Args:
        image_features: (P, D). caption_features: (C * C, D), row left * C + right. Both normalised.
        image_id: (P,) left * C + right of each picture.
    Raises: LabError if the captions are not of all ordered pairs, or features are not finite.
    """
    num_classes = round(len(caption_features) ** 0.5)
    if num_classes**2 != len(caption_features):
        raise LabError(
            f"{len(caption_features)} captions are not those of all ordered pairs of classes; give C * C rows."
        )
    truth = image_id.cpu().numpy()
    mirrored = torch.from_numpy(swapped(truth, num_classes))
    pieces = [
        _score(image_features[rows], caption_features, image_id[rows], mirrored[rows])
        for rows in torch.arange(len(truth)).split(ROWS_AT_ONCE)
    ]
    rank, first, in_order = (torch.cat(part).numpy() for part in zip(*pieces, strict=True))
    return PairRanks(truth, rank, first, in_order, num_classes)


def _score(images: Tensor, captions: Tensor, own: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rank, nearest caption and order of some pictures."""
    scores = images @ captions.T  # (p, C * C)
    if not torch.isfinite(scores).all():
        raise LabError("features are not finite; lower learning_rate and train again.")
    score = scores.gather(1, own[:, None])  # (p, 1)
    rank = (scores >= score).sum(dim=1)  # itself and all that stand before it
    rival = scores.scatter(1, own[:, None], -torch.inf).argmax(dim=1)
    first = torch.where(rank == 1, own, rival)
    return rank, first, (score > scores.gather(1, mirrored[:, None]))[:, 0]
