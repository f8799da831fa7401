"""Side-by-side images (lab 2): two labeled images in one, a caption of both, and its rank among all C * C captions."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.devices import encode_in_batches

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from core.errors import LabError
from core.files import fingerprint
from core.ids import SWAPPED, Batch, ImageTextDataset, WholeBatch
from retrieval.statistics import bootstrap_ends
from sources.cifar import LabeledImages
from sources.embeddings import as_rows, row_digests

CAPTIONS_AT_ONCE = 4096  # encoded together


def pair_caption(left: str, right: str) -> str:
    """The caption of two classes."""
    left, right = (f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}" for name in (left, right))
    return f"a photo of {left} and {right}"


class PairedImages(ImageTextDataset):
    """Two images side by side (3, S, 2S) with a caption that names both; batches as those of COCOClipDataset.

    Pair `i` has its own image on the left; the image on the right is drawn by (seed, epoch, i). A pair's id is
    left class * C + right class, so every caption that is true of a pair matches it. A batch also has `view_id`
    (B, 2), a number for each half that is unique within the epoch, for augmenting the halves separately.

    Args:
        singles: the single images and their C classes.
        split: its name.
        num_pairs: pairs per epoch; None: as many as images.
        different_class_prob: probability that the two images are of different classes.
        seed: of the draws.
        fixed: the same pairs in every epoch, for evaluation.
        swapped_captions: add the captions with left and right swapped to each batch, with the ids that
            losses.SwapMarginLoss looks for.
        text_features: (C * C, width) of all captions in the order of ids; None: captions as text.
    Raises: LabError if a class has too few images for such pairs.
    """

    def __init__(
        self,
        singles: LabeledImages,
        *,
        split: str = "train",
        num_pairs: int | None = None,
        different_class_prob: float = 0.5,
        seed: int = 0,
        fixed: bool = False,
        swapped_captions: bool = False,
        text_features: Tensor | None = None,
    ) -> None:
        if not 0 <= different_class_prob <= 1:
            raise LabError(f"different_class_prob must be between 0 and 1, not {different_class_prob}.")
        self.singles, self.names, self.split = singles, singles.names, split
        self.num_classes = len(self.names)
        self.captions = [pair_caption(left, right) for left in self.names for right in self.names]  # C * C
        self.seed, self.fixed, self.epoch = seed, fixed, 0
        self.different_class_prob, self.swapped_captions = different_class_prob, swapped_captions
        self.text_features = text_features
        self.left_out = dict(singles.left_out)
        self.num_pairs = len(singles.images) if num_pairs is None else num_pairs
        self.counts = np.bincount(singles.labels, minlength=self.num_classes)  # (C,)
        self.starts = np.cumsum(self.counts) - self.counts
        self.by_class = np.argsort(singles.labels, kind="stable")  # (N,) ordered by class
        self.positions = np.argsort(self.by_class)  # (N,) of each image in by_class
        self.lefts = np.random.default_rng(seed).permutation(len(singles.images))
        if (self.counts[self.counts > 0] < 2).any() and different_class_prob < 1:
            raise LabError(
                "a class with a single image cannot form a same-class pair; set different_class_prob to 1."
            )
        if (self.counts > 0).sum() < 2 and different_class_prob > 0:
            raise LabError("pairs of different classes need two classes; set different_class_prob to 0.")

    def __len__(self) -> int:
        return self.num_pairs

    @property
    def caption_match_ids(self) -> np.ndarray:
        """(C * C,) ids of all captions, as rows of `text_features`."""
        return np.arange(self.num_classes**2)

    def describe(self) -> dict[str, Any]:
        """Sizes, what was left out, and a digest of the content."""
        pixels = hashlib.sha256(self.singles.images.contiguous().numpy().tobytes()).hexdigest()
        draws = [str(self.num_pairs), str(self.different_class_prob), str(self.fixed), str(self.seed)]
        content = [*self.captions, *map(str, self.singles.labels.tolist()), *draws, pixels]
        return {
            "splits": self.split,
            "images": len(self),
            "captions": len(self.captions),
            "single_images": len(self.singles.images),
            "left_out": self.left_out,
            "sha256": fingerprint(content),
            "form": "raw",
        }

    @functools.cached_property
    def image_digests(self) -> np.ndarray:
        """(N,) uint64 digest of each single image's pixels."""
        return row_digests(self.singles.images.flatten(1), np.arange(len(self.singles.images)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the draws; has no effect where pairs are fixed."""
        self.epoch = 0 if self.fixed else epoch

    def pair(self, item: int) -> tuple[int, int]:
        """Rows of the left and the right image."""
        left = int(self.lefts[(self.epoch * self.num_pairs + item) % len(self.lefts)])
        label = self.singles.labels[left]
        rng = np.random.default_rng((self.seed, self.epoch, item))
        start, count = self.starts[label], self.counts[label]
        if rng.random() < self.different_class_prob:
            position = rng.integers(len(self.lefts) - count)
            position += count * (position >= start)  # past the left one's class
        else:
            position = start + rng.integers(count - 1)
            position += position >= self.positions[left]  # past the left one itself
        return left, int(self.by_class[position])

    def __getitem__(self, item: int) -> Batch:
        batch = self.__getitems__([item])
        return {**batch, "image": batch["image"][0]}

    def __getitems__(self, items: list[int]) -> Batch:
        pairs = np.array([self.pair(item) for item in items])  # (B, 2)
        labels = self.singles.labels[pairs]  # (B, 2)
        ids = rows = text_id = labels[:, 0] * self.num_classes + labels[:, 1]  # (B,)
        if self.swapped_captions:
            mirrored = swapped(ids, self.num_classes)
            ordered = mirrored != ids
            rows = np.concatenate([ids, mirrored[ordered]])
            text_id = np.concatenate([ids, SWAPPED - ids[ordered]])
        halves = [self.singles.images[as_rows(side)] for side in pairs.T]
        captions = [self.captions[row] for row in rows.tolist()]
        batch = {
            "image": torch.cat(halves, dim=3),  # (B, 3, S, 2S)
            "text": captions if self.text_features is None else self.text_features[as_rows(rows)],
            "image_id": torch.from_numpy(ids),
            "text_id": torch.from_numpy(text_id),
            "view_id": 2 * torch.tensor(items)[:, None] + torch.arange(2),
        }
        return WholeBatch(batch)

    def ranks(self, model: Any, features: dict[str, Tensor]) -> PairRanks:
        """The rank of every pair's caption among all captions.

        Args: features: image_features (P, D) and image_id (P,), as from `utils.encode_loader`.
        """
        captions: Any = self.captions if self.text_features is None else self.text_features
        starts = range(0, len(captions), CAPTIONS_AT_ONCE)
        parts = (captions[start : start + CAPTIONS_AT_ONCE] for start in starts)
        caption_features = encode_in_batches(model.encode_text, parts, model.logit_scale.device)
        return rank_pairs(features["image_features"], caption_features, features["image_id"])

    def metrics(
        self, model: Any, features: dict[str, Tensor], config: Any, *, intervals: bool = False
    ) -> dict[str, float]:
        """`PairRanks.figures`, or with intervals `PairRanks.summary`, in place of retrieval metrics."""
        ranks = self.ranks(model, features)
        return ranks.summary() if intervals else ranks.figures()


# --- Ranks and what follows from them ---


KS = (1, 10, 100)
ROWS_AT_ONCE = 1024  # images scored together: 40 MB against 10,000 captions
Figure = tuple[np.ndarray, np.ndarray]  # (P,) what each image adds, (P,) whether it counts


@dataclass(frozen=True)
class PairRanks:
    """Results of P images against the captions of all ordered pairs of C classes.

    Args:
        truth: (P,) left class * C + right class of each image.
        rank: (P,) of the right caption, 1 is the nearest; ties count against it.
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
        """(P,) whether left and right are of different classes; only then can the order be wrong."""
        return self.truth != swapped(self.truth, self.num_classes)

    @property
    def is_swapped(self) -> np.ndarray:
        """(P,) whether the nearest caption is the right pair in the wrong order."""
        return self.different & (self.first == swapped(self.truth, self.num_classes))

    def values(self) -> dict[str, Figure]:
        """Each figure as what images add to it and which images count."""
        everywhere, different = np.ones(len(self.truth), dtype=bool), self.different
        hits = {k: self.rank <= k for k in KS if k < self.num_classes**2}
        figures = {f"top{k}": (hit, everywhere) for k, hit in hits.items()} | {
            "top1_same": (hits[1], ~different),
            "top1_different": (hits[1], different),
            "swapped": (self.is_swapped, different),
            "order": (self.in_order, different),
        }
        return {name: (value.astype(float), mask) for name, (value, mask) in figures.items() if mask.any()}

    def figures(self) -> dict[str, float]:
        """Shares of images, in [0, 1].

        `top1`, `top10`, `top100`: the right caption is among the nearest. `top1_same`, `top1_different`: the same
        for images of one class twice, and of two classes. Of the latter, `swapped`: the nearest caption is the
        right pair in the wrong order; `order`: the right order scores above the wrong one, 0.5 by chance.
        """
        return {name: float(value[mask].mean()) for name, (value, mask) in self.values().items()}

    def intervals(
        self, samples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals over images; variation between training seeds is not included.

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

    def summary(self) -> dict[str, float]:
        """The figures with the ends of their 95 % intervals, chance levels, and counts."""
        figures, captions = self.figures(), self.num_classes**2
        ends = {f"{name}_{end}": value for name, of in self.intervals().items()
                for end, value in zip(("low", "high"), of, strict=True)}  # fmt: skip
        chance = {f"top{k}_chance": k / captions for k in KS if f"top{k}" in figures}
        counts = {"num_different": int(self.different.sum()), "num_swapped": int(self.is_swapped.sum())}
        return {**figures, **ends, **chance, "num_texts": captions, **counts}

    def by_class(self, names: Sequence[str]) -> pd.DataFrame:
        """One row per class, shares in [0, 1]: how many images show it, their top-1, how often the nearest caption
        names it on the left and on the right if it is there; of images with two classes, the share swapped."""
        left, right = np.divmod(self.truth, self.num_classes)
        named_left, named_right = np.divmod(self.first, self.num_classes)
        rows = []
        for label, name in enumerate(names):
            shows_it = (left == label) | (right == label)
            rows.append(
                {
                    "class": name,
                    "images": int(shows_it.sum()),
                    "top1": _mean(self.rank[shows_it] == 1),
                    "named on the left": _mean(named_left[left == label] == label),
                    "named on the right": _mean(named_right[right == label] == label),
                    "swapped": _mean(self.is_swapped[shows_it & self.different]),
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
    """Rank every caption for every image.

    Args:
        image_features: (P, D). caption_features: (C * C, D), row left * C + right. Both normalized.
        image_id: (P,) left * C + right of each image.
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
    """rank, nearest caption and order of some images."""
    scores = images @ captions.T  # (p, C * C)
    if not torch.isfinite(scores).all():
        raise LabError("features are not finite; lower learning_rate and train again.")
    score = scores.gather(1, own[:, None])  # (p, 1)
    rank = (scores >= score).sum(dim=1)  # itself and all that score at least as high
    rival = scores.scatter(1, own[:, None], -torch.inf).argmax(dim=1)
    first = torch.where(rank == 1, own, rival)
    return rank, first, (score > scores.gather(1, mirrored[:, None]))[:, 0]
