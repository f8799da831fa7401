"""The experiment as one flat `Config`, and the name of its run."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import core.threads  # noqa: F401  read when torch is imported

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from core.errors import LabError, choose, nearest, shown
from core.field_types import (
    Cosine,
    Count,
    CountOrZero,
    Dropout,
    Layers,
    LearningRate,
    NameOrPath,
    Place,
    Probability,
    Ratio,
    SomeSplits,
    Splits,
    Trackers,
    Weight,
    Width,
    explain,
)
from core.files import write_text
from core.presets import FAST_RUN, NAMES, PRESETS, START
from core.settings_files import current, former, read_settings, unknown


class Config(BaseModel):
    """All settings of an experiment, in one level; works like an object and like a dictionary.

    `config.batch_size = 64` and `config["batch_size"] = 64` are the same; both check the value.
    Raises: LabError for an unknown field (with the most similar name) or a wrong value.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    # --- experiment ---
    preset: str = "coco_resnet50"
    """Preset that these settings started from; set by make_config."""
    settings_file: str | None = Field(None, pattern=r"^[\w-]{1,60}:[0-9a-f]{6}$")
    """Settings file that names the run instead of the preset, and a digest of it; set by load_config."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of initial weights, data order, dropout and augmentation."""
    split_seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the split by image, for data without a split of its own; independent of `seed`, so that runs
    with different seeds are tested on the same images."""

    # --- flags ---
    use_batch_norm: bool = False
    """BatchNorm after each linear layer of the image head."""
    use_attention_pooling: bool = False
    """Learned softmax weights over the positions of the feature map instead of average pooling."""

    # --- folders (not part of a run's name) ---
    data_dir: Place = Path("data/coco2014")
    """Folder the data are read from."""
    cache_dir: Place = Path("cache")
    """Folder for decoded images and encoded features."""
    runs_dir: Place = Path("runs")
    """Folder for runs, one subfolder per run."""
    checkpoint_dir: Place | None = None
    """Folder for checkpoints, such as a mounted Drive, one subfolder per run; none: inside the run's folder."""

    # --- data ---
    source: str | None = "coco2014"
    """What to download if data_dir is missing, a name in sources.fetch.SOURCES, or `scenes` or `shapes` to generate
    images."""
    reader: str = "auto"
    """Layout of data_dir, a name in sources.readers.READERS; auto: recognized by its files. A run keeps the reader
    that was recognized, as in `auto:json`."""
    karpathy_file: Place | None = None
    """dataset_coco.json or dataset_flickr30k.json with Karpathy's split; none: the data's own split."""
    annotation_file: Place | None = None
    """Caption file of readers `table`, `json`, `flickr8k` and `flickr30k`; none: the one each reader looks for."""
    image_column: str | None = None
    """Column of the images' paths (reader `table` only); none: guessed where that is unambiguous, and printed."""
    caption_column: str | None = None
    """Column of the captions (reader `table` only); none: guessed in the same way."""
    split_column: str | None = None
    """Column of the splits (reader `table` only); none: guessed in the same way."""
    image_root: Place | None = None
    """Folder outside data_dir that links and absolute image paths may lead to; for pre-encoded embeddings
    the folder of their images."""
    train_splits: SomeSplits = ("train",)
    """Splits to train on."""
    val_splits: SomeSplits = ("val",)
    """Splits that the best epoch is chosen on."""
    test_splits: Splits = ("val",)
    """Splits evaluated after training, each on its own."""
    max_samples: Count | None = None
    """Use at most this many images of each split, for a quick test."""
    captions_per_image: Count | None = None
    """Captions sampled per image for each training batch; none: all of them."""
    image_size: int = Field(224, ge=1, le=4096)
    """Side of the square image in pixels."""
    image_resize: Literal["crop", "squash"] = "crop"
    """Center crop of the shorter side, or both sides resized to the square."""
    different_class_prob: Probability = 0.5
    """Side-by-side images: probability that left and right are of different classes."""
    pairs_per_epoch: Count | None = None
    """Side-by-side images: pairs sampled per epoch; none: one per image."""
    balance_by: Literal["none", "category"] = "none"
    """Sample training images so that all categories are equally frequent."""
    min_per_category: Count = 2
    """When balancing, leave out categories with fewer training images."""
    max_per_category: Count | None = None
    """When balancing, use at most this many training images of a category per epoch; none: the median."""

    # --- augmentation of training images ---
    augment_crop_scale: float = Field(1.0, gt=0, le=1)
    """Smallest area of a random resized crop; 1 is off."""
    augment_flip: Probability = 0.0
    """Probability of a horizontal flip; leave 0 if captions contain left and right."""
    augment_jitter: float = Field(0.0, ge=0, le=10)
    """Strength of brightness, contrast and saturation jitter."""
    augment_rotation: float = Field(0.0, ge=0, le=180)
    """Largest rotation in degrees."""
    augment_erasing: Probability = 0.0
    """Probability that a random rectangle is erased."""
    augment_swap_sides: bool = False
    """Swap the words left and right in the captions of a flipped image; otherwise such images are not
    flipped. Needs captions that are not cached."""

    # --- augmentation of training captions (not for a cached text tower) ---
    augment_word_dropout: Dropout = 0.0
    """Probability that a word is removed."""
    augment_reorder: Probability = 0.0
    """Probability that the clauses of a caption are reordered."""
    max_caption_variations: Count = 1
    """Largest number of variations per caption, including the caption itself."""

    # --- image tower ---
    image_tower: str = "resnet50"
    """Image encoder, a name in towers.image.IMAGE_TOWERS."""
    image_tower_mode: Literal["trainable", "frozen", "cached"] = "trainable"
    """Trained, run without gradients, or run once with its features cached."""
    image_weights: NameOrPath = "pretrained"
    """`pretrained`, `random`, a weights file, or a Hugging Face hub name or folder."""
    image_patch_size: int = Field(16, ge=1, le=4096)
    """Patch size in pixels (`vit` and `vit_pair` only)."""
    image_width: Width = 768
    """Width of the tokens (`vit` and `vit_pair` only)."""
    image_num_layers: Layers = 12
    """Transformer blocks (`vit` and `vit_pair` only)."""
    image_num_heads: Layers = 12
    """Attention heads (`vit` and `vit_pair` only)."""
    image_mlp_ratio: Ratio = 4.0
    """Hidden width of a block's MLP divided by its width (`vit` and `vit_pair` only)."""
    image_dropout: Dropout = 0.0
    """Dropout (`vit` and `vit_pair` only)."""
    image_freeze_layers: CountOrZero = 0
    """First layers of a trainable image tower that stay frozen; the embedding counts with the first."""

    # --- text tower ---
    text_tower: str = "clip"
    """Text encoder, a name in towers.text.TEXT_TOWERS."""
    text_tower_mode: Literal["trainable", "frozen", "cached"] = "cached"
    """Trained, run without gradients, or run once with its features cached."""
    text_model: NameOrPath | None = None
    """Hugging Face hub name or folder for the text tower; none: the tower's default."""
    text_width: Width = 512
    """Width of the tokens (`transformer` only)."""
    text_num_layers: Layers = 8
    """Transformer blocks (`transformer` only)."""
    text_num_heads: Layers = 8
    """Attention heads (`transformer` only)."""
    text_mlp_ratio: Ratio = 4.0
    """Hidden width of a block's MLP divided by its width (`transformer` only)."""
    text_dropout: Dropout = 0.0
    """Dropout (`transformer` only)."""
    text_freeze_layers: CountOrZero = 0
    """First layers of a trainable text tower that stay frozen; the embedding counts with the first."""

    # --- starting point ---
    start_from: Place | None = None
    """Folder of a finished run whose weights are the initial ones; none: the towers' own."""

    # --- heads ---
    image_head: str = "mlp"
    """Projection head of the image side, a name in models.HEADS."""
    text_head: str = "identity"
    """Projection head of the text side, a name in models.HEADS; `identity` uses the text tower's space as the joint
    space."""
    embed_dim: Width = 512
    """Width of the joint space."""
    head_hidden_dim: Width = 1024
    """Width of the heads' hidden layer."""
    head_dropout: Dropout = 0.0
    """Dropout in the heads."""
    head_num_heads: Layers = 8
    """Attention heads (head `attention` only)."""
    head_num_layers: Layers = 2
    """Self-attention layers (head `attention` only)."""
    head_num_tokens: Layers = 8
    """Tokens that an embedding is split into (head `attention` only)."""
    use_layer_norm: bool = False
    """LayerNorm at the end (head `mlp` only)."""
    freeze_projections: bool = False
    """Do not train the heads, nor a pretrained CLIP's own projections."""

    # --- loss ---
    loss: str = "infonce"
    """Training loss, a name in losses.LOSSES."""
    temperature: float = Field(0.07, ge=0.01, le=100)
    """Initial softmax temperature; the model stores ln(1/temperature) as logit_scale. A pretrained CLIP with
    heads `identity` uses its own."""
    learn_temperature: bool = False
    """Train the temperature, clamped at 1/100."""
    label_smoothing: Dropout = 0.0
    """Share of each target that is spread over the whole batch."""
    logit_bias: float | None = Field(None, ge=-1000, le=1000)
    """Initial bias of loss `sigmoid`, always trained; none: the log odds of a match in a batch."""
    negatives: Literal["batch", "queue", "bank"] = "batch"
    """Negatives besides those of the batch: none, recent features, or every training caption."""
    queue_size: Count = 4096
    """Images, and as many captions, whose recent features are kept (negatives `queue` only)."""
    bank_refresh_steps: Count = 20
    """Steps between encodings of all captions while the text head is trained (negatives `bank` only)."""
    margin: Cosine = 0.5
    """Loss `triplet`: how much nearer a match must be than a negative, cosine; loss `contrastive`: smallest
    cosine distance of a negative."""
    num_hard_negatives: Count = 3
    """Hardest negatives of the batch that count for each query (loss `contrastive` only)."""
    focal_gamma: Weight = 0.0
    """Softmax losses: weight queries by (1 - probability of their match) to this power; 0 is off."""
    triplet_mining: Literal["mean", "semi_hard", "hardest"] = "hardest"
    """Which negatives count (loss `triplet` only)."""
    triplet_warmup_epochs: CountOrZero = 1
    """Epochs with the mean of all negatives before only the hardest count (loss `triplet` only; Faghri et
    al. 2018)."""
    swap_weight: Weight = 0.0
    """Side-by-side images: weight of a margin loss against the caption with left and right swapped."""
    swap_margin: Cosine = 0.2
    """Side-by-side images: how much nearer the correct order must be than the swapped one, cosine."""

    # --- mined negatives ---
    mining: Literal["none", "random", "semantic"] = "none"
    """Extra captions added to a batch as negatives: none, random ones, or the nearest wrong ones under the
    current model."""
    num_mined: Count = 3
    """Mined captions per image."""
    mining_refresh_epochs: Count = 1
    """Epochs between minings."""
    mining_margin: float = Field(0.95, gt=0, le=1)
    """Candidates that score above this share of the match's score are assumed to be matches and left out."""
    mining_neighbour_batches: bool = False
    """Put images that are near one another under the current model into the same batch."""

    # --- optimization ---
    num_epochs: Count = 10
    """Passes over the training images."""
    batch_size: Count = 128
    """Images per step; each comes with its captions."""
    learning_rate: LearningRate = 1e-4
    """Peak learning rate of AdamW; of the heads and projections if towers have their own."""
    image_tower_learning_rate: LearningRate | None = None
    """Peak learning rate of a trainable image tower; none: learning_rate."""
    text_tower_learning_rate: LearningRate | None = None
    """Peak learning rate of a trainable text tower; none: learning_rate."""
    freeze_tower_epochs: CountOrZero = 0
    """First epochs in which trainable towers are frozen and only the heads are trained."""
    freeze_batch_norm: bool = False
    """Freeze the BatchNorm statistics of a trainable image tower; micro-batches then give the same gradients
    as the whole batch."""
    gradient_checkpointing: bool = False
    """Recompute a transformer tower's activations in the backward pass: less memory, a third more time."""
    weight_decay: Weight = 0.01
    """Weight decay of AdamW; not applied to norms, biases and the temperature."""
    warmup_steps: CountOrZero = 500
    """Steps of linear warm-up, at most a tenth of the run."""
    warmup_epochs: float | None = Field(None, ge=0, le=10**6)
    """Epochs of linear warm-up instead of steps; none: warmup_steps."""
    schedule: str = "cosine"
    """Learning-rate schedule, a name in training.optim.SCHEDULES."""
    max_grad_norm: float = Field(1.0, gt=0, le=10**9)
    """Gradients are clipped to this norm."""
    ema_decay: Dropout = 0.0
    """Decay of the running average of weights and BatchNorm statistics that is validated and saved; 0 is
    off."""
    patience: Count | None = None
    """Stop after this many validations without improvement of best_metric; none: never."""
    best_metric: str = "rsum"
    """Validation metric that chooses the best epoch; rsum is the sum of the six recalls."""
    eval_every: Count = 1
    """Epochs between validations; the last epoch is always validated."""
    interpolate_weights: bool = False
    """After training, keep the mixture of initial and best weights with the best validation metric (WiSE-
    FT)."""

    # --- machine (not part of a run's name) ---
    device: str = "auto"
    """Device; auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that supports it, fp16 on older GPUs, fp32 on a CPU. bf16 on a CPU is slow without
    AVX512-BF16 or AMX instructions."""
    micro_batch_size: Count | None = None
    """Images that pass through the towers at once; the loss still sees the whole batch, in two passes (Gao
    et al. 2021). Accumulating gradients over small batches would not add negatives. None: the whole batch,
    halved when memory runs out."""
    deterministic: bool = False
    """Only algorithms that give identical results every time, also on a GPU."""
    num_workers: CountOrZero = 0
    """Loader processes; the image cache rarely needs one."""
    checkpoint_minutes: float = Field(1.0, gt=0, le=10**6)
    """Minutes between checkpoints within an epoch."""
    keep_every_epochs: Count | None = None
    """Also keep the weights and a whole checkpoint of every this many epochs; none: only the best weights."""
    trackers: Trackers = ()
    """Experiment trackers that also log the history, such as tensorboard,wandb; empty: none."""

    # --- evaluation (not part of a run's name) ---
    recall_ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 5, 10)
    """The K of Recall@K."""

    @field_validator(*NAMES)
    @classmethod
    def _check_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        field = str(info.field_name)
        kind, names = re.sub(KINDS.get(field, "^$"), "", value or ""), choices(field)
        if value is not None and kind not in names:
            hint = nearest(value, [value.replace(kind, name) for name in names if name]) or "."
            known = ", ".join(sorted(map(str, names)))
            raise LabError(f"{field} {shown(value)} does not exist{hint} Choose one of: {known}.")
        return value

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**current(values))
        except ValidationError as error:
            raise _explained(error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields or (name == "preset" and value != self.preset):
            raise LabError(_unknown(name))
        try:
            for field, setting in current({name: value}).items():
                super().__setattr__(field, setting)
        except ValidationError as error:
            raise _explained(error) from None

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields:
            raise LabError(_unknown(name))
        return getattr(self, name)

    __setitem__ = __setattr__

    def keys(self) -> Iterator[str]:
        """Names of the fields; `dict(**config)` uses them."""
        return iter(type(self).model_fields)

    def updated(self, **overrides: Any) -> Config:
        """A copy with some fields changed; raises LabError as an assignment does."""
        if overrides.get("preset", self.preset) != self.preset:
            raise LabError(_unknown("preset"))
        return Config(**{**self.model_dump(), **current(overrides)})

    def differences(self, other: Config | None = None) -> dict[str, tuple[Any, Any]]:
        """Fields that differ: name -> (value here, value in `other`); `other` is DEFAULT_CONFIG if not given."""
        other = other or DEFAULT_CONFIG
        names = [name for name in self.keys() if _compared(self, name) != _compared(other, name)]
        return {name: (self[name], other[name]) for name in names}

    def changes(self) -> dict[str, Any]:
        """Fields that differ from the preset's, as JSON values."""
        values = self.model_dump(mode="json") | {"reader": self.reader.partition(":")[0]}
        changed = self.differences(make_config(self.preset)).keys() - {"settings_file"}
        return {name: values[name] for name in values if name in changed}

    def split_groups(self) -> list[tuple[str, ...]]:
        """The splits in use: those for training together, those for validation together, each test split."""
        tests = ((name,) for name in self.test_splits)
        return list(dict.fromkeys((self.train_splits, self.val_splits, *tests)))

    def save(self, path: str | Path) -> Path:
        """Write a YAML file that `load_config` reads."""
        return write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def _compared(config: Config, name: str) -> Any:
    """A field's value as it is compared: `coco`, the default of earlier runs, and `auto:json` count as `auto`."""
    if name != "reader":
        return config[name]
    reader = config.reader.partition(":")[0]
    return "auto" if reader == "coco" else reader


def _unknown(name: str) -> str:
    if name in ("preset", "base_data_dir"):
        return f"{name} cannot be changed in a configuration; pass it to make_config(PRESET, ...)."
    return unknown(name, list(Config.model_fields))


def _explained(error: ValidationError) -> LabError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        return LabError(_unknown(name))
    return LabError(explain(name, first, Config.model_fields.get(name)))


GROUPS = {
    "preset": "experiment",
    "use_batch_norm": "flags",
    "data_dir": "folders (not part of a run's name)",
    "source": "data",
    "augment_crop_scale": "augmentation of training images",
    "augment_word_dropout": "augmentation of training captions (not for a cached text tower)",
    "image_tower": "image tower",
    "text_tower": "text tower",
    "start_from": "starting point",
    "image_head": "heads",
    "loss": "loss",
    "mining": "mined negatives",
    "num_epochs": "optimization",
    "device": "machine (not part of a run's name)",
    "recall_ks": "evaluation (not part of a run's name)",
}
"""The first field of each group of fields, and the title of the group."""

KINDS = {"best_metric": r"^(i2t|t2i)_|@\d+$", "device": r":\d+$", "reader": r"^auto:"}
"""Parts that a value may have in addition to a name in `choices`."""


def choices(field: str) -> tuple[Any, ...]:
    """Values of a field that can be listed, with those that were added to the table of its names; otherwise ()."""
    annotation = Config.model_fields[field].annotation
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    table, names = NAMES.get(field, ("", ()))
    module, _, name = table.rpartition(".")  # not imported here: whoever adds a name imports it
    none = [None] * (names != () and Config.model_fields[field].default is None)
    return tuple(dict.fromkeys([*none, *names, *getattr(sys.modules.get(module), name, ())]))


FLAGS: dict[str, str] = {"use_batch_norm": "bn", "use_attention_pooling": "attn"}
"""The flags that are part of a run's name, and their short forms."""

NOT_IN_NAME = frozenset(
    "preset settings_file seed source data_dir cache_dir runs_dir checkpoint_dir karpathy_file annotation_file "
    "image_column caption_column split_column image_root test_splits device precision micro_batch_size "
    "deterministic gradient_checkpointing num_workers checkpoint_minutes keep_every_epochs trackers recall_ks".split()
)
"""Fields that are not part of a run's name: folders, machine, and what is only reported."""


def make_config(
    preset: str = START, *, fast_run: bool = False, base_data_dir: str | Path | None = None, **overrides: Any
) -> Config:
    """The configuration of a preset, with `overrides`.

    Args: base_data_dir: folder that data_dir, cache_dir, runs_dir and image_root are relative to.
    Raises: LabError for an unknown preset or field, or a wrong value.
    """
    preset_values = choose(PRESETS, preset, "preset")
    config = Config(preset=preset, **{**preset_values, **(FAST_RUN if fast_run else {}), **overrides})
    if base_data_dir is not None:
        base = Config(data_dir=base_data_dir).data_dir
        for place in ("data_dir", "cache_dir", "runs_dir", "image_root"):
            config[place] = config[place] and base / config[place]
    return config


def run_file(folder: str | Path) -> Path:
    """The configuration file of a run. Raises: LabError if the folder is missing or is not a run's."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        known = sorted(path.parent.name for path in Path(folder).parent.glob("*/config.yaml"))
        hint = f"; runs beside it: {', '.join(known)}" if known else ""
        raise LabError(f"{folder} is not a run's folder (no config.yaml){hint}.")
    return path


def load_config(path: str | Path, **overrides: Any) -> Config:
    """Read a YAML or JSON file, flat or with one level of sections; it starts from its `preset`, or `quickstart`.

    Names of other labs are read too, see core/aliases.yaml. A run of exactly these settings is named after the file,
    unless that is called config or best_config.
    Raises: LabError if the file is missing, not a mapping, or contains an unknown field or one twice.
    """
    values = read_settings(path, [*Config.model_fields, *former(), "base_data_dir", "fast_run"])
    config = make_config(**{**values, **overrides})
    name = re.sub(r"[^\w-]+", "_", Path(path).stem)[:60]
    if "settings_file" not in values and name not in ("config", "best_config"):
        config.settings_file = f"{name}:{settings_digest(make_config(**values))}"
    return config


def _changed(config: Config) -> dict[str, Any]:
    """The fields that change results, other than flags, where they differ from the preset's."""
    return {name: value for name, value in config.changes().items() if name not in {*NOT_IN_NAME, *FLAGS}}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


def settings_digest(config: Config) -> str:
    """Digest of the preset and of everything else that changes results, flags and seed aside."""
    return _digest([config.preset, _changed(config)])


def run_name(config: Config) -> str:
    """Name of the run's folder: `{preset}{flags}[_{hash of the other fields that change results}]_s{seed}`.

    The name of a settings file stands in place of the preset, and without a hash where nothing else is changed.
    """
    flags = "".join(f"_{short}" for field, short in FLAGS.items() if config[field])
    changed = _changed(config)
    file, _, digest = (config.settings_file or "").partition(":")
    is_plain = digest == settings_digest(config) if file else not changed
    return f"{file or config.preset}{flags}{'' if is_plain else f'_{_digest(changed)}'}_s{config.seed}"


DEFAULT_CONFIG = make_config("coco_resnet50")
"""The settings of the documented lab."""
