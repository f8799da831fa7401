"""The vision transformer: a picture cut into patches, read by transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errors import LabError
from tower_parts import CLIP_MEAN, CLIP_STD, PictureTower
from transformer_blocks import Encoder, initialise

POOLINGS = ("class", "mean")


class PatchEmbeddings(nn.Module):
    """Patches as tokens, behind a class token, with learned positions."""

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


class VisionTransformer(PictureTower):
    """A vision transformer with CLIP's LayerNorms before and after its blocks.

    Args:
        picture_shape: (H, W) of the pictures, or the side of square ones, pixels.
        patch_size: side of a patch, pixels; divides H and W.
        width, num_layers, num_heads, mlp_ratio, dropout: of the blocks.
        activation: a name of transformer_blocks.ACTIVATIONS.
        pooling: `class` reads the class token, `mean` averages the patches' tokens.
        initialisation: `clip` or `xavier`, see transformer_blocks.initialise.
        gradient_checkpointing: less memory, a third more time, the same gradients.
        mean, std: what uint8 pictures are normalised by.
    Raises: LabError if the patches do not tile the picture, or the heads do not divide the width.
    Source: Dosovitskiy et al. 2021, section 3.1; Radford et al. 2021, section 2.4.
    """

    def __init__(
        self,
        picture_shape: int | tuple[int, int] = 224,
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
        height, across = (picture_shape, picture_shape) if isinstance(picture_shape, int) else picture_shape
        if height % patch_size or across % patch_size:
            raise LabError(f"patches of {patch_size} pixels do not tile {height} x {across} pictures.")
        if pooling not in POOLINGS:
            raise LabError(f"pooling {pooling!r} does not exist; choose one of {', '.join(POOLINGS)}.")
        self.picture_shape, self.pooling = (height, across), pooling
        self.grid = (height // patch_size, across // patch_size)
        self.embeddings = PatchEmbeddings(self.grid, patch_size, width)
        self.pre_layrnorm = nn.LayerNorm(width)  # spelt as in transformers
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            num_layers, width, num_heads, mlp_ratio, dropout, activation, gradient_checkpointing
        )
        self.post_layernorm = nn.LayerNorm(width)
        initialise(self.encoder, initialisation)
        if initialisation == "xavier":
            nn.init.xavier_uniform_(self.embeddings.patch_embedding.weight.flatten(1))

    def _embed(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != self.picture_shape:
            height, across = self.picture_shape
            raise LabError(
                f"this vision transformer takes {height} x {across} pictures, "
                f"not {images.shape[2]} x {images.shape[3]}; set image_size to what it was built for."
            )
        return self.dropout(self.pre_layrnorm(self.embeddings(self.normalise(images))))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + hw, width), the class token first, before the last LayerNorm."""
        return self.encoder(self._embed(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float already normalised -> (B, width)."""
        tokens = self.tokens(images)
        if self.pooling == "class":
            return self.post_layernorm(tokens[:, 0])
        return self.post_layernorm(tokens[:, 1:]).mean(dim=1)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, h, w): the patches' tokens where they lie."""
        patches = self.post_layernorm(self.tokens(images)[:, 1:])
        return patches.transpose(1, 2).unflatten(2, self.grid)

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w): how much of each patch reaches the pooled output, summing to 1.

        Source: attention rollout, Abnar & Zuidema 2020, section 3: the layers' attention, averaged over heads
            and half of it the residual, multiplied.
        """
        x = self._embed(images)
        flow = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)  # (B, N, N)
        for layer in self.encoder.layers:
            attention = layer.self_attn.weights(layer.layer_norm1(x)).mean(dim=1)
            flow = (attention @ flow + flow) / 2
            x = layer(x)
        reached = flow[:, 0, 1:] if self.pooling == "class" else flow[:, 1:, 1:].mean(dim=1)
        return (reached / reached.sum(dim=1, keepdim=True)).unflatten(1, self.grid)
