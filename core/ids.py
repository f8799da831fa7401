"""What an id means: an image and a text match if and only if their ids are equal; -1 matches nothing."""

from __future__ import annotations

# --- Left and right swapped ---


SWAPPED = -2
"""A text of id `SWAPPED - image_id` is the caption of that image with left and right swapped: it matches nothing."""
