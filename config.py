"""The experiment as one flat `Config`, its presets, and the name of the run it makes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic import ValidationError as PydanticError

from core.errors import LabError, choose, nearest, shown
from core.files import read_bytes, write_text
from core.presets import ALIASES, FAST_RUN, NAMES, PRESETS, START


def _path(path: Path) -> Path:
    """`~` is the home folder. Raises: ValueError for what cannot be a path, or cannot be written to a file."""
    if "\0" in str(path) or any(len(part) > 255 for part in path.parts):
        raise ValueError("a path has no null byte, and no part of more than 255 characters")
    str(path).encode("utf-8")  # a UnicodeEncodeError is a ValueError
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _name_or_path(text: str) -> str:
    path = str(_path(Path(text)))
    return path if text.startswith("~") else text


def _distinct(names: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each is named once")
    return names


Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Probability = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Cosine = Annotated[float, Field(gt=0, le=2)]
"""A difference of two cosines."""
Place = Annotated[Path, AfterValidator(_path)]
NameOrPath = Annotated[str, Field(min_length=1), AfterValidator(_name_or_path)]
Split = Annotated[str, Field(pattern=r"^[^./\\+\x00-\x1f][^/\\+\x00-\x1f]*$", max_length=100)]
"""A split's name becomes a file's; several are joined by "+"."""
Splits = Annotated[tuple[Split, ...], AfterValidator(_distinct)]
SomeSplits = Annotated[Splits, Field(min_length=1)]


class Config(BaseModel):
    """Every setting of an experiment, flat; works like an object and like a dictionary.

    `config.batch_size = 64` and `config["batch_size"] = 64` are the same, both checked.
    Raises: LabError on an unknown field (naming the nearest) or a value of the wrong type.
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
    """Name of the preset these settings started from; chosen by make_config."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of weights, order, dropout and augmentation."""
    split_seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the split by image, where the data has no split of its own; the same for all seeds, so that runs of
    several seeds are tested on the same images."""

    # --- flags ---
    use_batch_norm: bool = False
    """BatchNorm after each linear layer of the image head."""
    use_attention_pooling: bool = False
    """Learned softmax over the feature map's positions instead of average pooling."""

    # --- places (no part of a run's name) ---
    data_dir: Place = Path("data/coco2014")
    """Folder the data is read from."""
    cache_dir: Place = Path("cache")
    """Folder of decoded pictures and encoded features."""
    runs_dir: Place = Path("runs")
    """Folder that holds one folder a run."""
    checkpoint_dir: Place | None = None
    """Folder for checkpoints, such as a mounted Drive, one folder a run in it; none: inside the run's folder."""

    # --- data ---
    source: str | None = "coco2014"
    """What to fetch where data_dir is missing: a name of sources.SOURCES, or `scenes` or `shapes` to generate."""
    reader: str = "coco"
    """Layout of data_dir, a name of readers.READERS."""
    karpathy_file: Place | None = None
    """dataset_coco.json or dataset_flickr30k.json with Karpathy's split, else the data's own split."""
    annotation_file: Place | None = None
    """The file of captions, for readers `json`, `flickr8k` and `flickr30k`, else the one each looks for."""
    image_root: Place | None = None
    """Folder outside data_dir in which links and absolute image paths may end; of pre-encoded embeddings the folder of
    their images."""
    train_splits: SomeSplits = ("train",)
    """Splits trained on."""
    val_splits: SomeSplits = ("val",)
    """Splits the epoch is chosen on."""
    test_splits: Splits = ("val",)
    """Splits reported at the end, each apart."""
    max_samples: Count | None = None
    """At most this many images of each split, for a quick look."""
    captions_per_image: Count | None = None
    """Captions of an image drawn for each training batch; none: all of them."""
    image_size: int = Field(224, ge=1, le=4096)
    """Side of the square picture, pixels."""
    image_resize: Literal["crop", "squash"] = "crop"
    """Centre crop of the shorter side, or both sides squashed to the square."""
    different_class_prob: Probability = 0.5
    """Paired pictures: probability that left and right are drawn from different classes."""
    pairs_per_epoch: Count | None = None
    """Paired pictures: pairs drawn for an epoch; none: one for each picture."""
    balance_by: Literal["none", "category"] = "none"
    """Draw training images so that categories come equally often."""
    min_per_category: Count = 2
    """Categories with fewer training images are left out when balancing."""
    max_per_category: Count | None = None
    """At most this many training images of a category an epoch when balancing; none: the median."""

    # --- augmentation of training pictures ---
    augment_crop_scale: float = Field(1.0, gt=0, le=1)
    """Least area of a random resized crop; 1 is off."""
    augment_flip: Probability = 0.0
    """Probability of a horizontal flip; leave 0 where captions say left and right."""
    augment_jitter: float = Field(0.0, ge=0, le=10)
    """Strength of brightness, contrast and saturation jitter."""
    augment_rotation: float = Field(0.0, ge=0, le=180)
    """Largest rotation, degrees."""
    augment_erasing: Probability = 0.0
    """Probability that a rectangle is erased."""
    augment_swap_sides: bool = False
    """Swap the words left and right in the captions of a flipped picture; else such pictures are not flipped. Needs
    captions that are not cached."""

    # --- augmentation of training captions (needs a text tower that is not cached) ---
    augment_word_dropout: Dropout = 0.0
    """Probability that a word is left out."""
    augment_reorder: Probability = 0.0
    """Probability that the clauses of a caption change places."""
    max_caption_variations: Count = 1
    """Different variations of a caption that are made at most, the caption itself among them."""

    # --- image tower ---
    image_tower: str = "resnet50"
    """A name of towers.IMAGE_TOWERS."""
    image_tower_mode: Literal["trainable", "frozen", "cached"] = "trainable"
    """Trained; run without gradients; or run once and its features cached."""
    image_weights: NameOrPath = "pretrained"
    """`pretrained`, `random`, a file of weights, or a hub name or folder."""
    image_patch_size: int = Field(16, ge=1, le=4096)
    """Vision transformer built here: side of a patch, pixels."""
    image_width: Width = 768
    """Vision transformer built here: width of its tokens."""
    image_num_layers: Layers = 12
    """Vision transformer built here: blocks."""
    image_num_heads: Layers = 12
    """Vision transformer built here: attention heads."""
    image_mlp_ratio: Ratio = 4.0
    """Vision transformer built here: hidden width of a block's MLP over its width."""
    image_dropout: Dropout = 0.0
    """Vision transformer built here: dropout."""
    image_freeze_layers: CountOrZero = 0
    """First layers of a trainable image tower that stay frozen, the embedding with the first."""

    # --- text tower ---
    text_tower: str = "clip"
    """A name of towers.TEXT_TOWERS."""
    text_tower_mode: Literal["trainable", "frozen", "cached"] = "cached"
    """Trained; run without gradients; or run once and its features cached."""
    text_model: NameOrPath | None = None
    """Hub name or folder for the text tower; none: the tower's own."""
    text_width: Width = 512
    """Text transformer built here: width of its tokens."""
    text_num_layers: Layers = 8
    """Text transformer built here: blocks."""
    text_num_heads: Layers = 8
    """Text transformer built here: attention heads."""
    text_mlp_ratio: Ratio = 4.0
    """Text transformer built here: hidden width of a block's MLP over its width."""
    text_dropout: Dropout = 0.0
    """Text transformer built here: dropout."""
    text_freeze_layers: CountOrZero = 0
    """First layers of a trainable text tower that stay frozen, the embedding with the first."""

    # --- starting point ---
    start_from: Place | None = None
    """A finished run's folder whose weights this one starts from; none: the towers' own."""

    # --- heads ---
    image_head: str = "mlp"
    """A name of models.HEADS."""
    text_head: str = "identity"
    """A name of models.HEADS; `identity` keeps the text tower's space as the joint space."""
    embed_dim: Width = 512
    """Width of the joint space."""
    head_hidden_dim: Width = 1024
    """Width of the heads' hidden layer."""
    head_dropout: Dropout = 0.0
    """Dropout in the heads."""
    head_num_heads: Layers = 8
    """Attention heads of head `attention`."""
    head_num_layers: Layers = 2
    """Self-attention layers of head `attention`."""
    head_num_tokens: Layers = 8
    """Tokens that head `attention` splits an embedding into."""
    use_layer_norm: bool = False
    """LayerNorm at the end of head `mlp`."""
    freeze_projections: bool = False
    """Keep the heads, and a pretrained CLIP's own projections, as they are."""

    # --- loss ---
    loss: str = "infonce"
    """A name of losses.LOSSES."""
    temperature: float = Field(0.07, ge=0.01, le=100)
    """Softmax temperature at the start; the model holds ln(1/temperature) as logit_scale. A pretrained CLIP kept by
    heads `identity` brings its own."""
    learn_temperature: bool = False
    """Train the temperature, clamped at 1/100."""
    label_smoothing: Dropout = 0.0
    """Share of each target spread over the whole batch."""
    logit_bias: float | None = Field(None, ge=-1000, le=1000)
    """Bias of loss `sigmoid` at the start, always trained; none: the log odds of a match in a batch."""
    negatives: Literal["batch", "queue", "bank"] = "batch"
    """What a batch is contrasted with beside itself: nothing, recent features, every training caption."""
    queue_size: Count = 4096
    """Images, and as many captions, whose recent features `queue` holds."""
    bank_refresh_steps: Count = 20
    """Steps after which `bank` encodes all captions anew, where the text head learns."""
    margin: Cosine = 0.5
    """Loss `triplet`: how much nearer a match must be than a negative, cosine; loss `contrastive`: the cosine
    distance that a negative must keep."""
    num_hard_negatives: Count = 3
    """Loss `contrastive`: hardest negatives in the batch counted for each query."""
    focal_gamma: Weight = 0.0
    """Softmax losses: weight queries by (1 - probability of their match) to this power; 0 is off."""
    triplet_mining: Literal["mean", "semi_hard", "hardest"] = "hardest"
    """Loss `triplet`: which negatives count."""
    triplet_warmup_epochs: CountOrZero = 1
    """Loss `triplet`: epochs over the mean of all negatives before the hardest alone (Faghri et al. 2018)."""
    swap_weight: Weight = 0.0
    """Paired pictures: weight of a term that holds the caption with left and right swapped at a margin."""
    swap_margin: Cosine = 0.2
    """Paired pictures: how much nearer the right order must be than the swapped one, cosine."""

    # --- mined negatives ---
    mining: Literal["none", "random", "semantic"] = "none"
    """Extra captions a batch brings as negatives: none, any, or the nearest wrong ones under the current model."""
    num_mined: Count = 3
    """Mined captions an image brings."""
    mining_refresh_epochs: Count = 1
    """Epochs after which negatives are mined anew."""
    mining_margin: float = Field(0.95, gt=0, le=1)
    """A candidate scored above this share of the match's score is taken for a match and left out."""
    mining_neighbour_batches: bool = False
    """Build batches so that images near one another under the current model meet."""

    # --- optimisation ---
    num_epochs: Count = 10
    """Passes over the training images."""
    batch_size: Count = 128
    """Images a step; each brings its captions."""
    learning_rate: LearningRate = 1e-4
    """Peak learning rate of AdamW; of heads and projections where towers have their own."""
    image_tower_learning_rate: LearningRate | None = None
    """Peak learning rate of a trainable image tower; none: learning_rate."""
    text_tower_learning_rate: LearningRate | None = None
    """Peak learning rate of a trainable text tower; none: learning_rate."""
    freeze_tower_epochs: CountOrZero = 0
    """First epochs in which trainable towers stay as they are and only heads learn."""
    freeze_batch_norm: bool = False
    """Keep a trainable image tower's BatchNorm statistics; with it micro-batches give the whole batch's gradients."""
    gradient_checkpointing: bool = False
    """Recompute a transformer tower's activations in the backward pass: less memory, a third more time."""
    weight_decay: Weight = 0.01
    """AdamW's decay; norms, biases and the temperature have none."""
    warmup_steps: CountOrZero = 500
    """Steps of linear warm-up, at most a tenth of the run."""
    warmup_epochs: float | None = Field(None, ge=0, le=10**6)
    """Linear warm-up in epochs instead of steps, as given; none: warmup_steps."""
    schedule: str = "cosine"
    """A name of optimisation.SCHEDULES."""
    schedule_cycles: Count = 3
    """Schedules `step` and `restarts`: equal parts of the run."""
    max_grad_norm: float = Field(1.0, gt=0, le=10**9)
    """Gradients are clipped to this norm."""
    ema_decay: Dropout = 0.0
    """Decay of the running average of weights and BatchNorm statistics that is validated and kept; 0 is off."""
    patience: Count | None = None
    """Stop after this many validations without a better best_metric; none: never."""
    best_metric: str = "rsum"
    """Validation figure that chooses the best epoch, highest or lowest by metrics.DIRECTIONS; rsum is the sum of the
    six recalls."""
    eval_every: Count = 1
    """Epochs between validations; the last epoch is always validated."""
    interpolate_weights: bool = False
    """After training, keep the mixture of starting and best weights that validates best (WiSE-FT)."""

    # --- machine (no part of a run's name) ---
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, fp16 on older GPUs, fp32 on a CPU. bf16 on a CPU is slow without AVX512-BF16 or
    AMX instructions."""
    micro_batch_size: Count | None = None
    """Images that pass the towers at once; the loss still sees the whole batch, in two passes (Gao et al. 2021).
    Accumulating gradients over small batches would not do: it adds no negatives. None: the whole batch, halved
    where memory runs out."""
    compile: bool = False
    """Compile the model; where that fails, and for batches in pieces, it runs as it is."""
    allow_tf32: bool = True
    """TensorFloat-32 products of float32 numbers on GPUs that have them."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, also on a GPU."""
    num_workers: CountOrZero = 0
    """Loader processes; the image cache rarely needs one."""
    checkpoint_minutes: float = Field(1.0, gt=0, le=10**6)
    """Minutes between checkpoints inside an epoch."""
    keep_every_epochs: Count | None = None
    """Epochs after which the weights are kept for good beside the best; none: never."""
    tensorboard: bool = False
    """Write the run's TensorBoard log beside its history."""

    # --- evaluation (no part of a run's name) ---
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
            super().__init__(**_spelled_out(values))
        except PydanticError as error:
            raise LabError(_explain(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields or (name == "preset" and value != self.preset):
            raise LabError(_unknown(name))
        try:
            for field, setting in _spelled_out({name: value}).items():
                super().__setattr__(field, setting)
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
        if overrides.get("preset", self.preset) != self.preset:
            raise LabError(_unknown("preset"))
        return Config(**{**self.model_dump(), **_spelled_out(overrides)})

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
        return write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def _unknown(name: str) -> str:
    if name in ("preset", "base_data_dir"):
        return f"{name} is chosen when the configuration is made: make_config(PRESET, ...) takes it."
    hint = nearest(name, list(Config.model_fields))
    return f"configuration field {name!r} does not exist{hint or '; see the fields of config.Config.'}"


def _explain(error: PydanticError) -> str:
    """One sentence for the first thing that is wrong."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        return _unknown(name)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, LabError):
        return str(cause)
    wanted = Config.model_fields[name].annotation if name in Config.model_fields else None
    kind = getattr(wanted, "__name__", None) or re.sub(r"typing\.|Annotated\[(\w+).*?\]", r"\1", str(wanted))
    return f"configuration field {name!r} takes {kind}: {first['msg']}, not {shown(first['input'])}."


def _spelled_out(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with a loss by its own name; `queue_infonce` brings the queue."""
    loss = values.get("loss")
    if loss == "queue_infonce":
        if values.get("negatives", "queue") != "queue":
            raise LabError(
                "loss 'queue_infonce' is loss 'infonce' with negatives 'queue'; leave negatives out, or set loss to "
                "'infonce'."
            )
        values = {**values, "negatives": "queue"}
    return {**values, "loss": ALIASES[loss]} if isinstance(loss, str) and loss in ALIASES else values


GROUPS = {
    "preset": "experiment",
    "use_batch_norm": "flags",
    "data_dir": "places (no part of a run's name)",
    "source": "data",
    "augment_crop_scale": "augmentation of training pictures",
    "augment_word_dropout": "augmentation of training captions (needs a text tower that is not cached)",
    "image_tower": "image tower",
    "text_tower": "text tower",
    "start_from": "starting point",
    "image_head": "heads",
    "loss": "loss",
    "mining": "mined negatives",
    "num_epochs": "optimisation",
    "device": "machine (no part of a run's name)",
    "recall_ks": "evaluation (no part of a run's name)",
}
"""The first field of each group of fields, and what the group is called."""

KINDS = {"best_metric": r"^(i2t|t2i)_|@\d+$", "device": r":\d+$"}
"""What a name may have besides those of `choices`."""


def choices(field: str) -> tuple[Any, ...]:
    """What a field takes where that can be listed, with what was added to the table that its names stand in."""
    annotation = Config.model_fields[field].annotation
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    table, names = NAMES.get(field, ("", ()))
    module, _, name = table.rpartition(".")  # not imported here: whoever added a name did that
    none = [None] * (names != () and Config.model_fields[field].default is None)
    return tuple(dict.fromkeys([*none, *names, *getattr(sys.modules.get(module), name, ())]))


FLAGS: dict[str, str] = {"use_batch_norm": "bn", "use_attention_pooling": "attn"}
"""The flags that stand in a run's name, and how."""

NOT_IN_NAME = frozenset(
    "preset seed source data_dir cache_dir runs_dir checkpoint_dir karpathy_file annotation_file image_root "
    "test_splits device precision micro_batch_size compile allow_tf32 deterministic gradient_checkpointing "
    "num_workers checkpoint_minutes keep_every_epochs tensorboard recall_ks".split()
)
"""Fields that change where or how fast a run is computed, not what is computed."""


DOCUMENTED: dict[str, Callable[[Any], tuple[str, Any]]] = {
    "output_dim": lambda value: ("embed_dim", value),
    "hidden_dim": lambda value: ("head_hidden_dim", value),
    "num_heads": lambda value: ("head_num_heads", value),
    "num_layers": lambda value: ("head_num_layers", value),
    "dropout": lambda value: ("head_dropout", value),
    "freeze_image_encoder": lambda value: ("image_tower_mode", "frozen" if value else "trainable"),
    "freeze_text_encoder": lambda value: ("text_tower_mode", "frozen" if value else "trainable"),
}
"""Other names that files of settings may use, and what they set here."""


def make_config(
    preset: str = START, *, fast_run: bool = False, base_data_dir: str | Path | None = None, **overrides: Any
) -> Config:
    """The configuration of a preset, with `overrides` on top.

    Args: base_data_dir: folder that data_dir, cache_dir, runs_dir and image_root are taken relative to.
    Raises: LabError on an unknown preset or field, or a value of the wrong type.
    """
    preset_values = choose(PRESETS, preset, "preset")
    config = Config(preset=preset, **{**preset_values, **(FAST_RUN if fast_run else {}), **overrides})
    if base_data_dir is not None:
        base = Config(data_dir=base_data_dir).data_dir
        for place in ("data_dir", "cache_dir", "runs_dir", "image_root"):
            config[place] = config[place] and base / config[place]
    return config


def load_config(path: str | Path, **overrides: Any) -> Config:
    """Read a YAML or JSON file, flat or with one level of sections; its `preset` comes first, else `quickstart`.

    Raises: LabError if the file is missing, not a mapping, or holds an unknown field or one twice.
    """
    return make_config(**{**read_overrides(path), **overrides})


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, uses in keys.items() if uses > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice; keep one")
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > 1000:  # merged mappings grow with each level
            raise yaml.YAMLError("a mapping holds more than 1,000 fields")


def load_yaml(path: str | Path) -> Any:
    """A YAML or JSON file of settings. Raises: LabError if it is damaged, or more than settings ever are."""
    data = read_bytes(path, 256 * 2**10)
    try:
        return yaml.load(data.decode("utf-8-sig"), _Loader)  # YAML reads JSON too
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        cause = f"{error or type(error).__name__}".splitlines()[0][:200]
        raise LabError(f"{path} cannot be read as YAML or JSON: {cause}.") from error


def read_overrides(path: str | Path) -> dict[str, Any]:
    """The fields a YAML or JSON file sets, sections flattened."""
    path = Path(path)
    if not path.is_file():
        raise LabError(f"configuration file {path} does not exist; give the path of a .yaml or .json file.")
    loaded = load_yaml(path)
    if not isinstance(loaded, Mapping):
        raise LabError(f"{path} must hold `field: value` lines, not a {type(loaded).__name__}.")
    values: dict[str, Any] = {}
    for name, value in loaded.items():
        section = value if isinstance(value, Mapping) else {name: value}
        for field, setting in section.items():
            field, setting = DOCUMENTED.get(str(field), lambda given, field=str(field): (field, given))(
                setting
            )
            if field in values:
                raise LabError(f"{path} sets {field!r} twice; keep one.")
            values[field] = setting
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


DEFAULT_CONFIG = make_config("coco_resnet50")
"""The documented lab."""
