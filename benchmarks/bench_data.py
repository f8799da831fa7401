"""Speed and memory of the image cache: `python benchmarks/bench_data.py [--images 1500] [--rounds 3]`.

Against the loader every lab writes (PIL, Resize, ToTensor, Normalize, a DataLoader with two workers) on
the same 640 x 480 JPEGs; all sides run in turns, and the ratio is the median over the rounds. Memory and
start-up are those of a fresh process at COCO 2014's size, with empty image files and a sparse cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import core.devices  # noqa: F401  before torchvision

from torchvision import transforms  # isort: skip

from sources import image_cache
from sources.image_cache import ImageCache
from sources.readers import read_captions
from training.augment import augment

BATCH, SIZE, WORKERS = 128, 224, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COCO_IMAGES, COCO_CAPTIONS = 82_783, 414_113  # train2014
TARGETS = {"cached uint8": 20.0, "crop, flip": 4.0, "building": 1.5}  # times the plain loader


# --- speed -----------------------------------------------------------------------------------------


class PlainImages(Dataset):
    """The plain loader's data set."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names
        self.transform = transforms.Compose(
            [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(Image.open(self.root / self.names[row]).convert("RGB"))


def make_jpegs(root: Path, count: int, distinct: int = 50) -> list[str]:
    """640 x 480 JPEGs with shapes and texture, of about the size of COCO's photographs (160 KB)."""
    rng = np.random.default_rng(0)
    images = []
    for number in range(distinct):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
        texture = rng.normal(0, 11, (480, 640, 1)) * (smooth[:, :, :1] / 255)
        path = root / f"source{number}.jpg"
        Image.fromarray((smooth + texture).clip(0, 255).astype(np.uint8)).save(path, quality=93)
        images.append(path.read_bytes())
        path.unlink()
    names = [f"{row:05d}.jpg" for row in range(count)]
    for row, name in enumerate(names):
        (root / name).write_bytes(images[row % distinct])
    print(f"{count:,} JPEGs of 640 x 480, {np.mean([len(data) for data in images]) / 1000:.0f} KB on average")
    return names


def shuffled_batches(count: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng().permutation(count)
    for first in range(0, count - BATCH + 1, BATCH):
        yield order[first : first + BATCH]


def images_per_second(passes: Callable[[], int], at_least: float = 1.0) -> float:
    """`passes` returns the number of images it processed, and is repeated for `at_least` seconds."""
    start, images = time.perf_counter(), 0
    while not images or time.perf_counter() - start < at_least:
        images += passes()
    return images / (time.perf_counter() - start)


def build_rate(root: Path, names: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ImageCache.open_or_build(
            root, names, size=SIZE, resize="squash", folder=folder, num_workers=WORKERS, progress=False
        )
        return len(names) / (time.perf_counter() - start)


def measure_speed(folder: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Name -> images per second and the median ratio to the plain loader of the same round."""
    root = folder / "images"
    root.mkdir()
    names = make_jpegs(root, count)
    loader = DataLoader(
        PlainImages(root, names),
        batch_size=BATCH,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    next(iter(loader))  # starts its workers outside the measurement
    settings: dict[str, Any] = dict(size=SIZE, resize="squash", folder=folder / "cache", progress=False)
    cache = ImageCache.open_or_build(root, names, **settings)
    small = ImageCache.open_or_build(root, names, **settings, jpeg=True)

    def augmented() -> int:
        for rows in shuffled_batches(count):
            augment(cache.gather(rows), rows, seed=0, epoch=0, crop_scale=0.5, flip=0.5)
        return count // BATCH * BATCH

    def gathered(source: ImageCache) -> int:
        return sum(len(source.gather(rows)) for rows in shuffled_batches(count))

    sides: dict[str, Callable[[], float]] = {
        "plain loader": lambda: images_per_second(lambda: sum(len(batch) for batch in loader), 0),
        "cached uint8": lambda: images_per_second(lambda: gathered(cache)),
        "crop, flip": lambda: images_per_second(augmented),
        "building": lambda: build_rate(root, names),
        "cached as JPEG": lambda: images_per_second(lambda: gathered(small)),
    }
    gathered(cache), augmented()  # maps the pages
    runs = [{name: run() for name, run in sides.items()} for _ in range(rounds)]
    return {
        name: {
            "rate": median(run[name] for run in runs),
            "ratio": median(run[name] / run["plain loader"] for run in runs),
        }
        for name in sides
    }


# --- memory ----------------------------------------------------------------------------------------


def simulate_coco(root: Path) -> None:
    """COCO's own layout and number of files: the real captions file, empty images."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2014").mkdir()
    names = [f"COCO_train2014_{row:012d}.jpg" for row in range(COCO_IMAGES)]
    for name in names:
        (root / "train2014" / name).touch()
    words = "a group of people standing around a table with plates of food near an old wooden bench".split()
    captions = [" ".join(np.roll(words, row)[:10]) for row in range(len(words))]
    content = {
        "images": [{"file_name": name, "id": row} for row, name in enumerate(names)],
        "annotations": [
            {"image_id": row % COCO_IMAGES, "id": row, "caption": f"{captions[row % len(captions)]} {row}."}
            for row in range(COCO_CAPTIONS)
        ],
    }
    (root / "annotations" / "captions_train2014.json").write_text(json.dumps(content))


def lay_out_cache(root: Path, paths: tuple[str, ...], folder: Path) -> None:
    """A complete cache whose pixel file is sparse."""
    source = image_cache.Source(str(root), paths, SIZE, "crop")
    cache_folder = folder / f"images_{SIZE}px_crop_{source.key[:16]}_raw"
    cache_folder.mkdir(parents=True)
    store = source.store(cache_folder, "raw")
    store.prepare()
    store.digests[:] = 1, zlib.crc32(bytes(SIZE * SIZE * 3))
    store.finished[:] = True
    store.checkpoint()
    image_cache.write_header(cache_folder, source, "raw", {})


def resident_mb() -> dict[str, float]:
    """Own and file-mapped resident memory in MB (Linux; elsewhere empty)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {name: value * 1024 / 1e6 for name, value in kilobytes.items()}


def timed(steps: dict[str, float], name: str, step: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = step()
    steps[name] = time.perf_counter() - start
    return result


def use_coco(folder: Path) -> None:
    """In a process of its own: open what exists, read 40 batches, print what that took as JSON."""
    steps: dict[str, float] = {}
    own = []
    table = timed(
        steps, "captions", lambda: read_captions("coco", folder / "coco", cache_dir=folder / "cache")
    )
    own.append(resident_mb())
    cache = timed(
        steps,
        "images",
        lambda: ImageCache.open_or_build(
            table.root, table.paths, size=SIZE, folder=folder / "cache", progress=False
        ),
    )
    for rows, _ in zip(shuffled_batches(len(cache)), range(40), strict=False):
        cache.gather(rows)
        [table.captions_of(row) for row in rows.tolist()]
        own.append(resident_mb())
    memory = {name: max(sample[name] for sample in own) for name in own[0]}
    print(
        json.dumps({"steps": steps, "memory": memory, "captions": len(table.captions), "images": len(cache)})
    )


def measure_coco(folder: Path) -> dict[str, Any]:
    simulate_coco(folder / "coco")
    table = read_captions("coco", folder / "coco", cache_dir=folder / "cache")
    lay_out_cache(table.root, tuple(table.paths), folder / "cache")
    command = [sys.executable, __file__, "--coco", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# --- the table -------------------------------------------------------------------------------------


def show(name: str, measured: str, target: str = "", met: bool = True) -> None:
    print(
        f"{name:<34} {measured:>24}   {target:<12} {'' if not target else 'met' if met else 'MISSED'}".rstrip()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500, help="JPEGs to read")
    parser.add_argument("--rounds", type=int, default=3, help="times every side runs")
    parser.add_argument("--coco", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.coco:
        use_coco(options.coco)
        return
    torch.set_num_threads(WORKERS)
    with tempfile.TemporaryDirectory() as folder:
        speed = measure_speed(Path(folder), options.images, options.rounds)
    for name, side in speed.items():
        target = TARGETS.get(name)
        measured = f"{side['rate']:,.0f} images/s, {side['ratio']:.1f} x"
        show(name, measured, f">= {target} x" if target else "", not target or side["ratio"] >= target)
    with tempfile.TemporaryDirectory() as folder:
        coco = measure_coco(Path(folder))
    print(f"{coco['images']:,} images and {coco['captions']:,} captions:")
    if coco["memory"]:
        own = coco["memory"]["RssAnon"] + coco["memory"].get("RssShmem", 0)
        show("memory beside mapped pages", f"{own:,.0f} MB", "< 700 MB", own < 700)
        show("mapped pages", f"{coco['memory']['RssFile']:,.0f} MB")
    for name, seconds in coco["steps"].items():
        show(f"start-up: {name}", f"{seconds:.1f} s", "<= 5 s", seconds <= 5)


if __name__ == "__main__":
    main()
