"""What a generated scene is: shapes, positions, splits, captions, and captions made false."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from core.errors import LabError

# --- Scenes ---


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
_RADII = {"small": (0.115, 0.13), "large": (0.185, 0.205)}  # fractions of the image's side


# ---- shapes: outlines inside the unit circle, x to the right, y downwards ----


def _polar(degrees: Iterable[float], *radii: float) -> list[Point]:
    """Points at these angles, clockwise from the top; the radii alternate."""
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

# Two colors of every shape and two shapes of every color occur only in the split `novel`.
HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (colour, SHAPES[(k + step) % len(SHAPES)]) for k, colour in enumerate(COLOURS) for step in (2, 6)
)
KNOWN_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_PAIRS
)


# ---- scenes ----


@dataclass(frozen=True)
class SceneObject:
    """One object. Its center (x, y) and radius are fractions of the side, from the top left."""

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
    """What an image shows: a kind of background, its tint, and one to three objects of distinct pairs."""

    background: str
    tint: str
    objects: tuple[SceneObject, ...]


class _Spot(NamedTuple):
    x: float
    y: float
    radius: float


def relation(a: SceneObject | _Spot, b: SceneObject | _Spot) -> str | None:
    """Where `a` is as seen from `b`: "left", "right", "above" or "below"; None if that is ambiguous."""
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

    if len(sizes) == 1:  # in one of nine places that words can name
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
    """What even the briefest caption says: every pair; of a single object its size and surface as well."""
    if len(scene.objects) == 1:
        (only,) = scene.objects
        return frozenset({(*only.pair, only.size, only.surface)})
    return frozenset(thing.pair for thing in scene.objects)


def _parts(gist: frozenset[tuple[str, ...]]) -> list[frozenset[tuple[str, ...]]]:
    return [gist] + ([frozenset(two) for two in combinations(sorted(gist), 2)] if len(gist) == 3 else [])


def wording(scene: Scene) -> tuple[Any, ...]:
    """All that words can say about the scene, except positions."""
    return scene.background, scene.tint, frozenset((*o.pair, o.size, o.surface) for o in scene.objects)


def plan_split(split: str, count: int, seed: int) -> list[Scene]:
    """The scenes of a split; outside `train` a caption fits one scene only.

    A scene is drawn again if its gist is part of another scene's, so a brief caption of two objects does not fit an
    image of three. In a split too large for that (thousands) only full descriptions differ.
    """
    scenes: list[Scene] = []
    gists, parts, wordings = set(), set(), set()
    for index in range(count):
        for attempt in range(400):
            scene = _sample_scene(split == "novel", random.Random(f"{seed}/{split}/{index}/{attempt}"))
            gist, words = _gist(scene), wording(scene)
            clash = gist in parts or any(part in gists for part in _parts(gist))
            if split == "train" or not (clash if attempt < 200 else words in wordings):
                break
        else:
            raise LabError(
                f"num_{split}={count} is too large for captions that fit one image only; use fewer than {index}"
            )
        scenes.append(scene)
        gists.add(gist)
        parts.update(_parts(gist))
        wordings.add(words)
    return scenes


# --- Captions ---


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
    """Such as "small striped red star", with the given attributes."""
    words = [rng.choice(_SIZE_WORDS[thing.size])] if size else []
    words += [rng.choice(_SURFACE_WORDS[thing.surface])] if surface else []
    return " ".join([*words, thing.colour, thing.shape])


def _ground(scene: Scene, full: bool) -> str:
    if full:
        return _BACKGROUND_WORDS[scene.background].format(scene.tint)
    return _with_article(f"{scene.tint} background")


def _spot(thing: SceneObject) -> str:
    """Where a single object is, in words."""
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
        relations = [(thing, relation(thing, other), other) for other in scene.objects[:k]]
        links.append(next(_Link(a, where, b) for a, where, b in relations if where))
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
    """A caption that is true of an image, and one of the same words that is false."""

    kind: str  # "relation" or "colour"
    right: str
    wrong: str


def swap_captions(scene: Scene) -> list[Swap]:
    """Right and wrong captions of the same words, for the first two objects of a scene.

    A wrong caption has the opposite relation ("relation") or the two colors exchanged ("colour"). It is false of the
    scene, and never names a held-out pair, because a model could reject that as unfamiliar.

    Returns: at most two swaps; none for a scene of one object.
    """
    if len(scene.objects) == 1:
        return []
    a, where, b = _links(scene)[0]

    def sentence(colour_a: str, where: str, colour_b: str) -> str:
        first, second = (_with_article(f"{c} {o.shape}") for c, o in ((colour_a, a), (colour_b, b)))
        return _sentence(f"{first} is {_RELATION_WORDS[where][-1]} {second}")

    right = sentence(a.colour, where, b.colour)
    swaps = [Swap("relation", right, sentence(a.colour, _OPPOSITE[where], b.colour))]
    exchanged = {(b.colour, a.shape), (a.colour, b.shape)}
    shown = {thing.pair for thing in scene.objects}
    if not exchanged & (shown | set(HELD_OUT_PAIRS)):
        swaps.append(Swap("colour", right, sentence(b.colour, where, a.colour)))
    return swaps
