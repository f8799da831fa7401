"""Presets: what each lab changes of the documented one, as plain dictionaries."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Generated scenes, nothing to download: the whole notebook in minutes on two cores.
    "quickstart": dict(
        source="scenes",
        data_dir="data/scenes",
        test_splits=("test", "novel"),
        image_size=112,
        image_tower="efficientnet_lite0",
        text_tower="minilm",
        text_head="linear",
        num_epochs=4,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=40,
    ),
    # Real photographs, frozen towers, heads only.
    "flickr8k": dict(
        source="flickr8k",
        data_dir="data/flickr8k",
        reader="flickr8k",
        test_splits=("test",),
        image_tower="efficientnet_lite0",
        image_tower_mode="cached",
        text_tower="minilm",
        text_head="mlp",
        head_hidden_dim=2048,
        head_dropout=0.5,
        temperature=0.05,
        weight_decay=0.05,
        num_epochs=14,
        batch_size=512,
        learning_rate=1e-3,
        warmup_steps=20,
    ),
    # The documented lab: ResNet50 against frozen CLIP text embeddings on COCO 2014.
    "coco_resnet50": {},
}

FAST_RUN: dict[str, Any] = dict(max_samples=64, num_epochs=2, batch_size=32, warmup_steps=2)
"""Overrides that take any preset through every section in well under a minute."""
