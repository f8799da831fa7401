"""`fit(config)` trains, checkpoints and resumes a run; `python train.py` is the same from a shell."""

from __future__ import annotations

import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compat import get_device

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cache import atomic_path
from cli import run_command
from config import Config, run_name
from dataset import COCOClipDataset, make_loader, prepare_data
from errors import LabError, choose
from evaluate import evaluate_run
from models import build_loss, build_model
from open_data import open_dataset
from optimisation import EMA, build_optimizer, build_scheduler
from utils import (
    EpochProgress,
    Run,
    goodness,
    last_checkpoint,
    load_checkpoint,
    load_run,
    random_states,
    save_checkpoint,
    seed_everything,
    set_random_states,
    train_epoch,
    validate,
    write_json,
)


def fit(
    config: Config,
    *,
    resume: str = "auto",
    show: bool = True,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
) -> Run:
    """Train a configuration, or continue or reuse its run; the same call every time.

    Args:
        resume: `auto` continues an unfinished run and returns a finished one; `never` starts over; else the
            path of a checkpoint.
        show: progress bars.
        on_epoch: called with the history so far after each epoch, to draw live curves.
    Returns: the run. Interrupted (Ctrl-C, or the notebook's stop button), it finishes the step, saves and
        returns the unfinished run; the next call continues it.
    Raises: LabError if the run's folder holds another data set's or another configuration's run.
    """
    trainer = Trainer(config, show=show)
    if resume != "auto" or not trainer.finished():
        with alone(trainer.folder), stop_after_step() as stop:
            if resume == "never":
                trainer.clear()
            trainer.prepare(resume)
            trainer.run(stop, on_epoch)
    return load_run(trainer.folder, **trainer.places())


class Trainer:
    """The parts of one run and how far they are; `fit` is the way to use it."""

    def __init__(self, config: Config, show: bool = True) -> None:
        self.config, self.show = config, show
        self.folder = config.runs_dir / run_name(config)
        self.device = get_device(config.device)
        prepare_data(config)
        self.train_set = open_dataset(config, config.train_splits, progress=show)
        self.val_set = open_dataset(config, config.val_splits, progress=show)
        self.data = {"train": self.train_set.describe(), "val": self.val_set.describe()}
        self._check_data()

    def places(self) -> dict[str, Any]:
        """Where this call computes, for a run that was made elsewhere."""
        return {name: self.config[name] for name in ("data_dir", "cache_dir", "runs_dir", "device")}

    def _check_data(self) -> None:
        if not (self.folder / "training.json").is_file():
            return
        known = load_run(self.folder).training["data"]
        if {part: known[part]["sha256"] for part in known} != {p: self.data[p]["sha256"] for p in self.data}:
            raise LabError(
                f"{self.folder} was trained on other images or captions than {self.config.data_dir} holds now; "
                "set runs_dir to another folder, or delete that run."
            )

    def finished(self) -> bool:
        return (self.folder / "training.json").is_file() and load_run(self.folder).finished

    def clear(self) -> None:
        """Forget an earlier run of this name."""
        for path in [*self.folder.glob("checkpoints/*"), *self.folder.glob("*.*")]:
            if path.is_file() and path.name != ".lock":
                path.unlink()

    def prepare(self, resume: str) -> None:
        """Build every part, then put a checkpoint's state into them if there is one."""
        config = self.config
        seed_everything(config.seed)
        self.loader = self._loader(self.train_set, shuffle=True)
        self.val_loader = self._loader(self.val_set, shuffle=False)
        self.model = build_model(config).to(self.device)
        if self.device.type == "cuda" or config.image_tower_mode != "cached":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.criterion = build_loss(config).to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = build_scheduler(self.optimizer, config, len(self.loader))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._needs_scaler())
        self.ema = EMA(self.model, config.ema_decay)
        self.history: list[dict[str, float]] = []
        self.progress = EpochProgress()
        self.steps = 0
        self.saved_at = time.monotonic()
        path = last_checkpoint(self.folder / "checkpoints") if resume in ("auto", "never") else Path(resume)
        if path is not None:
            self._restore(load_checkpoint(path, self.device), path)
        config.save(self.folder / "config.yaml")

    def _needs_scaler(self) -> bool:
        precision = self.config.precision
        return self.device.type == "cuda" and (
            precision == "fp16" or (precision == "auto" and not torch.cuda.is_bf16_supported())
        )

    def _loader(self, dataset: COCOClipDataset, shuffle: bool) -> DataLoader:
        return make_loader(
            dataset,
            self.config.batch_size,
            shuffle=shuffle,
            seed=self.config.seed,
            num_workers=self.config.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    # --- state ---

    def _stateful(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }

    def _state(self) -> dict[str, Any]:
        return {
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "ema": {"step": self.ema.step, "average": self.ema.average},
            "random": random_states(),
            "history": self.history,
            "progress": asdict(self.progress),
            "steps": self.steps,
            "run": run_name(self.config),
            "config": self.config.model_dump(mode="json"),
            "data": self.data,
        }

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        """Put a checkpoint's state into the parts. Raises: LabError if it is another configuration's."""
        if state["run"] != run_name(self.config):
            theirs = Config(**state["config"])
            fields = [f"{n} ({b} there, {a} here)" for n, (a, b) in self.config.differences(theirs).items()]
            raise LabError(
                f"{path} belongs to another configuration: {', '.join(fields)}; set resume to 'never'."
            )
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.ema.step, self.ema.average = state["ema"]["step"], state["ema"]["average"]
        self.history, self.steps = state["history"], state["steps"]
        self.progress = EpochProgress(**state["progress"])
        set_random_states(state["random"])

    def save(self) -> None:
        save_checkpoint(self.folder / "checkpoints", self._state(), self.steps)
        self.saved_at = time.monotonic()

    # --- the run ---

    def run(self, stop: threading.Event, on_epoch: Callable[[pd.DataFrame], None] | None) -> None:
        """Train to the end, or to the first step after `stop` is set."""
        total = self.config.num_epochs * len(self.loader)
        with tqdm(
            total=total, initial=self.steps, desc=self.folder.name, unit="step", disable=not self.show
        ) as bar:
            for epoch in range(len(self.history), self.config.num_epochs):
                try:
                    self._epoch(epoch, stop, bar)
                except Stopped:
                    self.save()
                    bar.write(
                        f"stopped at epoch {epoch + 1}, step {self.progress.step}; run again to continue."
                    )
                    return
                if on_epoch is not None:
                    on_epoch(pd.DataFrame(self.history))
        self._write_training(finished=True)

    def _epoch(self, epoch: int, stop: threading.Event, bar: tqdm) -> None:
        bar.set_description(f"{self.folder.name}, epoch {epoch + 1} of {self.config.num_epochs}")

        def after_step(progress: EpochProgress) -> None:
            self.steps += 1
            if stop.is_set():
                raise Stopped
            if time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes:
                self.save()

        trained = train_epoch(
            self.model,
            self.loader,
            self.criterion,
            self.optimizer,
            self.scheduler,
            epoch,
            self.config,
            ema=self.ema,
            scaler=self.scaler,
            progress=self.progress,
            after_step=after_step,
            bar=bar,
        )
        with self.ema.applied(self.model):
            validated = validate(self.model, self.val_loader, self.criterion, self.config)
            self._keep_best(validated)
        row = {
            "epoch": epoch + 1,
            **trained,
            **{k: v for k, v in validated.items() if isinstance(v, (int, float))},
        }
        self.history.append({name: float(value) for name, value in row.items()})
        self.progress = EpochProgress()
        pd.DataFrame(self.history).to_csv(self.folder / "history.csv", index=False)
        self.save()
        self._write_training(finished=False)

    def _keep_best(self, validated: dict[str, Any]) -> None:
        """Write best.safetensors, and what it is, if no earlier epoch was better."""
        metric = self.config.best_metric
        value = goodness(choose(validated, metric, "best_metric"), metric)
        if math.isnan(value):
            raise LabError(f"best_metric {metric!r} is nan on the validation split; choose another.")
        if value > max((goodness(row[metric], metric) for row in self.history), default=-math.inf):
            weights = {name: tensor.contiguous().cpu() for name, tensor in self.model.state_dict().items()}
            with atomic_path(self.folder / "best.safetensors") as beside:
                save_file(
                    weights, beside, metadata={"run": self.folder.name, "epoch": str(len(self.history) + 1)}
                )

    def _write_training(self, finished: bool) -> None:
        seconds = sum(row["train_seconds"] for row in self.history)
        write_json(
            self.folder / "training.json",
            {
                "finished": finished,
                "epochs": len(self.history),
                "train_seconds": round(seconds, 1),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.device}",
                "torch": torch.__version__,
                "data": self.data,
            },
        )


class Stopped(Exception):  # noqa: N818  a signal, not an error
    """Training was asked to stop; everything is saved."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other process trains in this folder. Raises: LabError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise LabError(f"another process is training {folder}; wait for it, or stop it first.") from error


@contextmanager
def stop_after_step() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C or SIGTERM sets the event instead of raising; a second one raises."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(config: Config, resume: str = "auto") -> None:
    """Train, evaluate on the test splits once, and say where everything lies."""
    run = fit(config, resume=resume)
    if run.finished:
        evaluate_run(run)
        print(f"{run.folder}: config.yaml, history.csv, metrics.json, figures/, best.safetensors")


if __name__ == "__main__":
    run_command(main, __doc__)
