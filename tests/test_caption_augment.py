"""Captions vary by seed, epoch and row; flipped pictures and the words left and right stay in step."""

import numpy as np
import pytest
import torch
from small_data import write_coco

from config import make_config
from core.errors import LabError
from dataset import COCOClipDataset, TrainingSet, open_dataset
from training.augment import (
    augment,
    drop_words,
    reorder_clauses,
    speaks_of_sides,
    swap_sides,
    variation_number,
    vary,
)

SIDED = "The dog on the LEFT, a cat to its right. Left-hand side, rightmost."


def test_sides_are_swapped_with_their_case_and_back():
    assert swap_sides(SIDED) == "The dog on the RIGHT, a cat to its left. Right-hand side, leftmost."
    assert swap_sides(swap_sides(SIDED)) == SIDED
    assert not speaks_of_sides("bright cleft, outright")
    assert swap_sides("bright cleft, outright") == "bright cleft, outright"


def test_dropped_words_are_few_and_never_sides():
    rng = np.random.default_rng(0)
    words = " ".join(f"w{n}" for n in range(1000))
    kept = drop_words(words, 0.2, rng).split()
    assert 760 < len(kept) < 840
    assert set(kept) < set(words.split())
    assert drop_words("left of it, right there", 0.999, rng) == "left right"
    assert drop_words("a dog", 0.999, rng) == "a"


def test_clauses_change_places_and_sides_stay():
    rng = np.random.default_rng(1)
    found = {reorder_clauses("a dog runs, it rains; night falls.", rng) for _ in range(60)}
    assert "it rains, night falls, a dog runs." in found
    assert len(found) == 6
    assert reorder_clauses("a dog, a cat to its left", rng) == "a dog, a cat to its left"
    assert reorder_clauses("one clause only.", rng) == "one clause only."


def test_a_variation_is_a_function_of_seed_row_and_number():
    text = "a brown dog runs, a child laughs, it is raining"
    options = {"seed": 3, "word_dropout": 0.3, "reorder": 0.5}
    assert vary(text, 0, 7, **options) == text
    assert vary(text, 1, 7, **options) == vary(text, 1, 7, **options)
    assert len({vary(text, n, row, **options) for n in range(1, 6) for row in range(5)}) > 15
    drawn = [variation_number(row, 4, seed=0, epoch=epoch) for row in range(300) for epoch in range(3)]
    assert np.bincount(drawn).min() > 180


@pytest.fixture
def texts(coco, tmp_path):
    return make_config(
        "quickstart", data_dir=coco, cache_dir=tmp_path / "cache", image_size=32, text_tower_mode="frozen"
    )


def test_a_caption_has_no_more_variations_than_asked(texts):
    settings = {"augment_word_dropout": 0.3, "augment_reorder": 0.5, "max_caption_variations": 3}
    dataset = open_dataset(texts.updated(**settings), ("train",))
    seen = []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        seen.append(dataset.__getitems__([4, 2])["text"])
        assert dataset.__getitems__([2])["text"] == seen[-1][3:]  # whatever the batch
    for caption, variations in zip([*dataset.table.captions_of(4)], zip(*seen, strict=True), strict=False):
        assert 2 <= len(set(variations)) <= 3
        assert caption in variations
    plain = open_dataset(texts.updated(**settings), ("val",))
    assert type(plain) is COCOClipDataset  # validation sees captions as they are


def sided_coco(folder):
    """Pictures of which every other one has a caption that names a side."""
    root = write_coco(folder, {"train": 12, "val": 4})
    path = root / "annotations" / "captions_train2014.json"
    text = path.read_text()
    for number in range(1, 13, 2):
        text = text.replace(f"number {number} of", f"number {number} left of")
    path.write_text(text)
    return root


def test_pictures_that_name_a_side_are_not_flipped(tmp_path):
    config = make_config(
        "quickstart",
        data_dir=sided_coco(tmp_path / "coco"),
        cache_dir=tmp_path,
        image_size=16,
        augment_flip=0.9,
    )
    dataset = open_dataset(config, ("train",))  # captions cached: they are read all the same
    flips = np.zeros(13)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(list(range(12)))
        flips[batch["image_id"].numpy()] += batch["flip"].numpy()
    assert flips[1::2].sum() == 0
    assert flips[2::2].min() > 10


def test_words_are_swapped_for_exactly_the_flipped_pictures(tmp_path):
    root = sided_coco(tmp_path / "coco")
    dataset = TrainingSet(
        data_dir=root, cache_dir=tmp_path, image_size=16, augment_flip=0.5, augment_swap_sides=True, seed=4
    )
    plain = COCOClipDataset(data_dir=root, cache_dir=tmp_path, image_size=16)
    dataset.set_epoch(2)
    batch, before = (each.__getitems__(list(range(12))) for each in (dataset, plain))
    flipped = set(batch["image_id"][batch["flip"]].tolist())
    assert 2 < len(flipped & set(range(1, 13, 2))) < 6
    for text, old, ident in zip(batch["text"], before["text"], batch["text_id"].tolist(), strict=True):
        assert text == (old.replace("left", "right") if ident in flipped else old)
    # The pictures that augmentation flips are those, whether it draws them itself or is told.
    told = augment(batch["image"], batch["image_id"], seed=4, epoch=2, flip=batch["flip"])
    drawn = augment(batch["image"], batch["image_id"], seed=4, epoch=2, flip=0.5)
    assert torch.equal(told, drawn)
    changed = (told != batch["image"]).flatten(1).any(dim=1)
    assert torch.equal(changed, batch["flip"])
    assert torch.equal(told[changed], batch["image"][changed].flip(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"augment_word_dropout": 0.1, "max_caption_variations": 2, "text_tower_mode": "cached"},
            "but the captions are cached",
        ),
        ({"augment_flip": 0.5, "augment_swap_sides": True, "text_tower_mode": "cached"}, "augment_swap_sides changes"),
        ({"augment_reorder": 0.5}, "set max_caption_variations to 2 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_so(texts, settings, message):
    with pytest.raises(LabError, match=message):
        open_dataset(texts.updated(**settings), ("train",))
