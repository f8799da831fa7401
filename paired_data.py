"""Pairs of small pictures side by side with a caption that names left and right: batches and their measure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache import as_rows, fingerprint
from config import Config
from dataset import Batch
from encode import cached_text_features
from errors import LabError
from models import CLIPModel
from pair_ranks import PairRanks, rank_pairs, swapped
from paired_cifar import TEMPLATE, Pictures, few, open_pictures, pair_caption
from swap_loss import SWAPPED

CAPTIONS_AT_ONCE = 4096


class PairedPictures(Dataset):
    """Pairs drawn on the fly: pictures (3, S, 2S), captions, ids; batches as `COCOClipDataset` gives them.

    Pair `i` has a picture of its own on the left; which one stands on the right is drawn by (seed, epoch, i).
    A pair's id is left class * C + right class, so every caption that is true of a picture matches it. A batch
    also holds `view_id` (B, 2), numbers that no other half of the epoch has, for augmentation half by half.

    Args:
        pictures: what to draw from.
        split: its name.
        num_pairs: pairs an epoch; None: as many as pictures.
        different_class_prob: probability that the two pictures are of different classes.
        seed: of the draws.
        fixed: the same pairs in every epoch, for evaluation.
        swapped_captions: end a batch with the captions of its pairs with left and right swapped, under the ids
            that swap_loss.SwapMarginLoss looks for.
        text_features: (C * C, width) of all captions in the order of ids; None: captions as texts.
        template: the caption, with {left} and {right}; "a" before them becomes "an" where it must.
    Raises: LabError if a class has too few pictures for such pairs.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        split: str = "train",
        num_pairs: int | None = None,
        different_class_prob: float = 0.5,
        seed: int = 0,
        fixed: bool = False,
        swapped_captions: bool = False,
        text_features: Tensor | None = None,
        template: str = TEMPLATE,
    ) -> None:
        if not 0 <= different_class_prob <= 1:
            raise LabError(f"different_class_prob is a probability, not {different_class_prob}.")
        if "{left}" not in template or "{right}" not in template:
            raise LabError(f"template {template!r} must name {{left}} and {{right}}.")
        self.pictures, self.template, self.split = pictures, template, split
        self.seed, self.fixed, self.epoch = seed, fixed, 0
        self.different_class_prob, self.swapped_captions = different_class_prob, swapped_captions
        self.text_features = text_features
        self.left_out = dict(pictures.left_out)
        self.num_pairs = len(pictures.images) if num_pairs is None else num_pairs
        self.counts = np.bincount(pictures.labels, minlength=len(pictures.names))  # (C,)
        self.starts = np.cumsum(self.counts) - self.counts
        self.by_class = np.argsort(pictures.labels, kind="stable")  # (N,) class after class
        self.places = np.argsort(self.by_class)  # (N,) where each picture stands in by_class
        self.lefts = np.random.default_rng(seed).permutation(len(pictures.images))
        if (self.counts[self.counts > 0] < 2).any() and different_class_prob < 1:
            raise LabError("a class with one picture makes no pair alone; set different_class_prob to 1.")
        if (self.counts > 0).sum() < 2 and different_class_prob > 0:
            raise LabError("pairs of different classes need two classes; set different_class_prob to 0.")

    # --- what it holds ---

    def __len__(self) -> int:
        return self.num_pairs

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.pictures.names)

    @property
    def captions(self) -> list[str]:
        """All C * C captions; a caption's place is its id."""
        names = self.pictures.names
        return [pair_caption(left, right, self.template) for left in names for right in names]

    @property
    def caption_image_ids(self) -> np.ndarray:
        """(C * C,) ids of all captions, as rows of `text_features`."""
        return np.arange(self.num_classes**2)

    def describe(self) -> dict[str, Any]:
        """What it holds, and a digest that tells it from another."""
        pixels = hashlib.sha256(self.pictures.images.contiguous().numpy().tobytes()).hexdigest()
        draws = [str(self.num_pairs), str(self.different_class_prob), str(self.fixed)]
        told = [*self.captions, *map(str, self.pictures.labels.tolist()), *draws, pixels]
        return {
            "splits": self.split,
            "images": len(self),
            "captions": self.num_classes**2,
            "pictures": len(self.pictures.images),
            "left_out": self.left_out,
            "sha256": fingerprint(told),
        }

    # --- draws ---

    @property
    def items_per_epoch(self) -> int:
        """Items that training sees in an epoch."""
        return len(self)

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """(items_per_epoch,) item numbers in the order that training sees them in an epoch."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's pairs; nothing changes where they are fixed."""
        self.epoch = 0 if self.fixed else epoch

    def pair(self, item: int) -> tuple[int, int]:
        """Rows of the left and the right picture."""
        left = int(self.lefts[(self.epoch * self.num_pairs + item) % len(self.lefts)])
        label = self.pictures.labels[left]
        rng = np.random.default_rng((self.seed, self.epoch, item))
        start, count = self.starts[label], self.counts[label]
        if rng.random() < self.different_class_prob:
            place = rng.integers(len(self.lefts) - count)
            place += count * (place >= start)  # past the left one's class
        else:
            place = start + rng.integers(count - 1)
            place += place >= self.places[left]  # past the left one itself
        return left, int(self.by_class[place])

    # --- batches ---

    def __getitem__(self, item: int) -> Batch:
        batch = self.__getitems__([item])
        return {**batch, "image": batch["image"][0]}

    def __getitems__(self, items: list[int]) -> Batch:
        pairs = np.array([self.pair(item) for item in items])  # (B, 2)
        labels = self.pictures.labels[pairs]  # (B, 2)
        ids = labels[:, 0] * self.num_classes + labels[:, 1]  # (B,)
        rows, text_id = self._told(ids)
        halves = [self.pictures.images[as_rows(side)] for side in pairs.T]
        return {
            "image": torch.cat(halves, dim=3),  # (B, 3, S, 2S)
            "text": self._texts(rows),
            "image_id": torch.from_numpy(ids),
            "text_id": torch.from_numpy(text_id),
            "view_id": 2 * torch.tensor(items)[:, None] + torch.arange(2),
        }

    def _told(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Captions of some pairs, as rows of all captions, and the ids they go by in the batch."""
        if not self.swapped_captions:
            return ids, ids
        mirrored = swapped(ids, self.num_classes)
        ordered = mirrored != ids
        rows = np.concatenate([ids, mirrored[ordered]])
        return rows, np.concatenate([ids, SWAPPED - ids[ordered]])

    def _texts(self, rows: np.ndarray) -> list[str] | Tensor:
        if self.text_features is not None:
            return self.text_features[as_rows(rows)]
        names = self.pictures.names
        sides = [divmod(row, self.num_classes) for row in rows.tolist()]
        return [pair_caption(names[left], names[right], self.template) for left, right in sides]

    # --- measure ---

    @torch.inference_mode()
    def caption_features(self, model: CLIPModel) -> Tensor:
        """(C * C, D) of all captions under a model, on the CPU."""
        device = model.logit_scale.device
        texts: Any = self.captions if self.text_features is None else self.text_features
        pieces = []
        for start in range(0, len(texts), CAPTIONS_AT_ONCE):
            some = texts[start : start + CAPTIONS_AT_ONCE]
            pieces.append(model.encode_text(some.to(device) if isinstance(some, Tensor) else some).cpu())
        return torch.cat(pieces).float()

    def ranks(self, model: CLIPModel, features: dict[str, Tensor]) -> PairRanks:
        """Every picture against all captions.

        Args: features: image_features (P, D) and image_id (P,), as `utils.encode_loader` gives them.
        """
        captions = self.caption_features(model)
        return rank_pairs(features["image_features"], captions, features["image_id"])

    def validation_metrics(
        self, model: CLIPModel, features: dict[str, Tensor], config: Config
    ) -> dict[str, float]:
        """What `pair_ranks.PairRanks.figures` tells; the engine asks for it in place of Recall@K."""
        return self.ranks(model, features).figures()


def open_paired(config: Config, splits: Sequence[str], *, progress: bool = True) -> PairedPictures:
    """The pairs of a split: drawn anew each epoch where it is trained on, else fixed, one for each picture."""
    if len(splits) != 1:
        raise LabError(f"pairs are of one split, not {', '.join(splits)}; name one split at a time.")
    if tuple(splits) != config.train_splits:
        return fixed_pairs(config, splits[0], progress=progress)
    return _open(config, splits[0], progress, num_pairs=config.pairs_per_epoch, seed=config.seed)


def fixed_pairs(
    config: Config, split: str, num_pairs: int | None = None, *, progress: bool = True
) -> PairedPictures:
    """A split's pairs for evaluation, the training split's as well: the same list for every run and seed."""
    return _open(config, split, progress, num_pairs=num_pairs, fixed=True)


def _open(config: Config, split: str, progress: bool, **draws: Any) -> PairedPictures:
    pictures = open_pictures(config.data_dir, split, size=config.image_size, cache_dir=config.cache_dir)
    pairs = PairedPictures(
        pictures if config.max_samples is None else few(pictures, config.max_samples),
        split=split,
        different_class_prob=config.different_class_prob,
        swapped_captions=config.swap_weight > 0,
        **draws,
    )
    if config.text_tower_mode == "cached":
        pairs.text_features = cached_text_features(config, pairs.captions, progress=progress)
    return pairs
