"""Losses by hand and against torch's own cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from core.errors import LabError
from core.ids import SWAPPED
from losses import ContrastiveLoss, InfoNCELoss, SigmoidLoss, SwapMarginLoss, TripletLoss, chance_level

# In float64: sums of fewer than 100 terms below 100, whose order moves them by 100 * 100 * 2.2e-16.
SAME = {"rtol": 0, "atol": 2.2e-12}


def features(rows: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unique_ids_give_cross_entropy(smoothing):
    images, texts, scale = features(6), features(6, seed=1), torch.tensor(14.0)
    logits, target = scale * images @ texts.T, torch.arange(6)
    expected = (
        F.cross_entropy(logits, target, label_smoothing=smoothing)
        + F.cross_entropy(logits.T, target, label_smoothing=smoothing)
    ) / 2
    loss = InfoNCELoss(label_smoothing=smoothing)
    ids = torch.arange(6) + 40
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(loss(images, texts, scale, image_id=ids, text_id=ids), expected, **SAME)
    assert torch.allclose(loss(images, texts, scale), expected, **SAME)  # without ids: by position
    shuffled = loss(images, texts[order], scale, image_id=ids, text_id=ids[order])
    assert torch.allclose(shuffled, expected, **SAME)


def test_several_captions_by_hand():
    # One image with two captions, one with one, and a caption of no image.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    logits = images @ texts.T  # [[1, .6, 0, -1], [0, .8, 1, 0]]
    rows = logits.logsumexp(1)
    columns = logits.logsumexp(0)
    to_text = (rows[0] - (1 + 0.6) / 2 + rows[1] - 1) / 2
    to_image = (columns[0] - 1 + columns[1] - 0.6 + columns[2] - 1) / 3
    loss = InfoNCELoss()(
        images, texts, torch.tensor(1.0), image_id=torch.tensor([7, 9]), text_id=torch.tensor([7, 7, 9, -1])
    )
    assert torch.allclose(loss, (to_text + to_image) / 2, **SAME)


def test_minus_one_never_matches_itself():
    ids = torch.tensor([-1, -1])
    assert InfoNCELoss()(features(2), features(2), torch.tensor(1.0), image_id=ids, text_id=ids).item() == 0


def test_own_temperature_counts_only_when_called_bare():
    images, texts = features(4), features(4, seed=1)
    assert torch.allclose(
        InfoNCELoss(0.5)(images, texts), InfoNCELoss(0.07)(images, texts, torch.tensor(2.0))
    )


def test_a_gradient_step_lowers_it():
    images, texts = features(16).requires_grad_(), features(16, seed=1)
    loss = InfoNCELoss()(images, texts)
    (gradient,) = torch.autograd.grad(loss, images)
    assert InfoNCELoss()(images - 0.01 * gradient, texts) < loss


@pytest.mark.parametrize(
    "criterion",
    [InfoNCELoss(), InfoNCELoss(label_smoothing=0.2), SigmoidLoss(), SwapMarginLoss(InfoNCELoss(), 0.7)],
)
def test_a_loss_states_its_value_at_equal_scores(criterion):
    image_id, text_id = torch.arange(5), torch.arange(5).repeat_interleave(3)
    text_id = torch.cat([text_id, SWAPPED - image_id])
    nothing = torch.zeros(5, 4), torch.zeros(20, 4)
    bias = torch.tensor(-1.5)
    loss = criterion(*nothing, torch.tensor(3.0), bias, image_id=image_id, text_id=text_id)
    assert chance_level(criterion, image_id, text_id, bias) == pytest.approx(loss.item(), rel=1e-5)
    assert chance_level(InfoNCELoss(), image_id, text_id) == pytest.approx((math.log(5) + math.log(20)) / 2)


@pytest.mark.parametrize(
    "criterion",
    [TripletLoss(), ContrastiveLoss(), InfoNCELoss(focal_gamma=1.0), SwapMarginLoss(TripletLoss())],
)
def test_a_loss_without_a_chance_level_has_none(criterion):
    assert chance_level(criterion, torch.arange(5), torch.arange(5)) is None


def test_lengths_that_do_not_fit_say_so():
    with pytest.raises(LabError, match="2 images and 3 texts need image_id"):
        InfoNCELoss()(features(2), features(3))
    with pytest.raises(LabError, match="one id per row"):
        InfoNCELoss()(features(2), features(3), image_id=torch.arange(2), text_id=torch.arange(2))
