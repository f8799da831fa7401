"""Generated scenes: captioned images of colored shapes, written to disk in COCO 2014's layout.

A scene is a symbolic description first; image and captions are made from it, so what is true of an image is known
exactly. Everything is a function of (seed, split, index).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm

from core.errors import LabError
from core.files import read_json, write_errors, write_json, write_text
from core.processes import in_processes
from sources.scenes import (
    BACKGROUNDS,
    HOLES,
    OUTLINES,
    PAINTS,
    SPLITS,
    SURFACES,
    TINT_PAINTS,
    TINTS,
    Colour,
    Scene,
    SceneObject,
    describe,
    plan_split,
)

# --- Images ---


_OVERSAMPLING = 4


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (round(c + (o - c) * share) for c, o in zip(colour, other, strict=True))
    return r, g, b


def _draw_stripes(
    pen: ImageDraw.ImageDraw, side: int, period: float, fill: Colour, rng: random.Random
) -> None:
    turn = math.radians(rng.choice((0, 45, 90, 135)) + rng.uniform(-8, 8))
    ux, uy, middle = math.cos(turn), math.sin(turn), side / 2
    steps = int(side / period) + 1
    shift = rng.uniform(0, period)
    for k in range(-steps, steps + 1):
        x, y = middle + ux * (k * period + shift), middle + uy * (k * period + shift)
        ends = [(x - uy * side, y + ux * side), (x + uy * side, y - ux * side)]
        pen.line(ends, fill=fill, width=round(0.42 * period))


def _draw_dots(pen: ImageDraw.ImageDraw, side: int, period: float, fill: Colour, rng: random.Random) -> None:
    shift_x, shift_y = rng.uniform(0, period), rng.uniform(0, period)
    row = period * 0.87  # hexagonal packing
    for j in range(-1, int(side / row) + 2):
        for i in range(-1, int(side / period) + 2):
            x, y = i * period + shift_x + (j % 2) * period / 2, j * row + shift_y
            r = 0.29 * period
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


_SURFACE_PENS = {"striped": _draw_stripes, "dotted": _draw_dots}


def _draw_object(canvas: Image.Image, thing: SceneObject, rng: random.Random) -> None:
    side = canvas.width
    radius = thing.radius * side
    half = math.ceil(radius) + 3
    left, top = int(thing.x * side) - half, int(thing.y * side) - half
    n, k = 2 * half + 1, _OVERSAMPLING
    c, s = (f(math.radians(thing.angle)) * (radius * k) for f in (math.cos, math.sin))
    x, y = (thing.x * side - left) * k, (thing.y * side - top) * k
    colour = _mix(PAINTS[thing.colour], (rng.randrange(256),) * 3, 0.05)
    paint, mask = Image.new("RGB", (n * k, n * k), colour), Image.new("L", (n * k, n * k))
    pen, cutter = ImageDraw.Draw(paint), ImageDraw.Draw(mask)
    if thing.surface in _SURFACE_PENS:
        period = max(0.056, 0.37 * thing.radius) * side * k
        _SURFACE_PENS[thing.surface](pen, n * k, period, _mix(colour, (255, 255, 255), 0.78), rng)
    edge = _mix(colour, (0, 0, 0), 0.38)
    for outline, inside in ((OUTLINES[thing.shape], 255), (HOLES.get(thing.shape), 0)):
        if outline:
            points = [(x + c * px - s * py, y + s * px + c * py) for px, py in outline]
            cutter.polygon(points, fill=inside)
            pen.line([*points, *points[:2]], fill=edge, width=round(k * side * 0.024), joint="curve")
    small = mask.reduce(k)
    shadow = small.filter(ImageFilter.BoxBlur(side * 0.012)).point([v // 4 for v in range(256)])
    canvas.paste((50, 50, 70), (left + round(side * 0.01), top + round(side * 0.018)), shadow)
    canvas.paste(paint.reduce(k), (left, top), small)


def _field(kind: str, side: int, rng: random.Random) -> np.ndarray:
    """(side, side) darkness in [0, 1] of a background."""
    y, x = np.mgrid[0:side, 0:side] / side
    if kind == "gradient":
        turn = rng.uniform(0, 2 * math.pi)
        along = (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)
        return along / 1.2 + 0.4
    if kind == "cloudy":
        coarse = bytes(rng.randrange(256) for _ in range(36))
        return (
            np.asarray(Image.frombytes("L", (6, 6), coarse).resize((side, side), Image.Resampling.BICUBIC))
            / 300
        )
    step, shift = rng.uniform(0.1, 0.14), rng.random()
    if kind == "grid":
        lines = np.minimum((x / step + shift) % 1, (y / step + shift) % 1) * step * side
        return 0.75 * np.clip(1.6 - lines, 0, 1)
    if kind == "checked":
        return 0.42 * ((np.floor(x / step + shift) + np.floor(y / step + shift)) % 2)
    return np.zeros((side, side))


def render(scene: Scene, rng: random.Random, image_size: int = 112) -> Image.Image:
    """The image of a scene, RGB of (image_size, image_size), anti-aliased.

    Args:
        scene: what to draw.
        rng: decides what no caption mentions: shades, where stripes begin, the shape of the clouds.
        image_size: side in pixels.
    """
    light = np.array(TINT_PAINTS[scene.tint], dtype=np.float32)
    dark = light * 0.8
    field = _field(scene.background, image_size, rng)[..., None].astype(np.float32)
    pixels = light + (dark - light) * field  # (side, side, 3)
    canvas = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    for thing in scene.objects:
        _draw_object(canvas, thing, rng)
    return canvas


# --- Data sets of scenes ---


GENERATOR_VERSION = 1  # raise it whenever the same settings would give other bytes
IDS_PER_SPLIT = 1_000_000  # image `index` of the n-th split, from 1, has the id n * IDS_PER_SPLIT + index


def image_ids(split: str, count: int) -> range:
    """The ids of a split's images; no two splits share one."""
    start = (SPLITS.index(split) + 1) * IDS_PER_SPLIT
    return range(start, start + count)


def _file_name(split: str, image_id: int) -> str:
    return f"COCO_{split}2014_{image_id:012d}.jpg"


def _annotations(split: str, scenes: list[Scene], seed: int, side: int) -> dict[str, Any]:
    """The content of the split's annotation files by kind."""
    ids = image_ids(split, len(scenes))
    head = {
        "info": {
            "description": "Generated scenes of coloured shapes, in COCO 2014's layout",
            "version": str(GENERATOR_VERSION),
            "year": 2014,
        },
        "licenses": [{"id": 1, "name": "Public domain", "url": ""}],
        "images": [
            {"id": i, "file_name": _file_name(split, i), "height": side, "width": side, "license": 1}
            for i in ids
        ],
    }
    captions = [
        {"id": image_id * 10 + k, "image_id": image_id, "caption": text}
        for index, (image_id, scene) in enumerate(zip(ids, scenes, strict=True))
        for k, text in enumerate(describe(scene, random.Random(f"{seed}/{split}/{index}/captions")))
    ]
    return {
        "captions": {**head, "annotations": captions},
        "scenes": [{"image_id": i, **asdict(scene)} for i, scene in zip(ids, scenes, strict=True)],
    }


def load_scenes(folder: str | Path, split: str) -> dict[int, Scene]:
    """The symbolic scenes of a split ("train", "val", "test" or "novel") by image id.

    Raises: LabError if the folder holds none.
    """
    path = Path(folder) / "annotations" / f"scenes_{split}2014.json"
    if not path.is_file():
        raise LabError(f"{path} does not exist; make the set with write_scenes({str(folder)!r}).")
    return {
        row["image_id"]: Scene(
            row["background"], row["tint"], tuple(SceneObject(**o) for o in row["objects"])
        )
        for row in json.loads(path.read_text(encoding="utf-8"))
    }


class _Job(NamedTuple):
    path: Path
    scene: Scene
    key: str
    side: int


def _draw_file(job: _Job) -> None:
    image = render(job.scene, random.Random(job.key), job.side)
    image.save(job.path, quality=95, subsampling=0)  # chroma at full size: the shapes are small


def _write_set(folder: Path, name: str, settings: dict[str, int], write: Callable[[Path], None]) -> Path:
    """A folder with a set as `write` makes it, complete or not at all: it is made beside it and renamed.

    Raises: LabError if the folder holds anything but this set.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        written = read_json(folder / f"{name}.json")
        differing = sorted(key for key in settings if written.get(key) != settings[key])
        if not differing:
            return folder
        changes = ", ".join(f"{key} {written.get(key)}, not {settings[key]}" for key in differing)
        what = f"holds {name} of other settings ({changes})" if written else f"was not made by write_{name}"
        raise LabError(f"{folder} {what}; choose another folder or delete it.")
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    with write_errors(folder):
        write(beside)
        write_json(beside / f"{name}.json", settings)
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    return folder


def write_scenes(
    folder: str | Path,
    *,
    num_train: int = 2000,
    num_val: int = 200,
    num_test: int = 500,
    num_novel: int = 500,
    image_size: int = 112,
    seed: int = 0,
    num_workers: int | None = None,
) -> Path:
    """Write the generated set to disk; a finished one is left as it is.

    `{split}2014/COCO_{split}2014_{id:012d}.jpg` are the images, `annotations/captions_{split}2014.json` their
    captions (five per image, from brief to full) and `annotations/scenes_{split}2014.json` what they show, see
    `load_scenes`. Every image of the split novel has a pair of `HELD_OUT_PAIRS`; no other image has one.

    Args:
        folder: output folder; it appears complete or not at all.
        num_train, num_val, num_test, num_novel: images in each split.
        image_size: side in pixels.
        seed: decides everything; the number of workers decides nothing.
        num_workers: processes that draw; None: one per core on Linux, else none.
    Returns: the folder.
    Raises: LabError if the folder holds something else or a number is out of range.
    """
    counts = dict(zip(SPLITS, (num_train, num_val, num_test, num_novel), strict=True))
    for name, value, least, most in (
        *((f"num_{split}", count, 1, IDS_PER_SPLIT) for split, count in counts.items()),
        ("image_size", image_size, 48, 1024),
    ):
        if not least <= value <= most:
            raise LabError(f"{name} is {value}; set it between {least} and {most}.")
    settings = {f"num_{split}": count for split, count in counts.items()}
    settings |= {"image_size": image_size, "seed": seed, "generator_version": GENERATOR_VERSION}

    def write(place: Path) -> None:
        jobs = []
        for split, count in counts.items():
            (place / f"{split}2014").mkdir(parents=True)
            scenes = plan_split(split, count, seed)
            for kind, content in _annotations(split, scenes, seed, image_size).items():
                write_text(place / "annotations" / f"{kind}_{split}2014.json", json.dumps(content))
            for index, (image_id, scene) in enumerate(zip(image_ids(split, count), scenes, strict=True)):
                path = place / f"{split}2014" / _file_name(split, image_id)
                jobs.append(_Job(path, scene, f"{seed}/{split}/{index}/pixels", image_size))
        workers = 1 if num_workers is None and sys.platform != "linux" else num_workers
        results = in_processes(_draw_file, jobs, workers)
        list(tqdm(results, "drawing scenes", len(jobs), unit="img", mininterval=0.5))

    return _write_set(Path(folder), "scenes", settings, write)


# --- Class folders of one shape each, for side-by-side images ---


PAIR_COLOURS = ("red", "blue")
PAIR_SHAPES = ("circle", "square", "triangle", "star", "heart")
PAIR_CLASSES = tuple((colour, shape) for colour in PAIR_COLOURS for shape in PAIR_SHAPES)
"""Color and shape of each class: neither alone identifies it."""
RADII = (0.24, 0.36)  # fractions of the side, so that a shape is recognizable at 32 pixels
SHAPES_VERSION = 1  # raise it whenever the same settings would give other images


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
        folder: output folder; it appears complete or not at all.
        num_train, num_test: images of each class.
        image_size: side in pixels.
        seed: decides everything.
    Returns: the folder.
    Raises: LabError if the folder holds something else or another set.
    """
    settings = dict(num_train=num_train, num_test=num_test, image_size=image_size, seed=seed)
    settings["generator_version"] = SHAPES_VERSION
    counts = {"train": num_train, "test": num_test}

    def write(place: Path) -> None:
        with tqdm(total=len(PAIR_CLASSES) * sum(counts.values()), desc="drawing shapes", unit="img") as bar:
            for split, (colour, shape) in itertools.product(counts, PAIR_CLASSES):
                class_folder = place / split / f"{colour}_{shape}"
                class_folder.mkdir(parents=True)
                for number in range(counts[split]):
                    rng = random.Random(f"{seed}/{split}/{colour} {shape}/{number}")
                    image = render(sample_scene(colour, shape, rng), rng, image_size)
                    image.save(class_folder / f"{number:04d}.png")
                    bar.update()

    return _write_set(Path(folder), "shapes", settings, write)
