"""On a disk that is too small a run ends in one sentence; once there is space it ends as on a large disk.

`DISKS` sets how many sizes are tried (`make soak`: 32).
"""

import os
from collections import Counter

import pytest
import torch
from small_data import add_results, write_coco
from small_disk import resize, small_disk

from config import Config, make_config
from core.errors import LabError
from evaluate import evaluate_run, open_search
from train import fit
from utils import Run

DISKS = int(os.environ.get("DISKS", "6"))
WHOLE = 900_000  # bytes that a run, its caches, figures and index take
tried: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("full_disk")
    return make_config(
        "quickstart", data_dir=write_coco(root / "coco", {"train": 16, "val": 6}), cache_dir=root / "cache",
        runs_dir=root / "runs", test_splits=("val",), image_size=32, num_epochs=2, batch_size=8, warmup_steps=1,
        device="cpu", checkpoint_minutes=1e-9, image_tower="vit", image_weights="random", embed_dim=32,
        image_patch_size=16, image_width=16, image_num_layers=1, image_num_heads=2, num_workers=0,
    )  # fmt: skip


def everything(config: Config) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    run: Run = fit(config, show=False)
    metrics = evaluate_run(run, show=False)["val"]
    open_search(run, show=False)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    return weights, {name: value for name, value in metrics.items() if isinstance(value, float)}


@pytest.fixture(scope="module")
def right(made):
    return everything(made)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if "DISKS" in os.environ:
        add_results("full disks", tried)


@pytest.mark.parametrize("number", range(DISKS))
def test_a_full_disk_is_one_sentence_and_then_recovered_from(made, right, tmp_path, number):
    size = 4096 * max(4, int(WHOLE * (number + 0.5) / DISKS) // 4096)
    with small_disk(tmp_path / "disk", size) as disk:
        config = made.updated(runs_dir=disk / "runs", cache_dir=disk / "cache")
        tried["run on a disk that is too small", "tried"] += 1
        with pytest.raises(LabError, match=r"no space left|free some|GB free"):
            everything(config)
        resize(disk, 64_000_000)
        weights, metrics = everything(config)
        assert all(torch.equal(value, right[0][name]) for name, value in weights.items())
        assert metrics == right[1]
        assert not list(disk.rglob("*.tmp"))
        tried["run on a disk that is too small", "survived"] += 1
