"""Exports read back by other libraries, or by a bare Python: the same features."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import core.devices  # noqa: F401

import pytest
import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

from config import make_config
from core.errors import LabError
from evaluate import export_run
from models import HEADS, HeadOptions, build_model
from reports.export import linear_map, plain_layers
from towers import text as towers_text
from training.checkpoints import MEASURED
from utils import Run, load_run

TEXTS = ["a green triangle", "two dogs, one of them black, run through deep snow", "a"]
SCRATCH = dict(
    image_size=32,
    image_patch_size=8,
    image_width=24,
    image_num_layers=2,
    image_num_heads=4,
    text_width=16,
    text_num_layers=2,
    text_num_heads=2,
    embed_dim=12,
)
CACHED = dict(image_tower_mode="cached", image_tower="efficientnet_lite0", text_tower="minilm", embed_dim=8)
CLOSE = dict(atol=1e-5, rtol=0)


def pictures(size=32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


def make_run(folder: Path, **settings) -> Run:
    """A run's folder as training leaves it, with random weights and BatchNorm statistics."""
    config = make_config(**{"preset": "coco_resnet50", **settings})
    model = build_model(config)
    torch.manual_seed(7)
    with torch.no_grad():
        for part in [model.image_head, model.text_head, *model.modules()]:
            if isinstance(part, torch.nn.BatchNorm1d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                part.weight.normal_()
        for parameter in model.image_head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config.save(folder / "config.yaml")
    save_file(model.state_dict(), folder / "best.safetensors")
    metrics = dict.fromkeys(MEASURED, "") | {"num_images": 500, "num_texts": 2500, "protocol": "one split"}
    recall = {"i2t_recall@1": 0.25, "i2t_recall@1_low": 0.21, "i2t_recall@1_high": 0.291}
    recall["i2t_chance@1"] = 0.002
    recall["weights"] = load_run(folder).weights
    (folder / "metrics.json").write_text(json.dumps({"test": {**metrics, **recall}}))
    (folder / "training.json").write_text(json.dumps({"finished": True, "epochs": 3}))
    return load_run(folder)


def transformers_features(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features by what a stranger would write."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(list(pictures()), return_tensors="pt")["pixel_values"]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens)
    return logits.image_embeds, logits.text_embeds, logits.logits_per_image


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("scratch"), preset="clip_from_scratch", **SCRATCH)


@pytest.fixture(scope="module")
def scratch_export(scratch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    assert export_run(scratch, folder) == [
        folder / "README.md",
        folder / "clip",
        folder / "text",
        folder / "model",
    ]
    return folder


# ---------------------------------------------------------------- transformers


def test_from_scratch_towers_load_as_clip(scratch, scratch_export):
    image, text, logits = transformers_features(scratch_export / "clip")
    with torch.no_grad():
        ours = scratch.model(pictures(), TEXTS)
    torch.testing.assert_close(image, ours["image_features"], **CLOSE)
    torch.testing.assert_close(text, ours["text_features"], **CLOSE)
    expected = ours["logit_scale"] * ours["image_features"] @ ours["text_features"].T
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_pretrained_towers_and_a_head_on_them_fold_into_one_projection(tmp_path):
    torch.manual_seed(0)
    tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        vision_config=dict(**tiny, image_size=32, patch_size=8),
        text_config=dict(**tiny, vocab_size=49408, eos_token_id=49407),
        projection_dim=10,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    towers_text.text_tokenizer("transformer").save_pretrained(tmp_path / "clip")
    run = make_run(
        tmp_path / "run",
        image_tower="clip",
        image_weights=str(tmp_path / "clip"),
        image_size=32,
        image_head="projection",
        text_tower="clip",
        text_model=str(tmp_path / "clip"),
        text_tower_mode="trainable",
        text_head="identity",
        embed_dim=10,
    )
    written = export_run(run, tmp_path / "out")
    assert [path.name for path in written] == ["README.md", "clip", "text", "model"]
    image, text, _ = transformers_features(tmp_path / "out" / "clip")
    torch.testing.assert_close(image, run.model.encode_image(pictures()), **CLOSE)
    torch.testing.assert_close(text, run.model.encode_text(TEXTS), **CLOSE)


def test_what_is_not_clip_shaped_says_why(tmp_path, scratch, capsys):
    settings = {**SCRATCH, "image_head": "mlp", "head_hidden_dim": 8}
    run = make_run(tmp_path / "run", preset="clip_from_scratch", **settings)
    written = export_run(run, tmp_path / "out")
    assert [path.name for path in written] == ["README.md", "text", "model"]
    reason = (
        "`clip/` is left out: CLIP's projections are linear maps without bias; train with heads 'projection'"
    )
    assert reason in capsys.readouterr().out
    assert reason in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "clip").exists()


# ---------------------------------------------------------------- sentence-transformers


def test_a_causal_text_side_loads_as_sentence_transformer(scratch, scratch_export):
    theirs = SentenceTransformer(str(scratch_export / "text"), device="cpu").encode(
        TEXTS, convert_to_tensor=True
    )
    torch.testing.assert_close(theirs, scratch.model.encode_text(TEXTS), **CLOSE)


@pytest.mark.parametrize(
    ("head", "kinds"),
    [
        ("mlp", ["Dense", "Dense"]),
        ("clip", ["LayerNorm", "Dense", "Dense"]),
    ],
)
def test_minilm_and_its_head_load_as_sentence_transformer(tmp_path, head, kinds):
    run = make_run(
        tmp_path / "run", **CACHED, text_head=head, head_hidden_dim=20, head_dropout=0.5, image_head="linear"
    )
    export_run(run, tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out" / "text"), device="cpu")
    assert [type(part).__name__ for part in model] == [
        *("Transformer", "Pooling", "Normalize"),
        *kinds,
        "Normalize",
    ]
    features = towers_text.minilm().eval()(TEXTS)
    torch.testing.assert_close(
        model.encode(TEXTS, convert_to_tensor=True), run.model.encode_text(features), **CLOSE
    )


# ---------------------------------------------------------------- the loader


BARE = """
import sys, torch
assert not any(name in sys.modules for name in ("models", "config", "transformers"))
sys.path.insert(0, sys.argv[1])
from load_model import load_model
torch.manual_seed(1)
heads = load_model()
image, text = torch.randn(3, 1280), torch.randn(3, 384)
torch.save([image, text, heads["image"](image), heads["text"](text)], sys.argv[2])
assert "transformers" not in sys.modules and "models" not in sys.modules
"""


def test_heads_load_with_torch_and_safetensors_alone(tmp_path):
    run = make_run(
        tmp_path / "run",
        **CACHED,
        head_hidden_dim=20,
        use_batch_norm=True,
        use_layer_norm=True,
        text_head="siglip",
    )
    export_run(run, tmp_path / "out")
    command = [sys.executable, "-c", BARE, str(tmp_path / "out" / "model"), str(tmp_path / "features.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    image, text, by_image, by_text = torch.load(tmp_path / "features.pt")
    torch.testing.assert_close(by_image, run.model.encode_image(image), **CLOSE)
    torch.testing.assert_close(by_text, run.model.encode_text(text), **CLOSE)
    assert len((tmp_path / "out" / "model" / "load_model.py").read_text().splitlines()) <= 32


def test_a_whole_model_loads_beside_the_labs_modules(scratch, scratch_export):
    model = runpy.run_path(str(scratch_export / "model" / "load_model.py"))["load_model"]()
    torch.testing.assert_close(
        model.encode_image(pictures()), scratch.model.encode_image(pictures()), **CLOSE
    )
    torch.testing.assert_close(model.encode_text(TEXTS), scratch.model.encode_text(TEXTS), **CLOSE)


def test_a_cached_text_tower_is_written_along(tmp_path):
    settings = {**SCRATCH, "image_head": "mlp", "text_tower": "minilm", "text_tower_mode": "cached"}
    run = make_run(tmp_path / "run", preset="clip_from_scratch", **settings)
    assert [path.name for path in export_run(run, tmp_path / "out")] == ["README.md", "text", "model"]
    theirs = SentenceTransformer(str(tmp_path / "out" / "text"), device="cpu")
    ours = run.model.encode_text(towers_text.minilm().eval()(TEXTS))
    torch.testing.assert_close(theirs.encode(TEXTS, convert_to_tensor=True), ours, **CLOSE)


# ---------------------------------------------------------------- heads, and the card


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_folded_batch_norm_is_exact(head):
    torch.manual_seed(0)
    made = HEADS[head](6, 4, HeadOptions(hidden_dim=5, dropout=0.3, batch_norm=True))
    for _ in range(20):
        made(torch.randn(8, 6) * 3 + 1)
    made.eval()
    x = torch.randn(7, 6)
    layers = plain_layers(made)
    assert not any(isinstance(layer, torch.nn.BatchNorm1d) for layer in layers)
    torch.testing.assert_close(torch.nn.Sequential(*layers)(x), made(x), **CLOSE)


def test_maps_of_heads():
    options = HeadOptions()
    assert torch.equal(linear_map(HEADS["identity"](3, 3, options), 3), torch.eye(3))
    projection = HEADS["projection"](4, 3, options)
    x = torch.randn(2, 4)
    torch.testing.assert_close(
        F.normalize(x @ linear_map(projection, 4).T, dim=1), F.normalize(projection.eval()(x), dim=1)
    )
    for name in ("linear", "mlp", "siglip"):
        with pytest.raises(LabError, match="linear maps without bias"):
            linear_map(HEADS[name](4, 3, options), 4)
    with pytest.raises(LabError, match="not a chain of linear layers"):
        plain_layers(HEADS["attention"](4, 3, HeadOptions(hidden_dim=64, num_heads=2, num_tokens=4)))


def test_the_card_states_protocol_figures_and_intervals(scratch_export):
    card = (scratch_export / "README.md").read_text()
    assert "| test | one split | 500 | 2,500 | model | 25.0 [21.0, 29.1] |" in card
    assert "| test | one split | 500 | 2,500 | chance | 0.2 |" in card
    assert "- image tower: vit, trainable, 32 pixels" in card
    assert card.count("Largest difference from the run's features") == 3


def test_a_run_without_weights_is_refused(tmp_path):
    run = make_run(tmp_path / "run", **CACHED, text_head="linear")
    (tmp_path / "run" / "best.safetensors").unlink()
    with pytest.raises(LabError, match=r"holds no best\.safetensors"):
        export_run(load_run(tmp_path / "run"), tmp_path / "out")
    assert run.name == "run"
