"""The nearest of many features: exactly by a matrix product, or from `IVF_FROM` rows approximately by FAISS.

Scores are inner products of L2-normalized features, that is cosine similarities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from core.errors import LabError, choose
from retrieval.ranks import full_float32

IVF_FROM = 200_000  # rows; below, an exact query takes about 0.1 s on a CPU
PROBES = 16  # lists of an approximate index that a query looks into; recall and time grow with it
SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32
QUERIES_AT_ONCE = 1024


def nearest_rows(
    queries: Tensor,
    features: Tensor,
    k: int,
    query_ids: Tensor | None = None,
    ids: Tensor | None = None,
    ceiling: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and rows of the features nearest to each query, by the full matrix product.

    Args:
        queries: (Q, D); features: (N, D).
        query_ids, ids: (Q,) and (N,); rows of the query's own id are left out; a negative id matches nothing.
        ceiling: (Q,) scores above which a row is left out.
    Returns: where fewer than k rows remain, score -inf and row -1.
    """
    parts = []
    steps = torch.arange(len(queries)).split(max(1, SCORES_AT_ONCE // len(features)))
    with full_float32(), torch.no_grad():
        for some in tqdm(steps, "search", delay=2, leave=False):
            scores = queries[some].float() @ features.float().T  # (q, N)
            if query_ids is not None and ids is not None:
                own = query_ids[some, None]
                scores.masked_fill_((ids == own) & (own >= 0), -torch.inf)
            if ceiling is not None:
                scores.masked_fill_(scores > ceiling[some, None], -torch.inf)
            best, rows = scores.topk(min(k, len(features)))
            parts.append((best, rows.masked_fill_(best == -torch.inf, -1)))
    return torch.cat([best for best, _ in parts]), torch.cat([rows for _, rows in parts])


@dataclass(frozen=True)
class Hits:
    """The answers to Q queries, nearest first, on the CPU.

    Args: scores: (Q, k) float32; rows: (Q, k) rows of the index; ids: (Q, k) their ids.
    """

    scores: Tensor
    rows: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Index:
    """Features that answer queries; made by `build_index`.

    Args:
        features: (N, D) float32, L2-normalized.
        ids: (N,) what these are features of; several rows may share an id.
        engine: FAISS's index of the features; None: exact.
    """

    features: Tensor
    ids: Tensor
    engine: Any = None

    def __len__(self) -> int:
        return len(self.features)

    def query(self, queries: Tensor, k: int = 10, query_ids: Tensor | None = None) -> Hits:
        """The k nearest rows of each query; equal scores come in any order.

        Args:
            queries: (Q, D); their lengths scale the scores.
            query_ids: (Q,) rows of the query's own id are left out; a negative id excludes nothing.
        Raises: LabError if k is not in 1..N, a query has fewer than k rows of other ids, or queries are not finite or
            of another width.
        """
        size = len(self.features)
        if not 1 <= k <= size:
            raise LabError(f"k is {k} but the gallery has {size} rows; choose k from 1 to {size}.")
        queries = _checked_queries(queries, self.features)
        query_ids = torch.full((len(queries),), -1) if query_ids is None else query_ids
        if query_ids.shape != (len(queries),):
            raise LabError(
                f"query_ids has shape {tuple(query_ids.shape)}; give one per query, ({len(queries)},)."
            )
        shared = self.ids[torch.isin(self.ids, query_ids[query_ids >= 0])]
        own = int(shared.unique(return_counts=True)[1].max()) if len(shared) else 0
        if size - own < k:
            raise LabError(f"k is {k} but only {size - own} rows have another id than the query; lower k.")
        if self.engine is None:
            scores, rows = nearest_rows(queries, self.features, k, query_ids, self.ids)
        else:
            scores, rows = self._ask_engine(queries, k + own)
            is_own = (self.ids[rows] == query_ids[:, None]) & (query_ids[:, None] >= 0)
            order = is_own.int().argsort(dim=1, stable=True)[:, :k]  # others first, still nearest first
            scores, rows = scores.gather(1, order), rows.gather(1, order)
        return Hits(scores, rows, self.ids[rows])

    def _ask_engine(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(Q, k) scores and rows; where the probed lists contain fewer than k rows, from all lists."""
        import faiss

        every_list = faiss.SearchParametersIVF(nprobe=self.engine.nlist)  # type: ignore[call-arg]
        parts = []
        for some in tqdm(queries.split(QUERIES_AT_ONCE), "search", delay=2, leave=False):
            scores, rows = self.engine.search(some.numpy(), k)
            short = rows[:, -1] < 0
            if short.any():
                scores[short], rows[short] = self.engine.search(some.numpy()[short], k, params=every_list)
            parts.append((torch.from_numpy(scores), torch.from_numpy(rows)))
        return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def combine(features: Tensor, weights: Sequence[float]) -> Tensor:
    """(D,) one query made of several: the weighted sum of normalized features, normalized.

    Args: features: (P, D); weights: P numbers, negative for what should be absent.
    Raises: LabError if there are not as many weights as features, or they cancel out.
    """
    if not len(features) or len(weights) != len(features):
        raise LabError(f"{len(features)} features came with {len(weights)} weights; give one weight each.")
    total = torch.tensor(weights, dtype=torch.float32) @ F.normalize(features.float(), dim=1)
    if not total.norm() > 1e-6:
        raise LabError("the parts of the query cancel out; change a weight or leave a part out.")
    return F.normalize(total, dim=0)


# --- building ---


def build_index(features: Tensor, ids: Tensor | None = None, *, kind: str = "auto") -> Index:
    """An index over features.

    Args:
        features: (N, D), L2-normalized.
        ids: (N,) int64; None: the row numbers.
        kind: `exact`, or `ivf`: approximate; `auto`: exact below `IVF_FROM` rows, else ivf.
    Raises: LabError if there are no features, or they are not finite or not normalized.
    """
    ids = torch.arange(len(features)) if ids is None else ids.cpu()
    _check_features(features, ids)
    features = features.detach().float().cpu()
    if kind == "auto":
        kind = "exact" if len(features) < IVF_FROM else "ivf"
    return Index(features, ids, choose({"exact": lambda _: None, "ivf": _ivf}, kind, "index kind")(features))


def _ivf(features: Tensor) -> Any:
    """FAISS's inverted lists: as many as the square root of the rows, trained on an even sample."""
    import faiss

    lists = round(len(features) ** 0.5)
    engine: Any = faiss.index_factory(features.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    sample = np.linspace(0, len(features) - 1, min(len(features), 64 * lists)).astype(np.int64)
    engine.train(features[torch.from_numpy(sample)].numpy())
    engine.nprobe = PROBES
    for part in tqdm(features.split(8192), "index", delay=2, leave=False):
        engine.add(part.numpy())
    return engine


# --- bad input ---


def _checked_queries(queries: Tensor, features: Tensor) -> Tensor:
    """(Q, D) float32 on the CPU."""
    if queries.ndim != 2 or queries.shape[1] != features.shape[1] or not len(queries):
        raise LabError(
            f"queries have shape {tuple(queries.shape)} but the index needs (queries, {features.shape[1]}); "
            "encode both with the same model."
        )
    if not torch.isfinite(queries).all():
        raise LabError("a query contains NaN or infinite values; look for a diverged run or a broken cache.")
    return queries.detach().float().cpu().contiguous()


def _check_features(features: Tensor, ids: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise LabError(
            f"features must be (rows, width) floats, not {tuple(features.shape)} of {features.dtype}."
        )
    if not features.numel():
        raise LabError("the gallery is empty; give at least one feature to search in.")
    if ids.shape != (len(features),) or ids.dtype != torch.int64:
        raise LabError(
            f"{len(features)} features need as many int64 ids, not {tuple(ids.shape)} {ids.dtype}."
        )
    lengths = features.float().norm(dim=1)
    wrong = ((lengths - 1).abs() <= 0.01).logical_not().nonzero()  # NaN is wrong too
    if len(wrong):
        row = int(wrong[0])
        raise LabError(
            f"row {row} of the gallery has length {float(lengths[row]):.3g}; features must be finite and "
            "normalized, so look for a diverged run or a forgotten normalization."
        )
