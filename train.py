"""Train a run: `fit` in Python, `python train.py` in a shell."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from interface import cli

    cli.train()
    raise SystemExit

import contextlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.devices import reuse_freed_memory

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from config import Config, make_config, run_name, settings_digest
from core.errors import LabError, StoppedAtOnceError, choose, nearest
from core.files import atomic_path, file_digest, write_json, write_text
from core.tensor_files import load_tensors, save_archive, save_tensors
from dataset import make_loader, open_dataset, prepare_data, recognized, with_defaults
from evaluate import report_run
from losses import build_loss, with_ids
from models import build_model
from plots.figures import learning_curves
from retrieval.figures import direction
from towers.image import choose_device
from training.checkpoints import (
    evaluation_lock,
    exclusive_lock,
    last_checkpoint,
    load_checkpoint,
    load_last_checkpoint,
    random_states,
    read_trained_on,
    reopened,
    save_checkpoint,
    seed_everything,
    set_random_states,
    stop_after_step,
    write_trained_on,
)
from training.distributed import any_of, barrier, from_main, is_main, join_group, rank, world_size
from training.effects import check, check_metric
from training.engine import Engine, explained_errors
from training.identity import identity
from training.monitor import TrainingMonitor, check_trackers, peak_memory_gb, start_trackers
from training.negatives import build_negatives
from training.optim import EMA, build_optimizer, build_scheduler, choose_precision, mix_weights
from utils import EpochMeter, EpochProgress, Run, goodness, load_run, load_start, validate

OnEpoch = Callable[[pd.DataFrame], None]
UNKNOWN = "unknown"


class RunPlan:
    """What one call of `fit` trains: configuration, your own parts, folders, and the data once they are opened.

    Args:
        criterion, train_set, val_set: instead of the configuration's; the run's name then has their classes and
            digests of what they do and hold, see `identity.identity`.
    """

    def __init__(
        self,
        config: Config,
        *,
        criterion: nn.Module | None = None,
        train_set: Any = None,
        val_set: Any = None,
        show: bool = True,
    ) -> None:
        self.device = choose_device(config)
        join_group(self.device)
        self.config, self.criterion = config, criterion
        self.train_set, self.val_set = train_set, val_set
        self.show = show and is_main()
        given = {"criterion": criterion, "train_set": train_set, "val_set": val_set}
        self.own = {name: _named(part) for name, part in given.items() if part is not None}
        self.folder = config.runs_dir / "_".join([run_name(config), *self.own.values()])
        drive = config.checkpoint_dir
        self.checkpoints = drive / self.folder.name if drive else self.folder / "checkpoints"
        self.data: dict[str, dict[str, Any]] = {}
        self.starts = _starts(config)

    @property
    def is_known(self) -> bool:
        """Whether your own parts can be compared with those of an earlier run."""
        return not any(name.endswith(UNKNOWN) for name in self.own.values())

    def open_data(self) -> None:
        """Open and describe both data sets; the main process fills the caches first.

        Validation images that are copies of training images are counted in a sentence, not refused: official data
        sets contain such duplicates.
        """
        if self.data:
            return
        config = self.config
        if not is_main():
            barrier()
        if self.train_set is None or self.val_set is None:
            prepare_data(config)
            config = self.config = recognized(config)
        self.train_set = with_defaults(
            self.train_set or open_dataset(config, config.train_splits, progress=self.show)
        )
        self.val_set = with_defaults(
            self.val_set or open_dataset(config, config.val_splits, progress=self.show)
        )
        if is_main():
            barrier()
        self.data = {"train": self.train_set.describe(), "val": self.val_set.describe()}
        train, val = self.train_set.image_digests, self.val_set.image_digests
        copies = int(np.isin(val, train).sum())
        if (
            copies and is_main() and len(np.setxor1d(train, val))
        ):  # not validated on the training set on purpose
            print(
                f"{copies:,} of the {len(val):,} validation images are copies of training images; "
                "validation figures count them too."
            )

    def finished(self) -> bool:
        """Whether this run is finished; one that cannot be opened is finished again from its checkpoint.

        The data sets are compared with those the run was trained on, except where a finished run's data are gone.
        Raises: LabError if the run was trained on other data or from other starting weights.
        """
        if not (self.folder / "training.json").is_file():
            return False
        try:
            run = load_run(self.folder)
        except LabError as error:
            if last_checkpoint(self.checkpoints) is None:
                raise
            print(f"{error} It is written again from the last checkpoint.")
            return False
        self._check_settings(run.config, self.folder)
        if not run.finished or self.config.data_dir.exists() or {"train_set", "val_set"} <= self.own.keys():
            self.open_data()
        self._check_origin(run.training, str(self.folder))
        if run.finished and (change := self._other_form(run.training["data"])):
            print(f"{self.folder} {change}")
        return run.finished

    def load_state(self, resume: str) -> dict[str, Any] | None:
        """The checkpoint to continue from, checked; None to start. Args: resume: auto, never, or a path."""
        if resume in ("auto", "never"):
            source, state = self.checkpoints, load_last_checkpoint(self.checkpoints, self.device)
        else:
            source, state = Path(resume), load_checkpoint(resume, self.device)
        if state is not None:
            self._check_same(state, source)
        return state

    def _check_origin(self, known: dict[str, Any], what: str) -> None:
        """Raises: LabError if `known`, of a run or checkpoint, names other data or starting weights than this call."""
        data = known.get("data", {})
        for part in data.keys() & self.data.keys():
            if "form" in data[part] and data[part]["sha256"] != self.data[part]["sha256"]:
                raise LabError(
                    f"{what} was trained on other images or captions than {self.config.data_dir} holds now "
                    f"({part}: {data[part]['images']:,} images there, {self.data[part]['images']:,} here); "
                    "set runs_dir to another folder, or resume to 'never' to train again from the start."
                )
        starts = known.get("starts", {})
        for name in sorted(starts.keys() & self.starts.keys()):
            if starts[name] != self.starts[name]:
                raise LabError(
                    f"{what} started from other weights than {name} {self.config[name]} holds now; "
                    "set resume to 'never' to train again from the start."
                )

    def _other_form(self, known: dict[str, Any]) -> str:
        """A sentence if the image cache has another form than when `known` data was opened, else ""."""
        for part in known.keys() & self.data.keys():
            form = self.data[part]["form"]
            if (old_form := known[part].get("form", form)) != form:
                space = "free space for raw pixels in cache_dir, or " if form == "jpeg" else ""
                return (
                    f"was trained on images cached as {old_form}, and they are cached as {form} now; {space}set "
                    "resume to 'never' to train again from the start."
                )
        return ""

    def _check_settings(self, theirs: Config, what: Path) -> None:
        """Raises: LabError if a run was started before the settings file or preset that names it was changed."""
        if settings_digest(theirs) != settings_digest(self.config):
            named, to_do = "preset", "set runs_dir to another folder"
            if self.config.settings_file:
                named, to_do = "file", "save the file under another name"
            raise LabError(
                f"{what} was trained with other settings than its {named} has now: {self._differing(theirs)}; {to_do}, "
                "or set resume to 'never' to train again from the start."
            )

    def _differing(self, theirs: Config) -> str:
        differences = self.config.differences(theirs).items()
        return ", ".join(f"{n} ({b} there, {a} here)" for n, (a, b) in differences if n != "settings_file")

    def _check_same(self, state: dict[str, Any], path: Path) -> None:
        """Raises: LabError if a checkpoint is another configuration's, with the fields that differ."""
        theirs = Config(**state["config"])
        if theirs.num_epochs < self.config.num_epochs:
            longer = {"num_epochs": self.config.num_epochs, "settings_file": self.config.settings_file}
            if not self.own and run_name(theirs.updated(**longer)) == run_name(self.config):
                print(
                    f"{path} was to train for {theirs.num_epochs} epochs; optimizer and data order continue, and from "
                    f"here on the learning rate is that of schedule {self.config.schedule!r} over "
                    f"{self.config.num_epochs} epochs."
                )
                theirs = self.config
                best = [folder / "best.safetensors" for folder in (path.parent, path.parent.parent)]
                for earlier in [file for file in best if file.is_file() and is_main()][:1]:
                    with atomic_path(self.folder / "best.safetensors") as beside:
                        shutil.copyfile(earlier, beside)  # until an epoch is better
        if theirs != self.config and state["run"] != self.folder.name:
            raise LabError(
                f"{path} belongs to another configuration: {self._differing(theirs)}; set resume to 'never'."
            )
        self._check_settings(theirs, path)
        self._check_origin(state, str(path))
        if change := self._other_form(state["data"]):
            raise LabError(f"{path} {change}")

    def clear(self) -> None:
        """Delete an earlier run of this name, and what was derived from it, once no process evaluates it."""
        with evaluation_lock(self.folder):
            for name in ("figures", "tables", "index", "search"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for path in [*self.checkpoints.glob("*.*"), *self.folder.glob("*.*")]:
                if path.is_file() and not path.name.endswith(".lock"):
                    path.unlink(missing_ok=True)

    def saved(self) -> str:
        """What a run that was stopped in the middle of a step continues from."""
        path = last_checkpoint(self.checkpoints)
        if path is None:
            return "stopped at once: no checkpoint is saved yet; run again to start."
        return f"stopped at once: {path} is saved; run again to continue."


class Trainer:
    """One run with all its parts, made by `build_trainer`.

    Args:
        start: the weights that training starts from, for `interpolate_weights`.
        state: of a checkpoint; loaded into the parts.
    """

    def __init__(
        self,
        plan: RunPlan,
        engine: Engine,
        loader: DataLoader,
        val_loader: DataLoader,
        start: dict[str, Tensor] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.plan, self.engine, self.model, self.start = plan, engine, engine.model, start
        self.loader, self.val_loader = loader, val_loader
        self.config, self.folder, self.checkpoints = plan.config, plan.folder, plan.checkpoints
        self.monitor = TrainingMonitor(self.config)
        self.history: list[dict[str, float]] = []
        self.progress = EpochProgress()
        self.steps = 0
        self.saved_at = time.monotonic()
        if state is not None:
            self._restore(state)
        self.trackers = start_trackers(self.config, self.folder, self.steps) if is_main() else []

    @property
    def criterion(self) -> nn.Module:
        """The loss of training and validation; may be replaced before `run`."""
        return self.engine.criterion

    @criterion.setter
    def criterion(self, loss: nn.Module) -> None:
        self.engine.criterion = with_ids(loss).to(self.engine.device)

    # --- state ---

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.engine.optimizer,
            "scheduler": self.engine.scheduler,
            "scaler": self.engine.scaler,
            "negatives": self.engine.negatives,
            "ema": self.engine.ema,
            "dataset": self.plan.train_set,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _state(self) -> dict[str, Any]:
        return {
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "random": random_states(),
            "history": self.history,
            "progress": asdict(self.progress),
            "steps": self.steps,
            "micro_batch_size": self.engine.micro_batch_size,
            "run": self.folder.name,
            "config": self.config.model_dump(mode="json"),
            "data": self.plan.data,
            "starts": self.plan.starts,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's state into the parts."""
        state = {"dataset": {}, **state}  # which earlier checkpoints lack
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.engine.micro_batch_size = state["micro_batch_size"]
        self.history, self.steps = state["history"], state["steps"]
        self.progress = EpochProgress(**state["progress"])
        if rank() == 0:
            set_random_states(state["random"])
        else:  # the checkpoint holds the main process's
            torch.manual_seed(hash((self.config.seed, rank(), self.steps)))
        best = self.checkpoints / "best.safetensors"
        if is_main() and best.is_file() and not (self.folder / "best.safetensors").is_file():
            with atomic_path(self.folder / "best.safetensors") as beside:
                shutil.copyfile(best, beside)  # only the run's folder was lost
            self._write_history()

    def _write_history(self) -> None:
        write_text(self.folder / "history.csv", pd.DataFrame(self.history).to_csv(index=False))

    def _is_due(self) -> bool:
        return time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes

    def save(self) -> None:
        if is_main():
            save_checkpoint(self.checkpoints, self._state(), self.steps)
        self.saved_at = time.monotonic()

    # --- the run ---

    def run(self, stop: threading.Event, on_epoch: OnEpoch | None = None) -> None:
        """Train to the end, or to the first step after `stop` is set."""
        if is_main():
            self.config.save(self.folder / "config.yaml")
            write_trained_on(self.folder, self.plan.train_set.image_digests, self.config.start_from)
        try:
            finished = self._epochs(stop, on_epoch)
        finally:
            for tracker in self.trackers:
                tracker.finish()
        if finished:
            self._mix_weights()
            self._write_training(finished=True)
            barrier()

    def _epochs(self, stop: threading.Event, on_epoch: OnEpoch | None) -> bool:
        """Train until the last epoch, early stopping, or `stop`. Returns: whether training has come to its end."""
        config, total = self.config, self.config.num_epochs * len(self.loader)
        bar = tqdm(
            total=total, initial=self.steps, desc=self.folder.name, unit="step", disable=not self.plan.show
        )
        with bar:
            for epoch in range(len(self.history), config.num_epochs):
                if self._out_of_patience():
                    bar.write(
                        f"early stopping: no better {config.best_metric} in {config.patience} validations."
                    )
                    break
                if not self._epoch(epoch, stop, bar):
                    self.save()
                    bar.write(
                        f"stopped at epoch {epoch + 1}, step {self.progress.step}; run again to continue."
                    )
                    return False
                if on_epoch is not None and is_main():
                    on_epoch(pd.DataFrame(self.history))
        return True

    def _epoch(self, epoch: int, stop: threading.Event, bar: tqdm) -> bool:
        """Train and validate one epoch, or the rest of it. Returns: False if `stop` ended it before."""
        bar.set_description(f"{self.folder.name}, epoch {epoch + 1} of {self.config.num_epochs}")
        self.model.hold_towers(epoch < self.config.freeze_tower_epochs)
        if self.progress.step == 0:
            self.plan.train_set.refresh(self.model, epoch, self.config)
        meter = EpochMeter(epoch, self.engine.device, self.progress, bar)
        self.model.train()
        for batch in meter.batches(self.loader, self.engine.criterion, self.config):
            meter.add(self.engine.step(batch), batch["image_id"], self.engine.images, self.engine.chance)
            self.steps += 1
            if any_of(stop.is_set(), self.engine.device):
                meter.read()
                return False
            if self._is_due():
                meter.read()
                self.save()
        trained = meter.figures(self.model, self.engine.optimizer) | self.engine.negatives.log()
        chance = self.progress.uniform_sum / self.progress.images
        self.monitor.after_epoch(self.model, trained["train_loss"], chance, self.steps)
        row = {"epoch": epoch + 1, **trained, **self._validated(epoch)}
        row |= {"peak_memory_gb": peak_memory_gb(self.engine.device), **self.plan.train_set.log()}
        self.history.append({name: float(value) for name, value in row.items()})
        self.progress = EpochProgress()
        if is_main():
            self._write_history()
            for tracker in self.trackers:
                tracker.log(self.history[-1], step=self.steps)
            self._keep_epoch(epoch + 1)
        if self.config.best_metric in self.history[-1] or self._is_due():
            self.save()
        self._write_training(finished=False)
        return True

    def _validated(self, epoch: int) -> dict[str, float]:
        """Figures of this epoch's validation, if it has one, by the main process, which writes the best weights."""
        last = epoch + 1 == self.config.num_epochs
        if (epoch + 1) % self.config.eval_every and not last:
            return {}
        figures: dict[str, float] = {}
        if is_main():
            with self.engine.ema.applied(self.model):
                validated = validate(self.model, self.val_loader, self.engine.criterion, self.config)
                self._keep_best(validated)
            self.monitor.after_validation(validated, self.steps)
            figures = {k: float(v) for k, v in validated.items() if isinstance(v, (int, float))}
        return from_main(figures)

    def _scores(self) -> list[float]:
        """Goodness of each validation so far."""
        metric = self.config.best_metric
        return [goodness(row[metric], metric) for row in self.history if metric in row]

    def _out_of_patience(self) -> bool:
        scores, patience = self._scores(), self.config.patience
        return (
            patience is not None
            and len(scores) > patience
            and max(scores[:-patience]) >= max(scores[-patience:])
        )

    def _keep_best(self, validated: dict[str, Any]) -> None:
        """Write best.safetensors, and what it is, if no earlier epoch was better."""
        metric = self.config.best_metric
        value = goodness(choose(validated, metric, "best_metric"), metric)
        if math.isnan(value):
            raise LabError(f"best_metric {metric!r} is nan on the validation split; choose another.")
        if value > max(self._scores(), default=-math.inf):
            self._write_weights("best", len(self.history) + 1)

    def _keep_epoch(self, epoch: int) -> None:
        every = self.config.keep_every_epochs
        if every is not None and epoch % every == 0:
            save_archive(self.checkpoints / f"epoch_{epoch:03d}.pt", self._state())
            with self.engine.ema.applied(self.model):
                self._write_weights(f"epoch_{epoch:03d}", epoch)

    def _write_weights(self, name: str, epoch: int, **about: str) -> None:
        folders = {self.folder, self.checkpoints} if self.config.checkpoint_dir else {self.folder}
        for folder in folders:
            metadata = {"run": self.folder.name, "epoch": str(epoch), **about}
            save_tensors(folder / f"{name}.safetensors", self.model.state_dict(), metadata)

    def _mix_weights(self) -> None:
        """WiSE-FT: keep the mixture of starting and best weights that validates best."""
        if self.start is None or not is_main():
            return
        path = self.folder / "best.safetensors"
        best, metadata = load_tensors(path, "train the run again with resume='never'")
        if "share_of_training" in metadata:
            return  # mixed before, and killed just after
        metric = self.config.best_metric

        def score() -> float:
            validated = validate(self.model, self.val_loader, self.engine.criterion, self.config)
            return goodness(validated[metric], metric)

        share, table = mix_weights(self.model, self.start, best, score)
        write_text(self.folder / "interpolation.csv", table.to_csv(index=False))
        self._write_weights("best", len(self.history), share_of_training=f"{share:g}")

    def _write_training(self, finished: bool) -> None:
        if not is_main():
            return
        seconds = sum(row["train_seconds"] for row in self.history)
        write_json(
            self.folder / "training.json",
            {
                "finished": finished,
                "epochs": len(self.history),
                "train_seconds": round(seconds, 1),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.engine.device}",
                "processes": world_size(),
                "precision": self.config.precision,
                "micro_batch_size": self.engine.micro_batch_size,
                "torch": torch.__version__,
                "data": self.plan.data,
                "starts": self.plan.starts,
                "own": self.plan.own,
                "history": self.history,
            },
            seal=True,
        )


def build_trainer(plan: RunPlan, resume: str) -> Trainer:
    """Build every part of a run, and put a checkpoint's state into them if there is one."""
    direction(plan.config.best_metric)  # refused before anything is trained
    plan.open_data()
    state, config, device = plan.load_state(resume), plan.config, plan.device
    seed_everything(config.seed)
    loader = _loader(plan, plan.train_set, shuffle=True, rank=rank(), world_size=world_size())
    val_loader = _loader(plan, plan.val_set, shuffle=False)
    model = build_model(config).to(device)
    if device.type == "cuda" or config.image_tower_mode != "cached":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.start_from is not None:
        load_start(model, config.start_from)
        _check_start(plan, config.start_from)
    start = None
    if config.interpolate_weights:
        start = {name: weights.cpu().clone() for name, weights in model.state_dict().items()}
    if state is not None and config.precision == "auto":  # a run keeps the precision that it started with
        config = config.updated(precision=state["config"]["precision"])
    plan.config = config = config.updated(precision=choose_precision(config, device))
    optimizer = build_optimizer(model, config)
    engine = Engine(
        model,
        (with_ids(plan.criterion) if plan.criterion else build_loss(config)).to(device),
        optimizer,
        build_scheduler(optimizer, config, len(loader)),
        config,
        negatives=build_negatives(config, model, plan.train_set),
        ema=EMA(model, config.ema_decay),
        scaler=torch.amp.GradScaler(
            device.type, enabled=config.precision == "fp16" and device.type == "cuda"
        ),
    )
    torch.manual_seed(config.seed + rank())  # processes drop different units
    return Trainer(plan, engine, loader, val_loader, start, state)


def _loader(plan: RunPlan, dataset: Any, **options: Any) -> DataLoader:
    config = plan.config
    return make_loader(
        dataset,
        config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        pin_memory=plan.device.type == "cuda",
        **options,
    )


def _check_start(plan: RunPlan, start: Path) -> None:
    """Raises: LabError if the weights of a start have seen images that this run validates or tests on."""
    seen = read_trained_on(start)
    if seen is None:
        print(f"{start} does not say which images it has seen; none of them should be in val or test here.")
        return
    held = {"+".join(plan.config.val_splits): plan.val_set}
    for split in plan.config.test_splits:
        with contextlib.suppress(LabError):  # its evaluation will say so
            if split not in held:
                held[split] = open_dataset(plan.config, (split,), evaluation=True, progress=plan.show)
    own = plan.train_set.image_digests
    for split, dataset in held.items():
        shared = np.setdiff1d(np.intersect1d(seen, dataset.image_digests), own)
        if len(shared):
            raise LabError(
                f"start_from {start} was trained on {len(shared):,} of the {len(dataset):,} images of split "
                f"{split!r} here; start from a run on the same split, or choose other val_splits and test_splits."
            )


def _named(part: Any) -> str:
    """A given loss or data set in a run's name: its class, and six digits of what it does and holds."""
    if hasattr(part, "set_epoch"):
        part.set_epoch(0)  # as it was before an earlier run
    digest = identity(part)
    return f"{type(part).__name__}_{digest[:6] if digest else UNKNOWN}"


def _starts(config: Config) -> dict[str, str]:
    """Digests of the files that training starts from, by the field that names them; of those that are there."""
    files = {
        "start_from": config.start_from and config.start_from / "best.safetensors",
        "image_weights": Path(config.image_weights),
    }
    return {name: file_digest(path) for name, path in files.items() if path is not None and path.is_file()}


@contextlib.contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Within, torch uses TensorFloat-32 where a GPU has it, and deterministic algorithms alone if asked for."""

    def choose_algorithms(precision: str, allow_tf32: bool, benchmark: bool, deterministic: bool) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = allow_tf32, benchmark
        torch.use_deterministic_algorithms(deterministic)

    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    choose_algorithms("high", True, not deterministic, deterministic)
    try:
        yield
    finally:
        choose_algorithms(*before)


@explained_errors()
def fit(
    config: Config,
    *,
    resume: str = "auto",
    criterion: nn.Module | None = None,
    train_set: Any = None,
    val_set: Any = None,
    show: bool = True,
    on_epoch: OnEpoch | None = None,
) -> Run:
    """Train a configuration, or continue or reuse its run; the same call every time.

    Args:
        resume: `auto` continues an unfinished run and returns a finished one; `never` starts over; else the
            path of a checkpoint.
        criterion: your own loss, called like the losses of losses.py, or with images, captions and labels.
        train_set, val_set: your own data sets, with batches like those of dataset.COCOClipDataset.
        show: progress bars.
        on_epoch: called with the history so far after each epoch, to draw live curves.
    Returns: the run. Interrupted (Ctrl-C, or the notebook's stop button), it finishes the step, saves a checkpoint and
        returns the unfinished run; the next call continues it. A second interrupt ends it at once and prints what
        is saved.
    Raises: LabError if memory runs out, the run's folder holds a run of other data or another configuration, a
        setting has no effect, or `resume` is not a checkpoint.
    """
    check(config)
    check_trackers(config.trackers)
    if val_set is None:
        check_metric(config)
    resume = _checkpoint(resume)
    reuse_freed_memory()
    plan = RunPlan(config, criterion=criterion, train_set=train_set, val_set=val_set, show=show)
    if resume == "auto" and not plan.is_known:
        print(
            f"{plan.folder.name}: your loss or data cannot be compared with an earlier run's; the run starts over."
        )
        resume = "never"
    if resume != "auto" or not plan.finished():
        plan.open_data()
        lock = exclusive_lock(plan.folder, plan.checkpoints) if is_main() else contextlib.nullcontext()
        with lock, stop_after_step() as stop, algorithms(config.deterministic):
            if resume == "never" and is_main():
                plan.clear()
            barrier()
            try:
                build_trainer(plan, resume).run(stop, on_epoch)
            except KeyboardInterrupt:
                raise StoppedAtOnceError(plan.saved()) from None
    return load_run(plan.folder, **reopened(config))


def fit_in_processes(config: Config, num_processes: int | None = None) -> Run:
    """`fit` in one process per GPU, started from a notebook; their progress is printed in the cell.

    Processes of `train.py`, not forks of the notebook, which fail once a cell has used CUDA. Interrupted, they save a
    checkpoint; the same call continues.

    Args: num_processes: None for the number of GPUs.
    Raises: LabError if a process ends before the last epoch.
    """
    count = num_processes or max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        settings = config.save(Path(folder) / "config.yaml")
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, str(Path(__file__).resolve()), str(settings)], text=True,
            env={**os.environ, "TQDM_MININTERVAL": "5"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        while process.poll() is None:
            with contextlib.suppress(KeyboardInterrupt):  # the processes receive it too
                for line in process.stdout:
                    print(line, end="")
    if process.returncode:
        raise LabError(
            f"training in {count} processes ended early; their messages are above, and the same call continues from "
            "the last checkpoint."
        )
    return load_run(config.runs_dir / run_name(config))


def _checkpoint(resume: str) -> str:
    """`auto`, `never` or the path of a checkpoint, looked for before anything is computed."""
    path = Path(resume).expanduser()
    if resume in ("auto", "never"):
        return resume
    if path.suffix == ".safetensors":
        raise LabError(
            f"{path} holds an epoch's weights alone; resume takes a checkpoint, checkpoints/step_*.pt, or 'auto'. To "
            "start a new run from a run's best weights, set start_from to its folder."
        )
    if not path.is_file():
        hint = nearest(resume, ["auto", "never"]) or "."
        raise LabError(f"resume is 'auto', 'never' or a checkpoint, but {path} does not exist{hint}")
    return str(path)


def overfit(config: Config, images: int = 128, *, steps: int = 300, show: bool = True) -> pd.DataFrame:
    """The first test of any change: does the model memorize a few images?

    Trains on that many images without augmentation, dropout, weight decay or label smoothing, and measures retrieval
    among them.

    Returns: one row: images, steps, the last loss, and `accuracy`, the best mean of both Recall@1 in [0, 1].
        Under 0.95 something is broken, or the learning rate is off.
    """
    still = {name: Config()[name] for name in Config.model_fields if name.startswith("augment_")}
    batch = min(images, config.batch_size)
    small = config.updated(
        **still,
        max_caption_variations=1,
        max_samples=images,
        test_splits=(),
        batch_size=batch,
        num_epochs=max(1, steps * batch // images),
        eval_every=max(1, steps * batch // images // 10),
        head_dropout=0.0,
        image_dropout=0.0,
        text_dropout=0.0,
        label_smoothing=0.0,
        weight_decay=0.0,
        patience=None,
        runs_dir=config.runs_dir / "overfit",
    )
    train_set = open_dataset(small, small.train_splits, progress=show)
    history = fit(small, val_set=train_set, resume="never", show=show).history
    recalls = history[["i2t_recall@1", "t2i_recall@1"]].mean(axis=1)
    row = {
        "images": images,
        "steps": steps,
        "loss": history["train_loss"].iloc[-1],
        "accuracy": recalls.max(),
    }
    return pd.DataFrame([row]).set_index("images")


def _print_overfit(config: Config, images: int) -> None:
    print(overfit(config, images).to_string())


def main(
    config: Config,
    resume: str = "auto",
    overfit: int = 0,
    eval_only: bool = False,
    comprehensive: bool = False,
    output_file: str = "",
    no_plotting: bool = False,
) -> None:
    """Train, evaluate once on the test splits, and print the output paths; the options are those of the shell."""
    if overfit:
        _print_overfit(config, overfit)
        return
    folder = config.runs_dir / run_name(config)

    def draw(history: pd.DataFrame) -> None:
        learning_curves({folder.name: history}, folder / "figures" / "learning_curves.png")

    if eval_only:
        places = reopened(config)
        if config.data_dir == make_config(config.preset).data_dir:
            del places["data_dir"]  # none was named: the run's own
        run = load_run(folder, **places)
    else:
        run = fit(config, resume=resume, on_epoch=None if no_plotting else draw)
    if run.finished and is_main():
        with evaluation_lock(run.folder):
            report_run(run, comprehensive=comprehensive, output_file=output_file or None)
        files = sorted(path.name for path in run.folder.iterdir() if not path.name.startswith("."))
        print(f"{run.folder}: {', '.join(files)}")
