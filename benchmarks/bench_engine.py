"""The engine compared with a plain loop; each ratio is measured in one run: `python -m benchmarks engine`."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import plain_loop
from benchmarks.bench_lab import FLICKR8K, ROOT
from config import Config, make_config
from core import devices
from dataset import COCOClipDataset, make_loader, open_dataset
from losses import build_loss
from models import build_model
from sources.table import CaptionTable
from train import RunPlan, build_trainer, fit
from training.checkpoints import save_checkpoint
from training.engine import Engine
from training.optim import build_optimizer, build_scheduler
from utils import train_epoch, validate

ROUNDS = 3


def flickr8k(preset: str = "flickr8k", **fields: Any) -> Config | None:
    """Flickr8k with the packaged towers, or None if it is not available."""
    folder = next((folder for folder in FLICKR8K if folder.is_dir()), None)
    return (
        None if folder is None else make_config(preset, data_dir=folder, cache_dir=ROOT / "cache", **fields)
    )


def made_up(images: int, size: int, captions: int = 5) -> COCOClipDataset:
    """Random images in the shape of the image cache; only the loop is timed."""
    ids = np.arange(images)
    table = CaptionTable(
        root=Path(),
        image_ids=ids,
        paths=[f"{n}.jpg" for n in ids],
        splits=np.full(images, "train"),
        captions=[f"caption {k} of {n}" for n in ids for k in range(captions)],
        caption_image_ids=np.repeat(ids, captions),
    )
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    return COCOClipDataset(
        "train", table=table, images=pixels, text_features=torch.randn(images * captions, 384)
    )


def usual_allocator() -> None:
    """What `compat.reuse_freed_memory` changed, as a process has it at its start."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter in (devices.M_MMAP_THRESHOLD, devices.M_TRIM_THRESHOLD, devices.M_TOP_PAD):
            mallopt(parameter, 128 * 1024)


def resnet_speed(images: int = 48, precision: str = "bf16") -> None:
    """ResNet50 at 224 px: images per second through the tower, this lab's loop and the plain loop alternately.

    bf16 is for a CPU with AVX512-BF16 or AMX; on any other give fp32.
    """
    config = make_config(
        image_weights="random",
        text_tower="minilm",
        text_head="linear",
        batch_size=16,
        device="cpu",
        precision=precision,
        cache_dir=ROOT / "cache",
    )
    dataset = made_up(images, 224)
    ours, plain = build_model(config), build_model(config)
    loader = make_loader(dataset, config.batch_size, shuffle=True)
    ours.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(ours, config)
    parts = ours, loader, build_loss(config), optimizer, build_scheduler(optimizer, config, 100)
    ratios, rates = [], []
    for _ in range(ROUNDS):
        devices.reuse_freed_memory.__wrapped__()
        rate = train_epoch(*parts, config=config, show=False)["images_per_second"]
        usual_allocator()
        start, passed = time.perf_counter(), 0
        for count, _ in plain_loop.steps(plain, dataset, config.batch_size, 1e-4):
            passed += count
            if passed >= images:
                break
        rates.append((rate, passed / (time.perf_counter() - start)))
        ratios.append(rates[-1][0] / rates[-1][1])
    ours_rate, plain_rate = (statistics.median(side) for side in zip(*rates, strict=True))
    print(
        f"\nResNet50, 224 px, batch {config.batch_size}, {config.precision}: {ours_rate:.1f} images per second against "
        f"{plain_rate:.1f}: {statistics.median(ratios):.1f}x (target 2), five captions per image against one"
    )


def time_to_recall(config: Config, what: str, plain_epochs: int = 10, plain_rate: float = 1e-3) -> None:
    """Seconds of training until the dev recall (mean of both R@1) that the plain loop reaches in ten epochs."""
    train_set, val_set = (open_dataset(config, splits) for splits in (config.train_splits, config.val_splits))
    model, criterion = build_model(config), build_loss(config)
    val_loader = make_loader(val_set, config.batch_size)
    reached: list[tuple[float, float]] = []

    def look(epoch: int, seconds: float) -> None:
        metrics = validate(model, val_loader, criterion, config)
        reached.append((mean_recall(metrics), seconds))
        print(
            f"  plain loop, epoch {epoch + 1}: {100 * reached[-1][0]:.1f} % after {seconds:.0f} s", flush=True
        )

    plain_loop.train_epochs(model, train_set, 128, plain_rate, plain_epochs, look)
    target, plain_seconds = max(reached)[0], reached[-1][1]
    with tempfile.TemporaryDirectory() as folder:
        history = fit(config.updated(runs_dir=folder), show=False).history
    history["recall"] = (history["i2t_recall@1"] + history["t2i_recall@1"]) / 2
    there = history.index[history["recall"] >= target]
    if not len(there):
        print(
            f"{what}: the plain loop's {100 * target:.1f} % was not reached ({100 * history['recall'].max():.1f} %)"
        )
        return
    ours = history["train_seconds"][: there[0] + 1].sum()
    print(
        f"{what}: {100 * target:.1f} % mean R@1 on dev after {ours:.0f} s (epoch {there[0] + 1}), the plain loop after "
        f"{plain_seconds:.0f} s: {ours / plain_seconds:.3f} of its time (target 0.25)"
    )


def mean_recall(metrics: dict[str, float]) -> float:
    return (metrics["i2t_recall@1"] + metrics["t2i_recall@1"]) / 2


def overhead(config: Config, batches: int = 12) -> None:
    """Overhead of the engine over forward, backward and step, and of one checkpoint per minute."""
    dataset = open_dataset(config, config.train_splits)
    loader = make_loader(dataset, config.batch_size)
    given = [batch for batch, _ in zip(loader, range(batches), strict=False)]
    ours, bare = build_model(config).train(), build_model(config).train()
    criterion = build_loss(config)
    optimizers = [build_optimizer(model, config) for model in (ours, bare)]
    engine = Engine(ours, criterion, optimizers[0], build_scheduler(optimizers[0], config, 100), config)
    ratios = []
    for _ in range(ROUNDS + 1):
        with_engine, without = 0.0, 0.0
        for batch in given:
            start = time.perf_counter()
            engine.step(batch).item()
            middle = time.perf_counter()
            ids = {"image_id": batch["image_id"], "text_id": batch["text_id"]}
            loss = criterion(**bare(batch["image"], batch["text"]), **ids)
            optimizers[1].zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(bare.parameters(), config.max_grad_norm)
            optimizers[1].step()
            with_engine, without = with_engine + middle - start, without + time.perf_counter() - middle
        ratios.append(with_engine / without)
    added = 100 * (statistics.median(ratios[1:]) - 1)
    print(f"engine overhead over forward, backward, clipping and step: {added:+.1f} % (target 3)")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(RunPlan(config.updated(runs_dir=folder), show=False), "never")
        trainer.engine.step(given[0])  # AdamW's moments are most of it
        times = []
        for number in range(ROUNDS):
            start = time.perf_counter()
            path = save_checkpoint(Path(folder) / "checkpoints", trainer._state(), number)
            times.append(time.perf_counter() - start)
        size = path.stat().st_size / 1e6
    seconds = statistics.median(times)
    print(
        f"a checkpoint of {size:.0f} MB takes {seconds:.2f} s: {100 * seconds / 60:.2f} % at one per minute (target 2)"
    )


def main() -> None:
    """ResNet50's speed, overheads, and time to a recall, cached and with a trainable tower."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1500, help="training images of the trainable setting")
    parser.add_argument("--only", choices=("resnet", "overhead", "cached", "trainable"))
    given = parser.parse_args()
    if given.only in (None, "resnet"):
        resnet_speed()
    cached = flickr8k()
    if cached is None:
        print("flickr8k: skipped; run `python dataset.py fetch flickr8k` first")
        return
    if given.only in (None, "overhead"):
        overhead(cached)
    if given.only in (None, "cached"):
        time_to_recall(cached, "Flickr8k, cached")
    if given.only not in (None, "trainable"):
        return
    trainable = flickr8k(
        image_tower_mode="trainable", image_size=112, max_samples=given.images, batch_size=64, num_epochs=10,
        text_head="linear", image_tower_learning_rate=3e-4,
    )  # fmt: skip
    assert trainable is not None
    time_to_recall(trainable, f"Flickr8k, tower trained at 112 px on {given.images} images")


if __name__ == "__main__":
    main()
