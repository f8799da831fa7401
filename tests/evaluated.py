"""Small finished runs made by hand, without training, and galleries of made-up features."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from config import Config, make_config, run_name
from core.files import write_json
from core.ids import ImageTextDataset
from models import build_model
from reports.gallery import Gallery
from sources.drawing import write_scenes
from utils import Run, load_run

COUNTS = {"num_train": 8, "num_val": 8, "num_test": 20, "num_novel": 12}


def write_home(root: Path) -> Path:
    """A folder with generated scenes, for `config_of`."""
    write_scenes(root / "scenes", **COUNTS, image_size=48)
    return root


def config_of(home: Path, **settings: Any) -> Config:
    places = dict(data_dir=home / "scenes", cache_dir=home / "cache", runs_dir=home / "runs", device="cpu")
    small = dict(image_tower_mode="cached", image_size=64, num_epochs=2, batch_size=16, embed_dim=32)
    return make_config("quickstart", **{**small, **places, **settings})


def write_run(config: Config, **training: Any) -> Run:
    """A run's folder with a model's first weights and a history of two epochs."""
    folder = config.runs_dir / run_name(config)
    config.save(folder / "config.yaml")
    model = build_model(config)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "best.safetensors")
    history = {
        "epoch": [1, 2],
        "train_loss": [3.0, 2.5],
        "val_loss": [3.1, 2.9],
        "learning_rate": [1e-3, 1e-4],
    }
    recalls = {"i2t_recall@1": [0.1, 0.2], "t2i_recall@1": [0.1, 0.3], "rsum": [20.0, 50.0]}
    pd.DataFrame({**history, **recalls}).to_csv(folder / "history.csv", index=False)
    about = {"images": 8, "captions": 40, "left_out": {}, "sha256": "0"}
    data = {"train": {"splits": "train", **about}, "val": {"splits": "val", **about}}
    told = {"finished": True, "epochs": 2, "train_seconds": 750.0, "machine": "a machine", "data": data}
    write_json(folder / "training.json", {**told, **training})
    return load_run(folder)


def made_gallery(
    num_images: int = 30,
    captions: int = 2,
    *,
    seed: int = 0,
    noise: float = 1.0,
    split: str = "test",
    config: Config | None = None,
    split_source: str = "",
    **dataset: Any,
) -> Gallery:
    """Random features of images and of captions near them, ids from 100 on."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 8, generator=generator)
    texts = images.repeat_interleave(captions, 0)
    texts = texts + noise * torch.randn(texts.shape, generator=generator)
    ids = torch.arange(num_images) + 100
    run: Any = SimpleNamespace(
        config=config or make_config("quickstart"), metrics={}, name="made", model=None,
        weights="made", results=None, own_data=True,
    )  # fmt: skip
    describe = lambda: {"sha256": f"{num_images} {captions}"}  # noqa: E731
    if split_source:
        dataset["table"] = SimpleNamespace(split_source=split_source)
    data: Any = ImageTextDataset()
    vars(data).update(split=split, describe=describe, **dataset)
    normalise = torch.nn.functional.normalize
    return Gallery(run, data, normalise(images), normalise(texts), ids, ids.repeat_interleave(captions))


def argsort_recall(scores: np.ndarray, matches: np.ndarray, k: int) -> float:
    """Recall@k of (Q, G) scores, written out."""
    nearest = np.argsort(-scores, axis=1)[:, :k]
    return float(np.take_along_axis(matches, nearest, axis=1).any(axis=1).mean())
