"""Hard negatives: captions of other images that are near an image and not true of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from config import Config
from core.errors import LabError
from retrieval.index import nearest_rows

SPARE = 8  # further candidates: some have the same meaning as a match
MOST_CANDIDATES = 1 << 16  # captions that one refresh searches; of a larger set another random part each time
SAME_PAIRS = 0.7  # share of common word pairs above which two captions count as the same
ARTICLES = frozenset({"a", "an", "the"})
NONE = -1  # no caption


def content_words(caption: str) -> list[str]:
    """The words of a caption in lower case, without articles."""
    return [word for word in re.findall(r"\w+", caption.lower()) if word not in ARTICLES]


def says_the_same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two captions, as `content_words`, are equal or share most of their pairs of adjacent words.

    Pairs and not words: "red star left of blue ring" and "blue ring left of red star" have the same words.
    """
    if one == other:
        return True
    first, second = (set(pairwise(words)) for words in (one, other))
    return len(first & second) >= SAME_PAIRS * max(1, len(first | second))


def mine_semantic(
    image_features: Tensor,
    text_features: Tensor,
    image_id: np.ndarray,
    text_id: np.ndarray,
    captions: Sequence[str],
    k: int,
    *,
    margin: float = 0.95,
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray:
    """Each image's k nearest captions of other images, without those that may be true of it.

    Left out are captions that mean the same as one of the image's own, and those whose score is above
    `margin` times that of its nearest own caption (NV-Retriever, Moreira et al. 2024).

    Args:
        image_features: (I, D); text_features: (T, D); L2-normalized.
        image_id: (I,); text_id: (T,); every image has a caption.
        captions: T texts.
        seed, epoch: decide which captions are searched where there are more than MOST_CANDIDATES.
    Returns: (I, k) rows of captions, nearest first; NONE where fewer are left.
    """
    rows = np.arange(len(text_id))
    if len(rows) > MOST_CANDIDATES:
        rows = np.sort(np.random.default_rng((seed, epoch)).permutation(rows)[:MOST_CANDIDATES])
    ceiling = margin * best_match(image_features, text_features, image_id, text_id)
    texts, ids = text_features[torch.from_numpy(rows)], torch.from_numpy(text_id[rows])
    _, nearest = nearest_rows(image_features, texts, k + SPARE, torch.from_numpy(image_id), ids, ceiling)
    candidates = np.where(nearest >= 0, rows[nearest], NONE)
    return first_that_differ(candidates, image_id, text_id, captions, k)


def best_match(
    image_features: Tensor, text_features: Tensor, image_id: np.ndarray, text_id: np.ndarray
) -> Tensor:
    """(I,) cosine of each image with the nearest of its own captions."""
    order = np.argsort(image_id)
    image = torch.from_numpy(order[np.searchsorted(image_id, text_id, sorter=order)])  # (T,)
    own = torch.cat(
        [
            (image_features[some] * text_features[part]).sum(dim=1)
            for some, part in zip(image.split(1 << 14), torch.arange(len(image)).split(1 << 14), strict=True)
        ]
    )
    return torch.full((len(image_id),), -1.0).scatter_reduce(0, image, own, "amax")


def mine_random(
    image_id: np.ndarray,
    text_id: np.ndarray,
    captions: Sequence[str],
    k: int,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray:
    """(I, k) rows of random captions of other images that differ from its own; see `mine_semantic`."""
    rng = np.random.default_rng((seed, epoch))
    drawn = rng.integers(len(text_id), size=(len(image_id), k + SPARE))
    drawn[text_id[drawn] == image_id[:, None]] = NONE
    return first_that_differ(drawn, image_id, text_id, captions, k)


def first_that_differ(
    candidates: np.ndarray, image_id: np.ndarray, text_id: np.ndarray, captions: Sequence[str], k: int
) -> np.ndarray:
    """(I, k) the first of each image's (I, C) candidates that differ from its own captions and from each other."""
    own_rows = captions_of(image_id, text_id)
    chosen = np.full((len(candidates), k), NONE)
    for image, rows in enumerate(candidates.tolist()):
        said = [content_words(captions[row]) for row in own_rows[image]]
        place = 0
        for row in rows:
            words = content_words(captions[row]) if row != NONE and place < k else []
            if words and not any(says_the_same(words, other) for other in said):
                chosen[image, place] = row
                place += 1
                said.append(words)
    return chosen


def captions_of(image_id: np.ndarray, text_id: np.ndarray) -> list[np.ndarray]:
    """Rows of each image's captions."""
    order = np.argsort(text_id, kind="stable")
    starts = np.searchsorted(text_id, image_id, sorter=order)
    ends = np.searchsorted(text_id, image_id, side="right", sorter=order)
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]


# --- bad input ---


def check_negatives(config: Config, images: int) -> None:
    """Raises: LabError if more negatives are asked for than there are training images."""
    others, in_batch = images - 1, min(config.batch_size, images) - 1
    if config.mining != "none" and config.num_mined > others:
        raise LabError(
            f"num_mined is {config.num_mined} but there are only {others} other training images; lower it."
        )
    if config.loss == "contrastive" and config.num_hard_negatives > in_batch:
        raise LabError(
            f"num_hard_negatives is {config.num_hard_negatives} but an image has only {in_batch} others in its "
            "batch; lower it, or raise batch_size."
        )
