"""A finished run answers: metrics, queries, zero-shot, comparison, and mistakes are named."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

import evaluate
from config import make_config
from errors import LabError
from scenes import load_scenes, write_scenes
from train import fit
from utils import load_run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    write_scenes(root / "scenes", num_train=40, num_val=12, num_test=20, num_novel=12)
    return root


@pytest.fixture(scope="module")
def run(home):
    return fit(config_of(home), show=False)


def config_of(home, **settings):
    places = dict(data_dir=home / "scenes", cache_dir=home / "cache", runs_dir=home / "runs", device="cpu")
    return make_config(
        "quickstart",
        image_tower_mode="cached",
        image_size=64,
        num_epochs=4,
        batch_size=16,
        **places,
        **settings,
    )


@pytest.fixture(scope="module")
def gallery(run):
    return evaluate.open_gallery(run, "test", show=False)


def test_metrics_state_their_protocol_and_are_read_once(run):
    found = evaluate.evaluate_run(run)
    assert set(found) == {"test", "novel"}
    assert (found["test"]["split"], found["test"]["num_images"], found["test"]["num_texts"]) == (
        "test",
        20,
        100,
    )
    assert found["novel"]["captions_per_image"] == 5
    assert all(0 <= value <= 1 for name, value in found["test"].items() if "recall@" in name)
    low, high = found["test"]["t2i_recall@5_low"], found["test"]["t2i_recall@5_high"]
    assert low < found["test"]["t2i_recall@5"] < high
    assert found["test"]["intervals"] == "95 %, bootstrap over images, test sample only"
    kept = load_run(run.folder)
    assert kept.metrics == found
    kept.metrics["test"]["i2t_recall@1"] = -1.0  # a second call takes what is kept
    assert evaluate.evaluate_run(kept)["test"]["i2t_recall@1"] == -1.0
    assert {p.name for p in (run.folder / "figures").iterdir()} == {
        "learning_curves.png", "recall_test.png", "recall_novel.png"}  # fmt: skip


def test_recall_is_what_a_written_out_argsort_says(run, gallery):
    scores = gallery.image_features @ gallery.text_features.T
    best = gallery.text_id[scores.argmax(dim=1)] == gallery.image_id
    assert gallery.metrics()["i2t_recall@1"] == pytest.approx(best.float().mean().item())
    top = gallery.image_id[scores.T.argsort(dim=1, descending=True)[:, :5]] == gallery.text_id[:, None]
    assert gallery.metrics()["t2i_recall@5"] == pytest.approx(top.any(dim=1).float().mean().item())


def test_a_query_ranks_the_whole_gallery(gallery):
    caption = gallery.dataset.table.captions_of(3)[4]
    (found,) = evaluate.search_text(gallery, [caption], k=20)
    assert len(set(found.pictures)) == 20
    assert found.scores == sorted(found.scores, reverse=True)
    assert sum(found.correct) == 1
    assert found.pictures[found.correct.index(True)] == gallery.dataset.table.path_of(3)
    assert evaluate.search_text(gallery, ["nobody wrote this"], k=1)[0].correct is None


def test_zero_shot_gives_probabilities_by_label(gallery):
    probabilities = evaluate.zero_shot(gallery, [0, 5], ["red circle", "blue star", "green heart"])
    assert probabilities.shape == (2, 3)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(2))
    swapped = evaluate.zero_shot(gallery, [5, 0], ["blue star", "red circle", "green heart"])
    assert torch.allclose(swapped, probabilities[[1, 0]][:, [1, 0, 2]], atol=1e-5)


def test_known_labels_are_those_of_pictures_of_one_object(home, gallery):
    scenes = load_scenes(home / "scenes", "test")
    known = evaluate.known_labels(gallery)
    alone = [i for i, ident in enumerate(gallery.image_id.tolist()) if len(scenes[ident].objects) == 1]
    assert sorted(known) == alone
    accuracy = evaluate.zero_shot_accuracy(gallery)
    assert accuracy["pictures"] == len(alone)
    assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: evaluate.search_text(g, ["x"], k=21), "k is 21 but the gallery holds 20"),
        (lambda g: evaluate.search_text(g, ["x"], k=0), "k is 0"),
        (lambda g: evaluate.zero_shot(g, [0], ["a", "a"]), "none given twice"),
        (lambda g: evaluate.zero_shot(g, [0], ["a", " "]), "none empty"),
        (lambda g: evaluate.zero_shot(g, [0], ["only one"]), "at least two"),
        (lambda g: evaluate.zero_shot(g, [0], ["a", "b"], ["no place"]), "needs {}"),
        (lambda g: evaluate.compare_runs([]), "train one first"),
    ],
)
def test_mistakes_are_named(gallery, call, message):
    with pytest.raises(LabError, match=message):
        call(gallery)


def test_settings_stand_side_by_side_and_seeds_are_averaged(home, run):
    fit(config_of(home, seed=1), show=False)
    fit(config_of(home, use_batch_norm=True), show=False)
    runs = evaluate.finished_runs(home / "runs", "quickstart")
    table = evaluate.compare_runs(runs)
    assert table["seeds"].tolist() == [2, 1]
    assert "bn" in table.index[1]
    both = [r.metrics["test"]["t2i_recall@5"] for r in runs if not r.config.use_batch_norm]
    assert table["t2i_recall@5"].iloc[0] == pytest.approx(sum(both) / 2)
    assert table["t2i_recall@5_std"].iloc[0] == pytest.approx(pd.Series(both).std())
    assert pd.isna(table["t2i_recall@5_std"].iloc[1])
    assert evaluate.finished_runs(home / "runs", "flickr8k") == []


def test_command_line_prints_the_table_and_one_sentence(run, tmp_path):
    def call(*words):
        command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    evaluate.evaluate_run(run)
    good = call(run.folder)
    assert good.returncode == 0, good.stderr
    assert "novel 12" in good.stdout
    bad = call(tmp_path / "none")
    assert bad.returncode == 1
    assert bad.stderr.strip() == f"error: {tmp_path / 'none'} is not a run's folder (no config.yaml)."
