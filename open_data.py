"""Opens the dataset of a configuration's splits, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from config import Config
from dataset import COCOClipDataset
from encode import open_captioned
from paired_data import open_paired
from pairs_data import open_features, open_pairs

OPENERS: dict[str, Callable[..., Any]] = {
    "pairs": open_pairs,
    "features": open_features,
    "paired_cifar": open_paired,
}
"""Layouts that are no captioned pictures, by `config.reader`: `open(config, splits, progress=True)`."""


def open_dataset(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """The dataset of some splits, its pictures decoded and its cached features filled."""
    return OPENERS.get(config.reader, open_captioned)(config, splits, progress=progress)
