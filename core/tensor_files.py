"""Tensor files that are checked when they are read: safetensors, torch's archive, NumPy's archive.

The checksum is a CRC-32 of the content (3.7 GB/s on one core, measured; SHA-256 makes 0.8): it detects damage, not
forgery. Older files without a checksum are read too.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.files import SEAL, DamagedFileError, atomic_path, checksum, seal_of, sealed


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors with a checksum in the metadata. Raises: LabError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as beside:
        save_file(dict(tensors), beside, metadata={**metadata, SEAL: _tensors_seal(tensors, metadata)})


def load_tensors(path: str | Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, memory-mapped, and the metadata of a safetensors file; the whole file is read once.

    Args: advice: what to do if the file is damaged, for the message.
    Raises: DamagedFileError; FileNotFoundError.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise DamagedFileError(path, str(error).splitlines()[0], advice) from error
    stated = seal_of(metadata)
    if stated is not None and stated != _tensors_seal(tensors, metadata):
        raise DamagedFileError(path, "its checksum does not match", advice)
    return tensors, metadata


def _tensors_seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    code = checksum(metadata)
    for name in sorted(tensors):
        tensor = tensors[name]
        code = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), code)
        code = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, code)
    return sealed(code)


def save_archive(path: str | Path, content: dict[str, Any]) -> None:
    """`torch.save`, complete or not at all; the archive has a CRC-32 of each of its records."""
    with atomic_path(path) as beside:
        torch.save(content, beside)


def load_archive(path: str | Path, device: torch.device | str, advice: str) -> dict[str, Any]:
    """The content of a file by `save_archive`, without executing pickled code.

    Raises: DamagedFileError if it is damaged or not a dict.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not match")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(path, reason, advice) from error
    if not isinstance(content, dict):
        raise DamagedFileError(path, f"it holds a {type(content).__name__}", advice)
    return content


def load_arrays(path: str | Path, advice: str) -> dict[str, Any]:
    """The arrays of an .npz file, each of which has a CRC-32.

    Raises: DamagedFileError if one does not match; FileNotFoundError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise DamagedFileError(path, str(error) or type(error).__name__, advice) from error


def file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    code = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            code = zlib.crc32(block, code)
    return code
