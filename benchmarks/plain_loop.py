"""The plain loop for comparison: fp32, default layout, one row per caption, collated in Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from dataset import COCOClipDataset
from models import CLIPModel


class Pairs(Dataset):
    """One item per caption; its image or image feature is read again for each caption."""

    def __init__(self, dataset: COCOClipDataset) -> None:
        self.dataset = dataset
        self.owners = [item for item, row in enumerate(dataset.rows) for _ in range(self._captions(row))]
        self.order = [n for row in dataset.rows for n in range(self._captions(row))]

    def _captions(self, row: int) -> int:
        return int(self.dataset.table.offsets[row + 1] - self.dataset.table.offsets[row])

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, pair: int) -> tuple[torch.Tensor, torch.Tensor]:
        item = self.dataset[self.owners[pair]]
        image = item["image"]
        if image.dtype == torch.uint8:
            tower_norm = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            image = (image.float() / 255 - tower_norm[0].view(3, 1, 1)) / tower_norm[1].view(3, 1, 1)
        return image, item["text"][self.order[pair]].float()


def steps(
    model: CLIPModel, dataset: COCOClipDataset, batch_size: int, learning_rate: float, seed: int = 0
) -> Iterator[tuple[int, float]]:
    """Train an epoch step by step; yields the number of images in the step, and the loss."""
    loader = DataLoader(
        Pairs(dataset), batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for images, texts in loader:
        features = model(images, texts)
        logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T
        target = torch.arange(len(images))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images), loss.item()


def train_epochs(
    model: CLIPModel,
    dataset: COCOClipDataset,
    batch_size: int,
    learning_rate: float,
    num_epochs: int,
    after_epoch: Callable[[int, float], None],
) -> None:
    """The loop of every tutorial; `after_epoch(epoch, seconds of training so far)`."""
    seconds = 0.0
    for epoch in range(num_epochs):
        start = time.perf_counter()
        for _ in steps(model, dataset, batch_size, learning_rate, seed=epoch):
            pass
        seconds += time.perf_counter() - start
        after_epoch(epoch, seconds)
