"""Which numbers a model is trained in: by device, and on a CPU by measuring one step of it."""

from __future__ import annotations

import copy
import json
import platform
import time
from typing import Any

import torch

from cache import atomic_path, fingerprint
from checkpoints import random_states, set_random_states
from config import Config
from engine import Engine
from models import CLIPModel, build_loss

WORTH_IT = 0.9  # bf16 must take at most this share of fp32's time
IMAGES = 8  # of pictures; cached features are measured by the whole batch


def choose_precision(config: Config, model: CLIPModel, batch: dict[str, Any]) -> str:
    """fp32, bf16 or fp16: as configured, or what suits the model's device.

    On a CPU the model is measured once and the answer kept in the cache folder, so that a run that is started
    again computes the same.
    """
    device = model.logit_scale.device
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type != "cpu":
        return "fp32"
    path = config.cache_dir / "precision.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    key = _key(config)
    if key not in known:
        known[key] = "bf16" if _bf16_is_faster(config, model, batch) else "fp32"
        with atomic_path(path) as beside:
            beside.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[key]


def _key(config: Config) -> str:
    """What the answer depends on: the machine and everything that shapes the model."""
    fields = [n for n in Config.model_fields if n.startswith(("image_", "text_", "head_", "use_", "embed_"))]
    shape = [f"{name}={config[name]}" for name in fields]
    return fingerprint([platform.node(), platform.processor(), str(torch.get_num_threads()), *shape])[:16]


def _bf16_is_faster(config: Config, model: CLIPModel, batch: dict[str, Any]) -> bool:
    """One step of a copy of the model on a few images, each way the better of two, random states untouched."""
    states = random_states()
    images = len(batch["image_id"])
    if config.image_tower_mode != "cached":
        images = min(IMAGES, images)
    texts = max(images, len(batch["text_id"]) * images // len(batch["image_id"]))
    few = {
        "image": batch["image"][:images],
        "text": batch["text"][:texts],
        "image_id": batch["image_id"][:images],
        "text_id": batch["text_id"][:texts],
    }
    seconds = {"fp32": float("inf"), "bf16": float("inf")}
    for precision in [*seconds, *seconds, *seconds]:
        trial = copy.deepcopy(model).train()
        tried = config.updated(precision=precision)
        engine = Engine(trial, build_loss(tried), torch.optim.SGD(trial.parameters(), lr=0.0), config=tried)
        start = time.perf_counter()
        engine.gradients(few)
        seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    set_random_states(states)
    return seconds["bf16"] < WORTH_IT * seconds["fp32"]
