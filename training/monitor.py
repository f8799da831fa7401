"""What a run tells besides its history: warnings, each given once with what to try; a TensorBoard log; peak memory."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from config import Config, run_name
from core.errors import LabError
from models import MAX_LOGIT_SCALE, CLIPModel

# --- Warnings ---


NEAR_CHANCE = 0.99  # of the loss's chance level
STEPS_BEFORE_TELLING = 50  # warm-up may well take that long, and new encoders start in one place
LEAST_SPREAD = 0.02


class TrainingWarning(UserWarning):
    """Training goes on, but probably not as meant."""


class TrainingMonitor:
    """Looks at a run after each epoch.

    A loss near its chance level says that nothing was learned (open_clip#17 tells of it); a temperature at
    its clamp, that logits want to grow without end; features all in one place, that the model collapsed.
    """

    def __init__(self, config: Config) -> None:
        self.name = run_name(config)
        self.learns_temperature = config.learn_temperature
        self.given: set[str] = set()

    def _warn(self, what: str, advice: str, steps: int) -> None:
        if what not in self.given:
            self.given.add(what)
            # run and step stand where Python would name its file and line, which tell a reader nothing
            warnings.warn_explicit(f"{what}; {advice}", TrainingWarning, self.name, steps)

    def after_epoch(self, model: CLIPModel, loss: float, chance: float, steps: int) -> None:
        """Args: loss and its chance level (nan: none): means over the epoch; steps: taken since the run began."""
        if steps >= STEPS_BEFORE_TELLING and loss > NEAR_CHANCE * chance:
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
        if steps < STEPS_BEFORE_TELLING:
            return
        for kind in ("image", "text"):
            spread = validated.get(f"{kind}_spread", 1.0)
            if spread < LEAST_SPREAD or math.isnan(spread):
                self._warn(
                    f"the {kind} features have collapsed into one place",
                    "lower the learning_rate, or begin with a milder loss (triplet_mining 'mean' or 'semi_hard')",
                    steps,
                )


# --- TensorBoard and memory ---


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


class Board:
    """TensorBoard's log of a run, or nothing.

    Args:
        folder: the run's; None: nothing is written.
        step: what comes after it is written again by a resumed run.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self.writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise LabError(
                    "tensorboard is not installed; pip install tensorboard, or leave the flag."
                ) from error
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def add(self, row: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
