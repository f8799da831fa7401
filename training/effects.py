"""When each setting has an effect; settings that would only change a run's name are refused."""

from __future__ import annotations

import re
from collections.abc import Callable

from config import KINDS, Config, make_config
from core.errors import LabError, nearest, shown
from core.presets import FAST_RUN, NAMES

Condition = Callable[[Config], bool]


def _named(field: str, *names: str) -> Condition:
    """Whether a field has one of these names, or a name of the user's own, which may read any setting."""
    own = NAMES[field][1]
    return lambda config: config[field] in names or config[field] not in own


def _head(*names: str) -> Condition:
    image, text = _named("image_head", *names), _named("text_head", *names)
    return lambda config: image(config) or text(config)


def _is_trained(side: str) -> Condition:
    return lambda config: config[f"{side}_tower_mode"] == "trainable"


def _both(one: Condition, other: Condition) -> Condition:
    return lambda config: one(config) and other(config)


def _has_own_temperature(config: Config) -> bool:
    is_clip = config.image_tower == "clip" and config.image_weights != "random"
    return is_clip and config.image_head == config.text_head == "identity"


VIT, TRANSFORMER = _named("image_tower", "vit", "vit_pair"), _named("text_tower", "transformer")

NEEDS: tuple[tuple[str, Condition, str], ...] = (
    (
        "different_class_prob pairs_per_epoch swap_weight swap_margin",
        lambda c: c.reader == "paired_cifar",
        "reader 'paired_cifar' (side-by-side images)",
    ),
    (
        "captions_per_image balance_by image_resize augment_swap_sides augment_word_dropout augment_reorder "
        "max_caption_variations mining mining_neighbour_batches",
        lambda c: c.reader != "paired_cifar",
        "captioned images, not the side-by-side images of reader 'paired_cifar'",
    ),
    (
        "karpathy_file",
        _named("reader", "auto", "coco", "flickr8k", "flickr30k"),
        "reader auto, coco, flickr8k or flickr30k",
    ),
    ("swap_margin", lambda c: c.swap_weight > 0, "swap_weight above 0"),
    ("min_per_category max_per_category", lambda c: c.balance_by != "none", "balance_by 'category'"),
    (
        "augment_crop_scale augment_flip augment_jitter augment_rotation augment_erasing",
        lambda c: c.image_tower_mode != "cached",
        "image_tower_mode 'frozen' or 'trainable': a cached tower encodes each image once",
    ),
    ("augment_swap_sides", lambda c: c.augment_flip > 0, "augment_flip above 0"),
    (
        "augment_swap_sides augment_word_dropout augment_reorder",
        lambda c: c.text_tower_mode != "cached",
        "text_tower_mode 'frozen' or 'trainable': captions are cached features",
    ),
    (
        "max_caption_variations",
        lambda c: c.augment_word_dropout > 0 or c.augment_reorder > 0,
        "augment_word_dropout or augment_reorder above 0",
    ),
    ("image_weights", lambda c: c.image_tower != "embeddings", "an image_tower other than 'embeddings'"),
    ("text_model", lambda c: c.text_tower != "embeddings", "a text_tower other than 'embeddings'"),
    (
        "image_patch_size image_num_layers image_num_heads image_mlp_ratio image_dropout",
        VIT,
        "image_tower 'vit' or 'vit_pair'",
    ),
    (
        "image_width",
        _named("image_tower", "vit", "vit_pair", "embeddings"),
        "image_tower 'vit', 'vit_pair' or 'embeddings'",
    ),
    (
        "text_num_layers text_num_heads text_mlp_ratio text_dropout",
        TRANSFORMER,
        "text_tower 'transformer'",
    ),
    (
        "text_width",
        _named("text_tower", "transformer", "embeddings"),
        "text_tower 'transformer' or 'embeddings'",
    ),
    (
        "image_dropout image_freeze_layers image_tower_learning_rate freeze_batch_norm",
        _is_trained("image"),
        "image_tower_mode 'trainable'",
    ),
    (
        "text_dropout text_freeze_layers text_tower_learning_rate",
        _is_trained("text"),
        "text_tower_mode 'trainable'",
    ),
    (
        "freeze_tower_epochs",
        lambda c: "trainable" in (c.image_tower_mode, c.text_tower_mode),
        "a tower in mode 'trainable'",
    ),
    ("use_batch_norm", lambda c: c.image_head != "identity", "image_head 'mlp' or 'linear'"),
    ("head_hidden_dim", _head("mlp", "clip", "attention"), "a head 'mlp', 'clip' or 'attention'"),
    (
        "head_dropout",
        lambda c: not c.freeze_projections and not c.image_head == c.text_head == "identity",
        "a head that is trained",
    ),
    ("head_num_heads head_num_layers head_num_tokens", _head("attention"), "a head 'attention'"),
    ("use_layer_norm", _head("mlp"), "a head 'mlp'"),
    (
        "temperature learn_temperature",
        _named("loss", "infonce", "sigmoid"),
        "loss 'infonce' or 'sigmoid': the others compare cosines",
    ),
    (
        "temperature",
        lambda c: not _has_own_temperature(c),
        "another head than 'identity': a pretrained CLIP has its own temperature",
    ),
    ("label_smoothing focal_gamma", _named("loss", "infonce"), "loss 'infonce'"),
    ("logit_bias", _named("loss", "sigmoid"), "loss 'sigmoid'"),
    ("margin", _named("loss", "contrastive", "triplet"), "loss 'contrastive' or 'triplet'"),
    ("num_hard_negatives", _named("loss", "contrastive"), "loss 'contrastive'"),
    ("triplet_mining triplet_warmup_epochs", _named("loss", "triplet"), "loss 'triplet'"),
    ("triplet_warmup_epochs", lambda c: c.triplet_mining != "mean", "triplet_mining other than 'mean'"),
    ("queue_size", lambda c: c.negatives == "queue", "negatives 'queue'"),
    (
        "bank_refresh_steps",
        lambda c: c.negatives == "bank" and c.text_head != "identity" and not c.freeze_projections,
        "negatives 'bank' and a text_head that is trained",
    ),
    ("num_mined", lambda c: c.mining != "none", "mining 'random' or 'semantic'"),
    (
        "mining_refresh_epochs",
        lambda c: c.mining != "none" or c.mining_neighbour_batches,
        "mining or mining_neighbour_batches",
    ),
    ("mining_margin", lambda c: c.mining == "semantic", "mining 'semantic'"),
    ("warmup_steps", lambda c: c.warmup_epochs is None, "warmup_epochs None, which replaces it"),
    ("warmup_epochs", lambda c: (c.warmup_epochs or 0) < c.num_epochs, "more epochs than that in num_epochs"),
)
"""Fields, when they have an effect, and what they need for it; of several rows, all must hold."""

ALWAYS = frozenset(
    "reader use_attention_pooling split_seed train_splits val_splits max_samples image_size image_tower "
    "image_tower_mode text_tower text_tower_mode start_from image_head text_head embed_dim freeze_projections "
    "loss negatives num_epochs batch_size learning_rate weight_decay schedule max_grad_norm ema_decay patience "
    "best_metric eval_every interpolate_weights".split()
)
"""Fields of a run's name that always have an effect."""


def check(config: Config) -> None:
    """Refuse settings that a run would not read.

    Only values that differ from the default and from the preset are looked at, so that one flag of a preset can be
    changed alone. Raises: LabError naming the field and what it needs.
    """
    base = make_config(config.preset)
    for fields, has_effect, needed in NEEDS:
        for field in fields.split() if not has_effect(config) else ():
            value = config[field]
            if value not in (Config.model_fields[field].default, base[field], FAST_RUN.get(field)):
                raise LabError(
                    f"{field} {shown(value)} has no effect here: it needs {needed}; leave it at "
                    f"{shown(base[field])}."
                )


def check_metric(config: Config) -> None:
    """Refuse a best_metric that validation does not measure. Raises: LabError naming the nearest one that it does."""
    if re.sub(KINDS["best_metric"], "", config.best_metric) not in NAMES["best_metric"][1]:
        return  # the user's own
    if config.reader == "paired_cifar":
        figures = "top1 top10 top100 top1_same top1_different order swapped".split()
    else:
        ks = [f"recall@{k}" for k in config.recall_ks] + [f"ndcg@{max(config.recall_ks)}"]
        ranks = [*ks, "mrr", "map", "r_precision", "mean_rank", "median_rank"]
        figures = [f"{way}_{figure}" for way in ("i2t", "t2i") for figure in ranks]
        figures += (
            "rsum modality_gap alignment image_spread text_spread image_uniformity text_uniformity".split()
        )
    if config.best_metric not in (*figures, "val_loss"):
        hint = nearest(config.best_metric, figures) or "."
        raise LabError(
            f"best_metric {config.best_metric!r} is no figure of reader {config.reader!r} with recall_ks "
            f"{config.recall_ks}{hint} Choose one of: val_loss, {', '.join(figures)}."
        )
