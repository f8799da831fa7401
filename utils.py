"""The training loop and validation, and a run's folder."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core.threads  # noqa: F401  read when torch is imported

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from config import Config, load_config, run_file
from core.errors import LabError
from core.files import file_digest
from core.ids import match_ids
from dataset import make_loader, with_defaults
from losses import build_loss, chance_level
from metrics import retrieval_metrics
from models import CLIPModel, build_model
from retrieval.figures import direction, feature_geometry, feature_spread
from towers.image import choose_device
from training.augment import augment, augment_parts
from training.checkpoints import load_weights_file, own_image_weights, read_history, read_kept, read_metrics
from training.engine import encode_batch, explained_errors
from training.optim import autocast


def goodness(value: Any, metric: str) -> Any:
    """A figure such that higher is better. Raises: LabError if the metric has no direction."""
    return direction(metric) * value


@dataclass
class Run:
    """A run's folder: configuration, history, metrics, weights.

    Args:
        folder: its path.
        config: as saved, with the fields that were given to `load_run`.
        history: one row per epoch.
        metrics: split -> metrics, once evaluated; `gallery.measured` checks whether they are current.
        training: data, seconds, machine and versions of its training.
        own_data: whether `data_dir` is the folder that the run was trained on.
        results: folder of figures, tables and indexes, if not `folder` because they are of other data.
    """

    folder: Path
    config: Config
    history: pd.DataFrame
    metrics: dict[str, dict[str, Any]]
    training: dict[str, Any]
    own_data: bool = True
    results: Path | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def test_split(self) -> str:
        """The first test split, which comparisons and searches are about. Raises: LabError if there is none."""
        if not self.config.test_splits:
            raise LabError(f"{self.name} has no test split; set test_splits, for example to its val_splits.")
        return self.config.test_splits[0]

    @property
    def finished(self) -> bool:
        """Whether training is complete."""
        return bool(self.training.get("finished"))

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, whose weights are saved as the best."""
        metric = self.config.best_metric
        if metric not in self.history:
            raise LabError(f"{self.folder} has no history of {metric}; train the run to the end first.")
        return int(self.history["epoch"].iloc[goodness(self.history[metric], metric).argmax()])

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256 of the best epoch's weights. Raises: LabError if there are none yet."""
        try:
            return file_digest(self.folder / "best.safetensors")
        except FileNotFoundError as error:
            raise LabError(
                f"{self.folder} holds no best.safetensors: the run has not finished an epoch; train it first."
            ) from error

    @functools.cached_property
    def model(self) -> CLIPModel:
        """The best epoch's model, on the configuration's device, in eval mode."""
        self.weights  # noqa: B018  taken before they are loaded: results never carry the digest of newer weights
        path = self.folder / "best.safetensors"
        model = build_model(self.config.updated(image_weights=own_image_weights(self.config)))
        weights = load_weights_file(path)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise LabError(
                f"{path} does not fit {self.folder / 'config.yaml'} ({str(error).splitlines()[-1].strip()}); "
                "restore the one that belongs to the other."
            ) from error
        return model.to(choose_device(self.config)).eval()

    def summary(self, **more: Any) -> pd.DataFrame:
        """Folder, best epoch, training time and files of the run, and the rows in `more`."""
        names = ("config.yaml", "history.csv", "metrics.json", "best.safetensors")
        rows = {
            "run": self.folder,
            "best epoch": self.best_epoch,
            "training": f"{self.training['train_seconds']:.0f} s",
            **{name: self.folder / name for name in names if (self.folder / name).is_file()},
            **more,
        }
        return pd.Series(rows, name="value").astype(str).to_frame()


def load_run(folder: str | Path, **places: Any) -> Run:
    """Open a run's folder.

    Args:
        places: configuration fields outside the run's name, such as data_dir, device or recall_ks.
    Raises: LabError if the folder is missing or is not a run's.
    """
    folder = Path(folder)
    saved = load_config(run_file(folder))
    config = saved.updated(**places)
    own_data = config.data_dir.resolve() == saved.data_dir.resolve()
    if not own_data and config.reader.startswith("auto:"):
        config.reader = "auto"  # recognized again for the other data
    training = read_kept(folder / "training.json", "the run counts as unfinished")
    if training and not isinstance(training.get("data"), dict):
        print(f"{folder / 'training.json'} has no 'data'; the run counts as unfinished.")
        training = {}
    history = training.pop("history", None)
    return Run(
        folder=folder,
        config=config,
        own_data=own_data,
        history=read_history(folder / "history.csv") if history is None else pd.DataFrame(history),
        metrics=read_metrics(folder / "metrics.json"),
        training=training,
    )


def load_start(model: CLIPModel, folder: str | Path) -> None:
    """Load the best weights of a finished run; a tower that only one of the two has is left as it is.

    A `logit_bias` that the run lacks, because it was trained with another loss, starts as configured.

    Raises: LabError if a part has another shape, or the run has no weights.
    """
    path = Path(folder) / "best.safetensors"
    if not path.is_file():
        raise LabError(f"start_from {folder} holds no best.safetensors; train that run first.")
    theirs, ours = load_weights_file(path), model.state_dict()
    own = ("image_encoder.", "text_encoder.", "logit_bias")
    missing = [name for name in ours if name not in theirs and not name.startswith(own)]
    unlike = [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if missing or unlike:
        first = min([*missing, *unlike])
        raise LabError(
            f"start_from {folder} does not fit: {first} is missing there or of another shape; "
            "use the same heads and embed_dim."
        )
    model.load_state_dict({name: theirs[name] for name in ours.keys() & theirs.keys()}, strict=False)


# --- one epoch ---


@explained_errors("`train.fit` divides a batch into pieces that fit")
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
    """Train on every batch once: the plain loop. `train.fit` takes the same steps by `training.engine.Engine`.

    Args:
        epoch: number from 0; order and augmentation depend on it and on the seed.
        config: clipping, augmentation, precision (fp16 without the loss scaling of `fit`); None: the documented
            defaults.
        show: show a progress bar.
    Returns: as `EpochMeter.figures`.
    Raises: LabError on a non-finite loss, naming the images of the batch, and where memory runs out.
    """
    config = config or Config()
    device = model.logit_scale.device
    with tqdm(total=len(train_loader), desc=f"epoch {epoch + 1}", unit="step", disable=not show) as bar:
        meter = EpochMeter(epoch, device, bar=bar)
        model.train()
        for batch in meter.batches(train_loader, criterion, config):
            with autocast(config, device):
                features = model(batch["image"], batch["text"])  # (I, D), (T, D), and the temperature
            image_id, text_id = match_ids(batch)  # (I,), (T,): equal ids are a match
            loss = criterion(**features, image_id=image_id, text_id=text_id)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            meter.add(loss, image_id)
    return meter.figures(model, optimizer)


@dataclass
class EpochProgress:
    """How far an epoch is; part of a checkpoint, so that an epoch resumes in the middle."""

    step: int = 0
    images: int = 0
    loss_sum: float = 0.0
    uniform_sum: float = 0.0  # of the chance-level loss
    seconds: float = 0.0
    data_seconds: float = 0.0


STEPS_BETWEEN_READINGS = 20
"""Steps whose losses stay on a GPU until they are read together: it would idle while each one is waited for."""


class EpochMeter:
    """Gives the batches of an epoch, or of the rest of one, and adds up losses and seconds.

    Args:
        progress: where to resume inside the epoch; updated in place by `read`.
        bar: advanced by one per step.
    """

    def __init__(
        self,
        epoch: int,
        device: torch.device,
        progress: EpochProgress | None = None,
        bar: tqdm | None = None,
    ) -> None:
        self.epoch, self.device, self.bar = epoch, device, bar
        self.progress = progress or EpochProgress()
        self.limit = 1 if device.type == "cpu" else STEPS_BETWEEN_READINGS
        self.unread: list[tuple[Tensor, Tensor, int, Any]] = []

    def batches(self, loader: DataLoader, criterion: nn.Module, config: Config) -> Iterator[dict[str, Any]]:
        """The epoch's batches on the device, images augmented. A criterion with `set_epoch` gets the epoch."""
        _start_at(loader, self.epoch, self.progress.step)
        if callable(set_epoch := getattr(criterion, "set_epoch", None)):
            set_epoch(self.epoch)
        self.mark = time.perf_counter()
        for batch in loader:
            self.progress.data_seconds += time.perf_counter() - self.mark
            batch = to_device(batch, self.device)
            batch["image"] = augmented(batch, config, self.epoch)
            yield batch
            self.mark = time.perf_counter()

    def add(self, loss: Tensor, image_id: Tensor, images: int | None = None, chance: Any = math.nan) -> None:
        """Count a step. Args: images: of the step, if not `len(image_id)`; chance: its chance-level loss."""
        self.progress.seconds += time.perf_counter() - self.mark
        self.unread.append((loss.detach(), image_id, images or len(image_id), chance))
        if len(self.unread) >= self.limit:
            self.read()

    def read(self) -> None:
        """Bring the progress up to date. Raises: LabError on a non-finite loss."""
        if not self.unread:
            return
        progress = self.progress
        values = torch.stack([loss for loss, *_ in self.unread]).tolist()
        for value, (_, image_id, images, chance) in zip(values, self.unread, strict=True):
            if not math.isfinite(value):
                raise LabError(
                    f"the loss is {value} at epoch {self.epoch + 1}, step {progress.step + 1} (image ids "
                    f"{image_id.tolist()[:8]}...); lower learning_rate or max_grad_norm; the last checkpoint remains."
                )
            progress.step += 1
            progress.images += images
            progress.loss_sum += value * images
            progress.uniform_sum += float(chance) * images
        if self.bar is not None:
            rate = f"{progress.images / progress.seconds:.0f} images/s"
            self.bar.set_postfix_str(f"loss {progress.loss_sum / progress.images:.3f}, {rate}", refresh=False)
            self.bar.update(len(self.unread))
        self.unread.clear()

    def figures(self, model: CLIPModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """train_loss (mean over images), learning_rate, temperature, images_per_second, train_seconds, and data_share,
        the part of the time spent waiting for data."""
        self.read()
        progress = self.progress
        return {
            "train_loss": progress.loss_sum / progress.images,
            "learning_rate": max(group["lr"] for group in optimizer.param_groups),
            "temperature": model.temperature,
            "images_per_second": progress.images / progress.seconds,
            "data_share": progress.data_seconds / progress.seconds,
            "train_seconds": progress.seconds,
        }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a batch on the device; lists of captions unchanged."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _start_at(loader: DataLoader, epoch: int, step: int) -> None:
    """Choose the epoch's order and first step, for loaders made by `make_loader`."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    if hasattr(sampler, "start"):
        sampler.epoch, sampler.start = epoch, step
    with_defaults(loader.dataset).set_epoch(epoch)


def augmented(batch: dict[str, Any], config: Config, epoch: int) -> Tensor:
    """A batch's uint8 images augmented by seed, epoch and id; of side-by-side images each half by its own id."""
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


# --- Features of a whole split ---


MOST_ROWS = 2000  # whose uniformity a validation measures: a tenth of a second


@torch.no_grad()
def first_batch(model: CLIPModel, dataset: Any, config: Config) -> pd.Series:
    """The first batch before training: shapes of its tensors, its loss, and the loss's chance level (or None)."""
    model.eval()
    batch = next(iter(make_loader(dataset, config.batch_size)))
    ids = {"image_id": batch["image_id"], "text_id": batch["text_id"]}
    criterion = build_loss(config)
    loss = criterion(**model(batch["image"], batch["text"]), **ids).item()
    rows: dict[str, Any] = {
        name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)
    }
    chance_loss = chance_level(criterion, **ids, logit_bias=model.logit_bias)
    rows["first loss"] = round(loss, 3)
    rows["chance-level loss"] = chance_loss and round(chance_loss, 3)
    return pd.Series(rows, name="value", dtype=object)


@torch.no_grad()
def first_batch_features(model: CLIPModel, dataset: Any, config: Config) -> dict[str, Tensor]:
    """The first batch's named features and its ids, as a loss takes them: `criterion(**features)`."""
    model.eval()
    batch = next(iter(make_loader(dataset, config.batch_size)))
    features = model(batch["image"], batch["text"])
    return {**features, "image_id": batch["image_id"], "text_id": batch["text_id"]}


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
    """A split's figures: the data set's own `metrics`, else those of retrieval."""
    measure = with_defaults(dataset).metrics
    if measure is not None:
        return measure(model, features, config)
    ks = tuple(k for k in config.recall_ks if k <= len(features["image_id"]))
    spread = {f"{kind}_spread": feature_spread(features[f"{kind}_features"]) for kind in ("image", "text")}
    return {**retrieval_metrics(**features, ks=ks), **spread, **feature_geometry(**features, most=MOST_ROWS)}
