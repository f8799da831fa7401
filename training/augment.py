"""Augmentation of uint8 images after the cache, and of captions: seeded per image, the same in any batch.

Every random number is a hash of (seed, epoch, image id, parameter), so that an image's view does not depend on the
rest of the batch, on worker processes or on where a run resumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core.errors import LabError

# --- Images ---


PARAMETERS = (  # a parameter's position decides its random number: append, never reorder
    "crop_area crop_ratio crop_left crop_top flip angle brightness contrast saturation "
    "erase erase_area erase_ratio erase_left erase_top"
).split()
CROP_RATIO = 4 / 3  # widest side ratio of a crop; Szegedy et al. 2015, section 6
ERASE_AREA, ERASE_RATIO = (0.02, 0.33), 3.3  # Zhong et al. 2017, section 3.2; ratio as in torchvision
ERASE_COLOR = (124, 116, 104)  # ImageNet's mean: about 0 after normalization
GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
CPU_CHUNK = 16  # images at a time, so that intermediate floats stay in the processor's cache

Uniforms = dict[str, np.ndarray]  # parameter -> (B,) uniform in [0, 1)


def augment(
    images: Tensor,
    image_ids: Tensor | np.ndarray | Sequence[int],
    *,
    seed: int,
    epoch: int,
    crop_scale: float = 1.0,
    flip: float | Tensor = 0.0,
    jitter: float = 0.0,
    rotation: float = 0.0,
    erasing: float = 0.0,
) -> Tensor:
    """A random view of each image: crop, flip and rotation, then colour, then erasing.

    Args:
        images: (B, 3, H, W) uint8 on any device, fastest in memory format `channels_last`; not changed.
        image_ids: (B,) integers, best kept on the CPU; equal ids get equal views.
        seed: seed of the run.
        epoch: number of the pass over the data.
        crop_scale: least area of a random resized crop, in (0, 1]; 1 is off.
        flip: probability of a horizontal flip, or (B,) bool: which images are flipped.
        jitter: brightness, contrast and saturation are each scaled by up to 1 +- jitter, in this order.
        rotation: largest angle in degrees; corners are filled by reflection.
        erasing: probability that a rectangle is overwritten with gray.
    Returns: (B, 3, H, W) uint8, `channels_last`.
    Raises: LabError if images are not (B, 3, H, W) uint8, or a setting is out of range.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        given = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
        raise LabError(f"augmentation takes (B, 3, H, W) uint8 images, as a cache gathers them, not {given}.")
    if not 0 < crop_scale <= 1:
        raise LabError(f"crop_scale is the least area of a crop, above 0 and at most 1, not {crop_scale}.")
    numbers = uniforms(image_ids, seed=seed, epoch=epoch)
    if len(numbers["flip"]) != len(images):
        raise LabError(f"augment takes one image id per image, not {len(numbers['flip'])} for {len(images)}.")
    flips = flip.cpu().numpy() if isinstance(flip, Tensor) else numbers["flip"] < flip
    numbers = {**numbers, "flip": flips}
    pixels = images.permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3), no copy if channels_last

    def change(part: slice) -> Tensor:
        view, some = pixels[part], {name: values[part] for name, values in numbers.items()}
        if crop_scale < 1 or flips.any() or rotation:
            view = _move(view, some, crop_scale, rotation)
        view = _jitter(view, some, jitter) if jitter else view
        return _erase(view, some, erasing) if erasing else view

    views = _in_threads(pixels.shape, change) if pixels.device.type == "cpu" else change(slice(None))
    return views.permute(0, 3, 1, 2)


def augment_parts(images: Tensor, part_ids: Tensor, **options: Any) -> Tensor:
    """Images of several parts side by side, each part augmented by itself.

    Args:
        images: (B, 3, H, P * W) uint8.
        part_ids: (B, P) integers.
        options: as `augment` takes them.
    """
    parts = zip(images.chunk(part_ids.shape[1], dim=3), part_ids.T, strict=True)
    return torch.cat([augment(part, ids, **options) for part, ids in parts], dim=3)


Change = Callable[[slice], Tensor]  # some of the images -> (b, H, W, 3) uint8


def _in_threads(shape: torch.Size, change: Change) -> Tensor:
    """(B, H, W, 3), some images at a time: 4 times as fast as torch's own threads on a busy machine."""
    views = np.empty(shape, dtype=np.uint8)  # a thread may not write to a tensor of inference mode

    def fill(start: int) -> None:
        part = slice(start, start + CPU_CHUNK)
        views[part] = change(part).numpy()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, shape[0], CPU_CHUNK)))
    return torch.from_numpy(views)


def uniforms(image_ids: Tensor | np.ndarray | Sequence[int], *, seed: int, epoch: int) -> Uniforms:
    """Uniform numbers in [0, 1) of each image, one per parameter: functions of their four keys only.

    Source: the finalizer of splitmix64, Steele, Lea & Flood 2014, figure 18, chained over the keys.
    """
    ids = image_ids.cpu().numpy() if isinstance(image_ids, Tensor) else np.asarray(image_ids)
    state = _mix(np.array([[seed & _MASK]], dtype=np.uint64))
    for key in (np.array([[epoch & _MASK]], dtype=np.uint64), ids.astype(np.int64).view(np.uint64)[:, None]):
        state = _mix(state + key)  # (1, 1), then (B, 1)
    bits = _mix(state + np.arange(len(PARAMETERS), dtype=np.uint64))  # (B, P)
    return dict(zip(PARAMETERS, (bits >> np.uint64(11)).T * 2.0**-53, strict=True))


_MASK = 2**64 - 1


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _boxes(
    area: np.ndarray,
    max_ratio: float,
    ratio: np.ndarray,
    place: tuple[np.ndarray, np.ndarray],
    size: torch.Size,
) -> np.ndarray:
    """(B, 4) int: left, top, width, height of boxes that cover at least `area`, in [0, 1], of an image.

    Side ratios are log-uniform within `max_ratio` and what fits into the image, so no box is rejected.
    """
    _, height, width, _ = size
    most = np.minimum(math.log(max_ratio), -np.log(area))
    stretch = np.exp((2 * ratio - 1) * most / 2)
    sides = np.sqrt(area) * stretch, np.sqrt(area) / stretch  # relative to the image's, at most 1
    w, h = (
        np.clip(np.ceil(side * full - 1e-9), 1, full)
        for side, full in zip(sides, (width, height), strict=True)
    )
    left, top = np.floor(place[0] * (width - w + 1)), np.floor(place[1] * (height - h + 1))
    return np.stack([left, top, w, h], axis=1).astype(np.int64)


# --- Geometry ---


def _move(pixels: Tensor, numbers: Uniforms, crop_scale: float, rotation: float) -> Tensor:
    """Crop, flip and rotate (B, H, W, 3) uint8."""
    area = 1 - numbers["crop_area"] * (1 - crop_scale)
    boxes = _boxes(
        area, CROP_RATIO, numbers["crop_ratio"], (numbers["crop_left"], numbers["crop_top"]), pixels.shape
    )
    flips = numbers["flip"]  # (B,) bool
    if rotation or pixels.device.type != "cpu":
        return _sample(pixels, boxes, flips, np.radians(rotation) * (2 * numbers["angle"] - 1))
    return _resize_boxes(pixels, boxes, flips)


def _resize_boxes(pixels: Tensor, boxes: np.ndarray, flips: np.ndarray) -> Tensor:
    """Each box, mirrored or not, resized to the full size in uint8: on a CPU several times as fast as `_sample`.

    NumPy makes the copies: torch would start all its threads for each, and wait for them on a busy machine.
    """
    resized = np.empty(pixels.shape, dtype=np.uint8)
    size = pixels.shape[1:3]
    for image, (left, top, w, h), flip, out in zip(
        pixels.numpy(), boxes.tolist(), flips, resized, strict=True
    ):
        box = torch.from_numpy(image[top : top + h, left : left + w].copy()).permute(2, 0, 1)  # (3, h, w)
        box = F.interpolate(box[None], size=size, mode="bilinear")[0] if (h, w) != size else box
        out[...] = box.permute(1, 2, 0).numpy()[:, :: -1 if flip else 1]
    return torch.from_numpy(resized)


def _sample(pixels: Tensor, boxes: np.ndarray, flips: np.ndarray, angles: np.ndarray) -> Tensor:
    """Crop, flip and rotation as one bilinear sampling, on any device; boxes are only enlarged, so nothing is lost."""
    _, height, width, _ = pixels.shape
    device = pixels.device
    left, top, w, h = (_column(side, device)[..., 0] for side in boxes.T)  # (B, 1, 1) each
    sign = 1 - 2 * _column(flips, device)[..., 0]
    # Positions in the box, -1 to 1; beyond its outermost pixel centers its edge is repeated.
    u, v = (((2 * torch.arange(n, device=device) + 1) / n - 1) for n in (width, height))
    x = (
        (u[None, None, :] * sign).clamp(1 / w - 1, 1 - 1 / w) * w / 2
    )  # (B, 1, W) pixels from the box's center
    y = v[None, :, None].clamp(1 / h - 1, 1 - 1 / h) * h / 2  # (B, H, 1)
    cos, sin = (_column(values, device)[..., 0] for values in (np.cos(angles), np.sin(angles)))
    grid = torch.stack(
        [
            _reflect((2 * (cos * x - sin * y + left) + w) / width - 1, width),
            _reflect((2 * (sin * x + cos * y + top) + h) / height - 1, height),
        ],
        dim=3,
    )  # (B, H, W, 2)
    sampled = F.grid_sample(pixels.permute(0, 3, 1, 2).float(), grid, align_corners=False)  # (B, 3, H, W)
    return sampled.round_().to(torch.uint8).permute(0, 2, 3, 1)


def _reflect(place: Tensor, size: int) -> Tensor:
    """Positions beyond the outermost pixel centers, mirrored at them; not every device's sampler can do it."""
    edge = 1 - 1 / size
    return 2 * place.clamp(-edge, edge) - place


def _column(values: np.ndarray, device: torch.device) -> Tensor:
    """(B, 1, 1, 1) float32 or bool, to broadcast with (B, H, W, 3)."""
    values = values if values.dtype == bool else values.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values)).to(device).view(-1, 1, 1, 1)


# --- Color ---


def _jitter(pixels: Tensor, numbers: Uniforms, jitter: float) -> Tensor:
    """Brightness b, contrast c (about the mean gray m) and saturation s of (B, H, W, 3) uint8.

    The three steps in one: s c b x + (1 - s) c b gray(x) + (1 - c) b m, clamped once at the end.
    """
    device = pixels.device
    b, c, s = (
        _column(np.maximum(0, 1 + jitter * (2 * numbers[name] - 1)), device)
        for name in ("brightness", "contrast", "saturation")
    )
    # Integer sums are exact in any order, so m is the same whatever the batch.
    sums = pixels.flatten(1, 2).sum(1, dtype=torch.int64).cpu().numpy()  # (B, 3)
    m = _column(sums @ np.array(GRAY) / pixels[0, ..., 0].numel(), device)
    x = pixels.float()
    red, green, blue = x.split(1, dim=3)
    gray = red * GRAY[0] + green * GRAY[1] + blue * GRAY[2]  # (B, H, W, 1)
    y = x.mul_(s * c * b).add_(gray.mul_((1 - s) * c * b).add_((1 - c) * b * m))
    return y.round_().clamp_(0, 255).to(torch.uint8)


def _erase(pixels: Tensor, numbers: Uniforms, probability: float) -> Tensor:
    """Overwrite a rectangle of some of (B, H, W, 3) uint8."""
    least, most = ERASE_AREA
    area = least + (most - least) * numbers["erase_area"]
    place = numbers["erase_left"], numbers["erase_top"]
    boxes = _boxes(area, ERASE_RATIO, numbers["erase_ratio"], place, pixels.shape)
    boxes[numbers["erase"] >= probability, 2:] = 0
    left, top, w, h = (_column(side, pixels.device) for side in boxes.T)
    row = torch.arange(pixels.shape[1], device=pixels.device).view(1, -1, 1, 1)
    column = torch.arange(pixels.shape[2], device=pixels.device).view(1, 1, -1, 1)
    inside = (row >= top) & (row < top + h) & (column >= left) & (column < left + w)  # (B, H, W, 1)
    color = torch.tensor(ERASE_COLOR, dtype=torch.uint8, device=pixels.device)
    return torch.where(inside, color, pixels)


# --- Captions ---


SIDE = re.compile(r"\b(left|right)(most|hand|side|wards?)?\b", re.IGNORECASE)
CLAUSE_END = re.compile(r"\s*[,;.]\s+")
OTHER = {"left": "right", "right": "left"}


def speaks_of_sides(caption: str) -> bool:
    """Whether a caption mentions left or right, so that it is wrong for the mirrored image."""
    return SIDE.search(caption) is not None


def swap_sides(caption: str) -> str:
    """The caption with left and right exchanged, as it is right for the mirrored image.

    >>> swap_sides("Left of it, the rightmost dog")
    'Right of it, the leftmost dog'
    """

    def other(match: re.Match[str]) -> str:
        side = OTHER[match[1].lower()]
        side = side.upper() if match[1].isupper() else side.title() if match[1][0].isupper() else side
        return side + (match[2] or "")

    return SIDE.sub(other, caption)


def drop_words(caption: str, probability: float, rng: np.random.Generator) -> str:
    """The caption without some of its words; words that name a side stay, and so does at least one word."""
    words = caption.split()
    chances = rng.random(len(words))
    remaining = [
        word
        for word, chance in zip(words, chances, strict=True)
        if chance >= probability or speaks_of_sides(word)
    ]
    return " ".join(remaining or words[:1])


def reorder_clauses(caption: str, rng: np.random.Generator) -> str:
    """The clauses between commas, semicolons and full stops in another order.

    A caption that names a side is left as it is, because "to its left" refers to what comes before it.
    """
    end = caption[-1] if caption[-1:] in {".", "!"} else ""
    clauses = [part for part in CLAUSE_END.split(caption.removesuffix(end)) if part]
    if len(clauses) < 2 or speaks_of_sides(caption):
        return caption
    return ", ".join(clauses[index] for index in rng.permutation(len(clauses))) + end


def vary(
    caption: str, number: int, row: int, *, seed: int, word_dropout: float = 0.0, reorder: float = 0.0
) -> str:
    """Variation `number` of a caption: always the same; number 0 is the caption itself.

    Args:
        row: the caption's row, so that equal captions vary differently.
        seed: of the run.
        word_dropout: probability that a word is left out.
        reorder: probability that the clauses are reordered.
    """
    if number == 0:
        return caption
    rng = np.random.default_rng((seed, row, number))
    if rng.random() < reorder:
        caption = reorder_clauses(caption, rng)
    return drop_words(caption, word_dropout, rng) if word_dropout else caption


def variation_number(row: int, variations: int, *, seed: int, epoch: int) -> int:
    """Which of its variations, from 0, a caption has in an epoch."""
    return int(np.random.default_rng((seed, epoch, row)).integers(variations))
