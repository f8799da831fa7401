"""A CLIP-shaped model as a folder that transformers' CLIPModel loads; heads as the plain layers that libraries know."""

from __future__ import annotations

import re
import runpy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import core.devices  # noqa: F401  before torchvision

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from config import Config
from core.errors import LabError
from core.files import atomic_path, write_json, write_text
from models import CLIPModel, build_model
from towers.image import ClipVisionTower
from towers.text import CONTEXT
from towers.transformer import ACTIVATIONS, Encoder, TextTransformer, VisionTransformer
from training.checkpoints import own_image_weights
from utils import Run

# --- Heads as plain layers ---


PLAIN = (nn.Linear, nn.LayerNorm, nn.GELU)


def plain_layers(head: nn.Module) -> list[nn.Module]:
    """A head in evaluation as linear layers, LayerNorms and GELUs: no dropout, BatchNorm folded in.

    Raises: LabError if it holds anything else.
    """
    layers: list[nn.Module] = []
    for layer in _leaves(head):
        if isinstance(layer, (nn.Dropout, nn.Identity)):
            continue
        if isinstance(layer, nn.BatchNorm1d) and layers and isinstance(layers[-1], nn.Linear):
            layers[-1] = fold_batch_norm(layers[-1], layer)
        elif isinstance(layer, PLAIN):
            layers.append(layer)
        else:
            raise LabError(
                f"a head with {type(layer).__name__} is no chain of linear layers; heads 'identity', 'linear', "
                "'projection', 'mlp', 'siglip' and 'clip' are."
            )
    return layers


def _leaves(head: nn.Module) -> list[nn.Module]:
    if isinstance(head, nn.Sequential):
        return [leaf for part in head for leaf in _leaves(part)]
    return [head]


@torch.no_grad()
def fold_batch_norm(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """One linear layer that does what `linear` and then `norm` in evaluation do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = 0.0 if linear.bias is None else linear.bias.double()
    folded = nn.Linear(linear.in_features, linear.out_features)
    folded.weight.copy_(gain[:, None] * linear.weight.double())
    folded.bias.copy_(gain * (bias - norm.running_mean.double()) + norm.bias.double())
    return folded


def linear_map(head: nn.Module, width: int) -> Tensor:
    """(D, width): the matrix of a head that is one linear map without bias.

    Raises: LabError if it is not.
    """
    layers = plain_layers(head)
    if not layers:
        return torch.eye(width)
    if len(layers) > 1 or not isinstance(layers[0], nn.Linear) or layers[0].bias is not None:
        raise LabError(
            "CLIP's projections are linear maps without bias; train with heads 'projection' or 'identity'."
        )
    return layers[0].weight.detach().cpu()


# --- CLIPModel ---


def write_clip(model: CLIPModel, image_resize: str, folder: Path) -> Path:
    """Write a model that transformers.CLIPModel, CLIPProcessor and AutoTokenizer load from `folder`.

    Linear heads without bias become CLIP's projections.
    Raises: LabError where a tower or a head is not CLIP's.
    """
    vision, vision_state = vision_half(model)
    text, text_state = text_half(model)
    scale = model.logit_parts()["logit_scale"].log().cpu()
    width = len(vision_state["visual_projection.weight"])  # the halves' own may be another
    config = transformers.CLIPConfig(
        text_config={**text.to_dict(), "projection_dim": width},
        vision_config={**vision.to_dict(), "projection_dim": width},
        projection_dim=width,
        logit_scale_init_value=scale.item(),
    )
    whole = transformers.CLIPModel(config)
    whole.load_state_dict({**vision_state, **text_state, "logit_scale": scale})
    whole.save_pretrained(folder)
    model.text_encoder.tokenizer.save_pretrained(str(folder))
    image_processor(model, vision.image_size, image_resize).save_pretrained(folder)
    return folder


def vision_half(model: CLIPModel) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the image side. Raises: LabError if it is not CLIP's."""
    tower = model.image_encoder
    if model.image_pooling is not None:
        raise LabError("CLIP's image tower reads its class token; this model pools by attention.")
    head = linear_map(model.image_head, tower.width)
    if isinstance(tower, ClipVisionTower):
        state = _cpu(tower.body)
        state["visual_projection.weight"] = head @ state["visual_projection.weight"]
        return tower.body.config, state
    if not isinstance(tower, VisionTransformer):
        raise LabError("transformers' CLIPModel takes image towers 'vit' and 'clip' only.")
    height, across = tower.picture_shape
    if height != across or tower.pooling != "class":
        raise LabError("CLIP's image tower takes square pictures and reads its class token.")
    config = transformers.CLIPVisionConfig(
        **_shape(tower.encoder), image_size=height, patch_size=height // tower.grid[0]
    )
    state = {f"vision_model.{name}": value for name, value in _cpu(tower).items()}
    return config, {**state, "visual_projection.weight": head}


def text_half(model: CLIPModel) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the text side. Raises: LabError if it is not CLIP's."""
    encoder = getattr(model.text_encoder, "encoder", None)
    head = linear_map(model.text_head, model.text_encoder.width)
    if isinstance(encoder, transformers.CLIPTextModelWithProjection):
        state = _cpu(encoder)
        state["text_projection.weight"] = head @ state["text_projection.weight"]
        return encoder.config, state
    if not isinstance(encoder, TextTransformer):
        raise LabError("transformers' CLIPModel takes text towers 'transformer' and 'clip' only.")
    state = {f"text_model.{name}": value for name, value in _cpu(encoder).items()}
    return text_config(encoder), {**state, "text_projection.weight": head}


def text_config(encoder: TextTransformer) -> Any:
    """A text transformer's shape, as transformers writes it."""
    return transformers.CLIPTextConfig(
        **_shape(encoder.encoder),
        vocab_size=encoder.end + 1,
        max_position_embeddings=encoder.context,
        bos_token_id=encoder.end - 1,
        eos_token_id=encoder.end,
        pad_token_id=encoder.end,
    )


def _shape(encoder: Encoder) -> dict[str, Any]:
    block = encoder.layers[0]
    names = {make: name for name, make in ACTIVATIONS.items()}
    return {
        "hidden_size": encoder.width,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.layers),
        "num_attention_heads": block.self_attn.num_heads,
        "hidden_act": names[type(block.mlp.activation)],
        "layer_norm_eps": block.layer_norm1.eps,
    }


def _cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


def image_processor(model: CLIPModel, size: int, image_resize: str) -> Any:
    """What makes a picture into pixels as this lab does: centre crop, or squashed to the square."""
    crop = image_resize == "crop"
    tower = model.image_encoder
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": size} if crop else {"height": size, "width": size},
        do_center_crop=crop,
        crop_size={"height": size, "width": size},
        image_mean=tower.mean.flatten().tolist(),
        image_std=tower.std.flatten().tolist(),
    )


@torch.no_grad()
def clip_features(folder: Path, pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(I, D) and (T, D) normalised features by transformers alone, of normalised pictures and of captions."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(**tokens).pooler_output
    return nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)


# --- sentence-transformers ---


def write_sentence_transformer(model: CLIPModel, folder: Path) -> Path:
    """Write the text tower and its head as a SentenceTransformer.

    Raises: LabError where the head is no chain of linear layers, or its library pools the tower otherwise.
    """
    from sentence_transformers import SentenceTransformer  # takes seconds
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    tower = model.text_encoder
    if tower.pooling == "last":
        raise LabError("text tower 'e5' adds its end mark itself, which sentence-transformers does not.")
    body, projection = backbone(tower.encoder)
    head = _modules([*projection, *plain_layers(model.text_head)])
    with tempfile.TemporaryDirectory() as plain:
        body.save_pretrained(plain)
        tower.tokenizer.save_pretrained(plain)
        encoder = Transformer(plain, max_seq_length=tower.max_length)
    mean = tower.pooling == "mean"  # else at the end mark, the last token that is no padding
    pooling = Pooling(body.config.hidden_size, "mean" if mean else "lasttoken")
    unit = [Normalize()] if mean else []
    SentenceTransformer(modules=[encoder, pooling, *unit, *head, Normalize()], device="cpu").save(str(folder))
    return folder


def backbone(encoder: nn.Module) -> tuple[Any, list[nn.Module]]:
    """The transformers model that AutoModel loads, and the projection that stands behind it, if any."""
    if isinstance(encoder, transformers.CLIPTextModelWithProjection):
        return encoder.text_model, [encoder.text_projection]
    if not isinstance(encoder, TextTransformer):
        return encoder, []
    body = transformers.CLIPTextModel(text_config(encoder))
    body.load_state_dict(encoder.state_dict())
    return body, []


def _modules(layers: list[nn.Module]) -> list[nn.Module]:
    """Linear layers, each with the GELU behind it, and LayerNorms, as sentence-transformers has them."""
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm

    made: list[nn.Module] = []
    for layer, behind in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Linear):
            activation = nn.GELU() if isinstance(behind, nn.GELU) else nn.Identity()
            dense = Dense(layer.in_features, layer.out_features, layer.bias is not None, activation)
            dense.linear.load_state_dict(layer.state_dict())
            made.append(dense)
        elif isinstance(layer, nn.LayerNorm):
            norm = LayerNorm(layer.normalized_shape[0])
            norm.norm.load_state_dict(layer.state_dict())
            made.append(norm)
    return made


def sentence_features(folder: Path, texts: list[str]) -> Tensor:
    """(T, D) features of texts by sentence-transformers alone."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    with torch.no_grad():
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).clone()


# --- safetensors and its loader ---


MODEL_LOADER = '''"""Loads this folder's model; it needs the lab's own modules: put their folder on PYTHONPATH.

    from load_model import load_model
    model = load_model()
    model.encode_image(pictures)      # (B, 3, S, S) uint8 -> (B, D), L2-normalised
    model.encode_text(["a caption"])  # -> (1, D), L2-normalised
"""

import json
from pathlib import Path

from safetensors.torch import load_file

from config import Config
from models import build_model

FOLDER = Path(__file__).parent


def load_model():
    config = Config(**json.loads((FOLDER / "config.json").read_text(encoding="utf-8")))
    model = build_model(config)
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model.eval()
'''

HEADS_LOADER = '''"""Loads this folder's two heads; it needs torch and safetensors, nothing else.

    from load_model import load_model
    heads = load_model()
    heads["image"](image_features)  # features of the image tower in config.json -> (B, D), L2-normalised
    heads["text"](text_features)    # features of the text tower in config.json -> (B, D), L2-normalised
"""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).parent
LAYERS = {"Linear": nn.Linear, "LayerNorm": nn.LayerNorm, "GELU": nn.GELU}


class Head(nn.Sequential):
    def forward(self, features):
        return nn.functional.normalize(super().forward(features.float()), dim=-1)


def load_model():
    heads = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["heads"]
    built = {side: Head(*[LAYERS[name](**options) for name, options in heads[side]]) for side in heads}
    model = nn.ModuleDict(built)
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model.eval()
'''


def write_model(model: CLIPModel, config: Config, folder: Path) -> Path:
    """Write a whole model; `load_model.py` builds it by this lab's modules."""
    config = config.updated(image_weights=own_image_weights(config))  # the file holds them
    kept = config.model_dump(mode="json", exclude={"start_from"})
    return _write(folder, _cpu(model), kept, MODEL_LOADER)


def write_heads(model: CLIPModel, config: Config, folder: Path) -> Path:
    """Write the heads of a model on cached features; `load_model.py` needs only torch and safetensors.

    Raises: LabError if a head is no chain of linear layers.
    """
    heads = {"image": plain_layers(model.image_head), "text": plain_layers(model.text_head)}
    names = ("image_tower", "image_weights", "text_tower", "text_model")
    content = {
        "heads": {side: [_described(layer) for layer in layers] for side, layers in heads.items()},
        "temperature": model.temperature,
        **config.model_dump(mode="json", include=set(names)),
    }
    weights = _cpu(nn.ModuleDict({side: nn.Sequential(*layers) for side, layers in heads.items()}))
    return _write(folder, weights, content, HEADS_LOADER)


def _described(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    if isinstance(layer, nn.Linear):
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
        return "Linear", {**sizes, "bias": layer.bias is not None}
    if isinstance(layer, nn.LayerNorm):
        return "LayerNorm", {"normalized_shape": list(layer.normalized_shape), "eps": layer.eps}
    return type(layer).__name__, {}


def _write(folder: Path, weights: dict[str, Tensor], content: dict[str, Any], loader: str) -> Path:
    with atomic_path(folder / "model.safetensors") as beside:
        save_file(weights, beside)
    write_json(folder / "config.json", content)
    write_text(folder / "load_model.py", loader)
    return folder


@torch.no_grad()
def loaded(folder: Path) -> Any:
    """The folder's model, by its own loader."""
    return runpy.run_path(str(folder / "load_model.py"))["load_model"]()


TOLERANCE = 1e-5
TEXTS = ["a red square beside a blue circle", "two dogs run through the snow", "a man"]


Pairs = list[tuple[Tensor, Tensor]]
"""Features by the run's model, and the same by what was written."""


def largest_difference(pairs: Pairs, folder: Path) -> float:
    difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    if not difference <= TOLERANCE:
        raise LabError(f"{folder} gave features that differ by {difference:.1e}.")
    return difference


# --- formats ---


def whole_config(run: Run) -> Config:
    """The run's configuration with towers in place of their cached features."""
    modes = {name: run.config[name] for name in ("image_tower_mode", "text_tower_mode")}
    config = run.config.updated(**{name: "frozen" if m == "cached" else m for name, m in modes.items()})
    if modes["image_tower_mode"] == "cached":
        return config
    return config.updated(image_weights=own_image_weights(config))  # the run's file holds them


def whole_model(run: Run) -> CLIPModel:
    """The run's model with towers in place of their cached features, on the CPU."""
    model = build_model(whole_config(run))
    model.load_state_dict(run.model.state_dict(), strict=False)
    return model.eval()


def _pictures(run: Run, model: CLIPModel) -> Tensor:
    """(2, 3, S, S) random pictures, normalised."""
    size = run.config.image_size
    raw = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0))
    return model.image_encoder.normalise(raw.to(torch.uint8))


@torch.no_grad()
def _clip(run: Run, folder: Path) -> Pairs:
    model = whole_model(run)
    write_clip(model, run.config.image_resize, folder)
    pictures = _pictures(run, model)
    image, text = clip_features(folder, pictures, TEXTS)
    return [(model.encode_image(pictures), image), (model.encode_text(TEXTS), text)]


@torch.no_grad()
def _text(run: Run, folder: Path) -> Pairs:
    model = whole_model(run)
    write_sentence_transformer(model, folder)
    return [(model.encode_text(TEXTS), sentence_features(folder, TEXTS))]


@torch.no_grad()
def _model(run: Run, folder: Path) -> Pairs:
    if run.config.image_tower_mode == run.config.text_tower_mode == "cached":
        return _heads(run, folder)
    model = whole_model(run)
    write_model(model, whole_config(run), folder)
    again, pictures = loaded(folder), _pictures(run, model)
    return [
        (model.encode_image(pictures), again.encode_image(pictures)),
        (model.encode_text(TEXTS), again.encode_text(TEXTS)),
    ]


def _heads(run: Run, folder: Path) -> Pairs:
    model = run.model.cpu()
    write_heads(model, run.config, folder)
    heads = loaded(folder)
    image = torch.randn(4, model.image_encoder.width, generator=torch.Generator().manual_seed(0))
    text = torch.randn(4, model.text_encoder.width, generator=torch.Generator().manual_seed(1))
    return [
        (model.encode_image(image), heads["image"](image)),
        (model.encode_text(text), heads["text"](text)),
    ]


FORMATS: dict[str, tuple[Callable[[Run, Path], Pairs], str]] = {
    "clip": (_clip, "`transformers.CLIPModel.from_pretrained` loads it, with tokenizer and image processor."),
    "text": (_text, "`sentence_transformers.SentenceTransformer` loads the text side."),
    "model": (_model, "weights as safetensors; `load_model.py` loads them."),
}


# --- the card ---


def model_card(run: Run, notes: list[str]) -> str:
    """What the model is, how it was trained, its figures under their protocol, and what was written."""
    config = run.config
    about = {
        "image tower": f"{config.image_tower}, {config.image_tower_mode}, {config.image_size} pixels",
        "text tower": f"{config.text_tower}, {config.text_tower_mode}",
        "heads": f"{config.image_head} for pictures, {config.text_head} for captions",
        "joint space": f"{config.embed_dim} numbers, compared by cosine",
        "loss": f"{config.loss}, temperature {run.model.temperature:.3f}",
        "epochs": f"{run.training.get('epochs', len(run.history))}, of which the best on {config.val_splits} is kept",
        "seed": str(config.seed),
    }
    lines = [
        f"# {run.name}",
        "",
        "A picture encoder and a caption encoder with one joint space.",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        "## Files",
        "",
        *notes,
        "",
        "## Figures",
        "",
        *_figures({name: of for name, of in run.metrics.items() if of.get("weights") == run.weights}),
    ]
    return "\n".join(lines) + "\n"


def _figures(metrics: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A table row each figure, in percent where it is a recall."""
    if not metrics:
        yield "Not evaluated yet."
        return
    yield "| split | protocol | images | captions | figure | value | 95 % interval | chance |"
    yield "|---|---|---|---|---|---|---|---|"
    for split, found in metrics.items():
        place = [split, found.get("protocol", ""), found.get("num_images", ""), found.get("num_texts", "")]
        for name in _shown(found):
            ends = [_percent(found.get(f"{name}_{end}")) for end in ("low", "high")]
            by_chance = _percent(found.get(name.replace("_recall@", "_chance@")) if "@" in name else None)
            row = [*place, name, _percent(found[name]), " to ".join(filter(None, ends)), by_chance]
            yield f"| {' | '.join(map(str, row))} |"
    yield ""
    yield "Percent. Intervals: bootstrap over the test images; another seed's training is not in them."


def _shown(found: dict[str, Any]) -> list[str]:
    """The recalls; where a data set measures something else, every share in [0, 1]."""
    recalls = [name for name in found if re.fullmatch(r"(i2t|t2i)_recall@\d+", name)]
    return recalls or [name for name, value in found.items() if isinstance(value, float) and 0 <= value <= 1]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
