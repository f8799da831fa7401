"""The dual encoder, `build_model(config)`, and what a training step of it keeps in memory."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from config import Config
from models import CLIPModel, build_model
from towers.transformer import Block

# --- Memory ---


CAPTION = "a man in a red shirt and a black hat rides a brown horse along the beach beside the sea"


def memory_need(config: Config, batch_size: int | None = None) -> pd.DataFrame:
    """GB that a float32 training step of the towers and heads needs, one row per part.

    Activations are those kept for the backward pass, counted for images with their captions, each of the
    length of `CAPTION`; what a library allocates in addition, and fragmentation, are not included. With
    gradient checkpointing only the blocks' inputs are kept, and one block's activations are computed again.

    Args:
        batch_size: images; None: the configuration's.
    Returns: columns `plain` and `checkpointing`, GB; rows weights, gradients, AdamW, activations, total.
    """
    batch_size = batch_size or config.batch_size
    model = build_model(config.updated(gradient_checkpointing=False)).train()
    two, one = (_kept(model, config, images) for images in (3, 2))
    kept, inputs = batch_size * (two[0] - one[0]), batch_size * (two[1] - one[1])
    blocks = sum(isinstance(part, Block) for part in model.modules())
    weights = sum(p.nbytes for p in model.parameters())
    learned = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    again = inputs + kept // blocks if blocks else kept
    shared = {"weights": weights, "gradients": learned, "AdamW": 2 * learned}
    table = {
        "plain": {**shared, "activations": kept},
        "checkpointing": {**shared, "activations": min(kept, again)},
    }
    gigabytes = pd.DataFrame(table) / 1e9
    gigabytes.loc["total"] = gigabytes.sum()
    return gigabytes


def _kept(model: CLIPModel, config: Config, images: int) -> tuple[int, int]:
    """Bytes of tensors kept for the backward pass, weights apart, and of the blocks' inputs."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}
    inputs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor  # held, so that no place is used twice
        return tensor

    def note(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0].nbytes)

    shape = getattr(model.image_encoder, "image_shape", (config.image_size,) * 2)
    pixels = torch.zeros(images, 3, *shape, dtype=torch.uint8)
    captions: Any = [CAPTION] * images * (config.captions_per_image or 5)
    if config.text_tower_mode == "cached":
        captions = torch.zeros(len(captions), model.text_encoder.width)
    if config.image_tower_mode == "cached":
        pixels = torch.zeros(images, model.image_encoder.width)
    handles = [part.register_forward_pre_hook(note) for part in model.modules() if isinstance(part, Block)]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(pixels, captions)  # its graph keeps what `kept` counts
    for handle in handles:
        handle.remove()
    assert features["image_features"].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), sum(inputs)
