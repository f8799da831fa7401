"""Losses against open_clip's, pytorch-metric-learning's and torch's own, and by hand where several captions match."""

import math

import core.devices  # noqa: F401  before open_clip imports torchvision

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from config import Config, make_config
from core.errors import LabError
from core.ids import SWAPPED
from losses import (
    ContrastiveLoss,
    InfoNCELoss,
    LabelledLoss,
    SigmoidLoss,
    SwapMarginLoss,
    TripletLoss,
    build_loss,
    chance_level,
    even_bias,
)

# In float64: sums of fewer than 100 terms below 100, whose order changes them by less than 100 * 100 * 2.2e-16.
SAME = {"rtol": 0, "atol": 2.2e-12}

# Two images, the first with two captions; the last caption is a negative only.
IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
TEXTS = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.28, 0.96], [0.96, 0.28]], dtype=torch.float64)
IDS = {"image_id": torch.tensor([7, 9]), "text_id": torch.tensor([7, 7, 9, -1])}
# cosines, images by texts: [[.8, .6, .28, .96], [.6, .8, .96, .28]]


def features(rows: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


# --- InfoNCE and sigmoid ---


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


@pytest.mark.parametrize(
    ("name", "bias", "theirs"),
    [("infonce", None, ClipLoss()), ("InfoNCELoss", None, ClipLoss()), ("sigmoid", -2.5, SigLipLoss()),
     ("sigmoid_infonce", -2.5, SigLipLoss())],
)  # fmt: skip
def test_values_and_gradients_equal_open_clips(name, bias, theirs):
    inputs = [features(6).requires_grad_(), features(6, seed=1).requires_grad_()]
    inputs += [
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (12.5, bias) if x is not None
    ]
    ours, expected = build_loss(make_config(loss=name))(*inputs), theirs(*inputs)
    torch.testing.assert_close(ours, expected, **SAME)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, **SAME)


def test_several_captions_by_hand():
    logits = 3 * IMAGES @ TEXTS.T
    rows, columns = logits.logsumexp(1), logits.logsumexp(0)
    to_text = (rows[0] - (logits[0, 0] + logits[0, 1]) / 2 + rows[1] - logits[1, 2]) / 2
    own = torch.stack([logits[0, 0], logits[0, 1], logits[1, 2]])  # the last caption is only a negative
    to_image = (columns[:3] - own).mean()
    scale = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(InfoNCELoss()(IMAGES, TEXTS, scale, **IDS), (to_text + to_image) / 2, **SAME)
    signs = torch.tensor([[1, 1, -1, -1], [-1, -1, 1, -1]])
    expected = torch.log1p(torch.exp(-signs * (logits - 1.5))).sum() / 2
    torch.testing.assert_close(
        SigmoidLoss()(IMAGES, TEXTS, scale, torch.tensor(-1.5), **IDS), expected, **SAME
    )


def test_minus_one_never_matches_itself():
    ids = torch.tensor([-1, -1])
    assert InfoNCELoss()(features(2), features(2), torch.tensor(1.0), image_id=ids, text_id=ids).item() == 0


def test_own_temperature_counts_only_when_called_bare():
    images, texts = features(4), features(4, seed=1)
    assert torch.allclose(
        InfoNCELoss(0.5)(images, texts), InfoNCELoss(0.07)(images, texts, torch.tensor(2.0))
    )


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


@pytest.mark.parametrize("batch_size", [16, 512, 22_000])
def test_the_starting_bias_is_the_least_loss_of_equal_logits(batch_size):
    def loss(bias: float) -> float:  # of a batch in which every cosine is 0
        return math.log1p(math.exp(-bias)) + (batch_size - 1) * math.log1p(math.exp(bias))

    start = even_bias(batch_size)
    assert loss(start) < min(loss(start - 0.01), loss(start + 0.01))
    assert even_bias(22_000) == pytest.approx(-10, abs=0.01)  # SigLIP's own


def test_documented_loss_names_are_understood():
    for name in ("infonce", "InfoNCELoss", "info_nce", "softmax_infonce", "queue_infonce"):
        assert isinstance(build_loss(Config(loss=name)), InfoNCELoss)
    with pytest.raises(LabError, match="loss 'infonec' does not exist; did you mean 'infonce'"):
        Config(loss="infonec")


def two_sided(images, texts, scale, term):
    logits = scale * images @ texts.T
    return (term(logits) + term(logits.T)) / 2


def test_label_smoothing_by_hand():
    images, texts, share = features(5), features(5, seed=1), 0.2

    def term(logits):
        target = (1 - share) * torch.eye(5, dtype=torch.float64) + share / 5
        return -(target * logits.log_softmax(1)).sum(1).mean()

    loss = InfoNCELoss(label_smoothing=share)(images, texts, torch.tensor(9.0))
    assert torch.allclose(loss, two_sided(images, texts, 9.0, term), **SAME)


def test_focal_weights_by_hand():
    images, texts, gamma = features(5), features(5, seed=1), 2.0

    def term(logits):
        own = logits.softmax(1).diagonal()
        return ((1 - own) ** gamma * -own.log()).mean()

    loss = InfoNCELoss(focal_gamma=gamma)(images, texts, torch.tensor(9.0))
    assert torch.allclose(loss, two_sided(images, texts, 9.0, term), **SAME)


# --- margins, and a loss over labels ---


def test_contrastive_by_hand():
    pull = ((1 - 0.8) + (1 - 0.6) + (1 - 0.96)) / 3  # the same matches both ways
    one = [max(0, s - 0.5) for s in (0.96, 0.8)], [max(0, s - 0.5) for s in (0.6, 0.8, 0.28)]
    loss = ContrastiveLoss(margin=0.5, num_hard_negatives=1)(IMAGES, TEXTS, **IDS)
    expected = pull + (sum(one[0]) / 2 + sum(one[1]) / 3) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    two = [0.96, 0.28, 0.8, 0.6]  # the text's side has one wrong image alone, however many are asked
    loss = ContrastiveLoss(margin=0.5, num_hard_negatives=2)(IMAGES, TEXTS, **IDS)
    expected = pull + (sum(max(0, s - 0.5) for s in two) / 4 + sum(one[1]) / 3) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("mining", "to_text", "to_image"),
    [
        # image 7: own .8 and .6, wrong .28 and .96; image 9: own .96, wrong .6, .8, .28
        ("hardest", [0.96 - 0.8, 0.96 - 0.6, 0.8 - 0.96], [0.6 - 0.8, 0.8 - 0.6, 0.28 - 0.96]),
        ("semi_hard", [0.28 - 0.8, 0.28 - 0.6, 0.8 - 0.96], [0.6 - 0.8, 0.8 - 0.6, 0.28 - 0.96]),
    ],
)
def test_triplet_by_hand(mining, to_text, to_image):
    loss = TripletLoss(margin=0.5, triplet_mining=mining)(IMAGES, TEXTS, **IDS)
    sides = [sum(max(0, 0.5 + gap) for gap in gaps) / len(gaps) for gaps in (to_text, to_image)]
    assert loss.item() == pytest.approx(sum(sides) / 2, abs=1e-12)


def test_triplet_warms_up_with_the_mean():
    loss = TripletLoss(margin=0.5, triplet_warmup_epochs=2)
    hard = TripletLoss(margin=0.5)(IMAGES, TEXTS, **IDS)
    mean = TripletLoss(margin=0.5, triplet_mining="mean")(IMAGES, TEXTS, **IDS)
    assert mean < hard
    for epoch, expected in ((0, mean), (1, mean), (2, hard)):
        loss.set_epoch(epoch)
        assert torch.equal(loss(IMAGES, TEXTS, **IDS), expected)


def triplets(matches: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every (query, match, negative) of (Q, G) matches."""
    query, match = matches.nonzero(as_tuple=True)
    row, negative = (~matches[query]).nonzero(as_tuple=True)
    return query[row], match[row], negative


def test_against_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="no pytorch-metric-learning here")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.reducers import MeanReducer

    common = {"distance": CosineSimilarity(), "reducer": MeanReducer()}
    ids = {"image_id": torch.arange(6), "text_id": torch.arange(6).repeat_interleave(2)}
    images, texts = features(6), features(12, seed=1)
    matches = ids["image_id"][:, None] == ids["text_id"]
    sides = ((images, texts, matches), (texts, images, matches.T))
    theirs = losses.TripletMarginLoss(margin=0.3, **common)
    expected = sum(theirs(q, indices_tuple=triplets(m), ref_emb=g, ref_labels=None) for q, g, m in sides) / 2
    ours = TripletLoss(margin=0.3, triplet_mining="mean")(images, texts, **ids)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-12)
    theirs = losses.ContrastiveLoss(pos_margin=1, neg_margin=1 - 0.9, **common)
    expected = sum(
        theirs(q, indices_tuple=(*m.nonzero(as_tuple=True), *(~m).nonzero(as_tuple=True)), ref_emb=g)
        for q, g, m in sides
    )
    ours = ContrastiveLoss(margin=0.9, num_hard_negatives=100)(images, texts, **ids)
    assert ours.item() == pytest.approx(expected.item() / 2, abs=1e-12)


@pytest.mark.parametrize("loss", [ContrastiveLoss(), TripletLoss(), TripletLoss(triplet_mining="semi_hard")])
def test_symmetric_by_ids_and_finite_where_nothing_is_there(loss):
    ids = torch.tensor([3, 1, 4])
    images, texts = features(3), features(3, seed=1)
    value = loss(images, texts, image_id=ids, text_id=ids)
    assert value == pytest.approx(loss(texts, images, image_id=ids, text_id=ids).item())
    assert value == pytest.approx(loss(images, texts).item())
    turned = torch.tensor([2, 0, 1])
    assert value == pytest.approx(loss(images, texts[turned], image_id=ids, text_id=ids[turned]).item())
    alone = images[:1].requires_grad_()
    assert loss(alone, texts, image_id=ids[:1], text_id=torch.tensor([-1, -5, 8])).item() == 0
    only = loss(alone, texts[:1], image_id=ids[:1], text_id=ids[:1])  # a match and no negative
    only.backward()
    assert torch.isfinite(alone.grad).all()


@pytest.mark.parametrize(
    "loss", [InfoNCELoss(), ContrastiveLoss(margin=1.2), TripletLoss(), TripletLoss(0.5, "semi_hard")]
)
def test_a_gradient_step_lowers_it(loss):
    images, texts = features(16).requires_grad_(), features(16, seed=1)
    value = loss(images, texts)
    (gradient,) = torch.autograd.grad(value, images)
    assert loss(images - 0.05 * gradient, texts) < value


def test_built_by_configuration():
    loss = build_loss(make_config(loss="contrastive", margin=0.7, num_hard_negatives=9))
    assert (loss.margin, loss.num_hard_negatives) == (0.7, 9)
    assert build_loss(make_config(loss="triplet", triplet_warmup_epochs=4)).warmup == 4
    with pytest.raises(LabError, match="triplet_mining 'hard' does not exist; did you mean"):
        TripletLoss(triplet_mining="hard")


def test_a_loss_over_labels_gets_the_ids():
    seen = []

    def documented(image_features, text_features, labels):
        seen.append(labels.tolist())
        return (image_features - text_features).square().sum()

    loss = LabelledLoss(documented)
    images, texts = features(3), features(3, seed=1)
    value = loss(
        images, texts, torch.tensor(9.0), image_id=torch.tensor([5, 8, 6]), text_id=torch.tensor([5, 8, 6])
    )
    assert torch.allclose(value, (images - texts).square().sum())
    loss(images, texts)
    assert seen == [[5, 8, 6], [0, 1, 2]]
    with pytest.raises(LabError, match="one caption per image, not 4 for 2; set captions_per_image to 1"):
        loss(IMAGES, TEXTS, **IDS)
