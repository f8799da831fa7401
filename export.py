"""Writes a run's model for use outside the lab: for transformers, for sentence-transformers, and as it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config
from errors import LabError
from export_clip import clip_features, write_clip
from export_model import loaded, sentence_features, write_heads, write_model, write_sentence_transformer
from files import make_folder, write_text
from models import CLIPModel, build_model
from runs import Run, own_image_weights

TOLERANCE = 1e-5
TEXTS = ["a red square beside a blue circle", "two dogs run through the snow", "a man"]


def export_run(run: Run, folder: str | Path) -> list[Path]:
    """Write every format that fits the run's model, and a model card that says why others do not.

    `clip/` for transformers' CLIPModel, `text/` for sentence-transformers, `model/` as safetensors with a
    loader of its own. Each is read back, and kept only if it gives the model's features to 1e-5.

    Returns: the card, and the folder of each format written.
    Raises: LabError if the run has no weights.
    """
    folder = make_folder(folder)
    written: list[Path] = []
    notes: list[str] = []
    run.model  # noqa: B018  a run without weights is no matter of formats
    for name, (write, what) in FORMATS.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        try:
            difference = _largest(write(run, folder / name), folder / name)
        except LabError as error:
            shutil.rmtree(folder / name, ignore_errors=True)
            notes.append(f"- `{name}/` is left out: {error}")
            print(notes[-1])
        else:
            written.append(folder / name)
            notes.append(f"- `{name}/`: {what} Largest difference from the run's features: {difference:.0e}.")
    card = folder / "README.md"
    write_text(card, model_card(run, notes))
    return [card, *written]


Pairs = list[tuple[Tensor, Tensor]]
"""Features by the run's model, and the same by what was written."""


def _largest(pairs: Pairs, folder: Path) -> float:
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
