"""Settings without effect are refused, one sentence each, and none is forgotten."""

import pytest

from config import FLAGS, NOT_IN_NAME, Config, make_config, run_name
from core.errors import LabError
from core.presets import PRESETS
from models import HEADS, mlp_head
from training.effects import ALWAYS, NEEDS, check, check_metric

CONDITIONAL = {field for fields, _, _ in NEEDS for field in fields.split()}
OUTSIDE = NOT_IN_NAME - {"karpathy_file"}  # where and how fast a run is computed, and what is read again


def test_each_field_has_an_effect_or_its_condition():
    assert set(Config.model_fields) == ALWAYS | CONDITIONAL | OUTSIDE
    assert not ALWAYS & CONDITIONAL
    assert not (ALWAYS | CONDITIONAL) & OUTSIDE


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fast_run", [False, True])
def test_presets_and_their_flags_have_effects(preset, fast_run):
    config = make_config(preset, fast_run=fast_run)
    check(config)
    check_metric(config)
    for flag in FLAGS:
        if (flag, config.image_head) != ("use_batch_norm", "identity"):
            check(config.updated(**{flag: True}))


REFUSED = [
    ("paired_small", dict(mining="random")),
    ("paired_small", dict(captions_per_image=2)),
    ("paired_small", dict(balance_by="category")),
    ("paired_small", dict(augment_word_dropout=0.1)),
    ("paired_small", dict(image_resize="squash")),
    ("paired_small", dict(warmup_steps=7)),
    ("quickstart", dict(different_class_prob=0.1)),
    ("quickstart", dict(swap_weight=0.1)),
    ("quickstart", dict(warmup_epochs=4)),
    ("quickstart", dict(karpathy_file="k.json", reader="sidecar")),
    ("paired_small", dict(swap_margin=0.1)),
    ("flickr8k", dict(augment_jitter=0.1)),
    ("flickr8k", dict(augment_crop_scale=0.5)),
    ("flickr8k", dict(augment_flip=0.5)),
    ("flickr8k", dict(augment_rotation=5)),
    ("flickr8k", dict(augment_erasing=0.5)),
    ("flickr8k", dict(image_freeze_layers=2)),
    ("flickr8k", dict(image_tower_learning_rate=1e-4)),
    ("flickr8k", dict(freeze_batch_norm=True)),
    ("flickr8k", dict(freeze_tower_epochs=1)),
    ("quickstart", dict(image_freeze_layers=2, image_tower_mode="frozen")),
    ("quickstart", dict(text_freeze_layers=2)),
    ("quickstart", dict(text_dropout=0.1)),
    ("quickstart", dict(augment_swap_sides=True)),
    ("quickstart", dict(augment_reorder=0.1)),
    ("quickstart", dict(max_caption_variations=3)),
    ("quickstart", dict(min_per_category=3)),
    ("quickstart", dict(image_width=64)),
    ("quickstart", dict(text_num_layers=2)),
    ("clip_from_scratch_small", dict(image_dropout=0.1, image_tower_mode="frozen")),
    ("projection_heads", dict(image_weights="w.pt", image_tower="embeddings")),
    ("retrieval_finetune", dict(use_batch_norm=True)),
    ("retrieval_finetune", dict(temperature=0.05)),
    ("retrieval_finetune", dict(head_dropout=0.1)),
    ("quickstart", dict(head_num_tokens=4)),
    ("projection_heads", dict(use_layer_norm=True, text_head="linear")),
    ("quickstart", dict(head_hidden_dim=64, image_head="linear")),
    ("flickr8k", dict(temperature=0.1, loss="contrastive")),
    ("flickr8k", dict(learn_temperature=True, loss="triplet")),
    ("flickr8k", dict(label_smoothing=0.1, loss="sigmoid")),
    ("flickr8k", dict(focal_gamma=1, loss="triplet")),
    ("flickr8k", dict(logit_bias=-3)),
    ("flickr8k", dict(margin=0.1)),
    ("flickr8k", dict(num_hard_negatives=2, loss="triplet")),
    ("flickr8k", dict(triplet_mining="mean")),
    ("flickr8k", dict(triplet_warmup_epochs=2, loss="triplet", triplet_mining="mean")),
    ("flickr8k", dict(queue_size=64)),
    ("flickr8k", dict(bank_refresh_steps=2)),
    ("quickstart", dict(bank_refresh_steps=2, negatives="bank", text_head="identity")),
    ("flickr8k", dict(num_mined=2)),
    ("flickr8k", dict(mining_refresh_epochs=2)),
    ("flickr8k", dict(mining_margin=0.9, mining="random")),
]


@pytest.mark.parametrize(("preset", "settings"), REFUSED)
def test_a_setting_without_effect_is_refused(preset, settings):
    config, field = make_config(preset, **settings), next(iter(settings))
    assert run_name(config) != run_name(make_config(preset)) or field == "karpathy_file"
    with pytest.raises(LabError, match=f"^{field} .* has no effect here: it needs .*; leave it at "):
        check(config)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("flickr8k", dict(loss="queue_infonce", queue_size=64)),
        ("flickr8k", dict(loss="triplet", margin=0.1, triplet_mining="semi_hard", triplet_warmup_epochs=2)),
        ("flickr8k", dict(loss="contrastive", num_hard_negatives=2)),  # the preset's label_smoothing stays
        ("flickr8k", dict(negatives="bank", bank_refresh_steps=2)),
        ("flickr8k", dict(image_head="attention", head_num_tokens=4)),
        ("paired_small", dict(swap_weight=1, swap_margin=0.1, warmup_epochs=None, warmup_steps=7)),
        ("quickstart", dict(text_tower_mode="frozen", augment_reorder=0.5, max_caption_variations=3)),
        ("quickstart", dict(warmup_epochs=3)),
        ("clip_from_scratch_small", dict(image_dropout=0.1, text_dropout=0.1, image_freeze_layers=1)),
    ],
)
def test_a_setting_with_its_condition_is_taken(preset, settings):
    check(make_config(preset, **settings))


def test_what_a_user_adds_may_read_any_setting(monkeypatch):
    monkeypatch.setitem(HEADS, "deep", mlp_head)
    check(make_config("quickstart", image_head="deep", head_num_tokens=4, use_batch_norm=True))


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("quickstart", dict(best_metric="i2t_recall@3")),
        ("quickstart", dict(best_metric="recall@1")),
        ("quickstart", dict(best_metric="top1")),
        ("paired_small", dict(best_metric="rsum")),
        ("quickstart", dict(best_metric="t2i_ndcg@5")),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_before_training(preset, settings):
    with pytest.raises(LabError, match="best_metric .* is no figure of reader"):
        check_metric(make_config(preset, **settings))
