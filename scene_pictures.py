"""A scene as an anti-aliased picture."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from scene_plan import HOLES, OUTLINES, PAINTS, TINT_PAINTS, Colour, Point, Scene, SceneObject

_OVERSAMPLING = 4


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (round(c + (o - c) * share) for c, o in zip(colour, other, strict=True))
    return r, g, b


def _draw_stripes(
    pen: ImageDraw.ImageDraw, side: int, period: float, fill: Colour, rng: random.Random
) -> None:
    turn = math.radians(rng.choice((0, 45, 90, 135)) + rng.uniform(-8, 8))
    ux, uy, middle = math.cos(turn), math.sin(turn), side / 2
    steps = int(side / period) + 1
    shift = rng.uniform(0, period)
    for k in range(-steps, steps + 1):
        x, y = middle + ux * (k * period + shift), middle + uy * (k * period + shift)
        ends = [(x - uy * side, y + ux * side), (x + uy * side, y - ux * side)]
        pen.line(ends, fill=fill, width=round(0.42 * period))


def _draw_dots(pen: ImageDraw.ImageDraw, side: int, period: float, fill: Colour, rng: random.Random) -> None:
    shift_x, shift_y = rng.uniform(0, period), rng.uniform(0, period)
    row = period * 0.87  # hexagonal packing
    for j in range(-1, int(side / row) + 2):
        for i in range(-1, int(side / period) + 2):
            x, y = i * period + shift_x + (j % 2) * period / 2, j * row + shift_y
            r = 0.29 * period
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


_SURFACE_PENS = {"striped": _draw_stripes, "dotted": _draw_dots}


def outline_of(points: list[Point], thing: SceneObject, scale: float, x: float, y: float) -> list[Point]:
    c, s = math.cos(math.radians(thing.angle)) * scale, math.sin(math.radians(thing.angle)) * scale
    return [(x + c * px - s * py, y + s * px + c * py) for px, py in points]


def _draw_object(canvas: Image.Image, thing: SceneObject, rng: random.Random) -> None:
    side = canvas.width
    radius = thing.radius * side
    half = math.ceil(radius) + 3
    left, top = int(thing.x * side) - half, int(thing.y * side) - half
    n, k = 2 * half + 1, _OVERSAMPLING
    place = partial(
        outline_of, thing=thing, scale=radius * k, x=(thing.x * side - left) * k, y=(thing.y * side - top) * k
    )
    colour = _mix(PAINTS[thing.colour], (rng.randrange(256),) * 3, 0.05)
    paint, mask = Image.new("RGB", (n * k, n * k), colour), Image.new("L", (n * k, n * k))
    pen, cutter = ImageDraw.Draw(paint), ImageDraw.Draw(mask)
    if thing.surface in _SURFACE_PENS:
        period = max(0.056, 0.37 * thing.radius) * side * k
        _SURFACE_PENS[thing.surface](pen, n * k, period, _mix(colour, (255, 255, 255), 0.78), rng)
    edge = _mix(colour, (0, 0, 0), 0.38)
    for outline, inside in ((OUTLINES[thing.shape], 255), (HOLES.get(thing.shape), 0)):
        if outline:
            points = place(outline)
            cutter.polygon(points, fill=inside)
            pen.line([*points, *points[:2]], fill=edge, width=round(k * side * 0.024), joint="curve")
    small = mask.reduce(k)
    shadow = small.filter(ImageFilter.BoxBlur(side * 0.012)).point([v // 4 for v in range(256)])
    canvas.paste((50, 50, 70), (left + round(side * 0.01), top + round(side * 0.018)), shadow)
    canvas.paste(paint.reduce(k), (left, top), small)


def _field(kind: str, side: int, rng: random.Random) -> np.ndarray:
    """(side, side) darkness in [0, 1] of a background."""
    y, x = np.mgrid[0:side, 0:side] / side
    if kind == "gradient":
        turn = rng.uniform(0, 2 * math.pi)
        along = (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)
        return along / 1.2 + 0.4
    if kind == "cloudy":
        coarse = bytes(rng.randrange(256) for _ in range(36))
        return (
            np.asarray(Image.frombytes("L", (6, 6), coarse).resize((side, side), Image.Resampling.BICUBIC))
            / 300
        )
    step, shift = rng.uniform(0.1, 0.14), rng.random()
    if kind == "grid":
        lines = np.minimum((x / step + shift) % 1, (y / step + shift) % 1) * step * side
        return 0.75 * np.clip(1.6 - lines, 0, 1)
    if kind == "checked":
        return 0.42 * ((np.floor(x / step + shift) + np.floor(y / step + shift)) % 2)
    return np.zeros((side, side))


def draw(scene: Scene, rng: random.Random, image_size: int = 112) -> Image.Image:
    """The picture of a scene, RGB of (image_size, image_size), anti-aliased.

    Args:
        scene: what to draw.
        rng: decides what no caption tells: shades, where stripes begin, the clouds' form.
        image_size: side in pixels.
    """
    light = np.array(TINT_PAINTS[scene.tint], dtype=np.float32)
    dark = light * 0.8
    field = _field(scene.background, image_size, rng)[..., None].astype(np.float32)
    pixels = light + (dark - light) * field  # (side, side, 3)
    canvas = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    for thing in scene.objects:
        _draw_object(canvas, thing, rng)
    return canvas
