"""Towers by folder, `python encode.py`, and embeddings of other makers: what is written, read, refused."""

import contextlib
import json
import multiprocessing
import os
from pathlib import Path

import core.devices  # noqa: F401

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from config import make_config
from core.errors import LabError
from dataset import COCOClipDataset, load_table, make_loader
from encode import preencode
from interface import cli
from sources.embeddings import read_pairs, read_splits
from sources.image_cache import open_images
from towers import features as towers_features
from towers import image as towers_image
from towers import text as towers_text
from towers.base import load_weights
from towers.features import cached_features, cached_image_features, cached_text_features, fill_share

SIDE = 32
TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> str:
    """A tiny SigLIP of pictures and texts with an image processor, as save_pretrained leaves it."""
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


# ---------------------------------------------------------------- towers


def test_a_vision_tower_gives_the_models_own_pooled_output(siglip_folder):
    tower = towers_image.siglip(siglip_folder).eval()
    pictures = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    whole = transformers.SiglipModel.from_pretrained(siglip_folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(siglip_folder)
    pixels = processor(list(pictures), do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = whole.get_image_features(pixel_values=pixels)
        expected = getattr(expected, "pooler_output", expected)
        assert torch.allclose(tower(pictures), expected, atol=1e-5)
        patches = whole.vision_model(pixel_values=pixels).last_hidden_state  # (3, 4, 16), row by row
        assert torch.allclose(tower.feature_map(pictures)[:, :, 1, 0], patches[:, 2], atol=1e-5)
    assert tower.width == towers_image.image_width("siglip", siglip_folder) == 16
    assert towers_image.image_size("siglip", siglip_folder) == SIDE
    with pytest.raises(LabError, match="set image_size to 32"):
        tower(pictures[:, :, :16, :16])


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


# ---------------------------------------------------------------- python encode.py


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
    assert sorted(parts.values()) == [3, 3, 8, 8]  # 8 and 24 pictures, 24 and 72 captions

    def refuse(*_):
        raise AssertionError("the shares hold everything already")

    monkeypatch.setattr(towers_features, "encode_texts", refuse)
    monkeypatch.setattr(towers_features, "encode_images", refuse)
    preencode(config, tmp_path / "out", progress=False)
    for path in sorted((tmp_path / "expected").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_share_that_was_cut_goes_on(tmp_path):
    path, header = tmp_path / "text.safetensors", {"of": "numbers"}
    seen: list[list[int]] = []

    def compute(rows, fail_at=None):
        seen.append(list(rows))
        if fail_at in rows:
            raise RuntimeError("cut")
        return torch.tensor([[float(row)] for row in rows])

    with pytest.raises(RuntimeError, match="cut"):
        fill_share(path, header, 10, lambda rows: compute(rows, 8), (0, 2), chunk=2)
    assert seen == [[0, 1], [4, 5], [8, 9]]
    fill_share(path, header, 10, compute, (0, 2), chunk=2)
    assert seen[3:] == [[8, 9]]
    fill_share(path, header, 10, compute, (1, 2), chunk=2)
    assert seen[4:] == [[2, 3], [6, 7]]
    found = cached_features(path, header, 10, compute, chunk=2)
    assert found.flatten().tolist() == list(range(10))
    assert len(seen) == 6


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


# ---------------------------------------------------------------- reading


def _write(folder: Path, images, texts, metadata, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(images, folder / f"{split}_image_embeddings.pt")
    torch.save(texts, folder / f"{split}_text_embeddings.pt")
    (folder / f"{split}_metadata.json").write_text(
        metadata if isinstance(metadata, str) else json.dumps(metadata), encoding="utf-8"
    )
    return folder


def _pairs(ids, dtype=torch.float32):
    """Embeddings in which a row says its image and its place."""
    images = torch.tensor([[float(len(str(ident))), hash(ident) % 7 + 1.0] for ident in ids], dtype=dtype)
    return images, torch.arange(float(len(ids)))[:, None].to(dtype)


def test_each_image_is_stored_once_and_captions_follow_it(tmp_path):
    ids = [40, 7, 40, 7, 9, 40]
    images, texts = _pairs(ids)
    images[2] *= 1 + 1e-3  # rounding
    pairs = read_pairs(_write(tmp_path, images, texts, {"image_ids": ids}))
    assert pairs.table.image_ids.tolist() == [40, 7, 9]
    assert torch.equal(pairs.images[:], images[[0, 1, 4]])
    assert pairs.text_features[:].flatten().tolist() == [0, 2, 5, 1, 3, 4]
    assert list(pairs.table.captions) == [""] * 6
    dataset = COCOClipDataset("train", **pairs._asdict())
    batch = next(iter(make_loader(dataset, 3)))
    assert batch["text_id"].tolist() == [40, 40, 40, 7, 7, 9]
    assert batch["text"].flatten().tolist() == [0, 2, 5, 1, 3, 4]
    assert torch.equal(batch["image"], pairs.images[:])


def test_ids_may_be_texts_and_captions_given(tmp_path):
    ids = ["b.jpg", "b.jpg", "a.jpg"]
    metadata = {"image_ids": ids, "captions": ["one", "two", "three"]}
    pairs = read_pairs(_write(tmp_path, *_pairs(ids, torch.bfloat16), metadata))
    assert list(pairs.table.paths) == ["b.jpg", "a.jpg"]
    assert pairs.table.captions_of(0) == ["one", "two"]
    again = read_pairs(_write(tmp_path, *_pairs(ids[2:]), {"image_ids": ids[2:]}, "val"), "val")
    assert again.table.image_ids[0] == pairs.table.image_ids[1]  # the same number in every split


def test_a_split_that_leaks_names_its_images(tmp_path):
    _write(tmp_path, *_pairs(["a", "b", "c"]), {"image_ids": ["a", "b", "c"]})
    _write(tmp_path, *_pairs(["d", "b"]), {"image_ids": ["d", "b"]}, "val")
    _write(tmp_path, *_pairs([1, 2]), {"image_ids": [1, 2]}, "test")
    assert [len(pairs.table) for pairs in read_splits(tmp_path, "train", "test").values()] == [3, 2]
    with pytest.raises(LabError, match="1 images of split 'val' are in another split too: b;"):
        read_splits(tmp_path, "train", "val")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are listed on Linux only")
def test_what_can_stays_on_disk(tmp_path):
    ids = list(range(50))
    pairs = read_pairs(_write(tmp_path, torch.rand(50, 4), torch.rand(50, 4), {"image_ids": ids}))
    assert str(tmp_path / "train_text_embeddings.pt") in Path("/proc/self/maps").read_text()
    assert pairs.text_features.shape == (50, 4)


def test_the_format_before_torch_1_6_is_read(tmp_path):
    images, texts = _pairs([1, 2])
    _write(tmp_path, images, texts, {"image_ids": [1, 2]})
    torch.save(images, tmp_path / "train_image_embeddings.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pairs(tmp_path).images[:], images)


GOOD = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("images", "texts", "metadata", "message"),
    [
        (GOOD, GOOD[:2], {"image_ids": [1, 2, 3]}, "has 3 image rows, 2 text rows, 3 image_ids"),
        (GOOD, GOOD, {"image_ids": [1, 2]}, "has 3 image rows, 3 text rows, 2 image_ids"),
        (GOOD, GOOD, {"ids": [1, 2, 3]}, "has no list 'image_ids'"),
        (GOOD, GOOD, [1, 2, 3], "has no list 'image_ids'"),
        (GOOD, GOOD, "image_ids: 1", "is not JSON"),
        (GOOD, GOOD, {"image_ids": [1, 2, -3]}, r"image_ids\[0\] .* all whole numbers from 0, or all texts"),
        (GOOD, GOOD, {"image_ids": ["a", None, "b"]}, r"image_ids\[1\] in .* is None"),
        (GOOD, GOOD, {"image_ids": [1, 2, 3], "captions": ["x"]}, "'captions' in .* must be a list of 3 texts"),
        (GOOD, GOOD.index_fill(0, torch.tensor([1]), float("nan")), {"image_ids": [1, 2, 3]},
         "row 1 of .*text_embeddings.pt is not finite"),
        (GOOD.cumsum(0), GOOD, {"image_ids": [5, 6, 5]}, "rows 0 and 2 of .* have the same image id 5 but have"),
        (GOOD.long(), GOOD, {"image_ids": [1, 2, 3]}, "must be one .* not torch.int64 of shape"),
        ({"features": GOOD}, GOOD, {"image_ids": [1, 2, 3]}, "must be one .* not <class 'dict'>"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, images, texts, metadata, message):
    with pytest.raises(LabError, match=message) as caught:
        read_pairs(_write(tmp_path, images, texts, metadata))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3, 4).to_sparse(), "layout torch.sparse_coo; write it with"),
        (torch.eye(3, 4).to_sparse_csr(), "layout torch.sparse_csr; write it with"),
        (torch.empty(3, 4, device="meta"), r"no values \(device meta\); write it with"),
        (torch.ones(1, 4).expand(10**12, 4), "repeats its rows"),
        ({"a": torch.ones(3, 4)}, "must be one"),
    ],
)
def test_a_tensor_that_is_no_plain_table_is_refused(tmp_path, tensor, message):
    _write(tmp_path, GOOD, GOOD, {"image_ids": [1, 2, 3]})
    torch.save(tensor, tmp_path / "train_text_embeddings.pt")
    with pytest.raises(LabError, match=f"train_text_embeddings.pt .*{message}"):
        read_pairs(tmp_path)


def test_flipped_bytes_of_embeddings_never_end_in_a_traceback(tmp_path):
    _write(tmp_path, GOOD, GOOD, {"image_ids": [1, 2, 3]})
    path = tmp_path / "train_text_embeddings.pt"
    good = path.read_bytes()
    for place in range(0, len(good), 23):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        with contextlib.suppress(LabError):
            read_pairs(tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_weights_files_that_are_none_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=rf"{name}.* (cannot be read|does not hold this tower's weights)"):
        load_weights(torch.nn.Linear(2, 2), str(tmp_path / name))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, zipped):
    _write(tmp_path, GOOD, GOOD, {"image_ids": [1, 2, 3]})
    path = tmp_path / "train_text_embeddings.pt"
    torch.save(Trap(tmp_path / "trapped"), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(LabError, match="would run code"):
        read_pairs(tmp_path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("keep", [0, 3, 200, -40])
def test_a_damaged_file_is_refused(tmp_path, keep):
    _write(tmp_path, GOOD, GOOD, {"image_ids": [1, 2, 3]})
    path = tmp_path / "train_image_embeddings.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LabError, match="is refused: it is damaged"):
        read_pairs(tmp_path)


def test_a_missing_file_names_the_splits_there(tmp_path):
    _write(tmp_path, GOOD, GOOD, {"image_ids": [1, 2, 3]})
    with pytest.raises(LabError, match=r"val_image_embeddings.pt does not exist; splits in .*: train\."):
        read_pairs(tmp_path, "val")


def test_random_weights_need_no_hub():
    assert (
        towers_image.image_width("siglip", "random") == transformers.SiglipVisionConfig().hidden_size == 768
    )
    assert np.isclose(
        transformers.SiglipVisionConfig().image_size, towers_image.image_size("siglip", "random")
    )


def test_images_are_shown_from_below_the_folder_or_image_root_alone(tmp_path):
    folder, elsewhere = tmp_path / "pairs", tmp_path / "images"
    elsewhere.mkdir()
    for place in (tmp_path / "secret.jpg", elsewhere / "a.jpg"):
        place.write_bytes(b"x")
    names = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg")]
    metadata = {"image_ids": [0, 1, 2], "image_paths": names, "image_root": str(elsewhere)}
    _write(folder, torch.rand(3, 4), torch.rand(3, 4), metadata)
    table = read_pairs(folder).table
    assert not any(table.path_of(row).is_file() for row in range(3))
    assert "set image_root to it" in table.problems[0]["what"]
    table = read_pairs(folder, image_root=elsewhere).table
    assert [table.path_of(row).is_file() for row in range(3)] == [True, False, False]
    assert table.problems == []
    _write(folder, torch.rand(3, 4), torch.rand(3, 4), metadata | {"image_root": "/"})
    assert read_pairs(folder, image_root=elsewhere).table.root == folder
    _write(folder, torch.rand(3, 4), torch.rand(3, 4), metadata | {"image_root": 5})
    with pytest.raises(LabError, match="image_root in .* must be text"):
        read_pairs(folder)
