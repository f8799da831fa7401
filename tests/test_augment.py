"""Augmentation of images and captions: what each setting does, and that a view depends on its four keys alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from small_data import write_coco

from config import make_config
from core.errors import LabError
from dataset import COCOClipDataset, TrainingSet, open_dataset
from training import augment as module
from training.augment import (
    ERASE_COLOR,
    augment,
    drop_words,
    reorder_clauses,
    speaks_of_sides,
    swap_sides,
    uniforms,
    variation_number,
    vary,
)

SIZE = 40
EVERYTHING = dict(crop_scale=0.3, flip=0.5, jitter=0.4, rotation=20.0, erasing=0.5)
SETTINGS = [{name: value} for name, value in EVERYTHING.items()] + [EVERYTHING]


def noise(count: int, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), as a cache gathers them


def smooth(count: int, size: int = SIZE) -> torch.Tensor:
    """Images without fine detail, which resampling in another way leaves alike."""
    coarse = noise(count, 5).float()
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def view(images, ids=None, *, seed=3, epoch=5, **settings):
    return augment(images, range(len(images)) if ids is None else ids, seed=seed, epoch=epoch, **settings)


# --- random numbers ---


def splitmix64(x: int) -> int:
    """Written out in Python's integers from the reference code of Vigna, splitmix64.c."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first output from seed 0
    for seed, epoch, image_id in ((0, 0, 0), (7, 3, 123_456_789_012), (2**31, 1, -1)):
        state = splitmix64(seed)
        for key in (epoch, image_id):
            state = splitmix64((state + key) % 2**64)
        numbers = uniforms([image_id], seed=seed, epoch=epoch)
        for place, name in enumerate(module.PARAMETERS):
            expected = splitmix64((state + place) % 2**64) >> 11
            assert numbers[name][0] == expected * 2.0**-53


# --- a view depends on its keys alone ---


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_a_view_is_the_same_in_any_batch(settings):
    images, ids = noise(37), torch.arange(37) * 1_000_003
    before = images.clone()
    together = view(images, ids, **settings)
    assert torch.equal(images, before)
    assert together.shape == images.shape
    assert together.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(view(images.clone(), ids, **settings), together)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(view(images[order], ids[order], **settings), together[order])
    alone = [view(images[row : row + 1], ids[row : row + 1], **settings) for row in range(37)]
    assert torch.equal(torch.cat(alone), together)
    planes = images.contiguous(memory_format=torch.contiguous_format)
    assert torch.equal(view(planes, ids, **settings), together)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_seed_epoch_and_id_each_change_the_view(settings):
    images = noise(1).expand(64, -1, -1, -1)
    first = view(images, **settings)
    assert torch.equal(view(images, **settings), first)
    for other in (view(images, seed=4, **settings), view(images, epoch=6, **settings)):
        assert not torch.equal(other, first)
    assert len({image.numpy().tobytes() for image in first}) > 1
    assert torch.equal(*view(images[:2], [9, 9], **settings))


def test_with_everything_off_images_are_unchanged():
    images = noise(20)
    assert torch.equal(view(images), images)
    assert view(images[:0], **EVERYTHING).shape == (0, 3, SIZE, SIZE)


def test_one_setting_does_not_move_the_draws_of_another():
    images = smooth(64)
    flipped = (view(images, flip=0.5) != images).any(dim=(1, 2, 3))
    erased = view(images, erasing=1.0)
    both = view(images, flip=0.5, erasing=1.0)
    assert torch.equal(both[~flipped], erased[~flipped])


# --- geometry ---


def test_flip_mirrors_its_share():
    images = noise(600, 8)
    assert torch.equal(view(images, flip=1.0), images.flip(3))
    result = view(images, flip=0.3)
    flipped = (result == images.flip(3)).all(dim=3).all(dim=2).all(dim=1)
    assert torch.equal(result[~flipped], images[~flipped])
    assert abs(flipped.float().mean() - 0.3) < 0.06  # 3 standard deviations


def ramps(count: int, size: int) -> torch.Tensor:
    """Channel 0 is the column and channel 1 the row that a pixel comes from."""
    place = torch.arange(size, dtype=torch.uint8)
    image = torch.stack(
        [place.expand(size, size), place[:, None].expand(size, size), torch.zeros(size, size)]
    )
    return image.to(torch.uint8).expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)


def test_crops_have_the_areas_ratios_and_places_asked_for():
    size = 100
    result = view(ramps(1000, size), crop_scale=0.25).float()
    left, right = result[:, 0, 0, 0], result[:, 0, 0, -1]
    top, bottom = result[:, 1, 0, 0], result[:, 1, -1, 0]
    width, height = right - left + 1, bottom - top + 1
    area, ratio = width * height / size**2, width / height
    assert area.min() >= 0.25
    assert (ratio.min() > 3 / 4 * 0.96, ratio.max() < 4 / 3 * 1.04) == (True, True)
    assert abs(ratio.log().mean()) < 0.02
    shares = torch.histc(area, bins=3, min=0.25, max=1) / 1000
    assert (shares - 1 / 3).abs().max() < 0.05  # areas are uniform
    for start, extent in ((left, width), (top, height)):
        room = extent < 0.8 * size
        place = (start / (size - extent))[room]
        assert abs(place.mean() - 0.5) < 0.05
        assert (place.min() < 0.05, place.max() > 0.95) == (True, True)


def test_a_crop_is_what_pillow_makes_of_the_same_box():
    images, places = smooth(24), view(ramps(24, SIZE), crop_scale=0.3)
    corners = places[:, :2, [0, -1], [0, -1]].tolist()  # (left, right), (top, bottom) of each box
    for image, result, ((left, right), (top, bottom)) in zip(
        images, view(images, crop_scale=0.3), corners, strict=True
    ):
        crop = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, right + 1, bottom + 1))
        expected = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(result.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_both_ways_of_cropping_agree():
    """Resizing boxes, on CPUs, and sampling a grid, which any rotation needs."""
    images = noise(32)
    for settings, difference in (({"crop_scale": 0.2, "flip": 0.5}, 1), ({"flip": 0.5}, 0)):
        resized, sampled = (view(images, **settings, rotation=angle).int() for angle in (0.0, 1e-9))
        assert (resized - sampled).abs().max() <= difference


def test_rotation_turns_by_the_angle_drawn_and_leaves_no_black_corner():
    images = smooth(24, 64)
    angles = 30.0 * (2 * uniforms(range(24), seed=3, epoch=5)["angle"] - 1)
    results = view(images, rotation=30.0)
    middle = slice(16, 48)  # what no angle turns out of the image
    for image, result, angle in zip(images, results, angles, strict=True):
        turned = Image.fromarray(image.permute(1, 2, 0).numpy()).rotate(angle, Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(turned)).permute(2, 0, 1).int()
        assert (result.int() - expected)[:, middle, middle].abs().max() <= 2
    assert view(torch.full_like(images, 200), rotation=45.0).min() == 200


def test_oblong_images_are_cropped_and_rotated_too():
    images = smooth(8, 64)[:, :, :32]
    for settings in ({"crop_scale": 0.5}, {"rotation": 10.0}, EVERYTHING):
        assert view(images, **settings).shape == (8, 3, 32, 64)
    assert torch.equal(view(images, rotation=1e-6), images)


# --- colour and erasing ---


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_jitter_is_pillows(monkeypatch, name):
    """One of the three at a time, on images whose values no factor drives to the limits."""
    images = (smooth(16).float() * 0.4 + 70).to(torch.uint8)
    numbers = uniforms(range(16), seed=3, epoch=5)
    still = {key: values if key == name else np.full(16, 0.5) for key, values in numbers.items()}
    monkeypatch.setattr(module, "uniforms", lambda ids, **keys: still)
    enhance = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast}
    for image, result, u in zip(images, view(images, jitter=0.3), numbers[name], strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = enhance.get(name, ImageEnhance.Color)(pil).enhance(1 + 0.3 * (2 * u - 1))
        assert np.abs(result.permute(1, 2, 0).numpy() - np.asarray(expected).astype(int)).max() <= 2


def test_strong_jitter_stays_within_the_values_of_a_pixel():
    white, black = (
        torch.full((64, 3, 8, 8), 255, dtype=torch.uint8),
        torch.zeros(64, 3, 8, 8, dtype=torch.uint8),
    )
    result = view(white, jitter=2.0)
    assert result.max() == 255
    assert result.min() == 0  # factors below 0 are taken as 0
    assert view(black, jitter=2.0).max() == 0


def test_erasing_overwrites_one_rectangle_of_its_share():
    images = torch.zeros(800, 3, 50, 50, dtype=torch.uint8)
    result = view(images, erasing=0.4)
    inside = (result == torch.tensor(ERASE_COLOR).view(3, 1, 1)).all(dim=1)  # (B, S, S)
    assert torch.equal(result, inside[:, None] * torch.tensor(ERASE_COLOR, dtype=torch.uint8).view(3, 1, 1))
    erased = inside.any(dim=(1, 2))
    assert abs(erased.float().mean() - 0.4) < 0.055  # 3 standard deviations
    rows, columns = inside.any(dim=2).sum(1), inside.any(dim=1).sum(1)
    assert torch.equal(rows * columns, inside.sum(dim=(1, 2)))  # a full rectangle
    area = (rows * columns)[erased] / 2500
    assert area.min() >= 0.02
    assert area.max() < 0.33 * 1.1  # sides are rounded up


# --- errors ---


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (noise(2).float(), {}, r"not \(2, 3, 40, 40\) float32"),
        (noise(2).permute(0, 2, 3, 1), {}, r"not \(2, 40, 40, 3\) uint8"),
        (noise(2)[0], {}, r"not \(3, 40, 40\) uint8"),
        (noise(2), {"ids": [1, 2, 3]}, "one image id per image, not 3 for 2"),
        (noise(2), {"crop_scale": 0.0}, "crop_scale .* not 0.0"),
    ],
)
def test_wrong_input_is_an_error(images, settings, message):
    with pytest.raises(LabError, match=message):
        view(images, **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_another_device_gives_the_same_views_within_rounding():
    images = smooth(16)
    for settings in ({"crop_scale": 0.3, "flip": 0.5}, EVERYTHING):
        there = view(images.cuda(), **settings).cpu()
        assert (there.int() - view(images, **settings).int()).abs().max() <= 2


# --- captions ---


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


def test_images_that_name_a_side_are_not_flipped(tmp_path):
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


def test_words_are_swapped_for_exactly_the_flipped_images(tmp_path):
    root = sided_coco(tmp_path / "coco")
    config = make_config(augment_flip=0.5, augment_swap_sides=True, seed=4)
    dataset = TrainingSet("train", config, data_dir=root, cache_dir=tmp_path, image_size=16)
    plain = COCOClipDataset(data_dir=root, cache_dir=tmp_path, image_size=16)
    dataset.set_epoch(2)
    batch, before = (each.__getitems__(list(range(12))) for each in (dataset, plain))
    flipped = set(batch["image_id"][batch["flip"]].tolist())
    assert 2 < len(flipped & set(range(1, 13, 2))) < 6
    for text, old, ident in zip(batch["text"], before["text"], batch["text_id"].tolist(), strict=True):
        assert text == (old.replace("left", "right") if ident in flipped else old)
    # The images that augmentation flips are those, whether it draws them itself or is told.
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
