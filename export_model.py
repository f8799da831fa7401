"""A text side as a folder that sentence-transformers loads; any model as safetensors with a loader of its own."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

import compat  # noqa: F401

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from config import Config
from errors import LabError
from export_clip import plain_layers, text_config
from files import atomic_path, write_json, write_text
from models import CLIPModel
from runs import own_image_weights
from transformer import TextTransformer

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


def _cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


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
