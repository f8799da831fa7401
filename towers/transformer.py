"""CLIP's two transformers, with the parameter names and shapes of transformers' CLIP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.errors import LabError, choose
from towers.base import CLIP_MEAN, CLIP_STD, PixelTower

# --- Blocks ---


INITIALISATIONS = ("clip", "xavier")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
"""By the names of transformers' `hidden_act`; `gelu` is faster and stores a third less for the backward pass."""


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
        """(B, N, width) -> (B, N, width); causal: a token attends to itself and earlier tokens."""
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, heads, N, N): the attention weights, without a causal mask."""
        query, key = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        return (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = choose(ACTIVATIONS, activation, "activation")()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Attention and an MLP, each after a LayerNorm and with a residual connection."""

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
        gradient_checkpointing: store only the blocks' inputs and compute the rest again in the backward pass.
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
    """Initialize the blocks' matrices; biases become zero.

    Args:
        scheme: `clip` (normal, smaller for wide and deep stacks) or `xavier` (uniform).
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
    """Freeze a tower's first blocks, and its projections into a joint space.

    Parameters are registered in the order of their use, here and in transformers' models.

    Args:
        layers: number of blocks to freeze, with everything before them; 0 freezes nothing.
        projections: freeze parameters with `projection` in their names.
        side: `image` or `text`, for the message.
    Returns: the tower.
    Raises: LabError if the tower has fewer blocks.
    """
    stacks = [list(part) for part in tower.modules() if isinstance(part, nn.ModuleList)]
    for stages in (getattr(part, "blocks", None) for part in tower.modules()):
        if isinstance(stages, nn.Sequential):  # timm's; an EfficientNet's are in stages
            parts = [list(stage) if isinstance(stage, nn.Sequential) else [stage] for stage in stages]
            stacks.append([block for part in parts for block in part])
    blocks = max(stacks, key=len, default=[])
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


# --- Images ---


POOLINGS = ("class", "mean")


class PatchEmbeddings(nn.Module):
    """A class token and one token per patch, with learned positions."""

    def __init__(self, grid: tuple[int, int], patch_size: int, width: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + grid[0] * grid[1], width)
        nn.init.normal_(self.patch_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + hw, width)."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, hw, width)
        first = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(PixelTower):
    """A vision transformer with CLIP's LayerNorms before and after its blocks.

    Args:
        image_shape: (H, W) of the images in pixels, or the side of square ones.
        patch_size: side of a patch in pixels; divides H and W.
        width, num_layers, num_heads, mlp_ratio, dropout: of the blocks.
        activation: a name of ACTIVATIONS.
        pooling: `class` reads the class token, `mean` averages the patches' tokens.
        initialisation: `clip` or `xavier`, see `initialise`.
        gradient_checkpointing: less memory, a third more time, the same gradients.
        mean, std: normalization of uint8 images.
    Raises: LabError if patch_size does not divide H and W, or num_heads does not divide the width.
    Source: Dosovitskiy et al. 2021, section 3.1; Radford et al. 2021, section 2.4.
    """

    def __init__(
        self,
        image_shape: int | tuple[int, int] = 224,
        patch_size: int = 16,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        *,
        activation: str = "gelu",
        pooling: str = "class",
        initialisation: str = "clip",
        gradient_checkpointing: bool = False,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ) -> None:
        super().__init__(width, mean, std)
        height, across = (image_shape, image_shape) if isinstance(image_shape, int) else image_shape
        if height % patch_size or across % patch_size:
            raise LabError(
                f"patches of {patch_size} pixels do not divide images of {height} x {across} pixels."
            )
        if pooling not in POOLINGS:
            raise LabError(f"pooling {pooling!r} does not exist; choose one of {', '.join(POOLINGS)}.")
        self.image_shape, self.pooling = (height, across), pooling
        self.grid = (height // patch_size, across // patch_size)
        self.embeddings = PatchEmbeddings(self.grid, patch_size, width)
        self.pre_layrnorm = nn.LayerNorm(width)  # spelled as in transformers
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            num_layers, width, num_heads, mlp_ratio, dropout, activation, gradient_checkpointing
        )
        self.post_layernorm = nn.LayerNorm(width)
        initialise(self.encoder, initialisation)
        if initialisation == "xavier":
            nn.init.xavier_uniform_(self.embeddings.patch_embedding.weight.flatten(1))

    def _embed(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != self.image_shape:
            height, across = self.image_shape
            raise LabError(
                f"this vision transformer takes {height} x {across} images, "
                f"not {images.shape[2]} x {images.shape[3]}; set image_size to the size it was built for."
            )
        return self.dropout(self.pre_layrnorm(self.embeddings(self.normalise(images))))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + hw, width), the class token first, before the last LayerNorm."""
        return self.encoder(self._embed(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or normalized float -> (B, width)."""
        tokens = self.tokens(images)
        if self.pooling == "class":
            return self.post_layernorm(tokens[:, 0])
        return self.post_layernorm(tokens[:, 1:]).mean(dim=1)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, h, w): the patches' tokens at their positions."""
        patches = self.post_layernorm(self.tokens(images)[:, 1:])
        return patches.transpose(1, 2).unflatten(2, self.grid)

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w): the share of each patch in the pooled output, summing to 1.

        Source: attention rollout, Abnar & Zuidema 2020, section 3: the product over layers of the attention
            averaged over heads, with half the weight on the residual.
        """
        x = self._embed(images)
        flow = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)  # (B, N, N)
        for layer in self.encoder.layers:
            attention = layer.self_attn.weights(layer.layer_norm1(x)).mean(dim=1)
            flow = (attention @ flow + flow) / 2
            x = layer(x)
        reached = flow[:, 0, 1:] if self.pooling == "class" else flow[:, 1:, 1:].mean(dim=1)
        return (reached / reached.sum(dim=1, keepdim=True)).unflatten(1, self.grid)


# --- Texts ---


class TokenEmbeddings(nn.Module):
    """Token embeddings with learned positions."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, width)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Token ids to one vector per text, with the names and shapes of transformers' CLIP.

    Args:
        width, num_layers, num_heads, mlp_ratio, dropout: of the blocks.
        vocabulary: number of tokens; the last one is the end token.
        context: maximum number of tokens of a text.
        activation: a name of ACTIVATIONS.
        gradient_checkpointing: less memory, a third more time, the same gradients.
    Source: Radford et al. 2021, section 2.4.
    """

    def __init__(
        self,
        width: int = 512,
        num_layers: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        *,
        vocabulary: int = 49408,
        context: int = 77,
        activation: str = "gelu",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.context, self.end = width, context, vocabulary - 1
        self.embeddings = TokenEmbeddings(vocabulary, context, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            num_layers, width, num_heads, mlp_ratio, dropout, activation, gradient_checkpointing
        )
        self.final_layer_norm = nn.LayerNorm(width)
        initialise(self.encoder, "clip")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids -> (B, width), at each text's first end token.

        Padding follows the end token, where a causal encoder never looks; so the mask is not needed.
        Raises: LabError if the texts are longer than `context`.
        """
        if input_ids.shape[1] > self.context:
            raise LabError(
                f"a text of {input_ids.shape[1]} tokens is too long; the maximum is {self.context}."
            )
        tokens = self.encoder(self.dropout(self.embeddings(input_ids)), causal=True)  # (B, L, width)
        ends = (input_ids == self.end).int().argmax(dim=1)  # (B,)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.final_layer_norm(tokens[rows, ends])
