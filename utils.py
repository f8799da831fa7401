"""One epoch of training, validation, checkpoint files, and finished runs."""

from __future__ import annotations

import functools
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compat import get_device

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from augment import augment
from cache import atomic_path
from config import Config, load_config
from errors import LabError
from metrics import retrieval_metrics
from models import CLIPModel, build_model
from optimisation import EMA, autocast


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(seed)


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
    ema: EMA | None = None,
    scaler: torch.amp.GradScaler | None = None,
    progress: EpochProgress | None = None,
    after_step: Callable[[EpochProgress], None] | None = None,
    show: bool = True,
    bar: tqdm | None = None,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        epoch: number from 0; order and augmentation follow from it and the seed.
        config: clipping, augmentation, precision; None: the documented defaults.
        ema: running average to update.
        scaler: for fp16.
        progress: where to continue inside the epoch; updated in place.
        after_step: called after each step, to save a checkpoint or to stop by raising.
        show: a progress bar.
        bar: a bar of the whole run to move on instead, a step each.
    Returns: train_loss (mean over images), learning_rate, temperature, images_per_second, train_seconds, data_share
        (part of the time spent waiting for data).
    Raises: LabError on a non-finite loss, naming the images of the batch.
    """
    config = config or Config()
    device = model.logit_scale.device
    progress = progress or EpochProgress()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    _start_at(train_loader, epoch, progress.step)
    model.train()
    own = tqdm(
        total=len(train_loader), desc=f"epoch {epoch + 1}", unit="step", disable=not show or bar is not None
    )
    shown = own if bar is None else bar
    mark = time.perf_counter()
    with own:
        for batch in train_loader:
            waited = time.perf_counter() - mark
            batch = to_device(batch, device)
            batch["image"] = _augmented(batch, config, epoch)
            with autocast(config, device):
                features = model(batch["image"], batch["text"])
            loss = criterion(**features, image_id=batch["image_id"], text_id=batch["text_id"])
            value = loss.item()
            if not math.isfinite(value):
                ids = batch["image_id"].tolist()
                raise LabError(
                    f"the loss is {value} at epoch {epoch + 1}, step {progress.step + 1} (image ids {ids[:8]}...); "
                    "lower learning_rate or max_grad_norm; the last checkpoint is kept."
                )
            _step(model, loss, optimizer, scaler, config.max_grad_norm)
            if scheduler is not None:
                scheduler.step()
            if ema is not None:
                ema.update(model)
            progress.step += 1
            progress.images += len(batch["image_id"])
            progress.loss_sum += value * len(batch["image_id"])
            progress.data_seconds += waited
            progress.seconds += time.perf_counter() - mark
            shown.set_postfix(loss=f"{progress.loss_sum / progress.images:.3f}", refresh=False)
            shown.update()
            if after_step is not None:
                after_step(progress)
            mark = time.perf_counter()
    return {
        "train_loss": progress.loss_sum / progress.images,
        "learning_rate": max(group["lr"] for group in optimizer.param_groups),
        "temperature": model.temperature,
        "images_per_second": progress.images / progress.seconds,
        "data_share": progress.data_seconds / progress.seconds,
        "train_seconds": progress.seconds,
    }


def _step(
    model: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_norm: float,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()


def _start_at(loader: DataLoader, epoch: int, step: int) -> None:
    """Choose the epoch's order and first step, for loaders made by `make_loader`."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    if hasattr(sampler, "start"):
        sampler.epoch, sampler.start = epoch, step
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)


def _augmented(batch: dict[str, Any], config: Config, epoch: int) -> Tensor:
    """Pictures augmented by seed, epoch and image id; cached features as they are."""
    images = batch["image"]
    if images.dtype != torch.uint8:
        return images
    return augment(
        images,
        batch["image_id"],
        seed=config.seed,
        epoch=epoch,
        crop_scale=config.augment_crop_scale,
        flip=config.augment_flip,
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
        with autocast(config, device):
            features = model(batch["image"], batch["text"])
        ids = {"image_id": batch["image_id"], "text_id": batch["text_id"]}
        if criterion is not None:
            loss_sum += criterion(**features, **ids).item() * len(ids["image_id"])
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
    ks = tuple(k for k in config.recall_ks if k <= len(features["image_id"]))
    return {"val_loss": loss, **retrieval_metrics(**features, ks=ks)}


# --- checkpoint files ---


def random_states() -> dict[str, Any]:
    """States of every random generator in use, loadable without pickle's code."""
    state: Any = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (state[0], state[1].tolist(), *state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_checkpoint(folder: str | Path, state: dict[str, Any], step: int, keep: int = 2) -> Path:
    """Write `step_{step}.pt` whole or not at all, then drop all but the last `keep`.

    Raises: LabError if the disk is full; earlier checkpoints are kept.
    """
    folder = Path(folder)
    path = folder / f"step_{step:09d}.pt"
    with atomic_path(path) as beside:
        torch.save(state, beside)
    for old in sorted(folder.glob("step_*.pt"))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's content, without executing pickled code. Raises: LabError if it is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise LabError(
            f"checkpoint {path} cannot be read ({error}); delete it to use the one before."
        ) from error


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder, or None."""
    return max(Path(folder).glob("step_*.pt"), default=None)


# --- runs ---


def goodness(value: Any, metric: str) -> Any:
    """A figure such that more is better: losses and ranks change their sign."""
    return -value if metric.endswith(("loss", "_rank")) else value


@dataclass
class Run:
    """A run's folder: configuration, history, metrics, weights.

    Args:
        folder: where it lies.
        config: with `runs_dir` and the other places as they were given to `load_run`, else as saved.
        history: a row an epoch.
        metrics: split -> metrics, once evaluated.
        training: how it was trained: data, seconds, machine, versions, files left out.
    """

    folder: Path
    config: Config
    history: pd.DataFrame
    metrics: dict[str, dict[str, Any]]
    training: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return bool(self.training.get("finished"))

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, whose weights are kept."""
        metric = self.config.best_metric
        return int(self.history["epoch"].iloc[goodness(self.history[metric], metric).argmax()])

    @functools.cached_property
    def model(self) -> CLIPModel:
        """The best epoch's model, on the configuration's device, in eval mode."""
        path = self.folder / "best.safetensors"
        if not path.is_file():
            raise LabError(
                f"{self.folder} holds no best.safetensors: the run has not finished an epoch; train it first."
            )
        weights = self.config.image_weights
        model = build_model(
            self.config.updated(image_weights="random" if weights == "pretrained" else weights)
        )
        model.load_state_dict(load_file(path))
        return model.to(get_device(self.config.device)).eval()


def load_run(folder: str | Path, **places: Any) -> Run:
    """Open a run's folder.

    Args:
        places: configuration fields that say where and on what to compute, such as data_dir or device.
    Raises: LabError if the folder is missing or is not a run's.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        hint = f"; runs beside it: {', '.join(known)}" if known else ""
        raise LabError(f"{folder} is not a run's folder (no config.yaml){hint}.")
    history = folder / "history.csv"
    return Run(
        folder=folder,
        config=load_config(folder / "config.yaml", **places),
        history=pd.read_csv(history) if history.is_file() else pd.DataFrame(),
        metrics=read_json(folder / "metrics.json"),
        training=read_json(folder / "training.json"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content, or {} where there is none. Raises: LabError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise LabError(f"{path} is not JSON ({error}); delete it and run again.") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
