"""Small data for tests: pictures in COCO's layout, and where the measuring sets lie."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import core.devices  # noqa: F401  before any test imports torchvision

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DAMAGES = int(os.environ.get("DAMAGES", "3"))  # places of each kind of file that are damaged


def copy_lab(folder: Path) -> None:
    """Everything of the lab but its tests, benchmarks and documents, as it stands here."""
    names = ["*", ":!tests", ":!benchmarks", ":!docs", ":!.*"]
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *names]
    for name in subprocess.run(
        listing, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def write_coco(root: Path, counts: dict[str, int], size: int = 48, captions: int = 3) -> Path:
    """Random pictures in COCO 2014's layout, `captions` each."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    number = 0
    for split, count in counts.items():
        (root / f"{split}2014").mkdir()
        images, annotations = [], []
        for _ in range(count):
            number += 1
            name = f"COCO_{split}2014_{number:012d}.jpg"
            tint = rng.integers(0, 255, 3)
            noise = rng.integers(-20, 20, (size, size, 3))
            pixels = np.clip(tint + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2014" / name)
            images.append({"id": number, "file_name": name, "height": size, "width": size})
            for turn in range(captions):
                text = f"a picture number {number} of tint {tint.tolist()}, told {turn} times"
                annotations.append({"id": number * 10 + turn, "image_id": number, "caption": text})
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (root / "annotations" / f"captions_{split}2014.json").write_text(json.dumps(content))
    return root


def damage(path: Path, number: int) -> None:
    """Flip one bit, or for every third number cut the file."""
    data = bytearray(path.read_bytes())
    place = random.Random(f"{path.suffix} {number}").randrange(len(data))
    if number % 3 == 2:
        del data[place:]
    else:
        data[place] ^= 1 << number % 8
    path.write_bytes(data)


def add_results(title: str, tried: Counter[tuple[str, str]]) -> None:
    """Put a table into benchmarks/results/robustness.md, in place of its last one.

    Args: tried: what was damaged or stopped, with `tried` or `survived` -> how often.
    """
    import pandas as pd

    from reports.report import markdown_table

    counts = pd.Series(tried).unstack(fill_value=0)
    table = counts.reindex(columns=["tried", "survived"], fill_value=0).rename_axis("what")
    path = ROOT / "benchmarks" / "results" / "robustness.md"
    head = (
        "# Killed runs, damaged files, full disks\n\nMade by `make soak`. Survived: a killed run that continues ends "
        "bit for bit as an undisturbed one; a damaged file or a full disk gives the right result, at once or after one "
        "sentence that says what to do.\n"
    )
    text = path.read_text(encoding="utf-8") if path.is_file() else head
    parts = [part for part in text.split("\n## ") if not part.startswith(f"{title}\n")]
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}"
    part = (
        f"{title}\n\n{date.today():%d %B %Y}, {machine}, torch {version('torch')}.\n\n{markdown_table(table)}"
    )
    path.write_text("\n## ".join([*(p.rstrip("\n") + "\n" for p in parts), part]), encoding="utf-8")
