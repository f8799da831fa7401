"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import core.devices  # noqa: F401  before any test imports torchvision

import pytest
import torch
from small_data import write_coco


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """24 training and 8 validation pictures with three captions each."""
    return write_coco(tmp_path / "coco", {"train": 24, "val": 8})


@pytest.fixture
def float64():
    """New parameters and numbers are float64: two ways to one value then agree to 1e-12, on any CPU."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
