"""Ranks and their figures against independent implementations, by hand, and on bad input."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from small_data import SHARED
from torch.nn import functional as F

import metrics
from core.errors import LabError
from metrics import retrieval_metrics
from retrieval import figures as retrieval_figures
from retrieval.figures import recall_by_gallery_size
from retrieval.ranks import match_ranks

KS = (1, 5, 10)


def scored(scores):
    """Features whose inner products are `scores`, exactly."""
    scores = torch.tensor(scores, dtype=torch.float32)
    return scores, torch.eye(scores.shape[1])


def random_set(num_images=61, captions=5, width=24, noise=2.0, seed=0):
    """Features with `captions` an image on average, some images with none, captions in random order.

    No two scores of a query that decide a rank are nearer than 1e-4, ten times what float32 rounding moves them.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, width, generator=generator)
    owner = torch.randint(num_images, (num_images * captions,), generator=generator)
    texts = images[owner] + noise * torch.randn(len(owner), width, generator=generator)
    image_id = torch.randperm(10 * num_images, generator=generator)[:num_images]
    return images, texts, image_id, image_id[owner]


@functools.cache
def flickr8k_set(num_images=1000):
    """Real features of 1,000 images and 5,000 captions, images mapped to the texts by ridge regression."""
    path = SHARED / "flickr8k" / "features.safetensors"
    if not path.exists():
        pytest.skip("the Flickr8k features are not beside the repository")
    from safetensors.torch import load_file

    tensors = load_file(path)
    images, texts = tensors["image_features"].float(), tensors["text_features"].float()
    train, goal = images[num_images:3000], texts[5 * num_images : 15000].view(-1, 5, texts.shape[1]).mean(1)
    weight = torch.linalg.solve(train.T @ train + 100 * torch.eye(train.shape[1]), train.T @ goal)
    image_id = torch.arange(num_images)
    features = F.normalize(images[:num_images] @ weight)
    return features, texts[: 5 * num_images], image_id, image_id.repeat_interleave(5)


SETS = {"random": random_set, "flickr8k": flickr8k_set}


# ---- independent implementations ---------------------------------------------------------------------


def argsort_ranks(scores, relevant):
    """Ranks of every match, query by query, from a full argsort; queries without a match left out."""
    order = scores.argsort(dim=1, descending=True)
    return [row.nonzero()[:, 0].numpy() + 1 for row in relevant.gather(1, order) if row.any()]


def clip_benchmark_recall(scores, relevant, k):
    """Recall as CLIP_benchmark computes it: is any of the top k a match?"""
    top = torch.topk(scores, k, dim=1)[1]
    onehot = F.one_hot(top, num_classes=scores.shape[1])
    true_positives = (onehot * relevant[:, None, :]).sum(dim=(1, 2))
    wanted = relevant.sum(dim=1)
    return (true_positives / wanted)[wanted > 0].gt(0).float().mean().item()


def directions(image_features, text_features, image_id, text_id):
    scores = image_features.float() @ text_features.float().T
    relevant = image_id[:, None] == text_id
    return {"i2t": (scores, relevant), "t2i": (scores.T, relevant.T)}


def test_ranks_equal_a_full_argsort():
    data = random_set()
    found = match_ranks(*data)
    for way, (scores, relevant) in directions(*data).items():
        expected, one_way = argsort_ranks(scores, relevant), getattr(found, way)
        assert np.array_equal(one_way.values, np.concatenate(expected))
        assert np.array_equal(one_way.counts, [len(each) for each in expected])
        assert np.array_equal(one_way.rows, relevant.any(1).nonzero()[:, 0])
        assert one_way.num_left_out == int((~relevant.any(1)).sum())


@pytest.mark.parametrize("kind", SETS)
def test_recall_equals_clip_benchmark(kind):
    data = SETS[kind]()
    found = retrieval_metrics(*data)
    for way, (scores, relevant) in directions(*data).items():
        for k in KS:
            assert found[f"{way}_recall@{k}"] == pytest.approx(
                clip_benchmark_recall(scores, relevant, k), abs=1e-6
            )


@pytest.fixture
def ranx(monkeypatch):
    """ranx as plain Python: compiling it takes longer than everything else here."""
    numba = pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    return pytest.importorskip("ranx", reason="ranx is not installed")


@pytest.mark.parametrize("kind", SETS)
def test_map_ndcg_and_the_rest_equal_ranx(kind, ranx):
    data = SETS[kind](300)
    found = match_ranks(*data)
    for way, (scores, relevant) in directions(*data).items():
        one_way = getattr(found, way)
        items = [str(item) for item in range(scores.shape[1])]
        queries = [int(row) for row in one_way.rows[:60]]
        truth = {str(q): {str(int(item)): 1 for item in relevant[q].nonzero()[:, 0]} for q in queries}
        run = {str(q): dict(zip(items, scores[q].tolist(), strict=True)) for q in queries}
        names = {"map": "map", "ndcg@10": "ndcg@10", "mrr": "mrr", "r_precision": "r-precision"}
        expected = ranx.evaluate(ranx.Qrels(truth), ranx.Run(run), list(names.values()))
        for ours, theirs in names.items():
            values = retrieval_figures.query_values(one_way, ours)[:60]
            assert values.mean() == pytest.approx(expected[theirs], abs=1e-6)


# ---- by hand -----------------------------------------------------------------------------------------

# Two images; three captions of the first, one of the second, one of neither.
HAND = [[0.9, 0.5, 0.1, 0.7, 0.6], [0.2, 0.8, 0.3, 0.4, 0.95]]
HAND_IDS = ([10, 20], [10, 10, 10, 20, -1])


def test_figures_of_a_written_out_matrix():
    found = match_ranks(*scored(HAND), *HAND_IDS)
    assert found.i2t.values.tolist() == [1, 4, 5, 3]
    assert found.i2t.offsets.tolist() == [0, 3, 4]
    assert found.t2i.values.tolist() == [1, 2, 2, 2]
    assert found.t2i.rows.tolist() == [0, 1, 2, 3]
    figures = retrieval_figures.summarise(found, ks=(1, 2))
    assert figures["i2t_recall@1"] == 0.5
    assert figures["t2i_recall@1"] == 0.25
    assert figures["rsum"] == pytest.approx(100 * (0.5 + 0.5 + 0.25 + 1))
    assert figures["i2t_median_rank"] == 2
    assert figures["i2t_mean_rank"] == 2
    assert figures["i2t_mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert figures["i2t_map"] == pytest.approx(((1 + 2 / 4 + 3 / 5) / 3 + 1 / 3) / 2)
    assert figures["i2t_r_precision"] == pytest.approx((1 / 3 + 0) / 2)
    assert figures["i2t_ndcg@2"] == pytest.approx((1 / (1 + 1 / math.log2(3)) + 0) / 2)
    assert (figures["num_images"], figures["num_texts"]) == (2, 5)
    assert figures["captions_per_image"] == 2
    assert figures["t2i_num_left_out"] == 1
    assert figures["t2i_num_queries"] == 4


def test_ties_count_against_the_model():
    # One text ties with the match of image 1; both captions of image 2 tie with each other.
    image_features, text_features = scored([[0.5, 0.5, 0.1], [0.0, 0.3, 0.3]])
    found = match_ranks(image_features, text_features, [1, 2], [1, 2, 2])
    assert found.i2t.values.tolist() == [2, 1, 2]
    assert match_ranks(torch.ones(4, 3), torch.ones(4, 3), range(4), range(4)).t2i.values.tolist() == [4] * 4


def test_a_collapsed_model_has_no_recall():
    image_id = torch.arange(100)
    figures = retrieval_metrics(torch.ones(100, 8), torch.ones(500, 8), image_id, image_id.repeat(5))
    assert figures["rsum"] == 0
    assert figures["i2t_median_rank"] == 496


@pytest.mark.parametrize("tile", [None, (64, 48), (7, 5), (3000, 33)])
def test_copies_of_an_image_tie_exactly_wherever_they_stand(tile):
    originals = torch.randn(23, 512, generator=torch.Generator().manual_seed(1))
    images, texts = originals.repeat(3, 1), originals.repeat_interleave(2, 0)
    image_id = torch.arange(3 * 23)
    found = match_ranks(
        F.normalize(images), F.normalize(texts), image_id, image_id[:23].repeat(2).sort()[0], tile
    )
    assert found.t2i.best.tolist() == [3] * 46
    assert found.i2t.values.tolist() == [1, 2] * 23


@pytest.mark.parametrize("tile", [(1, 1), (17, 50), (2000, 5), (32, 8)])
def test_the_tile_changes_nothing(tile):
    data = random_set(num_images=12, captions=3)
    whole, tiled = match_ranks(*data), match_ranks(*data, tile=tile)
    for way in ("i2t", "t2i"):
        assert np.array_equal(getattr(whole, way).values, getattr(tiled, way).values)
    assert np.array_equal(whole.i2t.closer, tiled.i2t.closer)


def test_one_image_with_very_many_captions():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(4, 8, generator=generator), torch.randn(90, 8, generator=generator)
    ids = (torch.arange(4), torch.tensor([0] * 80 + [1] * 10))
    found = match_ranks(images, texts, *ids, tile=(16, 2))
    expected = argsort_ranks(images @ texts.T, ids[0][:, None] == ids[1])
    assert np.array_equal(found.i2t.values, np.concatenate(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_in_float32(dtype):
    images, texts, *ids = random_set()
    images, texts = images.to(dtype), texts.to(dtype)
    assert retrieval_metrics(images, texts, *ids) == retrieval_metrics(images.float(), texts.float(), *ids)


def test_autocast_and_gradients_change_nothing():
    images, texts, *ids = random_set()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = retrieval_metrics(images.requires_grad_(), texts, *ids)
    assert inside == retrieval_metrics(images.detach(), texts, *ids)


def test_products_are_full_float32_whatever_was_set():
    data = random_set()
    expected = retrieval_metrics(*data)
    torch.set_float32_matmul_precision("medium")
    try:
        assert retrieval_metrics(*data) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- the gallery -------------------------------------------------------------------------------------


def test_repeated_images_are_one():
    images, texts, image_id, text_id = flat = random_set()
    row = {int(each): place for place, each in enumerate(image_id)}
    pairs = torch.tensor([row[int(each)] for each in text_id] + list(range(len(images))))
    found = retrieval_metrics(images[pairs], texts, image_id[pairs], text_id)
    assert found == pytest.approx(retrieval_metrics(*flat), abs=1e-12)
    assert found["num_images"] == len(images)


def test_an_id_that_names_two_images_is_an_error():
    with pytest.raises(LabError, match="image_id 3 is the id of rows with different features"):
        match_ranks(torch.eye(3), torch.eye(3), [3, 4, 3], [3, 4, 4])


def test_id_minus_one_is_only_a_distractor():
    image_features, text_features = scored([[0.1, 0.9], [0.5, 0.2], [0.5, 0.2]])
    found = match_ranks(image_features, text_features, [1, -1, -1], [1, -1])
    assert found.i2t.values.tolist() == [2]
    assert found.t2i.values.tolist() == [3]
    assert (found.i2t.num_left_out, found.t2i.num_left_out) == (2, 1)


def test_chance_is_what_random_features_reach():
    images, texts, *ids = random_set(num_images=100, captions=4)
    runs = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(each.shape, generator=generator) for each in (images, texts)]
        runs.append(retrieval_metrics(*noise, *ids))
    for name in ("i2t_{}@1", "i2t_{}@5", "t2i_{}@5"):
        found = np.mean([run[name.format("recall")] for run in runs])
        assert found == pytest.approx(runs[0][name.format("chance")], abs=0.015)
    assert runs[0]["t2i_chance@5"] == pytest.approx(5 / 100)
    missed = np.prod([(20 - 5 - n) / (20 - n) for n in range(4)])  # drawn without replacement
    assert retrieval_figures.chance(np.array([5]), 20, 4) == pytest.approx(1 - missed)
    assert retrieval_figures.chance(np.array([5]), 20, 16) == 1


def test_k_over_the_gallery_is_everything_and_so_is_chance():
    figures = retrieval_figures.summarise(
        match_ranks(torch.eye(3), torch.eye(3), range(3), range(3)), ks=(1, 50)
    )
    assert figures["i2t_recall@50"] == figures["i2t_chance@50"] == 1
    assert figures["t2i_chance@1"] == pytest.approx(1 / 3)


# ---- recall over gallery size ------------------------------------------------------------------------


def hits_in(scores, relevant):
    """Whether each query of a drawn gallery hits, both ways, from the scores themselves."""
    kept = relevant.any(0)
    if not kept.any():
        return [torch.zeros(0), torch.zeros(0)]
    scores, relevant = scores[:, kept], relevant[:, kept]
    hits = []
    for square, matches in ((scores, relevant), (scores.T, relevant.T)):
        best = square.masked_fill(~matches, -math.inf).amax(1, keepdim=True)
        rivals = ((square >= best) & ~matches).sum(1)
        hits.append((rivals == 0)[matches.any(1)])
    return hits


@pytest.mark.parametrize("seed", range(3))
def test_recall_by_gallery_size_is_the_mean_over_all_galleries(seed):
    images, texts, image_id, text_id = random_set(num_images=9, captions=4, width=8, seed=seed)
    sizes = [1, 4, 6, 9]
    curve = recall_by_gallery_size(match_ranks(images, texts, image_id, text_id), sizes)
    scores, relevant = images @ texts.T, image_id[:, None] == text_id
    for place, size in enumerate(sizes):
        hits = [
            hits_in(scores[list(rows)], relevant[list(rows)])
            for rows in itertools.combinations(range(9), size)
        ]
        for way, values in zip(("i2t", "t2i"), zip(*hits, strict=True), strict=True):
            assert curve[way][place] == pytest.approx(torch.cat(values).double().mean().item(), abs=1e-9)


def test_recall_by_gallery_size_ends_at_the_full_gallery():
    found = match_ranks(*random_set())
    figures, curve = retrieval_figures.summarise(found), recall_by_gallery_size(found, [1, found.num_images])
    assert curve["i2t"] == pytest.approx([1, figures["i2t_recall@1"]])
    assert curve["t2i"] == pytest.approx([1, figures["t2i_recall@1"]])


def test_captions_without_an_image_have_no_place_in_the_curve():
    with pytest.raises(LabError, match="1 captions belong to no image"):
        recall_by_gallery_size(match_ranks(*scored(HAND), *HAND_IDS), [1, 2])
    with pytest.raises(LabError, match="sizes between 1 and 61 images"):
        recall_by_gallery_size(match_ranks(*random_set()), [500])


# ---- protocols ---------------------------------------------------------------------------------------


def test_fivefold_is_the_mean_of_five_galleries(monkeypatch):
    small = metrics.Protocol("fifty images in five folds, two captions", 50, 2, 5)
    monkeypatch.setattr(metrics, "PROTOCOLS", {"small": small})
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(50, 8, generator=generator), torch.randn(150, 8, generator=generator)
    image_id, text_id = torch.arange(50) * 3, torch.arange(50).repeat_interleave(3) * 3
    found = metrics.evaluate_protocol("small", images, texts, image_id, text_id)
    first_two = torch.arange(150) % 3 < 2
    expected = []
    for fold in range(5):
        rows = slice(10 * fold, 10 * fold + 10)
        kept = first_two & torch.isin(text_id, image_id[rows])
        expected.append(retrieval_metrics(images[rows], texts[kept], image_id[rows], text_id[kept]))
    assert found["i2t_recall@1"] == pytest.approx(np.mean([fold["i2t_recall@1"] for fold in expected]))
    assert found["t2i_median_rank"] == pytest.approx(np.mean([fold["t2i_median_rank"] for fold in expected]))
    assert (found["num_images"], found["num_texts"]) == (10, 20)
    assert (found["protocol"], found["protocol_description"]) == ("small", small.description)


def test_one_caption_takes_the_first():
    images, texts, image_id, text_id = random_set()
    found = metrics.evaluate_protocol("one_caption", images, texts, image_id, text_id)
    first = sorted({int(each): row for row, each in reversed(list(enumerate(text_id)))}.values())
    expected = retrieval_metrics(images, texts[first], image_id, text_id[first])
    assert {key: found[key] for key in expected} == expected
    assert found["captions_per_image"] == 1


def test_a_protocol_refuses_another_set():
    data = random_set()
    with pytest.raises(LabError, match=r"this set holds 61 images and lacks .* Choose 'full'"):
        metrics.evaluate_protocol("coco_5k", *data)
    with pytest.raises(LabError, match="did you mean 'coco_5k'"):
        metrics.evaluate_protocol("coco5k", *data)
    assert metrics.evaluate_protocol("full", *data)["rsum"] == retrieval_metrics(*data)["rsum"]


def test_published_points_name_protocols_and_stand_in_order():
    assert len(metrics.PUBLISHED) == 8
    for point in metrics.PUBLISHED:
        assert metrics.PROTOCOLS[point.protocol].num_images in (None, point.num_images)
        assert all(list(way) == sorted(way) and 0 < way[0] < 1 for way in (point.i2t, point.t2i))


def test_published_points_leave_out_what_was_not_reported():
    assert ("LiT coco_B16B, trained on COCO alone", 5000, 0.321) in metrics.published_points("t2i", 1)
    assert len(metrics.published_points("i2t", 10)) == 7
    with pytest.raises(LabError, match="published k '3' does not exist"):
        metrics.published_points(k=3)


# ---- bad input ---------------------------------------------------------------------------------------

EYE, IDS = torch.eye(3), [1, 2, 3]
NAN = EYE.clone().fill_diagonal_(float("nan"))
BAD = {
    "image_features contain NaN": (NAN, EYE, IDS, IDS),
    "text_features contain NaN": (EYE, EYE / 0, IDS, IDS),
    "image_id has 2 ids for 3 rows": (EYE, EYE, IDS[:2], IDS),
    "text_id has 4 ids for 3 rows": (EYE, EYE, IDS, [*IDS, 4]),
    "take both from the same": (EYE, torch.ones(3, 4), IDS, IDS),
    "no text_id equals any image_id": (EYE, EYE, IDS, [-1, 7, 8]),
    "no text_id equals any": (EYE, EYE, [-1, -1, -1], [-1, -1, -1]),
    "list of whole numbers": (EYE, EYE, [0.5, 1.0, 2.0], IDS),
    "of floats with at least one row": (EYE[:0], EYE, [], IDS),
    "text_features must be a .rows, width. tensor": (EYE, EYE.long(), IDS, IDS),
    "must be a torch tensor, not ndarray": (EYE.numpy(), EYE, IDS, IDS),
    "overflow float32": (EYE * 1e30, EYE * 1e30, IDS, IDS),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_told_in_a_sentence(message):
    with pytest.raises(LabError, match=message):
        retrieval_metrics(*BAD[message])


@pytest.mark.parametrize("ks", [(0,), (1.5,), (-3,), ("x",)])
def test_k_must_be_a_whole_number(ks):
    with pytest.raises(LabError, match="whole number of at least 1"):
        retrieval_metrics(EYE, EYE, IDS, IDS, ks=ks)


def test_no_k_and_no_such_figure():
    with pytest.raises(LabError, match="ks is empty"):
        retrieval_metrics(EYE, EYE, IDS, IDS, ks=())
    with pytest.raises(LabError, match="did you mean 'recall'"):
        retrieval_figures.query_values(match_ranks(EYE, EYE, IDS, IDS).i2t, "recal@1")


# --- geometry of features ---


def random_features(seed: int, rows: int, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width)) + 0.3
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_geometry_matches_scipy_s_distances():
    images, texts = random_features(0, 12), random_features(1, 30)
    image_id = np.array([*range(10), 10, -1])
    text_id = np.array([*np.repeat(np.arange(9), 3), -1, 77, 10])
    found = retrieval_figures.feature_geometry(torch.tensor(images), texts, image_id, text_id)
    match = (image_id[:, None] == text_id) & (text_id != -1)
    # float32: 8 products of a unit vector, times 4 in the exponent, and 30 rows: less than 1e-5
    squared = cdist(images, texts, "sqeuclidean")
    assert found["alignment"] == pytest.approx(squared[match].mean(), abs=1e-5)
    for side, rows in (("image", images), ("text", texts)):
        expected = np.log(np.exp(-2 * pdist(rows, "sqeuclidean")).mean())
        assert found[f"{side}_uniformity"] == pytest.approx(expected, abs=1e-5)
    gap = np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0))
    assert found["modality_gap"] == pytest.approx(gap, abs=1e-5)
    assert retrieval_figures.uniformity(images, chunk=5) == pytest.approx(found["image_uniformity"], abs=1e-5)


def test_uniformity_of_many_rows_is_that_of_evenly_spaced_ones():
    images, texts = random_features(0, 3), random_features(1, 31)
    found = retrieval_figures.feature_geometry(images, texts, range(3), [0] * 31, most=10)
    assert found["text_uniformity"] == retrieval_figures.uniformity(texts[::4])
    assert found["image_uniformity"] == retrieval_figures.uniformity(images)
    assert np.isnan(retrieval_figures.feature_geometry(images[:1], texts, [0], [0] * 31)["image_uniformity"])


def test_geometry_refuses_bad_features():
    with pytest.raises(LabError, match="no image and text share an id"):
        retrieval_figures.alignment(random_features(0, 2), random_features(1, 2), [1, -1], [2, -1])
    with pytest.raises(LabError, match="text_features must be finite"):
        retrieval_figures.modality_gap_size(random_features(0, 2), np.full((2, 8), np.nan))
    with pytest.raises(LabError, match="at least two rows"):
        retrieval_figures.uniformity(random_features(0, 1))
