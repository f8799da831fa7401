"""An index over features: build, save, open, query, mine neighbours; knows features, not models.

Scores are inner products of L2-normalised features, that is cosine similarities. The search is exact up to
`FAISS_FROM` rows; from there on FAISS answers, and what it leaves open is answered exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from core.errors import LabError, choose
from core.files import DamagedFileError, StaleCacheError, atomic_path
from core.tensor_files import file_checksum, load_tensors, save_tensors
from retrieval.ranks import full_float32

FAISS_FROM = 200_000  # rows; below, one product answers a query in about 0.1 s on a CPU
QUERIES_AT_ONCE = 1024
SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32
ROWS_AT_ONCE = 1 << 16
FEATURES_FILE, ENGINE_FILE = "index.safetensors", "index.faiss"


@dataclass(frozen=True)
class Hits:
    """What Q queries found, nearest first, on the CPU.

    Args: scores: (Q, k) float32; rows: (Q, k) rows of the index; ids: (Q, k) their ids.
    """

    scores: Tensor
    rows: Tensor
    ids: Tensor


@dataclass(frozen=True)
class EngineOptions:
    """What FAISS needs beside the features; each kind reads what concerns it.

    Args:
        hnsw_links: neighbours each row of the graph keeps; memory and time to build grow with it.
        hnsw_breadth: rows kept in sight during a query; recall and time grow with it; None: one of 2,000, at least
            64, for 0.94 of the ten nearest among a million.
        ivf_lists: lists the rows are sorted into; None: the square root of their number.
        ivf_probes: lists a query looks into; recall and time grow with it.
    """

    hnsw_links: int = 16
    hnsw_breadth: int | None = None
    ivf_lists: int | None = None
    ivf_probes: int = 16


@dataclass(frozen=True)
class Index:
    """Features that answer queries; made by `build_index` or `open_index`.

    Args:
        features: (N, D), normalised.
        ids: (N,) whose features these are; rows of one id belong together.
        about: what they were made from, such as a run and its weights.
        kind: a name in KINDS.
        engine: FAISS's own index, where the kind has one.
    """

    features: Tensor
    ids: Tensor
    about: Mapping[str, str] = field(default_factory=dict)
    kind: str = "exact"
    engine: Any = None

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device | str) -> Index:
        """The same index with exact products made on `device`."""
        return replace(self, features=self.features.to(device))

    def query(self, queries: Tensor, k: int = 10) -> Hits:
        """The k nearest rows of each query, in bounded memory; equal scores come in any order.

        Args: queries: (Q, D); their lengths scale the scores.
        Raises: LabError if k is not in 1..N, or queries are not finite or of another width.
        """
        _check_k(k, len(self))
        return self._search(_checked_queries(queries, self.features), k, _Rivals(self.ids), spare=0)

    def _search(self, queries: Tensor, k: int, rivals: _Rivals, spare: int) -> Hits:
        """`spare`: how many rows beyond k to ask FAISS for, since some are no rivals."""
        with _plain_products(self.features.device):
            if self.engine is None:
                scores, rows = _exact_top(self.features, queries, k, rivals)
            else:
                scores, rows = self._ask_engine(queries, k, rivals, spare)
            rows[scores == -math.inf] = -1
            return Hits(scores, rows, torch.where(rows < 0, -1, self.ids[rows.clamp(min=0)]))

    def _ask_engine(self, queries: Tensor, k: int, rivals: _Rivals, spare: int) -> tuple[Tensor, Tensor]:
        found = self.engine.search(queries.numpy(), min(len(self), k + spare))
        scores, rows = (torch.from_numpy(part) for part in found)
        scores[rows < 0] = -math.inf  # FAISS's sign for nothing more found
        rivals.keep(scores, slice(None), rows.clamp(min=0))
        scores, place = scores.topk(k)
        rows = rows.gather(1, place)
        short = (scores[:, -1] == -math.inf).nonzero().flatten()
        if len(short):
            scores[short], rows[short] = _exact_top(self.features, queries[short], k, rivals.of(short))
        return scores, rows


@dataclass(frozen=True)
class _Rivals:
    """Which rows may answer which query.

    Args:
        ids: (N,) of the index.
        own: (Q,) ids that are no answer, or None.
        ceiling: (Q,) scores above which a row is no answer, or None.
    """

    ids: Tensor
    own: Tensor | None = None
    ceiling: Tensor | None = None

    def of(self, queries: Tensor) -> _Rivals:
        """The same for some of the queries."""
        parts = (None if part is None else part[queries] for part in (self.own, self.ceiling))
        return _Rivals(self.ids, *parts)

    def keep(self, scores: Tensor, queries: slice, rows: slice | Tensor) -> None:
        """Sink, in place, scores (q, n) of the rows, (q, n) or a slice, that may not answer."""
        if self.own is not None:
            own = self.own[queries, None].to(scores.device)
            scores.masked_fill_((self.ids[rows].to(scores.device) == own) & (own >= 0), -math.inf)
        if self.ceiling is not None:
            scores.masked_fill_(scores > self.ceiling[queries, None].to(scores.device), -math.inf)


@contextmanager
def _plain_products(device: torch.device) -> Iterator[None]:
    """Within, products are in full float32 and leave no graph, and rows found may serve in training."""
    with (
        full_float32(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def _exact_top(features: Tensor, queries: Tensor, k: int, rivals: _Rivals) -> tuple[Tensor, Tensor]:
    """(Q, k) best scores and their rows, by chunks of the product."""
    parts = []
    for start in tqdm(range(0, len(queries), QUERIES_AT_ONCE), "search", delay=2, leave=False):
        span = slice(start, start + QUERIES_AT_ONCE)
        parts.append(_top_of(features, queries[span], k, rivals, span))
    scores, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    return scores, rows


def _top_of(features: Tensor, queries: Tensor, k: int, rivals: _Rivals, span: slice) -> tuple[Tensor, Tensor]:
    queries = queries.to(features.device)
    step = min(ROWS_AT_ONCE, SCORES_AT_ONCE // len(queries))
    best = queries.new_empty(len(queries), 0)
    best_rows = torch.empty(len(queries), 0, dtype=torch.int64, device=features.device)
    for start in range(0, len(features), step):
        rows = slice(start, min(start + step, len(features)))
        scores = queries @ features[rows].float().T  # (Q, step)
        rivals.keep(scores, span, rows)
        top, place = scores.topk(min(k, scores.shape[1]))
        best, best_rows = torch.cat([best, top], 1), torch.cat([best_rows, place + start], 1)
        best, place = best.topk(min(k, best.shape[1]))
        best_rows = best_rows.gather(1, place)
    return best.cpu(), best_rows.cpu()


# ---- what can be asked beside the nearest rows -----------------------------------------------------


def mine_neighbours(
    index: Index, queries: Tensor, query_ids: Tensor, k: int, *, below: Tensor | None = None
) -> Hits:
    """The k nearest rows of each query that have another id than its own: its hardest negatives.

    A negative id matches nothing, so it excludes nothing.

    Args:
        queries: (Q, D); query_ids: (Q,).
        below: (Q,) scores above which a row is taken for a match and left out. Where fewer than k rows are
            left, the last have score -inf and row and id -1.
    Raises: LabError as `Index.query`, and if some query has fewer than k rows of other ids.
    Source: a ceiling made from the match's score, NV-Retriever, Moreira et al. 2024.
    """
    _check_k(k, len(index))
    queries = _checked_queries(queries, index.features)
    for name, given in (("query_ids", query_ids), ("below", below)):
        if given is not None and given.shape != (len(queries),):
            raise LabError(f"{name} has shape {tuple(given.shape)}; give one a query, ({len(queries)},).")
    query_ids = query_ids.to("cpu", torch.int64)
    own = _own_rows(index.ids, query_ids)
    if len(index) - own < k:
        raise LabError(f"k is {k} but only {len(index) - own} rows are not the query's own; lower k.")
    rivals = _Rivals(index.ids, query_ids, None if below is None else below.cpu())
    return index._search(queries, k, rivals, spare=own if below is None else own + k)


def _own_rows(ids: Tensor, query_ids: Tensor) -> int:
    """The most rows of the index that share a query's id."""
    ordered, wanted = ids.sort().values, query_ids[query_ids >= 0].contiguous()
    counts = torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)
    return int(counts.max()) if len(wanted) else 0


def combine(features: Tensor, weights: Sequence[float]) -> Tensor:
    """(D,) one query of several: the weighted sum of normalised features, normalised.

    Args: features: (P, D); weights: P numbers, negative for what is not wanted.
    Raises: LabError if there are not as many weights as features, or they cancel out.
    """
    if not len(features) or len(weights) != len(features):
        raise LabError(f"{len(features)} features came with {len(weights)} weights; give one weight each.")
    total = torch.tensor(weights, dtype=torch.float32) @ F.normalize(features.float(), dim=1)
    if not total.norm() > 1e-6:
        raise LabError("the parts of the query cancel out; change a weight or leave a part out.")
    return F.normalize(total, dim=0)


def recall_of(index: Index, exact: Index, queries: Tensor, k: int = 10) -> float:
    """Fraction in [0, 1] of the exact k nearest rows that `index` finds too, mean over (Q, D) queries."""
    found, wanted = index.query(queries, k).rows, exact.query(queries, k).rows
    hits = [len(np.intersect1d(*pair)) for pair in zip(found.numpy(), wanted.numpy(), strict=True)]
    return float(np.mean(hits)) / k


# ---- bad input -------------------------------------------------------------------------------------


def _check_k(k: int, size: int) -> None:
    if not 1 <= k <= size:
        raise LabError(f"k is {k} but the gallery holds {size} rows; choose k from 1 to {size}.")


def _checked_queries(queries: Tensor, features: Tensor) -> Tensor:
    """(Q, D) float32 on the CPU."""
    if queries.ndim != 2 or queries.shape[1] != features.shape[1] or not len(queries):
        raise LabError(
            f"queries have shape {tuple(queries.shape)} but the index wants (queries, {features.shape[1]}); "
            "encode both by one model."
        )
    if not torch.isfinite(queries).all():
        raise LabError("a query holds NaN or infinite values; look for a diverged run or a broken cache.")
    return queries.detach().float().cpu().contiguous()


def _check_gallery(features: Tensor, ids: Tensor) -> None:
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
    lengths = torch.cat([part.float().norm(dim=1) for part in features.split(ROWS_AT_ONCE)])
    wrong = ((lengths - 1).abs() <= 0.01).logical_not().nonzero()  # NaN is wrong too
    if len(wrong):
        row = int(wrong[0])
        raise LabError(
            f"row {row} of the gallery has length {float(lengths[row]):.3g}; features must be finite and "
            "normalised, so look for a diverged run or a forgotten normalisation."
        )


# ---- building --------------------------------------------------------------------------------------


def build_index(
    features: Tensor,
    ids: Tensor | None = None,
    *,
    kind: str = "auto",
    half: bool = False,
    about: Mapping[str, str] | None = None,
    options: EngineOptions | None = None,
) -> Index:
    """An index over features.

    Args:
        features: (N, D), L2-normalised.
        ids: (N,) int64; None: the row numbers.
        kind: `exact`; FAISS's `flat`, `hnsw` or `ivf`; `auto`: exact below FAISS_FROM rows, else ivf.
        half: keep them as float16: half the memory, scores off by up to 1e-3.
        about: what they were made from; `open_index` compares it.
    Raises: LabError if the gallery is empty, not finite or not normalised, or FAISS is wanted and absent.
    """
    ids = torch.arange(len(features)) if ids is None else ids.cpu()
    _check_gallery(features, ids)
    if kind == "auto":
        kind = "exact" if len(features) < FAISS_FROM else "ivf"
    make = choose(KINDS, kind, "index kind")
    kept = features.detach().to(torch.float16 if half else torch.float32)
    index = Index(kept, ids, dict(about or {}), kind)
    if make is None:
        return index
    return replace(index, engine=_filled(make(len(kept), kept.shape[1], options or EngineOptions()), kept))


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise LabError(
            "this kind of index needs the package faiss-cpu; install it or choose 'exact'."
        ) from error
    return faiss


def _filled(engine: Any, features: Tensor) -> Any:
    """FAISS's index, trained on an even sample and given every row."""
    if not engine.is_trained:
        sample = np.linspace(0, len(features) - 1, min(len(features), 64 * engine.nlist)).astype(np.int64)
        engine.train(features[torch.from_numpy(sample)].float().cpu().numpy())
    with tqdm(total=len(features), desc="index", unit="row", unit_scale=True, delay=2, leave=False) as bar:
        for part in features.split(8192):
            engine.add(part.float().cpu().numpy())
            bar.update(len(part))
    return engine


def _flat(rows: int, width: int, options: EngineOptions) -> Any:
    return _faiss().IndexFlatIP(width)


def _hnsw(rows: int, width: int, options: EngineOptions) -> Any:
    faiss = _faiss()
    engine = faiss.IndexHNSWFlat(width, options.hnsw_links, faiss.METRIC_INNER_PRODUCT)
    engine.hnsw.efSearch = options.hnsw_breadth or max(64, rows // 2000)
    return engine


def _ivf(rows: int, width: int, options: EngineOptions) -> Any:
    faiss = _faiss()
    lists = min(options.ivf_lists or round(rows**0.5), rows)
    engine = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    engine.nprobe = min(options.ivf_probes, lists)
    return engine


KINDS: dict[str, Callable[[int, int, EngineOptions], Any] | None] = {
    "exact": None,
    "flat": _flat,
    "hnsw": _hnsw,
    "ivf": _ivf,
}
"""How an index answers: a product here, or FAISS's own index of (rows, width, options)."""


# ---- files -----------------------------------------------------------------------------------------


def save_index(index: Index, folder: str | Path) -> Path:
    """Write an index into a folder, each file whole or not at all; `about` and kind stand in its header."""
    folder, metadata = Path(folder), dict[str, str]()
    if index.engine is None:
        (folder / ENGINE_FILE).unlink(missing_ok=True)
    else:
        with atomic_path(folder / ENGINE_FILE) as beside:
            _faiss().write_index(index.engine, str(beside))
        metadata["engine"] = str(file_checksum(folder / ENGINE_FILE))
    metadata["header"] = json.dumps({"kind": index.kind, "about": dict(index.about)}, sort_keys=True)
    save_tensors(folder / FEATURES_FILE, {"features": index.features, "ids": index.ids}, metadata)
    return folder


def open_index(folder: str | Path, about: Mapping[str, str] | None = None) -> Index:
    """The index of a folder, memory-mapped.

    Args: about: what it must have been made from; None: anything.
    Raises: StaleCacheError if it was made from something else (naming what), is absent or damaged.
    """
    folder = Path(folder)
    try:
        tensors, metadata = load_tensors(folder / FEATURES_FILE, "rebuild it")
        header = json.loads(metadata["header"])
        features, ids = tensors["features"], tensors["ids"]
    except FileNotFoundError as error:
        raise StaleCacheError(f"{folder} holds no index; build one first.") from error
    except DamagedFileError as error:
        raise StaleCacheError(f"the index {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StaleCacheError(f"the index in {folder} is damaged ({error}); rebuild it.") from error
    found, wanted = header["about"], header["about"] if about is None else about
    wrong = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if wrong:
        raise StaleCacheError(f"the index in {folder} belongs to another {', '.join(wrong)}; rebuild it.")
    engine = None if KINDS.get(header["kind"]) is None else _open_engine(folder, features, metadata)
    return Index(features, ids, found, header["kind"], engine)


def _open_engine(folder: Path, features: Tensor, metadata: Mapping[str, str]) -> Any:
    faiss = _faiss()
    try:
        if "engine" in metadata and metadata["engine"] != str(file_checksum(folder / ENGINE_FILE)):
            raise StaleCacheError(f"the index in {folder} is damaged or is of two builds; rebuild it.")
        engine = faiss.read_index(str(folder / ENGINE_FILE), faiss.IO_FLAG_MMAP_IFC)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise StaleCacheError(f"the index in {folder} is damaged ({reason}); rebuild it.") from error
    if (engine.ntotal, engine.d) != features.shape:
        raise StaleCacheError(f"the index in {folder} is damaged or is of two builds; rebuild it.")
    return engine
