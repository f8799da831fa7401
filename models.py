"""The model: projection heads and pooling, chosen by name, and the two towers with one temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from core.devices import full_precision

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from core.errors import LabError, choose
from losses import even_bias, has_bias
from towers.base import CachedTower
from towers.image import build_image_tower, pretrained_temperature, resnet50
from towers.text import as_text_tower, build_text_tower
from towers.transformer import VisionTransformer


@dataclass(frozen=True)
class HeadOptions:
    """Options of the heads; each head reads those that concern it.

    Args:
        hidden_dim: width of the hidden layer; of all tokens of `attention` together.
        dropout: probability.
        batch_norm: BatchNorm after each linear layer (`mlp` and `linear` only).
        layer_norm: LayerNorm at the end (`mlp` only).
        num_heads, num_layers, num_tokens: of `attention`.
    """

    hidden_dim: int = 1024
    dropout: float = 0.0
    batch_norm: bool = False
    layer_norm: bool = False
    num_heads: int = 8
    num_layers: int = 2
    num_tokens: int = 8


def mlp_head(width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """Linear, GELU, dropout, linear; BatchNorm after each linear layer, or LayerNorm at the end, if asked for."""
    hidden = options.hidden_dim
    return nn.Sequential(
        nn.Linear(width, hidden),
        *([nn.BatchNorm1d(hidden)] if options.batch_norm else []),
        nn.GELU(),
        nn.Dropout(options.dropout),
        nn.Linear(hidden, embed_dim),
        *([nn.BatchNorm1d(embed_dim)] if options.batch_norm else []),
        *([nn.LayerNorm(embed_dim)] if options.layer_norm else []),
    )


def linear_head(width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """Dropout and one linear layer, followed by BatchNorm if asked for."""
    norm = [nn.BatchNorm1d(embed_dim)] if options.batch_norm else []
    return nn.Sequential(nn.Dropout(options.dropout), nn.Linear(width, embed_dim), *norm)


def standardised_head(width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """Standardizes each feature over the batch (mean 0, deviation 1), then one linear layer.

    Captions made from one template have nearly equal embeddings (a cosine of 0.99 between two that differ in the order
    of two words): what distinguishes them is small beside what they share.
    """
    return nn.Sequential(
        nn.BatchNorm1d(width, affine=False), nn.Dropout(options.dropout), nn.Linear(width, embed_dim)
    )


def identity_head(width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """The tower's space is the joint space. Raises: LabError if their widths differ."""
    if width != embed_dim:
        raise LabError(
            f"head 'identity' keeps the tower's {width} numbers but embed_dim is {embed_dim}; "
            f"set embed_dim to {width} or the head to 'linear'."
        )
    return nn.Identity()


def projection_head(width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """Dropout and one linear layer without bias, as in CLIP.

    Source: Radford et al. 2021, figure 3; initialized as in openai/CLIP model.py.
    """
    layer = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return nn.Sequential(nn.Dropout(options.dropout), layer)


def siglip_head(width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """LayerNorm, dropout, and one linear layer without bias."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Dropout(options.dropout), nn.Linear(width, embed_dim, bias=False)
    )


def clip_head(width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """LayerNorm, then an MLP without a last bias, for a temperature that is trained.

    CLIP's towers end in a LayerNorm and a linear projection without bias; frozen features cannot adapt to
    that projection, so an MLP takes its place. Source: Radford et al. 2021, section 2.4.
    """
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, options.hidden_dim),
        nn.GELU(),
        nn.Dropout(options.dropout),
        nn.Linear(options.hidden_dim, embed_dim, bias=False),
    )


class AttentionHead(nn.Module):
    """Multi-head self-attention over tokens that the embedding is split into, then one linear layer.

    Attention over a single vector is only a linear map: its one softmax weight is always 1. So a linear layer
    maps the embedding to `hidden_dim` numbers, which are split into `num_tokens` tokens with learned
    positions; they pass through transformer layers (LayerNorm first, an MLP of four times the token's width), are
    joined, and projected. Tokens share the width, so a layer costs about as much as an MLP's.

    Raises: LabError if `hidden_dim` is not a multiple of tokens times heads.
    """

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        super().__init__()
        self.num_tokens, parts = options.num_tokens, options.num_tokens * options.num_heads
        if options.hidden_dim % parts:
            raise LabError(
                f"head 'attention' splits head_hidden_dim {options.hidden_dim} into {options.num_tokens} tokens "
                f"of {options.num_heads} heads; make it a multiple of {parts}."
            )
        token_width = options.hidden_dim // options.num_tokens
        self.split = nn.Linear(width, options.hidden_dim)
        self.positions = nn.Parameter(torch.randn(self.num_tokens, token_width) * token_width**-0.5)
        layers = [
            nn.TransformerEncoderLayer(
                token_width,
                options.num_heads,
                dim_feedforward=4 * token_width,
                dropout=options.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(options.num_layers)
        ]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(options.hidden_dim)
        self.project = nn.Linear(options.hidden_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, embed_dim)."""
        tokens = self.split(features).unflatten(1, (self.num_tokens, -1)) + self.positions  # (B, N, w)
        return self.project(self.norm(self.layers(tokens).flatten(1)))


HEADS: dict[str, Callable[[int, int, HeadOptions], nn.Module]] = {
    "mlp": mlp_head,
    "linear": linear_head,
    "standardised": standardised_head,
    "identity": identity_head,
    "projection": projection_head,
    "siglip": siglip_head,
    "clip": clip_head,
    "attention": AttentionHead,
}
NO_BATCH_NORM = ("standardised", "identity", "projection", "siglip", "clip", "attention")


def build_head(field: str, name: str, width: int, embed_dim: int, options: HeadOptions) -> nn.Module:
    """The head of a name in HEADS. Raises: LabError if it does not exist, or has no BatchNorm that is asked for."""
    make = choose(HEADS, name, field)
    if options.batch_norm and name in NO_BATCH_NORM:
        raise LabError(
            f"head {name!r} takes no BatchNorm; set use_batch_norm to False, or the head to 'mlp' or 'linear'."
        )
    return make(width, embed_dim, options)


class AttentionPooling(nn.Module):
    """Learned softmax over the positions of a feature map, instead of their average.

    Scores are Linear(C -> C/8), tanh, Linear(-> 1). The last layer starts at zero, so that training
    starts from the average.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width // 8), nn.Tanh(), nn.Linear(width // 8, 1))
        nn.init.zeros_(self.score[2].weight)  # type: ignore[arg-type]

    def weights(self, feature_map: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w), each image's weights summing to 1."""
        positions = feature_map.flatten(2).transpose(1, 2)  # (B, hw, C)
        weights = self.score(positions).squeeze(2).softmax(dim=1)  # (B, hw)
        return weights.view(len(weights), *feature_map.shape[2:])

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C)."""
        return torch.einsum("bchw,bhw->bc", feature_map, self.weights(feature_map))


# --- The model ---


MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp, Radford et al. 2021, section 2.5


class CLIPModel(nn.Module):
    """Two towers, two heads, one temperature: `model(image, text)` returns named features.

    Args:
        text_encoder: a text tower with `.width`, or transformers' CLIPTextModel or CLIPTextModelWithProjection.
        image_encoder: an image tower with `.width`; None: ResNet50 with ImageNet weights.
        image_head, text_head: names in HEADS.
        embed_dim: width D of the joint space.
        head_options: of both heads.
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
        head_options: HeadOptions = HeadOptions(),
        use_batch_norm: bool = False,
        use_attention_pooling: bool = False,
        frozen: tuple[str, ...] = ("text",),
        freeze_batch_norm: bool = False,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder: Any = resnet50() if image_encoder is None else image_encoder
        self.text_encoder: Any = as_text_tower(text_encoder)
        image_width, text_width = self.image_encoder.width, self.text_encoder.width
        if use_attention_pooling and isinstance(self.image_encoder, CachedTower):
            raise LabError(
                "attention pooling needs a feature map, which a cached image tower does not have; "
                "set image_tower_mode to 'frozen' or 'trainable', or use_attention_pooling to False."
            )
        self.image_pooling = AttentionPooling(image_width) if use_attention_pooling else None
        normed = replace(head_options, batch_norm=use_batch_norm)
        self.image_head = build_head("image_head", image_head, image_width, embed_dim, normed)
        self.text_head = build_head("text_head", text_head, text_width, embed_dim, head_options)
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
        """As in torch, but frozen parts stay in eval mode, so that their BatchNorm statistics do not change."""
        super().train(mode)
        norms = batch_norms(self.image_encoder) if self.freeze_batch_norm else []
        held = [self.image_encoder, self.text_encoder] if self.held else []
        for part in [*self._frozen_parts(), *norms, *held]:
            part.eval()
        return self

    def hold_towers(self, held: bool) -> None:
        """Freeze the trainable towers for a while, or train them again."""
        if held and not self.held:
            towers = (self.image_encoder, self.text_encoder)
            self._held_parameters = [p for tower in towers for p in tower.parameters() if p.requires_grad]
        if held != self.held:
            self.held = held
            for parameter in self._held_parameters:
                parameter.requires_grad_(not held)

    def encode_image(self, image: Tensor) -> Tensor:
        """(I, 3, H, W) images, or (I, width) cached features -> (I, D), L2-normalized."""
        return _normalized(self.image_head(self.pool_image(image)))

    def encode_text(self, text: Tensor | list[str] | dict[str, Tensor]) -> Tensor:
        """Captions, their tokens, or (T, width) cached features -> (T, D), L2-normalized."""
        return _normalized(self.text_head(self.pool_text(text)))

    def pool_image(self, image: Tensor) -> Tensor:
        """The image tower alone, pooled: (I, 3, H, W) -> (I, width)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "image" not in self.frozen):
            if self.image_pooling is None:
                return self.image_encoder(image)  # (I, width)
            feature_map = self.image_encoder.feature_map(image)  # (I, width, h, w)
        return self.image_pooling(feature_map)

    def pool_text(self, text: Tensor | list[str] | dict[str, Tensor]) -> Tensor:
        """The text tower alone: captions or tokens -> (T, width)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" not in self.frozen):
            return self.text_encoder(text)

    def project(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The heads alone: what `pool_image` and `pool_text` gave -> named features, as `forward` returns them."""
        return {
            "image_features": _normalized(self.image_head(image)),
            "text_features": _normalized(self.text_head(text)),
            **self.logit_parts(),
        }

    def attention(self, image: Tensor) -> Tensor:
        """(I, 3, H, W) -> (I, h, w) pooling weights, or the attention maps of the built-in vision transformer.

        Raises: LabError if the model has neither.
        """
        if self.image_pooling is not None:
            return self.image_pooling.weights(self.image_encoder.feature_map(image))
        if isinstance(self.image_encoder, VisionTransformer):
            return self.image_encoder.attention_maps(image)
        raise LabError("this model averages over positions; train with use_attention_pooling to see weights.")

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


def _normalized(features: Tensor) -> Tensor:
    return F.normalize(full_precision(features), dim=-1)


def parameter_table(model: CLIPModel) -> pd.DataFrame:
    """Trainable and frozen parameters in thousands, one row per part of the model."""
    counts = {
        name: [
            sum(p.numel() for p in part.parameters() if p.requires_grad == trainable) / 1e3
            for trainable in (True, False)
        ]
        for name, part in model.parts().items()
    }
    return pd.DataFrame(counts, index=["trainable (thousands)", "frozen (thousands)"]).T.round(1)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Its BatchNorm layers, of any dimension."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def _start_temperature(config: Config) -> float:
    """The configured temperature; a pretrained CLIP with heads `identity`, which keep its space, has its own."""
    if config.image_head == config.text_head == "identity":
        own = pretrained_temperature(config.image_tower, config.image_weights)
        return own or config.temperature
    return config.temperature


def build_model(config: Config) -> CLIPModel:
    """The model of a configuration, initialized by its seed."""
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
