"""Scoring rules that correct hubs, items that are near to very many queries, without training.

Each rule subtracts a bias from an item's scores, measured with a bank of reference queries: captions of training images
for a gallery of images, training images for a gallery of captions. The parameters are chosen on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy
import torch
from torch import Tensor

from core.errors import LabError, choose
from retrieval.figures import query_values
from retrieval.index import SCORES_AT_ONCE, nearest_rows
from retrieval.ranks import IdList, QueryRanks, full_float32, match_ranks

Parameters = dict[str, float]


@dataclass(frozen=True)
class Correction:
    """What a rule changes about the scores of N gallery items.

    Args:
        bias: (N,) float32, subtracted from the cosine similarities.
        hubs: (N,) whether a query that has this item as its nearest is corrected; None: every query is.
    """

    bias: Tensor
    hubs: Tensor | None = None

    def extended(self, queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, D + 1) and (N, D + 1) features whose inner products are the corrected scores."""
        corrected = torch.ones(len(queries), 1)
        if self.hubs is not None:
            corrected = self.hubs[nearest_rows(queries, gallery, 1)[1]].float()  # (Q, 1)
        return torch.cat([queries, corrected], 1), torch.cat([gallery, -self.bias[:, None]], 1)


def nnn(gallery: Tensor, bank: Tensor, settings: Sequence[Parameters]) -> list[Correction]:
    """Nearest Neighbor Normalization: the bias is alpha times the mean of an item's k highest scores.

    Args: gallery: (N, D); bank: (B, D), both normalized; settings: `k` and `alpha` of each correction.
    Source: Chowdhury et al. 2024, arXiv 2410.24114.
    """
    items, place = gallery.unique(dim=0, return_inverse=True)  # equal items get equal bits
    highest = nearest_rows(items, bank, int(max(each["k"] for each in settings)))[0]  # (N, k), falling
    return [Correction(each["alpha"] * highest[:, : int(each["k"])].mean(1)[place]) for each in settings]


def qb_norm(gallery: Tensor, bank: Tensor, settings: Sequence[Parameters]) -> list[Correction]:
    """QB-Norm: softmax over the bank, for queries whose nearest item is nearest to a bank query too.

    The dynamic inverted softmax orders by exp(beta s) / sum over the bank of exp(beta s'); its logarithm divided by
    beta is the similarity minus a bias.

    Args: gallery: (N, D); bank: (B, D), both normalized; settings: `beta` of each correction.
    Source: Bogolin et al. 2022, section 3.3, with the nearest item alone in the activation set.
    """
    items, place = gallery.unique(dim=0, return_inverse=True)
    betas, sums = [each["beta"] for each in settings], []
    with full_float32(), torch.no_grad():
        for part in items.split(max(1, SCORES_AT_ONCE // len(bank))):
            scores = part @ bank.T  # (n, B)
            sums.append(torch.stack([(beta * scores).logsumexp(1) / beta for beta in betas]))
    hubs = torch.zeros(len(items), dtype=torch.bool)
    hubs[nearest_rows(bank, items, 1)[1].flatten()] = True
    return [Correction(bias[place], hubs[place]) for bias in torch.cat(sums, dim=1)]


@dataclass(frozen=True)
class Rule:
    """A scoring rule, its name in tables, and the parameter values that are tried on validation data."""

    label: str
    correct: Callable[[Tensor, Tensor, Sequence[Parameters]], list[Correction]]
    grid: Mapping[str, tuple[float, ...]]

    def settings(self, bank_size: int) -> list[Parameters]:
        """Every combination of the grid; a k above the size of the bank is left out."""
        values = [dict(zip(self.grid, each, strict=True)) for each in product(*self.grid.values())]
        return [each for each in values if each.get("k", 1) <= bank_size]


RULES: Mapping[str, Rule] = {
    "nnn": Rule("NNN", nnn, {"k": (1, 4, 16, 64, 256), "alpha": (0.25, 0.5, 0.75, 1.0)}),
    "qb_norm": Rule("QB-Norm", qb_norm, {"beta": (5, 10, 20, 40, 80)}),
}


def corrected_ranks(
    way: str,
    correction: Correction,
    image_features: Tensor,
    text_features: Tensor,
    image_id: IdList,
    text_id: IdList,
) -> QueryRanks:
    """`match_ranks` in one direction by corrected scores, exact and with ties as there.

    Args:
        way: "i2t", corrected for the texts, or "t2i", corrected for the images.
        image_features: (I, D), every image once.
    """
    if way == "i2t":
        images, texts = correction.extended(image_features, text_features)
    else:
        texts, images = correction.extended(text_features, image_features)
    ranks: QueryRanks = getattr(match_ranks(images, texts, image_id, text_id), way)
    return ranks


def corrections(
    rule: str,
    parameters: Mapping[str, Parameters],
    bank: Mapping[str, Tensor],
    image_features: Tensor,
    text_features: Tensor,
) -> dict[str, Correction]:
    """A rule's correction "i2t" of the texts, with images as the bank, and "t2i" of the images, with texts."""
    correct = choose(RULES, rule, "scoring rule").correct
    return {
        "i2t": correct(text_features, bank["image_features"], [parameters["i2t"]])[0],
        "t2i": correct(image_features, bank["text_features"], [parameters["t2i"]])[0],
    }


def choose_parameters(
    rule: str,
    bank: Mapping[str, Tensor],
    image_features: Tensor,
    text_features: Tensor,
    image_id: IdList,
    text_id: IdList,
) -> dict[str, Parameters]:
    """For each direction the parameters of the highest Recall@1, then the highest mean reciprocal rank.

    Args:
        rule: a name in RULES.
        bank: `image_features` and `text_features` of training images, the reference queries.
        image_features, text_features, image_id, text_id: of validation images, every image once.
    Returns: "i2t" and "t2i" -> arguments of the rule.
    """
    chosen = choose(RULES, rule, "scoring rule")
    best: dict[str, Parameters] = {}
    sides = {"i2t": (text_features, bank["image_features"]), "t2i": (image_features, bank["text_features"])}
    for way, (gallery, queries) in sides.items():
        quality = {}
        settings = chosen.settings(len(queries))
        for number, correction in enumerate(chosen.correct(gallery, queries, settings)):
            ranks = corrected_ranks(way, correction, image_features, text_features, image_id, text_id)
            quality[number] = [query_values(ranks, name).mean() for name in ("recall@1", "mrr")]
        best[way] = settings[max(quality, key=quality.__getitem__)]
    return best


# --- hubs ---


def times_retrieved(queries: Tensor, gallery: Tensor, k: int = 10) -> np.ndarray:
    """(N,) how many queries have each item among their k nearest: its k-occurrence."""
    rows = nearest_rows(queries, gallery, k)[1]
    return np.bincount(rows.flatten().numpy(), minlength=len(gallery))


def hub_skewness(counts: np.ndarray) -> float:
    """Skewness of the k-occurrences; 0 without hubs. Source: Radovanovic et al. 2010, section 3."""
    if len(counts) < 3 or not np.ptp(counts):
        raise LabError(
            "the skewness of hubs needs at least three items that are not all retrieved equally often."
        )
    return float(scipy.stats.skew(counts))
