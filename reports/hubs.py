"""The scoring rules of `retrieval.hubness` applied to an evaluated split: parameters, corrections and figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from core.errors import LabError
from dataset import open_dataset
from reports.gallery import Gallery, load_or_encode
from retrieval.hubness import RULES, Correction, choose_parameters, corrected_ranks, corrections
from retrieval.ranks import Ranks
from training.order import evenly_spread
from utils import Run

MAX_BANK = 30_000  # training captions, and as many training images
MAX_VALIDATION = 1000  # images that choose the parameters


def _features(run: Run, splits: tuple[str, ...], show: bool) -> dict[str, Tensor]:
    if not splits:
        raise LabError("a correction of hubs needs train_splits and val_splits.")
    dataset = open_dataset(run.config, splits, evaluation=True, progress=show)
    return load_or_encode(run, dataset, show=show).features


def split_corrections(
    gallery: Gallery, rules: Iterable[str] = RULES, *, show: bool = True
) -> dict[str, tuple[dict[str, Any], dict[str, Correction]]]:
    """Each rule's parameters, chosen on validation images, and its corrections for a split, both by direction.

    The bank are captions and images of the training split; training and validation features are saved with the run.
    Parameters that were chosen for these weights before are read from the split's metrics.

    Raises: LabError if the training or validation split does not exist.
    """
    run = gallery.run
    train = _features(run, run.config.train_splits, show)
    dev = _features(run, run.config.val_splits, show)
    bank = {
        name: train[name][torch.from_numpy(evenly_spread(len(train[name]), MAX_BANK))]
        for name in ("image_features", "text_features")
    }
    images = torch.from_numpy(evenly_spread(len(dev["image_id"]), MAX_VALIDATION))
    texts = torch.isin(dev["text_id"], dev["image_id"][images])
    dev = {name: rows[images if name.startswith("image") else texts] for name, rows in dev.items()}
    metrics = run.metrics.get(gallery.split, {})
    saved = metrics.get("scorings", {}) if metrics.get("weights") == run.weights else {}
    made = {}
    for rule in rules:
        measured = saved.get(RULES[rule].label, {})
        chosen = measured.get("parameters") or choose_parameters(rule, bank, **dev)
        made[rule] = (
            chosen,
            corrections(rule, chosen, bank, gallery.image_features, gallery.text_features),
        )
    return made


def scoring_figures(gallery: Gallery, *, show: bool = True) -> dict[str, dict[str, Any]]:
    """Name of a scoring rule -> its figures on a split as in metrics.json, and `parameters` by direction."""
    scorings = {}
    for rule, (parameters, made) in split_corrections(gallery, show=show).items():
        ranks = Ranks(*(corrected_ranks(way, made[way], **gallery.features) for way in ("i2t", "t2i")))
        scorings[RULES[rule].label] = {**gallery.figures_of(ranks), "parameters": parameters}
    return scorings
