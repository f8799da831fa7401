"""Heads, the dual encoder, and `build_model(config)`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import towers
from config import Config
from errors import LabError, choose
from losses import ALIASES, LOSSES, InfoNCELoss

__all__ = ["HEADS", "AttentionPooling", "CLIPModel", "InfoNCELoss", "MLPHead", "build_loss", "build_model"]

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp, Radford et al. 2021, section 2.5


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
        """(B, C, h, w) -> (B, h, w), each picture's weights summing to 1."""
        positions = feature_map.flatten(2).transpose(1, 2)  # (B, hw, C)
        weights = self.score(positions).squeeze(2).softmax(dim=1)  # (B, hw)
        return weights.view(len(weights), *feature_map.shape[2:])

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C)."""
        return torch.einsum("bchw,bhw->bc", feature_map, self.weights(feature_map))


class MLPHead(nn.Sequential):
    """Linear, GELU, dropout, Linear; with BatchNorm after each linear layer if asked."""

    def __init__(
        self, width: int, embed_dim: int, hidden_dim: int, dropout: float, use_batch_norm: bool
    ) -> None:
        norms = [nn.BatchNorm1d(hidden_dim)] if use_batch_norm else []
        last = [nn.BatchNorm1d(embed_dim)] if use_batch_norm else []
        super().__init__(
            nn.Linear(width, hidden_dim),
            *norms,
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, embed_dim),
            *last,
        )


class LinearHead(nn.Sequential):
    """Dropout and one linear layer; with BatchNorm behind it if asked."""

    def __init__(
        self, width: int, embed_dim: int, hidden_dim: int, dropout: float, use_batch_norm: bool
    ) -> None:
        norm = [nn.BatchNorm1d(embed_dim)] if use_batch_norm else []
        super().__init__(nn.Dropout(dropout), nn.Linear(width, embed_dim), *norm)


class IdentityHead(nn.Identity):
    """Keeps a tower's space as the joint space. Raises: LabError where their widths differ."""

    def __init__(
        self, width: int, embed_dim: int, hidden_dim: int, dropout: float, use_batch_norm: bool
    ) -> None:
        if width != embed_dim:
            raise LabError(
                f"head 'identity' keeps the tower's {width} numbers but embed_dim is {embed_dim}; "
                f"set embed_dim to {width} or the head to 'linear'."
            )
        super().__init__()


class CLIPModel(nn.Module):
    """Two towers, two heads, one temperature: `model(image, text)` returns named features.

    Args:
        text_encoder: a text tower with `.width`.
        image_encoder: an image tower with `.width`; None: ResNet50 with ImageNet weights.
        image_head, text_head: names in HEADS.
        embed_dim: width D of the joint space.
        head_hidden_dim, head_dropout: of the heads.
        use_batch_norm: BatchNorm after each linear layer of the image head.
        use_attention_pooling: pool the image tower's feature map by learned weights.
        frozen: which of "image", "text" get no gradients and stay in eval mode.
        temperature, learn_temperature: the softmax temperature at the start, and whether it is trained.
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
        use_batch_norm: bool = False,
        use_attention_pooling: bool = False,
        frozen: tuple[str, ...] = ("text",),
        temperature: float = 0.07,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        self.image_encoder: Any = towers.resnet50() if image_encoder is None else image_encoder
        self.text_encoder: Any = text_encoder
        if use_attention_pooling and isinstance(self.image_encoder, towers.CachedTower):
            self.image_encoder.feature_map(torch.empty(0))  # raises the one explanation
        self.image_pooling = AttentionPooling(self.image_encoder.width) if use_attention_pooling else None
        sizes = (embed_dim, head_hidden_dim, head_dropout)
        make_image_head = choose(HEADS, image_head, "image_head")
        make_text_head = choose(HEADS, text_head, "text_head")
        self.image_head = make_image_head(self.image_encoder.width, *sizes, use_batch_norm)
        self.text_head = make_text_head(text_encoder.width, *sizes, False)
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / temperature)), requires_grad=learn_temperature
        )
        self.frozen = frozen
        for name in frozen:
            self._tower(name).requires_grad_(False)
        self.train()

    def _tower(self, name: str) -> nn.Module:
        return {"image": self.image_encoder, "text": self.text_encoder}[name]

    def train(self, mode: bool = True) -> CLIPModel:
        """As usual, but frozen towers stay in eval mode, so that BatchNorm statistics stay."""
        super().train(mode)
        for name in self.frozen:
            self._tower(name).eval()
        return self

    def encode_image(self, image: Tensor) -> Tensor:
        """(I, 3, H, W) pictures, or (I, width) cached features -> (I, D), L2-normalised."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "image" not in self.frozen):
            if self.image_pooling is None:
                pooled = self.image_encoder(image)  # (I, width)
            else:
                feature_map = self.image_encoder.feature_map(image)  # (I, width, h, w)
        if self.image_pooling is not None:
            pooled = self.image_pooling(feature_map)
        return F.normalize(self.image_head(pooled), dim=-1)

    def encode_text(self, text: Tensor | list[str] | dict[str, Tensor]) -> Tensor:
        """Captions, their tokens, or (T, width) cached features -> (T, D), L2-normalised."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" not in self.frozen):
            pooled = self.text_encoder(text)
        return F.normalize(self.text_head(pooled), dim=-1)

    def attention(self, image: Tensor) -> Tensor:
        """(I, 3, H, W) -> (I, h, w) pooling weights. Raises: LabError without attention pooling."""
        if self.image_pooling is None:
            raise LabError(
                "this model averages over positions; train with use_attention_pooling to see weights."
            )
        return self.image_pooling.weights(self.image_encoder.feature_map(image))

    def forward(self, image: Tensor, text: Tensor | list[str] | dict[str, Tensor]) -> dict[str, Tensor]:
        """Named features: image_features (I, D), text_features (T, D), logit_scale ()."""
        return {
            "image_features": self.encode_image(image),
            "text_features": self.encode_text(text),
            "logit_scale": self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
        }

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


HEADS = {"mlp": MLPHead, "linear": LinearHead, "identity": IdentityHead}


def build_image_tower(config: Config) -> nn.Module:
    """The image tower, or what stands for it where its features are cached."""
    make = choose(towers.IMAGE_TOWERS, config.image_tower, "image_tower")
    if config.image_tower_mode == "cached":
        return towers.CachedTower(towers.image_width(config.image_tower, config.image_weights))
    return make(config.image_weights)


def build_text_tower(config: Config) -> nn.Module:
    """The text tower, or what stands for it where its features are cached."""
    make = choose(towers.TEXT_TOWERS, config.text_tower, "text_tower")
    if config.text_tower_mode == "cached":
        return towers.CachedTower(towers.text_width(config.text_tower, config.text_model))
    return make(config.text_model)


def build_model(config: Config) -> CLIPModel:
    """The model of a configuration, initialised by its seed."""
    torch.manual_seed(config.seed)
    modes = {"image": config.image_tower_mode, "text": config.text_tower_mode}
    return CLIPModel(
        build_text_tower(config),
        build_image_tower(config),
        image_head=config.image_head,
        text_head=config.text_head,
        embed_dim=config.embed_dim,
        head_hidden_dim=config.head_hidden_dim,
        head_dropout=config.head_dropout,
        use_batch_norm=config.use_batch_norm,
        use_attention_pooling=config.use_attention_pooling,
        frozen=tuple(name for name, mode in modes.items() if mode == "frozen"),
        temperature=config.temperature,
        learn_temperature=config.learn_temperature,
    )


def build_loss(config: Config) -> nn.Module:
    """The loss of a configuration; documented names of the same loss are understood."""
    make = choose(LOSSES, ALIASES.get(config.loss, config.loss), "loss")
    return make(temperature=config.temperature, label_smoothing=config.label_smoothing)
