"""Figures show the data they are given, whole and without overlaps; zero rows and one row are handled."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.transforms import Bbox
from PIL import Image

from core.errors import LabError
from plots import features, figures, ranks, style

NAMES = ("i2t_recall@1", "t2i_recall@1", "i2t_recall@5", "t2i_recall@5")
RUNS: list[dict[str, Any]] = [
    {"run": "plain", **dict(zip(NAMES, (0.239, 0.184, 0.501, 0.458), strict=True))},
    {"run": "bn", **dict(zip(NAMES, (0.25, 0.19, 0.52, 0.47), strict=True))},
]


def images(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    """Plain images of different colors."""
    return [Image.new("RGB", size, (20 * number % 256, 90, 200 - 10 * number)) for number in range(count)]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def image_axes(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def assert_whole(figure: Figure) -> None:
    """No panel (with its labels), legend or heading overlaps another one or is cut off."""
    figure.draw_without_rendering()
    texts = [text for part in (figure, *figure.subfigs) for text in part.texts if text.get_text()]
    boxes = [artist.get_tightbbox() for artist in (*figure.axes, *figure.legends, *texts)]
    assert overlaps(boxes) == []
    assert all(figure.bbox.padded(1).contains(*corner) for box in boxes for corner in (box.min, box.max))


def overlaps(boxes: list[Bbox]) -> list[tuple[int, int]]:
    """Pairs of boxes that share more than a hundredth of a pixel."""
    pairs = {(a, b): Bbox.intersection(boxes[a], boxes[b]) for a in range(len(boxes)) for b in range(a)}
    return [pair for pair, box in pairs.items() if box and min(box.width, box.height) > 0.01]


# --- style and saving ---


def test_a_figure_is_saved_at_150_dpi_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "recall.png"
    figure = figures.recall_bars(RUNS, path)
    width, height = figure.get_size_inches()
    with Image.open(path) as saved:
        assert saved.size == (int(150 * width), int(150 * height))
        assert saved.width == 1350
        assert saved.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_session_style_changes_no_pixel(tmp_path):
    figures.recall_bars(RUNS, tmp_path / "plain.png")
    with matplotlib.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        figures.recall_bars(RUNS, tmp_path / "dark.png")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "dark.png").read_bytes()


def test_pyplot_knows_no_figure_and_a_notebook_shows_one():
    figure = figures.recall_bars(RUNS)
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
    data, size = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert size["width"] == 900


def test_wrapped_text_keeps_every_word_and_a_cut_text_ends_in_an_ellipsis():
    text = "two children on a green field " * 3 + "https://example.org/" + "long" * 20
    lines = style.wrap(text, 25).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert max(map(len, lines)) <= 25
    assert style.wrap("a\nb", 9) == "a\nb"
    for long in ("word " * 1000, "i" * 10**6):
        lines = style.wrap(long, 20).split("\n")
        assert len(lines) == style.MAX_LINES
        assert lines[-1] == "…"


# --- images and tables ---


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [Image.fromarray(pixels), pixels, tensor, tensor.float() / 255, tmp_path / "picture.png"]
    forms += [str(tmp_path / "picture.png"), pixels.transpose(2, 0, 1), pixels / 255]
    for form in forms:
        np.testing.assert_array_equal(style.as_pixels(form), pixels)
    grey = style.as_pixels(pixels[..., 0])
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, axis=-1))
    assert style.as_pixels(Image.new("RGB", (2000, 1000))).shape == (240, 480, 3)


def test_a_bad_image_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(LabError, match=r"broken\.jpg cannot be read; replace it or leave it out"):
        style.as_pixels(tmp_path / "broken.jpg")
    with pytest.raises(LabError, match="undo the image's normalization"):
        style.as_pixels(torch.randn(3, 8, 8))
    with pytest.raises(LabError, match=r"\(2, 8, 8\) is not an image"):
        style.as_pixels(np.zeros((2, 8, 8)))


def test_tables_are_read_from_every_plain_form():
    indexed = pd.DataFrame(RUNS).set_index("run")
    forms = [RUNS, pd.DataFrame(RUNS), indexed, {run["run"]: {**run} for run in RUNS}]
    for form in forms:
        pd.testing.assert_frame_equal(style.as_table(form)[indexed.columns], indexed, check_names=False)
    assert style.as_table({"i2t_recall@1": 0.5}).index.tolist() == [""]
    with pytest.raises(LabError, match="no run to draw"):
        style.as_table([])
    with pytest.raises(LabError, match="no column such as 'i2t_recall@1'"):
        figures.recall_bars({"loss": 1.0})


# --- images with captions ---


def test_captions_are_whole_under_their_images():
    captions = ["a red square", "costs $5 or $6", ["one", "two"], "a long caption " * 8]
    figure = figures.captioned_images(images(4), captions, title="Four of them")
    texts = [" ".join(text.split()) for text in texts_of(figure)]
    long = ("a long caption " * 8).strip()
    assert {"a red square", "costs $5 or $6", "• one • two", long, "Four of them"} <= set(texts)
    for axes, image in zip(image_axes(figure), images(4), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), np.asarray(image))
    assert_whole(figure)


def test_captions_of_images_of_different_shapes_do_not_overlap():
    captions = ["a dog runs over a wide green meadow behind its owner " * (1 + n % 3) for n in range(8)]
    figure = figures.captioned_images(images(5) + images(3, (30, 60)), captions)
    assert_whole(figure)


def test_captions_must_match_images():
    with pytest.raises(LabError, match="2 images and 1 captions; give one caption per image"):
        figures.captioned_images(images(2), ["one"])
    with pytest.raises(LabError, match="no image to draw"):
        figures.captioned_images([], [])


def test_right_and_wrong_differ_in_frame_line_and_symbol():
    marks = [True, False, None]
    cells = [style.Cell(image, "1  ·  0.900", mark) for image, mark in zip(images(3), marks, strict=True)]
    figure = style.image_rows([("“a dog”", cells), ("“nothing”", [])])
    for axes, mark in zip(image_axes(figure), marks, strict=True):
        spine = axes.spines["left"]
        assert spine.get_visible() == (mark is not None)
        assert [text.get_text() for text in axes.texts] == {True: ["✓"], False: ["✗"], None: []}[mark]
        if mark is not None:
            assert same_color(spine.get_edgecolor(), style.RIGHT if mark else style.WRONG)
            assert spine.get_linestyle() == ("solid" if mark else "dashed")
    assert {"“a dog”", "“nothing”", "1  ·  0.900"} <= set(texts_of(figure))


def test_failures_show_the_rank_of_the_matching_image_first():
    failure = features.Failure("a dog", images(1)[0], 1214, images(3), [0.1, 0.5, 0.4, 0.3])
    figure = features.failures([failure], gallery=5000)
    symbols = [axes.texts[0].get_text() for axes in image_axes(figure)]
    assert symbols == ["✓", "✗", "✗", "✗"]
    assert "match: rank 1,214 of 5,000 · 0.100" in [" ".join(text.split()) for text in texts_of(figure)]


# --- curves ---


def history(epochs: int = 4) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    losses = {"train_loss": 4.0 / epoch, "val_loss": 5.0 / epoch, "learning_rate": 1e-3 / epoch}
    return pd.DataFrame(
        {"epoch": epoch, **losses, "i2t_recall@1": 0.02 * epoch, "t2i_recall@1": 0.01 * epoch}
    )


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


def test_several_runs_keep_one_color_each_and_a_legend():
    runs = {"plain": history(), "bn": history(6), "empty": pd.DataFrame()}
    figure = figures.learning_curves(runs, best_epoch={"bn": 5})
    colours = {
        line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_label() in runs
    }
    assert colours == {"plain": style.COLORS[0], "bn": style.COLORS[1]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "bn", "empty"]
    assert_whole(figure)


def test_gaps_in_a_history_are_left_out_and_a_missing_epoch_is_an_error():
    table = history().assign(val_loss=[np.nan, 2.0, np.nan, 1.0]).drop(columns="learning_rate")
    loss, _, rate = figures.learning_curves(table).axes
    assert loss.lines[1].get_xdata().tolist() == [2, 4]
    assert not rate.lines
    with pytest.raises(LabError, match="history of r has no column 'epoch'"):
        figures.learning_curves({"r": [{"train_loss": 1.0}]})


def test_modality_gap_draws_its_history():
    columns = ("modality_gap", "alignment", "image_uniformity", "text_uniformity")
    table = pd.DataFrame({"epoch": [1, 2], **{name: [0.5 + n, 0.4 + n] for n, name in enumerate(columns)}})
    figure = features.modality_gap(table)
    drawn = [line.get_ydata().tolist() for axes in figure.axes for line in axes.lines]
    assert drawn == [table[name].tolist() for name in columns]
    assert [axes.get_ylabel() for axes in figure.axes] == list(features.GEOMETRY)


# --- bars ---


def test_recall_bars_equal_the_table():
    chance = {"i2t_recall@1": 0.001, "t2i_recall@5": 0.005}
    figure = figures.recall_bars(pd.DataFrame(RUNS), chance=chance)
    for axes, direction in zip(figure.axes, ("i2t", "t2i"), strict=True):
        assert axes.get_ylabel() == f"{style.DIRECTIONS[direction]} Recall@K (%)"
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
    assert left.get_xlabel() == "image-to-text Recall@1 (%)"
    dashed = [line.get_xdata()[0] for line in left.lines if line.get_color() == style.GREY]
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
    figure = figures.zero_shot_bars(images(2), labels, table, ["boat", 0], top=3)
    wrong, right = [axes for axes in figure.axes if not axes.images]
    np.testing.assert_allclose([bar.get_width() for bar in wrong.patches], [60, 25, 5], rtol=1e-5)
    assert [text.get_text() for text in wrong.texts[::2]] == ["✗ cat", "car", "✓ boat (rank 4)"]
    assert [text.get_text() for text in right.texts[:2]] == ["✓ dog", "70.0 %"]
    assert same_color(right.patches[0].get_facecolor()[:3], style.RIGHT)
    assert same_color(wrong.patches[0].get_facecolor()[:3], style.WRONG)
    assert right.get_xlabel() == "probability (%)"


def test_zero_shot_bars_refuse_what_does_not_fit():
    with pytest.raises(LabError, match=r"shape \(1, 2\) do not fit 1 images and 3 labels"):
        figures.zero_shot_bars(images(1), ["a", "b", "c"], [[0.5, 0.5]])
    with pytest.raises(LabError, match="'x' is not among the labels a, b"):
        figures.zero_shot_bars(images(1), ["a", "b"], [[0.5, 0.5]], ["x"])


# --- attention, similarities, maps ---


def test_attention_is_drawn_in_multiples_of_average_pooling():
    weights = torch.full((2, 7, 7), 1 / 49)
    weights[1] = 0
    weights[1, 2, 3] = 1
    figure = figures.attention_maps(images(2), weights, ["a", "b"])
    overlays = [axes.images[1] for axes in image_axes(figure) if len(axes.images) == 2]
    np.testing.assert_allclose(overlays[0].get_array(), np.ones((7, 7)), rtol=1e-6)
    assert overlays[1].get_array()[2, 3] == pytest.approx(49)
    assert overlays[0].norm is overlays[1].norm
    assert overlays[0].get_extent() == [-0.5, 39.5, 29.5, -0.5]
    assert any("average pooling gives 1" in text for text in texts_of(figure))
    with pytest.raises(LabError, match=r"2 images need as many weights of shape \(H, W\)"):
        figures.attention_maps(images(2), weights[:1])


def test_similarity_matrix_has_captions_as_rows_and_frames_matches():
    scores = np.array([[0.9, 0.1, -0.001], [0.2, 0.8, 0.7]])  # 2 images, 3 captions
    matches = np.array([[True, False, False], [False, True, True]])
    figure = features.similarity_matrix(scores, ["a", "b", "c"], images(2), matches)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), scores.T)
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.20", "0.10", "0.80", "0.00", "0.70"]
    centres = [(patch.get_x() + 0.48, patch.get_y() + 0.47) for patch in axes.patches]
    np.testing.assert_allclose(centres, [(0, 0), (1, 1), (1, 2)])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    with pytest.raises(LabError, match=r"scores of shape \(3, 2\) do not fit 2 images and 3 captions"):
        features.similarity_matrix(scores.T, ["a", "b", "c"], images(2))


def random_features(seed: int, rows: int, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width)) + 0.3
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_modality_map_is_deterministic_and_joins_pairs(method):
    image_rows, texts = random_features(0, 30), random_features(1, 40)
    draw = SimpleNamespace(pairs=[[0, 5], [29, 39]], thumbnails={3: images(1)[0]}, method=method)
    drawings = [features.modality_map(image_rows, texts, **vars(draw)) for _ in range(2)]
    offsets = [
        [np.asarray(points.get_offsets()) for points in figure.axes[0].collections] for figure in drawings
    ]
    for first, second in zip(*offsets, strict=True):
        np.testing.assert_array_equal(first, second)
    axes = drawings[0].axes[0]
    assert [len(points) for points in offsets[0]] == [30, 40]
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [offsets[0][0][29], offsets[0][1][39]])
    placed = [artist.xy for artist in axes.artists if isinstance(artist, AnnotationBbox)]
    np.testing.assert_allclose(placed, [offsets[0][0][3]])


def test_a_large_map_says_what_it_leaves_out():
    figure = features.modality_map(random_features(0, 50), random_features(1, 60), limit=20, pairs=[[49, 59]])
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["20 of 50 images", "20 of 60 texts"]
    assert len(figure.axes[0].lines) == 1
    with pytest.raises(LabError, match=r"method 'tsn' does not exist; did you mean 'tsne'\?"):
        features.modality_map(random_features(0, 5), random_features(1, 5), method="tsn")


def test_drawn_thumbnails_do_not_overlap_where_the_texts_lie_far_away():
    texts = -1 - random_features(1, 40)  # they widen the axes
    figure = features.modality_map(random_features(0, 30), texts, thumbnails=images(25, (40, 40)))
    figure.draw_without_rendering()
    placed = [artist for artist in figure.axes[0].artists if isinstance(artist, AnnotationBbox)]
    assert len(placed) == 17
    assert overlaps([thumbnail.patch.get_window_extent() for thumbnail in placed]) == []


# --- confusions, calibration, ranks ---


def test_confusion_matrix_shows_shares_and_the_most_frequent_mistakes():
    counts = np.array([[8, 2, 0], [5, 4, 1], [0, 0, 0]])
    figure = ranks.confusion_matrix(counts, ["dog", "cat", "car"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[80, 20, 0], [50, 40, 10], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == "80 20 0 50 40 10 0 0 0".split()
    assert axes.get_title("left") == "accuracy 60.0 % of 20 images"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    mistakes = ranks.top_confusions(counts, ["dog", "cat", "car"])
    assert mistakes.to_numpy().tolist() == [
        ["cat", "dog", 5, 0.5],
        ["dog", "cat", 2, 0.2],
        ["cat", "car", 1, 0.1],
    ]
    assert any("cat → dog: 5 (50 %)" in text for text in texts_of(figure))
    with pytest.raises(LabError, match="does not fit 2 labels"):
        ranks.confusion_matrix(counts, ["dog", "cat"])


def test_calibration_matches_a_written_out_loop():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.6
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    table = ranks.calibration_bins(confidence, correct)
    assert table["count"].sum() == 500
    assert ranks.calibration_error(table) == pytest.approx(error)


def test_reliability_diagram_draws_accuracy_by_bin():
    figure = ranks.reliability_diagram([0.95, 0.95, 0.55, 0.05], [True, False, True, False])
    axes, counts = figure.axes
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert (heights[9], heights[5], heights[0]) == (50, 100, 0)
    assert np.isnan(heights[3])
    assert [bar.get_height() for bar in counts.patches] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert axes.get_title("left") == "expected calibration error 35.0 %"
    with pytest.raises(LabError, match="one value per prediction"):
        ranks.reliability_diagram([0.5, 0.5], [True])


def test_rank_histogram_counts_queries_and_chance():
    queries = {"i2t": [1, 1, 3, 60], "t2i": torch.tensor([1, 7, 9, 12, 1000])}
    figure = ranks.rank_histogram(queries, galleries={"t2i": (1000, 1)})
    axes = figure.axes[0]
    shares = [[bar.get_height() for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(shares[0], [50, 25, 0, 0, 25, 0, 0])
    np.testing.assert_allclose(shares[1], [20, 0, 40, 20, 0, 0, 20])
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["1", "2–5", "6–10", "11–50", "51–100", "101–500", "501–1,000"]
    chance = [segment[0, 1] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(chance, [0.1, 0.4, 0.5, 4, 5, 40, 50])
    with pytest.raises(LabError, match="of 1 or more"):
        ranks.rank_histogram({"i2t": [0, 1]})


def test_recall_by_gallery_size_beside_published_systems():
    curve = {
        "gallery_size": [5000, 100, 1000],
        "recall": [0.3, 0.9, 0.5],
        "low": [0.2] * 3,
        "high": [1.0] * 3,
    }
    published = [(f"system number {n % 8}", 1000 if n < 5 else 5000, 0.3 + 0.005 * n) for n in range(10)]
    figure = ranks.gallery_size_curves({"run": curve}, published, k=5)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [100, 1000, 5000]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [90, 50, 30])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), 500 / axes.lines[1].get_xdata())
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[2:]}
    assert points["system number 0"] == [[1000, 30], [5000, pytest.approx(34)]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"system number {n}" for n in range(8)
    ]
    assert axes.get_ylabel() == "text-to-image Recall@5 (%)"
    assert_whole(figure)


# --- the data check ---


def test_data_report_draws_a_panel_for_each_finding():
    report = {
        "images_per_split": {"train": 6000, "test": 1000},
        "captions_per_image": {5: 6998, 4: 2},
        "image_sizes": [(500, 375), (500, 375), (375, 500)],
        "caption_lengths": [8, 9, 9, 12],
        "undecodable": {"truncated": 3, "empty": 1},
    }
    figure = figures.data_report(report)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [
        "7,000 images", "34,998 captions", "2 sizes, most 500×375", "median 9 words", "4 undecodable images",
    ]  # fmt: skip
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]
    assert heights[0] == [6000, 1000]
    assert heights[1] == [2, 6998]
    assert heights[3] == [1, 2, 0, 0, 1]
    assert [patch.get_width() for patch in figure.axes[4].patches] == [3, 1]
    assert len(figures.data_report({"images_per_split": {"train": 1}, "undecodable": {}}).axes) == 1
    splits = {"train": 113_287, "restval": 30_504, "val": 5000, "test": 5000}
    assert_whole(
        figures.data_report({"images_per_split": splits, "caption_lengths": [9] * 3000 + [10] * 1000})
    )
    with pytest.raises(LabError, match="is empty; it needs one of images_per_split"):
        figures.data_report({})


# --- zero rows and one row ---

IMAGE = np.zeros((8, 8, 3), np.uint8)
EPOCH = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.1, "learning_rate": 1e-3, "i2t_recall@1": 0.5}
EPOCH |= {"t2i_recall@1": 0.5, "modality_gap": 0.1, "alignment": 0.2, "image_uniformity": -1.0}
METRICS = {"i2t_recall@1": 0.5, "t2i_recall@1": 0.5}
NAN = float("nan")


def report_of(images):
    """A data check's report of so many images without a caption."""
    sizes = {"images_per_split": {"train": images}, "captions_per_image": {0: images}}
    lists = {"image_sizes": [[8, 8]] * images, "caption_lengths": [0] * images}
    return {**sizes, **lists, "undecodable": {"empty file": 1} if images else {}}


def runs_of(epoch, n):
    return {f"run{i}": pd.DataFrame([epoch]) for i in range(n)}


NO_VALUES, NO_METRICS = {**dict.fromkeys(EPOCH, NAN), "epoch": 1}, dict.fromkeys(METRICS, NAN)
FAILURE = features.Failure("a dog", IMAGE, 2, [IMAGE], [0.1, 0.2])
ONES = np.ones((1, 4))
FIGURES = {
    "captioned": lambda n: figures.captioned_images([IMAGE] * n, ["a dog"] * n),
    "captioned, no caption": lambda n: figures.captioned_images([IMAGE] * n, [[]] * n),
    "curves": lambda n: figures.learning_curves({"run": pd.DataFrame([EPOCH] * n)}, chance=0.1),
    "curves of runs": lambda n: figures.learning_curves(runs_of(EPOCH, n)),
    "curves, no values": lambda n: figures.learning_curves(pd.DataFrame([NO_VALUES] * n)),
    "curves, no rate": lambda n: figures.learning_curves(runs_of({**EPOCH, "learning_rate": 0.0}, n)),
    "recalls": lambda n: figures.recall_bars(pd.DataFrame([METRICS] * n)),
    "recalls, no values": lambda n: figures.recall_bars(pd.DataFrame([NO_METRICS] * n)),
    "comparison": lambda n: figures.comparison_bars(pd.DataFrame([METRICS] * n)),
    "comparison, no values": lambda n: figures.comparison_bars(pd.DataFrame([NO_METRICS] * n)),
    "comparison of metrics": lambda n: figures.comparison_bars([METRICS], metrics=[*METRICS][:n]),
    "zero-shot": lambda n: figures.zero_shot_bars([IMAGE], ["dog"] * n, np.ones((1, n))),
    "zero-shot of images": lambda n: figures.zero_shot_bars(
        [IMAGE] * n, ["dog"], np.ones((n, 1)), ["dog"] * n
    ),
    "attention": lambda n: figures.attention_maps([IMAGE] * n, [np.ones((2, 2)) / 4] * n),
    "attention, empty map": lambda n: figures.attention_maps([IMAGE], [np.ones((n, n))]),
    "gap": lambda n: features.modality_gap(pd.DataFrame([EPOCH] * n)),
    "similarity": lambda n: features.similarity_matrix(np.ones((n, 1)), ["a dog"], [IMAGE] * n),
    "similarity of texts": lambda n: features.similarity_matrix(np.ones((1, n)), ["a dog"] * n, [IMAGE]),
    "map, no plane": lambda n: features.modality_map(np.ones((n, 4)), np.ones((n, 4)), pairs=[(0, 0)] * n),
    "map of texts, no plane": lambda n: features.modality_map(np.ones((n, 4)), ONES, method="tsne"),
    "failures": lambda n: features.failures([FAILURE] * n, 9),
    "failures, nothing above": lambda n: features.failures([replace(FAILURE, above=[], scores=[0.1])] * n, 9),
    "confusions": lambda n: ranks.confusion_matrix(np.ones((n, n)), ["dog"] * n),
    "confusions, no counts": lambda n: ranks.confusion_matrix(np.zeros((n, n)), ["dog"] * n),
    "calibration": lambda n: ranks.reliability_diagram(np.full(n, 0.5), np.ones(n)),
    "ranks": lambda n: ranks.rank_histogram({"i2t": np.ones(n)}, galleries={"i2t": (1, 1)}),
    "ranks of ways": lambda n: ranks.rank_histogram({f"{i}": np.ones(1) for i in range(n)}),
    "gallery sizes": lambda n: ranks.gallery_size_curves({"run": {"sizes": [1] * n, "t2i": [1.0] * n}}),
    "gallery sizes, published": lambda n: ranks.gallery_size_curves({}, [("CLIP", 1000, 0.5)] * n),
    "data": lambda n: figures.data_report(report_of(n)),
    "data of nothing": lambda n: figures.data_report({"images_per_split": {}, "image_sizes": [[8, 8]] * n}),
}


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_over_nothing_or_one_row_is_drawn_or_says_what_is_missing(name, rows, tmp_path):
    refusal = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's mean of nothing, matplotlib's limits that are equal
        try:
            FIGURES[name](rows).savefig(tmp_path / "figure.png", dpi=30)
        except LabError as error:
            refusal = str(error)
    assert refusal == "" or rows == 0 or any(word in name for word in ("no ", "empty", "nothing")), refusal
    assert "\n" not in refusal
