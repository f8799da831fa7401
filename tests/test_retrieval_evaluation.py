"""Before and after fine-tuning: figures, rankings, forgetting, changed queries, the order of words."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from matplotlib.text import Text
from PIL import Image
from small_data import ROOT

from config import make_config
from core.errors import LabError
from evaluate import open_gallery
from interface.run_notebook import run_notebook, tables
from labs import finetune
from sources.drawing import load_scenes, write_scenes
from sources.scenes import swap_captions
from towers import text
from train import fit


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    write_scenes(root / "scenes", num_train=40, num_val=12, num_test=24, num_novel=12, num_workers=1)
    return root


def config_of(home, **settings):
    places = dict(data_dir=home / "scenes", cache_dir=home / "cache", runs_dir=home / "runs", device="cpu")
    small = dict(image_tower_mode="cached", image_size=64, num_epochs=2, batch_size=16, test_splits=("test",))
    return make_config("quickstart", **{**places, **small, **settings})


@pytest.fixture(scope="module")
def tuned(home):
    start = fit(config_of(home), show=False)
    settings = {"mining": "semantic", "best_metric": "t2i_map", "learning_rate": 3e-3}
    return fit(config_of(home, start_from=start.folder, **settings), show=False)


@pytest.fixture(scope="module")
def pair(tuned):
    return finetune.before_and_after(tuned, "test", show=False)


def test_before_is_the_start_and_after_the_result(tuned, pair):
    start = finetune.load_run(tuned.config.start_from)
    assert torch.equal(pair[0].text_features, open_gallery(start, "test", show=False).text_features)
    assert torch.equal(pair[1].text_features, open_gallery(tuned, "test", show=False).text_features)
    assert not torch.equal(pair[0].text_features, pair[1].text_features)


def test_the_mixture_that_validates_best_is_kept(tuned):
    run = fit(tuned.config.updated(interpolate_weights=True), show=False)
    mixtures = finetune.mixtures(run)
    assert mixtures.index.tolist() == pytest.approx([n / 10 for n in range(11)])
    kept = open_gallery(run, "val", show=False).metrics()["t2i_map"]
    assert kept == pytest.approx(mixtures["score"].max())
    alone = finetune.mixtures(tuned)  # nothing was mixed
    assert (alone.index.tolist(), alone["score"].tolist()) == ([1.0], [tuned.history["t2i_map"].max()])


def test_the_better_of_two_by_the_weights_that_were_kept(tuned):
    def with_figure(metric: str, *values: float):
        history = pd.DataFrame({"epoch": range(1, len(values) + 1), metric: values})
        config = tuned.config.updated(best_metric=metric, interpolate_weights=False)
        return dataclasses.replace(tuned, config=config, history=history)

    first, second = with_figure("t2i_map", 0.2, 0.4), with_figure("t2i_map", 0.3, 0.3)
    assert finetune.better_on_validation(first, second) is first
    assert finetune.better_on_validation(second, first) is first
    first, second = with_figure("val_loss", 2.0, 3.0), with_figure("val_loss", 1.0, 4.0)
    assert finetune.better_on_validation(first, second) is second  # of a loss the smaller


def test_changes_are_those_of_the_metrics_with_intervals(pair):
    table = finetune.changes(*pair, ks=(1, 5, 100))
    assert [name for name in table.index if name.startswith("i2t")] == [
        "i2t_recall@1", "i2t_recall@5", "i2t_map", "i2t_ndcg@5"]  # fmt: skip
    scores = pair[1].text_features @ pair[1].image_features.T
    top = pair[1].image_id[scores.topk(5, dim=1).indices] == pair[1].text_id[:, None]
    row = table.loc["t2i_recall@5"]
    assert row["after"] == pytest.approx(top.any(dim=1).float().mean().item())
    assert row["difference"] == pytest.approx(row["after"] - row["before"])
    assert (table["before_low"] <= table["before"]).all()
    assert (table["difference_low"] <= table["difference"]).all()
    assert (table["p_value"] <= 1).all()
    same = finetune.changes(pair[0], pair[0], ks=(1,))
    assert (same["difference"] == 0).all()
    shown = finetune.in_percent(table).loc["t2i_recall@5"]
    assert shown["after (%)"].startswith(f"{100 * row['after']:.1f} [")
    assert shown["difference (%)"][0] in "+-"


def test_every_ranking_is_written(pair, tmp_path):
    path = finetune.save_rankings(pair[1], tmp_path / "deep" / "predictions.csv", k=7)
    table = pd.read_csv(path)
    assert len(table) == 7 * (24 + 120)
    query = table[(table["direction"] == "t2i")].iloc[7 * 33 : 7 * 34]
    scores = pair[1].image_features @ pair[1].text_features[33]
    assert query["answer_id"].tolist() == pair[1].image_id[scores.argsort(descending=True)[:7]].tolist()
    assert query["score"].to_numpy() == pytest.approx(
        scores.sort(descending=True).values[:7].numpy(), abs=1e-5
    )
    assert query["query"].iloc[0] == pair[1].dataset.table.captions[33]
    assert query["correct"].tolist() == (query["answer_id"] == pair[1].text_id[33].item()).tolist()
    first = table[(table["direction"] == "i2t") & (table["place"] == 1)]
    assert first["query"].tolist() == list(pair[1].dataset.table.paths)
    assert first["correct"].mean() == pytest.approx(pair[1].metrics()["i2t_recall@1"])


def test_changed_queries_are_the_largest_gains_and_losses(pair, tmp_path):
    found = finetune.changed_queries(*pair, n=4)
    ranks = [gallery.ranks.t2i for gallery in pair]
    gain = 1 / ranks[1].best - 1 / ranks[0].best
    for name, best in (("improved", np.sort(gain)[::-1][:4]), ("worse", np.sort(gain)[:4])):
        table = found[name]
        assert (1 / table["after"] - 1 / table["before"]).to_numpy() == pytest.approx(best)
        assert table["query"].tolist() == [pair[0].dataset.table.captions[row] for row in table["row"]]
    figure = finetune.change_grid(*pair, found["improved"][:2], tmp_path / "grid.png")
    assert sum(bool(axes.images) for axes in figure.axes) == 2 * 2 * 5
    headings = [text.get_text() for text in figure.findobj(Text)]
    assert any(f"after: its image at rank {found['improved']['after'][0]}" in t for t in headings)
    assert (tmp_path / "grid.png").stat().st_size > 1000
    with pytest.raises(LabError, match="no query changed in this direction"):
        finetune.change_grid(*pair, found["improved"][:0])


def test_forgetting_is_paired_over_images(tuned, pair, tmp_path):
    for name in ("red", "green"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("RGB", (64, 64), name).save(tmp_path / name / f"{number}.png")
    shots = [finetune.zero_shots(gallery, [tmp_path]) for gallery in pair]
    table = finetune.forgetting(*shots)
    assert len(table) >= 2
    row = table.loc[tmp_path.name]
    hits = [shot[-1].correct for shot in shots]
    assert row[["before", "after"]].tolist() == [hits[0].mean(), hits[1].mean()]
    gaps = hits[1].astype(float) - hits[0]
    assert row["difference"] == pytest.approx(gaps.mean())
    assert row["difference_high"] - row["difference"] == pytest.approx(1.96 * gaps.std(ddof=1) / 12**0.5)
    assert (row["images"], row["labels"]) == (12, 2)
    with pytest.raises(LabError, match="same labelled sets"):
        finetune.forgetting(shots[0], shots[1][:1])


def test_the_order_of_words_by_hand(home, pair):
    margins = finetune.order_margins(pair[0])
    scenes = load_scenes(home / "scenes", "test")
    assert len(margins) == sum(len(swap_captions(scene)) for scene in scenes.values())
    first = margins.iloc[0]
    swap = swap_captions(scenes[first["image_id"]])[0]
    texts = finetune.text_features(pair[0].run.model, pair[0].run.config, [swap.right, swap.wrong])
    image = pair[0].image_features[pair[0].image_id == int(first["image_id"])][0]
    assert first["margin"] == pytest.approx((image @ (texts[0] - texts[1])).item(), abs=1e-5)
    other = margins.assign(margin=1.0)
    table = finetune.order_table({"before": margins, "always right": other})
    share = (margins.loc[margins["kind"] == "colour", "margin"] > 0).mean()
    assert table.loc[("before", "colour"), "accuracy"] == pytest.approx(share)
    assert table.loc[("before", "colour"), "difference"] == 0
    assert table.loc[("always right", "colour"), "difference"] == pytest.approx(1 - share)


def test_from_a_shell(tuned, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["retrieval_evaluation.py", str(tuned.folder), "--save_predictions"])
    finetune.main()
    assert "t2i_recall@20" in capsys.readouterr().out
    names = {path.name for path in (tuned.folder / "before_after_test").iterdir()}
    assert {"changes.csv", "forgetting.csv", "predictions_before.csv", "predictions_after.csv"} <= names
    assert names & {"improved.png", "worse.png"}


@pytest.fixture
def tiny_clip(tmp_path):
    """A CLIP of one layer a side with CLIP's own vocabulary, as save_pretrained leaves it."""
    torch.manual_seed(0)
    tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        vision_config=dict(**tiny, image_size=32, patch_size=8),
        text_config=dict(**tiny, vocab_size=49408, eos_token_id=49407),
        projection_dim=24,
    )
    folder = str(tmp_path / "clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    text.text_tokenizer("transformer").save_pretrained(folder)
    return folder


def test_a_saved_clip_goes_through_the_notebook(home, tiny_clip, tmp_path):
    places = {f"{name}_dir": str(tmp_path / name) for name in ("cache", "runs")}
    scenes = {"source": "scenes", "reader": "coco", "data_dir": str(home / "scenes"), "device": "cpu"}
    model = {"image_weights": tiny_clip, "text_model": tiny_clip, "embed_dim": 24, "image_size": 32}
    less = {"num_epochs": 1, "max_samples": 24, "batch_size": 12, "mining_neighbour_batches": True}
    parameters = {
        "PRESET": "retrieval_finetune",
        "START": "",
        "FAST_RUN": True,
        "OVERRIDES": {**places, **scenes, **model, **less},
    }
    made = run_notebook(ROOT / "notebooks" / "3_retrieval_finetune.ipynb", parameters, tmp_path / "out")
    shown = tables(made["notebook"])
    for word in ("i2t_recall@10", "with mining (%)", "colour", "mining"):
        assert word in shown
    assert len(list((tmp_path / "runs").glob("retrieval_finetune_*/best.safetensors"))) == 2


def test_an_order_table_of_nothing_is_one_sentence():
    for margins in ({}, {"before": pd.DataFrame(columns=["image_id", "kind", "margin"])}):
        with pytest.raises(LabError, match="no pair of captions to compare models on"):
            finetune.order_table(margins)
