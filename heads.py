"""Heads: what maps a tower's width to the joint space, chosen by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import LabError


@dataclass(frozen=True)
class HeadOptions:
    """What a head may need beside its widths; each reads what concerns it.

    Args:
        hidden_dim: width of hidden layers; of all tokens of `attention` together.
        dropout: probability.
        batch_norm: BatchNorm after each linear layer of `mlp` and `linear`.
        layer_norm: LayerNorm at the end of `mlp`.
        num_heads, num_layers, num_tokens: of `attention`.
    """

    hidden_dim: int = 1024
    dropout: float = 0.0
    batch_norm: bool = False
    layer_norm: bool = False
    num_heads: int = 8
    num_layers: int = 2
    num_tokens: int = 8


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
    """Linear, GELU, dropout, Linear; with BatchNorm after each linear layer, or LayerNorm at the end, if asked."""

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        hidden = options.hidden_dim
        norms = [nn.BatchNorm1d(hidden)] if options.batch_norm else []
        last: list[nn.Module] = [nn.BatchNorm1d(embed_dim)] if options.batch_norm else []
        if options.layer_norm:
            last.append(nn.LayerNorm(embed_dim))
        super().__init__(
            nn.Linear(width, hidden),
            *norms,
            nn.GELU(),
            nn.Dropout(options.dropout),
            nn.Linear(hidden, embed_dim),
            *last,
        )


class LinearHead(nn.Sequential):
    """Dropout and one linear layer; with BatchNorm behind it if asked."""

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        norm = [nn.BatchNorm1d(embed_dim)] if options.batch_norm else []
        super().__init__(nn.Dropout(options.dropout), nn.Linear(width, embed_dim), *norm)


class StandardisedHead(nn.Sequential):
    """Each number of the tower's output brought to mean 0 and deviation 1 over captions, then one linear layer.

    Captions of one template lie close together (two that differ in the order of two words at a cosine of 0.99), so
    that what tells them apart is small beside what they share. Raises: LabError where BatchNorm is asked for.
    """

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        _refuse_batch_norm("standardised", options)
        super().__init__(
            nn.BatchNorm1d(width, affine=False), nn.Dropout(options.dropout), nn.Linear(width, embed_dim)
        )


class IdentityHead(nn.Identity):
    """Keeps a tower's space as the joint space. Raises: LabError where their widths differ."""

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        if width != embed_dim:
            raise LabError(
                f"head 'identity' keeps the tower's {width} numbers but embed_dim is {embed_dim}; "
                f"set embed_dim to {width} or the head to 'linear'."
            )
        super().__init__()


class ProjectionHead(nn.Sequential):
    """Dropout and one linear layer without bias, as CLIP's. Raises: LabError where BatchNorm is asked for.

    Source: Radford et al. 2021, figure 3; the start as in openai/CLIP model.py.
    """

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        _refuse_batch_norm("projection", options)
        linear = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(linear.weight, std=width**-0.5)
        super().__init__(nn.Dropout(options.dropout), linear)


class SiglipHead(nn.Sequential):
    """LayerNorm, dropout, and one linear layer without bias. Raises: LabError where BatchNorm is asked for."""

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        _refuse_batch_norm("siglip", options)
        super().__init__(
            nn.LayerNorm(width), nn.Dropout(options.dropout), nn.Linear(width, embed_dim, bias=False)
        )


class ClipHead(nn.Sequential):
    """LayerNorm, then an MLP without a last bias; made for a temperature that is learned.

    CLIP's towers end in a LayerNorm and a linear projection without bias; frozen features cannot adapt to
    that projection, so an MLP stands in its place. Raises: LabError where BatchNorm is asked for.
    Source: Radford et al. 2021, section 2.4.
    """

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        _refuse_batch_norm("clip", options)
        super().__init__(
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
    positions; transformer layers (LayerNorm first, an MLP of four times the token's width) let them look at
    one another, and the tokens side by side are projected. Tokens share the width, so a layer costs about as
    much as an MLP's.

    Raises: LabError where `hidden_dim` is no multiple of tokens times heads, or BatchNorm is asked for.
    """

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        super().__init__()
        _refuse_batch_norm("attention", options)
        self.num_tokens, parts = options.num_tokens, options.num_tokens * options.num_heads
        if options.hidden_dim % parts:
            raise LabError(
                f"head 'attention' splits head_hidden_dim {options.hidden_dim} into {options.num_tokens} tokens "
                f"of {options.num_heads} heads; make it a multiple of {parts}."
            )
        token_width = options.hidden_dim // options.num_tokens
        self.split = nn.Linear(width, options.hidden_dim)
        self.positions = nn.Parameter(torch.randn(self.num_tokens, token_width) * token_width**-0.5)
        layers = [_attention_layer(token_width, options) for _ in range(options.num_layers)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(options.hidden_dim)
        self.project = nn.Linear(options.hidden_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, embed_dim)."""
        tokens = self.split(features).unflatten(1, (self.num_tokens, -1)) + self.positions  # (B, N, w)
        return self.project(self.norm(self.layers(tokens).flatten(1)))


def _attention_layer(token_width: int, options: HeadOptions) -> nn.Module:
    return nn.TransformerEncoderLayer(
        token_width,
        options.num_heads,
        dim_feedforward=4 * token_width,
        dropout=options.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


def _refuse_batch_norm(name: str, options: HeadOptions) -> None:
    if options.batch_norm:
        raise LabError(
            f"head {name!r} has LayerNorm and takes no BatchNorm; set use_batch_norm to False, or the head to "
            "'mlp' or 'linear'."
        )


HEADS: dict[str, type[nn.Module]] = {
    "mlp": MLPHead,
    "linear": LinearHead,
    "standardised": StandardisedHead,
    "identity": IdentityHead,
    "projection": ProjectionHead,
    "siglip": SiglipHead,
    "clip": ClipHead,
    "attention": AttentionHead,
}
