"""What a run writes beside its history: a TensorBoard log where asked, peak memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from errors import LabError


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
        step: what comes after it is written anew by a resumed run.
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
