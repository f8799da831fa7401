"""Ranks of pairs of pictures, their figures, intervals and tables, against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import bootstrap

from config import load_config, make_config
from core.errors import LabError
from core.files import read_json
from evaluate import evaluate_run
from labs.side_by_side import (
    evaluate_pairs,
    guesses,
    pairs_table,
    report_pairs,
    settings_table,
)
from metrics import metrics_table
from models import build_model
from sources.drawing import write_shapes
from sources.side_by_side import PairRanks, rank_pairs, swapped
from train import fit
from utils import load_run

ROOT = Path(__file__).resolve().parent.parent
C = 4


@pytest.fixture(scope="module")
def scored():
    """300 pictures of ordered pairs of four classes, near their own caption, and the scores."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.nn.functional.normalize(torch.randn(C * C, 12, generator=generator), dim=1)
    truth = torch.randint(0, C * C, (300,), generator=generator)
    images = captions[truth] + 0.35 * torch.randn(300, 12, generator=generator)
    images = torch.nn.functional.normalize(images, dim=1)
    return images, captions, truth


def test_ranks_equal_a_plain_loop(scored):
    images, captions, truth = scored
    found = rank_pairs(images, captions, truth)
    scores = (images.double() @ captions.double().T).numpy()
    for item, own in enumerate(truth.tolist()):
        left, right = divmod(own, C)
        other = right * C + left
        assert found.rank[item] == 1 + sum(scores[item] > scores[item, own])
        assert found.first[item] == scores[item].argmax()
        assert found.in_order[item] == (scores[item, own] > scores[item, other])
        assert found.different[item] == (left != right)


def test_figures_are_the_shares_of_a_plain_count(scored):
    images, captions, truth = scored
    found = rank_pairs(images, captions, truth)
    figures = found.figures()
    best = (images @ captions.T).argmax(dim=1).tolist()
    pairs = [(divmod(own, C), divmod(first, C)) for own, first in zip(truth.tolist(), best, strict=True)]
    different = [(own, first) for own, first in pairs if own[0] != own[1]]
    assert figures["top1"] == pytest.approx(np.mean([own == first for own, first in pairs]))
    assert figures["swapped"] == pytest.approx(np.mean([own == first[::-1] for own, first in different]))
    assert figures["top1_different"] == pytest.approx(np.mean([own == first for own, first in different]))
    assert figures["top10"] == pytest.approx((found.rank <= 10).mean())
    assert "top100" not in figures
    assert 0 < figures["swapped"] < figures["top1"] < figures["order"] < 1


def test_equal_scores_count_against_the_model():
    captions = torch.ones(9, 4) / 2
    found = rank_pairs(captions[:3], captions, torch.tensor([1, 4, 8]))
    assert found.rank.tolist() == [9, 9, 9]
    assert found.figures()["top1"] == found.figures()["order"] == 0.0
    assert (found.first != found.truth).all()


def test_figures_of_nothing_are_left_out():
    ranks = PairRanks(np.array([0, 4, 8]), np.array([1, 2, 1]), np.array([0, 1, 8]), np.zeros(3, bool), 3)
    assert ranks.figures() == {"top1": pytest.approx(2 / 3), "top1_same": pytest.approx(2 / 3)}


def test_intervals_equal_those_of_scipy(scored):
    found = rank_pairs(*scored)
    low, high = found.intervals(samples=3000)["top1"]
    hits = (found.rank == 1).astype(float)
    theirs = bootstrap((hits,), np.mean, n_resamples=3000, method="percentile", rng=0).confidence_interval
    assert (low, high) == (pytest.approx(theirs.low, abs=0.008), pytest.approx(theirs.high, abs=0.008))
    mirrored = (found.first == swapped(found.truth, C))[found.different].astype(float)
    theirs = bootstrap((mirrored,), np.mean, n_resamples=3000, method="percentile", rng=0).confidence_interval
    assert found.intervals(samples=3000)["swapped"] == (
        pytest.approx(theirs.low, abs=0.008),
        pytest.approx(theirs.high, abs=0.012),
    )


def test_classes_are_counted_where_they_stand(scored):
    found = rank_pairs(*scored)
    table = found.by_class(list("abcd"))
    left, right = np.divmod(found.truth, C)
    for label, name in enumerate("abcd"):
        shown = (left == label) | (right == label)
        assert table.loc[name, "images"] == shown.sum()
        assert table.loc[name, "top1"] == pytest.approx((found.rank[shown] == 1).mean())
        assert table.loc[name, "named on the right"] == pytest.approx(
            (found.first[right == label] % C == label).mean()
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, captions: (images, captions[:15]), "15 captions are not those of all ordered pairs"),
        (lambda images, captions: (images * float("nan"), captions), "features are not finite"),
    ],
)
def test_what_cannot_be_ranked_is_one_sentence(scored, change, message):
    images, captions, truth = scored
    with pytest.raises(LabError, match=message):
        rank_pairs(*change(images, captions), truth)


# --- runs ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs with a tiny tower and captions encoded as they are needed."""
    root = tmp_path_factory.mktemp("pairs")
    write_shapes(root / "shapes", num_train=20, num_test=2)
    config = make_config(
        "paired_small", data_dir=root / "shapes", cache_dir=root / "cache", runs_dir=root / "runs", device="cpu",
        image_width=16, image_num_layers=1, image_num_heads=2, num_epochs=2, batch_size=60, swap_weight=0.5,
        precision="fp32",
    )  # fmt: skip
    return fit(config, show=False)


def test_a_run_learns_from_pairs_and_chooses_its_epoch_by_top1(run):
    assert run.finished
    assert run.best_epoch == run.history["top1"].argmax() + 1
    assert {"swapped", "order", "top10"} <= set(run.history)
    assert run.history["train_loss"].iloc[1] < run.history["train_loss"].iloc[0]


def test_the_same_seed_gives_the_same_bits(run, tmp_path):
    again = fit(run.config.updated(runs_dir=tmp_path, deterministic=True), show=False)
    ours, theirs = (load_file(of.folder / "best.safetensors") for of in (run, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_report_writes_what_was_measured(run):
    results = report_pairs(run, show=False)
    kept = read_json(run.folder / "metrics.json")
    assert {split: kept[split]["num_images"] for split in kept} == {"train": 180, "val": 20, "test": 20}
    for split, metrics in kept.items():
        assert metrics == results[split].metrics
        assert metrics["top1_low"] <= metrics["top1"] <= metrics["top1_high"]
        assert (metrics["num_texts"], metrics["top1_chance"]) == (100, 0.01)
    assert kept["val"]["top1"] == pytest.approx(run.history["top1"].max())
    table = pairs_table(results)
    assert list(table.index) == ["train", "val", "test", "chance"]
    assert table.loc["chance", "top10"] == "10"
    for name in ("tables/pairs.md", "tables/pairs_by_class.csv", "figures/pair_examples.png",
                 "figures/learning_curves.png", "report.html"):  # fmt: skip
        assert (run.folder / name).stat().st_size > 0
    words = guesses(results["test"], range(20))
    hits = results["test"].ranks.rank == 1
    assert [text.startswith("✓ a photo of") for text in words] == hits.tolist()


def test_the_common_evaluation_measures_side_by_side_images(run):
    pairs = evaluate_pairs(run, ["test"], show=False)["test"].metrics
    assert evaluate_run(load_run(run.folder), again=True, show=False)["test"] == pairs
    table = metrics_table({"test": pairs})
    assert table.loc[
        table.index.get_level_values(-1) == "model", "top1"
    ].item() == f"{100 * pairs['top1']:.1f} " + (
        f"[{100 * pairs['top1_low']:.1f}, {100 * pairs['top1_high']:.1f}]"
    )
    assert table.iloc[1]["top1"] == "1.0"


def test_settings_stand_side_by_side_with_their_spread(run):
    measured = [(run, {"top1": 0.5}), (run, {"top1": 0.6})]
    table = settings_table(measured)
    assert table["top1"].tolist() == ["55.0 ± 7.1"]
    assert table["seeds"].tolist() == [2]
    assert table.index[0].startswith("paired_small: ")


def test_mistakes_are_one_sentence(run):
    run.config.reader = "coco"
    with pytest.raises(LabError, match="was trained on reader 'coco'"):
        evaluate_pairs(run, show=False)
    run.config.reader = "paired_cifar"


# --- settings ---


def test_the_json_file_is_the_preset_with_its_documented_values():
    config = load_config(ROOT / "configs" / "paired_cifar.json")
    documented = dict(
        batch_size=32, learning_rate=1e-4, num_epochs=20, warmup_epochs=2, weight_decay=0.01, max_grad_norm=1.0,
        temperature=0.07, image_patch_size=8, image_width=768, image_num_layers=6, image_num_heads=12,
    )  # fmt: skip
    assert {name: config[name] for name in documented} == documented
    baseline = make_config("paired_cifar_baseline")
    assert {name: baseline[name] for name in documented} == documented


def test_the_documented_tower_reads_two_pictures_side_by_side():
    config = make_config("paired_cifar_baseline", text_tower="minilm")
    with torch.device("meta"):
        tower = build_model(config).image_encoder
    assert tower.picture_shape == (32, 64)
    assert tower.grid == (4, 8)
    assert 42e6 < sum(p.numel() for p in tower.parameters()) < 43e6  # 6 * 12 * 768^2 + patches


def test_tables_of_nothing_are_one_sentence():
    with pytest.raises(LabError, match="there is no finished run to compare; train one first"):
        settings_table([])
    with pytest.raises(LabError, match="there is no evaluated split to show"):
        pairs_table({})
