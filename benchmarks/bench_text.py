"""Captions per second, sorted batches against batches padded to 77: `python -m benchmarks text`.

The same encoder and captions on both sides, in turns; the ratio is the median over the rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sources.readers import read_captions
from sources.scenes import describe, plan_split
from towers import text as towers_text
from towers.features import encode_texts

FLICKR8K = Path(__file__).resolve().parents[2] / "shared" / "flickr8k"
CAPTIONS, ROUNDS, BATCH, PADDED = 800, 3, 64, 77
TARGET = 2.5  # times the plain side


def captions() -> tuple[str, list[str]]:
    """Flickr8k's first test captions, or those of generated scenes."""
    if FLICKR8K.is_dir():
        return "Flickr8k", list(read_captions("flickr8k", FLICKR8K).split("test").captions[:CAPTIONS])
    rng = random.Random(0)
    texts = [text for scene in plan_split("train", CAPTIONS // 4, 0) for text in describe(scene, rng)]
    return "generated scenes", texts[:CAPTIONS]


@torch.inference_mode()
def encode_padded(tower: towers_text.TextTower, texts: list[str]) -> Tensor:
    """(T, width): batches of 64 in the captions' order, every caption padded to 77 tokens."""
    features = []
    for start in range(0, len(texts), BATCH):
        tokens = tower.tokenizer(
            texts[start : start + BATCH],
            padding="max_length",
            truncation=True,
            max_length=PADDED,
            return_tensors="pt",
        )
        features.append(tower({name: tokens[name] for name in ("input_ids", "attention_mask")}))
    return torch.cat(features)


def _timed(
    encode: Callable[..., Tensor], tower: towers_text.TextTower, texts: list[str]
) -> tuple[float, Tensor]:
    start = time.perf_counter()
    features = encode(tower, texts)
    return time.perf_counter() - start, features


def main() -> None:
    """Both programs alternately, and their ratio beside the target."""
    name, texts = captions()
    tower = towers_text.minilm().eval()
    for encode in (encode_texts, encode_padded):
        encode(tower, texts[:BATCH])  # the first batch pays for set-up
    ours, plain = [], []
    for _ in range(ROUNDS):
        seconds, sorted_features = _timed(encode_texts, tower, texts)
        ours.append(seconds)
        seconds, padded_features = _timed(encode_padded, tower, texts)
        plain.append(seconds)
    ratios = [slow / fast for slow, fast in zip(plain, ours, strict=True)]
    apart = float((sorted_features - padded_features).abs().max())
    print(f"\ncaptions a second, MiniLM, {len(texts)} captions of {name}, {torch.get_num_threads()} threads")
    print(f"  batches of {BATCH} padded to {PADDED}: {len(texts) / median(plain):.0f}")
    print(f"  sorted, padded to their own longest: {len(texts) / median(ours):.0f}")
    print(f"  ratio {median(ratios):.1f} (target: at least {TARGET}; {min(ratios):.1f} to {max(ratios):.1f})")
    print(f"  outputs differ by at most {apart:.1e} (target: under 1e-3)")


if __name__ == "__main__":
    main()
