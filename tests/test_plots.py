"""The everyday figures: what they show equals the data they were given."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest
import torch
from figures import RUNS, overlaps, picture_axes, pictures, texts_of
from matplotlib.colors import same_color
from PIL import Image
from small_data import SHARED

from core.errors import LabError
from plots import figures
from plots.style import COLOURS, DIRECTIONS, GREY, RIGHT, WRONG

FLICKR8K = SHARED / "flickr8k"


def history(epochs: int = 4) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    return pd.DataFrame(
        {
            "epoch": epoch,
            "train_loss": 4.0 / epoch,
            "val_loss": 5.0 / epoch,
            "learning_rate": 1e-3 / epoch,
            "i2t_recall@1": 0.02 * epoch,
            "t2i_recall@1": 0.01 * epoch,
        }
    )


# --- picture grids ---


def test_captions_stand_whole_under_their_pictures():
    captions = ["a red square", "costs $5 or $6", ["one", "two"], "a long caption " * 8]
    figure = figures.captioned_images(pictures(4), captions, title="Eight of them")
    shown = [" ".join(text.split()) for text in texts_of(figure)]
    for caption in (
        "a red square",
        "costs $5 or $6",
        "• one • two",
        ("a long caption " * 8).strip(),
        "Eight of them",
    ):
        assert caption in shown
    for axes, picture in zip(picture_axes(figure), pictures(4), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), np.asarray(picture))
    taller = figures.captioned_images(pictures(4), [*captions[:3], "a long caption " * 12])
    assert taller.get_figheight() > figures.captioned_images(pictures(4), ["short"] * 4).get_figheight()


def test_texts_and_pictures_do_not_overlap():
    captions = ["a dog runs over a wide green meadow behind its owner " * (1 + n % 3) for n in range(8)]
    figure = figures.captioned_images(pictures(5) + pictures(3, (30, 60)), captions)
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.images[0].get_window_extent() for axes in picture_axes(figure)]
    assert len(boxes) == 16
    assert overlaps(boxes) == []
    assert all(figure.bbox.padded(0.5).containsx(box.x1) and box.y0 >= 0 for box in boxes)


def test_captions_must_match_pictures():
    with pytest.raises(LabError, match="2 pictures and 1 captions; give one caption a picture"):
        figures.captioned_images(pictures(2), ["one"])
    with pytest.raises(LabError, match="no picture to draw"):
        figures.captioned_images([], [])


def test_retrieval_grid_marks_right_and_wrong_by_frame_line_and_symbol():
    correct = [[True, False, False], [False, True, False]]
    scores = [[0.9, 0.5, 0.25], [0.8, 0.4, 0.2]]
    figure = figures.retrieval_grid(["a dog", "a cat"], [pictures(3), pictures(3)], scores, correct)
    for axes, right in zip(picture_axes(figure), np.ravel(correct), strict=True):
        spine = axes.spines["left"]
        assert same_color(spine.get_edgecolor(), RIGHT if right else WRONG)
        assert spine.get_linestyle() == ("solid" if right else "dashed")
        assert [text.get_text() for text in axes.texts] == ["✓" if right else "✗"]
        assert spine.get_visible()
    shown = [" ".join(text.split()) for text in texts_of(figure)]
    for text in ("“a dog”", "“a cat”", "1 · 0.900", "3 · 0.200"):
        assert text in shown


def test_retrieval_grid_without_truth_frames_nothing():
    figure = figures.retrieval_grid(["a dog"], [pictures(2)])
    assert not any(axes.spines["left"].get_visible() or axes.texts for axes in picture_axes(figure))
    assert "“nothing”" in texts_of(figures.retrieval_grid(["a dog", "nothing"], [pictures(2), []]))
    with pytest.raises(LabError, match="1 queries and 2 lists"):
        figures.retrieval_grid(["a dog"], [pictures(1), pictures(1)])


def test_real_photographs_and_captions_fit(tmp_path):
    if not (FLICKR8K / "captions.txt").exists():
        pytest.skip("needs ../shared/flickr8k beside the repository")
    with open(FLICKR8K / "captions.txt", encoding="utf-8") as lines:
        rows = [row for _, row in zip(range(200), csv.DictReader(lines), strict=False)][::5][:8]
    images = [FLICKR8K / "Images" / row["image"] for row in rows]
    captions = [row["caption"] for row in rows]
    figure = figures.captioned_images(images, captions)
    shown = [" ".join(text.split()) for text in texts_of(figure)]
    assert all(" ".join(caption.split()) in shown for caption in captions)
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.images[0].get_window_extent() for axes in picture_axes(figure)]
    assert len(boxes) == 16
    assert overlaps(boxes) == []
    figures.retrieval_grid(captions[:2], [images[:5], images[3:]], path=tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width == 1350


# --- curves ---


def test_learning_curves_draw_the_history_in_percent_with_references():
    table = history()
    figure = figures.learning_curves({"run": table}, chance=0.001, chance_loss=4.85, best_epoch=3)
    loss, recall, rate = figure.axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), table["train_loss"])
    np.testing.assert_allclose(recall.lines[0].get_ydata(), 100 * table["i2t_recall@1"])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), table["learning_rate"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "Recall@1 (%)", "learning rate (1e-03)"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    stars = [(*line.get_xdata(), *line.get_ydata()) for line in recall.lines if line.get_marker() == "*"]
    assert stars == [(3, pytest.approx(6.0)), (3, pytest.approx(3.0))]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "train", "validation", "chance level 4.85", "best epoch 3",
    ]  # fmt: skip
    assert "chance 0.1 %" in [text.get_text() for text in recall.get_legend().get_texts()]
    assert recall.lines[-1].get_ydata()[0] == pytest.approx(0.1)


def test_several_runs_keep_one_colour_each_and_a_legend():
    runs = {"plain": history(), "bn": history(6), "empty": pd.DataFrame()}
    figure = figures.learning_curves(runs, best_epoch={"bn": 5})
    colours = {
        line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_label() in runs
    }
    assert colours == {"plain": COLOURS[0], "bn": COLOURS[1]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "bn", "empty"]
    bottom = figure.legends[0].get_window_extent().y1
    assert all(axes.xaxis.get_tightbbox().y0 > bottom for axes in figure.axes)


def test_gaps_in_a_history_are_left_out_and_a_missing_epoch_is_an_error():
    table = history().assign(val_loss=[np.nan, 2.0, np.nan, 1.0]).drop(columns="learning_rate")
    loss, _, rate = figures.learning_curves(table).axes
    assert loss.lines[1].get_xdata().tolist() == [2, 4]
    assert not rate.lines
    with pytest.raises(LabError, match="history of r has no column 'epoch'"):
        figures.learning_curves({"r": [{"train_loss": 1.0}]})


# --- bars ---


def test_recall_bars_equal_the_table():
    chance = {"i2t_recall@1": 0.001, "t2i_recall@5": 0.005}
    figure = figures.recall_bars(pd.DataFrame(RUNS), chance=chance)
    for axes, direction in zip(figure.axes, ("i2t", "t2i"), strict=True):
        assert axes.get_title("left") == DIRECTIONS[direction]
        for bars, run in zip(axes.containers, RUNS, strict=True):
            expected = [100 * run[f"{direction}_recall@{k}"] for k in (1, 5)]
            np.testing.assert_allclose([bar.get_height() for bar in bars], expected)
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks == [["Recall@1\nchance 0.1 %", "Recall@5"], ["Recall@1", "Recall@5\nchance 0.5 %"]]
    assert "23.9" in texts_of(figure)


def test_comparison_bars_have_their_intervals():
    rows = [
        {**run, "i2t_recall@1_low": 0.2, "i2t_recall@1_high": 0.3, "t2i_recall@1_std": 0.02} for run in RUNS
    ]
    rows[1]["i2t_recall@1_low"] = rows[1]["i2t_recall@1_high"] = np.nan
    figure = figures.comparison_bars(rows, chance=0.001, whiskers="95 % interval")
    left, right = figure.axes
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], [23.9, 25.0])
    segments = [container[2][0].get_segments() for container in (left.containers[1], right.containers[1])]
    np.testing.assert_allclose(segments[0][0][:, 0], [20, 30])
    np.testing.assert_allclose(segments[1][1][:, 0], [17, 21])
    assert [label.get_text() for label in left.get_yticklabels()] == ["plain", "bn"]
    assert left.get_xlabel() == "Recall@1 (%)"
    dashed = [line.get_xdata()[0] for line in left.lines if line.get_color() == GREY]
    chance = [line.get_xdata()[0] for line in left.lines if line.get_xdata()[0] < 1]
    assert (dashed, chance) == ([pytest.approx(23.9)], [pytest.approx(0.1)])
    assert any("whiskers: 95 % interval" in text for text in texts_of(figure))
    seeds = [{**run, "i2t_recall@1_std": 0.01} for run in RUNS]
    assert "dashed: first row   ·   whiskers: ± 1 standard deviation" in texts_of(
        figures.comparison_bars(seeds)
    )
    assert "dashed: first row" in texts_of(figures.comparison_bars(RUNS))
    with pytest.raises(LabError, match="no column 'rsum'; it has"):
        figures.comparison_bars(RUNS, metrics=["rsum"])


def test_zero_shot_bars_are_sorted_and_judged():
    labels = ["dog", "cat", "car", "boat"]
    table = torch.tensor([[0.1, 0.6, 0.25, 0.05], [0.7, 0.1, 0.15, 0.05]])
    figure = figures.zero_shot_bars(pictures(2), labels, table, ["boat", 0], top=3)
    wrong, right = [axes for axes in figure.axes if not axes.images]
    np.testing.assert_allclose([bar.get_width() for bar in wrong.patches], [60, 25, 5], rtol=1e-5)
    assert [text.get_text() for text in wrong.texts[::2]] == ["✗ cat", "car", "✓ boat (rank 4)"]
    assert [text.get_text() for text in right.texts[:2]] == ["✓ dog", "70.0 %"]
    assert same_color(right.patches[0].get_facecolor()[:3], RIGHT)
    assert same_color(wrong.patches[0].get_facecolor()[:3], WRONG)
    assert right.get_xlabel() == "probability (%)"


def test_zero_shot_bars_refuse_what_does_not_fit():
    with pytest.raises(LabError, match=r"shape \(1, 2\) do not fit 1 pictures and 3 labels"):
        figures.zero_shot_bars(pictures(1), ["a", "b", "c"], [[0.5, 0.5]])
    with pytest.raises(LabError, match="'x' is not among the labels a, b"):
        figures.zero_shot_bars(pictures(1), ["a", "b"], [[0.5, 0.5]], ["x"])


# --- attention ---


def test_attention_is_drawn_in_multiples_of_average_pooling():
    weights = torch.full((2, 7, 7), 1 / 49)
    weights[1] = 0
    weights[1, 2, 3] = 1
    figure = figures.attention_maps(pictures(2), weights, ["a", "b"])
    overlays = [axes.images[1] for axes in picture_axes(figure) if len(axes.images) == 2]
    np.testing.assert_allclose(overlays[0].get_array(), np.ones((7, 7)), rtol=1e-6)
    assert overlays[1].get_array()[2, 3] == pytest.approx(49)
    assert overlays[0].norm is overlays[1].norm
    assert overlays[0].get_extent() == [-0.5, 39.5, 29.5, -0.5]
    assert any("average pooling gives 1" in text for text in texts_of(figure))
    with pytest.raises(LabError, match=r"2 pictures need as many weights of shape \(H, W\)"):
        figures.attention_maps(pictures(2), weights[:1])
