"""The dual encoder, `build_model(config)`, and what a training step of it keeps in memory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import towers
from config import Config
from errors import LabError, choose
from heads import HEADS, AttentionPooling, HeadOptions
from losses import InfoNCELoss, build_loss, even_bias, has_bias
from text_towers import as_text_tower
from tower_parts import full_precision
from transformer import Block

# --- Models ---


__all__ = ["CLIPModel", "InfoNCELoss", "build_loss", "build_model"]

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp, Radford et al. 2021, section 2.5


class CLIPModel(nn.Module):
    """Two towers, two heads, one temperature: `model(image, text)` returns named features.

    Args:
        text_encoder: a text tower with `.width`, or transformers' CLIPTextModel or CLIPTextModelWithProjection.
        image_encoder: an image tower with `.width`; None: ResNet50 with ImageNet weights.
        image_head, text_head: names in HEADS.
        embed_dim: width D of the joint space.
        head_hidden_dim, head_dropout: of the heads.
        head_options: more of both heads; None: what the other arguments say.
        use_batch_norm: BatchNorm after each linear layer of the image head.
        use_attention_pooling: pool the image tower's feature map by learned weights.
        frozen: which of "image", "text", "heads" get no gradients and stay in eval mode.
        freeze_batch_norm: keep the statistics of a trainable image tower's BatchNorm layers.
        temperature, learn_temperature: the softmax temperature at the start, and whether it is trained.
        logit_bias: added to the logits of a sigmoid loss, trained; None: there is none.
    """

    def __init__(
        self,
        text_encoder: Any,
        image_encoder: Any = None,
        *,
        image_head: str = "mlp",
        text_head: str = "identity",
        embed_dim: int = 512,
        head_hidden_dim: int = 1024,
        head_dropout: float = 0.0,
        head_options: HeadOptions | None = None,
        use_batch_norm: bool = False,
        use_attention_pooling: bool = False,
        frozen: tuple[str, ...] = ("text",),
        freeze_batch_norm: bool = False,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder: Any = towers.resnet50() if image_encoder is None else image_encoder
        self.text_encoder: Any = as_text_tower(text_encoder)
        if use_attention_pooling and isinstance(self.image_encoder, towers.CachedTower):
            self.image_encoder.feature_map(torch.empty(0))  # raises the one explanation
        self.image_pooling = AttentionPooling(self.image_encoder.width) if use_attention_pooling else None
        options = head_options or HeadOptions(hidden_dim=head_hidden_dim, dropout=head_dropout)
        make_image_head = choose(HEADS, image_head, "image_head")
        make_text_head = choose(HEADS, text_head, "text_head")
        normed = replace(options, batch_norm=use_batch_norm)
        self.image_head = make_image_head(self.image_encoder.width, embed_dim, normed)
        self.text_head = make_text_head(self.text_encoder.width, embed_dim, options)
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / temperature)), requires_grad=learn_temperature
        )
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.frozen, self.freeze_batch_norm = frozen, freeze_batch_norm
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.held = False
        self.train()

    def _frozen_parts(self) -> list[nn.Module]:
        heads = [part for part in (self.image_head, self.text_head, self.image_pooling) if part is not None]
        parts = {"image": [self.image_encoder], "text": [self.text_encoder], "heads": heads}
        return [part for name in self.frozen for part in parts[name]]

    def train(self, mode: bool = True) -> CLIPModel:
        """As usual, but frozen parts stay in eval mode, so that BatchNorm statistics stay."""
        super().train(mode)
        norms = batch_norms(self.image_encoder) if self.freeze_batch_norm else []
        held = [self.image_encoder, self.text_encoder] if self.held else []
        for part in [*self._frozen_parts(), *norms, *held]:
            part.eval()
        return self

    def hold_towers(self, held: bool) -> None:
        """Keep trainable towers as they are for a while, or let them learn again."""
        if held != self.held:
            self.held = held
            trainable = [p for tower in (self.image_encoder, self.text_encoder) for p in tower.parameters()]
            if held:
                self._let_go = [p for p in trainable if p.requires_grad]
            for parameter in self._let_go:
                parameter.requires_grad_(not held)

    def encode_image(self, image: Tensor) -> Tensor:
        """(I, 3, H, W) images, or (I, width) cached features -> (I, D), L2-normalized."""
        return F.normalize(full_precision(self.image_head(self.pool_image(image))), dim=-1)

    def encode_text(self, text: Tensor | list[str] | dict[str, Tensor]) -> Tensor:
        """Captions, their tokens, or (T, width) cached features -> (T, D), L2-normalized."""
        return F.normalize(full_precision(self.text_head(self.pool_text(text))), dim=-1)

    def pool_image(self, image: Tensor) -> Tensor:
        """The image tower alone, pooled: (I, 3, H, W) -> (I, width)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "image" not in self.frozen):
            if self.image_pooling is None:
                pooled = self.image_encoder(image)  # (I, width)
            else:
                feature_map = self.image_encoder.feature_map(image)  # (I, width, h, w)
        if self.image_pooling is not None:
            pooled = self.image_pooling(feature_map)
        return pooled

    def pool_text(self, text: Tensor | list[str] | dict[str, Tensor]) -> Tensor:
        """The text tower alone: captions or tokens -> (T, width)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" not in self.frozen):
            return self.text_encoder(text)

    def project(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The heads alone: what `pool_image` and `pool_text` gave -> named features, as `forward` returns them."""
        return {
            "image_features": F.normalize(full_precision(self.image_head(image)), dim=-1),
            "text_features": F.normalize(full_precision(self.text_head(text)), dim=-1),
            **self.logit_parts(),
        }

    def attention(self, image: Tensor) -> Tensor:
        """(I, 3, H, W) -> (I, h, w) pooling weights, or what a vision transformer built here looks at.

        Raises: LabError where the model has neither.
        """
        if self.image_pooling is None:
            if hasattr(self.image_encoder, "attention_maps"):
                return self.image_encoder.attention_maps(image)
            raise LabError(
                "this model averages over positions; train with use_attention_pooling to see weights."
            )
        return self.image_pooling.weights(self.image_encoder.feature_map(image))

    def forward(self, image: Tensor, text: Tensor | list[str] | dict[str, Tensor]) -> dict[str, Tensor]:
        """Named features: image_features (I, D), text_features (T, D), logit_scale (), logit_bias () if any."""
        return self.project(self.pool_image(image), self.pool_text(text))

    def logit_parts(self) -> dict[str, Tensor]:
        """logit_scale (), and logit_bias () where the loss wants one."""
        scale = {"logit_scale": self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()}
        return scale if self.logit_bias is None else {**scale, "logit_bias": self.logit_bias}

    @property
    def temperature(self) -> float:
        """1 / exp(logit_scale), at least 0.01."""
        return math.exp(-min(self.logit_scale.item(), MAX_LOGIT_SCALE))

    def parts(self) -> dict[str, nn.Module]:
        """The model's parts by name, for tables and learning rates."""
        parts: dict[str, nn.Module | None] = {
            "image tower": self.image_encoder,
            "attention pooling": self.image_pooling,
            "image head": self.image_head,
            "text tower": self.text_encoder,
            "text head": self.text_head,
        }
        return {name: part for name, part in parts.items() if part is not None}


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Its BatchNorm layers, of any dimension."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def _taken(make: Callable[..., Any], config: Config) -> dict[str, Any]:
    """The fields that a tower's function names after its weights, under their own names."""
    names = list(inspect.signature(make).parameters)[1:]
    return {name: config[name] for name in names if name in Config.model_fields}


def build_image_tower(config: Config) -> nn.Module:
    """The image tower, or what stands for it where its features are cached."""
    make = choose(towers.IMAGE_TOWERS, config.image_tower, "image_tower")
    if config.image_tower_mode == "cached" and config.image_tower != "embeddings":
        return towers.CachedTower(towers.image_width(config.image_tower, config.image_weights))
    tower = make(config.image_weights, **_taken(make, config))
    return towers.freeze_parts(tower, config.image_freeze_layers, config.freeze_projections, "image")


def build_text_tower(config: Config) -> nn.Module:
    """The text tower, or what stands for it where its features are cached."""
    make = choose(towers.TEXT_TOWERS, config.text_tower, "text_tower")
    if config.text_tower_mode == "cached" and config.text_tower != "embeddings":
        return towers.CachedTower(towers.text_width(config.text_tower, config.text_model))
    tower = make(config.text_model, **_taken(make, config))
    return towers.freeze_parts(tower, config.text_freeze_layers, config.freeze_projections, "text")


def _start_temperature(config: Config) -> float:
    """The configured temperature; a pretrained CLIP whose space is kept by heads `identity` brings its own."""
    if config.image_head == config.text_head == "identity":
        own = towers.pretrained_temperature(config.image_tower, config.image_weights)
        return own or config.temperature
    return config.temperature


def build_model(config: Config) -> CLIPModel:
    """The model of a configuration, initialised by its seed."""
    torch.manual_seed(config.seed)
    modes = {"image": config.image_tower_mode, "text": config.text_tower_mode}
    frozen = [name for name, mode in modes.items() if mode == "frozen"]
    bias = even_bias(config.batch_size) if config.logit_bias is None else config.logit_bias
    return CLIPModel(
        build_text_tower(config),
        build_image_tower(config),
        image_head=config.image_head,
        text_head=config.text_head,
        embed_dim=config.embed_dim,
        head_options=HeadOptions(
            hidden_dim=config.head_hidden_dim,
            dropout=config.head_dropout,
            layer_norm=config.use_layer_norm,
            num_heads=config.head_num_heads,
            num_layers=config.head_num_layers,
            num_tokens=config.head_num_tokens,
        ),
        use_batch_norm=config.use_batch_norm,
        use_attention_pooling=config.use_attention_pooling,
        frozen=(*frozen, "heads") if config.freeze_projections else tuple(frozen),
        freeze_batch_norm=config.freeze_batch_norm,
        temperature=_start_temperature(config),
        learn_temperature=config.learn_temperature,
        logit_bias=bias if has_bias(config) else None,
    )


# --- Memory ---


CAPTION = "a man in a red shirt and a black hat rides a brown horse along the beach beside the sea"


def memory_need(config: Config, batch_size: int | None = None) -> pd.DataFrame:
    """GB that a float32 training step of both towers needs, a row a part.

    Activations are those kept for the backward pass, counted for pictures with their captions, each of the
    length of `CAPTION`; what a library allocates beside them, and its fragments, come on top. With
    gradient checkpointing only the blocks' inputs are kept and one block's activations made again.

    Args:
        batch_size: images; None: the configuration's.
    Returns: columns `plain` and `checkpointing`, GB; rows weights, gradients, AdamW, activations, total.
    """
    batch_size = batch_size or config.batch_size
    model = build_model(config.updated(gradient_checkpointing=False)).train()
    two, one = (_kept(model, config, images) for images in (2, 1))
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

    shape = getattr(model.image_encoder, "picture_shape", (config.image_size,) * 2)
    pictures = torch.zeros(images, 3, *shape, dtype=torch.uint8)
    captions = [CAPTION] * images * (config.captions_per_image or 5)
    handles = [part.register_forward_pre_hook(note) for part in model.modules() if isinstance(part, Block)]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(pictures, captions)  # its graph keeps what `kept` counts
    for handle in handles:
        handle.remove()
    assert features["image_features"].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), sum(inputs)
