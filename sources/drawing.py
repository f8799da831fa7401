"""Generated scenes: captioned images of colored shapes, written to disk in COCO 2014's layout.

A scene is a symbolic description first; image and captions are made from it, so what is true of an image is known
exactly. Everything is a function of (seed, split, index).
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
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
        raise LabError(f"{path} does not exist; make the set with write_scenes({str(folder)!r})")
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


def _is_finished(folder: Path, settings: dict[str, int], counts: dict[str, int]) -> bool:
    """Whether the folder holds this set, complete.

    Raises: LabError if it holds another set, or files that `write_scenes` did not write.
    """
    marker, begun = folder / "scenes.json", folder / "scenes.unfinished.json"
    if not marker.is_file():
        others = [folder] if folder.is_file() else [path for path in _own_folders(folder) if path.exists()]
        if others and not begun.is_file():
            raise LabError(f"{others[0]} exists and was not made by write_scenes; choose another folder")
        return False
    written = read_json(marker)
    if written != settings:
        other = sorted(key for key in settings if written.get(key) != settings[key])
        differences = ", ".join(f"{key} {written.get(key)}, not {settings[key]}" for key in other)
        raise LabError(
            f"{folder} holds scenes of other settings ({differences}); choose another folder or delete it"
        )
    return all(len(list((folder / f"{s}2014").glob("*.jpg"))) == count for s, count in counts.items())


def _own_folders(folder: Path) -> list[Path]:
    return [folder / name for name in ("annotations", *(f"{split}2014" for split in SPLITS))]


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
    """Write the generated set to disk; a finished one is left as it is, an unfinished one written again.

    `{split}2014/COCO_{split}2014_{id:012d}.jpg` are the images, `annotations/captions_{split}2014.json` their
    captions (five per image, from brief to full) and `annotations/scenes_{split}2014.json` what they show, see
    `load_scenes`. Every image of the split novel has a pair of `HELD_OUT_PAIRS`; no other image has one.

    Args:
        folder: output folder; created if it does not exist.
        num_train, num_val, num_test, num_novel: images in each split.
        image_size: side in pixels.
        seed: decides everything; the number of workers decides nothing.
        num_workers: processes that draw; None: one per core on Linux, else none.
    Returns: the folder.
    Raises: LabError if the folder holds something else or a number is out of range.
    """
    folder = Path(folder)
    counts = dict(zip(SPLITS, (num_train, num_val, num_test, num_novel), strict=True))
    for name, value, least, most in (
        *((f"num_{split}", count, 1, IDS_PER_SPLIT) for split, count in counts.items()),
        ("image_size", image_size, 48, 1024),
    ):
        if not least <= value <= most:
            raise LabError(f"{name} is {value}; set it between {least} and {most}")
    settings = {f"num_{split}": count for split, count in counts.items()}
    settings |= {"image_size": image_size, "seed": seed, "generator_version": GENERATOR_VERSION}
    if _is_finished(folder, settings, counts):
        return folder
    begun = _begin(folder, settings)
    jobs = []
    for split, count in counts.items():
        scenes = plan_split(split, count, seed)
        for kind, content in _annotations(split, scenes, seed, image_size).items():
            path = folder / "annotations" / f"{kind}_{split}2014.json"
            write_text(path, json.dumps(content))
        for index, (image_id, scene) in enumerate(zip(image_ids(split, count), scenes, strict=True)):
            path = folder / f"{split}2014" / _file_name(split, image_id)
            jobs.append(_Job(path, scene, f"{seed}/{split}/{index}/pixels", image_size))
    with write_errors(folder / "scenes.json"):
        workers = 1 if num_workers is None and sys.platform != "linux" else num_workers
        results = in_processes(_draw_file, jobs, workers)
        list(tqdm(results, "drawing scenes", len(jobs), unit="img", mininterval=0.5))
    os.replace(begun, folder / "scenes.json")
    return folder


def _begin(folder: Path, settings: dict[str, int]) -> Path:
    """Clear what an earlier attempt left, and mark the folder as begun."""
    begun = folder / "scenes.unfinished.json"
    write_json(begun, settings)
    (folder / "scenes.json").unlink(missing_ok=True)
    for path in _own_folders(folder):
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
    return begun


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
    folder = Path(folder)
    settings = dict(num_train=num_train, num_test=num_test, image_size=image_size, seed=seed)
    settings["generator_version"] = SHAPES_VERSION
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_same(folder, settings)
        return folder
    beside = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    counts = {"train": num_train, "test": num_test}
    total = len(PAIR_CLASSES) * sum(counts.values())
    with write_errors(folder), tqdm(total=total, desc="drawing shapes", unit="img") as bar:
        for split, count in counts.items():
            for colour, shape in PAIR_CLASSES:
                place = beside / split / f"{colour}_{shape}"
                place.mkdir(parents=True)
                for number in range(count):
                    rng = random.Random(f"{seed}/{split}/{colour} {shape}/{number}")
                    image = render(sample_scene(colour, shape, rng), rng, image_size)
                    image.save(place / f"{number:04d}.png")
                    bar.update()
    write_json(beside / "shapes.json", settings)
    if folder.exists():
        folder.rmdir()  # empty, or it would have been checked
    os.replace(beside, folder)
    return folder


def _check_same(folder: Path, settings: dict[str, int]) -> None:
    """Raises: LabError if the folder holds anything but the set of these settings."""
    marker = folder / "shapes.json"
    written = read_json(marker)
    if written != settings:
        what = f"holds shapes of other settings ({written})" if written else "was not made by write_shapes"
        raise LabError(f"{folder} {what}; choose another folder or delete it.")
