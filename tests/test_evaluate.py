"""Figures with their protocol, ranks that are kept, runs side by side, and mistakes that are named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from evaluated import COUNTS, argsort_recall, config_of, made_gallery, write_home, write_run
from safetensors.torch import load_file, save_file

import evaluate
from config import make_config
from core.errors import LabError
from evaluate import measure_run, save_metrics
from interface import cli
from metrics import metrics_table, recalls_of, retrieval_metrics
from reports import compare, sections
from reports.gallery import INTERVALS, fitting_protocols, protocol_of, ranks_of
from retrieval.statistics import compare_settings, paired_test
from sources.drawing import write_scenes
from utils import load_run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def run(home):
    return write_run(config_of(home))


@pytest.fixture(scope="module")
def gallery(run):
    return evaluate.open_gallery(run, "test", show=False)


# --- figures and protocols ---


def test_metrics_state_their_protocol_and_are_read_once(run):
    found = evaluate.evaluate_run(run, show=False)
    assert set(found) == {"test", "novel"}
    sizes = {
        name: found["test"][name] for name in ("split", "protocol", "num_images", "num_texts", "left_out")
    }
    assert sizes == {"split": "test", "protocol": "full", "num_images": 20, "num_texts": 100, "left_out": 0}
    low, high = found["test"]["t2i_recall@5_low"], found["test"]["t2i_recall@5_high"]
    assert low < found["test"]["t2i_recall@5"] < high
    assert found["test"]["intervals"] == INTERVALS
    kept = load_run(run.folder)
    assert kept.metrics == found
    kept.metrics["test"]["i2t_recall@1"] = -1.0  # a second call takes what is kept
    assert evaluate.evaluate_run(kept)["test"]["i2t_recall@1"] == -1.0
    figures = {"learning_curves.png", "recall_test.png", "recall_novel.png"}
    assert {path.name for path in (run.folder / "figures").iterdir()} == figures


def test_the_table_names_protocol_gallery_and_chance(run):
    table = metrics_table(measure_run(run))
    assert table.index.names == ["split", "protocol", "images", "captions", ""]
    assert table.index[0] == ("test", "full", 20, 100, "model")
    found = run.metrics["test"]
    ends = (found["i2t_recall@1"], found["i2t_recall@1_low"], found["i2t_recall@1_high"])
    assert table["i2t_recall@1"].iloc[0] == "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * end for end in ends))
    assert table["t2i_recall@5"].iloc[1] == "25.0"  # chance: 5 of 20 images


def test_recall_is_what_a_written_out_argsort_says(gallery):
    scores = (gallery.image_features @ gallery.text_features.T).numpy()
    matches = (gallery.image_id[:, None] == gallery.text_id).numpy()
    found = gallery.metrics()
    assert found["i2t_recall@1"] == pytest.approx(argsort_recall(scores, matches, 1))
    assert found["t2i_recall@5"] == pytest.approx(argsort_recall(scores.T, matches.T, 5))


COCO = "Karpathy's split of coco"
FLICKR = "Karpathy's split of flickr30k"
DRAWN = "drawn by image, split_seed 0"


@pytest.mark.parametrize(
    ("images", "captions", "split", "source", "name", "fits"),
    [
        (1000, 5, "test", FLICKR, "flickr_1k", {"full", "one_caption", "flickr_1k"}),
        (1000, 5, "test", "Flickr8k's official lists", "flickr8k_1k", {"full", "one_caption", "flickr8k_1k"}),
        (1000, 5, "test", DRAWN, "full", {"full", "one_caption"}),
        (1000, 5, "val", FLICKR, "full", {"full", "one_caption"}),
        (1000, 4, "test", FLICKR, "full", {"full", "one_caption"}),
        (5000, 5, "test", COCO, "coco_5k", {"full", "one_caption", "coco_5k", "coco_1k_fivefold"}),
        (5000, 6, "test", COCO, "full", {"full", "one_caption", "coco_5k", "coco_1k_fivefold"}),
        (5000, 5, "test", "COCO 2014", "full", {"full", "one_caption"}),
        (40504, 1, "val", "COCO 2014", "full val2014", {"full", "one_caption"}),
        (40504, 1, "val", "COCO 2017", "full", {"full", "one_caption"}),
    ],
)
def test_a_protocol_is_named_where_it_fits(images, captions, split, source, name, fits):
    gallery = made_gallery(images, captions, split=split, split_source=source)
    assert protocol_of(gallery) == name
    assert set(fitting_protocols(gallery)) == fits


def test_every_fitting_protocol_has_its_row(tmp_path):
    gallery = made_gallery(40, 3)
    gallery.run.metrics["test"] = gallery.metrics()
    (section,) = sections.protocols(gallery, tmp_path)
    first = torch.arange(0, 120, 3)
    alone = retrieval_metrics(
        gallery.image_features, gallery.text_features[first], gallery.image_id, gallery.text_id[first]
    )
    row = section.table.loc[("one_caption", 40, 40, "model")]
    assert row["i2t_recall@1"] == f"{100 * alone['i2t_recall@1']:.1f}"
    assert section.table.loc[("full", 40, 120, "chance"), "t2i_recall@10"] == "25.0"
    (every,) = sections.every_figure(gallery, tmp_path)
    assert every.table.loc["map", "image-to-text"] == f"{gallery.metrics()['i2t_map']:.3g}"


def test_recall_by_gallery_size_ends_at_the_full_gallery(tmp_path):
    gallery = made_gallery(60, 2, noise=3.0)
    *figures, table = sections.by_gallery_size(gallery, tmp_path)
    assert table.table.index[-1] == 60
    expected = [round(100 * gallery.metrics()[f"{way}_recall@1"], 1) for way in ("i2t", "t2i")]
    assert table.table.iloc[-1].tolist() == pytest.approx(expected)
    assert (table.table.diff().dropna() <= 0).all().all()
    assert all(section.figure.is_file() and "published systems" in section.caption for section in figures)


def test_published_points_are_not_drawn_over_generated_scenes(gallery, tmp_path):
    first, *_ = sections.by_gallery_size(gallery, tmp_path)
    assert "published" not in first.caption


# --- bad input ---


def test_a_k_over_the_gallery_is_left_out_and_none_left_is_an_error():
    gallery = made_gallery(30, config=make_config("quickstart", recall_ks=(5, 31)))
    assert [name for name in gallery.metrics() if name.startswith("t2i_recall@31")] == []
    gallery.run.config.recall_ks = (31, 50)
    with pytest.raises(LabError, match=r"every K of recall_ks \(31, 50\) is over the 30 images"):
        gallery.metrics()


def test_queries_without_a_match_are_counted_and_left_out(tmp_path):
    gallery = made_gallery(30, 2)
    whole = gallery.metrics()["i2t_recall@1"]
    gallery = made_gallery(30, 2)
    gallery.text_id[:4] = torch.tensor([-1, -1, -102, -102])  # images 100 and 101 have no caption now
    found = gallery.metrics()
    assert (found["t2i_num_left_out"], found["i2t_num_left_out"]) == (4, 2)
    assert (found["t2i_num_queries"], found["i2t_num_queries"]) == (56, 28)
    assert found["i2t_recall@1"] >= whole - 0.1
    with pytest.raises(LabError, match="4 captions belong to no image"):
        list(sections.by_gallery_size(gallery, tmp_path))


def test_nan_features_are_an_error():
    gallery = made_gallery()
    gallery.image_features[3, 2] = float("nan")
    with pytest.raises(LabError, match="image_features contain NaN"):
        gallery.metrics()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: evaluate.open_gallery(g.run, "nowhere", show=False), "split 'nowhere' has no image"),
        (lambda g: evaluate.compare_runs([]), "train one first"),
    ],
)
def test_mistakes_are_named(gallery, call, message):
    with pytest.raises(LabError, match=message):
        call(gallery)


# --- a data set that measures itself ---


def own_metrics(model, features, config, *, intervals):
    assert intervals
    return {"top1": 0.5, "top1_low": 0.4, "top1_high": 0.6, "swaps": len(features["image_id"]) / 100}


def test_a_data_set_may_bring_its_own_metrics(tmp_path):
    gallery = made_gallery(30, metrics=own_metrics)
    gallery.run.folder = tmp_path
    save_metrics(gallery)
    found = json.loads((tmp_path / "metrics.json").read_text())["test"]
    assert (found["protocol"], found["top1"], found["num_images"]) == ("the data set's own", 0.5, 30)
    table = metrics_table({"test": found})
    assert table.to_dict("list") == {"top1": ["50.0 [40.0, 60.0]"], "swaps": ["0.3"]}
    made = {section.name: section for section in sections.split_sections(gallery, tmp_path, show=False)}
    assert list(made) == ["map, principal components", "map, t-SNE", "attention", "zero-shot classes"]
    assert made["attention"].caption == "attention is not shown: this data set has no image files."


# --- kept features ---


def same(one, two):
    return all(np.array_equal(getattr(one, way).values, getattr(two, way).values) for way in ("i2t", "t2i"))


def test_a_gallery_differs_with_its_data():
    prints = [made_gallery(30).fingerprint, made_gallery(31).fingerprint, made_gallery(30, 3).fingerprint]
    assert len(set(prints)) == 3
    assert made_gallery(30, seed=5).fingerprint == prints[0]  # another model on the same gallery


def test_ranks_need_no_second_encoding(run, gallery, monkeypatch):
    measure_run(run)
    monkeypatch.setattr("reports.gallery.encode_loader", lambda *_, **__: pytest.fail("encoded again"))
    assert same(ranks_of(run, "test"), gallery.ranks)
    again = evaluate.open_gallery(load_run(run.folder), "test", show=False)
    assert all(torch.equal(value, gallery.features[name]) for name, value in again.features.items())
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        measure_run(run, again=True)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"nothing")])
def test_lost_features_are_encoded_again(run, damage):
    measure_run(run)
    path = run.folder / "features_novel.safetensors"
    before = {name: value.clone() for name, value in load_file(path).items()}
    damage(path)
    assert ranks_of(run, "novel", show=False).num_images == 12
    assert all(torch.equal(value, before[name]) for name, value in load_file(path).items())


# --- results follow what they are derived from ---


@pytest.fixture
def copied(home, tmp_path):
    """A measured run and its data in a folder of their own; features come from the shared cache."""
    shutil.copytree(home / "scenes", tmp_path / "scenes")
    config = config_of(home, test_splits=("test",), data_dir=tmp_path / "scenes", runs_dir=tmp_path / "runs")
    made = write_run(config)
    measure_run(made, show=False)
    return made


def mean_rank(found):
    return found["test"]["t2i_mean_rank"]


def test_figures_of_other_weights_are_measured_again(copied):
    before, ranks = copied.metrics, ranks_of(copied, "test")
    later = write_run(copied.config)
    weights = load_file(later.folder / "best.safetensors")
    generator = torch.Generator().manual_seed(1)
    weights["image_head.0.weight"] = torch.randn(weights["image_head.0.weight"].shape, generator=generator)
    save_file(weights, later.folder / "best.safetensors")
    later = load_run(later.folder)
    found = measure_run(later, show=False)
    assert found["test"]["weights"] != before["test"]["weights"]
    expected = evaluate.open_gallery(load_run(later.folder), "test", show=False).metrics()
    assert mean_rank(found) == expected["t2i_mean_rank"] != mean_rank(before)
    assert load_run(later.folder).metrics == found
    assert not same(ranks_of(later, "test"), ranks)


def test_figures_follow_images_replaced_under_their_names(copied):
    before = copied.metrics
    files = sorted((copied.config.data_dir / "test2014").glob("*"))
    first = [file.read_bytes() for file in files]
    for file, data in zip(files, [*first[7:], *first[:7]], strict=True):  # each caption has another image now
        file.write_bytes(data)
    found = measure_run(load_run(copied.folder), show=False)
    assert found["test"]["gallery"] != before["test"]["gallery"]
    assert mean_rank(found) != mean_rank(before)


def test_changed_evaluation_settings_have_an_effect(copied):
    found = measure_run(load_run(copied.folder, recall_ks=(1, 3), test_splits=("novel", "test")), show=False)
    assert [list(recalls_of(of)) for of in found.values()] == [
        [f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 3)]
    ] * 2
    assert list(found) == ["novel", "test"]
    assert list(measure_run(load_run(copied.folder), show=False)) == ["test"]


def test_other_data_are_measured_apart_and_a_moved_folder_is_the_same_data(copied, tmp_path, capsys):
    kept = (copied.folder / "metrics.json").read_bytes()
    other = write_scenes(tmp_path / "other", **COUNTS, image_size=48, seed=5)
    run = load_run(copied.folder, data_dir=other)
    found = evaluate.evaluate_run(run, show=False)["test"]
    place = copied.folder / f"on_{found['gallery'][:8]}"
    expected = evaluate.open_gallery(run, "test", show=False).metrics()
    assert found["t2i_mean_rank"] == expected["t2i_mean_rank"]
    assert json.loads((place / "metrics.json").read_text())["test"] == found
    assert (place / "figures" / "recall_test.png").is_file()
    assert (copied.folder / "metrics.json").read_bytes() == kept
    assert (
        f"holds other data than {run.name} was measured on: results go to {place.name}/"
        in capsys.readouterr().out
    )
    assert evaluate.evaluate_run(load_run(copied.folder, data_dir=other))["test"] == found  # kept there

    moved = copied.config.data_dir.rename(tmp_path / "moved")
    run = load_run(copied.folder, data_dir=moved)
    assert measure_run(run, show=False) == copied.metrics
    assert run.results == copied.folder
    with pytest.raises(LabError, match="nowhere' does not exist"):
        measure_run(load_run(copied.folder, data_dir=tmp_path / "nowhere"))
    capsys.readouterr()
    assert measure_run(load_run(copied.folder)) == copied.metrics  # its own folder is gone
    assert "is gone: split 'test'" in capsys.readouterr().out


# --- runs side by side ---


def told_run(home, recall, gallery="a", **settings):
    """A run whose metrics are given instead of measured."""
    run = write_run(config_of(home, **settings))
    recalls = {"i2t_recall@1": recall, "t2i_recall@1": 0.5}
    sizes = {"split": "test", "protocol": "full", "num_images": 20, "num_texts": 100, "gallery": gallery}
    run.metrics.update({split: {**sizes, **recalls} for split in run.config.test_splits})
    return run


BETTER, WORSE, LIKE = (0.6, 0.62, 0.61), (0.4, 0.41, 0.42), (0.6, 0.4, 0.5)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Three seeds each of three settings, one of a single seed, one on another gallery."""
    home = tmp_path
    monkeypatch.setattr(
        evaluate, "measure_run", lambda run, **_: run.metrics
    )  # as told, not as the weights are
    named = {
        "plain": (WORSE, {}),
        "bn": (BETTER, {"use_batch_norm": True}),
        "wide": (LIKE, {"batch_size": 8}),
    }
    runs = [
        told_run(home, recall, seed=seed, **changed)
        for recalls, changed in named.values()
        for seed, recall in enumerate(recalls)
    ]
    runs += [told_run(home, 0.9, num_epochs=3), told_run(home, 0.9, gallery="b", num_epochs=5)]
    return evaluate.group_settings(runs, show=False)


def test_settings_stand_side_by_side_and_seeds_are_averaged(settings):
    table = compare.comparison_table(settings)
    assert table["seeds"].tolist() == [3, 3, 3, 1, 1]
    assert table["i2t_recall@1"].iloc[0] == pytest.approx(np.mean(WORSE))
    assert table["i2t_recall@1_std"].iloc[0] == pytest.approx(np.std(WORSE, ddof=1))
    assert pd.isna(table["i2t_recall@1_std"].iloc[3])
    assert table["protocol"].tolist() == ["full"] * 5
    assert table["seconds"].iloc[0] == 750
    assert evaluate.readable(table)["i2t_recall@1"].iloc[0] == "41.0 ± 1.0"


def test_a_difference_is_claimed_only_over_seeds(settings):
    verdicts = compare.comparison_table(settings)["i2t_recall@1_verdict"].tolist()
    assert compare_settings(BETTER, WORSE).is_difference
    assert not compare_settings(LIKE, WORSE).is_difference
    expected = [
        "baseline",
        "higher",
        "no significant difference",
        "too few seeds",
        "not compared: another gallery",
    ]
    assert verdicts == expected
    flipped = compare.comparison_table(settings, settings[1].runs[0].name)["i2t_recall@1_verdict"]
    assert flipped.tolist()[:2] == ["lower", "baseline"]
    with pytest.raises(LabError, match="baseline 'nobody' does not exist"):
        compare.comparison_table(settings, "nobody")


def test_two_single_runs_have_the_paired_test_of_their_kept_ranks(home, run):
    other = write_run(config_of(home, use_batch_norm=True))
    table = evaluate.compare_runs([run, other], show=False)
    test = paired_test(ranks_of(other, "test"), ranks_of(run, "test"), "t2i_recall@1")
    word = (
        {True: "higher", False: "lower"}[test.difference > 0]
        if test.is_difference
        else "no significant difference"
    )
    assert table["t2i_recall@1_verdict"].iloc[1] == f"{word} (test images only, p = {test.p_value:.3f})"
    found = compare.paired_test_of(other, run, "t2i_recall@1")
    assert found == test
    other.metrics["test"]["gallery"] = "another"
    with pytest.raises(LabError, match="different galleries"):
        compare.paired_test_of(other, run)


def test_finished_runs_are_found_by_preset(home, run):
    write_run(config_of(home, seed=9), finished=False)
    assert run.name in [found.name for found in evaluate.finished_runs(home / "runs", "quickstart")]
    assert all(found.config.seed != 9 for found in evaluate.finished_runs(home / "runs"))
    assert evaluate.finished_runs(home / "runs", "flickr8k") == []


def test_labels_and_fields_say_what_sets_runs_apart(home):
    config = config_of(home, use_batch_norm=True)
    assert compare.settings_label(make_config("quickstart", seed=3, device="cpu")) == "plain"
    assert (
        compare.settings_label(make_config("quickstart", use_batch_norm=True, batch_size=8))
        == "bn, batch_size=8"
    )
    fields = compare.differing_fields({"a": config, "b": config.updated(batch_size=8, seed=4)})
    assert fields.to_dict("index") == {"batch_size": {"a": "16", "b": "8"}}


# --- the command line ---


def test_command_line_prints_the_table_and_one_sentence(run, tmp_path, capsys):
    cli.evaluate([str(run.folder)])
    shown = capsys.readouterr().out
    assert "novel" in shown
    assert "full" in shown
    assert f"{run.folder}: metrics.json" in shown
    with pytest.raises(SystemExit) as ended:
        cli.evaluate([str(tmp_path / "none")])
    assert ended.value.code == f"error: {tmp_path / 'none'} is not a run's folder (no config.yaml)."
    with pytest.raises(SystemExit) as ended:
        cli.evaluate(["compare", str(tmp_path)])
    assert "train one first" in ended.value.code
    assert f"{tmp_path} is left out: it is not a run." in capsys.readouterr().out


def test_search_and_export_get_what_the_shell_says(tmp_path, monkeypatch, capsys):
    config_of(tmp_path).save(tmp_path / "run" / "config.yaml")
    monkeypatch.setattr(evaluate, "search_command", lambda run, *words, **given: (run.name, *words, given))
    cli.evaluate(["search", str(tmp_path / "run"), "a dog", "--minus", "snow", "--k", "3"])
    assert capsys.readouterr().out.strip() == (
        "('run', 'a dog', {'image': None, 'minus': 'snow', 'k': 3, 'scoring': 'cosine'})"
    )
    monkeypatch.setattr("evaluate.export_run", lambda run, folder: [folder / run.config.preset])
    cli.evaluate(["export", str(tmp_path / "run"), "--folder", str(tmp_path / "out")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "quickstart")
