"""What an id means: an image and a text match if and only if their ids are equal; -1 matches nothing."""

from __future__ import annotations

from typing import Any


def match_ids(batch: dict[str, Any]) -> tuple[Any, Any]:
    """(I,) and (T,) ids that a loss compares: a batch's own, or those that images with equal captions share."""
    image, text = ("image_match", "text_match") if "image_match" in batch else ("image_id", "text_id")
    return batch[image], batch[text]


# --- Left and right swapped ---


SWAPPED = -2
"""A text of id `SWAPPED - image_id` is the caption of that image with left and right swapped: it matches nothing."""
