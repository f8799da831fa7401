"""Presets: what each lab changes compared with the documented one, as plain dictionaries."""

from __future__ import annotations

from typing import Any

START = "quickstart"
"""Preset of settings that name none: on the command line, in a file, in make_config()."""

FROM_SCRATCH: dict[str, Any] = dict(
    image_tower="vit",
    image_weights="random",
    text_tower="transformer",
    text_tower_mode="trainable",
    image_head="projection",
    text_head="projection",
    learn_temperature=True,
    weight_decay=1e-4,
)
"""CLIP's two encoders, randomly initialized."""

PAIRS: dict[str, Any] = dict(
    reader="paired_cifar",
    test_splits=("test",),
    image_size=32,
    image_tower="vit_pair",
    image_weights="random",
    image_head="linear",
    warmup_epochs=2,
    best_metric="top1",
)
"""Two small images side by side, encoded by a randomly initialized vision transformer."""

PAIRS_IMPROVED: dict[str, Any] = dict(
    augment_flip=0.5,
    augment_jitter=0.2,
    augment_rotation=10,
    learn_temperature=True,
    text_head="standardised",
)
"""Improvements over the plain side-by-side setting."""

PAIRS_SMALL: dict[str, Any] = dict(
    image_patch_size=8,
    image_width=128,
    image_num_layers=4,
    image_num_heads=4,
    image_mlp_ratio=2,
    text_tower="minilm",
    embed_dim=256,
    different_class_prob=0.9,
    num_epochs=40,
    batch_size=64,
    learning_rate=2e-3,
    weight_decay=0.05,
    precision="fp32",
)
"""A vision transformer with half a million parameters, and pairs of ten classes, all 100 pairs equally likely."""

FINE_TUNING: dict[str, Any] = dict(
    best_metric="t2i_map",
    interpolate_weights=True,
    recall_ks=(1, 5, 10, 20),
)
"""Fine-tuning for retrieval, mixed with the initial weights. No mining: on Flickr8k, at equal time, neither random nor
semantic negatives were better than none."""

HEADS: dict[str, Any] = dict(
    text_head="mlp",
    head_hidden_dim=2048,
    head_dropout=0.5,
    temperature=0.05,
    weight_decay=0.05,
    label_smoothing=0.3,
    ema_decay=0.99,
    num_epochs=14,
    batch_size=512,
    learning_rate=1e-3,
    warmup_steps=20,
)
"""Heads over frozen towers; label smoothing and weight averaging chosen on Flickr8k's dev split."""

PRESETS: dict[str, dict[str, Any]] = {
    # Generated scenes, nothing to download: the whole notebook takes minutes on two cores.
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
        precision="fp32",
    ),
    # Photographs, frozen towers, only heads are trained.
    "flickr8k": dict(
        source="flickr8k",
        data_dir="data/flickr8k",
        reader="flickr8k",
        test_splits=("test",),
        image_tower="efficientnet_lite0",
        image_tower_mode="cached",
        text_tower="minilm",
        **HEADS,
    ),
    # The same with the tower's last blocks fine-tuned; set start_from to a run of `flickr8k`.
    "flickr8k_tuned": dict(
        source="flickr8k",
        data_dir="data/flickr8k",
        reader="flickr8k",
        test_splits=("test",),
        augment_crop_scale=0.6,
        augment_flip=0.5,
        image_tower="efficientnet_lite0",
        image_freeze_layers=8,
        freeze_batch_norm=True,
        text_tower="minilm",
        **{**HEADS, "num_epochs": 4, "batch_size": 128, "learning_rate": 2e-4},
    ),
    # Pre-encoded embeddings, by default of generated scenes; one head per side,
    # chosen on the dev split of Flickr8k's features.
    "projection_heads": dict(
        source=None,
        data_dir="data/scene_embeddings",
        image_root="data/scenes",
        reader="pairs",
        test_splits=("test",),
        image_tower="efficientnet_lite0",
        image_tower_mode="cached",
        text_tower="minilm",
        image_head="standardised",
        embed_dim=1024,
        **{**HEADS, "head_dropout": 0.6, "weight_decay": 0.3, "num_epochs": 20},
    ),
    # Both encoders from scratch, ViT-B/16 and CLIP's text transformer, on Flickr30k; needs a GPU.
    "clip_from_scratch": dict(
        source="flickr30k",
        data_dir="data/flickr30k",
        reader="flickr30k",
        test_splits=("test",),
        **FROM_SCRATCH,
        num_epochs=20,
        batch_size=64,
        learning_rate=1e-4,
        keep_every_epochs=5,
        trackers=("tensorboard",),
    ),
    # The same on generated scenes, small enough for two cores.
    "clip_from_scratch_small": dict(
        source="scenes",
        data_dir="data/scenes",
        test_splits=("test", "novel"),
        **FROM_SCRATCH,
        image_size=64,
        image_patch_size=8,
        image_width=128,
        image_num_layers=4,
        image_num_heads=4,
        text_width=128,
        text_num_layers=2,
        text_num_heads=4,
        embed_dim=128,
        captions_per_image=2,
        num_epochs=10,
        batch_size=64,
        learning_rate=1e-3,
        warmup_steps=40,
        precision="fp32",
    ),
    # The course's plain vision transformer on side-by-side CIFAR-100 images, from scratch; needs a GPU.
    "paired_cifar_baseline": dict(
        source="cifar100",
        data_dir="data/cifar100",
        **PAIRS,
        image_patch_size=8,
        image_width=768,
        image_num_layers=6,
        image_num_heads=12,
        text_tower="clip",
        text_head="linear",
        num_epochs=20,
        batch_size=32,
        learning_rate=1e-4,
    ),
    # The same data with improvements: smaller patches, augmentation, a learned temperature.
    "paired_cifar": dict(
        source="cifar100",
        data_dir="data/cifar100",
        **PAIRS,
        **PAIRS_IMPROVED,
        image_patch_size=4,
        image_width=768,
        image_num_layers=6,
        image_num_heads=12,
        text_tower="clip",
        num_epochs=150,
        batch_size=128,
        learning_rate=3e-4,
    ),
    # The same on ten classes of generated shapes, small enough for two cores.
    "paired_small": dict(
        source="shapes",
        data_dir="data/shapes",
        **PAIRS,
        **PAIRS_IMPROVED,
        **PAIRS_SMALL,
    ),
    # The plain setting on the same shapes, with the same epochs and size.
    "paired_small_baseline": dict(
        source="shapes", data_dir="data/shapes", text_head="linear", **PAIRS, **PAIRS_SMALL
    ),
    # A pretrained CLIP on your own captioned images, with low learning rates; needs a GPU.
    "retrieval_finetune": dict(
        source="flickr8k",
        data_dir="data/flickr8k",
        reader="flickr8k",
        test_splits=("test",),
        image_tower="clip",
        text_tower="clip",
        text_tower_mode="trainable",
        image_head="identity",
        temperature=0.01,
        augment_crop_scale=0.8,
        augment_flip=0.5,
        augment_jitter=0.4,
        max_caption_variations=4,
        augment_word_dropout=0.1,
        augment_reorder=0.5,
        **FINE_TUNING,
        num_epochs=20,
        batch_size=32,
        learning_rate=2e-5,
        image_tower_learning_rate=5e-6,
        text_tower_learning_rate=5e-6,
        warmup_steps=100,
        patience=5,
    ),
    # The same steps on generated scenes, starting from heads trained before; two cores, nothing to download.
    "retrieval_finetune_small": dict(
        source="scenes",
        data_dir="data/scenes",
        test_splits=("test", "novel"),
        image_size=112,
        image_tower="efficientnet_lite0",
        text_tower="minilm",
        text_head="linear",
        augment_jitter=0.2,
        **FINE_TUNING,
        num_epochs=2,
        batch_size=32,
        learning_rate=5e-4,
        image_tower_learning_rate=5e-4,
        warmup_steps=20,
        precision="fp32",
    ),
    # The documented lab: ResNet50 against frozen CLIP text embeddings on COCO 2014.
    "coco_resnet50": {},
}

FAST_RUN: dict[str, Any] = dict(max_samples=64, num_epochs=2, batch_size=32, warmup_steps=2)
"""Overrides with which any preset runs every section in well under a minute."""

ALIASES: dict[str, str] = {
    "InfoNCELoss": "infonce",
    "softmax_infonce": "infonce",
    "info_nce": "infonce",
    "queue_infonce": "infonce",
    "sigmoid_infonce": "sigmoid",
}
"""Other documented names of the losses; `queue_infonce` also sets `negatives: queue`."""

_HEADS = ("mlp", "linear", "standardised", "identity", "projection", "siglip", "clip", "attention")

NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "preset": ("core.presets.PRESETS", tuple(PRESETS)),
    "source": (
        "sources.fetch.SOURCES",
        ("coco2014", "coco2017", "flickr30k", "flickr8k", "cifar100", "scenes", "shapes"),
    ),
    "reader": (
        "sources.readers.READERS",
        (
            "coco",
            "flickr8k",
            "flickr30k",
            "json",
            "sidecar",
            "class_folders",
            "pairs",
            "paired_cifar",
        ),
    ),
    "image_tower": (
        "towers.image.IMAGE_TOWERS",
        ("resnet50", "efficientnet_lite0", "siglip", "clip", "vit", "embeddings", "vit_pair"),
    ),
    "text_tower": (
        "towers.text.TEXT_TOWERS",
        ("minilm", "clip", "e5", "sentence", "transformer", "embeddings"),
    ),
    "image_head": ("models.HEADS", _HEADS),
    "text_head": ("models.HEADS", _HEADS),
    "loss": ("losses.LOSSES", ("infonce", "sigmoid", "contrastive", "triplet")),
    "schedule": ("training.optim.SCHEDULES", ("cosine", "linear", "constant", "step", "restarts")),
    "best_metric": (
        "retrieval.figures.DIRECTIONS",
        tuple(
            "recall ndcg mrr map r_precision rsum image_spread text_spread top1 top10 top100 top1_same top1_different "
            "order val_loss mean_rank median_rank swapped modality_gap alignment image_uniformity "
            "text_uniformity".split()
        ),
    ),
    "device": ("", ("auto", "cpu", "cuda", "mps")),
}
"""Fields whose value is a name in a table: the table, and its names without importing it."""
