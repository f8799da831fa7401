"""The index finds what a written-out sort finds, keeps it on disk, and names mistakes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from core.errors import LabError
from retrieval import index as retrieval_index
from retrieval.index import (
    EngineOptions,
    Hits,
    Index,
    build_index,
    combine,
    mine_neighbours,
    open_index,
    recall_of,
    save_index,
)


def features(rows, width=16, seed=0):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def clustered(rows, width=16, clusters=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    which = torch.randint(clusters, (rows,), generator=generator)
    return F.normalize(centres[which] + 0.3 * torch.randn(rows, width, generator=generator))


def brute_force(gallery, queries, k, banned=None):
    """Rows and scores of the best k by numpy, in float64."""
    scores = queries.numpy().astype(np.float64) @ gallery.numpy().astype(np.float64).T
    if banned is not None:
        scores[banned] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, 1)


def assert_best(hits, gallery, queries, banned=None):
    """Each query's rows are different ones, with the best scores of a float64 sort, best first.

    Unit vectors of 16 numbers: a float32 product is right to 16 * 6e-8, which may exchange rows that are nearer.
    """
    _, scores = brute_force(gallery, queries, hits.rows.shape[1], banned)
    products = queries.double().numpy() @ gallery.double().numpy().T
    rows, there = hits.rows.numpy(), np.isfinite(scores)
    assert ((rows >= 0) == there).all()
    assert all(len(set(own[own >= 0])) == (own >= 0).sum() for own in rows)
    for given in (hits.scores.numpy(), np.take_along_axis(products, rows, 1)):
        np.testing.assert_allclose(given[there], scores[there], atol=2 * 16 * 6e-8, rtol=0)


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles that cut 500 rows and 50 queries into uneven pieces."""
    monkeypatch.setattr(retrieval_index, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(retrieval_index, "SCORES_AT_ONCE", 7 * 33)


# ---- queries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "flat"])
@pytest.mark.parametrize("k", [1, 10, 40, 500])
@pytest.mark.usefixtures("tiny_tiles")
def test_flat_kinds_find_what_a_full_sort_finds(kind, k):
    gallery, queries = features(500), features(50, seed=1)
    hits = build_index(gallery, torch.arange(500) * 3, kind=kind).query(queries, k)
    assert_best(hits, gallery, queries)
    assert torch.equal(hits.ids, hits.rows * 3)
    assert (hits.scores.dtype, hits.rows.dtype) == (torch.float32, torch.int64)


def test_scores_are_the_products_themselves():
    gallery = torch.eye(6)[[0, 1, 2, 3, 4, 5]]
    queries = torch.tensor([[0.5, 0.25, 0, 0, 0, -1.0]])
    hits = build_index(gallery).query(queries, 6)
    assert hits.scores.tolist() == [[0.5, 0.25, 0, 0, 0, -1]]
    assert hits.rows[0, :2].tolist() == [0, 1]
    assert hits.rows[0, -1] == 5


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_graph_and_lists_find_nearly_all_and_score_like_the_product(kind):
    gallery, queries = clustered(3000), clustered(50, seed=0)
    index, exact = build_index(gallery, kind=kind), build_index(gallery, kind="exact")
    assert recall_of(index, exact, queries, 10) >= 0.95
    hits = index.query(queries, 10)
    again = (queries[:, None] * gallery[hits.rows]).sum(2)
    assert torch.allclose(hits.scores, again, atol=1e-5)
    assert (hits.scores.diff(dim=1) <= 0).all()


def test_recall_counts_the_rows_found():
    gallery, queries = features(100), features(20, seed=1)
    exact = build_index(gallery)
    assert recall_of(exact, exact, queries, 5) == 1

    class Worse(Index):
        def query(self, queries, k=10):
            hits = super().query(queries, k + 2)
            return Hits(hits.scores[:, 2:], hits.rows[:, 2:], hits.ids[:, 2:])

    assert recall_of(Worse(gallery, exact.ids), exact, queries, 5) == pytest.approx(3 / 5)


def test_few_probes_lose_rows_and_more_find_them():
    gallery, queries = features(2000), features(40, seed=1)
    exact = build_index(gallery)
    recalls = [
        recall_of(
            build_index(gallery, kind="ivf", options=EngineOptions(ivf_lists=50, ivf_probes=probes)),
            exact,
            queries,
        )
        for probes in (1, 10, 50)
    ]
    assert recalls[0] < recalls[1] < recalls[2] == 1


def test_what_faiss_leaves_open_is_answered_exactly():
    gallery, queries = features(200), features(9, seed=1)
    lists = EngineOptions(ivf_lists=50, ivf_probes=1)  # about four rows a list, asked for twenty
    hits = build_index(gallery, kind="ivf", options=lists).query(queries, 20)
    assert_best(hits, gallery, queries)


def test_half_precision_halves_the_memory_and_hardly_moves_a_score():
    gallery, queries = features(300), features(10, seed=1)
    index = build_index(gallery, half=True)
    assert index.features.nbytes * 2 == gallery.nbytes
    assert np.allclose(index.query(queries, 5).scores, brute_force(gallery, queries, 5)[1], atol=1e-3)


def test_small_galleries_are_exact_and_large_ones_faiss(monkeypatch):
    assert build_index(features(100)).kind == "exact"
    monkeypatch.setattr(retrieval_index, "FAISS_FROM", 50)
    assert build_index(features(100)).kind == "ivf"


def test_products_are_full_float32_inside_autocast():
    gallery, queries = features(100), features(4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hits = build_index(gallery).query(queries, 5)
    assert_best(hits, gallery, queries)


def test_rows_found_may_be_used_in_training():
    gallery = features(50).requires_grad_()
    with torch.inference_mode():
        rows = build_index(gallery).query(features(4, seed=1), 3).rows
    gallery[rows].sum().backward()
    assert gallery.grad.abs().sum() > 0


# ---- neighbours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw", "ivf"])
@pytest.mark.usefixtures("tiny_tiles")
def test_neighbours_are_the_nearest_of_another_id(kind):
    gallery, queries = clustered(400), clustered(30, seed=0)
    ids, own = torch.arange(400) // 5, torch.arange(30) // 2
    options = EngineOptions(hnsw_breadth=400, ivf_probes=20)  # enough to see all
    hits = mine_neighbours(build_index(gallery, ids, kind=kind, options=options), queries, own, 8)
    assert_best(hits, gallery, queries, (own[:, None] == ids).numpy())
    assert not (hits.ids == own[:, None]).any()


def test_negative_ids_exclude_nothing():
    gallery = features(20)
    index = build_index(gallery, torch.full((20,), -1))
    hits = mine_neighbours(index, gallery, torch.full((20,), -1), 1)
    assert hits.rows.flatten().tolist() == list(range(20))


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_rows_above_the_ceiling_are_left_out_and_gaps_are_said(kind):
    gallery, queries = clustered(100), clustered(100)
    ids = torch.arange(100)
    ceiling = torch.linspace(-1, 1, 100)
    options = EngineOptions(ivf_probes=10)
    index = build_index(gallery, ids, kind=kind, options=options)
    hits = mine_neighbours(index, queries, ids, 5, below=ceiling)
    exact = queries @ gallery.T
    banned = (exact > ceiling[:, None]) | torch.eye(100, dtype=torch.bool)
    found = np.isfinite(brute_force(gallery, queries, 5, banned.numpy())[1])
    assert 0 < found.sum() < found.size
    assert_best(hits, gallery, queries, banned.numpy())
    assert (hits.ids.numpy()[~found] == -1).all()
    assert (hits.scores.numpy()[~found] == -math.inf).all()


# ---- combinations ----------------------------------------------------------------------------------


def test_a_combination_is_the_normalised_weighted_sum():
    parts = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 5.0]])  # lengths do not count, weights do
    made = combine(parts, [1, 2, -2])
    assert torch.allclose(made, torch.tensor([1.0, 2.0, -2.0]) / 3)
    index = build_index(torch.eye(3))
    assert index.query(made[None], 3).rows.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        (torch.eye(3), [1, 1], "3 features came with 2 weights"),
        (torch.zeros(0, 3), [], "0 features"),
        (torch.eye(3)[[0, 0]], [1, -1], "cancel out"),
    ],
)
def test_combinations_that_cannot_be_made_are_named(parts, weights, message):
    with pytest.raises(LabError, match=message):
        combine(parts, weights)


# ---- files -----------------------------------------------------------------------------------------

RUN = {"run": "quickstart_s0", "weights": "abc", "split": "test"}


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw", "ivf"])
def test_a_saved_index_answers_the_same(kind, tmp_path):
    gallery, queries = clustered(500), features(10, seed=1)
    index = build_index(gallery, torch.arange(500) + 7, kind=kind, about=RUN)
    opened = open_index(save_index(index, tmp_path / "index"), RUN)
    assert (opened.kind, opened.about) == (kind, RUN)
    for name in ("scores", "rows", "ids"):
        assert torch.equal(getattr(opened.query(queries, 9), name), getattr(index.query(queries, 9), name))


def resident_kib():
    """Memory of this process that is no mapped file (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads Linux's /proc")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if "RssAnon" in line)


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_the_features_stay_on_disk(kind, tmp_path):
    save_index(build_index(features(5_000, 1024), kind=kind), tmp_path)  # 20 MB
    before = resident_kib()
    opened = open_index(tmp_path)
    opened.query(features(1, 1024), 1)
    assert resident_kib() - before < 10_000


def test_an_index_of_another_run_is_refused(tmp_path):
    save_index(build_index(features(10), about=RUN), tmp_path)
    with pytest.raises(LabError, match="belongs to another run, weights; rebuild it"):
        open_index(tmp_path, {**RUN, "run": "other_s1", "weights": "xyz"})
    assert len(open_index(tmp_path)) == 10


def test_missing_damaged_and_mixed_files_are_refused(tmp_path):
    with pytest.raises(LabError, match="holds no index; build one first"):
        open_index(tmp_path / "none")
    folder = save_index(build_index(features(300), kind="flat"), tmp_path / "flat")
    smaller = save_index(build_index(features(200), kind="flat"), tmp_path / "smaller")
    (folder / retrieval_index.ENGINE_FILE).write_bytes((smaller / retrieval_index.ENGINE_FILE).read_bytes())
    with pytest.raises(LabError, match="is of two builds; rebuild it"):
        open_index(folder)
    (folder / retrieval_index.ENGINE_FILE).write_bytes(b"nothing")
    with pytest.raises(LabError, match="is damaged .*rebuild it"):
        open_index(folder)
    (folder / retrieval_index.FEATURES_FILE).write_bytes(b"nothing")
    with pytest.raises(LabError, match="is damaged .*rebuild it"):
        open_index(folder)


def test_saving_an_exact_index_takes_an_old_engine_away(tmp_path):
    save_index(build_index(features(300), kind="flat"), tmp_path)
    save_index(build_index(features(300)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [retrieval_index.FEATURES_FILE]
    assert set(load_file(tmp_path / retrieval_index.FEATURES_FILE)) == {"features", "ids"}


def test_the_header_says_what_the_index_is_of(tmp_path):
    from safetensors import safe_open

    save_index(build_index(features(10), about=RUN), tmp_path)
    with safe_open(tmp_path / retrieval_index.FEATURES_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["header"]) == {"kind": "exact", "about": RUN}


# ---- bad input -------------------------------------------------------------------------------------


def broken(rows=10, row=7, value=float("nan")):
    made = features(rows)
    made[row, 2] = value
    return made


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.query(features(2), 0), "k is 0 but the gallery holds 10 rows"),
        (
            lambda index: index.query(features(2), 11),
            "k is 11 but the gallery holds 10 rows; choose k from 1",
        ),
        (lambda index: index.query(features(2, 8), 1), r"shape \(2, 8\) but the index wants \(queries, 16\)"),
        (lambda index: index.query(features(2)[0], 1), r"shape \(16,\) but the index wants"),
        (lambda index: index.query(broken(), 1), "query holds NaN"),
        (lambda index: build_index(features(10)[:0]), "gallery is empty"),
        (lambda index: build_index(broken()), "row 7 of the gallery has length nan"),
        (lambda index: build_index(broken(value=math.inf)), "row 7 of the gallery has length inf"),
        (lambda index: build_index(3 * features(10)), "row 0 of the gallery has length 3; .* normalised"),
        (lambda index: build_index(torch.ones(10)), r"\(rows, width\) floats"),
        (lambda index: build_index(features(10), torch.arange(9)), "10 features need as many int64 ids"),
        (lambda index: build_index(features(10), kind="hsnw"), "did you mean 'hnsw'"),
        (lambda index: mine_neighbours(index, features(2), torch.tensor([0, 1]), 10), "only 9 rows are not"),
        (lambda index: mine_neighbours(index, features(2), torch.tensor([0]), 1), "query_ids has shape"),
        (
            lambda index: mine_neighbours(index, features(2), torch.arange(2), 1, below=torch.ones(3)),
            "below has shape",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(LabError, match=message):
        call(build_index(features(10)))


def test_without_faiss_the_message_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(LabError, match="needs the package faiss-cpu; install it or choose 'exact'"):
        build_index(features(10), kind="hnsw")
    assert build_index(features(10)).query(features(1), 1).rows.shape == (1, 1)
