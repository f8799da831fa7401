"""The index finds what a written-out sort finds, and names mistakes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.errors import LabError
from retrieval import index as retrieval_index
from retrieval.index import build_index, combine


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


# ---- queries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 10, 40, 500])
def test_an_exact_index_finds_what_a_full_sort_finds(k, monkeypatch):
    monkeypatch.setattr(retrieval_index, "SCORES_AT_ONCE", 7 * 500)
    gallery, queries = features(500), features(50, seed=1)
    hits = build_index(gallery, torch.arange(500) * 3).query(queries, k)
    assert_best(hits, gallery, queries)
    assert torch.equal(hits.ids, hits.rows * 3)
    assert (hits.scores.dtype, hits.rows.dtype) == (torch.float32, torch.int64)


def test_scores_are_the_products_themselves():
    queries = torch.tensor([[0.5, 0.25, 0, 0, 0, -1.0]])
    hits = build_index(torch.eye(6)).query(queries, 6)
    assert hits.scores.tolist() == [[0.5, 0.25, 0, 0, 0, -1]]
    assert hits.rows[0, :2].tolist() == [0, 1]
    assert hits.rows[0, -1] == 5


def test_an_approximate_index_finds_nearly_all_and_scores_like_the_product():
    gallery, queries = clustered(3000), clustered(50, seed=0)
    hits = build_index(gallery, kind="ivf").query(queries, 10)
    exact = build_index(gallery, kind="exact").query(queries, 10)
    shared = [len(np.intersect1d(*rows)) for rows in zip(hits.rows, exact.rows, strict=True)]
    assert np.mean(shared) >= 9.5
    assert torch.allclose(hits.scores, (queries[:, None] * gallery[hits.rows]).sum(2), atol=1e-5)
    assert (hits.scores.diff(dim=1) <= 0).all()


def test_an_approximate_index_answers_more_than_its_probed_lists_hold(monkeypatch):
    monkeypatch.setattr(retrieval_index, "PROBES", 1)  # about fifteen rows a list
    gallery, queries = features(200), features(9, seed=1)
    assert_best(build_index(gallery, kind="ivf").query(queries, 100), gallery, queries)


def test_small_galleries_are_exact_and_large_ones_approximate(monkeypatch):
    assert build_index(features(100)).engine is None
    monkeypatch.setattr(retrieval_index, "IVF_FROM", 50)
    assert build_index(features(100)).engine.nlist == 10


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_neighbors_are_the_nearest_of_another_id(kind):
    gallery, queries = clustered(400), clustered(30, seed=0)
    ids, own = torch.arange(400) // 5, torch.arange(30) // 2
    index = build_index(gallery, ids, kind=kind)
    hits = index.query(queries, 390 if kind == "ivf" else 8, own)  # 390: more than sixteen lists hold
    assert_best(hits, gallery, queries, (own[:, None] == ids).numpy())
    assert not (hits.ids == own[:, None]).any()


def test_negative_ids_exclude_nothing():
    gallery = features(20)
    hits = build_index(gallery, torch.full((20,), -1)).query(gallery, 1, torch.full((20,), -1))
    assert hits.rows.flatten().tolist() == list(range(20))


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


# ---- bad input -------------------------------------------------------------------------------------


def broken(rows=10, row=7, value=float("nan")):
    made = features(rows)
    made[row, 2] = value
    return made


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.query(features(2), 0), "k is 0 but the gallery has 10 rows"),
        (
            lambda index: index.query(features(2), 11),
            "k is 11 but the gallery has 10 rows; choose k from 1",
        ),
        (lambda index: index.query(features(2, 8), 1), r"shape \(2, 8\) but the index needs \(queries, 16\)"),
        (lambda index: index.query(features(2)[0], 1), r"shape \(16,\) but the index needs"),
        (lambda index: index.query(broken(), 1), "query contains NaN"),
        (lambda index: build_index(features(10)[:0]), "gallery is empty"),
        (lambda index: build_index(broken()), "row 7 of the gallery has length nan"),
        (lambda index: build_index(broken(value=math.inf)), "row 7 of the gallery has length inf"),
        (lambda index: build_index(3 * features(10)), "row 0 of the gallery has length 3; .* normalized"),
        (lambda index: build_index(torch.ones(10)), r"\(rows, width\) floats"),
        (lambda index: build_index(features(10), torch.arange(9)), "10 features need as many int64 ids"),
        (lambda index: build_index(features(10), kind="exat"), "did you mean 'exact'"),
        (lambda index: index.query(features(2), 10, torch.tensor([0, 1])), "only 9 rows have another"),
        (lambda index: index.query(features(2), 1, torch.tensor([0])), "query_ids has shape"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(LabError, match=message):
        call(build_index(features(10)))
