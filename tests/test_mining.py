"""Mined captions, batches of neighbours, balance; a resumed run goes on with what was mined."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_data import write_coco
from torch import nn

from config import make_config
from core.errors import LabError
from dataset import COCOClipDataset, TrainingSet, make_loader, open_dataset
from retrieval.mining import NONE, best_match, content_words, mine_random, mine_semantic, says_the_same
from sources.table import CaptionTable
from train import RunPlan, build_trainer, fit
from training.order import Balance, evenly_spread, nearest_images, neighbour_order, small_categories


def features(rows: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- which captions ---


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A dog runs through the grass.", "a dog runs through grass", True),
        ("a brown dog is running in the grass", "a dog is running in the grass", True),
        ("a red star left of a blue ring", "a blue ring left of a red star", False),
        ("a red star left of a blue ring", "a blue star left of a red ring", False),
        ("a red star left of a blue ring", "a red star right of a blue ring", False),
        ("dog", "cat", False),
    ],
)
def test_captions_that_say_the_same(one, other, same):
    assert says_the_same(content_words(one), content_words(other)) is same


def semantic_by_hand(images, texts, image_id, text_id, captions, k, margin):
    """The same rule, written out over a full argsort."""
    found = np.full((len(images), k), NONE)
    for image in range(len(images)):
        scores = (texts @ images[image]).numpy()
        own = text_id == image_id[image]
        said = [content_words(c) for c, mine in zip(captions, own, strict=True) if mine]
        place = 0
        for row in np.argsort(-scores):
            if own[row] or scores[row] > margin * scores[own].max() or place == k:
                continue
            if not any(says_the_same(content_words(captions[row]), other) for other in said):
                found[image, place] = row
                said.append(content_words(captions[row]))
                place += 1
    return found


def test_semantic_mining_is_what_a_full_argsort_says():
    images = features(20)
    texts = F.normalize(images.repeat_interleave(2, 0) + 0.5 * features(40, seed=1), dim=1)
    image_id = np.random.default_rng(0).permutation(20) + 100
    text_id = image_id.repeat(2)
    captions = [f"thing number {n // 4} seen near place {n % 3}" for n in range(40)]  # many say the same
    found = mine_semantic(images, texts, image_id, text_id, captions, 3, margin=0.9)
    assert (found == semantic_by_hand(images, texts, image_id, text_id, captions, 3, 0.9)).all()
    assert (text_id[found] != image_id[:, None])[found != NONE].all()
    own = (images @ texts.T)[torch.from_numpy(image_id[:, None] == text_id)].view(20, 2)
    assert torch.allclose(best_match(images, texts, image_id, text_id), own.amax(1))


def test_random_mining_leaves_out_matches_and_follows_its_seed():
    image_id = np.arange(30)
    text_id, captions = image_id.repeat(3), [f"caption of {n} and {n * 7}" for n in range(90)]
    captions[50] = captions[0]
    found = mine_random(image_id, text_id, captions, 4, seed=1, epoch=2)
    assert found.shape == (30, 4)
    assert (found != NONE).all()
    assert (text_id[found] != image_id[:, None]).all()
    assert 50 not in found[0]
    assert all(len(set(rows)) == 4 for rows in found.tolist())
    assert (found == mine_random(image_id, text_id, captions, 4, seed=1, epoch=2)).all()
    assert (found != mine_random(image_id, text_id, captions, 4, seed=1, epoch=3)).any()


# --- batches of neighbours ---


def test_neighbours_meet_and_every_item_comes_once():
    centres = features(10, seed=2)
    images = F.normalize(centres.repeat_interleave(6, 0) + 0.05 * features(60, seed=3), dim=1)
    neighbours = nearest_images(images, 5)
    assert (neighbours // 6 == np.arange(60)[:, None] // 6).all()
    items = np.random.default_rng(0).permutation(60)
    order = neighbour_order(items, neighbours, epoch=1, seed=0)
    assert sorted(order.tolist()) == list(range(60))
    assert (order.reshape(10, 6) // 6 == order.reshape(10, 6)[:, :1] // 6).all()
    assert (neighbour_order(items, neighbours, 1, 0) == order).all()
    twice = neighbour_order(np.array([3, 3, 4, 50, 3]), neighbours, 0, 0)
    assert sorted(twice.tolist()) == [3, 3, 3, 4, 50]


# --- balance ---


def test_categories_come_equally_often():
    categories = np.array(["a"] * 50 + ["b"] * 8 + ["c"] * 3)
    balance = Balance(categories)
    assert (balance.quota, len(balance)) == (8, 24)
    counts = np.zeros(61, dtype=int)
    for epoch in range(40):
        drawn = balance.sample_epoch(epoch, seed=0)
        assert np.unique(categories[drawn], return_counts=True)[1].tolist() == [8, 8, 8]
        counts += np.bincount(drawn, minlength=61)
    assert counts[:50].min() > 0  # a large category brings others each epoch
    assert (counts[50:58] == 40).all()
    assert (balance.sample_epoch(3, 0) == balance.sample_epoch(3, 0)).all()
    assert small_categories(categories, 8) == {"c": 3}
    assert len(Balance(categories, 2)) == 6


def test_evenly_spread_rows():
    assert evenly_spread(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spread(3, None).tolist() == evenly_spread(3, 5).tolist() == [0, 1, 2]


def own_data(folder):
    """A dozen images in two categories and one image alone, as an annotation file."""
    root = write_coco(folder, {"train": 13, "val": 4})
    rows = {}
    for split in ("train", "val"):
        content = json.loads((root / "annotations" / f"captions_{split}2014.json").read_text())
        captions = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        rows[split] = [
            {
                "image_path": f"{split}2014/{image['file_name']}",
                "caption": captions[image["id"]],
                "category": "alone" if place == 12 else ("harbour", "forest")[place % 3 == 0],
            }
            for place, image in enumerate(content["images"])
        ]
    (root / "annotations.json").write_text(json.dumps({"splits": rows}))
    return root


def test_a_balanced_run_leaves_small_categories_out(tmp_path):
    config = make_config(
        "flickr8k", reader="json", data_dir=own_data(tmp_path / "data"), cache_dir=tmp_path, image_size=16, seed=3,
        image_tower_mode="trainable", balance_by="category",
    )  # fmt: skip
    dataset = open_dataset(config, ("train",))
    assert list(dataset.left_out.values()) == ["category 'alone' has 1 training images, fewer than 2"]
    assert len(dataset) == 12
    loader = make_loader(dataset, 5, shuffle=True, seed=3)
    ids = torch.cat([batch["image_id"] for batch in loader])
    assert len(ids) == dataset.items_per_epoch == 12
    names = dataset.table.categories[np.searchsorted(dataset.table.image_ids, ids.numpy())]
    assert sorted(np.unique(names, return_counts=True)[1]) == [6, 6]
    assert len(open_dataset(config, ("train",), evaluation=True)) == 13


# --- the data set ---


class Plain(nn.Module):
    """A model whose features are its inputs, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, image):
        return F.normalize(image, dim=1)

    encode_text = encode_image


def cached_set(images: int = 12) -> TrainingSet:
    ids = np.arange(images) * 3 + 5
    captions = [f"picture {n} told {turn} times over" for n in range(images) for turn in range(2)]
    names = [f"{n}.jpg" for n in range(images)]
    table = CaptionTable(None, ids, names, np.array(["train"] * images), captions, ids.repeat(2))
    pictures = features(images)
    texts = F.normalize(pictures.repeat_interleave(2, 0) + 0.3 * features(2 * images, seed=1), dim=1)
    return TrainingSet("train", config_for(), table=table, images=pictures, text_features=texts)


def config_for(**settings):
    return make_config("flickr8k", batch_size=4, **{"mining": "semantic", "num_mined": 2, **settings})


def test_mined_captions_enter_a_batch_under_their_own_ids():
    dataset, model = cached_set(), Plain().train()
    plain = dataset.__getitems__([0, 4])
    dataset.refresh(model, 0, config_for())
    assert model.training
    assert dataset.seconds > 0
    batch = dataset.__getitems__([0, 4])
    assert torch.equal(batch["image"], plain["image"])
    assert torch.equal(batch["text"][:4], plain["text"])
    extra = batch["text_id"][4:]
    rows = dataset.mined[[0, 4]]
    expected = np.setdiff1d(rows[rows != NONE], [0, 1, 8, 9])
    assert len(extra) == len(expected) > 1
    assert extra.tolist() == dataset.table.caption_image_ids[expected].tolist()
    assert torch.equal(batch["text"][4:], dataset.text_features[torch.from_numpy(expected)])
    everything = dataset.__getitems__(list(range(12)))  # all captions are there: nothing to add
    assert len(everything["text_id"]) == 24


def test_mined_anew_every_n_epochs_and_kept_in_a_checkpoint():
    dataset, config = cached_set(), config_for(mining="random", mining_refresh_epochs=2)
    mined = []
    for epoch in range(4):
        dataset.refresh(Plain(), epoch, config)
        mined.append(dataset.mined.copy())
        assert (dataset.seconds > 0) == (epoch % 2 == 0)
    assert (mined[0] == mined[1]).all()
    assert (mined[1] != mined[2]).any()
    other = cached_set()
    other.load_state_dict(dataset.state_dict())
    assert (other.mined == dataset.mined).all()
    other.refresh(Plain(), 3, config)  # not again: the last refresh was two epochs before the next
    assert (other.mined == dataset.mined).all()
    with pytest.raises(LabError, match="for 12 images, not 5"):
        cached_set(5).load_state_dict(dataset.state_dict())


def test_batches_of_neighbours_through_the_loader():
    dataset = cached_set(24)
    dataset.refresh(Plain(), 0, config_for(mining="none", mining_neighbour_batches=True))
    assert dataset.mined.size == 0
    order = dataset.epoch_order(0, 1)
    assert sorted(order.tolist()) == list(range(24))
    assert (order == dataset.epoch_order(0, 1)).all()
    near, far = (
        np.mean([(dataset.images[a] @ dataset.images[b]).item() for a, b in pairwise(items)])
        for items in (order, np.random.default_rng(0).permutation(24))
    )
    assert near > far + 0.2


# --- whole runs ---


@pytest.fixture
def small(coco, tmp_path):
    """Heads over cached features, with mined captions and batches of neighbours."""
    return make_config(
        "quickstart", data_dir=coco, cache_dir=tmp_path / "cache", runs_dir=tmp_path / "runs", test_splits=("val",),
        image_tower_mode="cached", image_size=32, num_epochs=4, batch_size=8, warmup_steps=2, device="cpu",
        mining="semantic", num_mined=2, mining_neighbour_batches=True, mining_refresh_epochs=2, loss="triplet",
    )  # fmt: skip


def outcome(run):
    return load_file(run.folder / "best.safetensors"), run.history["train_loss"].tolist()


def test_stopped_between_refreshes_it_ends_the_same(small, tmp_path):
    whole = outcome(fit(small.updated(runs_dir=tmp_path / "whole"), show=False))

    class StopAt:
        left = 5  # the second step of the second epoch, which uses the first one's mining

        def is_set(self):
            self.left -= 1
            return self.left == 0

    trainer = build_trainer(RunPlan(small, show=False), "auto")
    trainer.run(StopAt(), None)
    continued = outcome(fit(small, show=False))
    assert whole[1] == continued[1]
    assert all(torch.equal(whole[0][name], continued[0][name]) for name in whole[0])
    seconds = fit(small, show=False).history["mining_seconds"].tolist()
    assert [value > 0 for value in seconds] == [True, False, True, False]


def test_towers_that_are_not_cached_are_mined_through(small):
    config = small.updated(
        image_tower_mode="trainable", text_tower_mode="frozen", num_epochs=1, max_samples=8
    )
    run = fit(config, show=False)
    assert run.history["mining_seconds"].iloc[0] > 0
    assert np.isfinite(run.history["train_loss"].iloc[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mined": 24}, "num_mined is 24 but there are only 23 other training images; lower it"),
        ({"loss": "contrastive", "num_hard_negatives": 8}, "has only 7 others in its batch; lower it"),
        ({"balance_by": "category"}, "balance_by 'category' needs categories, but .* has none"),
        ({"train_splits": ("train", "restval")}, "split 'restval' has no image"),
        ({"freeze_projections": True}, "nothing to train: "),
    ],
)
def test_what_cannot_be_says_so(small, settings, message):
    with pytest.raises(LabError, match=message):
        fit(small.updated(**settings), show=False)


def test_one_category_is_no_balance():
    with pytest.raises(LabError, match="at least two categories, not 1; set balance_by to 'none'"):
        Balance(np.array(["only"] * 5))


def test_plain_settings_give_the_plain_dataset(small):
    assert type(open_dataset(small, ("train",), evaluation=True)) is COCOClipDataset
    assert type(open_dataset(small, ("train",))) is TrainingSet
    assert type(open_dataset(small, ("val",))) is COCOClipDataset
