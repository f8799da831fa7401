"""Every retrieval figure, from one set of exact ranks (`ranks.py`), and the geometry of the features.

Values are fractions in [0, 1], except ranks (1 is nearest) and rsum (percentage points). A query without a match is
left out of every mean and counted as left out. Where k is larger than the gallery, recall and its chance level are 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from core.errors import LabError, choose, nearest
from retrieval.ranks import QueryRanks, Ranks


def summarise(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """All figures of one set of ranks, named `i2t_recall@1`, `t2i_median_rank`, ...

    Returns: for each direction `recall@k` and `chance@k` (expected of a random order) for every k,
        `ndcg@k` at the largest k, `median_rank`, `mean_rank` and `mrr` of the nearest match, `map`,
        `r_precision`, `num_queries`, `num_left_out` (queries without a match); and `rsum`, the sum of
        all recalls in percentage points, `num_images`, `num_texts`, `captions_per_image` (the mean
        over images that have any).
    Raises: LabError if a k is not a whole number of at least 1.
    """
    figures: dict[str, float] = {}
    for direction in ("i2t", "t2i"):
        one_way = _summarise_direction(getattr(ranks, direction), ks)
        figures.update({f"{direction}_{name}": value for name, value in one_way.items()})
    recalls = [figures[f"{way}_recall@{k}"] for way in ("i2t", "t2i") for k in dict.fromkeys(ks)]
    figures["rsum"] = 100 * sum(recalls)
    figures["num_images"] = ranks.num_images
    figures["num_texts"] = ranks.num_texts
    figures["captions_per_image"] = float(ranks.i2t.counts.mean())
    return figures


def _summarise_direction(ranks: QueryRanks, ks: Sequence[int]) -> dict[str, float]:
    if not ks:
        raise LabError("ks is empty; name at least one k, such as ks=(1, 5, 10)")
    names = [f"recall@{k}" for k in ks] + [f"ndcg@{max(ks)}", "mean_rank", "mrr", "map", "r_precision"]
    figures = {name: float(query_values(ranks, name).mean()) for name in names}
    figures["median_rank"] = float(np.median(ranks.best))
    figures.update({f"chance@{k}": chance_at_k(ranks, k) for k in ks})
    figures.update(num_queries=ranks.num_queries, num_left_out=ranks.num_left_out)
    return figures


# --- figures from ranks ---


def chance_at_k(ranks: QueryRanks, k: int) -> float:
    """Expected Recall@K of a random order of this gallery, given each query's number of matches."""
    counts, queries = np.unique(ranks.counts, return_counts=True)
    return float(np.average(chance(counts, ranks.gallery_size, _whole(k)), weights=queries))


def chance(matches: np.ndarray, size: int, k: int) -> np.ndarray:
    """Probability that a random order of `size` items puts one of so many matches among the first k."""
    drawn = np.arange(min(k, size))
    misses = np.maximum(size - np.asarray(matches)[..., None] - drawn, 0) / (size - drawn)  # (..., k)
    return 1 - misses.prod(-1)


def query_values(ranks: QueryRanks, name: str) -> np.ndarray:
    """(Q,) one figure of every query, by name: `recall@5`, `ndcg@10`, `map`, `mrr`, ...

    Raises: LabError if there is no such figure or its k is not a whole number of at least 1.
    """
    kind, _, k = name.partition("@")
    if k:
        return choose(AT_K, kind, "figure at k")(ranks, _whole(k))
    return choose(PER_QUERY, kind, "figure")(ranks)


def _whole(k: int | str) -> int:
    try:
        number = int(str(k))
    except ValueError:
        number = 0
    if number < 1:
        raise LabError(f"k is {k!r}, but must be a whole number of at least 1")
    return number


def _per_query(ranks: QueryRanks, gains: np.ndarray) -> np.ndarray:
    """(Q,) sums over each query's matches of (M,) gains."""
    return np.add.reduceat(gains, ranks.offsets[:-1])


def _ndcg(ranks: QueryRanks, k: int) -> np.ndarray:
    gain = np.where(ranks.values <= k, 1 / np.log2(ranks.values + 1.0), 0.0)
    ideal = np.cumsum(1 / np.log2(np.arange(2.0, min(k, int(ranks.counts.max())) + 2)))
    return _per_query(ranks, gain) / ideal[np.minimum(ranks.counts, k) - 1]


def _average_precision(ranks: QueryRanks) -> np.ndarray:
    return _per_query(ranks, ranks.slots / ranks.values) / ranks.counts


def _r_precision(ranks: QueryRanks) -> np.ndarray:
    inside = ranks.values <= np.repeat(ranks.counts, ranks.counts)
    return _per_query(ranks, inside.astype(float)) / ranks.counts


AT_K: Mapping[str, Callable[[QueryRanks, int], np.ndarray]] = {
    "recall": lambda ranks, k: (ranks.best <= k).astype(float),
    "ndcg": _ndcg,
}
PER_QUERY: Mapping[str, Callable[[QueryRanks], np.ndarray]] = {
    "mean_rank": lambda ranks: ranks.best.astype(float),
    "mrr": lambda ranks: 1 / ranks.best,
    "map": _average_precision,
    "r_precision": _r_precision,
}


DIRECTIONS: dict[str, int] = {
    **dict.fromkeys([*AT_K, "mrr", "map", "r_precision", "rsum", "image_spread", "text_spread"], 1),
    **dict.fromkeys(["top1", "top10", "top100", "top1_same", "top1_different", "order"], 1),
    **dict.fromkeys(["val_loss", "mean_rank", "median_rank", "swapped"], -1),
    **dict.fromkeys(["modality_gap", "alignment", "image_uniformity", "text_uniformity"], -1),
}
"""Which way is better: 1 higher, -1 lower. Names without `i2t_`, `t2i_` and `@k`; figures that are neither, such as
counts and chance levels, are not listed."""


def direction(metric: str) -> int:
    """1 where a higher figure is better, -1 where a lower one is. Raises: LabError where neither is."""
    kind = re.sub(r"^(i2t|t2i)_|@\d+$", "", metric)
    if kind not in DIRECTIONS:
        hint = nearest(metric, [metric.replace(kind, known) for known in DIRECTIONS]) or "."
        raise LabError(
            f"best_metric {metric!r} cannot choose an epoch: neither higher nor lower is known to be better{hint} "
            f"Choose one of: {', '.join(DIRECTIONS)}; or add your own figure to retrieval.figures.DIRECTIONS."
        )
    return DIRECTIONS[kind]


# --- recall as a function of the gallery's size ---


def recall_by_gallery_size(ranks: Ranks, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """Expected Recall@1 if only some images, drawn at random with all their captions, were the gallery.

    Exact both ways and without features: a query of a drawn image hits if none of the r other images
    that rank before its nearest match (`QueryRanks.closer`) is drawn too. Of n images, that has the
    probability C(n - 1 - r, size - 1) / C(n - 1, size - 1).

    Args:
        ranks: of the full gallery, every caption's image in it.
        sizes: numbers of images, from 1 to the full gallery's.
    Returns: `sizes`, `i2t` and `t2i`, each (S,).
    Raises: LabError if a size is out of range, or captions without an image are in the gallery.
    """
    others = ranks.num_images - 1
    if ranks.t2i.num_left_out:
        raise LabError(
            f"{ranks.t2i.num_left_out} captions belong to no image of the gallery; "
            "leave them out before drawing recall over gallery size"
        )
    if not len(sizes) or any(not 1 <= size <= others + 1 for size in sizes):
        raise LabError(f"name gallery sizes between 1 and {others + 1} images; got {list(sizes)}")
    drawn = np.asarray(sizes)[:, None] - 1  # (S, 1) other images in the gallery

    def mean_hits(closer: np.ndarray) -> np.ndarray:
        count, queries = np.unique(closer, return_counts=True)
        hits = np.exp(_log_choose(others - count, drawn) - _log_choose(others, drawn))  # (S, counts)
        return hits @ queries / len(closer)

    curves = {"i2t": mean_hits(ranks.i2t.closer), "t2i": mean_hits(ranks.t2i.closer)}
    return {"sizes": np.asarray(sizes), **curves}


def _log_choose(total: np.ndarray | int, drawn: np.ndarray) -> np.ndarray:
    """Logarithm of the binomial coefficient; gammaln's poles make the impossible minus infinity."""
    gammaln = scipy.special.gammaln  # imported at its first use
    return gammaln(total + 1) - gammaln(drawn + 1) - gammaln(total - drawn + 1)


MEASURES = ("modality_gap", "alignment", "image_uniformity", "text_uniformity")
"""What `feature_geometry` gives; columns of a run's history."""


def feature_spread(features: Tensor) -> float:
    """1 - the mean cosine between rows of normalized features (N, D): 0 where all are one, near 1 at best."""
    return 1 - features.float().mean(dim=0).square().sum().item()


def unit_rows(features: Any, name: str) -> np.ndarray:
    """(N, D) features on the unit sphere."""
    rows = torch.as_tensor(features).detach().cpu()
    if rows.ndim != 2 or not len(rows) or not rows.isfinite().all():
        raise LabError(f"{name} must be finite numbers of shape (N, D); got shape {tuple(rows.shape)}.")
    rows = rows.float() if rows.dtype != torch.float64 else rows
    return torch.nn.functional.normalize(rows, dim=1).numpy()


def modality_gap_size(image_features: Any, text_features: Any) -> float:
    """Distance between the mean image feature and the mean text feature, 0 to 2.

    Args: (I, D) and (T, D) features, normalized here.
    Source: Liang et al. 2022, "Mind the Gap", the difference between the two modalities' centers.
    """
    image_mean = unit_rows(image_features, "image_features").mean(axis=0)
    text_mean = unit_rows(text_features, "text_features").mean(axis=0)
    return float(np.linalg.norm(image_mean - text_mean))


def alignment(image_features: Any, text_features: Any, image_id: Any, text_id: Any) -> float:
    """Mean squared distance of matching pairs, 0 to 4: the lower, the closer.

    Args: (I, D) and (T, D) features, normalized here; (I,) and (T,) ids, equal ids match, -1 never does.
    Raises: LabError if nothing matches.
    Source: Wang & Isola 2020, section 4.1, alpha = 2.
    """
    ids = [torch.as_tensor(each).cpu().numpy() for each in (image_id, text_id)]
    shared = np.intersect1d(ids[0], ids[1])
    shared = shared[shared != -1]
    if not len(shared):
        raise LabError("no image and text share an id; alignment needs matching pairs.")
    sums, counts = [], []  # per id, since the products of all its pairs sum to the product of two sums
    for features, own, name in zip((image_features, text_features), ids, ("image", "text"), strict=True):
        chosen = np.isin(own, shared)
        places = np.searchsorted(shared, own[chosen])
        rows = torch.from_numpy(unit_rows(features, f"{name}_features")[chosen]).double()
        sums.append(
            torch.zeros(len(shared), rows.shape[1]).double().index_add(0, torch.from_numpy(places), rows)
        )
        counts.append(np.bincount(places))
    return float(2 - 2 * (sums[0] * sums[1]).sum().item() / (counts[0] * counts[1]).sum())


def uniformity(features: Any, chunk: int = 1024) -> float:
    """Log of the mean Gaussian potential of all pairs of rows, at most 0: the lower, the more spread out.

    Args: (N, D) features, normalized here, N > 1; takes N^2 D operations in memory N * chunk.
    Source: Wang & Isola 2020, section 4.1, t = 2.
    """
    rows = unit_rows(features, "features")
    if len(rows) < 2:
        raise LabError("uniformity needs at least two rows of features.")
    total = 0.0
    for start in range(0, len(rows), chunk):
        cosine = rows[start : start + chunk] @ rows.T  # (chunk, N)
        total += float(np.exp(4 * np.minimum(cosine, 1) - 4, dtype=np.float32).sum(dtype=np.float64))
    return float(np.log((total - len(rows)) / (len(rows) * (len(rows) - 1))))


def feature_geometry(
    image_features: Any, text_features: Any, image_id: Any, text_id: Any, most: int | None = None
) -> dict[str, float]:
    """Gap, alignment, and uniformity of both modalities.

    Args:
        most: compute uniformity, whose cost is the square of the rows, from at most so many evenly spaced rows;
            None: from all.
    """
    figures = {
        "modality_gap": modality_gap_size(image_features, text_features),
        "alignment": alignment(image_features, text_features, image_id, text_id),
    }
    for side, rows in (("image", image_features), ("text", text_features)):
        spread = rows[:: -(-len(rows) // (most or len(rows)))]
        figures[f"{side}_uniformity"] = uniformity(spread) if len(spread) > 1 else math.nan
    return figures
