"""Augmentation: what each setting does, and that a view depends on its four keys alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from core.errors import LabError
from training import augment as module
from training.augment import ERASE_COLOR, augment, uniforms

SIZE = 40
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
EVERYTHING = dict(crop_scale=0.3, flip=0.5, jitter=0.4, rotation=20.0, erasing=0.5)
SETTINGS = [{name: value} for name, value in EVERYTHING.items()] + [EVERYTHING, {**EVERYTHING, **IMAGENET}]


def noise(count: int, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), as a cache gathers them


def smooth(count: int, size: int = SIZE) -> torch.Tensor:
    """Pictures without fine detail, which resampling in another way leaves alike."""
    coarse = noise(count, 5).float()
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def view(images, ids=None, *, seed=3, epoch=5, **settings):
    return augment(images, range(len(images)) if ids is None else ids, seed=seed, epoch=epoch, **settings)


# --- random numbers --------------------------------------------------------------------------------


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


def test_numbers_are_uniform_and_unrelated():
    numbers = np.concatenate(
        [np.stack(list(uniforms(range(5000), seed=s, epoch=e).values())) for s, e in ((0, 0), (0, 1), (1, 0))]
    )  # (3 * parameters, ids)
    deciles = np.stack([np.histogram(row, bins=10, range=(0, 1))[0] for row in numbers])
    assert (((deciles - 500) ** 2 / 500).sum(axis=1) < 33).all()  # chi-square of 9 degrees, p = 1e-4
    related = np.corrcoef(numbers) - np.eye(len(numbers))
    assert np.abs(related).max() < 0.07  # 5 standard deviations
    successive = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in numbers]
    assert np.abs(successive).max() < 0.07


# --- a view depends on its keys alone --------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_a_view_is_the_same_in_any_batch(settings):
    images, ids = noise(37), torch.arange(37) * 1_000_003
    together = view(images, ids, **settings)
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
    assert len({picture.numpy().tobytes() for picture in first}) > 1
    assert torch.equal(*view(images[:2], [9, 9], **settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_the_batch_given_is_not_changed(settings):
    images = noise(20)
    before = images.clone()
    result = view(images, **settings)
    assert torch.equal(images, before)
    assert result.shape == images.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == (torch.float32 if "mean" in settings else torch.uint8)


def test_views_are_made_in_inference_mode_too():
    images = noise(40)
    with torch.inference_mode():
        result = view(images.clone(), **EVERYTHING, **IMAGENET)
    assert torch.equal(result, view(images, **EVERYTHING, **IMAGENET))


def test_with_everything_off_pictures_are_unchanged():
    images = noise(20)
    assert torch.equal(view(images), images)
    assert view(images[:0], **EVERYTHING).shape == (0, 3, SIZE, SIZE)


def test_one_setting_does_not_move_the_draws_of_another():
    images = smooth(64)
    flipped = (view(images, flip=0.5) != images).any(dim=(1, 2, 3))
    erased = view(images, erasing=1.0)
    both = view(images, flip=0.5, erasing=1.0)
    assert torch.equal(both[~flipped], erased[~flipped])


# --- geometry --------------------------------------------------------------------------------------


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
    picture = torch.stack(
        [place.expand(size, size), place[:, None].expand(size, size), torch.zeros(size, size)]
    )
    return picture.to(torch.uint8).expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)


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
    images = smooth(24)
    area = 1 - uniforms(range(24), seed=3, epoch=5)["crop_area"] * 0.7
    numbers = uniforms(range(24), seed=3, epoch=5)
    place = numbers["crop_left"], numbers["crop_top"]
    boxes = module._boxes(
        area, module.CROP_RATIO, numbers["crop_ratio"], place, torch.Size((24, SIZE, SIZE, 3))
    )
    for picture, result, (left, top, w, h) in zip(
        images, view(images, crop_scale=0.3), boxes.tolist(), strict=True
    ):
        crop = Image.fromarray(picture.permute(1, 2, 0).numpy()).crop((left, top, left + w, top + h))
        expected = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(result.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_both_ways_of_cropping_agree():
    """Resizing boxes in uint8, on CPUs, and sampling a grid, everywhere else."""
    pixels = noise(32).permute(0, 2, 3, 1)
    numbers = uniforms(range(32), seed=0, epoch=0)
    place = numbers["crop_left"], numbers["crop_top"]
    boxes = module._boxes(1 - 0.8 * numbers["crop_area"], 4 / 3, numbers["crop_ratio"], place, pixels.shape)
    flips = numbers["flip"] < 0.5
    resized = module._resize_boxes(pixels, boxes, flips)
    sampled = module._sample(pixels, boxes, flips, np.zeros(32))
    assert (resized.int() - sampled.int()).abs().max() <= 1
    whole = np.tile([0, 0, SIZE, SIZE], (32, 1))
    assert torch.equal(
        module._sample(pixels, whole, flips, np.zeros(32)), module._resize_boxes(pixels, whole, flips)
    )


def test_rotation_turns_by_the_angle_drawn_and_leaves_no_black_corner():
    images = smooth(24, 64)
    angles = 30.0 * (2 * uniforms(range(24), seed=3, epoch=5)["angle"] - 1)
    results = view(images, rotation=30.0)
    middle = slice(16, 48)  # what no angle turns out of the picture
    for picture, result, angle in zip(images, results, angles, strict=True):
        turned = Image.fromarray(picture.permute(1, 2, 0).numpy()).rotate(angle, Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(turned)).permute(2, 0, 1).int()
        assert (result.int() - expected)[:, middle, middle].abs().max() <= 2
    assert view(torch.full_like(images, 200), rotation=45.0).min() == 200


def test_oblong_pictures_are_cropped_and_rotated_too():
    images = smooth(8, 64)[:, :, :32]
    for settings in ({"crop_scale": 0.5}, {"rotation": 10.0}, EVERYTHING):
        assert view(images, **settings).shape == (8, 3, 32, 64)
    assert torch.equal(view(images, rotation=1e-6), images)


# --- colour and erasing ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_jitter_is_pillows(monkeypatch, name):
    """One of the three at a time, on pictures whose values no factor drives to the limits."""
    images = (smooth(16).float() * 0.4 + 70).to(torch.uint8)
    numbers = uniforms(range(16), seed=3, epoch=5)
    still = {key: values if key == name else np.full(16, 0.5) for key, values in numbers.items()}
    monkeypatch.setattr(module, "uniforms", lambda ids, **keys: still)
    enhance = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast}
    for picture, result, u in zip(images, view(images, jitter=0.3), numbers[name], strict=True):
        pil = Image.fromarray(picture.permute(1, 2, 0).numpy())
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


# --- normalisation and errors ----------------------------------------------------------------------


def test_normalised_floats_are_the_formula():
    images = noise(20)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET.values())
    expected = (images / 255 - mean) / std
    result = view(images, **IMAGENET)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)
    views = view(images, **EVERYTHING)
    torch.testing.assert_close(view(images, **EVERYTHING, **IMAGENET), view(views, **IMAGENET))


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (noise(2).float(), {}, r"not \(2, 3, 40, 40\) float32"),
        (noise(2).permute(0, 2, 3, 1), {}, r"not \(2, 40, 40, 3\) uint8"),
        (noise(2)[0], {}, r"not \(3, 40, 40\) uint8"),
        (noise(2), {"ids": [1, 2, 3]}, "one image id per image, not 3 for 2"),
        (noise(2), {"crop_scale": 0.0}, "crop_scale .* not 0.0"),
        (noise(2), {"mean": (0.5, 0.5, 0.5)}, "mean and std"),
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
