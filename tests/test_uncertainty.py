"""Intervals and tests against their textbook values, and what may be claimed."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from core.errors import LabError
from retrieval.figures import query_values, summarise
from retrieval.ranks import QueryRanks, Ranks, match_ranks
from retrieval.statistics import CHUNK_BYTES, bootstrap_intervals, compare_settings, paired_test


def make_ranks(noise=3.0, seed=0, num_images=300, captions=5):
    """Ranks of one gallery as a model with this much noise would have them."""
    generator = torch.Generator().manual_seed(99)
    images = torch.randn(num_images, 16, generator=generator)
    image_id = torch.randperm(num_images, generator=generator)
    generator.manual_seed(seed)
    texts = images.repeat_interleave(captions, 0)
    texts = texts + noise * torch.randn(texts.shape, generator=generator)
    return match_ranks(images, texts, image_id, image_id.repeat_interleave(captions))


def ranked(best):
    """Ranks of one-to-one pairs that stand at these places, both ways."""
    rows = np.arange(len(best))
    one_way = QueryRanks(best, np.arange(len(best) + 1), rows, rows, 4000, 0, best - 1)
    return Ranks(one_way, one_way)


def bootstrap_interval(ranks, name="i2t_recall@1", **options):
    return bootstrap_intervals(ranks, [name], **options)[name]


# ---- bootstrap over images ---------------------------------------------------------------------------


def test_an_interval_of_a_proportion_is_the_normal_one():
    ranks = make_ranks()
    found = bootstrap_interval(ranks, "i2t_recall@1", samples=4000)
    value = summarise(ranks)["i2t_recall@1"]
    error = (value * (1 - value) / 300) ** 0.5
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.006)


def test_captions_are_drawn_with_their_image():
    ranks = make_ranks()
    found = bootstrap_interval(ranks, "t2i_recall@1", samples=4000)
    hits = query_values(ranks.t2i, "recall@1")
    per_image = np.array([hits[ranks.t2i.image_id == image].mean() for image in range(300)])
    error = per_image.std() / 300**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_bootstrap_equals_a_written_out_loop():
    ranks = make_ranks(num_images=40)
    found = bootstrap_interval(ranks, "t2i_map", samples=3000)
    values, rng = query_values(ranks.t2i, "map"), np.random.default_rng(5)
    rows = [np.flatnonzero(ranks.t2i.image_id == image) for image in range(40)]
    draws = [
        values[np.concatenate([rows[image] for image in rng.integers(40, size=40)])].mean()
        for _ in range(3000)
    ]
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)


def test_several_figures_share_their_draws_and_rsum_adds_up():
    ranks = make_ranks()
    found = bootstrap_intervals(ranks, ["rsum", "i2t_recall@1", "t2i_mrr"])
    assert found["rsum"].value == pytest.approx(summarise(ranks)["rsum"])
    assert found["i2t_recall@1"] == bootstrap_interval(ranks, "i2t_recall@1")
    assert found["rsum"].low < found["rsum"].value < found["rsum"].high


def test_a_wider_level_is_a_wider_interval_and_the_seed_repeats():
    ranks = make_ranks()
    narrow, wide = (bootstrap_interval(ranks, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert bootstrap_interval(ranks, seed=3) == bootstrap_interval(ranks, seed=3)
    with pytest.raises(LabError, match="between 0 and 1"):
        bootstrap_interval(ranks, level=95)


def test_coverage_over_many_galleries():
    population = np.random.default_rng(7).geometric(0.4, 4000)
    truth = (1 / population).mean()
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        sample = ranked(rng.choice(population, 150))
        interval = bootstrap_interval(sample, "i2t_mrr", samples=300)
        inside += interval.low <= truth <= interval.high
    assert 0.89 <= inside / 200 <= 0.99


def test_a_gallery_of_one_image_has_an_interval_of_no_width():
    interval = bootstrap_interval(ranked(np.array([2])), "t2i_mrr")
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)
    test = paired_test(ranked(np.array([1])), ranked(np.array([2])), "t2i_mrr")
    assert (test.difference, test.low, test.high, test.is_difference) == (0.5, 0.5, 0.5, False)


def test_resampling_takes_a_bounded_memory():
    rng = np.random.default_rng(0)
    first, second = (ranked(rng.geometric(0.3, 20_000)) for _ in range(2))
    tracemalloc.start()
    paired_test(first, second, "t2i_mrr", samples=1000, permutations=1000)  # 160 MB in one piece
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * CHUNK_BYTES


# ---- two runs on one gallery -------------------------------------------------------------------------


def test_permutation_equals_the_sign_test_where_it_must():
    # With one query an image and gaps of +-1, swapping is tossing a coin for every changed image.
    first, second = make_ranks(noise=2.0, seed=1), make_ranks(noise=2.6, seed=2)
    found = paired_test(first, second, "i2t_recall@1", permutations=40_000)
    ours, theirs = (query_values(each.i2t, "recall@1") for each in (first, second))
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    expected = stats.binomtest(wins, wins + losses).pvalue
    assert found.difference == pytest.approx((wins - losses) / 300)
    assert found.p_value == pytest.approx(expected, abs=0.01)


def test_a_run_does_not_differ_from_itself():
    ranks = make_ranks()
    found = paired_test(ranks, ranks)
    assert (found.difference, found.p_value, found.is_difference) == (0, 1, False)


@pytest.mark.parametrize("name", ["i2t_recall@1", "t2i_map", "rsum"])
def test_a_clear_difference_is_found_with_its_sign(name):
    better, worse = make_ranks(noise=1.5, seed=1), make_ranks(noise=4.0, seed=2)
    found = paired_test(better, worse, name)
    assert found.is_difference
    assert 0 < found.low < found.difference < found.high
    assert paired_test(worse, better, name).difference == pytest.approx(-found.difference)


def test_the_paired_interval_is_that_of_the_paired_differences():
    first, second = make_ranks(noise=2.0, seed=1), make_ranks(noise=2.2, seed=2)
    found = paired_test(first, second, "i2t_mrr", samples=4000)
    gaps = query_values(first.i2t, "mrr") - query_values(second.i2t, "mrr")
    reach = 1.96 * gaps.std() / 300**0.5
    assert (found.low, found.high) == pytest.approx((gaps.mean() - reach, gaps.mean() + reach), abs=0.005)


def test_equal_runs_are_called_different_one_time_in_twenty():
    rng, calls = np.random.default_rng(0), []
    for _ in range(300):
        runs = [ranked(rng.geometric(0.3, 60)) for _ in range(2)]
        calls.append(paired_test(*runs, "t2i_mrr", samples=10, permutations=400).is_difference)
    assert 0.01 <= np.mean(calls) <= 0.10


def test_runs_on_other_galleries_are_refused():
    with pytest.raises(LabError, match="not measured on the same gallery"):
        paired_test(make_ranks(num_images=300), make_ranks(num_images=301))


# ---- settings over seeds -----------------------------------------------------------------------------


def test_welch_interval_by_hand():
    first, second = [0.62, 0.60, 0.63, 0.61], [0.55, 0.58, 0.52]
    found = compare_settings(first, second)
    errors = [np.var(side, ddof=1) / len(side) for side in (first, second)]
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 3 + errors[1] ** 2 / 2)
    reach = stats.t.ppf(0.975, freedom) * sum(errors) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.difference - reach, found.difference + reach))
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert found.is_difference


def test_two_seeds_are_no_difference_however_far_apart():
    found = compare_settings([0.9, 0.91, 0.9], [0.1, 0.11])
    assert not found.is_difference
    assert found.difference == pytest.approx(0.7983, abs=1e-3)
    assert np.isnan(found.low)


def test_overlapping_seeds_are_no_difference():
    found = compare_settings([0.60, 0.64, 0.56], [0.58, 0.62, 0.55])
    assert not found.is_difference
    assert found.low < 0 < found.high


@pytest.mark.filterwarnings("error")
def test_equal_seeds_have_an_interval_and_no_warning():
    found = compare_settings([0.5] * 3, [0.6, 0.61, 0.62])
    assert found.high < 0
    assert found.is_difference
    same = compare_settings([0.5] * 3, [0.5] * 3)
    assert (same.low, same.high, same.is_difference) == (0, 0, False)


# ---- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("recall@1", "names no direction; write i2t_recall@1"),
        ("i2t_median_rank", "did you mean 'mean_rank'"),
        ("i2t_recall@0", "whole number of at least 1"),
    ],
)
def test_a_figure_that_does_not_exist(name, message):
    with pytest.raises(LabError, match=message):
        bootstrap_interval(make_ranks(num_images=20), name)


@pytest.mark.parametrize("empty", [[], [0.5, float("nan"), 0.6]])
def test_a_setting_without_values_is_refused(empty):
    with pytest.raises(LabError, match="without values, or with NaN"):
        compare_settings(empty, [0.1, 0.2, 0.3])
