"""Checkpoint files: written whole or not at all, the last two kept, read without executing code."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import atomic_path
from errors import LabError


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
