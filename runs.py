"""A run's folder: configuration, history, weights, checkpoints; one process a run, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compat import get_device

import numpy as np
import pandas as pd
import torch
from filelock import Timeout
from torch import Tensor

from config import NOT_IN_NAME, Config, load_config
from errors import LabError
from files import DamagedFileError, file_digest, locked, read_json, sweep
from image_towers import IMAGE_MODELS
from metrics import direction
from models import CLIPModel, build_model
from tensor_files import load_archive, load_tensors, save_archive

# --- Checkpoint files: whole or not at all, the last two kept, read without executing code ---


STATE = {"model", "optimizer", "scheduler", "random", "history", "progress", "steps", "run", "config", "data"}
"""What every checkpoint holds."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(seed)


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
    save_archive(path, state)
    for old in sorted(folder.glob("step_*.pt"))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's content, without executing pickled code.

    Raises: DamagedFileError if it is damaged or no checkpoint.
    """
    advice = "give a file step_*.pt of a run's checkpoints"
    state = load_archive(path, device, advice)
    if absent := STATE - state.keys():
        raise DamagedFileError(path, f"it has no {min(absent)!r}", advice)
    return state


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder, or None."""
    return max(Path(folder).glob("step_*.pt"), default=None)


def load_last_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint that can be read; damaged ones are deleted with a sentence. None if there is none."""
    while path := last_checkpoint(folder):
        try:
            return load_checkpoint(path, device)
        except DamagedFileError as damaged:
            path.unlink()
            before = last_checkpoint(folder)
            resumed = f"training resumes from {before.name}" if before else "training starts again"
            print(f"{str(damaged).split(');')[0]}); it is deleted and {resumed}.")
    return None


# --- One process a run; Ctrl-C finishes the step ---


class Stopped(Exception):  # noqa: N818  a signal, not an error
    """Training was asked to stop; everything is saved."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other process trains in this folder. Raises: LabError if one does."""
    try:
        with locked(folder / ".lock", timeout=0):
            sweep(folder)
            yield
    except Timeout as error:
        raise LabError(f"another process is training {folder}; wait for it, or stop it first.") from error


@contextmanager
def stop_after_step() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C or SIGTERM sets the event instead of raising; a second one raises.

    A SIGTERM is given again on leaving: it asks the process to end, not only the run.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signal.SIGTERM in asked:
            os.kill(os.getpid(), signal.SIGTERM)


# --- Runs ---


MEASURED = {"protocol", "gallery", "num_images", "num_texts"}
"""What the metrics of every split hold."""


def goodness(value: Any, metric: str) -> Any:
    """A figure such that higher is better. Raises: LabError if the metric has no direction."""
    return direction(metric) * value


@dataclass
class Run:
    """A run's folder: configuration, history, metrics, weights.

    Args:
        folder: where it lies.
        config: with `runs_dir` and the other places as they were given to `load_run`, else as saved.
        history: a row an epoch.
        metrics: split -> metrics, once evaluated; `gallery.measured` says whether they are still true.
        training: how it was trained: data, seconds, machine, versions, files left out.
        own_data: whether `data_dir` is the folder that the run was trained on.
        results: folder of figures, tables and indexes; another than `folder` where they are of other data.
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
        """Whether training came to its end."""
        return bool(self.training.get("finished"))

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, whose weights are kept."""
        metric = self.config.best_metric
        if metric not in self.history:
            raise LabError(f"{self.folder} has no history of {metric}; train the run to the end first.")
        return int(self.history["epoch"].iloc[goodness(self.history[metric], metric).argmax()])

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256 of the best epoch's weights. Raises: LabError if there are none yet."""
        path = self.folder / "best.safetensors"
        if not path.is_file():
            raise LabError(
                f"{self.folder} holds no best.safetensors: the run has not finished an epoch; train it first."
            )
        return file_digest(path)

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
        return model.to(get_device(self.config.device)).eval()


def own_image_weights(config: Config) -> str:
    """`image_weights` for a model whose state a run's file fills: a weights file need not be there any more.

    A model by hub name or folder keeps its name, which says how it is built.
    """
    weights = config.image_weights
    return "random" if weights == "pretrained" or config.image_tower not in IMAGE_MODELS else weights


def reopened(config: Config) -> dict[str, Any]:
    """What a call's configuration says of a run that is trained already: all that is no part of its name.

    The precision stays the one that it was trained in.
    """
    return {name: config[name] for name in sorted(NOT_IN_NAME - {"preset", "seed", "precision"})}


def load_run(folder: str | Path, **places: Any) -> Run:
    """Open a run's folder.

    Args:
        places: configuration fields that are no part of the run's name, such as data_dir, device or recall_ks.
    Raises: LabError if the folder is missing or is not a run's.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        hint = f"; runs beside it: {', '.join(known)}" if known else ""
        raise LabError(f"{folder} is not a run's folder (no config.yaml){hint}.")
    saved = load_config(folder / "config.yaml")
    config = saved.updated(**places)
    training = read_kept(folder / "training.json", "the run counts as unfinished")
    if training and not isinstance(training.get("data"), dict):
        print(f"{folder / 'training.json'} has no 'data'; the run counts as unfinished.")
        training = {}
    history = training.pop("history", None)
    return Run(
        folder=folder,
        config=config,
        own_data=config.data_dir.resolve() == saved.data_dir.resolve(),
        history=_read_history(folder / "history.csv") if history is None else pd.DataFrame(history),
        metrics=read_metrics(folder / "metrics.json"),
        training=training,
    )


def read_kept(path: Path, consequence: str) -> dict[str, Any]:
    """A JSON file of a run; a damaged one counts as absent, which is printed with its consequence."""
    try:
        return read_json(path)
    except DamagedFileError as damaged:
        if consequence:
            print(f"{str(damaged).rpartition(';')[0]}; {consequence}.")
        return {}


def read_metrics(path: Path, *, show: bool = True) -> dict[str, dict[str, Any]]:
    """Metrics by split, without those that lack what every table shows; `show` prints which."""
    metrics = read_kept(path, "it is measured again" if show else "")
    whole = {split: of for split, of in metrics.items() if isinstance(of, dict) and of.keys() >= MEASURED}
    if show and len(whole) < len(metrics):
        lacking = ", ".join(metrics.keys() - whole.keys())
        print(f"{path} lacks figures of {lacking}; they are measured again.")
    return whole


def _read_history(path: Path) -> pd.DataFrame:
    """history.csv, which a person may have edited; nothing of it where it is not a table of numbers."""
    try:
        history = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        print(f"{path} cannot be read ({str(error).splitlines()[0]}); it is left out.")
        return pd.DataFrame()
    if "epoch" not in history or not all(pd.api.types.is_numeric_dtype(kind) for kind in history.dtypes):
        if len(history.columns):
            print(f"{path} is not a table of numbers with a column 'epoch'; it is left out.")
        return pd.DataFrame()
    return history


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """A run's weights by name. Raises: DamagedFileError."""
    advice = "restore a copy of it, or train the run again with resume='never' (--resume never)"
    return load_tensors(path, advice)[0]


def load_start(model: CLIPModel, folder: str | Path) -> None:
    """Start from the best weights of a finished run; a tower that is cached on one side only keeps its own.

    A `logit_bias` that the run has not, for it was trained by another loss, starts as configured.

    Raises: LabError where a part is of another shape, or the run holds no weights.
    """
    path = Path(folder) / "best.safetensors"
    if not path.is_file():
        raise LabError(f"start_from {folder} holds no best.safetensors; train that run first.")
    theirs, ours = load_weights_file(path), model.state_dict()
    own = ("image_encoder.", "text_encoder.", "logit_bias")
    lacking = [name for name in ours if name not in theirs and not name.startswith(own)]
    unlike = [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if lacking or unlike:
        first = min([*lacking, *unlike])
        raise LabError(
            f"start_from {folder} does not fit: {first} is missing there or of another shape; "
            "use the same heads and embed_dim."
        )
    model.load_state_dict({name: theirs[name] for name in ours.keys() & theirs.keys()}, strict=False)
