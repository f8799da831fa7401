"""Class folders of small generated pictures: one coloured shape each, in sizes, surfaces, tilts and places."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from tqdm.auto import tqdm

from errors import LabError
from scene_pictures import draw
from scene_plan import BACKGROUNDS, SURFACES, TINTS, Scene, SceneObject

COLOURS = ("red", "blue")
SHAPES = ("circle", "square", "triangle", "star", "heart")
CLASSES = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
"""Colour and shape of each class: neither alone tells one from all others."""
RADII = (0.24, 0.36)  # fractions of the side, so that 32 pixels show which shape it is
GENERATOR_VERSION = 1  # raise it whenever the same settings would give other pictures


def sample_scene(colour: str, shape: str, rng: random.Random) -> Scene:
    """A scene of one object of this colour and shape."""
    radius = rng.uniform(*RADII)
    x, y = (rng.uniform(radius + 0.04, 0.96 - radius) for _ in "xy")
    thing = SceneObject(shape, colour, "large", rng.choice(SURFACES), x, y, radius, rng.uniform(-12, 12))
    return Scene(rng.choice(BACKGROUNDS), rng.choice(TINTS), (thing,))


def write_shapes(
    folder: str | Path,
    *,
    num_train: int = 220,
    num_test: int = 60,
    image_size: int = 32,
    seed: int = 0,
) -> Path:
    """Write `{train,test}/{colour}_{shape}/{number}.png` of the ten classes; a finished set is left as it is.

    Args:
        folder: where to; it appears whole or not at all.
        num_train, num_test: pictures of each class.
        image_size: side in pixels.
        seed: decides everything.
    Returns: the folder.
    Raises: LabError if the folder holds something else or another set.
    """
    folder = Path(folder)
    settings = dict(num_train=num_train, num_test=num_test, image_size=image_size, seed=seed)
    settings["generator_version"] = GENERATOR_VERSION
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_same(folder, settings)
        return folder
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    counts = {"train": num_train, "test": num_test}
    with tqdm(total=len(CLASSES) * sum(counts.values()), desc="drawing shapes", unit="picture") as bar:
        for split, count in counts.items():
            for colour, shape in CLASSES:
                place = beside / split / f"{colour}_{shape}"
                place.mkdir(parents=True)
                for number in range(count):
                    rng = random.Random(f"{seed}/{split}/{colour} {shape}/{number}")
                    picture = draw(sample_scene(colour, shape, rng), rng, image_size)
                    picture.save(place / f"{number:04d}.png")
                    bar.update()
    (beside / "shapes.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    if folder.exists():
        folder.rmdir()  # empty, or it would have been checked
    os.replace(beside, folder)
    return folder


def _check_same(folder: Path, settings: dict[str, int]) -> None:
    """Raises: LabError if the folder holds anything but the set of these settings."""
    marker = folder / "shapes.json"
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None
    if found != settings:
        what = (
            "was not made by write_shapes" if found is None else f"holds shapes of other settings ({found})"
        )
        raise LabError(f"{folder} {what}; choose another folder or delete it.")
