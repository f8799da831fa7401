"""The experiment as one flat `Config`, its presets, and the name of the run it makes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic import ValidationError as PydanticError

from errors import LabError, choose, nearest


class Config(BaseModel):
    """Every setting of an experiment, flat; works like an object and like a dictionary.

    `config.batch_size = 64` and `config["batch_size"] = 64` are the same, both checked.
    Raises: LabError on an unknown field (naming the nearest) or a value of the wrong type.
    """

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    # --- experiment ---
    preset: str = "coco_resnet50"
    """Name of the preset these settings started from."""
    seed: NonNegativeInt = 0
    """Seed of weights, order, dropout and augmentation."""

    # --- flags ---
    use_batch_norm: bool = False
    """BatchNorm after each linear layer of the image head."""
    use_attention_pooling: bool = False
    """Learned softmax over the feature map's positions instead of average pooling."""

    # --- places (no part of a run's name) ---
    data_dir: Path = Path("data/coco2014")
    """Folder the data is read from."""
    cache_dir: Path = Path("cache")
    """Folder of decoded pictures and encoded features."""
    runs_dir: Path = Path("runs")
    """Folder that holds one folder a run."""

    # --- data ---
    source: str | None = "coco2014"
    """What to fetch where data_dir is missing: a name of sources.SOURCES, or `scenes` to generate."""
    reader: str = "coco"
    """Layout of data_dir, a name of readers.READERS."""
    karpathy_file: Path | None = None
    """dataset_coco.json or dataset_flickr30k.json with Karpathy's split, else the data's own split."""
    train_splits: tuple[str, ...] = ("train",)
    """Splits trained on."""
    val_splits: tuple[str, ...] = ("val",)
    """Splits the epoch is chosen on."""
    test_splits: tuple[str, ...] = ("val",)
    """Splits reported at the end, each apart."""
    max_samples: PositiveInt | None = None
    """At most this many images of each split, for a quick look."""
    captions_per_image: PositiveInt | None = None
    """Captions of an image drawn for each training batch; none: all of them."""
    image_size: PositiveInt = 224
    """Side of the square picture, pixels."""
    image_resize: Literal["crop", "squash"] = "crop"
    """Centre crop of the shorter side, or both sides squashed to the square."""

    # --- augmentation of training pictures ---
    augment_crop_scale: float = Field(1.0, gt=0, le=1)
    """Least area of a random resized crop; 1 is off."""
    augment_flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip; leave 0 where captions say left and right."""
    augment_jitter: NonNegativeFloat = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    augment_rotation: NonNegativeFloat = 0.0
    """Largest rotation, degrees."""
    augment_erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle is erased."""

    # --- image tower ---
    image_tower: str = "resnet50"
    """A name of towers.IMAGE_TOWERS."""
    image_tower_mode: Literal["trainable", "frozen", "cached"] = "trainable"
    """Trained; run without gradients; or run once and its features cached."""
    image_weights: str = "pretrained"
    """`pretrained`, `random`, or a file of weights."""

    # --- text tower ---
    text_tower: str = "clip"
    """A name of towers.TEXT_TOWERS."""
    text_tower_mode: Literal["trainable", "frozen", "cached"] = "cached"
    """Trained; run without gradients; or run once and its features cached."""
    text_model: str | None = None
    """Hub name or folder for the text tower; none: the tower's own."""

    # --- heads ---
    image_head: str = "mlp"
    """A name of models.HEADS."""
    text_head: str = "identity"
    """A name of models.HEADS; `identity` keeps the text tower's space as the joint space."""
    embed_dim: PositiveInt = 512
    """Width of the joint space."""
    head_hidden_dim: PositiveInt = 1024
    """Width of the heads' hidden layer."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the heads."""

    # --- loss ---
    loss: str = "infonce"
    """A name of losses.LOSSES."""
    temperature: PositiveFloat = 0.07
    """Softmax temperature at the start; the model holds ln(1/temperature) as logit_scale."""
    learn_temperature: bool = False
    """Train the temperature, clamped at 1/100."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target spread over the whole batch."""

    # --- optimisation ---
    num_epochs: PositiveInt = 10
    """Passes over the training images."""
    batch_size: PositiveInt = 128
    """Images a step; each brings its captions."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    image_tower_learning_rate: PositiveFloat | None = None
    """Peak learning rate of a trainable image tower; none: learning_rate."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decay; norms, biases and the temperature have none."""
    warmup_steps: NonNegativeInt = 500
    """Steps of linear warm-up, at most a tenth of the run."""
    schedule: str = "cosine"
    """A name of optimisation.SCHEDULES."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the running average of weights that is validated and kept; 0 is off."""

    # --- machine (no part of a run's name) ---
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where a GPU has it, fp16 on older GPUs, fp32 elsewhere."""
    num_workers: NonNegativeInt = 0
    """Loader processes; the image cache rarely needs one."""
    checkpoint_minutes: PositiveFloat = 1.0
    """Minutes between checkpoints inside an epoch."""

    # --- evaluation (no part of a run's name) ---
    best_metric: str = "rsum"
    """Validation figure that chooses the best epoch; rsum is the sum of the six recalls."""
    recall_ks: tuple[PositiveInt, ...] = (1, 5, 10)
    """The K of Recall@K."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except PydanticError as error:
            raise LabError(_explain(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields:
            raise LabError(_unknown(name))
        try:
            super().__setattr__(name, value)
        except PydanticError as error:
            raise LabError(_explain(error)) from None

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields:
            raise LabError(_unknown(name))
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def keys(self) -> Iterator[str]:
        """Names of the fields, so that `dict(**config)` works."""
        return iter(type(self).model_fields)

    def updated(self, **overrides: Any) -> Config:
        """A copy with some fields changed, checked."""
        return Config(**{**self.model_dump(), **overrides})

    def differences(self, other: Config | None = None) -> dict[str, tuple[Any, Any]]:
        """Fields that differ: name -> (value here, value in `other`, by default the defaults)."""
        other = other or DEFAULT_CONFIG
        return {name: (self[name], other[name]) for name in self.keys() if self[name] != other[name]}

    def split_groups(self) -> list[tuple[str, ...]]:
        """The splits in use: what is trained on, validated on, and each test split."""
        tests = ((name,) for name in self.test_splits)
        return list(dict.fromkeys((self.train_splits, self.val_splits, *tests)))

    def save(self, path: str | Path) -> Path:
        """Write as YAML, readable by `load_config`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        return path


def _unknown(name: str) -> str:
    hint = nearest(name, list(Config.model_fields))
    return f"configuration field {name!r} does not exist{hint or '; see the fields of config.Config.'}"


def _explain(error: PydanticError) -> str:
    """One sentence for the first thing that is wrong."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        return _unknown(name)
    wanted = Config.model_fields[name].annotation if name in Config.model_fields else None
    kind = getattr(wanted, "__name__", None) or str(wanted).replace("typing.", "")
    return f"configuration field {name!r} takes {kind}: {first['msg']}, not {first['input']!r}."


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

FLAGS: dict[str, str] = {"use_batch_norm": "bn", "use_attention_pooling": "attn"}
"""The flags that stand in a run's name, and how."""

NOT_IN_NAME = frozenset(
    "preset seed source data_dir cache_dir runs_dir karpathy_file test_splits device precision num_workers "
    "checkpoint_minutes recall_ks".split()
)
"""Fields that change where or how fast a run is computed, not what is computed."""


def make_config(preset: str = "coco_resnet50", *, fast_run: bool = False, **overrides: Any) -> Config:
    """The configuration of a preset, with `overrides` on top.

    Raises: LabError on an unknown preset or field, or a value of the wrong type.
    """
    values = dict(choose(PRESETS, preset, "preset"))
    return Config(preset=preset, **{**values, **(FAST_RUN if fast_run else {}), **overrides})


def load_config(path: str | Path, **overrides: Any) -> Config:
    """Read a YAML or JSON file, flat or with one level of sections; its `preset` comes first.

    Raises: LabError if the file is missing, not a mapping, or holds an unknown field.
    """
    values = read_overrides(path)
    return make_config(values.pop("preset", "coco_resnet50"), **{**values, **overrides})


def read_overrides(path: str | Path) -> dict[str, Any]:
    """The fields a YAML or JSON file sets, sections flattened."""
    path = Path(path)
    if not path.is_file():
        raise LabError(f"configuration file {path} does not exist; give the path of a .yaml or .json file.")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # YAML reads JSON too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is neither YAML nor JSON: {str(error).splitlines()[0]}.") from error
    if not isinstance(loaded, Mapping):
        raise LabError(f"{path} must hold `field: value` lines, not a {type(loaded).__name__}.")
    values: dict[str, Any] = {}
    for name, value in loaded.items():
        section = value if isinstance(value, Mapping) else {name: value}
        for field, setting in section.items():
            if field in values:
                raise LabError(f"{path} sets {field!r} twice; keep one.")
            values[str(field)] = setting
    return values


def run_name(config: Config) -> str:
    """`{preset}{flags}[_{hash of the other fields that change results}]_s{seed}`, the run's folder."""
    base = make_config(config.preset)
    flags = "".join(f"_{short}" for field, short in FLAGS.items() if config[field])
    changed = {
        name: config.model_dump(mode="json")[name]
        for name in config.differences(base)
        if name not in NOT_IN_NAME and name not in FLAGS
    }
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
    return f"{config.preset}{flags}{f'_{digest}' if changed else ''}_s{config.seed}"


DEFAULT_CONFIG = make_config()
