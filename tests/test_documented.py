"""The documented usage, word for word, with small towers saved to disk and loaded by the same calls."""

import gzip
import json
from pathlib import Path

from core.devices import get_device

import huggingface_hub
import open_clip
import pytest
import torch
import torchvision
import transformers
from small_data import write_coco
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from config import DEFAULT_CONFIG, make_config
from core.errors import LabError
from models import CLIPModel
from towers import base, text
from train import fit


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP text tower with CLIP's own vocabulary, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("clip")
    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    vocabulary = open_clip.SimpleTokenizer().encoder
    vocabulary = {
        k.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): v
        for k, v in vocabulary.items()
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=512
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture
def resnet_weights(tmp_path, monkeypatch):
    """ResNet50's weights where torchvision looks for the downloaded file, made at random."""
    torch.manual_seed(0)
    name = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url.rsplit("/", 1)[1]
    path = tmp_path / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet50().state_dict(), path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_documented_usage(tmp_path, monkeypatch, clip_folder, resnet_weights):
    write_coco(tmp_path / "data" / "coco2014", {"train": 6, "val": 4})
    monkeypatch.chdir(tmp_path)
    text_encoder = text.clip_text(str(clip_folder))

    from config import DEFAULT_CONFIG
    from dataset import COCOClipDataset
    from losses import InfoNCELoss
    from models import CLIPModel
    from utils import train_epoch, validate

    train_dataset = COCOClipDataset(split="train")
    model = CLIPModel(text_encoder, use_batch_norm=True)

    from dataset import make_loader

    train_loader = make_loader(train_dataset, 3)
    criterion = InfoNCELoss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    before = model.image_head[0].weight.clone()
    row = train_epoch(model, train_loader, criterion, optimizer, scheduler, epoch=0, config=DEFAULT_CONFIG)
    assert row["train_loss"] > 0
    assert not torch.equal(model.image_head[0].weight, before)
    found = validate(model, make_loader(COCOClipDataset(split="val"), 4), criterion)
    assert found["num_images"] == 4
    assert found["num_texts"] == 12
    assert 0 <= found["i2t_recall@1"] <= 1


@pytest.mark.parametrize(("kind", "width"), [("CLIPTextModel", 32), ("CLIPTextModelWithProjection", 512)])
def test_a_clip_text_model_of_transformers_is_a_text_tower(kind, width, clip_folder):
    encoder = getattr(transformers, kind).from_pretrained(clip_folder)
    model = CLIPModel(encoder, base.CachedTower(4), embed_dim=width).eval()
    captions = ["a dog in the snow", "two cats"]
    features = model.encode_text(captions)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(captions, padding=True, return_tensors="pt")
    output = encoder(**tokens)
    expected = output.pooler_output if kind == "CLIPTextModel" else output.text_embeds
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected))
    if kind == "CLIPTextModelWithProjection":
        projected = CLIPModel(text.clip_text(str(clip_folder)), base.CachedTower(4)).eval()
        torch.testing.assert_close(projected.encode_text(captions), features)


def test_an_encoder_that_is_no_text_tower_says_so():
    with pytest.raises(
        LabError, match="text_encoder Linear has no attribute width; give a text tower such as"
    ):
        CLIPModel(torch.nn.Linear(2, 2), base.CachedTower(4))


def test_importing_models_leaves_progress_bars_as_they_are(clip_folder):
    hub = huggingface_hub.utils
    assert not hub.are_progress_bars_disabled()
    assert transformers.utils.logging.is_progress_bar_enabled()
    text.clip_text(str(clip_folder))
    assert not hub.are_progress_bars_disabled()
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_the_documented_preset_end_to_end(tmp_path, clip_folder, resnet_weights):
    root = write_coco(tmp_path / "coco", {"train": 6, "val": 4})
    small = dict(
        data_dir=root, cache_dir=tmp_path / "cache", runs_dir=tmp_path / "runs", text_model=str(clip_folder)
    )
    config = make_config("coco_resnet50", num_epochs=1, batch_size=3, image_size=64, **small)
    run = fit(config, show=False)
    assert run.finished
    assert run.folder.name.startswith("coco_resnet50_")
    assert (run.folder / "best.safetensors").is_file()
    assert len(list((tmp_path / "cache" / "features").glob("text-clip-*.safetensors"))) == 2


def test_clip_tokens_are_clips(clip_folder):
    ids = text.clip_text(str(clip_folder)).tokenize(["a dog in the snow"])["input_ids"][0].tolist()
    assert ids == open_clip.tokenize(["a dog in the snow"])[0, : len(ids)].tolist()
    assert len(ids) == 7


def test_a_half_loaded_tokenizer_is_refused(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        if file.name not in ("vocab.json", "merges.txt", "tokenizer.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(LabError, match=r"has .* tokens but its model 49408|could not be loaded"):
        text.clip_text(str(tmp_path))


def test_default_config_is_the_preset():
    assert make_config("coco_resnet50") == DEFAULT_CONFIG
    assert get_device("cpu").type == "cpu"
