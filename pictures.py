"""The one place where a picture file becomes pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import LabError


class UndecodableImage(LabError):  # noqa: N818  names what it is about
    """A picture file that holds no whole picture; `cause` says why in a few words."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def decode_rgb(path: str | Path, size: int, resize: str = "crop") -> np.ndarray:
    """(size, size, 3) uint8. Raises: UndecodableImage with a short cause."""
    try:
        with Image.open(path) as picture:
            if resize == "crop":
                picture.draft("RGB", (2 * size, 2 * size))
            image = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error).splitlines()[0]) from error
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)
