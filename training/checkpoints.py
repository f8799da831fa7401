"""Checkpoints, locks, interrupts that save before they end, and the files of a run."""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import core.devices  # noqa: F401  before torchvision

import numpy as np
import pandas as pd
import torch
from filelock import Timeout
from torch import Tensor

from config import NOT_IN_NAME, Config
from core.errors import LabError
from core.files import DamagedFileError, atomic_path, locked, read_json, sweep
from core.tensor_files import load_archive, load_tensors, save_archive
from towers.image import IMAGE_MODELS

# --- Checkpoints ---


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

    Raises: LabError if the disk is full; earlier checkpoints remain.
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
    _refuse_old_names(state["model"], path)
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


# --- One process per run; Ctrl-C finishes the step ---


@contextmanager
def exclusive_lock(folder: Path, checkpoints: Path) -> Iterator[None]:
    """Within, no other process trains in this folder; what killed ones left there and beside checkpoints is removed.

    Raises: LabError if another process trains there.
    """
    try:
        with locked(folder / ".lock", timeout=0):
            sweep(folder)
            sweep(checkpoints)
            yield
    except Timeout as error:
        raise LabError(f"another process is training {folder}; wait for it, or stop it first.") from error


@contextmanager
def evaluation_lock(folder: Path) -> Iterator[None]:
    """Within, no other process evaluates this run or deletes it to start over; one that does is waited for."""
    if not (folder / "config.yaml").is_file():
        yield  # not a run, or one that has just been deleted: opening it says so
        return
    waiting = f"another process is evaluating {folder}; waiting for it."
    with locked(folder / ".evaluation.lock", waiting=waiting):
        yield


@contextmanager
def stop_after_step() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C or SIGTERM sets the event instead of raising; a second one raises.

    A SIGTERM is sent again on leaving: it asks the process to end, not only the run.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signal.SIGTERM in received:
            os.kill(os.getpid(), signal.SIGTERM)


# --- Runs ---


MEASURED = {"protocol", "gallery", "num_images", "num_texts"}
"""What the metrics of every split hold."""


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
        missing = ", ".join(metrics.keys() - whole.keys())
        print(f"{path} lacks figures of {missing}; they are measured again.")
    return whole


def read_history(path: Path) -> pd.DataFrame:
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


def write_trained_on(folder: Path, images: np.ndarray, start: Path | None) -> None:
    """Record which images a run's weights have seen: its own, by their digests, and those of its start."""
    earlier = None if start is None else read_trained_on(start)
    seen = images if earlier is None else np.concatenate([images, earlier])
    with atomic_path(folder / "trained_on.npy") as beside, open(beside, "wb") as file:
        np.save(file, np.unique(seen))


def read_trained_on(folder: Path) -> np.ndarray | None:
    """(N,) uint64 digests of the images that a run's weights have seen; None if there is no record of them."""
    path = folder / "trained_on.npy"
    if not path.is_file():
        return None
    try:
        return np.load(path, allow_pickle=False).astype("<u8")
    except (OSError, ValueError, EOFError) as error:
        raise LabError(f"{path} is damaged ({error}); train that run again.") from error


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """A run's weights by name. Raises: DamagedFileError; LabError if they are not there."""
    advice = "restore a copy of it, or train the run again with resume='never' (--resume never)"
    try:
        weights = load_tensors(path, advice)[0]
    except FileNotFoundError as error:
        raise LabError(f"{path} does not exist; train the run first.") from error
    _refuse_old_names(weights, path)
    return weights


def load_any_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name of a .safetensors file, or of a file of `torch.save`, alone or in a checkpoint.

    Raises: LabError if there are none; no code in the file is executed.
    """
    if path.suffix == ".safetensors":
        return load_weights_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise LabError(f"{path} is no file of weights: {str(error).splitlines()[0]}.") from error
    for name in ("model", "model_state_dict", "state_dict"):
        content = content.get(name, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise LabError(f"{path} holds no weights by name; save model.state_dict().")
    return content


def _refuse_old_names(weights: Any, path: str | Path) -> None:
    """Raises: LabError if an EfficientNet-Lite0 has the layer names of the package that was used before timm."""
    if any(".net._blocks." in name for name in weights):
        raise LabError(
            f"{path} holds an EfficientNet-Lite0 with the layer names of an earlier version of this lab; "
            "train the run again with resume='never' (--resume never)."
        )
