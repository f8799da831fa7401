"""Speed and memory of exact ranks: `python -m benchmarks metrics [--full]`.

Against the chunked product alone at a quarter of COCO val2014's images (`--full`: all 40,504 with
202,654 captions), and against a full argsort of the pair-by-pair matrix at 2,000 images with five
captions each. Both sides of a ratio run in turns, and the ratio is the median over the turns, so that what
else the machine does counts on both sides.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from metrics import retrieval_metrics
from retrieval.figures import recall_by_gallery_size
from retrieval.ranks import TILES, match_ranks
from retrieval.statistics import bootstrap_intervals, paired_test

Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
NUM_IMAGES, NUM_TEXTS, WIDTH = 40_504, 202_654, 512


def make_features(num_images: int, num_texts: int, noise: float = 6.0) -> Features:
    """Normalized random features, captions in random order, with noise of `noise` times their length."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(num_images, WIDTH, generator=generator))
    image_id = torch.arange(num_images)
    extra = torch.randint(num_images, (num_texts % num_images,), generator=generator)
    text_id = torch.cat([image_id.repeat(num_texts // num_images), extra])
    text_id = text_id[torch.randperm(len(text_id), generator=generator)]
    texts = torch.randn(num_texts, WIDTH, generator=generator).mul_(noise / WIDTH**0.5)
    for start in range(0, num_texts, 8192):
        texts[start : start + 8192] += images[text_id[start : start + 8192]]
    return images, torch.nn.functional.normalize(texts), image_id, text_id


def chunked_product(images: torch.Tensor, texts: torch.Tensor) -> None:
    """The reference: every tile of the product, discarded."""
    height, width = TILES["cpu"]
    out = torch.empty(height * width)
    for rows in texts.split(height):
        for columns in images.split(width):
            tile = out[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=tile)


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def spread(slow: list[float], fast: list[float]) -> str:
    """The median of the rounds' ratios, with minimum and maximum."""
    ratios = np.divide(slow, fast)
    return f"{np.median(ratios):.3g} [{ratios.min():.3g}, {ratios.max():.3g}]"


def peak_mib() -> float:
    """Peak resident memory since the last `reset_peak`, in MiB (Linux; elsewhere NaN)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def pair_by_pair(
    images: torch.Tensor, texts: torch.Tensor, image_id: torch.Tensor, text_id: torch.Tensor
) -> None:
    """What notebooks do: every caption's own copy of its image, the full matrix, a full argsort each way."""
    scores = images[torch.searchsorted(image_id, text_id)] @ texts.T
    for matrix in (scores, scores.T):
        order = matrix.argsort(dim=1, descending=True)
        (order == torch.arange(len(order))[:, None]).int().argmax(1)


def compare_with_product(num_images: int, num_texts: int, rounds: int) -> None:
    features = make_features(num_images, num_texts)
    stored = sum(each.nbytes for each in features) / 2**20
    product, ours = [], []
    chunked_product(features[0][:2048], features[1][:8192])
    reset_peak()
    for _ in range(rounds):
        product.append(seconds(lambda: chunked_product(*features[:2])))
        ours.append(seconds(lambda: retrieval_metrics(*features)))
    print(
        f"{num_images:,} images x {num_texts:,} captions: product {min(product):.1f} s, all metrics "
        f"{min(ours):.1f} s, {spread(ours, product)} times the product (target: at most 1.5); the whole process "
        f"took {peak_mib() - stored:.0f} MiB beside {stored:.0f} MiB of features"
    )


def compare_with_argsort(rounds: int = 3) -> None:
    features = make_features(2_000, 10_000)
    retrieval_metrics(*features)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: retrieval_metrics(*features)))
        theirs.append(seconds(lambda: pair_by_pair(*features)))
    print(
        f"2,000 images x 10,000 captions: argsort {min(theirs):.2f} s, all metrics {min(ours):.3f} s, "
        f"{spread(theirs, ours)} times faster (target: at least 30)"
    )


def time_what_follows(num_images: int) -> None:
    ranks = match_ranks(*make_features(num_images, 5 * num_images))
    sizes = np.linspace(num_images // 10, num_images, 10).astype(int).tolist()
    jobs = {
        "recall@1 at ten gallery sizes": lambda: recall_by_gallery_size(ranks, sizes),
        "bootstrap interval": lambda: bootstrap_intervals(ranks, ["i2t_recall@1"]),
        "paired test": lambda: paired_test(ranks, ranks, "t2i_map"),
    }
    times = ", ".join(f"{name} {seconds(job):.2f} s" for name, job in jobs.items())
    print(f"{num_images:,} images x {5 * num_images:,} captions: {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="all of val2014 instead of a quarter, once")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare_with_argsort()
    part, rounds = (1, 1) if arguments.full else (4, 5)
    compare_with_product(NUM_IMAGES // part, NUM_TEXTS // part, rounds)
    time_what_follows(5_000)


if __name__ == "__main__":
    main()
