"""Data sets of fine-tuning under the names that other labs give them; `fit(config, train_set=...)` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config import Config
from dataset import TrainingSet
from losses import TripletLoss


class CLIPFineTuneDataset(TrainingSet):
    """Images with captions of one split.

    Args:
        data_path: the split's folder, such as `data/train`; the data set is the folder around it.
        reader: a name of sources.readers.READERS; None: `json` where that folder has a JSON file, else `sidecar`.
        config: augmentation of captions, balance of categories; None: the defaults.
        options: as of dataset.COCOClipDataset.
    """

    def __init__(
        self,
        data_path: str | Path,
        *,
        reader: str | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> None:
        folder, split = Path(data_path).parent, Path(data_path).name
        reader = reader or ("json" if any(folder.glob("*.json")) else "sidecar")
        super().__init__(split, config or Config(), data_dir=folder, reader=reader, **options)


class CLIPHardNegativeDataset(CLIPFineTuneDataset):
    """Adds mined captions to each batch, found again in each epoch.

    Args:
        negative_mining_strategy: `semantic`, the nearest wrong captions, or `random`.
        num_negatives: captions per image.
        temperature: has no effect: the nearest are taken, and no temperature changes which they are.
    """

    def __init__(
        self,
        data_path: str | Path,
        negative_mining_strategy: str = "semantic",
        num_negatives: int = 3,
        temperature: float = 0.07,
        **options: Any,
    ) -> None:
        super().__init__(data_path, **options)
        self.fields = {"mining": negative_mining_strategy, "num_mined": num_negatives}

    def refresh(self, model: Any, epoch: int, config: Config) -> None:
        """Mine with the constructor's settings, whatever the configuration says."""
        super().refresh(model, epoch, config.updated(**self.fields))


class CLIPTripletDataset(CLIPFineTuneDataset):
    """Has `criterion`, the loss over the triplets of each batch: `fit(config, train_set=it, criterion=it.criterion)`.

    Args: triplet_strategy: `hardest`, `semi_hard` or `mean`; margin: cosine.
    """

    def __init__(
        self, data_path: str | Path, triplet_strategy: str = "hardest", margin: float = 0.5, **options: Any
    ) -> None:
        super().__init__(data_path, **options)
        self.criterion = TripletLoss(margin, triplet_strategy)
