"""Towers by folder, and what `python encode.py` writes."""

import json
import multiprocessing
from pathlib import Path

import core.devices  # noqa: F401

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from config import make_config
from core.errors import LabError
from dataset import load_table
from encode import preencode
from interface import cli
from sources.embeddings import read_pairs
from sources.image_cache import open_images
from towers import features as towers_features
from towers import image as towers_image
from towers import text as towers_text
from towers.base import load_weights
from towers.features import cached_image_features, cached_text_features

SIDE = 32
TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> str:
    """A tiny SigLIP of images and texts with an image processor, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        vision_config=dict(**TINY, image_size=SIDE, patch_size=16),
        text_config=dict(**TINY, vocab_size=40, bos_token_id=1, eos_token_id=2),
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    transformers.SiglipImageProcessor(image_mean=mean, image_std=std).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory) -> str:
    """A tiny Mistral whose tokenizer adds no end mark, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("mistral")
    words = "a picture number of tint told times dog runs".split()
    vocabulary = {
        token: row for row, token in enumerate(["<unk>", "<s>", "</s>", *words, *map(str, range(300))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.MistralConfig(**TINY, num_key_value_heads=1, vocab_size=len(vocabulary), head_dim=8)
    transformers.MistralModel(config).save_pretrained(folder)
    return str(folder)


# --- towers ---


def test_a_vision_tower_gives_the_models_own_pooled_output(siglip_folder):
    tower = towers_image.siglip(siglip_folder).eval()
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    whole = transformers.SiglipModel.from_pretrained(siglip_folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(siglip_folder)
    pixels = processor(list(images), do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = whole.get_image_features(pixel_values=pixels)
        expected = getattr(expected, "pooler_output", expected)
        assert torch.allclose(tower(images), expected, atol=1e-5)
        patches = whole.vision_model(pixel_values=pixels).last_hidden_state  # (3, 4, 16), row by row
        assert torch.allclose(tower.feature_map(images)[:, :, 1, 0], patches[:, 2], atol=1e-5)
    assert tower.width == towers_image.image_width("siglip", siglip_folder) == 16
    assert towers_image.image_size("siglip", siglip_folder) == SIDE
    with pytest.raises(LabError, match="set image_size to 32"):
        tower(images[:, :, :16, :16])


def test_any_vision_model_serves_and_its_class_token_is_no_patch(tmp_path):
    config = transformers.ViTConfig(**TINY, image_size=SIDE, patch_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    tower = towers_image.siglip(str(tmp_path)).eval()
    assert tower.mean.flatten().tolist() == tower.std.flatten().tolist() == [0.5] * 3  # no processor is there
    with torch.inference_mode():
        assert tower.feature_map(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 16, 4, 4)
        assert tower(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 16)


def test_what_is_no_whole_vision_model_is_refused(tmp_path, mistral_folder):
    with pytest.raises(LabError, match="has no vision model"):
        towers_image.siglip(mistral_folder)
    config = transformers.ViTConfig(**TINY, image_size=SIDE, patch_size=16)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(LabError, match=r"lack pooler\.dense"):  # it would be random
        towers_image.siglip(str(tmp_path))
    with pytest.raises(LabError, match="text_tower 'sentence' needs text_model"):
        towers_text.sentence()


def test_e5_reads_the_end_mark_whatever_the_padding(mistral_folder):
    tower = towers_text.e5(mistral_folder).eval()
    texts = ["a dog", "a picture of a dog number 12", "dog runs"]
    assert tower.tokenize(texts[:1])["input_ids"].tolist() == [[3, 10, 2]]
    assert tower.lengths(texts) == [3, 8, 3]
    model = transformers.AutoModel.from_pretrained(mistral_folder).eval()
    expected = []
    with torch.inference_mode():
        for text in texts:
            ids = tower.tokenizer(text)["input_ids"] + [2]
            expected.append(model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
        expected = torch.nn.functional.normalize(torch.stack(expected), dim=-1)
        for side in ("right", "left"):
            tower.tokenizer.padding_side = side
            assert torch.allclose(tower(texts), expected, atol=1e-5)
        tower.max_length = 4
        assert tower.tokenize(texts)["input_ids"][1].tolist()[-1] == 2  # a cut text keeps its end mark
    assert towers_text.text_width("e5", mistral_folder) == tower.width == 16


def test_a_sentence_encoder_by_folder():
    folder = towers_text.packaged_minilm()
    with torch.inference_mode():
        same = towers_text.sentence(folder).eval()(["a dog"]), towers_text.minilm().eval()(["a dog"])
    assert torch.equal(*same)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_weights_files_that_are_none_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=rf"{name}.* (cannot be read|does not hold this tower's weights)"):
        load_weights(torch.nn.Linear(2, 2), str(tmp_path / name))


def test_random_weights_need_no_hub():
    assert (
        towers_image.image_width("siglip", "random") == transformers.SiglipVisionConfig().hidden_size == 768
    )
    assert np.isclose(
        transformers.SiglipVisionConfig().image_size, towers_image.image_size("siglip", "random")
    )


# --- python encode.py ---


def _config(coco, tmp_path, siglip_folder, mistral_folder, **settings):
    return make_config(
        "quickstart", **{"cache_dir": tmp_path / "cache", **settings}, source=None, data_dir=coco, device="cpu",
        image_tower="siglip", image_weights=siglip_folder, text_tower="e5", text_model=mistral_folder,
    )  # fmt: skip


def test_the_command_writes_both_layouts(coco, tmp_path, siglip_folder, mistral_folder, capsys, monkeypatch):
    out = tmp_path / "out"
    words = (
        f"--image_tower siglip --image_weights {siglip_folder} --text_tower e5 --text_model {mistral_folder} "
        f"--data_dir {coco} --reader coco --cache_dir {tmp_path / 'cache'} --device cpu --folder {out}"
    )
    monkeypatch.setattr("sys.argv", ["encode.py", *words.split()])
    cli.encode()
    assert "image_size is 32, the only size that image tower 'siglip' takes" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{split}_{end}"
        for split in ("train", "val")
        for end in ("image_embeddings.pt", "text_embeddings.pt", "metadata.json")
    )
    images = torch.load(out / "val_image_embeddings.pt", weights_only=True)
    assert (images.shape, images.dtype) == ((24, 16), torch.float16)
    metadata = json.loads((out / "val_metadata.json").read_text())
    assert metadata["image_ids"] == [ident for ident in range(25, 33) for _ in range(3)]
    assert metadata["text_tower"] == "e5"

    config = _config(coco, tmp_path, siglip_folder, mistral_folder, image_size=SIDE)
    table = load_table(config, ("val",))
    before = _stamps(tmp_path / "cache" / "features")
    features, _ = cached_image_features(config, table, progress=False)  # our layout, filled already
    texts = cached_text_features(config, table.captions, progress=False)
    assert _stamps(tmp_path / "cache" / "features") == before
    pairs = read_pairs(out, "val")
    assert torch.equal(pairs.images[:], features)
    assert torch.equal(pairs.text_features[:], texts)
    assert pairs.table.captions == table.captions
    assert pairs.table.paths == table.paths


def _encode_share(config, folder, rank, world):
    preencode(config, folder, progress=False, shard=(rank, world))


def test_two_processes_encode_half_each(coco, tmp_path, siglip_folder, mistral_folder, monkeypatch):
    monkeypatch.setattr(towers_features, "TEXTS_PER_FILE", 10)
    monkeypatch.setattr(towers_features, "IMAGES_PER_FILE", 3)
    places = (coco, tmp_path, siglip_folder, mistral_folder)
    alone = _config(*places, image_size=SIDE, cache_dir=tmp_path / "alone")
    preencode(alone, tmp_path / "expected", progress=False)
    config = _config(*places, image_size=SIDE)
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=_encode_share, args=(config, tmp_path / "out", rank, 2)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert not (tmp_path / "out").exists()
    parts = {path.parent.name: 0 for path in (tmp_path / "cache").rglob("*.parts/*.safetensors")}
    for path in (tmp_path / "cache").rglob("*.parts/*.safetensors"):
        parts[path.parent.name] += 1
    assert sorted(parts.values()) == [3, 3, 8, 8]  # 8 and 24 images, 24 and 72 captions

    def refuse(*_):
        raise AssertionError("the shares hold everything already")

    monkeypatch.setattr(towers_features, "encode_texts", refuse)
    monkeypatch.setattr(towers_features, "encode_images", refuse)
    preencode(config, tmp_path / "out", progress=False)
    for path in sorted((tmp_path / "expected").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def _stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_features_are_the_towers_of_the_very_pictures_and_captions(
    coco, tmp_path, siglip_folder, mistral_folder
):
    config = _config(coco, tmp_path, siglip_folder, mistral_folder, image_size=SIDE)
    bad = coco / "val2014" / "COCO_val2014_000000000026.jpg"
    bad.write_bytes(b"<html>not found</html>")
    report = preencode(config, tmp_path / "out", progress=False)
    assert report.loc["val"].to_dict() == {
        "images": 7, "captions": 24, "pairs": 21, "image width": 16, "text width": 16}  # fmt: skip
    pairs = read_pairs(tmp_path / "out", "val")
    assert 26 not in pairs.table.image_ids
    table = load_table(config, ("val",))
    pixels = open_images(table, config.cache_dir, SIDE, "crop").gather([5])
    with torch.inference_mode():
        image = towers_image.siglip(siglip_folder).eval()(pixels)[0]
        text = towers_text.e5(mistral_folder).eval()(table.captions_of(5))
    assert torch.allclose(pairs.images[[4]][0].float(), image, atol=2e-3)
    assert torch.allclose(pairs.text_features[12:15].float(), text, atol=2e-3)
