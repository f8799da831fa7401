"""How far a figure can be trusted: intervals, tests between runs, comparisons of settings.

Intervals and tests over images say what changes with other test images. Variation between training seeds is not
included: whether one *setting* is better than another is a question of seeds, see `compare_settings`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from core.errors import LabError
from retrieval.figures import query_values
from retrieval.ranks import QueryRanks, Ranks

TEST_IMAGES_ONLY = "test images only"
MIN_SEEDS = 3
CHUNK_BYTES = 64 << 20
RSUM = tuple(f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))


@dataclass(frozen=True)
class Interval:
    """A figure and both ends of the interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """First minus second, the interval of the difference, and whether it can be called a difference."""

    difference: float
    low: float  # NaN for settings with too few seeds
    high: float
    is_difference: bool
    p_value: float = float("nan")


# --- over images ---


def bootstrap_intervals(
    ranks: Ranks, names: Sequence[str], samples: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Percentile bootstrap intervals over images; queries are resampled, the gallery stays.

    An image is drawn with all its captions, because these are not independent.

    Args:
        ranks: of the full gallery.
        names: figures such as `i2t_recall@1`, `t2i_map`, `i2t_mrr`, or `rsum` (at 1, 5 and 10).
        samples: bootstrap samples; two thousand take about two seconds at 40,000 images.
        level: coverage, in (0, 1).
    Raises: LabError if a figure is not a mean over queries (a median has no entry here).
    Source: Efron & Tibshirani 1993, chapter 13.
    """
    figures = [_per_image(ranks, name) for name in names]
    num_images = figures[0][0].shape[1]
    values = [_mean(*figure, np.ones((1, num_images)))[0] for figure in figures]
    ends = bootstrap_ends(
        num_images, lambda drawn: np.stack([_mean(*each, drawn) for each in figures]), samples, level, seed
    )
    rows = zip(names, np.stack([values, *ends], axis=1).tolist(), strict=True)
    return {name: Interval(*row) for name, row in rows}


def paired_test(
    first: Ranks,
    second: Ranks,
    name: str = "i2t_recall@1",
    samples: int = 2000,
    permutations: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Whether two runs differ on the same gallery: bootstrap interval and permutation test over images.

    The permutation test swaps the two runs' results image by image; it is two-sided, and a difference
    is claimed where its p-value is below 1 - level.

    Args:
        name: a figure as in `bootstrap_intervals`.
        samples: bootstrap samples.
        permutations: of the test; the smallest p-value it can give is 2 / (permutations + 1).
    Raises: LabError if the two were not measured on the same images and captions.
    Source: Smucker, Allan & Carterette 2007.
    """
    _check_same_gallery(first, second)
    sums, counts = _per_image(first, name)
    sums = sums - _per_image(second, name)[0]
    low, high = bootstrap_ends(sums.shape[1], lambda drawn: _mean(sums, counts, drawn), samples, level, seed)
    gaps = (sums / counts.sum(1, keepdims=True)).sum(0)  # (images,)
    difference, rng = float(gaps.sum()), np.random.default_rng(seed)
    gaps = gaps[gaps != 0]  # equal results add nothing with either sign
    p_value = scipy.stats.monte_carlo_test(  # what permutation_test does of kind "samples", ten times faster
        gaps,
        lambda size: gaps * rng.choice((-1.0, 1.0), size),
        lambda signed, axis: signed.sum(axis),
        n_resamples=permutations,
        vectorized=True,
        batch=_batch(len(gaps)),
    ).pvalue
    return Comparison(difference, float(low), float(high), bool(p_value < 1 - level), float(p_value))


def bootstrap_ends(
    num_images: int,
    figures: Callable[[np.ndarray], np.ndarray],
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the percentile bootstrap interval over images of one or several figures.

    Args:
        figures: maps (B, images), how often each image is drawn, to (..., B) figures.
    Raises: LabError if the level is not in (0, 1).
    """
    _check_level(level)
    if num_images == 1:  # scipy refuses it: every sample is the image itself
        value = figures(np.ones((1, 1)))[..., 0]
        return value, value

    def of_drawn(images: np.ndarray, axis: int) -> np.ndarray:  # (B, images) indices of images
        places = images + num_images * np.arange(len(images))[:, None]
        counts = np.bincount(places.reshape(-1), minlength=places.size).reshape(places.shape)
        return figures(counts.astype(float))

    interval = scipy.stats.bootstrap(
        (np.arange(num_images),),
        of_drawn,
        n_resamples=samples,
        batch=_batch(num_images),
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return interval.low, interval.high


def _batch(columns: int) -> int:
    """Rows of float64 resampled at once, so that each array of them stays small."""
    return max(1, CHUNK_BYTES // (8 * max(columns, 1)))


def _per_image(ranks: Ranks, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(terms, images) each: what an image's queries add to a figure, in the order of ids, and their number.

    A figure is a mean over queries, and rsum the sum of six.
    """
    if name == "rsum":
        sums, counts = zip(*(_per_image(ranks, term) for term in RSUM), strict=True)
        return 100 * np.concatenate(sums), np.concatenate(counts)
    direction, _, figure = name.partition("_")
    if direction not in ("i2t", "t2i"):
        raise LabError(f"figure {name!r} names no direction; write i2t_{name}, t2i_{name} or rsum")
    one_way: QueryRanks = getattr(ranks, direction)
    _, image, counts = np.unique(one_way.image_id, return_inverse=True, return_counts=True)
    sums = np.bincount(image.reshape(-1), weights=query_values(one_way, figure))
    return sums[None], counts[None].astype(float)


def _mean(sums: np.ndarray, counts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(B,) the figure where images count as often as (B, images) `drawn` says."""
    return ((drawn @ sums.T) / (drawn @ counts.T)).sum(1)


def _check_same_gallery(first: Ranks, second: Ranks) -> None:
    for a, b in ((first.i2t, second.i2t), (first.t2i, second.t2i)):
        if a.gallery_size != b.gallery_size or sorted(a.image_id) != sorted(b.image_id):
            raise LabError(
                "the two runs were not measured on the same gallery; evaluate both on the same split and captions"
            )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise LabError(f"level is {level}, but a coverage is between 0 and 1, such as 0.95")


# --- over seeds ---


def compare_settings(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Comparison:
    """Whether a figure differs between two settings, from one value per seed.

    It is called a difference if both sides have at least three seeds and Welch's interval of the difference of means
    does not contain zero.

    Raises: LabError if a side is empty or contains NaN.
    Source: Welch 1947.
    """
    _check_level(level)
    one, other = (np.asarray(values, dtype=float) for values in (first, second))
    if any(len(side) == 0 or not np.isfinite(side).all() for side in (one, other)):
        raise LabError("a setting without values, or with NaN, cannot be compared; give one figure per seed")
    difference = float(one.mean() - other.mean())
    if min(len(one), len(other)) < MIN_SEEDS:
        low = high = float("nan")
    elif np.ptp(one) == np.ptp(other) == 0:  # scipy's interval would be NaN
        low = high = difference
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of seeds that are all equal on one side
            interval = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval(level)
        low, high = float(interval.low), float(interval.high)
    return Comparison(difference, low, high, bool(low > 0 or high < 0))
