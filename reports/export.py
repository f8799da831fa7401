"""A run's model in the formats of other libraries: transformers, sentence-transformers, safetensors with a loader."""

from __future__ import annotations

import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import core.devices  # noqa: F401  before torchvision

import torch
import transformers
from jinja2 import Template
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import fuse_linear_bn_eval

from config import Config
from core.errors import LabError
from core.files import atomic_path, write_json
from metrics import metrics_table
from models import CLIPModel, build_model
from reports.gallery import INTERVALS
from reports.report import markdown_table
from towers.image import ClipVisionTower
from towers.text import CONTEXT
from towers.transformer import ACTIVATIONS, Encoder, TextTransformer, VisionTransformer
from training.checkpoints import own_image_weights
from utils import Run

TOLERANCE = 1e-5
TEXTS = ["a red square beside a blue circle", "two dogs run through the snow", "a man"]
HERE = Path(__file__).parent

FeaturePairs = list[tuple[Tensor, Tensor]]
"""Features by the run's model, and the same by the model that was written and read again."""


# --- heads as plain layers ---


def plain_layers(head: nn.Module) -> list[nn.Module]:
    """A head in eval mode as linear layers, LayerNorms and GELUs: without dropout, BatchNorm folded in.

    Raises: LabError if it has any other layer.
    """
    layers: list[nn.Module] = []
    for layer in _leaves(head):
        if isinstance(layer, (nn.Dropout, nn.Identity)):
            continue
        if isinstance(layer, nn.BatchNorm1d) and layers and isinstance(layers[-1], nn.Linear):
            layers[-1] = fuse_linear_bn_eval(layers[-1], layer)
        elif isinstance(layer, (nn.Linear, nn.LayerNorm, nn.GELU)):
            layers.append(layer)
        else:
            raise LabError(
                f"a head with {type(layer).__name__} is not a chain of linear layers; heads 'identity', 'linear', "
                "'projection', 'mlp', 'siglip' and 'clip' are."
            )
    return layers


def _leaves(head: nn.Module) -> Iterator[nn.Module]:
    if isinstance(head, nn.Sequential):
        for part in head:
            yield from _leaves(part)
    else:
        yield head


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


# --- the whole model ---


def whole_model(run: Run) -> tuple[CLIPModel, Config]:
    """The run's model on the CPU, with towers instead of their cached features, and its configuration."""
    modes = {name: run.config[name] for name in ("image_tower_mode", "text_tower_mode")}
    config = run.config.updated(**{name: "frozen" if m == "cached" else m for name, m in modes.items()})
    if modes["image_tower_mode"] != "cached":
        config = config.updated(image_weights=own_image_weights(config))  # the run's file has them
    model = build_model(config)
    model.load_state_dict(run.model.state_dict(), strict=False)
    return model.eval(), config


def _images(config: Config) -> Tensor:
    """(2, 3, S, S) random uint8."""
    size, generator = config.image_size, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), generator=generator).to(torch.uint8)


def _cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


# --- transformers ---


def write_clip(run: Run, folder: Path) -> FeaturePairs:
    """Write a model that transformers.CLIPModel, AutoTokenizer and AutoImageProcessor load from `folder`.

    Linear heads without bias become CLIP's projections.
    Raises: LabError where a tower or a head differs from CLIP's.
    """
    ours, config = whole_model(run)
    vision, vision_state = _vision_half(ours)
    text, text_state = _text_half(ours)
    scale = ours.logit_parts()["logit_scale"].log().cpu()
    width: dict[str, Any] = {
        "projection_dim": len(vision_state["visual_projection.weight"])
    }  # the halves' own may differ
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**text.to_dict(), **width},
            vision_config={**vision.to_dict(), **width},
            logit_scale_init_value=scale.item(),
            **width,
        )
    )
    clip.load_state_dict({**vision_state, **text_state, "logit_scale": scale})
    clip.save_pretrained(folder)
    ours.text_encoder.tokenizer.save_pretrained(str(folder))
    crop, size = config.image_resize == "crop", vision.image_size
    transformers.CLIPImageProcessor(
        size={"shortest_edge": size} if crop else {"height": size, "width": size},
        do_center_crop=crop,
        crop_size={"height": size, "width": size},
        image_mean=ours.image_encoder.mean.flatten().tolist(),
        image_std=ours.image_encoder.std.flatten().tolist(),
    ).save_pretrained(folder)

    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    pixels = ours.image_encoder.normalise(_images(config))
    image = theirs.get_image_features(pixel_values=pixels).pooler_output
    text_features = theirs.get_text_features(**tokens).pooler_output
    return [
        (ours.encode_image(pixels), nn.functional.normalize(image, dim=-1)),
        (ours.encode_text(TEXTS), nn.functional.normalize(text_features, dim=-1)),
    ]


def _vision_half(model: CLIPModel) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the image side. Raises: LabError if it differs from CLIP's."""
    tower = model.image_encoder
    if model.image_pooling is not None:
        raise LabError("CLIP's image tower uses its class token; this model has attention pooling.")
    head = linear_map(model.image_head, tower.width)
    if isinstance(tower, ClipVisionTower):
        state = _cpu(tower.body)
        state["visual_projection.weight"] = head @ state["visual_projection.weight"]
        return tower.body.config, state
    if not isinstance(tower, VisionTransformer):
        raise LabError("transformers' CLIPModel has image towers 'vit' and 'clip' only.")
    height, across = tower.image_shape
    if height != across or tower.pooling != "class":
        raise LabError("CLIP's image tower needs square images and uses its class token.")
    config = transformers.CLIPVisionConfig(
        **_shape(tower.encoder), image_size=height, patch_size=height // tower.grid[0]
    )
    state = {f"vision_model.{name}": value for name, value in _cpu(tower).items()}
    return config, {**state, "visual_projection.weight": head}


def _text_half(model: CLIPModel) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the text side. Raises: LabError if it differs from CLIP's."""
    encoder = getattr(model.text_encoder, "encoder", None)
    head = linear_map(model.text_head, model.text_encoder.width)
    if isinstance(encoder, transformers.CLIPTextModelWithProjection):
        state = _cpu(encoder)
        state["text_projection.weight"] = head @ state["text_projection.weight"]
        return encoder.config, state
    if not isinstance(encoder, TextTransformer):
        raise LabError("transformers' CLIPModel has text towers 'transformer' and 'clip' only.")
    state = {f"text_model.{name}": value for name, value in _cpu(encoder).items()}
    return text_config(encoder), {**state, "text_projection.weight": head}


def text_config(encoder: TextTransformer) -> Any:
    """A built-in text transformer's shape as a configuration of transformers."""
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


# --- sentence-transformers ---


def write_sentence_transformer(run: Run, folder: Path) -> FeaturePairs:
    """Write the text tower and its head as a SentenceTransformer.

    Raises: LabError if the head is not a chain of linear layers, or the tower pools in a way of its own.
    """
    from sentence_transformers import SentenceTransformer  # takes seconds
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    model, _ = whole_model(run)
    tower = model.text_encoder
    if tower.pooling == "last":
        raise LabError("text tower 'e5' adds its end token itself, which sentence-transformers does not.")
    body, projection = _backbone(tower.encoder)
    head = _sentence_modules([*projection, *plain_layers(model.text_head)])
    with tempfile.TemporaryDirectory() as plain:
        body.save_pretrained(plain)
        tower.tokenizer.save_pretrained(plain)
        encoder = Transformer(plain, max_seq_length=tower.max_length)
    mean = tower.pooling == "mean"  # otherwise at the end token, the last one that is not padding
    pooling = Pooling(body.config.hidden_size, "mean" if mean else "lasttoken")
    modules = [encoder, pooling, *([Normalize()] if mean else []), *head, Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    written = SentenceTransformer(str(folder), device="cpu")
    features = written.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return [(model.encode_text(TEXTS), features)]


def _backbone(encoder: nn.Module) -> tuple[Any, list[nn.Module]]:
    """The transformers model that AutoModel loads, and the projection after it, if any."""
    if isinstance(encoder, transformers.CLIPTextModelWithProjection):
        return encoder.text_model, [encoder.text_projection]
    if not isinstance(encoder, TextTransformer):
        return encoder, []
    body = transformers.CLIPTextModel(text_config(encoder))
    body.load_state_dict(encoder.state_dict())
    return body, []


def _sentence_modules(layers: list[nn.Module]) -> list[nn.Module]:
    """Linear layers, each with the GELU after it, and LayerNorms, as modules of sentence-transformers."""
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm

    modules: list[nn.Module] = []
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Linear):
            activation = nn.GELU() if isinstance(following, nn.GELU) else nn.Identity()
            dense = Dense(layer.in_features, layer.out_features, layer.bias is not None, activation)
            dense.linear.load_state_dict(layer.state_dict())
            modules.append(dense)
        elif isinstance(layer, nn.LayerNorm):
            norm = LayerNorm(layer.normalized_shape[0])
            norm.norm.load_state_dict(layer.state_dict())
            modules.append(norm)
    return modules


# --- safetensors and a loader ---


def write_model(run: Run, folder: Path) -> FeaturePairs:
    """Write a whole model that `load_model.py` builds with the lab's modules; of cached towers the heads only."""
    if run.config.image_tower_mode == run.config.text_tower_mode == "cached":
        return _write_heads(run, folder)
    ours, config = whole_model(run)
    config = config.updated(image_weights=own_image_weights(config))  # the file has them
    content = config.model_dump(mode="json", exclude={"start_from"})
    theirs = _written(folder, _cpu(ours), content, "load_model.txt")
    images = _images(config)
    return [
        (ours.encode_image(images), theirs.encode_image(images)),
        (ours.encode_text(TEXTS), theirs.encode_text(TEXTS)),
    ]


def _write_heads(run: Run, folder: Path) -> FeaturePairs:
    """Write the heads of a model on cached features; `load_model.py` needs only torch and safetensors.

    Raises: LabError if a head is not a chain of linear layers.
    """
    model = run.model.cpu()
    heads = {"image": plain_layers(model.image_head), "text": plain_layers(model.text_head)}
    towers = run.config.model_dump(
        mode="json", include={"image_tower", "image_weights", "text_tower", "text_model"}
    )
    descriptions = {side: [_description(layer) for layer in layers] for side, layers in heads.items()}
    content = {"heads": descriptions, "temperature": model.temperature, **towers}
    weights = _cpu(nn.ModuleDict({side: nn.Sequential(*layers) for side, layers in heads.items()}))
    written = _written(folder, weights, content, "load_heads.txt")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, model.image_encoder.width, generator=generator)
    text = torch.randn(4, model.text_encoder.width, generator=generator)
    return [
        (model.encode_image(image), written["image"](image)),
        (model.encode_text(text), written["text"](text)),
    ]


def _description(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    if isinstance(layer, nn.Linear):
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
        return "Linear", {**sizes, "bias": layer.bias is not None}
    if isinstance(layer, nn.LayerNorm):
        return "LayerNorm", {"normalized_shape": list(layer.normalized_shape), "eps": layer.eps}
    return type(layer).__name__, {}


def _written(folder: Path, weights: dict[str, Tensor], content: dict[str, Any], loader: str) -> Any:
    """Write weights, configuration and loader; returns the model that the loader gives."""
    with atomic_path(folder / "model.safetensors") as beside:
        save_file(weights, beside)
    write_json(folder / "config.json", content)
    shutil.copyfile(HERE / loader, folder / "load_model.py")
    return runpy.run_path(str(folder / "load_model.py"))["load_model"]()


# --- all formats ---

FORMATS: dict[str, tuple[Callable[[Run, Path], FeaturePairs], str]] = {
    "clip": (
        write_clip,
        "`transformers.CLIPModel.from_pretrained` loads it, with tokenizer and image processor.",
    ),
    "text": (write_sentence_transformer, "`sentence_transformers.SentenceTransformer` loads the text side."),
    "model": (write_model, "weights as safetensors; `load_model.py` loads them."),
}


@torch.no_grad()
def write_format(run: Run, name: str, folder: Path) -> str:
    """Write a format into a new folder and read it back; returns what it is, for the model card.

    Raises: LabError if the model does not fit the format, or its features differ; the folder is removed then.
    """
    write, description = FORMATS[name]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        difference = max((ours - theirs).abs().max().item() for ours, theirs in write(run, folder))
        if not difference <= TOLERANCE:
            raise LabError(f"the features of {folder} differ from the run's by {difference:.1e}.")
    except LabError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return f"{description} Largest difference from the run's features: {difference:.0e}."


def model_card(run: Run, notes: list[str]) -> str:
    """What the model is, how it was trained, which files were written, and its metrics under their protocol."""
    current = {
        split: metrics for split, metrics in run.metrics.items() if metrics.get("weights") == run.weights
    }
    template = Template((HERE / "card.md").read_text(encoding="utf-8"), trim_blocks=True)
    table = markdown_table(metrics_table(current)) if current else ""
    return template.render(run=run, config=run.config, notes=notes, metrics=table, intervals=INTERVALS) + "\n"
