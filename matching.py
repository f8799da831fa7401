"""Which image and text belong together, told by ids."""

from __future__ import annotations

import torch
from torch import Tensor

from errors import LabError


def match_mask(num_images: int, num_texts: int, image_id: Tensor | None, text_id: Tensor | None) -> Tensor:
    """(I, T) bool: which image and text belong together.

    Raises: LabError if ids and features differ in length, or no ids are given and I is not T.
    """
    if image_id is None or text_id is None:
        if num_images != num_texts:
            raise LabError(
                f"{num_images} images and {num_texts} texts need image_id and text_id to be matched."
            )
        return torch.eye(num_images, dtype=torch.bool)
    if len(image_id) != num_images or len(text_id) != num_texts:
        raise LabError(
            f"{num_images} images and {num_texts} texts came with {len(image_id)} and {len(text_id)} ids; "
            "give one id a row."
        )
    return (image_id[:, None] == text_id[None, :]) & (image_id[:, None] != -1)
