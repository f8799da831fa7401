"""One optimizer step with the whole batch's loss: in one pass or in pieces, in one process or several."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable, Iterator
from typing import Any

from core.devices import recover_memory

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from config import Config
from core.errors import LabError
from core.ids import match_ids
from losses import loss_chance
from models import CLIPModel, batch_norms
from training.distributed import gather_rows, sum_gradients, world_size
from training.negatives import BatchNegatives
from training.optim import EMA, autocast

Batch = dict[str, Any]
Features = dict[str, Tensor]


MEMORY_ERRORS = (RuntimeError, MemoryError, OSError)


@contextlib.contextmanager
def explained_errors(advice: str = "the same call continues from the last checkpoint") -> Iterator[None]:
    """Within, memory that runs out and BatchNorm over a single row are LabErrors."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise LabError(
            "BatchNorm needs at least two images while it trains, and this batch has one; raise batch_size (of all "
            "processes together), or set use_batch_norm to False or freeze_batch_norm to True."
        ) from error
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        recover_memory(first_line(error))
        raise LabError(
            f"memory ran out ({first_line(error)}); choose a smaller tower, image_size or batch_size, or end other "
            f"programs; {advice}."
        ) from error


class Engine:
    """Takes training steps: those of `utils.train_epoch`, with all that a batch may need beyond them.

    The loss is always that of the whole batch, of all processes together. Its gradients with respect to the
    features are computed first and then passed back through the towers, in pieces of `micro_batch_size` images if it
    is set. If memory runs out, the pieces are halved and the step is repeated.

    Only the towers see pieces; the heads see the whole batch. If BatchNorm is trained in the image tower, each piece
    has at least two images and is normalized by its own statistics: the gradients are then close to the whole batch's,
    not equal; `freeze_batch_norm` makes them equal. Each process normalizes by its own statistics, also in the heads.

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
        self.images = 0  # of the last step, in all processes
        self.chance: Any = math.nan  # the chance level of the last step's loss

    @explained_errors()
    def step(self, batch: Batch) -> Tensor:
        """Train on a batch that is on the device. Returns: its loss, (), detached.

        Raises: LabError if the smallest pieces do not fit into memory, or BatchNorm has a single row to average.
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
        """`gradients`, with smaller pieces if memory runs out."""
        state = _random_state(self.device)
        buffers = [buffer for norm in batch_norms(self.model) if norm.training for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        while True:
            try:
                return self.gradients(batch)
            except MEMORY_ERRORS as error:
                if not is_out_of_memory(error) or world_size() > 1:
                    raise
                message = first_line(error)
            self._halve(len(batch["image_id"]), message)  # outside `except`, which holds the failed graph
            _set_random_state(state, self.device)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def _halve(self, images: int, message: str) -> None:
        size, least = min(self.micro_batch_size or images, images), self._least()
        if size <= least:
            what = (
                "a single image" if least == 1 else "two images, the fewest that BatchNorm takes in training"
            )
            raise LabError(
                f"memory ran out on {what} ({message}); choose a smaller tower, image_size or batch_size."
            )
        self.micro_batch_size = max(least, (size + 1) // 2)
        self.optimizer.zero_grad(set_to_none=True)
        recover_memory(message)
        print(
            f"out of memory: continuing with micro_batch_size {self.micro_batch_size}; the batch stays {images}."
        )

    def _least(self) -> int:
        """The fewest images in a piece: a tower whose BatchNorm trains takes statistics over each piece."""
        norms = [*batch_norms(self.model.image_encoder), *batch_norms(self.model.text_encoder)]
        return 2 if any(norm.training for norm in norms) else 1

    def gradients(self, batch: Batch) -> Tensor:
        """Fill every parameter's `.grad` with the whole batch's gradient. Returns: the loss, (), detached."""
        least = self._least()
        if self.micro_batch_size is not None and self.micro_batch_size < least:
            raise LabError(
                "micro_batch_size 1 leaves the image tower's BatchNorm one image to take statistics over; set it to 2 "
                "or more, or freeze_batch_norm to True."
            )
        self.optimizer.zero_grad(set_to_none=True)
        pieces = split_batch(batch, self.micro_batch_size, least)
        with autocast(self.config, self.device):
            if len(pieces) == 1:
                features = self.model(batch["image"], batch["text"])
            else:
                pooled, states = self._first_pass(pieces)
                features = self.model.project(**pooled)
        leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in features.items()}
        loss = self._loss(leaves, batch)
        if not any(leaf.requires_grad for leaf in leaves.values()):
            raise LabError("nothing to train: no feature depends on a trainable part; make one trainable.")
        self.scaler.scale(loss).backward()
        grads = {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}
        for name in grads.keys() & {"logit_scale", "logit_bias"}:
            grads[name] = grads[name] / world_size()  # every process has the whole gradient
        _backward(features, grads)
        if len(pieces) > 1:
            self._second_pass(pieces, states, {kind: rows.grad for kind, rows in pooled.items()})
        return loss.detach()

    def _loss(self, leaves: Features, batch: Batch) -> Tensor:
        """The loss over every process's features and the negatives."""
        image_id, text_id = map(gather_rows, match_ids(batch))
        self.images = len(image_id)
        whole = {k: gather_rows(v) if v.ndim else v for k, v in leaves.items()}
        given = self.negatives.comparisons(whole, image_id, text_id)
        levels = [
            loss_chance(self.criterion, some["image_id"], some["text_id"], some.get("logit_bias"))
            for some in given
        ]
        self.chance = math.nan if None in levels else sum(levels) / len(levels)
        return torch.stack([self.criterion(**some) for some in given]).mean()

    def _pooling(self, kind: str) -> tuple[Callable[[Any], Tensor], bool]:
        """The function from a piece's images or texts to a head's input, and whether it is trained."""
        model = self.model
        parts = (model.image_encoder, model.image_pooling) if kind == "image" else (model.text_encoder,)
        learns = any(p.requires_grad for part in parts if part is not None for p in part.parameters())
        return (model.pool_image if kind == "image" else model.pool_text), learns

    def _first_pass(self, pieces: list[Batch]) -> tuple[Features, dict[str, list[Tensor]]]:
        """The heads' inputs of all pieces without a graph, and the random state before each piece."""
        pooled: Features = {}
        states: dict[str, list[Tensor]] = {}
        for kind in ("image", "text"):
            pool, learns = self._pooling(kind)
            states[kind], parts = [], []
            with torch.no_grad(), still_batch_norm(self.model):
                for piece in pieces:
                    states[kind].append(_random_state(self.device))
                    parts.append(pool(piece[kind]))
            pooled[kind] = torch.cat(parts).requires_grad_(learns)
        return pooled, states

    def _second_pass(
        self, pieces: list[Batch], states: dict[str, list[Tensor]], grads: dict[str, Tensor | None]
    ) -> None:
        """The same pieces with a graph, and the gradients of their rows passed back."""
        after = _random_state(self.device)
        for kind, whole in grads.items():
            if whole is None:
                continue
            start, (pool, _) = 0, self._pooling(kind)
            for piece, state in zip(pieces, states[kind], strict=True):
                _set_random_state(state, self.device)
                with autocast(self.config, self.device):
                    rows = pool(piece[kind])
                if rows.requires_grad:
                    rows.backward(whole[start : start + len(rows)])
                start += len(rows)
        _set_random_state(after, self.device)


def encode_batch(model: CLIPModel, batch: Batch, config: Config) -> Features:
    """A batch's named features in eval mode, in halves if memory runs out; call it without gradients."""
    images = len(batch["image"])
    try:
        with autocast(config, model.logit_scale.device):
            return model(batch["image"], batch["text"])
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error) or images == 1:
            raise
        message = first_line(error)
    recover_memory(message)
    parts = [encode_batch(model, half, config) for half in split_batch(batch, -(-images // 2))]
    return {
        name: torch.cat([part[name] for part in parts]) if first.ndim else first
        for name, first in parts[0].items()
    }


def _backward(features: Features, grads: Features) -> None:
    names = [name for name in grads if features[name].requires_grad]
    if names:
        torch.autograd.backward([features[n] for n in names], [grads[n].to(features[n]) for n in names])


def split_batch(batch: Batch, size: int | None, least: int = 1) -> list[Batch]:
    """Pieces of at most `size` images; the texts are cut into as many pieces of their own.

    Args: least: a piece has at least so many images, if there are that many, even if that is more than `size`.
    """
    images, texts = len(batch["image"]), _length(batch["text"])
    if size is None or size >= images:
        return [batch]
    count = min(-(-images // size), texts, images // least)
    cuts = {
        kind: [n * rows // count for n in range(count + 1)]
        for kind, rows in (("image", images), ("text", texts))
    }
    return [
        {kind: _rows(batch[kind], slice(cuts[kind][n], cuts[kind][n + 1])) for kind in ("image", "text")}
        for n in range(count)
    ]


def _length(values: Any) -> int:
    return len(next(iter(values.values()))) if isinstance(values, dict) else len(values)


def _rows(values: Any, rows: slice) -> Any:
    return {k: v[rows] for k, v in values.items()} if isinstance(values, dict) else values[rows]


@contextlib.contextmanager
def still_batch_norm(model: nn.Module) -> Iterator[None]:
    """Within, BatchNorm's running statistics do not change; the second pass changes them."""
    norms: list[Any] = [norm for norm in batch_norms(model) if norm.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "bad_alloc",
    "alloc_failed",  # cuBLAS and cuDNN
    "could not create a primitive",  # oneDNN, which gives no cause
)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA, MPS and Python have a type for it; the CPU's allocator and libraries only words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):  # a file that cannot be mapped
        return error.errno == errno.ENOMEM
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
