"""One epoch of training, and validation; checkpoints and runs under one name with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from augment import augment, augment_parts
from config import Config
from distributed import gather_rows
from engine import Engine, encode_batch, match_ids
from errors import LabError
from geometry import feature_geometry, feature_spread
from metrics import retrieval_metrics
from models import CLIPModel
from runs import (
    Run,
    goodness,
    last_checkpoint,
    load_checkpoint,
    load_run,
    random_states,
    save_checkpoint,
    seed_everything,
    set_random_states,
)

__all__ = [
    "EpochProgress",
    "Run",
    "encode_loader",
    "goodness",
    "last_checkpoint",
    "load_checkpoint",
    "load_run",
    "random_states",
    "run_epoch",
    "save_checkpoint",
    "seed_everything",
    "set_random_states",
    "train_epoch",
    "validate",
]

STEPS_BEFORE_READING = {"cpu": 1}
"""Steps whose losses stay on the device until one reading; waiting for each would idle a GPU."""
MOST_STEPS_BEFORE_READING = 20
MOST_ROWS = 2000  # whose uniformity a validation measures: a tenth of a second


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a batch on the device; lists of captions as they are."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


# --- one epoch ---


@dataclass
class EpochProgress:
    """How far an epoch is; part of a checkpoint, so that an epoch continues in its middle."""

    step: int = 0
    images: int = 0
    loss_sum: float = 0.0
    uniform_sum: float = 0.0  # of the loss's chance level
    seconds: float = 0.0
    data_seconds: float = 0.0


def train_epoch(
    model: CLIPModel,
    train_loader: DataLoader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None = None,
    epoch: int = 0,
    config: Config | None = None,
    *,
    show: bool = True,
) -> dict[str, float]:
    """Train on every batch once; `run_epoch` with the parts of a plain run.

    Args:
        epoch: number from 0; order and augmentation follow from it and the seed.
        config: clipping, augmentation, precision; None: the documented defaults.
        show: a progress bar.
    Returns: as `run_epoch`.
    """
    engine = Engine(model, criterion, optimizer, scheduler, config)
    total = len(train_loader)
    with tqdm(total=total, desc=f"epoch {epoch + 1}", unit="step", disable=not show) as bar:
        return run_epoch(engine, train_loader, epoch, bar=bar)


def run_epoch(
    engine: Engine,
    loader: DataLoader,
    epoch: int,
    *,
    progress: EpochProgress | None = None,
    after_step: Callable[[Callable[[], None]], None] | None = None,
    bar: tqdm | None = None,
) -> dict[str, float]:
    """Give every batch of an epoch, or of the rest of one, to the engine.

    Args:
        progress: where to continue inside the epoch; updated in place.
        after_step: called after each step with a function that brings `progress` up to date; saves a checkpoint,
            or stops by raising.
        bar: moved on a step each.
    Returns: train_loss (mean over images), learning_rate, temperature, images_per_second, train_seconds,
        data_share (part of the time spent waiting for data).
    Raises: LabError on a non-finite loss, naming the images of the batch.
    """
    progress = progress or EpochProgress()
    meter = _Meter(engine, progress, epoch, bar)
    _start_at(loader, epoch, progress.step)
    set_epoch = getattr(engine.criterion, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    engine.model.train()
    mark = time.perf_counter()
    for batch in loader:
        waited = time.perf_counter() - mark
        batch = to_device(batch, engine.device)
        batch["image"] = _augmented(batch, engine.config, epoch)
        loss = engine.step(batch)
        meter.add(loss, batch["image_id"])
        progress.data_seconds += waited
        progress.seconds += time.perf_counter() - mark
        if after_step is not None:
            after_step(meter.read)
        mark = time.perf_counter()
    meter.read()
    return {
        "train_loss": progress.loss_sum / progress.images,
        "learning_rate": max(group["lr"] for group in engine.optimizer.param_groups),
        "temperature": engine.model.temperature,
        "images_per_second": progress.images / progress.seconds,
        "data_share": progress.data_seconds / progress.seconds,
        "train_seconds": progress.seconds,
        **engine.negatives.log(),
    }


class _Meter:
    """Adds up losses, and refuses one that is not finite; reads them from a GPU only now and then."""

    def __init__(self, engine: Engine, progress: EpochProgress, epoch: int, bar: tqdm | None) -> None:
        self.engine, self.progress, self.epoch, self.bar = engine, progress, epoch, bar
        self.limit = STEPS_BEFORE_READING.get(engine.device.type, MOST_STEPS_BEFORE_READING)
        self.unread: list[tuple[Tensor, Tensor, Any]] = []

    def add(self, loss: Tensor, image_id: Tensor) -> None:
        self.unread.append((loss, image_id, self.engine.chance))
        if len(self.unread) >= self.limit:
            self.read()

    def read(self) -> None:
        """Bring the progress up to date."""
        if not self.unread:
            return
        progress = self.progress
        values = torch.stack([loss for loss, *_ in self.unread]).tolist()
        for value, (_, image_id, chance) in zip(values, self.unread, strict=True):
            if not math.isfinite(value):
                raise LabError(
                    f"the loss is {value} at epoch {self.epoch + 1}, step {progress.step + 1} (image ids "
                    f"{image_id.tolist()[:8]}...); lower learning_rate or max_grad_norm; the last checkpoint is kept."
                )
            count = len(gather_rows(image_id))
            progress.step += 1
            progress.images += count
            progress.loss_sum += value * count
            progress.uniform_sum += float(chance) * count
        if self.bar is not None:
            mean = progress.loss_sum / progress.images
            rate = f", {progress.images / progress.seconds:.0f} images/s" if progress.seconds else ""
            self.bar.set_postfix_str(f"loss {mean:.3f}{rate}", refresh=False)
            self.bar.update(len(self.unread))
        self.unread.clear()


def _start_at(loader: DataLoader, epoch: int, step: int) -> None:
    """Choose the epoch's order and first step, for loaders made by `make_loader`."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    if hasattr(sampler, "start"):
        sampler.epoch, sampler.start = epoch, step
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)


def _augmented(batch: dict[str, Any], config: Config, epoch: int) -> Tensor:
    """Pictures augmented by seed, epoch and id, each part by its own where a batch says so; features as they are."""
    images = batch["image"]
    if images.dtype != torch.uint8:
        return images
    make, ids = (augment_parts, "view_id") if "view_id" in batch else (augment, "image_id")
    return make(
        images,
        batch[ids],
        seed=config.seed,
        epoch=epoch,
        crop_scale=config.augment_crop_scale,
        flip=batch.get("flip", config.augment_flip),
        jitter=config.augment_jitter,
        rotation=config.augment_rotation,
        erasing=config.augment_erasing,
    )


@torch.inference_mode()
def encode_loader(
    model: CLIPModel,
    loader: DataLoader,
    config: Config,
    criterion: nn.Module | None = None,
    show: bool = True,
) -> tuple[dict[str, Tensor], float]:
    """Features of a whole split, each image and caption once, and the mean loss over its batches.

    Returns: image_features (I, D), text_features (T, D), image_id (I,), text_id (T,) on the CPU in float32;
        the loss, weighted by images, or nan without a criterion.
    """
    device = model.logit_scale.device
    model.eval()
    _start_at(loader, 0, 0)
    pieces: dict[str, list[Tensor]] = {
        k: [] for k in ("image_features", "text_features", "image_id", "text_id")
    }
    loss_sum = float("nan") if criterion is None else 0.0
    for batch in tqdm(loader, desc="encode", unit="batch", disable=not show, delay=1):
        batch = to_device(batch, device)
        features = encode_batch(model, batch, config)
        ids = {"image_id": batch["image_id"], "text_id": batch["text_id"]}
        if criterion is not None:
            image_id, text_id = match_ids(batch)
            loss = criterion(**features, image_id=image_id, text_id=text_id)
            loss_sum += loss.item() * len(image_id)
        for name, rows in pieces.items():
            rows.append({**features, **ids}[name].cpu())
    whole = {name: torch.cat(rows) for name, rows in pieces.items()}
    whole = {name: rows.float() if rows.is_floating_point() else rows for name, rows in whole.items()}
    return whole, loss_sum / len(whole["image_id"])


def validate(
    model: CLIPModel,
    val_loader: DataLoader,
    criterion: nn.Module,
    config: Config | None = None,
    *,
    show: bool = False,
) -> dict[str, float]:
    """The training criterion and exact retrieval metrics over the whole split.

    Returns: val_loss and everything `metrics.retrieval_metrics` gives.
    """
    config = config or Config()
    features, loss = encode_loader(model, val_loader, config, criterion, show)
    return {"val_loss": loss, **split_metrics(model, val_loader.dataset, features, config)}


def split_metrics(
    model: CLIPModel, dataset: Any, features: dict[str, Tensor], config: Config
) -> dict[str, float]:
    """A split's figures: the dataset's own `validation_metrics`, else those of retrieval."""
    if hasattr(dataset, "validation_metrics"):
        return dataset.validation_metrics(model, features, config)
    ks = tuple(k for k in config.recall_ks if k <= len(features["image_id"]))
    spread = {f"{kind}_spread": feature_spread(features[f"{kind}_features"]) for kind in ("image", "text")}
    return {**retrieval_metrics(**features, ks=ks), **spread, **feature_geometry(**features, most=MOST_ROWS)}
