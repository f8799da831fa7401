"""One optimiser step with the whole batch's loss, whole or in pieces, alone or among processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from config import Config
from distributed import gather_rows, sum_gradients, world_size
from errors import LabError
from losses import uniform_loss
from models import CLIPModel, batch_norms
from negatives import BatchNegatives
from optimisation import EMA, autocast

Batch = dict[str, Any]
Features = dict[str, Tensor]


class Engine:
    """Takes batches one step at a time.

    The loss is always that of the whole batch, of all processes together. Its gradients with respect to the
    features come first; then they flow through the towers, piece by piece where `micro_batch_size` says so.
    Where memory runs out, the pieces are halved and the same step is taken again.

    With BatchNorm in training mode each piece is normalised by its own statistics, and each process by its
    own: the gradients are then near the whole batch's, not equal; `freeze_batch_norm` makes them equal.

    Args:
        negatives: further rows for the loss.
        ema: running average to update.
        scaler: for fp16.
    Source: two passes, GradCache, Gao et al. 2021.
    """

    def __init__(
        self,
        model: CLIPModel,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None = None,
        config: Config | None = None,
        *,
        negatives: BatchNegatives | None = None,
        ema: EMA | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.criterion = model, criterion
        self.optimizer, self.scheduler = optimizer, scheduler
        self.config = config or Config()
        self.device = model.logit_scale.device
        self.negatives = negatives or BatchNegatives()
        self.ema = ema or EMA(model, 0.0)
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        self.micro_batch_size = self.config.micro_batch_size
        self.uniform_loss = math.nan  # what the last loss would have been with equal logits

    def step(self, batch: Batch) -> Tensor:
        """Learn from a batch on the device. Returns: its loss, (), detached.

        Raises: LabError where a single image does not fit into memory.
        """
        loss = self._gradients_in_memory(batch)
        sum_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        self.ema.update(self.model)
        self.negatives.after_step()
        return loss

    def _gradients_in_memory(self, batch: Batch) -> Tensor:
        """`gradients`, with smaller pieces where memory runs out."""
        state = _random_state(self.device)
        while True:
            try:
                return self.gradients(batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or world_size() > 1:
                    raise
                message = str(error).splitlines()[0]
            self._halve(len(batch["image_id"]), message)  # outside `except`, which holds the failed graph
            _set_random_state(state, self.device)

    def _halve(self, images: int, message: str) -> None:
        size = min(self.micro_batch_size or images, images)
        if size == 1:
            raise LabError(
                f"memory ran out on a single image ({message}); choose a smaller tower or image_size."
            )
        self.micro_batch_size = (size + 1) // 2
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"out of memory: going on with micro_batch_size {self.micro_batch_size}; the batch stays {images}."
        )

    def gradients(self, batch: Batch) -> Tensor:
        """Fill every parameter's `.grad` with the whole batch's gradient. Returns: the loss, (), detached."""
        self.optimizer.zero_grad(set_to_none=True)
        pieces = split_batch(batch, self.micro_batch_size)
        if len(pieces) == 1:
            features = self._forward(batch)
            leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in features.items()}
        else:
            features = {}
            leaves, states = self._first_pass(pieces)
        loss = self._loss(leaves, batch)
        if not any(leaf.requires_grad for leaf in leaves.values()):
            raise LabError("nothing to train: no feature depends on a trainable part; make one trainable.")
        self.scaler.scale(loss).backward()
        grads = {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}
        for name in grads.keys() & {"logit_scale", "logit_bias"}:
            grads[name] = grads[name] / world_size()  # every process holds the whole of it
        if len(pieces) == 1:
            _backward(features, grads)
        else:
            self._second_pass(pieces, states, grads)
        return loss.detach()

    def _forward(self, batch: Batch) -> Features:
        with autocast(self.config, self.device):
            return self.model(batch["image"], batch["text"])

    def _loss(self, leaves: Features, batch: Batch) -> Tensor:
        """The loss over every process's features and the negatives."""
        image_id, text_id = gather_rows(batch["image_id"]), gather_rows(batch["text_id"])
        whole = {k: gather_rows(v) if v.ndim else v for k, v in leaves.items()}
        given = self.negatives.comparisons(whole, image_id, text_id)
        self.uniform_loss = fmean(uniform_loss(some["image_id"], some["text_id"]) for some in given)
        return torch.stack([self.criterion(**some) for some in given]).mean()

    def _first_pass(self, pieces: list[Batch]) -> tuple[Features, list[Tensor]]:
        """Features of all pieces without a graph, and the random state each began with."""
        states, parts = [], []
        with torch.no_grad(), still_batch_norm(self.model):
            for piece in pieces:
                states.append(_random_state(self.device))
                parts.append(self._forward(piece))
        joined = {
            name: torch.cat([part[name] for part in parts]) if first.ndim else first
            for name, first in parts[0].items()
        }
        return {name: rows.detach().clone().requires_grad_() for name, rows in joined.items()}, states

    def _second_pass(self, pieces: list[Batch], states: list[Tensor], grads: Features) -> None:
        """The same pieces with a graph, each given its rows' gradients."""
        starts = {"image_features": 0, "text_features": 0}
        for number, (piece, state) in enumerate(zip(pieces, states, strict=True)):
            _set_random_state(state, self.device)
            features = self._forward(piece)
            share = {}
            for name in starts.keys() & grads.keys():
                share[name] = grads[name][starts[name] : starts[name] + len(features[name])]
                starts[name] += len(features[name])
            if number == 0:  # one temperature for all pieces
                share |= {name: grads[name] for name in grads.keys() & {"logit_scale", "logit_bias"}}
            _backward(features, share)


def _backward(features: Features, grads: Features) -> None:
    names = [name for name in grads if features[name].requires_grad]
    if names:
        torch.autograd.backward([features[n] for n in names], [grads[n].to(features[n]) for n in names])


def split_batch(batch: Batch, size: int | None) -> list[Batch]:
    """Pieces of at most `size` images; the texts are cut into as many pieces of their own."""
    images, texts = len(batch["image_id"]), len(batch["text_id"])
    if size is None or size >= images:
        return [batch]
    count = min(-(-images // size), texts)
    cuts = {
        kind: [n * rows // count for n in range(count + 1)]
        for kind, rows in (("image", images), ("text", texts))
    }
    return [
        {kind: _rows(batch[kind], slice(cuts[kind][n], cuts[kind][n + 1])) for kind in ("image", "text")}
        for n in range(count)
    ]


def _rows(values: Any, rows: slice) -> Any:
    return {k: v[rows] for k, v in values.items()} if isinstance(values, dict) else values[rows]


@contextlib.contextmanager
def still_batch_norm(model: nn.Module) -> Iterator[None]:
    """Within, BatchNorm's running statistics stay: the second pass moves them."""
    norms: list[Any] = [norm for norm in batch_norms(model) if norm.training]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA and MPS have a type for it; the CPU's allocator only words."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
