"""The figures: what they show equals the data they were given."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from PIL import Image
from scipy.spatial.distance import cdist, pdist

import plots as plots_module
import plots_features as features_module
from errors import LabError

plots: Any = plots_module  # an artist's data has no narrow type
plots_features: Any = features_module
FLICKR8K = Path(__file__).resolve().parents[2] / "shared" / "flickr8k"
RUNS: list[dict[str, Any]] = [
    {
        "run": "plain",
        "i2t_recall@1": 0.239,
        "t2i_recall@1": 0.184,
        "i2t_recall@5": 0.501,
        "t2i_recall@5": 0.458,
    },
    {"run": "bn", "i2t_recall@1": 0.25, "t2i_recall@1": 0.19, "i2t_recall@5": 0.52, "t2i_recall@5": 0.47},
]


def pictures(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    """Plain pictures of different colours."""
    return [Image.new("RGB", size, (20 * number % 256, 90, 200 - 10 * number)) for number in range(count)]


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


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def picture_axes(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def overlaps(boxes: list[matplotlib.transforms.Bbox]) -> list[tuple[int, int]]:
    """Pairs of boxes that share more than a hundredth of a pixel."""
    pairs = [(a, b) for a in range(len(boxes)) for b in range(a)]
    shared = [matplotlib.transforms.Bbox.intersection(boxes[a], boxes[b]) for a, b in pairs]
    return [
        pair
        for pair, box in zip(pairs, shared, strict=True)
        if box and box.width > 0.01 and box.height > 0.01
    ]


# ------------------------------------------------------------------------------------ style and saving


def test_a_figure_is_saved_at_150_dpi_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "recall.png"
    figure = plots.recall_bars(RUNS, path)
    width, height = figure.get_size_inches()
    with Image.open(path) as saved:
        assert saved.size == (int(150 * width), int(150 * height))
        assert saved.width == 1350
        assert saved.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_session_s_own_style_changes_no_pixel(tmp_path):
    plots.recall_bars(RUNS, tmp_path / "plain.png")
    with matplotlib.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        plots.recall_bars(RUNS, tmp_path / "dark.png")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "dark.png").read_bytes()


def test_pyplot_knows_no_figure_and_a_notebook_shows_one():
    figure = plots.recall_bars(RUNS)
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
    data, size = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert size["width"] == 900


@pytest.mark.parametrize("first", range(len(plots.COLOURS)))
def test_palette_is_distinct_for_the_colour_blind(first):
    """Simulated deuteranopia and protanopia (Vienot et al. 1999) keep the colours apart in linear RGB."""
    simulations = {
        "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    }
    linear = np.array([to_rgb(colour) for colour in plots.COLOURS]) ** 2.2
    for matrix in simulations.values():
        seen = linear @ np.array(matrix).T
        distances = np.linalg.norm(seen - seen[first], axis=1)
        assert np.delete(distances, first).min() > 0.06


# ------------------------------------------------------------------------------------- pictures and text


def test_every_form_of_a_picture_gives_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [Image.fromarray(pixels), pixels, tensor, tensor.float() / 255, tmp_path / "picture.png"]
    forms += [str(tmp_path / "picture.png"), pixels.transpose(2, 0, 1), pixels / 255]
    for form in forms:
        np.testing.assert_array_equal(plots.as_picture(form), pixels)
    grey = plots.as_picture(pixels[..., 0])
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, axis=-1))
    assert plots.as_picture(Image.new("RGB", (2000, 1000))).shape == (240, 480, 3)


def test_a_bad_picture_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(LabError, match=r"broken\.jpg cannot be read; replace it or leave it out"):
        plots.as_picture(tmp_path / "broken.jpg")
    with pytest.raises(LabError, match="undo its normalisation"):
        plots.as_picture(torch.randn(3, 8, 8))
    with pytest.raises(LabError, match=r"\(2, 8, 8\) is no picture"):
        plots.as_picture(np.zeros((2, 8, 8)))


def test_wrapped_text_keeps_every_word_and_fits():
    text = "two children on a green field " * 3 + "https://example.org/" + "long" * 20
    lines = plots.wrap(text, 2.0).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert max(plots.text_width(line, 9) for line in lines) <= 2.0
    assert plots.wrap("quickstart_bn_attn_s0", 1.1).split("\n") == ["quickstart_bn_", "attn_s0"]
    assert plots.wrap("a\nb", 9.0) == "a\nb"


def test_a_cut_text_says_how_much_is_missing():
    text = " ".join(f"word{number:03d}" for number in range(200))
    lines = plots.wrap(text, 2.0).split("\n")
    assert len(lines) == plots.MAX_LINES
    shown = " ".join(lines[:-1])
    assert text.startswith(shown)
    assert lines[-1] == f"… (+{len(text) - len(shown) - 1} characters)"


def test_measured_width_covers_the_drawn_width():
    figure = plots.new_figure(1.0)
    for text in ("A dog in the snow", "WWWW", "iiii", "ÄÖÜ → ✓"):
        drawn = figure.text(0, 0, text, size=9).get_window_extent().width / figure.dpi
        assert drawn <= plots.text_width(text, 9) + 0.02


# ---------------------------------------------------------------------------------------- picture grids


def test_captions_stand_whole_under_their_pictures():
    captions = ["a red square", "costs $5 or $6", ["one", "two"], "a long caption " * 8]
    figure = plots.captioned_images(pictures(4), captions, title="Eight of them")
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
    taller = plots.captioned_images(pictures(4), [*captions[:3], "a long caption " * 12])
    assert taller.get_figheight() > plots.captioned_images(pictures(4), ["short"] * 4).get_figheight()


def test_texts_and_pictures_do_not_overlap():
    captions = ["a dog runs over a wide green meadow behind its owner " * (1 + n % 3) for n in range(8)]
    figure = plots.captioned_images(pictures(5) + pictures(3, (30, 60)), captions)
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.images[0].get_window_extent() for axes in picture_axes(figure)]
    assert len(boxes) == 16
    assert overlaps(boxes) == []
    assert all(figure.bbox.padded(0.5).containsx(box.x1) and box.y0 >= 0 for box in boxes)


def test_captions_must_match_pictures():
    with pytest.raises(LabError, match="2 pictures and 1 captions; give one caption a picture"):
        plots.captioned_images(pictures(2), ["one"])
    with pytest.raises(LabError, match="no picture to draw"):
        plots.captioned_images([], [])


def test_retrieval_grid_marks_right_and_wrong_by_frame_line_and_symbol():
    correct = [[True, False, False], [False, True, False]]
    scores = [[0.9, 0.5, 0.25], [0.8, 0.4, 0.2]]
    figure = plots.retrieval_grid(["a dog", "a cat"], [pictures(3), pictures(3)], scores, correct)
    for axes, right in zip(picture_axes(figure), np.ravel(correct), strict=True):
        spine = axes.spines["left"]
        assert same_color(spine.get_edgecolor(), plots.RIGHT if right else plots.WRONG)
        assert spine.get_linestyle() == ("solid" if right else "dashed")
        assert [text.get_text() for text in axes.texts] == ["✓" if right else "✗"]
        assert spine.get_visible()
    shown = [" ".join(text.split()) for text in texts_of(figure)]
    for text in ("“a dog”", "“a cat”", "1 · 0.900", "3 · 0.200"):
        assert text in shown


def test_retrieval_grid_without_truth_frames_nothing():
    figure = plots.retrieval_grid(["a dog"], [pictures(2)])
    assert not any(axes.spines["left"].get_visible() or axes.texts for axes in picture_axes(figure))
    assert "“nothing”" in texts_of(plots.retrieval_grid(["a dog", "nothing"], [pictures(2), []]))
    with pytest.raises(LabError, match="1 queries and 2 lists"):
        plots.retrieval_grid(["a dog"], [pictures(1), pictures(1)])


def test_failures_show_the_rank_of_the_own_picture_first():
    figure = plots_features.failures(
        ["a dog"], pictures(1), [1214], [pictures(3)], [[0.1, 0.5, 0.4, 0.3]], gallery=5000
    )
    symbols = [axes.texts[0].get_text() for axes in picture_axes(figure)]
    assert symbols == ["✓", "✗", "✗", "✗"]
    assert "its own: rank 1,214 of 5,000 · 0.100" in [" ".join(text.split()) for text in texts_of(figure)]


# ---------------------------------------------------------------------------------------------- curves


def test_learning_curves_draw_the_history_in_percent_with_references():
    table = history()
    figure = plots.learning_curves({"run": table}, chance=0.001, uniform_loss=4.85, best_epoch=3)
    loss, recall, rate = figure.axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), table["train_loss"])
    np.testing.assert_allclose(recall.lines[0].get_ydata(), 100 * table["i2t_recall@1"])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), table["learning_rate"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "Recall@1 (%)", "learning rate (1e-03)"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    stars = [(*line.get_xdata(), *line.get_ydata()) for line in recall.lines if line.get_marker() == "*"]
    assert stars == [(3, pytest.approx(6.0)), (3, pytest.approx(3.0))]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "train", "validation", "uniform logits 4.85", "best epoch 3",
    ]  # fmt: skip
    assert "chance 0.1 %" in [text.get_text() for text in recall.get_legend().get_texts()]
    assert recall.lines[-1].get_ydata()[0] == pytest.approx(0.1)


def test_several_runs_keep_one_colour_each_and_a_legend():
    runs = {"plain": history(), "bn": history(6), "empty": pd.DataFrame()}
    figure = plots.learning_curves(runs, best_epoch={"bn": 5})
    colours = {
        line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_label() in runs
    }
    assert colours == {"plain": plots.COLOURS[0], "bn": plots.COLOURS[1]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "bn", "empty"]
    bottom = figure.legends[0].get_window_extent().y1
    assert all(axes.xaxis.get_tightbbox().y0 > bottom for axes in figure.axes)


def test_gaps_in_a_history_are_left_out_and_a_missing_epoch_is_an_error():
    table = history().assign(val_loss=[np.nan, 2.0, np.nan, 1.0]).drop(columns="learning_rate")
    loss, _, rate = plots.learning_curves(table).axes
    assert loss.lines[1].get_xdata().tolist() == [2, 4]
    assert not rate.lines
    with pytest.raises(LabError, match="history of r has no column 'epoch'"):
        plots.learning_curves({"r": [{"train_loss": 1.0}]})


def test_learning_curves_are_quick_enough_to_draw_live():
    table = {"run": history(20)}
    plots.learning_curves(table)._repr_png_()  # fonts and imports
    times = []
    for _ in range(5):
        start = time.perf_counter()
        plots.learning_curves(table, chance=0.001, uniform_loss=4.85, best_epoch=3)._repr_png_()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.4  # about 0.11 s on an idle core; the rest is for a busy machine


# ------------------------------------------------------------------------------------------------ bars


def test_recall_bars_equal_the_table():
    chance = {"i2t_recall@1": 0.001, "t2i_recall@5": 0.005}
    figure = plots.recall_bars(pd.DataFrame(RUNS), chance=chance)
    for axes, direction in zip(figure.axes, ("i2t", "t2i"), strict=True):
        assert axes.get_title("left") == plots.DIRECTIONS[direction]
        for bars, run in zip(axes.containers, RUNS, strict=True):
            expected = [100 * run[f"{direction}_recall@{k}"] for k in (1, 5)]
            np.testing.assert_allclose([bar.get_height() for bar in bars], expected)
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks == [["Recall@1\nchance 0.1 %", "Recall@5"], ["Recall@1", "Recall@5\nchance 0.5 %"]]
    assert "23.9" in texts_of(figure)


def test_tables_are_read_from_every_plain_form():
    indexed = pd.DataFrame(RUNS).set_index("run")
    forms = [RUNS, pd.DataFrame(RUNS), indexed, {run["run"]: {**run} for run in RUNS}]
    for form in forms:
        pd.testing.assert_frame_equal(plots.as_table(form)[indexed.columns], indexed, check_names=False)
    assert plots.as_table({"i2t_recall@1": 0.5}).index.tolist() == [""]
    with pytest.raises(LabError, match="no run to draw"):
        plots.as_table([])
    with pytest.raises(LabError, match="no column such as 'i2t_recall@1'"):
        plots.recall_bars({"loss": 1.0})


def test_comparison_bars_have_their_intervals():
    rows = [
        {**run, "i2t_recall@1_low": 0.2, "i2t_recall@1_high": 0.3, "t2i_recall@1_std": 0.02} for run in RUNS
    ]
    rows[1]["i2t_recall@1_low"] = rows[1]["i2t_recall@1_high"] = np.nan
    figure = plots.comparison_bars(rows, chance=0.001, whiskers="95 % interval")
    left, right = figure.axes
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], [23.9, 25.0])
    segments = [container[2][0].get_segments() for container in (left.containers[1], right.containers[1])]
    np.testing.assert_allclose(segments[0][0][:, 0], [20, 30])
    np.testing.assert_allclose(segments[1][1][:, 0], [17, 21])
    assert [label.get_text() for label in left.get_yticklabels()] == ["plain", "bn"]
    assert left.get_xlabel() == "Recall@1 (%)"
    dashed = [line.get_xdata()[0] for line in left.lines if line.get_color() == plots.GREY]
    chance = [line.get_xdata()[0] for line in left.lines if line.get_xdata()[0] < 1]
    assert (dashed, chance) == ([pytest.approx(23.9)], [pytest.approx(0.1)])
    assert any("whiskers: 95 % interval" in text for text in texts_of(figure))
    seeds = [{**run, "i2t_recall@1_std": 0.01} for run in RUNS]
    assert "dashed: first row   ·   whiskers: ± 1 standard deviation" in texts_of(
        plots.comparison_bars(seeds)
    )
    assert "dashed: first row" in texts_of(plots.comparison_bars(RUNS))
    with pytest.raises(LabError, match="no column 'rsum'; it has"):
        plots.comparison_bars(RUNS, metrics=["rsum"])


def test_zero_shot_bars_are_sorted_and_judged():
    labels = ["dog", "cat", "car", "boat"]
    table = torch.tensor([[0.1, 0.6, 0.25, 0.05], [0.7, 0.1, 0.15, 0.05]])
    figure = plots.zero_shot_bars(pictures(2), labels, table, ["boat", 0], top=3)
    wrong, right = [axes for axes in figure.axes if not axes.images]
    np.testing.assert_allclose([bar.get_width() for bar in wrong.patches], [60, 25, 5], rtol=1e-5)
    assert [text.get_text() for text in wrong.texts[::2]] == ["✗ cat", "car", "✓ boat (rank 4)"]
    assert [text.get_text() for text in right.texts[:2]] == ["✓ dog", "70.0 %"]
    assert same_color(right.patches[0].get_facecolor()[:3], plots.RIGHT)
    assert same_color(wrong.patches[0].get_facecolor()[:3], plots.WRONG)
    assert right.get_xlabel() == "probability (%)"


def test_zero_shot_bars_refuse_what_does_not_fit():
    with pytest.raises(LabError, match=r"shape \(1, 2\) do not fit 1 pictures and 3 labels"):
        plots.zero_shot_bars(pictures(1), ["a", "b", "c"], [[0.5, 0.5]])
    with pytest.raises(LabError, match="'x' is not among the labels a, b"):
        plots.zero_shot_bars(pictures(1), ["a", "b"], [[0.5, 0.5]], ["x"])


# --------------------------------------------------------------------------------------- looking inside


def test_attention_is_drawn_in_multiples_of_average_pooling():
    weights = torch.full((2, 7, 7), 1 / 49)
    weights[1] = 0
    weights[1, 2, 3] = 1
    figure = plots.attention_maps(pictures(2), weights, ["a", "b"])
    overlays = [axes.images[1] for axes in picture_axes(figure) if len(axes.images) == 2]
    np.testing.assert_allclose(overlays[0].get_array(), np.ones((7, 7)), rtol=1e-6)
    assert overlays[1].get_array()[2, 3] == pytest.approx(49)
    assert overlays[0].norm is overlays[1].norm
    assert overlays[0].get_extent() == [-0.5, 39.5, 29.5, -0.5]
    assert any("average pooling gives 1" in text for text in texts_of(figure))
    with pytest.raises(LabError, match=r"2 pictures need as many weights of shape \(H, W\)"):
        plots.attention_maps(pictures(2), weights[:1])


def test_similarity_matrix_has_captions_as_rows_and_frames_matches():
    scores = np.array([[0.9, 0.1, -0.001], [0.2, 0.8, 0.7]])  # 2 pictures, 3 captions
    matches = np.array([[True, False, False], [False, True, True]])
    figure = plots_features.similarity_matrix(scores, ["a", "b", "c"], pictures(2), matches)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), scores.T)
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.20", "0.10", "0.80", "0.00", "0.70"]
    centres = [(patch.get_x() + 0.48, patch.get_y() + 0.47) for patch in axes.patches]
    np.testing.assert_allclose(centres, [(0, 0), (1, 1), (1, 2)])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    with pytest.raises(LabError, match=r"scores of shape \(3, 2\) do not fit 2 pictures and 3 captions"):
        plots_features.similarity_matrix(scores.T, ["a", "b", "c"], pictures(2))


def test_confusion_matrix_shows_shares_and_the_commonest_mistakes():
    counts = np.array([[8, 2, 0], [5, 4, 1], [0, 0, 0]])
    figure = plots_features.confusion_matrix(counts, ["dog", "cat", "car"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[80, 20, 0], [50, 40, 10], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == [str(count) for count in counts.ravel()]
    assert axes.get_title("left") == "accuracy 60.0 % of 20"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    mistakes = plots_features.top_confusions(counts, ["dog", "cat", "car"])
    assert mistakes.to_numpy().tolist() == [
        ["cat", "dog", 5, 0.5],
        ["dog", "cat", 2, 0.2],
        ["cat", "car", 1, 0.1],
    ]
    assert any("cat → dog: 5, 50 %" in text for text in texts_of(figure))
    with pytest.raises(LabError, match="does not fit 2 labels"):
        plots_features.confusion_matrix(counts, ["dog", "cat"])


def test_calibration_matches_a_written_out_loop():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.6
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    table = plots_features.calibration_bins(confidence, correct)
    assert table["count"].sum() == 500
    assert plots_features.calibration_error(table) == pytest.approx(error)


def test_reliability_diagram_draws_accuracy_by_bin():
    figure = plots_features.reliability_diagram([0.95, 0.95, 0.55, 0.05], [True, False, True, False])
    axes, counts = figure.axes
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert (heights[9], heights[5], heights[0]) == (50, 100, 0)
    assert np.isnan(heights[3])
    assert [bar.get_height() for bar in counts.patches] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert axes.get_title("left") == "expected calibration error 35.0 %"
    with pytest.raises(LabError, match="one value a prediction"):
        plots_features.reliability_diagram([0.5, 0.5], [True])


def test_rank_histogram_counts_queries_and_chance():
    ranks = {"i2t": [1, 1, 3, 60], "t2i": torch.tensor([1, 7, 9, 12, 1000])}
    figure = plots_features.rank_histogram(ranks, galleries={"t2i": (1000, 1)})
    axes = figure.axes[0]
    shares = [[bar.get_height() for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(shares[0], [50, 25, 0, 0, 25, 0, 0])
    np.testing.assert_allclose(shares[1], [20, 0, 40, 20, 0, 0, 20])
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["1", "2–5", "6–10", "11–50", "51–100", "101–500", "501–1,000"]
    chance = [segment[0, 1] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(chance, [0.1, 0.4, 0.5, 4, 5, 40, 50])
    with pytest.raises(LabError, match="from 1 on"):
        plots_features.rank_histogram({"i2t": [0, 1]})


def test_chance_of_a_rank_with_several_matches_is_exact():
    """Against the product of drawing without replacement."""
    missed = np.prod([(20 - 5 - n) / (20 - n) for n in range(4)])
    assert plots_features.chance_of_rank(4, 20, 5) == pytest.approx(1 - missed)
    assert plots_features.chance_of_rank(16, 20, 5) == 1.0


def test_recall_by_gallery_size_labels_do_not_overlap():
    curve = {
        "gallery_size": [5000, 100, 1000],
        "recall": [0.3, 0.9, 0.5],
        "low": [0.2] * 3,
        "high": [1.0] * 3,
    }
    published = [(f"system number {n}", 1000 if n < 5 else 5000, 0.3 + 0.005 * n) for n in range(10)]
    figure = plots_features.recall_by_gallery_size({"run": curve}, published, k=5)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [100, 1000, 5000]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [90, 50, 30])
    chance = axes.lines[1]
    np.testing.assert_allclose(chance.get_ydata(), 500 / chance.get_xdata())
    np.testing.assert_allclose(axes.lines[2].get_ydata(), [100 * recall for _, _, recall in published])
    FigureCanvasAgg(figure).draw()  # places the labels
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 10
    assert overlaps(boxes) == []
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)
    assert axes.get_ylabel() == "Recall@5, text → image (%)"


def test_a_label_stands_nearer_to_its_own_point_than_to_another():
    points = np.array([[2.0, 1.0], [2.0, 1.12], [2.0, 2.0]])
    sizes, frame = np.full((3, 2), [1.0, 0.13]), np.array([0.0, 0.0, 4.0, 3.0])
    taken = np.hstack([points - 0.06, points + 0.06])
    boxes = plots_features.place_labels(points, sizes, taken, frame)
    nearest = np.clip(points[None], boxes[:, None, :2], boxes[:, None, 2:])
    distances = np.linalg.norm(nearest - points, axis=-1)  # (label, point)
    assert distances.argmin(axis=1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], sizes)


# ------------------------------------------------------------------------------------- the joint space


def features(seed: int, rows: int, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width)) + 0.3
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_geometry_matches_scipy_s_distances():
    images, texts = features(0, 12), features(1, 30)
    image_id = np.array([*range(10), 10, -1])
    text_id = np.array([*np.repeat(np.arange(9), 3), -1, 77, 10])
    found = plots_features.feature_geometry(torch.tensor(images), texts, image_id, text_id)
    match = (image_id[:, None] == text_id) & (text_id != -1)
    squared = cdist(images, texts, "sqeuclidean")
    assert found["alignment"] == pytest.approx(squared[match].mean(), abs=1e-6)
    for side, rows in (("image", images), ("text", texts)):
        expected = np.log(np.exp(-2 * pdist(rows, "sqeuclidean")).mean())
        assert found[f"{side}_uniformity"] == pytest.approx(expected, abs=1e-5)
    gap = np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0))
    assert found["modality_gap"] == pytest.approx(gap, abs=1e-6)
    assert plots_features.uniformity(images, chunk=5) == pytest.approx(found["image_uniformity"], abs=1e-6)


def test_geometry_refuses_bad_features():
    with pytest.raises(LabError, match="no image and text share an id"):
        plots_features.alignment(features(0, 2), features(1, 2), [1, -1], [2, -1])
    with pytest.raises(LabError, match="text_features must be finite"):
        plots_features.modality_gap_size(features(0, 2), np.full((2, 8), np.nan))
    with pytest.raises(LabError, match="at least two rows"):
        plots_features.uniformity(features(0, 1))


def test_modality_gap_draws_its_history():
    columns = ("modality_gap", "alignment", "image_uniformity", "text_uniformity")
    table = pd.DataFrame({"epoch": [1, 2], **{name: [0.5 + n, 0.4 + n] for n, name in enumerate(columns)}})
    figure = plots_features.modality_gap(table)
    drawn = [line.get_ydata().tolist() for axes in figure.axes for line in axes.lines]
    assert drawn == [table[name].tolist() for name in columns]
    assert [axes.get_ylabel() for axes in figure.axes] == list(plots_features.GEOMETRY)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_modality_map_is_deterministic_and_joins_pairs(method):
    images, texts = features(0, 30), features(1, 40)
    draw = SimpleNamespace(pairs=[[0, 5], [29, 39]], thumbnails={3: pictures(1)[0]}, method=method)
    figures = [plots_features.modality_map(images, texts, **vars(draw)) for _ in range(2)]
    offsets = [
        [np.asarray(points.get_offsets()) for points in figure.axes[0].collections] for figure in figures
    ]
    for first, second in zip(*offsets, strict=True):
        np.testing.assert_array_equal(first, second)
    axes = figures[0].axes[0]
    assert [len(points) for points in offsets[0]] == [30, 40]
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [offsets[0][0][29], offsets[0][1][39]])
    placed = [artist.xy for artist in axes.artists if isinstance(artist, AnnotationBbox)]
    np.testing.assert_allclose(placed, [offsets[0][0][3]])


def test_pca_map_has_the_variance_of_an_independent_svd():
    images, texts = features(0, 30), features(1, 40)
    figure = plots_features.modality_map(images, texts, limit=100)
    rows = np.concatenate([images, texts])
    singular = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    assert (
        figure.axes[0].get_xlabel()
        == f"component 1 ({100 * singular[0] / singular.sum():.0f} % of the variance)"
    )


def test_a_large_map_says_what_it_leaves_out():
    figure = plots_features.modality_map(features(0, 50), features(1, 60), limit=20, pairs=[[49, 59]])
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["20 of 50 images", "20 of 60 texts"]
    assert len(figure.axes[0].lines) == 1
    with pytest.raises(LabError, match=r"method 'tsn' does not exist; did you mean 'tsne'\?"):
        plots_features.modality_map(features(0, 5), features(1, 5), method="tsn")


def test_overlapping_thumbnails_are_left_out():
    images = np.concatenate([np.tile(features(0, 1), (5, 1)), features(2, 5)])
    figure = plots_features.modality_map(images, features(1, 10), thumbnails=pictures(5))
    assert sum(isinstance(artist, AnnotationBbox) for artist in figure.axes[0].artists) == 1


# ------------------------------------------------------------------------------------- the data's report


def test_data_report_draws_a_panel_for_each_finding():
    report = {
        "images_per_split": {"train": 6000, "test": 1000},
        "captions_per_image": {5: 6998, 4: 2},
        "image_sizes": [(500, 375), (500, 375), (375, 500)],
        "caption_lengths": [8, 9, 9, 12],
        "undecodable": {"truncated": 3, "empty": 1},
    }
    figure = plots_features.data_report(report)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [
        "7,000 images", "34,998 captions", "2 sizes, most 500×375", "median 9 words", "4 undecodable images",
    ]  # fmt: skip
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]
    assert heights[0] == [6000, 1000]
    assert heights[1] == [2, 6998]
    assert heights[3] == [1, 2, 0, 0, 1]
    assert [patch.get_width() for patch in figure.axes[4].patches] == [3, 1]
    assert len(plots_features.data_report({"images_per_split": {"train": 1}, "undecodable": {}}).axes) == 1
    with pytest.raises(LabError, match="nothing to draw; it needs one of images_per_split"):
        plots_features.data_report({})


# ------------------------------------------------------------------------------------- real photographs


def test_real_photographs_and_captions_fit(tmp_path):
    if not (FLICKR8K / "captions.txt").exists():
        pytest.skip("needs ../shared/flickr8k beside the repository")
    with open(FLICKR8K / "captions.txt", encoding="utf-8") as lines:
        rows = [row for _, row in zip(range(200), csv.DictReader(lines), strict=False)][::5][:8]
    images = [FLICKR8K / "Images" / row["image"] for row in rows]
    captions = [row["caption"] for row in rows]
    figure = plots.captioned_images(images, captions)
    shown = [" ".join(text.split()) for text in texts_of(figure)]
    assert all(" ".join(caption.split()) in shown for caption in captions)
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.images[0].get_window_extent() for axes in picture_axes(figure)]
    assert len(boxes) == 16
    assert overlaps(boxes) == []
    plots.retrieval_grid(captions[:2], [images[:5], images[3:]], path=tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width == 1350
