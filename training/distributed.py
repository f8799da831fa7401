"""Several processes as one: features gathered, gradients summed, files written once.

Started by `accelerate launch train.py ...`, or in a notebook by `train.fit_in_processes`; in a single process, nothing
here has an effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join_group(device: torch.device) -> None:
    """Join the processes that a launcher started with this one, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState  # only where several processes run

        PartialState(cpu=device.type == "cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and measures."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    counted = torch.tensor(float(flag), device=device)
    dist.all_reduce(counted)
    return bool(counted.item())


def gather_rows(rows: Tensor) -> Tensor:
    """Every process's rows, (n, ...) each with its own n, in the order of processes.

    This process's own rows keep their gradient; the others' are constants. With every process holding the
    whole loss, the sum of all processes' gradients is then the whole gradient.
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = int(max(counts))
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows.detach()
    pieces = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(pieces, padded)
    shares = [piece[: int(count)] for piece, count in zip(pieces, counts, strict=True)]
    shares[rank()] = rows
    return torch.cat(shares)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up every process's gradients, in one message."""
    if world_size() == 1:
        return
    learning = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for parameter, summed in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
        parameter.grad = summed.view_as(parameter).clone()
