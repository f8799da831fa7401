"""A text side as a folder that sentence-transformers loads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import compat  # noqa: F401

import torch
import transformers
from torch import Tensor, nn

from errors import LabError
from export_clip import text_config
from export_heads import plain_layers
from models import CLIPModel
from text_transformer import TextTransformer


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
