"""Our losses against open_clip's where they coincide, and by hand where several captions match."""

import math

import core.devices  # noqa: F401  before open_clip imports torchvision

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from config import make_config
from losses import build_loss, even_bias
from training.negatives import QueueNegatives

# In float64: sums of fewer than 100 terms below 100, whose order moves them by 100 * 100 * 2.2e-16.
SAME = {"rtol": 0, "atol": 2.2e-12}


def _features(images: int, texts: int, width: int = 8):
    torch.manual_seed(0)
    image = F.normalize(torch.randn(images, width, dtype=torch.float64), dim=1).requires_grad_()
    text = F.normalize(torch.randn(texts, width, dtype=torch.float64), dim=1).requires_grad_()
    return image, text, torch.tensor(12.5, dtype=torch.float64, requires_grad=True)


def _gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", ["infonce", "softmax_infonce", "InfoNCELoss"])
def test_the_softmax_loss_is_clips(name):
    image, text, scale = _features(6, 6)
    ours = build_loss(make_config(loss=name))(image, text, scale)
    theirs = ClipLoss()(image, text, scale)
    assert torch.allclose(ours, theirs, **SAME)
    for mine, other in zip(
        _gradients(ours, image, text, scale), _gradients(theirs, image, text, scale), strict=True
    ):
        assert torch.allclose(mine, other, **SAME)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_infonce"])
def test_the_sigmoid_loss_is_siglips(name):
    image, text, scale = _features(6, 6)
    bias = torch.tensor(-2.5, dtype=torch.float64, requires_grad=True)
    ours = build_loss(make_config(loss=name))(image, text, scale, bias)
    theirs = SigLipLoss()(image, text, scale, bias)
    assert torch.allclose(ours, theirs, **SAME)
    for mine, other in zip(
        _gradients(ours, image, text, scale, bias), _gradients(theirs, image, text, scale, bias), strict=True
    ):
        assert torch.allclose(mine, other, **SAME)


IMAGE_ID, TEXT_ID = [4, 7, 9], [4, 4, 7, 9, 9, 9, -1]


def test_softmax_with_several_captions_by_hand():
    image, text, scale = (part.detach() for part in _features(3, 7))
    ids = {"image_id": torch.tensor(IMAGE_ID), "text_id": torch.tensor(TEXT_ID)}
    logits = (scale * image @ text.T).tolist()
    to_text, to_image = [], []
    for row, ident in enumerate(IMAGE_ID):
        total = math.log(sum(math.exp(x) for x in logits[row]))
        own = [logits[row][column] for column, other in enumerate(TEXT_ID) if other == ident]
        to_text.append(sum(total - x for x in own) / len(own))
    for column, ident in enumerate(TEXT_ID[:-1]):  # the last caption is nobody's: only a negative
        total = math.log(sum(math.exp(logits[row][column]) for row in range(3)))
        to_image.append(total - logits[IMAGE_ID.index(ident)][column])
    expected = (sum(to_text) / 3 + sum(to_image) / 6) / 2
    assert build_loss(make_config(loss="infonce"))(image, text, scale, **ids).item() == pytest.approx(
        expected, abs=1e-5
    )


def test_sigmoid_with_several_captions_by_hand():
    image, text, scale = (part.detach() for part in _features(3, 7))
    ids = {"image_id": torch.tensor(IMAGE_ID), "text_id": torch.tensor(TEXT_ID)}
    bias, expected = -1.5, 0.0
    for row, column in ((r, c) for r in range(3) for c in range(7)):
        logit = float(scale * image[row] @ text[column]) + bias
        sign = 1 if IMAGE_ID[row] == TEXT_ID[column] else -1
        expected += math.log1p(math.exp(-sign * logit)) / 3
    found = build_loss(make_config(loss="sigmoid"))(image, text, scale, torch.tensor(bias), **ids)
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("batch_size", [16, 512, 22_000])
def test_the_starting_bias_is_the_least_loss_of_equal_logits(batch_size):
    def loss(bias: float) -> float:  # of a batch in which every cosine is 0
        return math.log1p(math.exp(-bias)) + (batch_size - 1) * math.log1p(math.exp(bias))

    start = even_bias(batch_size)
    assert loss(start) < min(loss(start - 0.01), loss(start + 0.01))
    assert even_bias(22_000) == pytest.approx(-10, abs=0.01)  # SigLIP's own


def test_a_queued_caption_of_an_image_in_the_batch_stands_aside():
    """Old rows come with id -1; those of the batch's own images must not be among them."""
    queue = QueueNegatives(size=8)
    rows, ids = torch.eye(4, dtype=torch.float64), torch.tensor([1, 2, 3])
    queue.comparisons({"image_features": rows[:2], "text_features": rows[:2]}, ids[:2], ids[:2])
    queue.after_step()
    *_, given = queue.comparisons({"image_features": rows[2:], "text_features": rows[2:]}, ids[1:], ids[1:])
    assert (given["image_id"].tolist(), given["text_id"].tolist()) == ([2, 3], [2, 3, -1])
    assert torch.equal(given["text_features"][2], rows[0])  # image 1's, not image 2's
    loss = build_loss(make_config(loss="queue_infonce"))(**given, logit_scale=torch.tensor(2.0))
    logits = 2 * rows[[2, 3]] @ rows[[2, 3, 0]].T
    to_text = -logits.log_softmax(dim=1).diag().mean()
    to_image = -logits[:, :2].log_softmax(dim=0).diag().mean()
    assert loss.item() == pytest.approx((to_text + to_image).item() / 2, abs=1e-12)
