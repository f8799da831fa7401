"""Lab 2: a run on side-by-side images, each image against all C * C captions; wrong order is counted separately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch.nn.functional as F

from config import Config
from core.errors import LabError
from dataset import open_dataset
from evaluate import measure_split, report_run
from plots.figures import captioned_images
from reports.gallery import load_or_encode, results_of
from reports.report import save_table
from sources.side_by_side import PairedImages, PairRanks
from utils import Run, augmented

TRAIN_PAIRS = 2000  # as many as the published figure was measured on


@dataclass
class PairResult:
    """A split's pairs, the ranks of their captions under a run's best model, and its metrics."""

    pairs: PairedImages
    ranks: PairRanks
    metrics: dict[str, Any]


def evaluate_pairs(
    run: Run, splits: Sequence[str] = ("train", "val", "test"), *, show: bool = True
) -> dict[str, PairResult]:
    """Evaluate a run on fixed pairs of each split, of the training split at most `TRAIN_PAIRS`; see metrics.json.

    Raises: LabError if the run was not trained on side-by-side images.
    """
    config = run.config
    if config.reader != "paired_cifar":
        raise LabError(f"{run.folder} was trained on reader {config.reader!r}, not on 'paired_cifar'.")
    results = {}
    for split in splits:
        pairs = open_dataset(config, (split,), evaluation=True, progress=show)
        if split in config.train_splits:
            pairs.num_pairs = min(len(pairs), TRAIN_PAIRS)
        gallery = load_or_encode(run, pairs, show=show)
        metrics = measure_split(run, split, gallery=gallery)
        results[split] = PairResult(pairs, pairs.ranks(run.model, gallery.features), metrics)
    return results


def caption_similarity(pairs: PairedImages) -> pd.DataFrame:
    """Mean cosine between text features: of any two captions, and of a caption and its swapped version."""
    if pairs.text_features is None:
        raise LabError("the captions' features are not cached; set text_tower_mode to 'cached'.")
    features = F.normalize(pairs.text_features.float(), dim=1)  # (C * C, width)
    classes = pairs.num_classes
    grid = features.view(classes, classes, -1)
    swapped = (grid * grid.transpose(0, 1)).sum(dim=2)  # (C, C), 1 on the diagonal
    cosines = {
        "two captions": (features @ features.T).mean().item(),
        "a caption and its swapped version": ((swapped.sum() - classes) / (classes**2 - classes)).item(),
    }
    return pd.Series(cosines, name="mean cosine").to_frame().round(3)


def augmented_views(batch: dict[str, Any], config: Config, epochs: int = 4) -> list[np.ndarray]:
    """The first image of a batch as training sees it in each of some epochs."""
    return [augmented(batch, config, epoch)[0].numpy() for epoch in range(epochs)]


def guesses(result: PairResult, items: Sequence[int]) -> list[str]:
    """The nearest caption of some pairs, marked as right, swapped or wrong, with the true one if it is not right."""
    ranks, captions = result.ranks, result.pairs.captions
    texts = []
    for item in items:
        first, truth = captions[ranks.first[item]], captions[ranks.truth[item]]
        if ranks.rank[item] == 1:
            texts.append(f"✓ {first}")
        else:
            word = "swapped:" if ranks.is_swapped[item] else "✗"
            texts.append(f"{word} {first} (truth: {truth})")
    return texts


def show_examples(result: PairResult, path: str | Path | None = None, count: int = 8) -> Any:
    """A figure of `count` pairs with their nearest captions: right ones, swapped ones and wrong ones."""
    right, swapped = result.ranks.rank == 1, result.ranks.is_swapped
    kinds = [np.flatnonzero(kind) for kind in (right, swapped, ~right & ~swapped)]
    numbers = [count - 2 * (count // 4), count // 4, count // 4]
    items = [int(item) for kind, number in zip(kinds, numbers, strict=True) for item in kind[:number]]
    images = result.pairs.__getitems__(items)["image"].numpy() if items else []
    return captioned_images(list(images), guesses(result, items), path)


def report_pairs(run: Run, *, show: bool = True) -> dict[str, PairResult]:
    """Write a run's report, a table by class and a figure of examples into its folder."""
    splits = dict.fromkeys([*run.config.train_splits, *run.config.val_splits, *run.config.test_splits])
    results = evaluate_pairs(run, list(splits), show=show)
    report_run(run, show=show)
    last = results[list(splits)[-1]]
    save_table(last.ranks.by_class(last.pairs.names), results_of(run) / "tables" / "pairs_by_class")
    show_examples(last, results_of(run) / "figures" / "pair_examples.png")
    return results
