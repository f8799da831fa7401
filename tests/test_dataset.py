"""Items, batches, order, and what is left out."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import write_coco
from torch.utils.data import DataLoader, Dataset

from config import make_config, run_name
from core.errors import LabError
from core.ids import match_ids
from dataset import (
    COCOClipDataset,
    load_table,
    make_loader,
    open_dataset,
    prepare_data,
    recognized,
    split_sizes,
)
from interface import cli
from losses import ContrastiveLoss
from sources.readers import LAYOUTS, read_captions
from sources.table import CaptionTable
from train import fit
from training.order import EpochBatches


@pytest.fixture
def dataset(coco, tmp_path):
    return COCOClipDataset("train", data_dir=coco, cache_dir=tmp_path / "cache", image_size=32)


def test_an_item_is_an_image_with_all_its_captions(dataset):
    item = dataset[4]
    assert item["image"].shape == (3, 32, 32)
    assert item["image"].dtype == torch.uint8
    assert item["text"] == dataset.table.captions_of(4)
    assert item["image_id"].tolist() == [5]
    assert item["text_id"].tolist() == [5, 5, 5]


def test_a_batch_matches_by_ids(dataset):
    batch = next(iter(make_loader(dataset, 5)))
    assert batch["image"].shape == (5, 3, 32, 32)
    assert len(batch["text"]) == 15
    for text, ident in zip(batch["text"], batch["text_id"].tolist(), strict=True):
        assert f"number {ident} " in text


def shuffled(items: int, seed: int):
    return lambda epoch: np.random.default_rng((seed, epoch)).permutation(items)


def test_processes_share_every_batch():
    whole = list(EpochBatches(25, 8, shuffled(25, 1)))
    shares = [list(EpochBatches(25, 8, shuffled(25, 1), rank=rank, world_size=3)) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == whole


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own():
    batches = EpochBatches(25, 8, shuffled(25, 1))
    first = [row for batch in batches for row in batch]
    assert sorted(first) == list(range(25))
    assert [row for batch in batches for row in batch] == first
    batches.epoch = 1
    assert [row for batch in batches for row in batch] != first
    assert [len(batch) for batch in batches] == [8, 8, 9]  # a last batch of one joins the one before


def test_an_epoch_continues_from_any_step():
    batches = EpochBatches(30, 7, shuffled(30, 3))
    whole = list(batches)
    batches.start = 2
    assert list(batches) == whole[2:]
    assert len(batches) == len(whole) == 5


def test_captions_are_drawn_again_each_epoch(coco, tmp_path):
    dataset = COCOClipDataset(data_dir=coco, cache_dir=tmp_path, image_size=16, captions_per_image=1, seed=5)
    drawn = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(list(range(24)))
        assert len(batch["text"]) == 24
        drawn.append(tuple(batch["text"]))
        assert dataset.__getitems__([3, 1])["text"] == [drawn[-1][3], drawn[-1][1]]  # whatever the batch
    assert len(set(drawn)) == 8
    assert {texts[0] for texts in drawn} == set(dataset.table.captions_of(0))


def test_cached_features_stand_in_for_images_and_captions(dataset):
    table = dataset.table
    images, texts = torch.arange(24.0)[:, None], torch.arange(72.0)[:, None]
    batch = COCOClipDataset(table=table, images=images, text_features=texts).__getitems__([2, 7])
    assert batch["image"].flatten().tolist() == [2, 7]
    assert batch["text"].flatten().tolist() == [6, 7, 8, 21, 22, 23]
    with pytest.raises(LabError, match="one row for each"):
        COCOClipDataset(table=table, images=images[:-1])


def test_an_undecodable_image_is_left_out_and_counted(tmp_path):
    root = write_coco(tmp_path / "coco", {"train": 6})
    broken = root / "train2014" / "COCO_train2014_000000000003.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    dataset = COCOClipDataset(data_dir=root, cache_dir=tmp_path / "cache", image_size=16)
    assert len(dataset) == 5
    assert list(dataset.left_out) == ["train2014/COCO_train2014_000000000003.jpg"]
    assert dataset.left_out.popitem()[1]
    seen = torch.cat([batch["image_id"] for batch in make_loader(dataset, 2)])
    assert sorted(seen.tolist()) == [1, 2, 4, 5, 6]


def test_max_samples_spreads_over_each_split(coco):
    table = load_table(make_config(data_dir=coco, max_samples=5))
    assert table.split_sizes() == {"train": 5, "val": 5}
    assert np.diff(table.split("train").image_ids).max() > 4


@pytest.mark.parametrize("settings", [{}, {"source": None}])
def test_a_missing_folder_says_so(settings):
    with pytest.raises(LabError, match="does not exist or is empty"):
        prepare_data(make_config(data_dir="no/such/folder", **settings))


def test_the_seed_moves_no_split(tmp_path):
    (tmp_path / "Images").mkdir()
    names = [f"{n:02d}.jpg" for n in range(40)]
    for name in names:
        (tmp_path / "Images" / name).write_bytes(b"")
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *(f"{name},a dog" for name in names)]))
    tests = [
        load_table(
            make_config("flickr8k", data_dir=tmp_path, cache_dir=tmp_path / "cache", **seeds), ("test",)
        )
        for seeds in ({"seed": 0}, {"seed": 1}, {"split_seed": 1})
    ]
    assert tests[0].paths == tests[1].paths != tests[2].paths
    assert [table.split_source[-12:] for table in tests] == ["split_seed 0", "split_seed 0", "split_seed 1"]
    assert run_name(make_config(split_seed=1)) != run_name(make_config())


def test_a_missing_split_names_those_there(coco):
    with pytest.raises(LabError, match=r"'test' has no image.* train \(24 images\), val \(8 images\)"):
        load_table(make_config(data_dir=coco), ("test",))


def test_check_from_a_shell(tmp_path, monkeypatch, capsys):
    root = write_coco(tmp_path / "coco", {"train": 6})
    (root / "train2014" / "COCO_train2014_000000000002.jpg").write_bytes(b"<html>not found</html>")
    monkeypatch.setattr("sys.argv", ["dataset.py", "check", str(root), "--folder", str(tmp_path / "out")])
    cli.dataset()
    said = capsys.readouterr().out
    assert re.search(r"undecodable images +1 ", said)
    assert re.search(r"captions +18 +3 to 3 per image", said)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data_report.json", "data_report.png"}
    monkeypatch.setattr("sys.argv", ["dataset.py", "fetch", "coco"])
    with pytest.raises(SystemExit, match="did you mean 'coco201[47]'"):
        cli.dataset()


def test_the_fields_of_a_readers_files_are_flags(tmp_path, monkeypatch, capsys):
    data, images = tmp_path / "data", write_coco(tmp_path / "images", {"train": 4})
    data.mkdir()
    rows = [{"image_path": str(path), "caption": "x"} for path in sorted((images / "train2014").iterdir())]
    for name, count in {"mine.json": 4, "other.json": 1}.items():
        (data / name).write_text(json.dumps({"splits": {"train": rows[:count]}}))
    check = ["dataset.py", "check", str(data), "--reader", "json", "--folder", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", check)
    with pytest.raises(SystemExit, match="name the file with annotation_file"):
        cli.dataset()
    monkeypatch.setattr("sys.argv", [*check, "--annotation_file", "mine.json", "--image_root", str(images)])
    cli.dataset()
    assert re.search(r"images +4 +train 4", capsys.readouterr().out)
    settings: dict = {"reader": "json", "image_root": images, "cache_dir": tmp_path / "cache"}
    for place in ({"data_dir": data, "annotation_file": "mine.json"}, {"data_dir": data / "mine.json"}):
        config = make_config(**place, **settings)
        assert prepare_data(config) == config.data_dir
        assert len(load_table(config)) == 4
    with pytest.raises(LabError, match="reader 'coco' has no option 'annotation_file'"):
        load_table(make_config(data_dir=images, reader="coco", annotation_file="mine.json"))


def test_the_recognized_reader_is_printed_and_kept(coco, capsys):
    config = make_config(data_dir=coco)
    prepare_data(config)
    assert capsys.readouterr().out == f"{coco} is read by reader 'coco': {LAYOUTS['coco'][0]}\n"
    assert config.reader == "auto"
    assert recognized(config).reader == "auto:coco"
    assert load_table(recognized(config)).captions == load_table(config).captions


def test_an_epoch_is_not_chosen_on_training_images(coco):
    with pytest.raises(LabError, match="train_splits and val_splits share val; the epoch must be chosen"):
        open_dataset(make_config(data_dir=coco, train_splits=("train", "val")), ("val",))
    config = make_config(data_dir=coco).model_copy(update={"reader": "cocoo"})
    with pytest.raises(
        LabError, match="reader 'cocoo' does not exist.*one of: .*coco, .*paired_cifar, pairs"
    ):
        open_dataset(config, ("val",))


def test_equal_captions_of_a_class_are_no_negatives(tmp_path):
    coco = write_coco(tmp_path / "coco", {"train": 9})
    for n, path in enumerate(sorted((coco / "train2014").iterdir())):
        place = tmp_path / "classes" / "train" / ("dog", "cat", "cow")[n % 3]
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / path.name)
    table = read_captions("class_folders", tmp_path / "classes")
    rows = torch.eye(3)[[["cat", "cow", "dog"].index(name) for name in table.categories.tolist()]]
    batch = COCOClipDataset(table=table, images=rows, text_features=rows).__getitems__(list(range(9)))
    assert batch["image_id"].tolist() == batch["text_id"].tolist() == list(range(9))  # an image stays itself
    image_id, text_id = match_ids(batch)
    assert image_id.tolist() == text_id.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    loss = ContrastiveLoss(margin=0.5)
    own = {"image_id": batch["image_id"], "text_id": batch["text_id"]}
    assert loss(rows, rows, **own) == pytest.approx(
        1 / 3
    )  # two of three negatives are true captions, 0.5 each
    assert loss(rows, rows, image_id=image_id, text_id=text_id) == 0
    coco = read_captions("coco", write_coco(tmp_path / "plain", {"train": 2}))
    assert coco.match_ids is coco.image_ids


def test_split_sizes_count_what_is_left_out(tmp_path):
    root = write_coco(tmp_path / "coco", {"train": 6, "val": 4})
    (root / "val2014" / "COCO_val2014_000000000008.jpg").write_bytes(b"")
    config = make_config("coco_resnet50", data_dir=root, cache_dir=tmp_path / "cache", image_size=16)
    assert split_sizes(config).to_dict("index") == {
        "train": {"images": 6, "captions": 18, "left out": 0},
        "val": {"images": 3, "captions": 9, "left out": 1},
    }


# --- identity: what a set holds, not where it lies or when it was written ---


def described(folder, tmp_path, **settings):
    config = make_config(
        "quickstart", data_dir=folder, cache_dir=tmp_path / "cache", image_size=32, **settings
    )
    return open_dataset(config, ("train",), progress=False).describe()


@pytest.mark.parametrize("mode", ["trainable", "cached"])
def test_a_copied_folder_is_the_same_data_and_a_changed_image_is_not(coco, tmp_path, mode):
    copy = shutil.copytree(coco, tmp_path / "copy", copy_function=shutil.copyfile)  # other times
    first = described(coco, tmp_path, image_tower_mode=mode)
    assert described(copy, tmp_path, image_tower_mode=mode) == first
    image = next((copy / "train2014").glob("*.jpg"))
    Image.new("RGB", (48, 48), "red").save(image)  # under its own name
    changed = described(copy, tmp_path, image_tower_mode=mode)
    assert changed["sha256"] != first["sha256"]
    assert {name: changed[name] for name in ("images", "captions")} == {"images": 24, "captions": 72}


def test_copied_images_keep_their_cached_features(coco, tmp_path):
    described(coco, tmp_path, image_tower_mode="cached")
    copy = shutil.copytree(coco, tmp_path / "copy", copy_function=shutil.copyfile)
    described(copy, tmp_path, image_tower_mode="cached")
    assert len(list((tmp_path / "cache" / "features").glob("image-*.safetensors"))) == 1


def test_corrected_captions_are_read_again_in_the_same_process(coco, tmp_path):
    copy = shutil.copytree(coco, tmp_path / "copy")
    first = described(copy, tmp_path, image_tower_mode="trainable")
    file = copy / "annotations" / "captions_train2014.json"
    file.write_text(file.read_text().replace("a picture number 1 ", "one corrected picture "))
    config = make_config("quickstart", data_dir=copy, cache_dir=tmp_path / "cache")
    assert load_table(config, ("train",)).captions[0].startswith("one corrected picture")
    assert described(copy, tmp_path, image_tower_mode="trainable")["sha256"] != first["sha256"]


def test_one_changed_row_of_embeddings_is_other_data():
    table = CaptionTable(
        Path("nowhere"), np.arange(900), [f"{n}.jpg" for n in range(900)], np.full(900, "train"),
        ["a caption"] * 900, np.arange(900),
    )  # fmt: skip
    images, texts = torch.randn(900, 4), torch.randn(900, 4)
    prints = []
    for side in (None, images, texts):
        if side is not None:
            side[517, 2] += 1
        parts = {"images": images.clone(), "text_features": texts.clone()}
        prints.append(COCOClipDataset("train", table=table, **parts).describe()["sha256"])
    assert len(set(prints)) == 3


def test_a_plain_loader_of_torch_takes_our_data_set(coco):
    dataset = COCOClipDataset("train", data_dir=coco, cache_dir=coco.parent / "cache", image_size=16)
    ours, torchs = (list(loader) for loader in (make_loader(dataset, 5), DataLoader(dataset, batch_size=5)))
    assert len(ours) == len(torchs) == 5
    for one, other in zip(ours, torchs, strict=True):
        assert one["text"] == other["text"]
        assert all(torch.equal(one[name], other[name]) for name in ("image", "image_id", "text_id"))


def test_a_subclass_makes_its_own_items(coco):
    class Dark(COCOClipDataset):
        def __getitem__(self, item):
            whole = super().__getitem__(item)
            return {**whole, "image": whole["image"] // 2}

    places = {"data_dir": coco, "cache_dir": coco.parent / "cache", "image_size": 16}
    plain = next(iter(make_loader(COCOClipDataset("train", **places), 5)))
    for loader in (
        make_loader(Dark("train", **places), 5),
        DataLoader(Dark("train", **places), batch_size=5),
    ):
        dark = next(iter(loader))
        assert torch.equal(dark["image"], plain["image"] // 2)
        assert dark["text"] == plain["text"]
        assert torch.equal(dark["text_id"], plain["text_id"])


class Plain(Dataset):
    """Nothing but what torch asks for."""

    def __init__(self, name="image_id"):
        self.name = name

    def __len__(self):
        return 12

    def __getitem__(self, item):
        generator = torch.Generator().manual_seed(item)
        feature = torch.randn(1280, generator=generator)
        return {"image": feature, "text": [f"caption {item}", f"another {item}"], self.name: item}


def test_a_plain_data_set_trains(tmp_path):
    config = make_config(
        "quickstart", cache_dir=tmp_path / "cache", runs_dir=tmp_path / "runs", image_tower_mode="cached",
        text_tower_mode="frozen", num_epochs=1, batch_size=6, warmup_steps=1, device="cpu", recall_ks=(1, 5),
    )  # fmt: skip
    batch = next(iter(make_loader(Plain(), 5)))
    assert batch["text"][:2] == ["caption 0", "another 0"]
    assert batch["text_id"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert sorted(torch.cat([b["image_id"] for b in make_loader(Plain(), 5, shuffle=True)]).tolist()) == list(
        range(12)
    )
    run = fit(config, train_set=Plain(), val_set=Plain(), show=False)
    assert run.history["num_texts"].tolist() == [24]
    with pytest.raises(LabError, match="with image, text and image_id .*, not a dict of image, text, number"):
        next(iter(make_loader(Plain("number"), 5)))
