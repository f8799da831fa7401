"""What a generated scene is: shapes, colours, surfaces, places, and which scenes a split holds."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from errors import LabError

SPLITS: tuple[str, ...] = ("train", "val", "test", "novel")

Point = tuple[float, float]
Colour = tuple[int, int, int]

PAINTS: dict[str, Colour] = {
    "red": (222, 28, 36),
    "orange": (255, 128, 0),
    "yellow": (255, 220, 0),
    "green": (24, 144, 44),
    "turquoise": (0, 198, 196),
    "blue": (30, 72, 222),
    "purple": (122, 34, 172),
    "pink": (255, 112, 190),
    "black": (28, 28, 32),
}
TINT_PAINTS: dict[str, Colour] = {
    "cream": (253, 243, 214),
    "grey": (210, 210, 213),
    "light blue": (198, 224, 250),
    "light green": (206, 238, 200),
    "lilac": (226, 210, 246),
}
_RADII = {"small": (0.115, 0.13), "large": (0.185, 0.205)}  # fractions of the picture's side


# ---- shapes: outlines inside the unit circle, x to the right, y downwards ----


def _polar(degrees: Iterable[float], *radii: float) -> list[Point]:
    """Points at these angles, clockwise from the top; the radii take turns."""
    turns = [(math.radians(angle), radii[k % len(radii)]) for k, angle in enumerate(degrees)]
    return [(r * math.sin(t), -r * math.cos(t)) for t, r in turns]


def _heart() -> list[Point]:
    turns = [math.radians(angle) for angle in range(0, 360, 8)]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(16 * math.sin(t) ** 3 / 17, -(y + 2.5) / 15.5) for t, y in zip(turns, ys, strict=True)]


def _crescent() -> list[Point]:
    """The unit circle less a circle of radius 0.8 around (0.45, 0), moved to the middle."""
    outer = _polar(np.linspace(141.3, 398.7, 40), 1.0)
    bite = [(x + 0.45, y) for x, y in _polar(np.linspace(372.6, 167.4, 30), 0.8)]
    return [(x + 0.17, y) for x, y in outer + bite]


def _cross(arm: float = 0.32, end: float = 0.92) -> list[Point]:
    corner = [(arm, -end), (arm, -arm), (end, -arm)]
    quarters = [corner]
    for _ in range(3):
        quarters.append([(-y, x) for x, y in quarters[-1]])
    return [point for quarter in quarters for point in quarter]


_CIRCLE = _polar(range(0, 360, 8), 0.94)
OUTLINES: dict[str, list[Point]] = {
    "circle": _CIRCLE,
    "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
    "triangle": [(x, y + 0.15) for x, y in _polar((0, 120, 240), 1.05)],
    "star": [(x, y + 0.04) for x, y in _polar(range(0, 360, 36), 1.0, 0.44)],
    "heart": _heart(),
    "cross": _cross(),
    "ring": _CIRCLE,
    "crescent": _crescent(),
    "diamond": [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)],
}
HOLES: dict[str, list[Point]] = {"ring": _polar(range(0, 360, 8), 0.46)}

SHAPES: tuple[str, ...] = tuple(OUTLINES)
COLOURS: tuple[str, ...] = tuple(PAINTS)
SIZES: tuple[str, ...] = tuple(_RADII)
SURFACES: tuple[str, ...] = ("plain", "striped", "dotted")
BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "grid", "cloudy", "checked")
TINTS: tuple[str, ...] = tuple(TINT_PAINTS)

# Two colours of every shape and two shapes of every colour are seen only in the split `novel`.
HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (colour, SHAPES[(k + step) % len(SHAPES)]) for k, colour in enumerate(COLOURS) for step in (2, 6)
)
KNOWN_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_PAIRS
)


# ---- scenes ----


@dataclass(frozen=True)
class SceneObject:
    """One object. Its centre (x, y) and radius are fractions of the side, from the top left."""

    shape: str
    colour: str
    size: str
    surface: str
    x: float
    y: float
    radius: float
    angle: float  # degrees, a slight tilt

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a kind of background, its tint, and one to three objects of distinct pairs."""

    background: str
    tint: str
    objects: tuple[SceneObject, ...]


class _Spot(NamedTuple):
    x: float
    y: float
    radius: float


def relation(a: SceneObject | _Spot, b: SceneObject | _Spot) -> str | None:
    """Where `a` is as seen from `b`: "left", "right", "above" or "below"; None where that is open to doubt."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.6 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _place(sizes: list[str], rng: random.Random) -> list[_Spot]:
    """Where each object is: inside, apart, and each in a clear relation to an earlier one."""

    def spot(size: str) -> _Spot:
        r = round(rng.uniform(*_RADII[size]), 4)
        return _Spot(round(rng.uniform(r + 0.02, 0.98 - r), 4), round(rng.uniform(r + 0.02, 0.98 - r), 4), r)

    if len(sizes) == 1:  # in one of nine places, so that words can tell which
        x, y = (round(rng.choice((0.28, 0.5, 0.72)) + rng.uniform(-0.04, 0.04), 4) for _ in "xy")
        return [_Spot(x, y, spot(sizes[0]).radius)]
    while True:
        spots = [spot(size) for size in sizes]
        apart = all(math.dist(a[:2], b[:2]) > a.radius + b.radius for a, b in combinations(spots, 2))
        if apart and all(any(relation(a, b) for b in spots[:k]) for k, a in enumerate(spots) if k):
            return spots


def _sample_scene(novel: bool, rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3), weights=(15, 45, 40))[0]
    pairs = rng.sample(KNOWN_PAIRS, count)
    if novel:
        pairs[rng.randrange(count)] = rng.choice(HELD_OUT_PAIRS)
    sizes = [rng.choice(SIZES) for _ in pairs]
    objects = tuple(
        SceneObject(shape, colour, size, rng.choice(SURFACES), *spot, round(rng.uniform(-12, 12), 1))
        for (colour, shape), size, spot in zip(pairs, sizes, _place(sizes, rng), strict=True)
    )
    return Scene(rng.choice(BACKGROUNDS), rng.choice(TINTS), objects)


def _gist(scene: Scene) -> frozenset[tuple[str, ...]]:
    """What even the briefest caption tells: every pair; of a lone object its size and surface as well."""
    if len(scene.objects) == 1:
        (only,) = scene.objects
        return frozenset({(*only.pair, only.size, only.surface)})
    return frozenset(thing.pair for thing in scene.objects)


def _parts(gist: frozenset[tuple[str, ...]]) -> list[frozenset[tuple[str, ...]]]:
    return [gist] + ([frozenset(two) for two in combinations(sorted(gist), 2)] if len(gist) == 3 else [])


def wording(scene: Scene) -> tuple[Any, ...]:
    """All that words can tell of the scene, places apart."""
    return scene.background, scene.tint, frozenset((*o.pair, o.size, o.surface) for o in scene.objects)


def plan_split(split: str, count: int, seed: int) -> list[Scene]:
    """The scenes of a split; outside `train` no two that a caption cannot tell apart.

    A gist that another picture's gist contains is drawn again, so a brief caption of two objects does
    not fit a picture of three. In a split too large for that (thousands) only whole descriptions differ.
    """
    scenes: list[Scene] = []
    gists, parts, wordings = set(), set(), set()
    for index in range(count):
        for attempt in range(400):
            scene = _sample_scene(split == "novel", random.Random(f"{seed}/{split}/{index}/{attempt}"))
            gist, told = _gist(scene), wording(scene)
            clash = gist in parts or any(part in gists for part in _parts(gist))
            if split == "train" or not (clash if attempt < 200 else told in wordings):
                break
        else:
            raise LabError(f"num_{split}={count} is more than can be told apart; use fewer than {index}")
        scenes.append(scene)
        gists.add(gist)
        parts.update(_parts(gist))
        wordings.add(told)
    return scenes
