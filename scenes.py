"""Generated scenes: captioned pictures of coloured shapes, written to disk in COCO 2014's layout.

A scene is a symbolic description first; picture, captions and labels are made from it, so what is
true of a picture is known exactly. Everything is a function of (seed, split, index).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm

from errors import LabError

GENERATOR_VERSION = 1  # raise it whenever the same settings would give other bytes
SPLITS: tuple[str, ...] = ("train", "val", "test", "novel")
IDS_PER_SPLIT = 1_000_000  # picture `index` of the n-th split, from 1, has the id n * IDS_PER_SPLIT + index

Point = tuple[float, float]
Colour = tuple[int, int, int]

_COLOURS: dict[str, Colour] = {
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
_TINTS: dict[str, Colour] = {
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
_OUTLINES: dict[str, list[Point]] = {
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
_HOLES: dict[str, list[Point]] = {"ring": _polar(range(0, 360, 8), 0.46)}

SHAPES: tuple[str, ...] = tuple(_OUTLINES)
COLOURS: tuple[str, ...] = tuple(_COLOURS)
SIZES: tuple[str, ...] = tuple(_RADII)
SURFACES: tuple[str, ...] = ("plain", "striped", "dotted")
BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "grid", "cloudy", "checked")
TINTS: tuple[str, ...] = tuple(_TINTS)

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


def _wording(scene: Scene) -> tuple[Any, ...]:
    """All that words can tell of the scene, places apart."""
    return scene.background, scene.tint, frozenset((*o.pair, o.size, o.surface) for o in scene.objects)


def _plan_split(split: str, count: int, seed: int) -> list[Scene]:
    """The scenes of a split; outside `train` no two that a caption cannot tell apart.

    A gist that another picture's gist contains is drawn again, so a brief caption of two objects does
    not fit a picture of three. In a split too large for that (thousands) only whole descriptions differ.
    """
    scenes: list[Scene] = []
    gists, parts, wordings = set(), set(), set()
    for index in range(count):
        for attempt in range(400):
            scene = _sample_scene(split == "novel", random.Random(f"{seed}/{split}/{index}/{attempt}"))
            gist, wording = _gist(scene), _wording(scene)
            clash = gist in parts or any(part in gists for part in _parts(gist))
            if split == "train" or not (clash if attempt < 200 else wording in wordings):
                break
        else:
            raise LabError(f"num_{split}={count} is more than can be told apart; use fewer than {index}")
        scenes.append(scene)
        gists.add(gist)
        parts.update(_parts(gist))
        wordings.add(wording)
    return scenes


# ---- captions ----

_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_SURFACE_WORDS = {"plain": ("plain",), "striped": ("striped",), "dotted": ("dotted", "spotted")}
_RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_SIDE_WORDS = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}
_BACKGROUND_WORDS = {
    "plain": "a plain {} background",
    "gradient": "a {} gradient",
    "grid": "a {} grid",
    "cloudy": "a cloudy {} background",
    "checked": "a {} checkerboard",
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_NUMBERS = {2: "two", 3: "three"}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun(thing: SceneObject, rng: random.Random, *, size: bool = False, surface: bool = False) -> str:
    """Such as "small striped red star", with the attributes asked for."""
    words = [rng.choice(_SIZE_WORDS[thing.size])] if size else []
    words += [rng.choice(_SURFACE_WORDS[thing.surface])] if surface else []
    return " ".join([*words, thing.colour, thing.shape])


def _ground(scene: Scene, full: bool) -> str:
    if full:
        return _BACKGROUND_WORDS[scene.background].format(scene.tint)
    return _with_article(f"{scene.tint} background")


def _spot(thing: SceneObject) -> str:
    """Where a lone object is, in words."""
    row = "top" if thing.y < 0.39 else "bottom" if thing.y > 0.61 else ""
    column = "left" if thing.x < 0.39 else "right" if thing.x > 0.61 else ""
    if row and column:
        return f"at the {row} {column}"
    if row:
        return f"at the {row}"
    return f"on the {column} side" if column else "in the middle"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _describe_one(scene: Scene, rng: random.Random) -> list[str]:
    (thing,) = scene.objects
    whole = partial(_noun, thing, rng, size=True, surface=True)
    spot, tint, full = _spot(thing), _ground(scene, False), _ground(scene, True)
    texts = [
        rng.choice(("just one {}", "a single {}", "{a} on its own", "nothing but {a}")),
        rng.choice(("a lone {} {spot}", "one {} {spot}, and nothing else")),
        rng.choice(("a single {} on {tint}", "{a} alone on {tint}")),
        rng.choice(("there is only {a} {spot}, on {tint}", "the only thing on {tint} is {a} {spot}")),
        rng.choice(("a single {} {spot} of the picture; behind it is {full}", "{full} with one {} {spot}")),
    ]
    nouns = [whole() for _ in texts]
    return [
        _sentence(text.format(noun, a=_with_article(noun), spot=spot, tint=tint, full=full))
        for text, noun in zip(texts, nouns, strict=True)
    ]


class _Link(NamedTuple):
    """An object, and where it is as seen from another."""

    a: SceneObject
    where: str
    b: SceneObject


def _links(scene: Scene) -> list[_Link]:
    """The clear relation of each object to an earlier one: one link for two objects, two for three."""
    links = []
    for k, thing in enumerate(scene.objects[1:], start=1):
        found = [(thing, relation(thing, other), other) for other in scene.objects[:k]]
        links.append(next(_Link(a, where, b) for a, where, b in found if where))
    return links


def _turned(link: _Link) -> _Link:
    return _Link(link.b, _OPPOSITE[link.where], link.a)


def _relate(links: list[_Link], rng: random.Random, verb: str = "", **detail: bool) -> str:
    """Such as "a red star is above a blue ring, and a pink heart is right of the ring"."""
    first = links[0] if rng.random() < 0.5 else _turned(links[0])
    a, b = (_with_article(_noun(thing, rng, **detail)) for thing in (first.a, first.b))
    if rng.random() < 0.7 or verb:
        text = f"{a} {verb}{rng.choice(_RELATION_WORDS[first.where])} {b}"
    else:
        text = f"{b} with {a} {_SIDE_WORDS[first.where]}"
    for link in links[1:]:
        c = _with_article(_noun(link.a, rng, **detail))
        text += f", and {c} {verb}{rng.choice(_RELATION_WORDS[link.where])} the {_noun(link.b, rng)}"
    return text


def _list(scene: Scene, rng: random.Random, **detail: bool) -> str:
    things = rng.sample(scene.objects, len(scene.objects))
    nouns = [_with_article(_noun(thing, rng, **detail)) for thing in things]
    return f"{', '.join(nouns[:-1])} and {nouns[-1]}"


def _describe_several(scene: Scene, rng: random.Random) -> list[str]:
    links, number = _links(scene), _NUMBERS[len(scene.objects)]
    tint, full = _ground(scene, False), _ground(scene, True)
    brief = _relate(links[:1], rng) if len(links) == 1 else _list(scene, rng)
    mixed = rng.choice(("size", "surface"))
    texts = [
        brief,
        rng.choice(("there is ", "a picture of ")) + _relate(links, rng),
        rng.choice((f"{number} shapes on {tint}: ", f"on {tint} there are {number} things: "))
        + _list(scene, rng, **{mixed: True}),
        _relate(links, rng, "is ", size=mixed != "size", surface=mixed != "surface"),
        _relate(links, rng, "is ", size=True, surface=True),
    ]
    texts[4] += f". Behind {'both' if number == 'two' else 'them'} is {full}"
    return [_sentence(text) for text in texts]


def describe(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions of a scene, from brief to full; every one names all its objects.

    Example: `describe(scene, random.Random(0))[0]` is such as "A red star left of an orange circle."
    """
    return (_describe_one if len(scene.objects) == 1 else _describe_several)(scene, rng)


class Swap(NamedTuple):
    """A caption that is true of a picture, and one of the same words that is false."""

    kind: str  # "relation" or "colour"
    right: str
    wrong: str


def swap_captions(scene: Scene) -> list[Swap]:
    """Right and wrong captions of the same words, for the first two objects of a scene.

    A wrong caption has the relation turned round ("relation") or the two colours exchanged ("colour").
    It is false of the scene, and never names a held-out pair, which would give it away as unfamiliar.

    Returns: at most two swaps; none for a scene of one object.
    """
    if len(scene.objects) == 1:
        return []
    a, where, b = _links(scene)[0]

    def told(colour_a: str, where: str, colour_b: str) -> str:
        first, second = (_with_article(f"{c} {o.shape}") for c, o in ((colour_a, a), (colour_b, b)))
        return _sentence(f"{first} is {_RELATION_WORDS[where][-1]} {second}")

    right = told(a.colour, where, b.colour)
    swaps = [Swap("relation", right, told(a.colour, _OPPOSITE[where], b.colour))]
    exchanged = {(b.colour, a.shape), (a.colour, b.shape)}
    shown = {thing.pair for thing in scene.objects}
    if not exchanged & (shown | set(HELD_OUT_PAIRS)):
        swaps.append(Swap("colour", right, told(b.colour, where, a.colour)))
    return swaps


# ---- pictures ----

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


def _turn(points: list[Point], thing: SceneObject, scale: float, x: float, y: float) -> list[Point]:
    c, s = math.cos(math.radians(thing.angle)) * scale, math.sin(math.radians(thing.angle)) * scale
    return [(x + c * px - s * py, y + s * px + c * py) for px, py in points]


def _draw_object(canvas: Image.Image, thing: SceneObject, rng: random.Random) -> None:
    side = canvas.width
    radius = thing.radius * side
    half = math.ceil(radius) + 3
    left, top = int(thing.x * side) - half, int(thing.y * side) - half
    n, k = 2 * half + 1, _OVERSAMPLING
    place = partial(
        _turn, thing=thing, scale=radius * k, x=(thing.x * side - left) * k, y=(thing.y * side - top) * k
    )
    colour = _mix(_COLOURS[thing.colour], (rng.randrange(256),) * 3, 0.05)
    paint, mask = Image.new("RGB", (n * k, n * k), colour), Image.new("L", (n * k, n * k))
    pen, cutter = ImageDraw.Draw(paint), ImageDraw.Draw(mask)
    if thing.surface in _SURFACE_PENS:
        period = max(0.056, 0.37 * thing.radius) * side * k
        _SURFACE_PENS[thing.surface](pen, n * k, period, _mix(colour, (255, 255, 255), 0.78), rng)
    edge = _mix(colour, (0, 0, 0), 0.38)
    for outline, inside in ((_OUTLINES[thing.shape], 255), (_HOLES.get(thing.shape), 0)):
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
    light = np.array(_TINTS[scene.tint], dtype=np.float32)
    dark = light * 0.8
    field = _field(scene.background, image_size, rng)[..., None].astype(np.float32)
    pixels = light + (dark - light) * field  # (side, side, 3)
    canvas = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    for thing in scene.objects:
        _draw_object(canvas, thing, rng)
    return canvas


# ---- COCO's layout on disk ----


def image_ids(split: str, count: int) -> range:
    """The ids of a split's pictures; no two splits share one."""
    start = (SPLITS.index(split) + 1) * IDS_PER_SPLIT
    return range(start, start + count)


def _file_name(split: str, image_id: int) -> str:
    return f"COCO_{split}2014_{image_id:012d}.jpg"


def _instance(image_id: int, number: int, thing: SceneObject, side: int) -> dict[str, Any]:
    """One object in COCO's words: its outline and box in pixels. A ring's hole counts as filled."""
    points = _turn(_OUTLINES[thing.shape], thing, thing.radius * side, thing.x * side, thing.y * side)
    xs, ys = np.array(points).T
    left, top, width, height = xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)
    area = abs(xs @ np.roll(ys, 1) - ys @ np.roll(xs, 1)) / 2
    return {
        "id": image_id * 10 + number,
        "image_id": image_id,
        "category_id": SHAPES.index(thing.shape) + 1,
        "bbox": [round(float(v), 2) for v in (left, top, width, height)],
        "segmentation": [[round(float(v), 1) for point in points for v in point]],
        "area": round(float(area), 2),
        "iscrowd": 0,
    }


def _annotations(split: str, scenes: list[Scene], seed: int, side: int) -> dict[str, Any]:
    """The split's annotation files by kind."""
    ids = image_ids(split, len(scenes))
    head = {
        "info": {
            "description": "Generated scenes of coloured shapes, in COCO 2014's layout",
            "version": str(GENERATOR_VERSION),
            "year": 2014,
        },
        "licenses": [{"id": 1, "name": "Public domain", "url": ""}],
        "images": [
            {"id": i, "file_name": _file_name(split, i), "height": side, "width": side, "license": 1}
            for i in ids
        ],
    }
    captions = [
        {"id": image_id * 10 + k, "image_id": image_id, "caption": text}
        for index, (image_id, scene) in enumerate(zip(ids, scenes, strict=True))
        for k, text in enumerate(describe(scene, random.Random(f"{seed}/{split}/{index}/captions")))
    ]
    instances = [
        _instance(image_id, k, thing, side)
        for image_id, scene in zip(ids, scenes, strict=True)
        for k, thing in enumerate(scene.objects)
    ]
    categories = [{"id": k, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES, start=1)]
    return {
        "captions": {**head, "annotations": captions},
        "instances": {**head, "categories": categories, "annotations": instances},
        "scenes": [{"image_id": i, **asdict(scene)} for i, scene in zip(ids, scenes, strict=True)],
    }


def load_scenes(folder: str | Path, split: str) -> dict[int, Scene]:
    """The symbolic scenes of a split ("train", "val", "test" or "novel") by image id.

    Raises: LabError if the folder holds none.
    """
    path = Path(folder) / "annotations" / f"scenes_{split}2014.json"
    if not path.is_file():
        raise LabError(f"{path} does not exist; make the set with write_scenes({str(folder)!r})")
    return {
        row["image_id"]: Scene(
            row["background"], row["tint"], tuple(SceneObject(**o) for o in row["objects"])
        )
        for row in json.loads(path.read_text(encoding="utf-8"))
    }


class _Job(NamedTuple):
    path: Path
    scene: Scene
    key: str
    side: int


def _draw_file(job: _Job) -> None:
    picture = draw(job.scene, random.Random(job.key), job.side)
    picture.save(job.path, quality=95, subsampling=0)  # chroma at full size: the shapes are small


def _draw_files(jobs: list[_Job], num_workers: int | None) -> None:
    """Draw by several processes; by default only on Linux, where they start at no cost."""
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1, len(jobs) // 64 + 1)
    bar = partial(tqdm, total=len(jobs), desc="drawing scenes", unit="picture", mininterval=0.5)
    if num_workers <= 1:
        for job in bar(jobs):
            _draw_file(job)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(num_workers) as pool:
        for _ in bar(pool.imap_unordered(_draw_file, jobs, chunksize=32)):
            pass


def _is_finished(folder: Path, settings: dict[str, int], counts: dict[str, int]) -> bool:
    """Whether the folder holds this very set, whole.

    Raises: LabError if it holds another set, or files that are none of ours.
    """
    marker, begun = folder / "scenes.json", folder / "scenes.unfinished.json"
    if not marker.is_file():
        others = [folder] if folder.is_file() else [path for path in _own_folders(folder) if path.exists()]
        if others and not begun.is_file():
            raise LabError(f"{others[0]} exists and was not made by write_scenes; choose another folder")
        return False
    found = json.loads(marker.read_text(encoding="utf-8"))
    if found != settings:
        other = sorted(key for key in settings if found.get(key) != settings[key])
        told = ", ".join(f"{key} {found.get(key)}, not {settings[key]}" for key in other)
        raise LabError(
            f"{folder} holds scenes of other settings ({told}); choose another folder or delete it"
        )
    return all(len(list((folder / f"{s}2014").glob("*.jpg"))) == count for s, count in counts.items())


def _own_folders(folder: Path) -> list[Path]:
    return [folder / name for name in ("annotations", *(f"{split}2014" for split in SPLITS))]


def write_scenes(
    folder: str | Path,
    *,
    num_train: int = 2000,
    num_val: int = 200,
    num_test: int = 500,
    num_novel: int = 500,
    image_size: int = 112,
    seed: int = 0,
    num_workers: int | None = None,
) -> Path:
    """Write the generated set to disk; a finished one is left as it is, an unfinished one made anew.

    `{split}2014/COCO_{split}2014_{id:012d}.jpg` are the pictures; beside them stand
    `annotations/captions_{split}2014.json` (five a picture, from brief to full), `instances_...`
    (categories are shapes) and `scenes_...` (what is shown, see `load_scenes`). Every picture of the
    split novel has a pair of `HELD_OUT_PAIRS`; no other picture has one.

    Args:
        folder: where to; made if need be.
        num_train, num_val, num_test, num_novel: pictures in each split.
        image_size: side in pixels.
        seed: decides everything; the number of workers decides nothing.
        num_workers: processes that draw; None for one a core (on Linux).
    Returns: the folder.
    Raises: LabError if the folder holds something else or a number is out of range.
    """
    folder = Path(folder)
    counts = dict(zip(SPLITS, (num_train, num_val, num_test, num_novel), strict=True))
    for name, value, least, most in (
        *((f"num_{split}", count, 1, IDS_PER_SPLIT) for split, count in counts.items()),
        ("image_size", image_size, 48, 1024),
    ):
        if not least <= value <= most:
            raise LabError(f"{name} is {value}; set it between {least} and {most}")
    settings = {f"num_{split}": count for split, count in counts.items()}
    settings |= {"image_size": image_size, "seed": seed, "generator_version": GENERATOR_VERSION}
    if _is_finished(folder, settings, counts):
        return folder
    begun = _begin(folder, settings)
    jobs = []
    for split, count in counts.items():
        scenes = _plan_split(split, count, seed)
        for kind, content in _annotations(split, scenes, seed, image_size).items():
            path = folder / "annotations" / f"{kind}_{split}2014.json"
            path.write_text(json.dumps(content), encoding="utf-8")
        for index, (image_id, scene) in enumerate(zip(image_ids(split, count), scenes, strict=True)):
            path = folder / f"{split}2014" / _file_name(split, image_id)
            jobs.append(_Job(path, scene, f"{seed}/{split}/{index}/pixels", image_size))
    _draw_files(jobs, num_workers)
    os.replace(begun, folder / "scenes.json")
    return folder


def _begin(folder: Path, settings: dict[str, int]) -> Path:
    """Clear what an earlier attempt left, and mark the folder as begun."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "scenes.unfinished.json"
    begun.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (folder / "scenes.json").unlink(missing_ok=True)
    for path in _own_folders(folder):
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
    return begun
