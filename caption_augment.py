"""Variations of captions: words left out, clauses reordered, left and right swapped with a mirrored picture."""

from __future__ import annotations

import re

import numpy as np

SIDE = re.compile(r"\b(left|right)(most|hand|side|wards?)?\b", re.IGNORECASE)
CLAUSE_END = re.compile(r"\s*[,;.]\s+")
OTHER = {"left": "right", "right": "left"}


def speaks_of_sides(caption: str) -> bool:
    """Whether a caption names left or right, so that it is wrong of the mirrored picture."""
    return SIDE.search(caption) is not None


def swap_sides(caption: str) -> str:
    """The caption with left and right exchanged, as the mirrored picture would be told.

    >>> swap_sides("Left of it, the rightmost dog")
    'Right of it, the leftmost dog'
    """

    def other(found: re.Match[str]) -> str:
        side = OTHER[found[1].lower()]
        side = side.upper() if found[1].isupper() else side.title() if found[1][0].isupper() else side
        return side + (found[2] or "")

    return SIDE.sub(other, caption)


def drop_words(caption: str, probability: float, rng: np.random.Generator) -> str:
    """The caption without some of its words; words that name a side stay, and one word at least."""
    words = caption.split()
    kept = [
        word for word, draw in zip(words, rng.random(len(words)), strict=True)
        if draw >= probability or speaks_of_sides(word)
    ]  # fmt: skip
    return " ".join(kept or words[:1])


def reorder_clauses(caption: str, rng: np.random.Generator) -> str:
    """The clauses between commas, semicolons and full stops in another order.

    A caption that names a side is left as it is, for "to its left" means what was told before it.
    """
    end = caption[-1] if caption[-1:] in {".", "!"} else ""
    clauses = [part for part in CLAUSE_END.split(caption.removesuffix(end)) if part]
    if len(clauses) < 2 or speaks_of_sides(caption):
        return caption
    return ", ".join(clauses[place] for place in rng.permutation(len(clauses))) + end


def vary(
    caption: str, number: int, row: int, *, seed: int, word_dropout: float = 0.0, reorder: float = 0.0
) -> str:
    """Variation `number` of a caption: always the same one; number 0 is the caption itself.

    Args:
        row: the caption's row, so that equal captions vary each in its own way.
        seed: of the run.
        word_dropout: probability that a word is left out.
        reorder: probability that the clauses change places.
    """
    if number == 0:
        return caption
    rng = np.random.default_rng((seed, row, number))
    if rng.random() < reorder:
        caption = reorder_clauses(caption, rng)
    return drop_words(caption, word_dropout, rng) if word_dropout else caption


def variation_number(row: int, variations: int, *, seed: int, epoch: int) -> int:
    """Which of its variations, from 0, a caption shows in an epoch."""
    return int(np.random.default_rng((seed, epoch, row)).integers(variations))
