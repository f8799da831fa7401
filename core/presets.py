"""Presets, and the names that a field can take, without importing the tables that contain them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.settings_files import load_yaml

START = "quickstart"
"""Preset of settings that name none: on the command line, in a file, in make_config()."""

PRESETS: dict[str, dict[str, Any]] = load_yaml(Path(__file__).with_name("presets.yaml"))
"""Name -> fields that differ from the defaults."""
del PRESETS["groups"]

FAST_RUN: dict[str, Any] = dict(max_samples=64, num_epochs=2, batch_size=32, warmup_steps=2)
"""Overrides with which any preset runs every section in well under a minute."""

_HEADS = "mlp linear standardised identity projection siglip clip attention"
_METRICS = (
    "recall ndcg mrr map r_precision rsum image_spread text_spread top1 top10 top100 top1_same top1_different order "
    "val_loss mean_rank median_rank swapped modality_gap alignment image_uniformity text_uniformity"
)
_TABLES = {
    "preset": ("core.presets.PRESETS", " ".join(PRESETS)),
    "source": ("sources.fetch.SOURCES", "coco2014 coco2017 flickr30k flickr8k cifar100 scenes shapes"),
    "reader": (
        "sources.readers.READERS",
        "auto coco flickr8k flickr30k json sidecar class_folders table pairs paired_cifar",
    ),
    "image_tower": (
        "towers.image.IMAGE_TOWERS",
        "resnet50 efficientnet_lite0 siglip clip vit embeddings vit_pair",
    ),
    "text_tower": ("towers.text.TEXT_TOWERS", "minilm clip e5 sentence transformer embeddings"),
    "image_head": ("models.HEADS", _HEADS),
    "text_head": ("models.HEADS", _HEADS),
    "loss": ("losses.LOSSES", "infonce sigmoid contrastive triplet"),
    "schedule": ("training.optim.SCHEDULES", "cosine linear constant step restarts"),
    "best_metric": ("retrieval.figures.DIRECTIONS", _METRICS),
    "device": ("", "auto cpu cuda mps"),
}
NAMES = {field: (table, tuple(names.split())) for field, (table, names) in _TABLES.items()}
"""Fields whose value is a name in a table: the table, and its names."""
