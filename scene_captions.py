"""Five captions of a scene in different wordings and detail, and captions with one thing swapped."""

from __future__ import annotations

import random
from functools import partial
from typing import NamedTuple

from scene_plan import HELD_OUT_PAIRS, Scene, SceneObject, relation

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
