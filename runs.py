"""A run's folder: configuration, history, metrics, weights; how it was trained."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compat import get_device

import pandas as pd
from safetensors.torch import load_file

from cache import atomic_path
from config import Config, load_config
from errors import LabError
from models import CLIPModel, build_model


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


def load_start(model: CLIPModel, folder: str | Path) -> None:
    """Start from the best weights of a finished run; a tower that is cached on one side only keeps its own.

    Raises: LabError where a part is of another shape, or the run holds no weights.
    """
    path = Path(folder) / "best.safetensors"
    if not path.is_file():
        raise LabError(f"start_from {folder} holds no best.safetensors; train that run first.")
    theirs, ours = load_file(path), model.state_dict()
    towers = ("image_encoder.", "text_encoder.")
    lacking = [name for name in ours if name not in theirs and not name.startswith(towers)]
    unlike = [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if lacking or unlike:
        first = min([*lacking, *unlike])
        raise LabError(
            f"start_from {folder} does not fit: {first} is missing there or of another shape; "
            "use the same heads and embed_dim."
        )
    model.load_state_dict({name: theirs[name] for name in ours.keys() & theirs.keys()}, strict=False)
