"""Opens the dataset of a configuration's splits, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from config import Config
from dataset import COCOClipDataset
from encode import open_captioned
from errors import LabError, choose
from paired_data import open_paired
from pairs_data import open_features, open_pairs
from readers import READERS

OPENERS: dict[str, Callable[..., Any]] = {
    "pairs": open_pairs,
    "features": open_features,
    "paired_cifar": open_paired,
}
"""Layouts that are no captioned pictures, by `config.reader`: `open(config, splits, progress=True)`."""


def open_dataset(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """The dataset of some splits, its images decoded and its cached features filled.

    Raises: LabError on an unknown reader, or if a split is both trained on and validated on.
    """
    shared = sorted(set(config.train_splits) & set(config.val_splits))
    if shared:
        raise LabError(
            f"train_splits and val_splits share {', '.join(shared)}; the epoch must be chosen on images that are not "
            "trained on."
        )
    openers = {**dict.fromkeys(READERS, open_captioned), **OPENERS}
    return choose(openers, config.reader, "reader")(config, splits, progress=progress)
