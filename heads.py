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
        hidden_dim: width of hidden layers.
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


class IdentityHead(nn.Identity):
    """Keeps a tower's space as the joint space. Raises: LabError where their widths differ."""

    def __init__(self, width: int, embed_dim: int, options: HeadOptions) -> None:
        if width != embed_dim:
            raise LabError(
                f"head 'identity' keeps the tower's {width} numbers but embed_dim is {embed_dim}; "
                f"set embed_dim to {width} or the head to 'linear'."
            )
        super().__init__()


HEADS = {"mlp": MLPHead, "linear": LinearHead, "identity": IdentityHead}
