"""Differences between machines: torchvision's operators, the device, the memory allocator; a model run in batches."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import core.threads  # noqa: F401  read when torch is imported

import torch
from torch import Tensor

from core.errors import LabError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def _define_missing_vision_ops() -> list[torch.library.Library]:
    """Declare the operators torchvision registers at import, where its C++ library cannot load.

    With a CPU-only torch, torchvision's Linux wheel finds no CUDA libraries and its import fails on
    `torchvision::nms`. Schemas are enough for models, transforms and datasets, not for `torchvision.ops.nms` and
    `torchvision.io`.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.version.cuda is not None:
        return []
    try:
        for folder in spec.submodule_search_locations or []:
            for name in os.listdir(folder):
                if name.startswith("_C") and name.endswith((".so", ".pyd")):
                    torch.ops.load_library(os.path.join(folder, name))
                    return []
    except OSError:
        pass
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


_VISION_OPS = _define_missing_vision_ops()  # a reference: deleting a Library removes its operators


def get_device(name: str = "auto") -> torch.device:
    """The device to run on: `name`, or with "auto" CUDA, else Apple's MPS, else the CPU.

    Raises: LabError if the named device cannot be used.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LabError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); set device to 'auto'"
        ) from error
    return device


@functools.cache
def reuse_freed_memory() -> None:
    """Let this process keep freed memory, on Linux with glibc; elsewhere nothing happens.

    By default the kernel maps, zeroes and unmaps every large activation, which takes a quarter of a training step of
    a small convolutional network.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_TOP_PAD, 1 << 26)


def recover_memory(message: str) -> None:
    """After an out-of-memory error: return freed memory to the system.

    oneDNN's code generator stays broken in a thread in which it ran out of memory, so it is switched off then.
    """
    if "primitive" in message and torch.backends.mkldnn.enabled:
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        print("oneDNN ran out of memory: continuing without it, which is slower.")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


def full_precision(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@torch.inference_mode()
def encode_in_batches(
    encode: Callable[[Any], Tensor], batches: Iterable[Any], device: torch.device
) -> Tensor:
    """(N, D) float32 features of batches of inputs, tensors or lists of texts, on the CPU."""
    parts = (encode(batch.to(device) if isinstance(batch, Tensor) else batch) for batch in batches)
    return torch.cat([part.float().cpu() for part in parts])
