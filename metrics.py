"""Every retrieval figure, made from one set of exact ranks (`ranks.py`).

Values are fractions in [0, 1], save ranks (1 is nearest) and rsum (percentage points). A query without
a match is left out of every average and counted as left out. A k over the gallery's size looks at the
whole gallery: recall is then 1, and so is the chance level beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import gammaln

from errors import LabError, choose, nearest
from ranks import IdList, QueryRanks, Ranks, as_ids, match_ranks


def retrieval_metrics(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_id: IdList,
    text_id: IdList,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Retrieval figures both ways over distinct images, beside chance; see `match_ranks`, `summarise`.

    >>> eye = torch.eye(3)
    >>> retrieval_metrics(eye, eye[[0, 0, 1, 2]], [7, 8, 9], [7, 7, 8, 9], ks=(1,))["t2i_recall@1"]
    1.0
    """
    return summarise(match_ranks(image_features, text_features, image_id, text_id), ks)


def summarise(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """All figures of one set of ranks, named `i2t_recall@1`, `t2i_median_rank`, ...

    Returns: for each direction `recall@k` and `chance@k` (expected of a random order) for every k,
        `ndcg@k` at the largest k, `median_rank`, `mean_rank` and `mrr` of the nearest match, `map`,
        `r_precision`, `num_queries`, `num_left_out` (queries without a match); and `rsum`, the sum of
        all recalls in percentage points, `num_images`, `num_texts`, `captions_per_image` (the mean
        over images that have any).
    Raises: LabError if a k is not a whole number from 1 on.
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
    figures["median_rank"] = median_rank(ranks)
    figures.update({f"chance@{k}": chance_at_k(ranks, k) for k in ks})
    figures.update(num_queries=ranks.num_queries, num_left_out=ranks.num_left_out)
    return figures


# ---- figures from ranks ----------------------------------------------------------------------------


def median_rank(ranks: QueryRanks) -> float:
    """Median over queries of the nearest match's rank; a half where an even number straddles two."""
    return float(np.median(ranks.best))


def chance_at_k(ranks: QueryRanks, k: int) -> float:
    """Expected Recall@K of a random order of this gallery, given each query's number of matches."""
    k, size = min(_whole(k), ranks.gallery_size), ranks.gallery_size
    counts, queries = np.unique(ranks.counts, return_counts=True)
    drawn = np.arange(k)
    misses = np.maximum(size - counts[:, None] - drawn, 0) / (size - drawn)  # (counts, k)
    return float(np.average(1 - misses.prod(1), weights=queries))


def query_values(ranks: QueryRanks, name: str) -> np.ndarray:
    """(Q,) one figure of every query, by name: `recall@5`, `ndcg@10`, `map`, `mrr`, ...

    Raises: LabError if there is no such figure or its k is not a whole number from 1 on.
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
        raise LabError(f"k is {k!r}, but must be a whole number from 1 on")
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
            f"Choose one of: {', '.join(DIRECTIONS)}; or add your own figure to metrics.DIRECTIONS."
        )
    return DIRECTIONS[kind]


# ---- recall as a function of the gallery's size ----------------------------------------------------


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
    return gammaln(total + 1) - gammaln(drawn + 1) - gammaln(total - drawn + 1)


# ---- protocols -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How a gallery is made from an evaluation set."""

    description: str
    num_images: int | None = None  # the set must hold exactly so many
    captions: int | None = None  # the first so many of each image; None for all
    folds: int = 1  # consecutive equal parts, each a gallery of its own; figures are their means


PROTOCOLS: Mapping[str, Protocol] = {
    "full": Protocol("every image and caption given"),
    "one_caption": Protocol("every image given, its first caption alone", captions=1),
    "coco_5k": Protocol("COCO Karpathy test, 5,000 images, five captions each", 5000, 5),
    "coco_1k_fivefold": Protocol(
        "COCO Karpathy test, mean of five galleries of 1,000 images, five captions each", 5000, 5, 5
    ),
    "flickr_1k": Protocol("Flickr30k Karpathy test, 1,000 images, five captions each", 1000, 5),
    "flickr8k_1k": Protocol("Flickr8k official test, 1,000 images, five captions each", 1000, 5),
}


def evaluate_protocol(
    name: str,
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_id: IdList,
    text_id: IdList,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float | str]:
    """`retrieval_metrics` under a named protocol of PROTOCOLS, with its name and description.

    Captions count in the order of their rows, folds in the order of the images' first rows. Folds and
    limits on captions leave out whatever has id -1. The mean over folds stands under each name.

    Raises: LabError if there is no such protocol or the set is not the one it is defined on.
    """
    protocol = choose(PROTOCOLS, name, "protocol")
    image_ids = as_ids(image_id, len(image_features), "image_id")
    text_ids = as_ids(text_id, len(text_features), "text_id")
    figures = [
        retrieval_metrics(
            image_features[images], text_features[texts], image_ids[images], text_ids[texts], ks
        )
        for images, texts in _galleries(name, protocol, image_ids, text_ids)
    ]
    columns = {key: [fold[key] for fold in figures] for key in figures[0]}
    means = {k: v[0] if len(set(v)) == 1 else float(np.mean(v)) for k, v in columns.items()}
    return {"protocol": name, "protocol_description": protocol.description, **means}


def _galleries(
    name: str, protocol: Protocol, image_id: np.ndarray, text_id: np.ndarray
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of images and of texts of each of the protocol's galleries."""
    if protocol.captions is None:
        return [(torch.arange(len(image_id)), torch.arange(len(text_id)))]
    ids, first = np.unique(image_id, return_index=True)
    rows = np.sort(first[ids != -1])
    position = _occurrence(text_id)
    kept = np.isin(text_id, image_id[rows]) & (position < protocol.captions)
    if protocol.num_images is not None:
        short = len(rows) * protocol.captions - np.count_nonzero(kept)
        if len(rows) != protocol.num_images or short:
            raise LabError(
                f"protocol {name!r} is {protocol.description}; this set holds {len(rows):,} images "
                f"and lacks {short:,} captions. Choose 'full' or 'one_caption'"
            )
    parts = np.array_split(rows, protocol.folds)
    texts = [np.flatnonzero(kept & np.isin(text_id, image_id[part])) for part in parts]
    return [(torch.from_numpy(part), torch.from_numpy(text)) for part, text in zip(parts, texts, strict=True)]


def _occurrence(ids: np.ndarray) -> np.ndarray:
    """For every row, how many rows before it have the same id."""
    order = np.argsort(ids, kind="stable")
    _, first, counts = np.unique(ids[order], return_index=True, return_counts=True)
    occurrence = np.empty(len(ids), dtype=np.int64)
    occurrence[order] = np.arange(len(ids)) - np.repeat(first, counts)
    return occurrence


@dataclass(frozen=True)
class Published:
    """One system's figures; recalls are at 1, 5 and 10, or at 1 alone."""

    system: str
    protocol: str  # a name in PROTOCOLS
    dataset: str
    num_images: int
    captions_per_image: int
    i2t: tuple[float, ...]
    t2i: tuple[float, ...]


# fmt: off
PUBLISHED: tuple[Published, ...] = (
    Published("ResNet50, frozen CLIP text (course labs)", "one_caption", "COCO val2014", 40_504, 1,
              (0.064, 0.178, 0.253), (0.093, 0.229, 0.314)),
    Published("ResNet50 with BatchNorm, frozen CLIP text (course labs)", "one_caption", "COCO val2014", 40_504, 1,
              (0.086, 0.218, 0.303), (0.118, 0.280, 0.371)),
    Published("CLIP ViT-B/32 zero-shot", "coco_5k", "COCO Karpathy test", 5_000, 5,
              (0.501, 0.750, 0.835), (0.304, 0.559, 0.669)),
    Published("LiT coco_B16B, trained on COCO alone", "coco_5k", "COCO test", 5_000, 5,
              (0.472,), (0.321,)),
    Published("VSE++ ResNet152", "coco_5k", "COCO Karpathy test", 5_000, 5,
              (0.413, 0.711, 0.812), (0.303, 0.594, 0.724)),
    Published("CLIP ViT-B/32 fine-tuned on COCO", "coco_5k", "COCO Karpathy test", 5_000, 5,
              (0.622, 0.856, 0.917), (0.469, 0.749, 0.836)),
    Published("VSE++ ResNet152", "flickr_1k", "Flickr30k test", 1_000, 5,
              (0.529, 0.805, 0.872), (0.396, 0.701, 0.795)),
    Published("CLIP ViT-B/32 zero-shot", "flickr_1k", "Flickr30k test", 1_000, 5,
              (0.789, 0.949, 0.982), (0.588, 0.836, 0.900)),
)
# fmt: on


def published_points(direction: str = "t2i", k: int = 1) -> list[tuple[str, int, float]]:
    """(system, gallery size in images, Recall@K) of every published system that reports this K."""
    place = choose({"1": 0, "5": 1, "10": 2}, str(k), "published k")
    read = choose({"i2t": lambda point: point.i2t, "t2i": lambda point: point.t2i}, direction, "direction")
    return [(p.system, p.num_images, read(p)[place]) for p in PUBLISHED if place < len(read(p))]
