"""Pairs of pictures: what they show, what they are called, how they are drawn and measured."""

import core.devices  # noqa: F401

import numpy as np
import pytest
import torch
from torch import nn

from config import make_config
from core.errors import LabError
from dataset import PairedPictures, make_loader, open_dataset
from losses import InfoNCELoss, SwapMarginLoss, build_loss
from models import HEADS, HeadOptions
from sources.drawing import write_shapes
from sources.side_by_side import LabeledImages, pair_caption
from training.augment import augment
from utils import augmented, encode_loader, split_metrics

NAMES = ["apple", "aquarium fish", "bee"]


@pytest.fixture(scope="module")
def pictures() -> LabeledImages:
    """18 random pictures of each of three classes, in mixed order."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (54, 3, 32, 32), dtype=np.uint8))
    return LabeledImages(images, rng.permutation(np.repeat(np.arange(3), 18)), NAMES)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A configuration of drawn shapes with captions as texts, so that no tower is needed."""
    root = tmp_path_factory.mktemp("shapes")
    places = {f"{name}_dir": root / name for name in ("cache", "runs")}
    write_shapes(root / "shapes", num_train=20, num_test=4)
    return make_config("paired_small", data_dir=root / "shapes", text_tower_mode="frozen", **places)


def test_a_pair_shows_what_its_caption_says(pictures):
    pairs = PairedPictures(pictures, seed=3)
    batch = next(iter(make_loader(pairs, len(pairs))))
    assert batch["image"].shape == (54, 3, 32, 64)
    assert batch["image"].dtype == torch.uint8
    for item in range(len(pairs)):
        left, right = pairs.pair(item)
        assert torch.equal(batch["image"][item, :, :, :32], pictures.images[left])
        assert torch.equal(batch["image"][item, :, :, 32:], pictures.images[right])
        names = [NAMES[pictures.labels[row]] for row in (left, right)]
        articles = ["a" if name == "bee" else "an" for name in names]
        assert batch["text"][item] == f"a photo of {articles[0]} {names[0]} and {articles[1]} {names[1]}"
    assert torch.equal(batch["image_id"], batch["text_id"])
    assert [pairs.captions[ident] for ident in batch["image_id"].tolist()] == batch["text"]
    assert len(set(pairs.captions)) == len(pairs.caption_match_ids) == 9
    assert torch.equal(pairs[5]["image"], batch["image"][5])


def test_every_picture_stands_left_once_and_never_beside_itself(pictures):
    pairs = PairedPictures(pictures, different_class_prob=0.3)
    drawn = [pairs.pair(item) for item in range(len(pairs))]
    assert sorted(left for left, _ in drawn) == list(range(54))
    assert all(left != right for left, right in drawn)


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_the_share_of_different_classes_is_the_probability(pictures, prob):
    pairs = PairedPictures(pictures, num_pairs=4000, different_class_prob=prob)
    drawn = np.array([pairs.pair(item) for item in range(4000)])
    labels = pictures.labels[drawn]
    assert (labels[:, 0] != labels[:, 1]).mean() == pytest.approx(
        prob, abs=3.5 * (prob * (1 - prob) / 4000) ** 0.5
    )
    seen = np.bincount(drawn[:, 1], minlength=54)  # each picture is as likely on the right as any other
    assert seen.min() > 4000 / 54 * 0.55
    assert seen.max() < 4000 / 54 * 1.45


def test_pairs_are_drawn_anew_each_epoch_by_the_seed_unless_fixed(pictures):
    def drawn(epoch, **settings):
        pairs = PairedPictures(pictures, **settings)
        pairs.set_epoch(epoch)
        return [pairs.pair(item) for item in range(len(pairs))]

    assert drawn(2, seed=1) == drawn(2, seed=1)
    assert drawn(2, seed=1) != drawn(3, seed=1)
    assert drawn(2, seed=1) != drawn(2, seed=2)
    assert drawn(2, fixed=True) == drawn(3, fixed=True) == drawn(0)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, 0, 1], {}, "set different_class_prob to 1"),
        ([0, 0, 0], {}, "set different_class_prob to 0"),
        ([0, 0, 1, 1], {"different_class_prob": 1.5}, "must be between 0 and 1, not 1.5"),
        ([0, 0, 1, 1], {"template": "two pictures"}, "must name {left} and {right}"),
    ],
)
def test_what_makes_no_pairs_is_one_sentence(labels, settings, message):
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(LabError, match=message):
        PairedPictures(LabeledImages(images, np.array(labels), ["cat", "dog"]), **settings)


def test_a_short_epoch_takes_its_turn_through_all_pictures(pictures):
    pairs = PairedPictures(pictures, num_pairs=18)
    lefts = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        lefts += [pairs.pair(item)[0] for item in range(18)]
    assert sorted(lefts) == list(range(54))


def test_cached_captions_are_the_rows_of_their_ids(pictures):
    table = torch.arange(9.0)[:, None].repeat(1, 4)
    batch = PairedPictures(pictures, text_features=table).__getitems__([0, 1, 2])
    assert torch.equal(batch["text"][:, 0].long(), batch["text_id"])


def test_swapped_captions_come_last_under_ids_of_their_own(pictures):
    pairs = PairedPictures(pictures, swapped_captions=True, seed=1)
    batch = pairs.__getitems__(list(range(12)))
    ids, extra = batch["image_id"].tolist(), batch["text_id"].tolist()[12:]
    different = [ident for ident in ids if ident // 3 != ident % 3]
    assert batch["text_id"].tolist()[:12] == ids
    assert extra == [-(ident + 2) for ident in different]
    expected = [pair_caption(NAMES[ident % 3], NAMES[ident // 3]) for ident in different]
    assert batch["text"][12:] == expected
    assert 0 < len(different) < 12


def test_each_half_is_augmented_as_a_picture_of_its_own(pictures):
    pairs = PairedPictures(pictures)
    batch = pairs.__getitems__([3, 7])
    config = make_config("paired_small", augment_rotation=0, augment_flip=1.0, augment_jitter=0)
    flipped = augmented(batch, config, 0)
    left, right = batch["image"].chunk(2, dim=3)
    assert torch.equal(flipped, torch.cat([left.flip(3), right.flip(3)], dim=3))
    config = make_config("paired_small")
    views = augmented(batch, config, 5)
    alone = augment(right[1:], [15], seed=0, epoch=5, flip=0.5, jitter=0.2, rotation=10)
    assert torch.equal(views[1:, :, :, 32:], alone)
    assert not torch.equal(views, augmented(batch, config, 6))
    whole = make_loader(pairs, 54)
    assert len(next(iter(whole))["view_id"].unique()) == 108


def test_splits_open_from_the_configuration_and_share_no_picture(shapes):
    parts = {split: open_dataset(shapes, (split,)) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 180, "val": 20, "test": 40}
    assert [part.fixed for part in parts.values()] == [False, True, True]
    pixels = [{image.numpy().tobytes() for image in part.pictures.images} for part in parts.values()]
    assert sum(map(len, pixels)) == len(set.union(*pixels)) == 240
    other = open_dataset(shapes.updated(seed=3), ("test",))
    assert [other.pair(item) for item in range(40)] == [parts["test"].pair(item) for item in range(40)]
    assert len({part.describe()["sha256"] for part in parts.values()}) == 3
    assert parts["train"].describe() == open_dataset(shapes, ("train",)).describe()


def test_settings_reach_the_pairs(shapes):
    config = shapes.updated(pairs_per_epoch=7, max_samples=40, different_class_prob=1.0, swap_weight=0.5)
    pairs = open_dataset(config, ("train",))
    assert (len(pairs), len(pairs.pictures.images), pairs.swapped_captions) == (7, 40, True)
    ids = pairs.__getitems__(list(range(7)))["image_id"]
    assert (ids // 10 != ids % 10).all()
    assert len(open_dataset(config, ("val",))) == 20
    again = open_dataset(config, ("train",), evaluation=True)
    assert (len(again), again.fixed) == (40, True)
    with pytest.raises(LabError, match="one split at a time"):
        open_dataset(config, ("train", "val"))


class Oracle(nn.Module):
    """Knows the left class and, of the right one, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.table = nn.functional.normalize(torch.eye(3).repeat_interleave(3, 0) + 0.1 * torch.eye(9)[:, :3])

    def encode_text(self, texts):
        return torch.stack([self.table[CAPTIONS.index(text)] for text in texts])

    def forward(self, image, text):
        left = image[:, 0, 0, 0].long()
        features = nn.functional.one_hot(left, 3).float()
        return {"image_features": features, "text_features": self.encode_text(text)}


CAPTIONS = [pair_caption(left, right) for left in NAMES for right in NAMES]


def test_validation_measures_against_all_captions(pictures):
    coded = LabeledImages(
        torch.from_numpy(pictures.labels)[:, None, None, None].expand(-1, 3, 32, 32).byte().contiguous(),
        pictures.labels,
        NAMES,
    )
    pairs = PairedPictures(coded, fixed=True, split="val")
    config = make_config("paired_small", device="cpu")
    model = Oracle()
    features, _ = encode_loader(model, make_loader(pairs, 16), config, show=False)
    found = split_metrics(model, pairs, features, config)
    drawn = np.array([pairs.pair(item) for item in range(54)])
    labels = pictures.labels[drawn]
    scores = np.eye(3)[labels[:, 0]] @ model.table.numpy().T
    own = scores[np.arange(54), labels[:, 0] * 3 + labels[:, 1]]
    assert found["top1"] == pytest.approx(((scores >= own[:, None]).sum(1) == 1).mean())
    assert set(found) == {
        "top1",
        "top1_same",
        "top1_different",
        "swapped",
        "order",
    }  # top10 would be all of them


# --- the margin between a caption and the same caption swapped ---


@pytest.mark.usefixtures("float64")
def test_the_swap_term_is_the_hinge_of_each_ordered_pair():
    torch.manual_seed(0)
    images, texts = (nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (4, 7))
    image_id = torch.tensor([1, 4, 5, 1])  # of three classes: 4 is one class twice
    text_id = torch.tensor([1, 4, 5, 1, -3, -7, -3])
    plain = InfoNCELoss(temperature=0.1)
    loss = SwapMarginLoss(plain, swap_weight=2.0, swap_margin=0.3)
    ids = {"image_id": image_id, "text_id": text_id}
    hinges = [max(0.0, 0.3 - (images[i] @ (texts[own] - texts[other])).item()) for i, own, other in
              ((0, 0, 4), (2, 2, 5), (3, 0, 4))]  # fmt: skip
    expected = plain(images, texts[:4], image_id=image_id, text_id=text_id[:4]) + 2 * np.mean(hinges)
    assert loss(images, texts, **ids).item() == pytest.approx(expected.item(), rel=1e-12)
    few = {"image_id": image_id, "text_id": text_id[:4]}
    assert torch.equal(loss(images, texts[:4], **few), plain(images, texts[:4], **few))
    assert torch.equal(loss(images, texts[:4]), plain(images, texts[:4]))


def test_the_swap_term_pushes_the_right_order_ahead():
    torch.manual_seed(0)
    image = torch.randn(1, 4, requires_grad=True)
    texts = nn.functional.normalize(torch.randn(2, 4), dim=1)
    loss = SwapMarginLoss(InfoNCELoss(), swap_weight=1.0, swap_margin=0.5)
    loss(
        nn.functional.normalize(image), texts, image_id=torch.tensor([1]), text_id=torch.tensor([1, -3])
    ).backward()
    after = nn.functional.normalize(image.detach() - 0.1 * image.grad)
    before = nn.functional.normalize(image.detach())
    assert ((after - before) @ (texts[0] - texts[1])).item() > 0


def test_the_loss_has_a_margin_where_the_configuration_asks_for_it():
    assert isinstance(build_loss(make_config("paired_small", swap_weight=0)), InfoNCELoss)
    loss = build_loss(make_config("paired_small", swap_weight=0.7, swap_margin=0.4))
    assert (loss.weight, loss.margin) == (0.7, 0.4)
    assert isinstance(loss.loss, InfoNCELoss)


def test_the_standardised_head_sees_what_tells_captions_apart():
    torch.manual_seed(0)
    head = HEADS["standardised"](6, 4, HeadOptions())
    texts = 5 + 0.01 * torch.randn(200, 6)
    spread = (texts - texts.mean(dim=0)) / (texts.var(dim=0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(head(texts), head[-1](spread), atol=1e-4)
    for _ in range(200):
        head(texts)
    assert torch.allclose(head.eval()(texts), head[-1](spread), atol=0.02)
    with pytest.raises(LabError, match="standardised"):
        HEADS["standardised"](6, 4, HeadOptions(batch_norm=True))
