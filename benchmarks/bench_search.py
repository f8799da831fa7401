"""Search over many features: recall against exact and latency: `python -m benchmarks search [--rows N]`.

The features are generated: Gaussian clusters in 48 dimensions, turned into 512 and blurred, so that neighbourhoods
exist as in a trained joint space (isotropic noise has none). Queries are new points of the same clusters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from retrieval.index import Index, build_index

WIDTH, QUERIES, K = 512, 200, 10
LATENT, CLUSTERS, BLUR = 48, 1000, 0.3
KINDS = ("exact", "ivf")


def draw(rows: int, seed: int) -> Tensor:
    """(rows, WIDTH) normalized features; the clusters are the same for every seed."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    centres = torch.randn(CLUSTERS, LATENT, generator=shared)
    turn = torch.linalg.qr(torch.randn(WIDTH, LATENT, generator=shared))[0].T  # (LATENT, WIDTH)
    made = torch.empty(rows, WIDTH)
    for part in made.split(50_000):
        which = torch.randint(CLUSTERS, (len(part),), generator=own)
        latent = centres[which] + 0.7 * torch.randn(len(part), LATENT, generator=own)
        blur = torch.randn(part.shape, generator=own) * (BLUR * LATENT**0.5 / WIDTH**0.5)
        part.copy_(F.normalize(latent @ turn + blur))
    return made


def seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def one_by_one(index: Index, queries: Tensor) -> None:
    for query in queries.split(1):
        index.query(query, K)


def recall_of(index: Index, exact: Index, queries: Tensor) -> float:
    """Fraction of the exact K nearest rows that `index` finds too, mean over queries."""
    answers = zip(index.query(queries, K).rows, exact.query(queries, K).rows, strict=True)
    return sum(len(np.intersect1d(*rows)) for rows in answers) / (K * len(queries))


def measure(kind: str, features: Tensor, exact: Index, queries: Tensor) -> dict[str, float]:
    """Seconds to build, recall@10 in [0, 1], milliseconds per query."""
    start = time.perf_counter()
    index = build_index(features, kind=kind)
    build_seconds = time.perf_counter() - start
    first = queries[:20]
    return {
        "build, s": round(build_seconds, 1),
        f"recall@{K}": round(recall_of(index, exact, queries), 4),
        "one query, ms": round(1000 * seconds(lambda: one_by_one(index, first)) / len(first), 2),
        f"of {QUERIES} at once, ms": round(1000 * seconds(lambda: index.query(queries, K)) / QUERIES, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="so many features")
    rows = parser.parse_args().rows
    features, queries = draw(rows, seed=1), draw(QUERIES, seed=2)
    exact = build_index(features, kind="exact")
    table = {}
    for kind in tqdm(KINDS, desc="search"):
        table[kind] = measure(kind, features, exact, queries)
        tqdm.write(f"{kind}: {table[kind]}")
    print(f"\nsearch, {rows:,} features of width {WIDTH}, {torch.get_num_threads()} threads")
    print(pd.DataFrame(table).T.to_string())


if __name__ == "__main__":
    main()
