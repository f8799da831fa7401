"""What the notebooks explain with: predictions, questions, the figures of similarity, temperature and words."""

import json

import numpy as np
import pytest
import torch
from evaluated import config_of, write_home, write_run
from matplotlib.colors import Normalize
from small_data import ROOT

import widgets
from core.errors import LabError
from evaluate import open_gallery
from losses import InfoNCELoss
from plots.features import similarity_matrix, temperature_curves
from towers.features import position_features, text_features, word_contributions
from training.order import evenly_spread
from utils import first_batch, first_batch_features


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    home = write_home(tmp_path_factory.mktemp("lessons"))
    return open_gallery(write_run(config_of(home)), "test", show=False)


# --- predictions ---


def test_a_prediction_is_compared_and_may_be_left_out():
    prediction = widgets.Prediction("Recall@1 of the first epoch?", "%")
    assert prediction.compare(12.0).to_dict("list") == {"measured (%)": [12.0]}
    prediction.input.value = " 8,5 % "
    assert prediction.compare(12.0).iloc[0].tolist() == [8.5, 12.0, 3.5]
    assert "Recall@1 of the first epoch?" in prediction.widget.children[0].value


def test_a_prediction_that_is_no_number_is_named_and_stops_nothing():
    prediction = widgets.Prediction("How much?")
    prediction.input.value = "a lot"
    assert prediction.compare(1.0).iloc[0].tolist() == ["'a lot' is no number", 1.0]


# --- questions ---


@pytest.mark.parametrize("path", sorted((ROOT / "labs/questions").glob("*.json")), ids=lambda path: path.stem)
def test_every_question_has_one_right_answer_and_explains_all(path):
    questions = json.loads(path.read_text(encoding="utf-8"))
    assert 4 <= len(questions) <= 6
    for question in questions:
        assert question["type"] == "multiple_choice"
        assert [answer["correct"] for answer in question["answers"]].count(True) == 1
        assert len(question["answers"]) == 4
        assert all(len(answer["feedback"]) > 10 for answer in question["answers"])


def test_a_quiz_is_shown_and_an_unknown_one_is_refused(capsys):
    widgets.quiz("main")
    with pytest.raises(LabError, match="lab 'mian' does not exist; did you mean 'main'"):
        widgets.quiz("mian")


# --- figures ---


def test_similarities_side_by_side_share_one_scale():
    before, after = torch.zeros(3, 3), torch.eye(3)
    images = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 100, 200)]
    figure = similarity_matrix({"before": before, "after": after}, ["a", "b", "c"], images)
    left, right = figure.axes[:2]
    assert [axes.get_title("left") for axes in (left, right)] == ["before", "after"]
    for axes, values in ((left, before), (right, after)):
        np.testing.assert_array_equal(axes.images[0].get_array(), values.T)
        assert isinstance(axes.images[0].norm, Normalize)
        assert axes.images[0].get_clim() == (0, 1)
    with pytest.raises(
        LabError, match=r"scores of shape \(3, 3\), \(2, 3\) do not fit 3 images and 3 captions"
    ):
        similarity_matrix({"before": before, "after": after[:2]}, ["a", "b", "c"], images)


def test_temperature_curves_are_softmaxes_in_percent():
    cosines = torch.tensor([0.3, 0.9, -0.2])
    axes = temperature_curves(cosines, (1.0, 0.1), match=0).axes[0]
    for line, temperature in zip(axes.lines[::2], (1.0, 0.1), strict=True):
        expected = 100 * (cosines / temperature).softmax(0).sort(descending=True).values
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-5)
    assert axes.lines[1].get_xdata().tolist() == [2]  # the match is second


# --- words and regions ---


def test_positions_and_words_are_scored_by_the_same_model(gallery):
    run, dataset = gallery.run, gallery.dataset
    images = dataset.decoded.gather(dataset.rows[:2])
    positions = position_features(run.model, run.config, images)
    assert positions.shape == (2, 2, 2, 32)
    torch.testing.assert_close(positions.norm(dim=3), torch.ones(2, 2, 2))
    features = gallery.image_features[:3]
    words = "a red star".split()
    loses = word_contributions(run.model, run.config, " ".join(words), features)
    assert len(loses) == 3
    whole, without = (
        text_features(run.model, run.config, [text]) @ features.T for text in ("a red star", "a star")
    )
    assert loses[1] == pytest.approx((whole - without).mean().item(), abs=1e-5)


def test_words_are_explored_in_a_control(gallery):
    control = widgets.word_explorer(gallery, "a red star")
    figure, table = control.result
    assert len(figure.axes) == 9  # four images, their maps, and the scale
    assert table.columns.tolist() == ["a", "red", "star"]
    control.inputs["query"].value = " "
    assert "describe the image" in control.message.value


def test_similarities_before_and_after_training_are_those_of_both_models(gallery):
    figure = widgets.similarity_figure(gallery.run, "test", count=4)
    before, after = (axes.images[0].get_array() for axes in figure.axes[:2])
    items = evenly_spread(20, 4)
    captions = [gallery.dataset.table.captions_of(int(row))[0] for row in gallery.dataset.rows[items]]
    texts = text_features(gallery.run.model, gallery.run.config, captions)
    np.testing.assert_allclose(after, texts @ gallery.image_features[items].T, atol=1e-4)
    assert before.shape == after.shape


def test_the_first_batchs_features_are_those_of_its_loss(gallery):
    config = gallery.run.config
    features = first_batch_features(gallery.run.model, gallery.dataset, config)
    assert features["image_features"].shape == (16, 32)
    loss = first_batch(gallery.run.model, gallery.dataset, config)["first loss"]
    assert InfoNCELoss()(**features).item() == pytest.approx(loss, abs=1e-3)
