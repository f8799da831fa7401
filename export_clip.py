"""A CLIP-shaped model as a folder that transformers' CLIPModel loads; heads as the plain layers that libraries know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compat  # noqa: F401

import torch
import transformers
from torch import Tensor, nn

from errors import LabError
from models import CLIPModel
from text_towers import CONTEXT
from towers import ClipVisionTower
from transformer import ACTIVATIONS, Encoder, TextTransformer, VisionTransformer

# --- Heads as plain layers ---


PLAIN = (nn.Linear, nn.LayerNorm, nn.GELU)


def plain_layers(head: nn.Module) -> list[nn.Module]:
    """A head in evaluation as linear layers, LayerNorms and GELUs: no dropout, BatchNorm folded in.

    Raises: LabError if it holds anything else.
    """
    layers: list[nn.Module] = []
    for layer in _leaves(head):
        if isinstance(layer, (nn.Dropout, nn.Identity)):
            continue
        if isinstance(layer, nn.BatchNorm1d) and layers and isinstance(layers[-1], nn.Linear):
            layers[-1] = fold_batch_norm(layers[-1], layer)
        elif isinstance(layer, PLAIN):
            layers.append(layer)
        else:
            raise LabError(
                f"a head with {type(layer).__name__} is no chain of linear layers; heads 'identity', 'linear', "
                "'projection', 'mlp', 'siglip' and 'clip' are."
            )
    return layers


def _leaves(head: nn.Module) -> list[nn.Module]:
    if isinstance(head, nn.Sequential):
        return [leaf for part in head for leaf in _leaves(part)]
    return [head]


@torch.no_grad()
def fold_batch_norm(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """One linear layer that does what `linear` and then `norm` in evaluation do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = 0.0 if linear.bias is None else linear.bias.double()
    folded = nn.Linear(linear.in_features, linear.out_features)
    folded.weight.copy_(gain[:, None] * linear.weight.double())
    folded.bias.copy_(gain * (bias - norm.running_mean.double()) + norm.bias.double())
    return folded


def linear_map(head: nn.Module, width: int) -> Tensor:
    """(D, width): the matrix of a head that is one linear map without bias.

    Raises: LabError if it is not.
    """
    layers = plain_layers(head)
    if not layers:
        return torch.eye(width)
    if len(layers) > 1 or not isinstance(layers[0], nn.Linear) or layers[0].bias is not None:
        raise LabError(
            "CLIP's projections are linear maps without bias; train with heads 'projection' or 'identity'."
        )
    return layers[0].weight.detach().cpu()


# --- CLIPModel ---


def write_clip(model: CLIPModel, image_resize: str, folder: Path) -> Path:
    """Write a model that transformers.CLIPModel, CLIPProcessor and AutoTokenizer load from `folder`.

    Linear heads without bias become CLIP's projections.
    Raises: LabError where a tower or a head is not CLIP's.
    """
    vision, vision_state = vision_half(model)
    text, text_state = text_half(model)
    scale = model.logit_parts()["logit_scale"].log().cpu()
    width = len(vision_state["visual_projection.weight"])  # the halves' own may be another
    config = transformers.CLIPConfig(
        text_config={**text.to_dict(), "projection_dim": width},
        vision_config={**vision.to_dict(), "projection_dim": width},
        projection_dim=width,
        logit_scale_init_value=scale.item(),
    )
    whole = transformers.CLIPModel(config)
    whole.load_state_dict({**vision_state, **text_state, "logit_scale": scale})
    whole.save_pretrained(folder)
    model.text_encoder.tokenizer.save_pretrained(str(folder))
    image_processor(model, vision.image_size, image_resize).save_pretrained(folder)
    return folder


def vision_half(model: CLIPModel) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the image side. Raises: LabError if it is not CLIP's."""
    tower = model.image_encoder
    if model.image_pooling is not None:
        raise LabError("CLIP's image tower reads its class token; this model pools by attention.")
    head = linear_map(model.image_head, tower.width)
    if isinstance(tower, ClipVisionTower):
        state = _cpu(tower.body)
        state["visual_projection.weight"] = head @ state["visual_projection.weight"]
        return tower.body.config, state
    if not isinstance(tower, VisionTransformer):
        raise LabError("transformers' CLIPModel takes image towers 'vit' and 'clip' only.")
    height, across = tower.picture_shape
    if height != across or tower.pooling != "class":
        raise LabError("CLIP's image tower takes square pictures and reads its class token.")
    config = transformers.CLIPVisionConfig(
        **_shape(tower.encoder), image_size=height, patch_size=height // tower.grid[0]
    )
    state = {f"vision_model.{name}": value for name, value in _cpu(tower).items()}
    return config, {**state, "visual_projection.weight": head}


def text_half(model: CLIPModel) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the text side. Raises: LabError if it is not CLIP's."""
    encoder = getattr(model.text_encoder, "encoder", None)
    head = linear_map(model.text_head, model.text_encoder.width)
    if isinstance(encoder, transformers.CLIPTextModelWithProjection):
        state = _cpu(encoder)
        state["text_projection.weight"] = head @ state["text_projection.weight"]
        return encoder.config, state
    if not isinstance(encoder, TextTransformer):
        raise LabError("transformers' CLIPModel takes text towers 'transformer' and 'clip' only.")
    state = {f"text_model.{name}": value for name, value in _cpu(encoder).items()}
    return text_config(encoder), {**state, "text_projection.weight": head}


def text_config(encoder: TextTransformer) -> Any:
    """A text transformer's shape, as transformers writes it."""
    return transformers.CLIPTextConfig(
        **_shape(encoder.encoder),
        vocab_size=encoder.end + 1,
        max_position_embeddings=encoder.context,
        bos_token_id=encoder.end - 1,
        eos_token_id=encoder.end,
        pad_token_id=encoder.end,
    )


def _shape(encoder: Encoder) -> dict[str, Any]:
    block = encoder.layers[0]
    names = {make: name for name, make in ACTIVATIONS.items()}
    return {
        "hidden_size": encoder.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.layers),
        "num_attention_heads": block.self_attn.num_heads,
        "hidden_act": names[type(block.mlp.activation)],
        "layer_norm_eps": block.layer_norm1.eps,
    }


def _cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


def image_processor(model: CLIPModel, size: int, image_resize: str) -> Any:
    """What makes a picture into pixels as this lab does: centre crop, or squashed to the square."""
    crop = image_resize == "crop"
    tower = model.image_encoder
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": size} if crop else {"height": size, "width": size},
        do_center_crop=crop,
        crop_size={"height": size, "width": size},
        image_mean=tower.mean.flatten().tolist(),
        image_std=tower.std.flatten().tolist(),
    )


@torch.no_grad()
def clip_features(folder: Path, pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(I, D) and (T, D) normalised features by transformers alone, of normalised pictures and of captions."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(**tokens).pooler_output
    return nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)
