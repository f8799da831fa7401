"""Heads over embeddings: memory and time at COCO's size, and the preset's recall.

`python -m benchmarks heads` simulates 473,000 pairs of 1152-d images and 4096-d texts (5 GB on disk) and times
an epoch of their batches against a plain Dataset and DataLoader, in turns; then trains the preset on Flickr8k's
features with three seeds. `--only size --pairs 20000` proves the command in seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from benchmarks.bench_lab import train_seeds
from config import Config, make_config
from dataset import embeddings_at, make_loader, open_dataset
from losses import build_loss
from models import build_model
from sources.embeddings import Pairs, Rows, write_pairs
from sources.readers import read_captions

ROOT = Path(__file__).resolve().parent.parent
FEATURES = [place / "flickr8k" for place in (ROOT.parent / "shared", ROOT / "data")]
IMAGE_WIDTH, TEXT_WIDTH, CAPTIONS = 1152, 4096, 5
BLOCK = 20_000  # pairs generated at once
BATCH = 512  # images of ours; the plain side gets as many pairs a batch


def simulate(folder: Path, pairs: int) -> None:
    """Training pairs of random embeddings, and small val and test splits."""
    folder.mkdir()
    for split, count, first in (("train", pairs, 0), ("val", 500, 10**7), ("test", 500, 2 * 10**7)):
        ids = np.arange(count) // CAPTIONS + first
        for kind, width in (("image", IMAGE_WIDTH), ("text", TEXT_WIDTH)):
            rows = torch.empty(count, width, dtype=torch.float16)
            for start in range(0, count, BLOCK):
                some = torch.from_numpy(ids[start : start + BLOCK] if kind == "image" else np.arange(BLOCK))
                waves = torch.outer(
                    (some[: len(rows) - start] % 997 + 1).float(), torch.arange(width) % 31 + 1.0
                )
                rows[start : start + BLOCK] = waves.sin().half()
            torch.save(rows, folder / f"{split}_{kind}_embeddings.pt")
            del rows
        (folder / f"{split}_metadata.json").write_text(json.dumps({"image_ids": ids.tolist()}))


class PlainPairs(Dataset):
    """The usual way: one item per pair, and one tensor per row."""

    def __init__(self, folder: Path) -> None:
        self.images = torch.load(folder / "train_image_embeddings.pt", mmap=True)
        self.texts = torch.load(folder / "train_text_embeddings.pt", mmap=True)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[row].float(), self.texts[row].float()


def _epoch(batches: DataLoader, most: int) -> tuple[int, float]:
    """Pairs and seconds of a number of batches."""
    pairs, start = 0, time.perf_counter()
    for number, batch in enumerate(batches):
        pairs += len(batch["text"]) if isinstance(batch, dict) else len(batch[1])
        if number + 1 == most:
            break
    return pairs, time.perf_counter() - start


def _step_seconds(config: Config, loader: DataLoader, steps: int = 3) -> float:
    """Median seconds of a training step of the preset's heads, its batch in memory."""
    model, criterion = build_model(config), build_loss(config)
    optimizer = torch.optim.AdamW(model.parameters())
    batch, seconds = next(iter(loader)), []
    for _ in range(steps):
        start = time.perf_counter()
        ids = {"image_id": batch["image_id"], "text_id": batch["text_id"]}
        criterion(**model(batch["image"], batch["text"]), **ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def bench_size(pairs: int, batches: int, rounds: int = 3) -> None:
    """Peak memory, and batches of both programs alternately."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "embeddings"
        with multiprocessing.get_context("spawn").Pool(
            1
        ) as writer:  # what writing needs is not what training needs
            writer.apply(simulate, (folder, pairs))
        config = make_config("projection_heads", **embeddings_at(folder), batch_size=BATCH)
        ours = make_loader(open_dataset(config, ("train",)), BATCH, shuffle=True)
        _epoch(ours, batches)
        step = _step_seconds(config, ours)
        # Before the plain side maps the files: a page mapped twice counts twice.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        plain = DataLoader(PlainPairs(folder), batch_size=BATCH * CAPTIONS, shuffle=True)
        rates: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(rounds):
            for name, loader in (("ours", ours), ("plain", plain)):
                count, seconds = _epoch(loader, batches)
                rates[name].append(count / seconds)
    wait = BATCH * CAPTIONS / median(rates["ours"])
    ratio = median(fast / slow for fast, slow in zip(rates["ours"], rates["plain"], strict=True))
    print(f"\n{pairs:,} pairs, {IMAGE_WIDTH}-d images, {TEXT_WIDTH}-d texts")
    print(f"  peak memory, mapped files included: {peak:.1f} GB (target: at most 8)")
    print(f"  pairs a second: {median(rates['ours']):,.0f}, plain loop {median(rates['plain']):,.0f}")
    print(f"  ratio {ratio:.1f} (target: at least 2)")
    print(f"  data's share of a step: {100 * wait / (wait + step):.1f} % (target: at most 10)")


def convert(data: Path, folder: Path) -> Path:
    """Write Flickr8k's features.safetensors (images by name, captions in the file's order) as embeddings of pairs."""
    table = read_captions("flickr8k", data)
    table = table.take(np.argsort(np.array(table.paths), kind="stable"))
    features = load_file(data / "features.safetensors")
    whole = Pairs(table, Rows([features["image_features"]]), Rows([features["text_features"]]))
    for split in ("train", "val", "test"):
        part = whole.take(np.flatnonzero(table.splits == split))
        write_pairs(folder, split, part.table, part.images[:], part.text_features[:])
    return folder


def bench_recall() -> None:
    """The preset on Flickr8k's features: official split, epoch chosen on dev, test evaluated once."""
    data = next((place for place in FEATURES if (place / "features.safetensors").is_file()), None)
    if data is None:
        print("recall: skipped; it needs features.safetensors in ../shared/flickr8k or data/flickr8k")
        return
    with tempfile.TemporaryDirectory() as folder:
        embeddings = convert(data, Path(folder) / "embeddings")
        config = make_config("projection_heads", **embeddings_at(embeddings), runs_dir=folder)
        print("\nprojection_heads, Flickr8k 1K test, 5 captions, three seeds (target R@1: 24.5 and 19)")
        print(train_seeds(config).to_string())


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=473_000)
    parser.add_argument(
        "--batches", type=int, default=10**9, help="at most so many a round; an epoch by default"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=("size", "recall"))
    given = parser.parse_args()
    if given.only != "recall":
        bench_size(given.pairs, given.batches, given.rounds)
    if given.only != "size":
        bench_recall()


if __name__ == "__main__":
    main()
