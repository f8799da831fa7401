"""Figures of confusions, calibration and ranks: their numbers, and labels that do not overlap."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from figures import overlaps, texts_of
from matplotlib.backends.backend_agg import FigureCanvasAgg

from core.errors import LabError
from plots import ranks as plots_ranks


def test_confusion_matrix_shows_shares_and_the_commonest_mistakes():
    counts = np.array([[8, 2, 0], [5, 4, 1], [0, 0, 0]])
    figure = plots_ranks.confusion_matrix(counts, ["dog", "cat", "car"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[80, 20, 0], [50, 40, 10], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == [str(count) for count in counts.ravel()]
    assert axes.get_title("left") == "accuracy 60.0 % of 20"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    mistakes = plots_ranks.top_confusions(counts, ["dog", "cat", "car"])
    assert mistakes.to_numpy().tolist() == [
        ["cat", "dog", 5, 0.5],
        ["dog", "cat", 2, 0.2],
        ["cat", "car", 1, 0.1],
    ]
    assert any("cat → dog: 5, 50 %" in text for text in texts_of(figure))
    with pytest.raises(LabError, match="does not fit 2 labels"):
        plots_ranks.confusion_matrix(counts, ["dog", "cat"])


def test_calibration_matches_a_written_out_loop():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.6
    error = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    table = plots_ranks.calibration_bins(confidence, correct)
    assert table["count"].sum() == 500
    assert plots_ranks.calibration_error(table) == pytest.approx(error)


def test_reliability_diagram_draws_accuracy_by_bin():
    figure = plots_ranks.reliability_diagram([0.95, 0.95, 0.55, 0.05], [True, False, True, False])
    axes, counts = figure.axes
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert (heights[9], heights[5], heights[0]) == (50, 100, 0)
    assert np.isnan(heights[3])
    assert [bar.get_height() for bar in counts.patches] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert axes.get_title("left") == "expected calibration error 35.0 %"
    with pytest.raises(LabError, match="one value a prediction"):
        plots_ranks.reliability_diagram([0.5, 0.5], [True])


def test_rank_histogram_counts_queries_and_chance():
    ranks = {"i2t": [1, 1, 3, 60], "t2i": torch.tensor([1, 7, 9, 12, 1000])}
    figure = plots_ranks.rank_histogram(ranks, galleries={"t2i": (1000, 1)})
    axes = figure.axes[0]
    shares = [[bar.get_height() for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(shares[0], [50, 25, 0, 0, 25, 0, 0])
    np.testing.assert_allclose(shares[1], [20, 0, 40, 20, 0, 0, 20])
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["1", "2–5", "6–10", "11–50", "51–100", "101–500", "501–1,000"]
    chance = [segment[0, 1] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(chance, [0.1, 0.4, 0.5, 4, 5, 40, 50])
    with pytest.raises(LabError, match="from 1 on"):
        plots_ranks.rank_histogram({"i2t": [0, 1]})


def test_chance_of_a_rank_with_several_matches_is_exact():
    """Against the product of drawing without replacement."""
    missed = np.prod([(20 - 5 - n) / (20 - n) for n in range(4)])
    assert plots_ranks.chance_of_rank(4, 20, 5) == pytest.approx(1 - missed)
    assert plots_ranks.chance_of_rank(16, 20, 5) == 1.0


def test_recall_by_gallery_size_labels_do_not_overlap():
    curve = {
        "gallery_size": [5000, 100, 1000],
        "recall": [0.3, 0.9, 0.5],
        "low": [0.2] * 3,
        "high": [1.0] * 3,
    }
    published = [(f"system number {n}", 1000 if n < 5 else 5000, 0.3 + 0.005 * n) for n in range(10)]
    figure = plots_ranks.gallery_size_curves({"run": curve}, published, k=5)
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
    boxes = plots_ranks.place_labels(points, sizes, taken, frame)
    nearest = np.clip(points[None], boxes[:, None, :2], boxes[:, None, 2:])
    distances = np.linalg.norm(nearest - points, axis=-1)  # (label, point)
    assert distances.argmin(axis=1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], sizes)
