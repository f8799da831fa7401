"""The optimizer, its schedule, mixed precision, the running average of weights, and mixtures of them (WiSE-FT)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from config import Config
from core.errors import LabError, choose
from models import CLIPModel

# --- Optimizer, schedule, average, precision ---


CYCLES = 3
SCHEDULES: dict[str, str | None] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "step": None,  # a tenth of the rate in each of CYCLES equal parts
    "restarts": "cosine_with_restarts",  # CYCLES of them
}
"""`config.schedule` -> what `transformers.get_scheduler` calls it, or None where it has no such schedule."""


def build_optimizer(model: CLIPModel, config: Config) -> torch.optim.AdamW:
    """AdamW, fused where there is such a kernel; towers may have their own rates; see `_rate` and `_decay`."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = _rate(name, config), config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise LabError(
            "nothing to train: every part is frozen or cached and has no head; make one trainable."
        )
    rows = [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    fused = all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for ps in groups.values() for p in ps
    )
    return torch.optim.AdamW(rows, fused=fused)


def _rate(name: str, config: Config) -> float:
    """A parameter's peak learning rate: a tower's own, but that of heads for a tower's projection."""
    rates = {
        "image_encoder.": config.image_tower_learning_rate,
        "text_encoder.": config.text_tower_learning_rate,
    }
    own = [rate for part, rate in rates.items() if name.startswith(part) and "projection" not in name]
    return own[0] if own and own[0] is not None else config.learning_rate


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int) -> LambdaLR:
    """Linear warm-up, then `config.schedule` to the last step; one call of `step` per batch.

    The warm-up starts at 1 / warmup of the peak rate; that of `get_scheduler` has a first step with rate 0.
    """
    from transformers import get_scheduler

    total = steps_per_epoch * config.num_epochs
    warmup = min(config.warmup_steps, max(1, total // 10))
    if config.warmup_epochs is not None:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    rest, name = max(1, total - warmup), choose(SCHEDULES, config.schedule, "schedule")
    if name is None:
        shape: Callable[[int], float] = lambda step: 0.1 ** min(int(step / rest * CYCLES), CYCLES - 1)  # noqa: E731
    else:
        options = {"num_cycles": CYCLES} if config.schedule == "restarts" else None
        shape = get_scheduler(name, optimizer, 0, rest, options).lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: (step + 1) / warmup if step < warmup else shape(step - warmup))


class EMA:
    """Running average of a model's trainable weights and floating-point buffers; `decay` 0 is off.

    The decay grows from 0.1 as (1 + step) / (10 + step), so that the random start soon has no weight.
    BatchNorm's statistics are averaged with the weights: averaged weights give other activations than the model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.step = decay, 0
        values = self._values(model) if decay else {}
        self.average = {name: value.detach().clone() for name, value in values.items()}

    @staticmethod
    def _values(model: nn.Module) -> dict[str, Tensor]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return trained | {name: b for name, b in model.named_buffers() if b.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if not self.average:
            return
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        values = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, average in self.average.items():
            average.lerp_(values[name], 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        values = dict(model.named_parameters()) | dict(model.named_buffers())
        own = {name: values[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, average in self.average.items():
                values[name].copy_(average)
            try:
                yield
            finally:
                for name, value in own.items():
                    values[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Raises: LabError if it lacks something that is averaged here."""
        missing = self.average.keys() - state["average"].keys()
        if missing:
            raise LabError(
                f"the checkpoint's average of weights lacks {min(missing)!r}: it was written before BatchNorm's "
                "statistics were averaged; set resume to 'never'."
            )
        self.step, self.average = state["step"], state["average"]


def choose_precision(config: Config, device: torch.device) -> str:
    """fp32, bf16 or fp16: as configured; `auto` follows from the device alone, never from a measurement."""
    if config.precision != "auto":
        return config.precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision of the forward pass."""
    precision = choose_precision(config, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


# --- Mixtures of starting and fine-tuned weights, chosen on validation ---


SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(11))


def mixture(start: dict[str, Tensor], best: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) of the start and `share` of the best; whole numbers, such as counters, are the best's."""
    return {
        name: torch.lerp(start[name].to(value), value, share) if value.is_floating_point() else value
        for name, value in best.items()
    }


def mix_weights(
    model: nn.Module,
    start: dict[str, Tensor],
    best: dict[str, Tensor],
    score: Callable[[], float],
) -> tuple[float, pd.DataFrame]:
    """Load the mixture of two sets of weights that scores best; of equal ones that nearest the start.

    Args:
        model: the mixtures are loaded into it; it holds the best one afterwards.
        start, best: state dictionaries of this model.
        score: the model's score on validation data; higher is better.
    Returns: the share of `best` in the mixture, and a table of `share` and `score`.
    Raises: LabError if a score is nan.
    Source: Wortsman et al. 2022, section 3, with the share chosen on validation.
    """
    rows: list[dict[str, float]] = []
    for share in tqdm(SHARES, desc="mixing weights", unit="mixture", delay=2, leave=False):
        model.load_state_dict(mixture(start, best, share))
        rows.append({"share": share, "score": score()})
        if math.isnan(rows[-1]["score"]):
            raise LabError(f"the mixture with share {share} scores nan; choose another best_metric.")
    table = pd.DataFrame(rows)
    winner = float(table["share"].iloc[table["score"].argmax()])
    model.load_state_dict(mixture(start, best, winner))
    return winner, table
