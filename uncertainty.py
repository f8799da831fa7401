"""How far a figure can be trusted: intervals, tests between runs, verdicts between settings.

Intervals and tests over images answer one question: what if other test images had been drawn? They
say nothing about another seed's training, and are labelled so. Whether a *setting* is better than
another is a question of seeds: `compare_settings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit
from tqdm.auto import tqdm

from errors import LabError
from metrics import query_values
from ranks import QueryRanks, Ranks

TEST_SAMPLE_ONLY = "test sample only"
MIN_SEEDS = 3
CHUNK_BYTES = 64 << 20
RSUM = tuple(f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))


@dataclass(frozen=True)
class Interval:
    """A figure and the interval around it; `label` says what was varied."""

    value: float
    low: float
    high: float
    level: float = 0.95
    label: str = TEST_SAMPLE_ONLY


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same gallery: first minus second, its interval, and whether it is a difference."""

    difference: float
    low: float
    high: float
    p_value: float
    is_difference: bool
    level: float = 0.95
    label: str = TEST_SAMPLE_ONLY


@dataclass(frozen=True)
class SettingsComparison:
    """Two settings over their seeds: means, spreads, first minus second, and the verdict."""

    means: tuple[float, float]
    spreads: tuple[float, float]  # sample standard deviations; NaN for a single seed
    num_seeds: tuple[int, int]
    difference: float
    low: float  # NaN where no difference can be claimed for want of seeds
    high: float
    is_difference: bool
    verdict: str


# ---- over images -----------------------------------------------------------------------------------


def bootstrap_interval(
    ranks: Ranks, name: str = "i2t_recall@1", samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of one figure; see `bootstrap_intervals`."""
    return bootstrap_intervals(ranks, [name], samples, level, seed)[name]


def bootstrap_intervals(
    ranks: Ranks, names: Sequence[str], samples: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Percentile bootstrap intervals over images; the gallery stays, the queries are drawn anew.

    An image is drawn with all its captions, since captions of one image hit and miss together.

    Args:
        ranks: of the full gallery.
        names: figures such as `i2t_recall@1`, `t2i_map`, `i2t_mrr`, or `rsum` (at 1, 5 and 10).
        samples: bootstrap samples; two thousand take about a second at 40,000 images.
        level: coverage, in (0, 1).
    Raises: LabError if a figure is not a mean over queries (a median has no entry here).
    Source: Efron & Tibshirani 1993, chapter 13.
    """
    _check_level(level)
    tables = [_Sums.of(ranks, name) for name in names]
    draws = np.concatenate(
        [
            np.stack([table.estimate(weights) for table in tables], 1)
            for weights in _resampled(tables[0].num_images, samples, seed)
        ]
    )  # (samples, names)
    ends = np.quantile(draws, _tails(level), axis=0)
    values = [float(table.estimate(np.ones((1, table.num_images)))[0]) for table in tables]
    return {
        name: Interval(value, float(low), float(high), level)
        for name, value, low, high in zip(names, values, *ends, strict=True)
    }


def paired_test(
    first: Ranks,
    second: Ranks,
    name: str = "i2t_recall@1",
    samples: int = 2000,
    permutations: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Whether two runs differ on the same gallery: bootstrap interval and permutation test over images.

    The permutation test swaps the two runs' results image by image; it is two-sided, and a difference
    is claimed where its p-value is below 1 - level.

    Args:
        name: a figure as in `bootstrap_intervals`.
        samples: bootstrap samples.
        permutations: of the test; the smallest p-value it can give is 1 / (permutations + 1).
    Raises: LabError if the two were not measured on the same images and captions.
    Source: Smucker, Allan & Carterette 2007.
    """
    _check_level(level)
    _check_same_gallery(first, second)
    ours, theirs = _Sums.of(first, name), _Sums.of(second, name)
    gaps = ours.contributions() - theirs.contributions()  # (images,)
    difference = float(gaps.sum())
    draws = np.concatenate(
        [ours.estimate(w) - theirs.estimate(w) for w in _resampled(ours.num_images, samples, seed)]
    )
    low, high = np.quantile(draws, _tails(level))
    p_value = _permutation_p(gaps, permutations, seed)
    return PairedTest(difference, float(low), float(high), p_value, p_value < 1 - level, level)


@dataclass(frozen=True)
class _Sums:
    """A figure as a sum of ratios: per image, what its queries add to each and how many they are."""

    sums: np.ndarray  # (terms, images)
    counts: np.ndarray  # (terms, images)

    @classmethod
    def of(cls, ranks: Ranks, name: str) -> _Sums:
        if name == "rsum":
            sums, counts = zip(*(_per_image(ranks, term) for term in RSUM), strict=True)
            return cls(100 * np.stack(sums), np.stack(counts))
        total, count = _per_image(ranks, name)
        return cls(total[None], count[None])

    @property
    def num_images(self) -> int:
        return self.sums.shape[1]

    def estimate(self, weights: np.ndarray) -> np.ndarray:
        """(B,) the figure when images count as in (B, images) `weights`."""
        return ((weights @ self.sums.T) / (weights @ self.counts.T)).sum(1)

    def contributions(self) -> np.ndarray:
        """(images,) what each image adds to the figure."""
        return (self.sums / self.counts.sum(1, keepdims=True)).sum(0)


def _per_image(ranks: Ranks, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Per image, in the order of ids: the sum of a figure over its queries, and their number."""
    direction, _, figure = name.partition("_")
    if direction not in ("i2t", "t2i"):
        raise LabError(f"figure {name!r} names no direction; write i2t_{name}, t2i_{name} or rsum")
    one_way: QueryRanks = getattr(ranks, direction)
    _, image = np.unique(one_way.image_id, return_inverse=True)
    image = image.reshape(-1)
    sums = np.bincount(image, weights=query_values(one_way, figure))
    return sums, np.bincount(image).astype(float)


def _resampled(num_images: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """(B, images) how often each image is drawn, until `samples` rows are out."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(samples, num_images, "resampling"):
        drawn = rng.integers(num_images, size=(rows, num_images)) + num_images * np.arange(rows)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=rows * num_images).reshape(rows, -1).astype(float)


def _permutation_p(gaps: np.ndarray, permutations: int, seed: int) -> float:
    """Two-sided p-value of sum(gaps) when every gap's sign is a coin's.

    Images with equal gaps toss their coins together: their sum is binomial.
    """
    rng = np.random.default_rng(seed)
    sizes, images = np.unique(np.abs(gaps[gaps != 0]).round(15), return_counts=True)
    extreme = 0
    for rows in _chunks(permutations, len(sizes), "permuting"):
        heads = rng.binomial(images, 0.5, size=(rows, len(sizes)))
        sums = (2 * heads - images) @ sizes
        extreme += int((np.abs(sums) >= abs(gaps.sum()) * (1 - 1e-9)).sum())
    return (extreme + 1) / (permutations + 1)


def _chunks(rows: int, columns: int, what: str) -> Iterator[int]:
    """Heights of the parts of a (rows, columns) table that each fit in memory."""
    height = max(1, CHUNK_BYTES // (8 * max(columns, 1)))
    for start in tqdm(range(0, rows, height), what, delay=2, leave=False):
        yield min(height, rows - start)


def _check_same_gallery(first: Ranks, second: Ranks) -> None:
    pairs = [(first.i2t, second.i2t), (first.t2i, second.t2i)]
    same = all(
        a.gallery_size == b.gallery_size and np.array_equal(np.sort(a.image_id), np.sort(b.image_id))
        for a, b in pairs
    )
    if not same:
        raise LabError(
            "the two runs were not measured on the same gallery; evaluate both on the same split and captions"
        )


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise LabError(f"level is {level}, but a coverage lies between 0 and 1, such as 0.95")


# ---- over seeds ------------------------------------------------------------------------------------


def compare_settings(
    first: Sequence[float],
    second: Sequence[float],
    names: tuple[str, str] = ("first", "second"),
    level: float = 0.95,
) -> SettingsComparison:
    """Whether a figure differs between two settings, from one value for each seed.

    A difference is claimed only with at least three seeds on both sides, and only where Welch's
    interval of the difference of means leaves out zero.

    Raises: LabError if a side is empty or holds NaN.
    Source: Welch 1947.
    """
    _check_level(level)
    sides = [np.asarray(values, dtype=float) for values in (first, second)]
    if any(len(side) == 0 or not np.isfinite(side).all() for side in sides):
        raise LabError("a setting without values, or with NaN, cannot be compared; give one figure a seed")
    means = [float(side.mean()) for side in sides]
    spreads = [float(side.std(ddof=1)) if len(side) > 1 else float("nan") for side in sides]
    counts = [len(side) for side in sides]
    low = high = float("nan")
    if min(counts) >= MIN_SEEDS:
        low, high = _welch(means, spreads, counts, level)
    is_difference = bool(low > 0 or high < 0)
    return SettingsComparison(
        (means[0], means[1]),
        (spreads[0], spreads[1]),
        (counts[0], counts[1]),
        means[0] - means[1],
        low,
        high,
        is_difference,
        _verdict(means, counts, names, is_difference, level),
    )


def _welch(
    means: Sequence[float], spreads: Sequence[float], counts: Sequence[int], level: float
) -> tuple[float, float]:
    squares = [spread**2 / count for spread, count in zip(spreads, counts, strict=True)]
    error, gap = sum(squares) ** 0.5, means[0] - means[1]
    if error == 0:
        return gap, gap
    freedom = error**4 / sum(square**2 / (count - 1) for square, count in zip(squares, counts, strict=True))
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    return gap - reach, gap + reach


def _verdict(
    means: Sequence[float], counts: Sequence[int], names: tuple[str, str], is_difference: bool, level: float
) -> str:
    if min(counts) < MIN_SEEDS:
        return f"not claimed: {min(counts)} of at least {MIN_SEEDS} seeds a setting"
    if not is_difference:
        return f"no difference at {level:.0%} over {min(counts)} seeds or more"
    better, worse = names if means[0] > means[1] else names[::-1]
    return f"{better} above {worse} at {level:.0%} over {min(counts)} seeds or more"
