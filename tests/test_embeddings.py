"""Pre-encoded embeddings: read, divided by image, opened by name, trained on, and what is refused."""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import DAMAGES, damage

from config import make_config
from core.errors import LabError
from dataset import COCOClipDataset, embeddings_at, make_loader, open_dataset
from evaluate import evaluate_run
from interface import cli
from sources.embeddings import Rows, divide, read_pairs, split_pairs, stacked
from sources.table import CaptionTable
from train import fit

WIDTHS = (6, 4)


def write_split(folder, split, ids, captions=3, seed=0, names=None):
    """`captions` pairs of each image, image by image, such that an image and its captions can be told apart."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(size=(len(ids), WIDTHS[0]))).half()
    texts = images[:, : WIDTHS[1]].repeat_interleave(captions, 0) + 0.01 * torch.randn(
        len(ids) * captions, WIDTHS[1], generator=torch.Generator().manual_seed(seed)
    )
    folder.mkdir(exist_ok=True)
    torch.save(images.repeat_interleave(captions, 0), folder / f"{split}_image_embeddings.pt")
    torch.save(texts.half(), folder / f"{split}_text_embeddings.pt")
    given = [ident for ident in (names or ids) for _ in range(captions)]
    (folder / f"{split}_metadata.json").write_text(json.dumps({"image_ids": given}))
    return folder


@pytest.fixture
def coco2017(tmp_path):
    """160 + 40 images in the files of a documented folder, which names no train or val."""
    folder = write_split(tmp_path / "embeddings", "train2017", list(range(160)))
    return write_split(folder, "val2017", list(range(160, 200)), seed=1)


# --- rows ---


def test_rows_are_views_of_several_tensors():
    parts = [torch.arange(6.0).view(3, 2), torch.arange(6.0, 10).view(2, 2)]
    rows = stacked([Rows(parts[:1], np.array([2, 0])), Rows(parts[1:])])
    assert rows.shape == (4, 2)
    assert rows[:].tolist() == [[4, 5], [0, 1], [6, 7], [8, 9]]
    assert rows[torch.tensor([3, 0])].tolist() == [[8, 9], [4, 5]]
    assert rows.take(np.array([1, 2]))[:].tolist() == [[0, 1], [6, 7]]
    assert [len(some) for some in rows.split(3)] == [3, 1]
    with pytest.raises(LabError, match=r"embeddings are \[2, 3\] numbers wide"):
        Rows([torch.zeros(1, 2), torch.zeros(1, 3)])


# --- dividing ---


def test_a_folder_is_divided_by_image_once(coco2017, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["encode.py", "split", str(coco2017)])
    cli.encode()
    assert "train         480 pairs" in capsys.readouterr().out
    division = json.loads((coco2017 / "splits.json").read_text())
    images = {name: set(ids) for name, ids in division["splits"].items()}
    assert {name: len(ids) for name, ids in images.items()} == {
        "train": 160, "tune": 40, "val": 20, "test": 20}  # fmt: skip
    assert images["tune"] < images["train"]
    assert images["train"] | images["val"] | images["test"] == set(range(200))
    assert {ident > 159 for ident in images["test"]} == {True, False}  # drawn from both files
    before = (coco2017 / "splits.json").read_bytes()
    assert split_pairs(coco2017)["test"] == 60
    assert (coco2017 / "splits.json").read_bytes() == before


def test_another_division_is_refused(coco2017):
    split_pairs(coco2017)
    with pytest.raises(
        LabError, match=r"splits.json divides this folder with .*'seed': 0.*, not .*'seed': 1"
    ):
        split_pairs(coco2017, seed=1)
    write_split(coco2017, "val2017", list(range(160, 201)), seed=1)
    with pytest.raises(LabError, match="divides other pairs than .* has; delete it and divide again"):
        read_pairs(coco2017, "train")


@pytest.mark.parametrize("number", range(DAMAGES))
def test_a_damaged_division_is_refused_and_made_again(coco2017, number):
    split_pairs(coco2017)
    path = coco2017 / "splits.json"
    before = path.read_bytes()
    damage(path, number)
    with pytest.raises(
        LabError, match=r"splits.json is damaged \(.*\); delete it and divide the folder again"
    ):
        read_pairs(coco2017, "train")
    path.unlink()
    split_pairs(coco2017)
    assert path.read_bytes() == before


def test_a_division_without_a_checksum_still_opens(coco2017):
    split_pairs(coco2017)
    path = coco2017 / "splits.json"
    division = json.loads(path.read_text())
    del division["checksum"]
    path.write_text(json.dumps(division))
    assert len(read_pairs(coco2017, "val").table) == 20


@pytest.mark.parametrize(
    ("images", "sizes", "unused"),
    [
        (1000, {"train": 2000, "tune": 400, "val": 50, "test": 200}, 2750),
        (123_287, {"train": 473_000, "tune": 100_000, "val": 5_000, "test": 24_000}, 114_435),  # COCO
    ],
)
def test_the_seed_draws_and_the_sizes_hold(images, sizes, unused):
    ids = np.arange(images)
    table = CaptionTable(Path(), ids, [""] * images, ids, [""] * (5 * images), np.repeat(ids, 5))
    division = divide(table, ids, {**sizes, "seed": 3})
    assert division["pairs"] == {**sizes, "unused": unused}
    assert divide(table, ids, {**sizes, "seed": 3}) == division
    assert divide(table, ids, {**sizes, "seed": 4}) != division


def test_an_image_under_two_ids_stays_on_one_side(tmp_path):
    folder = write_split(tmp_path / "twins", "all", list(range(100)))
    for kind in ("image", "text"):
        path = folder / f"all_{kind}_embeddings.pt"
        rows = torch.load(path)
        torch.save(torch.cat([rows, rows]), path)  # every image again, as image 100 to 199
    ids = [ident for ident in range(200) for _ in range(3)]
    (folder / "all_metadata.json").write_text(json.dumps({"image_ids": ids}))
    split_pairs(folder)
    images = json.loads((folder / "splits.json").read_text())["splits"]
    for name in ("train", "val", "test"):
        assert {ident % 100 + 100 for ident in images[name]} <= {
            ident for ident in images[name] if ident > 99
        }


def test_too_small_a_folder_is_not_divided(tmp_path):
    folder = write_split(tmp_path / "few", "all", [1, 2, 3])
    with pytest.raises(LabError, match="3 different images are too few to divide"):
        split_pairs(folder)
    assert not (folder / "splits.json").exists()


# --- reading ---


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


def test_an_image_in_two_files_is_named(tmp_path):
    _write(tmp_path, *_pairs(["a", "b", "c"]), {"image_ids": ["a", "b", "c"]})
    _write(tmp_path, *_pairs(["d", "b"]), {"image_ids": ["d", "b"]}, "val")
    with pytest.raises(LabError, match="1 images are in several files of .*: b; leave each in one file"):
        split_pairs(tmp_path)


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
        ({"features": GOOD}, GOOD, {"image_ids": [1, 2, 3]}, "must be one .* not dict"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, images, texts, metadata, message):
    with pytest.raises(LabError, match=message) as caught:
        read_pairs(_write(tmp_path, images, texts, metadata))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3, 4).to_sparse(), "torch.sparse_coo, cpu.*write it with"),
        (torch.eye(3, 4).to_sparse_csr(), "torch.sparse_csr, cpu"),
        (torch.empty(3, 4, device="meta"), "torch.strided, meta"),
        (torch.ones(1, 4).expand(10**12, 4), "must be one dense .* with every row stored"),
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


# --- opening ---


def _config(folder, tmp_path, **settings):
    places = {"runs_dir": tmp_path / "runs", "cache_dir": tmp_path / "cache", "device": "cpu"}
    small = {"batch_size": 16, "num_epochs": 3, "warmup_steps": 1, "head_hidden_dim": 16, "embed_dim": 8}
    return make_config("projection_heads", **{**embeddings_at(folder), **places, **small, **settings})


def test_files_say_what_a_folder_holds(coco2017):
    with pytest.raises(
        LabError, match="has the splits train2017, val2017 but no train or val; divide it with"
    ):
        embeddings_at(coco2017)
    split_pairs(coco2017)
    found = embeddings_at(coco2017)
    assert (found["reader"], found["train_splits"], found["test_splits"]) == ("pairs", ("train",), ("test",))
    assert (found["image_tower"], found["image_width"], found["text_width"]) == ("embeddings", 6, 4)


def test_a_divided_folder_trains_and_is_evaluated(coco2017, tmp_path):
    split_pairs(coco2017)
    config = _config(coco2017, tmp_path, learning_rate=1e-2, head_dropout=0.0, num_epochs=12)
    dataset = open_dataset(config, ("train",))
    assert (len(dataset), dataset.num_captions) == (160, 480)
    batch = next(iter(make_loader(dataset, 16, shuffle=True)))
    assert torch.equal(batch["text_id"], batch["image_id"].repeat_interleave(3))
    apart = batch["image"][:, :4].repeat_interleave(3, 0) - batch["text"]
    assert apart.abs().max() < 0.1  # every caption came with its own image
    run = fit(config, show=False)
    found = evaluate_run(run, show=False)["test"]
    assert (found["num_images"], found["num_texts"]) == (20, 60)
    assert found["i2t_recall@1"] > 0.5  # chance is 0.05
    assert found["i2t_recall@1"] != found["i2t_recall@5"]


def test_thinned_splits_and_several_files(coco2017, tmp_path):
    config = _config_of_files(coco2017, tmp_path, max_samples=10)
    dataset = open_dataset(config, ("train2017", "val2017"))
    assert dataset.table.image_ids.tolist() == [
        *np.linspace(0, 159, 10).astype(int),
        *(160 + np.linspace(0, 39, 10).astype(int)),
    ]
    assert dataset.__getitems__([12])["text"].shape == (3, 4)


def _config_of_files(folder, tmp_path, **settings):
    towers = {"image_tower": "embeddings", "image_width": 6, "text_tower": "embeddings", "text_width": 4}
    return make_config(
        "projection_heads", data_dir=folder, **towers, train_splits=("train2017",), val_splits=("val2017",),
        test_splits=("val2017",), **settings,
    )  # fmt: skip


def test_leaks_are_refused(coco2017, tmp_path):
    write_split(coco2017, "val2017", list(range(155, 195)), seed=1)
    with pytest.raises(LabError, match="splits train2017 and val2017 in .* share 5 images, such as 155"):
        open_dataset(_config_of_files(coco2017, tmp_path), ("train2017",))


def test_another_width_is_refused(coco2017, tmp_path):
    config = _config_of_files(coco2017, tmp_path).updated(text_width=5)
    message = "text embeddings in .* have width 4, but text_tower 'embeddings' has 5; .* text_width to 4"
    with pytest.raises(LabError, match=message):
        open_dataset(config, ("train2017",))
    with pytest.raises(LabError, match="image_tower 'efficientnet_lite0' has 1280"):
        open_dataset(config.updated(image_tower="efficientnet_lite0"), ("train2017",))
    with pytest.raises(LabError, match="reader 'pairs' reads embeddings; set image_tower_mode to 'cached'"):
        open_dataset(config.updated(image_tower_mode="frozen"), ("train2017",))


def test_a_run_knows_the_embeddings_it_was_trained_on(coco2017, tmp_path):
    split_pairs(coco2017)
    config = _config(coco2017, tmp_path, num_epochs=1)
    fit(config, show=False)
    path = coco2017 / "train2017_text_embeddings.pt"
    torch.save(torch.load(path) * 2, path)  # the same captions by another encoder
    with pytest.raises(LabError, match="was trained on other images or captions"):
        fit(config, show=False)


# --- size ---


def test_text_embeddings_of_shuffled_pairs_are_one_mapping_whatever_the_split(coco2017):
    path = coco2017 / "train2017_metadata.json"
    ids = json.loads(path.read_text())["image_ids"]
    order = np.random.default_rng(0).permutation(len(ids))
    path.write_text(json.dumps({"image_ids": [ids[row] for row in order]}))
    for kind in ("image", "text"):
        file = coco2017 / f"train2017_{kind}_embeddings.pt"
        torch.save(torch.load(file)[torch.from_numpy(order)], file)
    split_pairs(coco2017)
    train, val = read_pairs(coco2017, "train"), read_pairs(coco2017, "val")
    for first, second in zip(train.text_features.parts, val.text_features.parts, strict=True):
        assert first.data_ptr() == second.data_ptr()
    maps = Path("/proc/self/maps")
    if maps.exists():  # on disk, mapped
        assert str(coco2017.resolve() / "train2017_text_embeddings.pt") in maps.read_text()
    for pairs in (train, val):
        own = pairs.images[:][:, :4].repeat_interleave(3, 0)
        assert (own - pairs.text_features[:]).abs().max() < 0.1
