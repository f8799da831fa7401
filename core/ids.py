"""What an id means, and what a data set offers.

An image and a text match if and only if their ids are equal; -1 matches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import default_collate_fn_map

SWAPPED = -2
"""A text of id `SWAPPED - image_id` is the caption of that image with left and right swapped: it matches nothing."""


def match_ids(batch: dict[str, Any]) -> tuple[Any, Any]:
    """(I,) and (T,) ids that a loss compares: a batch's own, or those that images with equal captions share."""
    image, text = ("image_match", "text_match") if "image_match" in batch else ("image_id", "text_id")
    return batch[image], batch[text]


Batch = dict[str, Any]
"""Tensors by name: `image` (I, ...), `text`, `image_id` (I,), `text_id` (T,); the captions may be a list of texts."""


class WholeBatch(dict[str, Any]):
    """A complete batch: torch's own collate function looks at the first item, which is the batch itself."""

    def __getitem__(self, name: Any) -> Any:
        return self if isinstance(name, int) else super().__getitem__(name)


default_collate_fn_map[WholeBatch] = lambda batch, **options: batch


class ImageTextDataset(Dataset):
    """What training and evaluation ask of a data set besides items, answered as for one that has only items.

    A data set of your own may derive from it and answer differently; `dataset.with_defaults` wraps one that does not.
    """

    split: str = "own"
    table: Any = None  # a CaptionTable, where items are images of one
    text_features: Any = None  # (T, width) of all captions, where they are cached
    left_out: Mapping[str, str] = MappingProxyType({})  # file -> why it is not used
    metrics: Callable[..., dict[str, float]] | None = None
    """`metrics(model, features, config, intervals=False)`, measured in place of retrieval metrics."""

    def __len__(self) -> int:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """`images`, `captions`, `form`, and `sha256` of the content: equal for a copy elsewhere."""
        raise NotImplementedError

    @property
    def caption_match_ids(self) -> np.ndarray:
        """(T,) the id that each caption of `text_features` matches."""
        return np.empty(0, dtype=np.int64)

    @property
    def image_digests(self) -> np.ndarray:
        """uint64 digest of each image's content; none: unknown."""
        return np.empty(0, dtype="<u8")

    @property
    def items_per_epoch(self) -> int:
        """Items that training sees in an epoch."""
        return len(self)

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """(items_per_epoch,) item numbers in the order that training sees them in an epoch."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of whatever is drawn at random."""

    def refresh(self, model: Any, epoch: int, config: Any) -> None:
        """Called with the model before each epoch of training."""

    def log(self) -> dict[str, float]:
        """Figures of the last epoch for the history."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
