"""The optimizer, its schedule, the running average of weights, and mixed precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from config import Config
from errors import LabError, choose
from models import CLIPModel


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}
"""Share of the peak learning rate by the share of the run after warm-up, both in [0, 1]."""


def build_optimizer(model: CLIPModel, config: Config) -> torch.optim.AdamW:
    """AdamW; the image tower may have its own rate; norms, biases and the temperature no decay."""
    tower_rate = config.image_tower_learning_rate or config.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = tower_rate if name.startswith("image_encoder.") else config.learning_rate
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise LabError(
            "nothing to train: every part is frozen or cached and has no head; make one trainable."
        )
    rows = [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    return torch.optim.AdamW(rows)


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int) -> LambdaLR:
    """Linear warm-up, then `config.schedule` to the last step; one call of `step` a batch."""
    shape = choose(SCHEDULES, config.schedule, "schedule")
    total = steps_per_epoch * config.num_epochs
    warmup = min(config.warmup_steps, max(1, total // 10))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape((step - warmup) / max(1, total - warmup))

    return LambdaLR(optimizer, share)


class EMA:
    """Running average of a model's trainable weights; `decay` 0 keeps nothing.

    The decay grows from 0.1 as (1 + step) / (10 + step), so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.step = decay, 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.average = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if not self.average:
            return
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        weights = dict(model.named_parameters())
        for name, average in self.average.items():
            average.lerp_(weights[name], 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within, the model holds the averaged weights."""
        weights = {name: p for name, p in model.named_parameters() if name in self.average}
        kept = {name: p.detach().clone() for name, p in weights.items()}
        with torch.no_grad():
            for name, average in self.average.items():
                weights[name].copy_(average)
            try:
                yield
            finally:
                for name, value in kept.items():
                    weights[name].copy_(value)


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision of the forward pass: bf16 where a GPU has it, else fp16; fp32 on a CPU unless asked."""
    precision = config.precision
    if precision == "auto":
        precision = (
            ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if device.type == "cuda" else "fp32"
        )
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
