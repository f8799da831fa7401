"""Figures of features: geometry against scipy, maps against an SVD, matrices cell by cell."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from figures import overlaps, picture_axes, pictures, texts_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.offsetbox import AnnotationBbox
from scipy.spatial.distance import cdist, pdist

from core.errors import LabError
from plots import features as plots_features
from retrieval import figures as retrieval_figures


def features(seed: int, rows: int, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width)) + 0.3
    return values / np.linalg.norm(values, axis=1, keepdims=True)


# --- geometry ---


def test_geometry_matches_scipy_s_distances():
    images, texts = features(0, 12), features(1, 30)
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
    images, texts = features(0, 3), features(1, 31)
    found = retrieval_figures.feature_geometry(images, texts, range(3), [0] * 31, most=10)
    assert found["text_uniformity"] == retrieval_figures.uniformity(texts[::4])
    assert found["image_uniformity"] == retrieval_figures.uniformity(images)
    assert np.isnan(retrieval_figures.feature_geometry(images[:1], texts, [0], [0] * 31)["image_uniformity"])


def test_geometry_refuses_bad_features():
    with pytest.raises(LabError, match="no image and text share an id"):
        retrieval_figures.alignment(features(0, 2), features(1, 2), [1, -1], [2, -1])
    with pytest.raises(LabError, match="text_features must be finite"):
        retrieval_figures.modality_gap_size(features(0, 2), np.full((2, 8), np.nan))
    with pytest.raises(LabError, match="at least two rows"):
        retrieval_figures.uniformity(features(0, 1))


def test_modality_gap_draws_its_history():
    columns = ("modality_gap", "alignment", "image_uniformity", "text_uniformity")
    table = pd.DataFrame({"epoch": [1, 2], **{name: [0.5 + n, 0.4 + n] for n, name in enumerate(columns)}})
    figure = plots_features.modality_gap(table)
    drawn = [line.get_ydata().tolist() for axes in figure.axes for line in axes.lines]
    assert drawn == [table[name].tolist() for name in columns]
    assert [axes.get_ylabel() for axes in figure.axes] == list(plots_features.GEOMETRY)


# --- similarities and failures ---


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


def test_failures_show_the_rank_of_the_own_picture_first():
    figure = plots_features.failures(
        ["a dog"], pictures(1), [1214], [pictures(3)], [[0.1, 0.5, 0.4, 0.3]], gallery=5000
    )
    symbols = [axes.texts[0].get_text() for axes in picture_axes(figure)]
    assert symbols == ["✓", "✗", "✗", "✗"]
    assert "its own: rank 1,214 of 5,000 · 0.100" in [" ".join(text.split()) for text in texts_of(figure)]


# --- the map of both modalities ---


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


def test_drawn_thumbnails_do_not_overlap_where_the_texts_lie_far_away():
    texts = -1 - features(1, 40)  # they widen the axes
    figure = plots_features.modality_map(features(0, 30), texts, thumbnails=pictures(25, (40, 40)))
    FigureCanvasAgg(figure).draw()
    placed = [artist for artist in figure.axes[0].artists if isinstance(artist, AnnotationBbox)]
    assert len(placed) == 17
    assert overlaps([thumbnail.patch.get_window_extent() for thumbnail in placed]) == []
