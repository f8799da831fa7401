"""What towers have in common: pictures normalised on the device, and the stand-in for cached features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errors import LabError

HALF = (0.5, 0.5, 0.5)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite's own preprocessing
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def full_precision(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class CachedTower(nn.Module):
    """Stands where a tower ran once and its features are cached: an identity with a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, width), in float32 at least. Raises: LabError on anything else."""
        if not isinstance(features, Tensor) or features.shape[1:] != (self.width,):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise LabError(
                f"a cached tower takes (batch, {self.width}) features, not {got}; "
                "encode the pictures or texts first, or set the tower's mode to frozen."
            )
        return full_precision(features)

    def feature_map(self, features: Tensor) -> Tensor:
        raise LabError(
            "attention pooling needs a feature map, which a cached image tower no longer has; "
            "set image_tower_mode to 'frozen' or 'trainable', or use_attention_pooling to False."
        )


class PictureTower(nn.Module):
    """Normalises uint8 pictures itself, so that bytes travel to the device.

    Args:
        width: of its output.
        mean, std: of the pictures it was trained on, in [0, 1].
    """

    def __init__(self, width: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 in 0..255 becomes normalised float; float pictures pass as they are."""
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)


class ImageTower(PictureTower):
    """A convolutional encoder.

    Args:
        body: maps (B, 3, H, W) normalised to the feature map (B, width, h, w).
        width: channels of the feature map.
        mean, std: of the pictures the body was trained on, in [0, 1].
    """

    def __init__(self, body: nn.Module, width: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(width, mean, std)
        self.body = body

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, h, w)."""
        return self.body(self.normalise(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float already normalised -> (B, width), averaged over positions."""
        return self.feature_map(images).mean(dim=(2, 3))
