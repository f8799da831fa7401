"""What a run reports besides its history: warnings, each given once with what to try; trackers; peak memory."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from config import Config, run_name
from core.errors import LabError
from models import MAX_LOGIT_SCALE, CLIPModel

# --- Warnings ---


NEAR_CHANCE = 0.99  # of the loss's chance level
STEPS_BEFORE_WARNING = 50  # warm-up may take that long, and features of new encoders are nearly equal
LEAST_SPREAD = 0.02


class TrainingWarning(UserWarning):
    """Training continues, but probably does not work as intended."""


class TrainingMonitor:
    """Checks a run after each epoch.

    A loss at its chance level means that nothing was learned (a case: open_clip#17); a temperature at its clamp, that
    the logits would grow further; nearly equal features, that the model collapsed.
    """

    def __init__(self, config: Config) -> None:
        self.name = run_name(config)
        self.learns_temperature = config.learn_temperature
        self.given: set[str] = set()

    def _warn(self, what: str, advice: str, steps: int) -> None:
        if what not in self.given:
            self.given.add(what)
            # in place of file and line, which would not help a reader
            warnings.warn_explicit(f"{what}; {advice}", TrainingWarning, self.name, steps)

    def after_epoch(self, model: CLIPModel, loss: float, chance: float, steps: int) -> None:
        """Args: loss and its chance level (nan: none): means over the epoch; steps: taken since the run began."""
        if steps >= STEPS_BEFORE_WARNING and loss > NEAR_CHANCE * chance:
            self._warn(
                "the loss stays at its chance level",
                "see whether the model fits 128 images at all (train.py --overfit 128), then try another "
                "learning_rate or a longer warm-up",
                steps,
            )
        if self.learns_temperature and model.logit_scale.item() >= MAX_LOGIT_SCALE - 1e-4:
            self._warn(
                "the temperature is at its clamp of 0.01",
                "the batch is fitted: more dropout or augmentation, fewer epochs, or a fixed temperature",
                steps,
            )

    def after_validation(self, validated: dict[str, float], steps: int) -> None:
        """Args: validated: figures, with `image_spread` and `text_spread` where there are any; steps: as above."""
        if steps < STEPS_BEFORE_WARNING:
            return
        for kind in ("image", "text"):
            spread = validated.get(f"{kind}_spread", 1.0)
            if spread < LEAST_SPREAD or math.isnan(spread):
                self._warn(
                    f"the {kind} features have collapsed into one point",
                    "lower the learning_rate, or start with a milder loss (triplet_mining 'mean' or 'semi_hard')",
                    steps,
                )


# --- Trackers and memory ---


PROJECT = "image-text-lab"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises: LabError if the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise LabError(f"{name} is not installed; run `pip install {name}`, or take it out of trackers.")


def start_trackers(config: Config, folder: Path, step: int) -> list[Any]:
    """The trackers that `config.trackers` names, started; each has `log(values, step)` and `finish()`.

    Args:
        folder: the run's. TensorBoard writes its log to a subfolder, the others where their package says.
        step: the run starts or resumes here; TensorBoard discards what an earlier call logged beyond it.
    """
    if not config.trackers:
        return []
    from accelerate import PartialState, tracking

    PartialState()  # without it accelerate's trackers cannot write their debug messages
    run = folder.name
    makers: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", folder, purge_step=step),
        "wandb": lambda: tracking.WandBTracker(PROJECT, name=run, dir=str(folder)),
        "mlflow": lambda: tracking.MLflowTracker(PROJECT, run_name=run),
        "trackio": lambda: tracking.TrackioTracker(PROJECT, name=run),
    }
    trackers = [makers[name]() for name in config.trackers]
    for tracker in trackers:
        tracker.start()
        if tracker.name != "tensorboard":  # it takes numbers alone
            tracker.store_init_configuration(config.model_dump(mode="json"))
    return trackers


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far: the GPU's by tensors, else the process's resident set; GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
