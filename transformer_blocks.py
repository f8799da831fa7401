"""Pre-norm transformer blocks; names and shapes are those of transformers' CLIP, so that weights move as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import LabError, choose

INITIALISATIONS = ("clip", "xavier")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
"""By the names of transformers' `hidden_act`; `gelu` is faster and keeps a third less for the backward pass."""


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise LabError(
                f"a transformer of width {width} cannot have {num_heads} heads; choose a number that divides it."
            )
        self.num_heads = num_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, width / heads)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, N, width) -> (B, N, width); causal: a token sees itself and those before it."""
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, heads, N, N): what each token takes from each, without a causal mask."""
        query, key = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        return (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)


class MLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = choose(ACTIVATIONS, activation, "activation")()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Attention, then an MLP, each behind a LayerNorm and beside a residual."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, dropout: float = 0.0, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, num_heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width), activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        x = x + self.dropout(self.self_attn(self.layer_norm1(x), causal))
        return x + self.dropout(self.mlp(self.layer_norm2(x)))


class Encoder(nn.Module):
    """A stack of blocks.

    Args:
        gradient_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        activation: str = "gelu",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.gradient_checkpointing = width, gradient_checkpointing
        self.layers: Any = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, dropout, activation) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, causal, use_reentrant=False)
            else:
                x = layer(x, causal)
        return x


def initialise(encoder: Encoder, scheme: str) -> None:
    """Draw the blocks' matrices anew; biases become zero.

    Args:
        scheme: `clip`, normal with deviations that shrink with width and depth, or `xavier`, uniform.
    Source: openai/CLIP model.py `initialize_parameters`; Glorot & Bengio 2010, eq. 16.
    """
    if scheme not in INITIALISATIONS:
        raise LabError(
            f"initialisation {scheme!r} does not exist; choose one of {', '.join(INITIALISATIONS)}."
        )
    shallower = (2 * len(encoder.layers)) ** -0.5
    gains = {"out_proj": shallower, "fc1": 0.5**0.5, "fc2": shallower}
    for name, layer in encoder.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        nn.init.zeros_(layer.bias)
        if scheme == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=gains.get(name.split(".")[-1], 1.0) * encoder.width**-0.5)


def freeze_parts(tower: nn.Module, layers: int, projections: bool, side: str) -> nn.Module:
    """Freeze a transformer's first blocks, and its projections into a joint space.

    Parameters are registered in the order of their use, here as in transformers' models.

    Args:
        layers: blocks to freeze, with all that stands before them; 0 freezes nothing.
        projections: freeze parameters with `projection` in their names.
        side: `image` or `text`, for the message.
    Returns: the tower.
    Raises: LabError where the tower has fewer blocks.
    """
    stacks = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    blocks = max(stacks, key=len, default=nn.ModuleList())
    if layers > len(blocks):
        raise LabError(
            f"{side}_freeze_layers is {layers} but this tower has {len(blocks)} blocks; choose at most that many."
        )
    ends = {id(list(block.parameters())[-1]) for block in blocks[:layers]}
    for name, parameter in tower.named_parameters():
        if ends or (projections and "projection" in name):
            parameter.requires_grad_(False)
        ends.discard(id(parameter))
    return tower
