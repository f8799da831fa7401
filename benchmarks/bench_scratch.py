"""CLIP from scratch at full size: seconds for an epoch of 1,000 pairs, and memory.

`python -m benchmarks scratch [--batch_size N] [--steps N] [--preset NAME]` takes a few steps and scales them.
Published for the same sizes at batch 64, one caption per image: 580 s per epoch on its authors' GPU.
"""

from __future__ import annotations

import argparse
import time

from core.devices import get_device

import pandas as pd
import torch

from config import Config, make_config
from labs.scratch import CAPTION, memory_need
from losses import build_loss
from models import build_model
from training.optim import autocast, build_optimizer

PAIRS = 1000


def measure(config: Config, steps: int) -> dict[str, float]:
    """Seconds an epoch of `PAIRS` would take by the wall and by the processor, after one step to warm up."""
    device = get_device(config.device)
    model = build_model(config).to(device).train()
    optimizer, criterion = build_optimizer(model, config), build_loss(config)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    for step in range(1 + steps):
        if step == 1:
            wall, processor = time.perf_counter(), time.process_time()
        with autocast(config, device):
            features = model(images, [CAPTION] * config.batch_size)
        loss = criterion(**features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
    share = PAIRS / (steps * config.batch_size)
    return {
        "epoch, s": share * (time.perf_counter() - wall),
        "processor, s": share * (time.process_time() - processor),
        "peak GPU memory, GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0,
        "needed by count, GB": memory_need(config.updated(captions_per_image=1))["plain"]["total"],
    }


def main() -> None:
    """Print one row per precision that the device supports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="clip_from_scratch")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, default=3)
    given = vars(parser.parse_args())
    steps = given.pop("steps")
    config = make_config(**{name: value for name, value in given.items() if value is not None})
    precisions = ("fp32", "bf16") if get_device(config.device).type == "cuda" else ("fp32",)
    rows = {name: measure(config.updated(precision=name), steps) for name in precisions}
    print(
        f"{config.preset}, batch {config.batch_size}, epoch of {PAIRS} pairs, {torch.get_num_threads()} threads"
    )
    print(pd.DataFrame(rows).T.round(2).to_string())


if __name__ == "__main__":
    main()
