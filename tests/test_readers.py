"""Readers: every layout gives the same table, and hostile files cost a row or say what to do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small_data import SHARED

from core.errors import LabError
from sources.check import check
from sources.readers import LAYOUTS as RECOGNIZED
from sources.readers import READERS, official_flickr8k, read_captions, recognize
from sources.table import CaptionTable

WORDS = "a red dog runs over green grass near the old house".split()


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"pixels of " + name.encode())


def annotate(root: Path, **splits: Any) -> None:
    (root / "annotations.json").write_text(json.dumps({"splits": splits}))


def text_of(number: int, each: int) -> str:
    return f"{WORDS[number % len(WORDS)]} {number} {each}"


def contents(table: CaptionTable) -> dict[str, tuple[str, list[str]]]:
    """path -> (split, captions), and a look at the table's own rules."""
    assert table.image_ids.dtype == table.caption_image_ids.dtype == np.int64
    assert len(set(table.image_ids.tolist())) == len(table) == len(table.paths) == len(table.splits)
    assert table.image_ids.min() >= 0
    by_id: dict[int, list[str]] = {}
    for image_id, caption in zip(table.caption_image_ids.tolist(), table.captions, strict=True):
        by_id.setdefault(image_id, []).append(caption)
    assert list(by_id) == table.image_ids.tolist()
    for row, image_id in enumerate(table.image_ids.tolist()):
        assert table.captions_of(row) == by_id[image_id]
    rows = zip(table.paths, table.splits.tolist(), table.image_ids.tolist(), strict=True)
    return {path: (split, by_id[image_id]) for path, split, image_id in rows}


def kinds(table: CaptionTable) -> list[tuple[str, str]]:
    return [(problem["kind"], problem["where"]) for problem in table.problems]


def categories(table: CaptionTable) -> list[str]:
    assert table.categories is not None
    return table.categories.tolist()


# ---------------------------------------------------------------- layouts, 6 images with 2 captions each

CAPTIONS = [[text_of(number, each) for each in range(2)] for number in range(6)]
SPLITS = ["train", "train", "train", "val", "val", "test"]


def coco_file(split: str, numbers: list[int], **extra) -> str:
    images = [
        {"id": 100 + n, "file_name": f"COCO_{split}2014_{n}.jpg", "height": 4, "width": 4} for n in numbers
    ]
    annotations = [
        {"id": 9 * n + k, "image_id": 100 + n, "caption": text}
        for n in numbers
        for k, text in enumerate(CAPTIONS[n])
    ]
    return json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations, **extra})


def write_coco(root: Path, images: str = "{}2014", top: str = "") -> None:
    for split in ("train", "val", "test"):
        numbers = [n for n in range(6) if SPLITS[n] == split]
        touch(root / top, *(f"{images.format(split)}/COCO_{split}2014_{n}.jpg" for n in numbers))
        file = root / top / "annotations" / f"captions_{split}2014.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(coco_file(split, numbers))


def write_kaggle_coco(root: Path) -> None:
    write_coco(root, "images/{}2014", "coco2014")


def write_flickr8k(root: Path, lists: bool = True) -> None:
    touch(root, *(f"Images/{n}.jpg" for n in range(6)))
    rows = [f"{n}.jpg,{text}" for n in range(6) for text in CAPTIONS[n]]
    (root / "captions.txt").write_text("\n".join(["image,caption", *rows, ""]))
    for name, split in {"train": "train", "dev": "val", "test": "test"}.items() if lists else ():
        names = [f"{n}.jpg" for n in range(6) if SPLITS[n] == split]
        (root / f"Flickr_8k.{name}Images.txt").write_text("\n".join(names) + "\n")


def karpathy(dataset: str) -> str:
    images = []
    for n in range(6):
        image = {"split": SPLITS[n], "filename": f"{n}.jpg", "imgid": n, "sentids": [2 * n, 2 * n + 1]}
        image["sentences"] = [{"raw": t, "tokens": t.split(), "imgid": n, "sentid": 0} for t in CAPTIONS[n]]
        if dataset == "coco":
            image |= {"filepath": "val2014", "filename": f"COCO_val2014_{n}.jpg", "cocoid": 500 + n}
        images.append(image)
    return json.dumps({"dataset": dataset, "images": images})


def write_karpathy_coco(root: Path) -> None:
    touch(root, *(f"images/val2014/COCO_val2014_{n}.jpg" for n in range(6)))
    (root / "dataset_coco.json").write_text(karpathy("coco"))


def write_karpathy_flickr30k(root: Path) -> None:
    touch(root, *(f"flickr30k_images/flickr30k_images/{n}.jpg" for n in range(6)))
    (root / "dataset_flickr30k.json").write_text(karpathy("flickr30k"))


def write_json(root: Path) -> None:
    touch(root, *(f"images/{n}.jpg" for n in range(6)))
    splits: dict[str, list] = {"train": [], "validation": [], "test": []}
    for n in range(6):
        rows = splits[SPLITS[n].replace("val", "validation")]
        if n % 2:  # captions as a list, or one row per caption
            rows.append({"image_path": f"images/{n}.jpg", "caption": CAPTIONS[n], "id": 40 + n})
        else:
            rows += [{"image_path": f"images/{n}.jpg", "caption": t, "id": 40 + n} for t in CAPTIONS[n]]
    annotate(root, **splits)


def write_sidecar(root: Path) -> None:
    for n in range(6):
        folder = {"val": "valid"}.get(SPLITS[n], SPLITS[n])
        touch(root, f"{folder}/{n}.jpg")
        (root / folder / f"{n}.txt").write_text("\n".join(CAPTIONS[n]) + "\n")


def write_table(root: Path) -> None:
    touch(root, *(f"images/{n}.jpg" for n in range(6)))
    rows = [f"{n}.jpg\t{SPLITS[n]}\t{text}" for n in range(6) for text in CAPTIONS[n]]
    (root / "mine.tsv").write_text("\n".join(["File\tsubset\twords", *rows]))


LAYOUTS: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "coco": ("coco", write_coco, {}),
    "coco from Kaggle": ("coco", write_kaggle_coco, {}),
    "coco, Karpathy's split": ("coco", write_karpathy_coco, {"karpathy_file": "dataset_coco.json"}),
    "flickr8k": ("flickr8k", write_flickr8k, {}),
    "flickr30k, Karpathy's split": (
        "flickr30k",
        write_karpathy_flickr30k,
        {"karpathy_file": "dataset_flickr30k.json"},
    ),
    "json": ("json", write_json, {}),
    "sidecar": ("sidecar", write_sidecar, {}),
    "table": ("table", write_table, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_table(layout, tmp_path):
    reader, write, options = LAYOUTS[layout]
    write(tmp_path)
    table = read_captions(reader, tmp_path, **options)
    rows = contents(table)
    in_order = [rows[path] for path in sorted(rows, key=lambda path: path[-5])]
    assert in_order == list(zip(SPLITS, CAPTIONS, strict=True))
    assert all(table.path_of(row).read_bytes().startswith(b"pixels of") for row in range(6))
    assert table.problems == []
    assert table.split_sizes() == {"train": 3, "val": 2, "test": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_gives_the_same_table_until_a_source_changes(layout, tmp_path):
    reader, write, options = LAYOUTS[layout]
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    write(data)
    first = read_captions(reader, data, cache_dir=cache, **options)
    (stored,) = cache.iterdir()
    written = stored.stat().st_mtime_ns
    second = read_captions(reader, data, cache_dir=cache, **options)
    assert stored.stat().st_mtime_ns == written
    assert contents(second) == contents(first)
    assert second.image_ids.tolist() == first.image_ids.tolist()
    os.remove(first.path_of(0))  # a folder changes
    third = read_captions(reader, data, cache_dir=cache, **options)
    assert first.paths[0] not in third.paths
    assert len(third) == 5
    if reader != "sidecar":  # there the files themselves are the list, and their positions the ids
        assert third.image_ids.tolist() == first.image_ids.tolist()[1:]
    stored.write_bytes(stored.read_bytes()[:-100])  # a half-written cache
    (cache / f".{stored.name}.{2**22 + 1}.tmp").touch()  # of a process that was killed: no id is as high
    assert contents(read_captions(reader, data, cache_dir=cache, **options)) == contents(third)
    assert list(cache.iterdir()) == [stored]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognized(layout, tmp_path):
    reader, write, options = LAYOUTS[layout]
    write(tmp_path)
    assert recognize(tmp_path, **options) == reader
    named = read_captions(reader, tmp_path, cache_dir=tmp_path / "cache", **options)
    table = read_captions("auto", tmp_path, cache_dir=tmp_path / "cache", **options)
    assert contents(table) == contents(named)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # one table under one name


RECOGNIZED_FILES = {
    "class_folders": ["dog/1.jpg", "cat/1.jpg", "labels.json"],
    "class_folders in splits": ["train/dog/1.jpg", "train/cat/1.jpg", "test/dog/2.jpg"],
    "coco without captions": ["annotations/instances_train2014.json", "train2014/1.jpg", "val2014/2.jpg"],
    "flickr30k": ["results.csv", "flickr30k_images/1.jpg"],
    "flickr8k as published": ["Flickr8k_text/Flickr8k.token.txt", "Flicker8k_Dataset/1.jpg", "other/2.jpg"],
    "sidecar with metadata": ["a/1.jpg", "a/1.json"],
}


@pytest.mark.parametrize("case", RECOGNIZED_FILES)
def test_a_folder_is_recognized_by_its_files(case, tmp_path):
    touch(tmp_path, *RECOGNIZED_FILES[case])
    assert recognize(tmp_path) == case.split()[0]


def test_no_reader_or_several_are_one_error_with_what_each_looks_for(tmp_path):
    touch(tmp_path, "images/a.jpg", "images/b.jpg")
    with pytest.raises(LabError, match=r"fits no reader; set reader to one of these") as caught:
        read_captions("auto", tmp_path)
    for reader, (looks_for, _) in RECOGNIZED.items():
        assert f"{reader}: {looks_for}" in str(caught.value)
    touch(tmp_path, "annotations.json", "images/a.txt")
    with pytest.raises(LabError, match="fits several readers; set reader to one of them") as caught:
        read_captions("auto", tmp_path)
    assert [line.split(":")[0] for line in str(caught.value).split("\n")[1:]] == ["  json", "  sidecar"]
    assert recognize(tmp_path / "annotations.json") == "json"


def test_changed_captions_are_read_again(tmp_path):
    write_flickr8k(tmp_path)
    cache = tmp_path / "cache"
    read_captions("flickr8k", tmp_path, cache_dir=cache)
    text = (tmp_path / "captions.txt").read_text().replace("1.jpg,red 1 0", "1.jpg,a very red one")
    (tmp_path / "captions.txt").write_text(text)
    table = read_captions("flickr8k", tmp_path, cache_dir=cache)
    assert table.captions_of(1) == ["a very red one", "red 1 1"]
    os.remove(tmp_path / "Flickr_8k.testImages.txt")
    assert read_captions("flickr8k", tmp_path, cache_dir=cache).split_sizes()["unused"] == 1


def test_coco_ids_are_cocos(tmp_path):
    write_coco(tmp_path)
    assert read_captions("coco", tmp_path).image_ids.tolist() == [100, 101, 102, 103, 104, 105]
    write_karpathy_coco(tmp_path)
    table = read_captions("coco", tmp_path, karpathy_file=tmp_path / "dataset_coco.json")
    assert table.image_ids.tolist() == [500, 501, 502, 503, 504, 505]


def test_coco_reads_every_split_there_is(tmp_path):
    write_coco(tmp_path)
    touch(tmp_path, "novel2014/COCO_novel2014_9.jpg")
    row = {"id": 9, "file_name": "COCO_novel2014_9.jpg", "category": "cube"}
    novel = {"images": [row], "annotations": [{"image_id": 9, "caption": "a cube"}]}
    (tmp_path / "annotations" / "captions_novel2014.json").write_text(json.dumps(novel))
    (tmp_path / "annotations" / "instances_val2014.json").write_text("{}")
    table = read_captions("coco", tmp_path)
    assert table.split_sizes() == {"train": 3, "val": 2, "test": 1, "novel": 1}
    assert categories(table.split("novel")) == ["cube"]
    assert categories(table.split("train")) == ["", "", ""]


def test_json_ids_that_are_not_the_images_own_become_positions(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    rows = [
        {"image_path": "a.jpg", "caption": "x", "id": 7},
        {"image_path": "b.jpg", "caption": "y", "id": 7},
    ]
    (tmp_path / "only.json").write_text(json.dumps({"splits": {"train": rows[:1], "test": rows[1:]}}))
    assert read_captions("json", tmp_path).image_ids.tolist() == [0, 1]
    rows[1]["id"] = 8
    rows[1]["category"] = "cat"
    (tmp_path / "only.json").write_text(json.dumps({"splits": {"train": rows[:1], "test": rows[1:]}}))
    table = read_captions("json", tmp_path / "only.json")
    assert table.image_ids.tolist() == [7, 8]
    assert categories(table) == ["", "cat"]


def test_flickr30k_reports_its_broken_row(tmp_path):
    touch(tmp_path, "flickr30k_images/1.jpg", "flickr30k_images/2.jpg")
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        "1.jpg| 0| Two men | three bars .\n"
        '1.jpg| 1| A "quoted" man\n'
        "2.jpg| 3| A dog .\n"
        "2.jpg| 4   A dog runs across the grass .\n"
    )
    table = read_captions("flickr30k", tmp_path)
    assert [captions for _, captions in contents(table).values()] == [
        ["Two men | three bars .", 'A "quoted" man'],
        ["A dog ."],
    ]
    assert kinds(table) == [("malformed row", "results.csv: line 5")]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_hugging_face_image_folder_is_not_a_class_called_train(tmp_path, name):
    touch(tmp_path, "train/0.jpg", "train/1.jpg")
    (tmp_path / "train" / name).write_text('{"file_name": "0.jpg", "text": "a dog"}\n')
    with pytest.raises(
        LabError, match=rf"train is a Hugging Face ImageFolder with {name}, not a class.* 'table'"
    ):
        read_captions("class_folders", tmp_path)


def test_seeded_split_by_image(tmp_path):
    touch(tmp_path, *(f"Images/{n:03d}.jpg" for n in range(50)))
    rows = [f"{n:03d}.jpg,caption {k}" for n in range(50) for k in range(2)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    tables = [read_captions("flickr8k", tmp_path, split_seed=seed) for seed in (0, 0, 1)]
    assert tables[0].split_sizes() == {"train": 40, "val": 5, "test": 5}
    assert tables[0].splits.tolist() == tables[1].splits.tolist() != tables[2].splits.tolist()


def write_named(root: Path, names: list[str]) -> None:
    touch(root, *(f"Images/{name}" for name in names))
    (root / "captions.txt").write_text("\n".join(["image,caption", *(f"{name},a dog" for name in names)]))


def test_flickr8k_without_lists_has_the_official_split(tmp_path):
    official = official_flickr8k()
    assert Counter(official.values()) == {"train": 6000, "val": 1000, "test": 1000}
    names = [name for split in ("train", "val", "test") for name in official if official[name] == split][
        ::100
    ]
    write_named(tmp_path, names)
    table = read_captions("flickr8k", tmp_path, split_seed=1)
    assert {path.removeprefix("Images/"): split for path, (split, _) in contents(table).items()} == {
        name: official[name] for name in names
    }
    assert table.split_source == "Flickr8k's official lists"
    assert table.split("test").split_source == "Flickr8k's official lists"
    other = tmp_path / "other"  # images that merely have such a name among them
    write_named(other, [*names[:5], *(f"{n:03d}.jpg" for n in range(50))])
    assert read_captions("flickr8k", other, split_seed=3).split_source == "drawn by image, split_seed 3"


def test_lists_in_the_folder_are_the_official_ones_only_where_they_agree(tmp_path):
    name = next(name for name, split in official_flickr8k().items() if split == "test")
    for split, source in (("test", "Flickr8k's official lists"), ("train", "the data's own")):
        root = tmp_path / split
        write_named(root, [name])
        (root / f"Flickr_8k.{split}Images.txt").write_text(f"{name}\n")
        assert read_captions("flickr8k", root).split_source == source


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a+b", "", "x" * 65, "a\nb", ".."])
def test_a_splits_name_cannot_lead_out_of_a_folder(name, tmp_path):
    touch(tmp_path, "a.jpg")
    row = {"image_path": "a.jpg", "caption": "x"}
    annotate(tmp_path, **{name: [row]})
    with pytest.raises(LabError, match="cannot be part of a file's name; rename it"):
        read_captions("json", tmp_path)
    image = {"split": name or "/", "filename": "a.jpg", "imgid": 1, "sentences": [{"raw": "x"}]}
    (tmp_path / "k.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(LabError, match="cannot be part of a file's name; rename it"):
        read_captions("flickr30k", tmp_path, karpathy_file="k.json")


def test_coco_2017_is_read_by_its_files_years(tmp_path):
    for split, number in (("train", 1), ("val", 2)):
        touch(tmp_path, f"{split}2017/{number:012d}.jpg")
        content = {"images": [{"id": number, "file_name": f"{number:012d}.jpg"}]}
        content["annotations"] = [{"image_id": number, "caption": text_of(number, 0)}]
        file = tmp_path / "annotations" / f"captions_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    table = read_captions("coco", tmp_path)
    assert contents(table)["val2017/000000000002.jpg"] == ("val", [text_of(2, 0)])
    assert table.split_source == "COCO 2017"
    (tmp_path / "annotations" / "captions_train2014.json").write_text(coco_file("train", [1]))
    with pytest.raises(LabError, match="captions of 2014 and 2017, which share images; move the files"):
        read_captions("coco", tmp_path)


def test_class_folders(tmp_path):
    touch(tmp_path, "train/sea_horse/1.jpg", "train/dog/1.png", "test/dog/deep/1.jpg", "train/dog/notes.txt")
    touch(tmp_path, "train/loose.jpg")
    table = read_captions("class_folders", tmp_path)
    assert contents(table) == {
        "train/dog/1.png": ("train", ["a photo of a dog"]),
        "train/sea_horse/1.jpg": ("train", ["a photo of a sea horse"]),
        "test/dog/deep/1.jpg": ("test", ["a photo of a dog"]),
    }
    assert categories(table) == ["dog", "sea horse", "dog"]
    assert kinds(table) == [("no caption", "train: loose.jpg")]
    drawn = read_captions("class_folders", tmp_path, template="a drawing of one {}")
    assert drawn.captions[0] == "a drawing of one dog"


def test_class_folders_beside_other_folders(tmp_path):
    touch(tmp_path, "train/dog/1.jpg", "valid/dog/1.jpg", "Test/cat/1.jpg", "extra/2.jpg", "valid/3.jpg")
    table = read_captions("class_folders", tmp_path)
    assert contents(table) == {
        "train/dog/1.jpg": ("train", ["a photo of a dog"]),
        "valid/dog/1.jpg": ("val", ["a photo of a dog"]),
        "Test/cat/1.jpg": ("test", ["a photo of a cat"]),
    }
    assert kinds(table) == [("no caption", "valid: 3.jpg"), ("no caption", "extra: extra/2.jpg")]
    unlabelled = tmp_path / "kaggle"  # a test folder without classes is no class either
    touch(unlabelled, "train/dog/1.jpg", "test/1.jpg")
    assert read_captions("class_folders", unlabelled).split_sizes() == {"train": 1}


def test_a_class_named_train_is_a_class(tmp_path):
    touch(tmp_path, *(f"{name}/{n}.jpg" for name in ("train", "bus") for n in range(10)))
    table = read_captions("class_folders", tmp_path)
    assert set(categories(table)) == {"train", "bus"}
    assert table.split_sizes() == {"train": 16, "val": 2, "test": 2}


def test_sidecars(tmp_path):
    touch(tmp_path, "a.jpg", "b.png", "c.JPG", "deep/d.jpg", "e.jpg", ".hidden.jpg")
    (tmp_path / "a.txt").write_text("one\n\n  two  \n")
    (tmp_path / "a.json").write_text('{"category": "numbers", "caption": "not used"}')
    (tmp_path / "b.json").write_text('{"caption": ["three", "four"]}')
    (tmp_path / "c.txt").write_text("five")
    (tmp_path / "c.json").write_text("{broken")
    (tmp_path / "deep/d.txt").write_text("six")
    table = read_captions("sidecar", tmp_path)
    assert {path: captions for path, (_, captions) in contents(table).items()} == {
        "a.jpg": ["one", "two"],
        "b.png": ["three", "four"],
        "c.JPG": ["five"],
        "deep/d.jpg": ["six"],
    }
    assert categories(table) == ["numbers", "", "", ""]
    assert kinds(table) == [("malformed row", "c.json"), ("no caption", "e.jpg")]


def test_a_caption_file_without_its_image_and_the_reverse_are_reported(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "gone.txt").write_text("two")
    table = read_captions("sidecar", tmp_path)
    assert sorted(kinds(table)) == [("missing image", "gone.txt"), ("no caption", "b.jpg")]
    assert {row["what"] for row in table.problems} == {
        "an image without captions",
        "a caption file without its image",
    }


# ---------------------------------------------------------------- hostile captions.txt

# bytes after the header -> captions of a.jpg and b.jpg, kinds of problems
CSV_CASES: dict[str, tuple[bytes, list[str], list[str]]] = {
    "plain": (b"a.jpg,A dog .\nb.jpg,A cat .\n", ["A dog .", "A cat ."], []),
    "CRLF": (b"a.jpg,A dog\r\nb.jpg,A cat\r\n", ["A dog", "A cat"], []),
    "old Mac newlines": (b"a.jpg,A dog\rb.jpg,A cat\r", ["A dog", "A cat"], []),
    "comma in quotes": (b'a.jpg,"A dog, a cat"\n', ["A dog, a cat"], []),
    "commas without quotes": (b"a.jpg,A dog, a cat, a cow\n", ["A dog, a cat, a cow"], []),
    "doubled quotes": (b'a.jpg,"A ""big"" dog"\n', ['A "big" dog'], []),
    "quotes inside a bare caption": (b'a.jpg,A 6" dog\nb.jpg,A cat\n', ['A 6" dog', "A cat"], []),
    "newline in a quoted caption": (b'a.jpg,"A dog\nruns"\nb.jpg,A cat\n', ["A dog runs", "A cat"], []),
    "CRLF in a quoted caption": (b'a.jpg,"A dog\r\nruns"\r\nb.jpg,A cat\r\n', ["A dog runs", "A cat"], []),
    "quote never closed": (b'a.jpg,"A dog\nb.jpg,A cat\n', ["A cat"], ["malformed row"]),
    "text after the closing quote": (b'a.jpg,"A" dog\nb.jpg,A cat\n', ["A cat"], ["malformed row"]),
    "NUL bytes": (b"a.jpg,A \0dog\nb.jpg,A cat\n", ["A dog", "A cat"], ["repaired text"]),
    "control characters": (b"a.jpg,A\x07 dog\x1b\n", ["A dog"], ["repaired text"]),
    "emoji": ("a.jpg,A 🐕 and a 👩‍👩‍👧 \n".encode(), ["A 🐕 and a 👩‍👩‍👧"], []),
    "Latin-1 line among UTF-8": (
        b"a.jpg,A caf\xe9\n" + "b.jpg,A café\n".encode(),
        ["A café", "A café"],
        ["repaired text"],
    ),
    "Windows quotes": (b"a.jpg,A \x93dog\x94\n", ["A \u201cdog\u201d"], ["repaired text"]),
    "line separators inside a line": ("a.jpg,A\u2028dog\x85runs\n".encode(), ["A dog runs"], []),
    "tabs and runs of spaces": (b"a.jpg,  A\t dog   \n", ["A dog"], []),
    "empty caption": (b"a.jpg,\na.jpg,A dog\na.jpg,   \n", ["A dog"], ["empty caption", "empty caption"]),
    "row without a caption": (b"a.jpg\nb.jpg,A cat\n", ["A cat"], ["malformed row"]),
    "row without an image": (b",A dog\nb.jpg,A cat\n", ["A cat"], ["malformed row"]),
    "blank lines": (b"\n\na.jpg,A dog\n\n", ["A dog"], []),
    "image that does not exist": (b"x.jpg,A\na.jpg,A dog\n", ["A dog"], ["missing image"]),
    "path upwards": (b"../secret.jpg,A\na.jpg,A dog\n", ["A dog"], ["refused path"]),
    "path down and upwards": (b"a/../../secret.jpg,A\na.jpg,A dog\n", ["A dog"], ["refused path"]),
    "Windows path upwards": (b"..\\secret.jpg,A\na.jpg,A dog\n", ["A dog"], ["refused path"]),
    "absolute path": (b"/etc/passwd,A\na.jpg,A dog\n", ["A dog"], ["refused path"]),
    "drive letter": (b"C:\\a.jpg,A\na.jpg,A dog\n", ["A dog"], ["refused path"]),
    "link that leads outside": (b"link.jpg,A\na.jpg,A dog\n", ["A dog"], ["refused path", "missing image"]),
    "link that leads nowhere": (b"dangling.jpg,A\na.jpg,A dog\n", ["A dog"], ["missing image"]),
    "link inside the folder": (b"inner.jpg,A dog\n", ["A dog"], []),
    "folder in place of a file": (b"folder.jpg,A\na.jpg,A dog\n", ["A dog"], ["missing image"]),
    "caption of 200,000 letters": (
        b"a.jpg," + b"x" * 200_000 + b"\nb.jpg,A cat\n",
        ["A cat"],
        ["malformed row"],
    ),
}


# a file of captions as others write it, read by either Flickr reader -> splits and captions of a.jpg, b.jpg, c.jpg
ROWS_CASES: dict[str, tuple[str, list[tuple[str, list[str]]]]] = {
    "open_clip's tabs": ("filepath\ttitle\na.jpg\tA dog, a cat\n", [("train", ["A dog, a cat"])]),
    "Excel's semicolons": ("image;caption\na.jpg;A dog\n", [("train", ["A dog"])]),
    "pandas' index": (',image,caption\n0,a.jpg,"a, dog"\n1,b.jpg,A\n', [("train", ["a, dog"]), ("train", ["A"])]),
    "an inch sign": ('image,caption\na.jpg,A 5" man, smiling .\nb.jpg,x\n',
                     [("train", ['A 5" man, smiling .']), ("train", ["x"])]),
    "Flickr30k with commas": ('image_name,comment_number,comment\na.jpg,0,"A man , in"\na.jpg,1,A dog, x\n',
                              [("train", ["A man , in", "A dog, x"])]),
    "token file": ("a.jpg#0\tA dog\na.jpg#1\tA, cat\nx.jpg.1#0\tgone\n", [("train", ["A dog", "A, cat"])]),
    "splits and lists": ('raw,sentids,split,filename,img_id\n"[""A man"", ""A dog""]","[0, 1]",valid,a.jpg,0\n'
                         '"[""x""]",[2],test,b.jpg,1\n', [("val", ["A man", "A dog"]), ("test", ["x"])]),
}  # fmt: skip


@pytest.mark.parametrize("reader", ["flickr8k", "flickr30k"])
@pytest.mark.parametrize("name", ROWS_CASES)
def test_files_of_captions_as_others_write_them(name, reader, tmp_path):
    text, expected = ROWS_CASES[name]
    touch(tmp_path, "Images/a.jpg", "Images/b.jpg", "Images/c.jpg")
    (tmp_path / "mine.txt").write_text(text)
    table = read_captions(reader, tmp_path, annotation_file="mine.txt")
    assert list(contents(table).values()) == expected
    assert [kind for kind, _ in kinds(table)] == ["missing image"] * (name == "token file")


def test_flickr8k_as_published(tmp_path):
    write_flickr8k(tmp_path)
    (tmp_path / "Images").rename(tmp_path / "Flicker8k_Dataset")
    (tmp_path / "Flickr8k_text").mkdir()
    for file in tmp_path.glob("Flickr_8k.*"):
        file.rename(tmp_path / "Flickr8k_text" / file.name)
    rows = [f"{n}.jpg#{k}\t{text}\n" for n in range(6) for k, text in enumerate(CAPTIONS[n])]
    (tmp_path / "Flickr8k_text" / "Flickr8k.token.txt").write_text("".join(rows))
    (tmp_path / "captions.txt").unlink()
    table = read_captions("flickr8k", tmp_path)
    assert list(contents(table).values()) == list(zip(SPLITS, CAPTIONS, strict=True))


NAMES = [
    "Screenshot at 4.42.48\u202fPM.png",
    "obrazovky v\u00a013.05.png",
    "写真\u30001.png",
    "👩\u200d🔬.png",
]


@pytest.mark.parametrize("layout", ["json", "flickr8k", "sidecar"])
def test_names_with_spaces_of_any_kind(layout, tmp_path):
    touch(tmp_path, *NAMES)
    rows = [{"image_path": name, "caption": "a window"} for name in NAMES]
    annotate(tmp_path, train=rows)
    lines = ["image,caption", *(f"{name},a window" for name in NAMES)]
    (tmp_path / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    for name in NAMES if layout == "sidecar" else ():
        (tmp_path / name).with_suffix(".txt").write_text("a window")
    table = read_captions(layout, tmp_path)
    assert sorted(table.paths) == sorted(NAMES)
    assert [problem for problem in table.problems if "captions.txt" not in problem["where"]] == []


def test_names_as_another_system_spells_them(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Zürich/Café.jpg") for form in ("NFC", "NFD"))
    touch(tmp_path, f"Images/{apart}", "Images/a.JPG", "Images/b.jpg", "Images/B.jpg")
    rows = [f"{name},x" for name in (composed, "a.jpg", "b.jpg", "A.jpg")]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    table = read_captions("flickr8k", tmp_path)
    assert table.paths == [f"Images/{apart}", "Images/a.JPG", "Images/b.jpg"]
    assert all(table.path_of(row).is_file() for row in range(3))
    assert kinds(table) == [("missing image", "Images: A.jpg")]  # another name, not another spelling
    side = tmp_path / "side"
    touch(side, unicodedata.normalize("NFD", "Café.jpg"), "b.jpg", "c.JPG")
    (side / "Café.txt").write_text("a street")
    (side / "b.TXT").write_text("y")
    (side / "c.txt").write_text("z")
    table = read_captions("sidecar", side)
    assert sorted(table.captions) == ["a street", "y", "z"]
    assert table.problems == []


@pytest.mark.skipif(os.name == "nt", reason="names there are text")
def test_a_name_that_is_not_text_is_noted(tmp_path):
    touch(tmp_path, "dog/a.jpg")
    with open(os.path.join(os.fsencode(tmp_path), b"dog/\xff.jpg"), "wb"):
        pass
    table = read_captions("class_folders", tmp_path, cache_dir=tmp_path / "cache")
    assert table.paths == ["dog/a.jpg"]
    assert kinds(table) == [("refused path", "dog: ?.jpg")]


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "heic", "avif", "ppm", "PGM"])
def test_every_file_that_looks_like_an_image_is_taken(suffix, tmp_path):
    touch(tmp_path, "dog/a.jpg", f"dog/b.{suffix}")
    assert len(read_captions("class_folders", tmp_path)) == 2
    (tmp_path / f"dog/b.{suffix}").rename(tmp_path / f"b.{suffix}")
    (tmp_path / "b.txt").write_text("x")
    assert read_captions("sidecar", tmp_path).captions == ["x"]


def test_absolute_paths_below_the_data_folder_or_image_root(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    touch(data, "a.jpg")
    touch(other, "b.jpg")
    touch(tmp_path, "secret.jpg")
    paths = [
        str(data / "a.jpg"),
        str(other / "b.jpg"),
        str(tmp_path / "secret.jpg"),
        f"{other}/../secret.jpg",
    ]
    rows = [{"image_path": path, "caption": "x"} for path in paths]
    annotate(data, train=rows)
    table = read_captions("json", data)
    assert table.paths == ["a.jpg"]
    assert table.problem_counts() == {"refused path": 3}
    table = read_captions("json", data, image_root=other, cache_dir=tmp_path / "cache")
    assert table.paths == ["a.jpg", str(other / "b.jpg")]
    assert table.path_of(1).read_bytes() == b"pixels of b.jpg"
    assert table.problem_counts() == {"refused path": 2}
    assert len(read_captions("json", data, cache_dir=tmp_path / "cache")) == 1
    (data / "a.jpg").unlink()
    with pytest.raises(
        LabError, match=r"none of the 1 .*refused path: 3, such as .*b.jpg' is absolute .*image_root"
    ):
        read_captions("json", data)
    with pytest.raises(LabError, match="image_root '.*gone' is not a folder"):
        read_captions("json", data, image_root=tmp_path / "gone")


def test_whole_numbers_name_categories(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    values = [7, 3.0, None, [1]]
    rows = [
        {"image_path": f"{n}.jpg", "caption": "x", "category": c} for n, c in zip("abcd", values, strict=True)
    ]
    annotate(tmp_path, train=rows)
    table = read_captions("json", tmp_path)
    assert categories(table) == ["7", "3", "", ""]
    assert kinds(table) == [("malformed row", "d.jpg")]


@pytest.fixture
def hostile(tmp_path):
    root = tmp_path / "data"
    touch(root, "Images/a.jpg", "Images/b.jpg", "Images/folder.jpg/x")
    touch(tmp_path, "secret.jpg")
    (root / "Images/link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "Images/dangling.jpg").symlink_to(root / "Images/gone.jpg")
    (root / "Images/inner.jpg").symlink_to(root / "Images/a.jpg")
    return root


@pytest.mark.parametrize("name", CSV_CASES)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_hostile_csv(name, mark, hostile):
    rows, captions, problems = CSV_CASES[name]
    (hostile / "captions.txt").write_bytes(mark + b"image,caption\n" + rows)
    table = read_captions("flickr8k", hostile)
    noted = [
        p for p in table.problems if p["where"] != "Images/link.jpg" or name == "link that leads outside"
    ]
    assert sorted(problem["kind"] for problem in noted) == sorted(problems)
    assert list(table.captions) == captions
    assert "secret" not in " ".join(table.paths)


def test_utf16(hostile):
    text = "image,caption\na.jpg,A café 🐕\n"
    (hostile / "captions.txt").write_bytes(text.encode("utf-16"))
    assert list(read_captions("flickr8k", hostile).captions) == ["A café 🐕"]


def test_links_are_followed_when_asked(hostile):
    (hostile / "captions.txt").write_text("image,caption\nlink.jpg,A secret\n")
    message = (
        r"none of the 1 images .*refused path: 1, such as Images/link.jpg: a link .* to .*; set image_root"
    )
    with pytest.raises(LabError, match=message):
        read_captions("flickr8k", hostile)
    assert list(read_captions("flickr8k", hostile, image_root=hostile.parent).captions) == ["A secret"]
    table = read_captions("flickr8k", hostile, follow_links=True)
    assert list(table.captions) == ["A secret"]
    assert table.problems == []


def test_linked_folders_and_caption_files_are_refused(tmp_path):
    outside = tmp_path / "outside"
    write_flickr8k(outside)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "Images").symlink_to(outside / "Images")
    (inside / "captions.txt").write_bytes((outside / "captions.txt").read_bytes())
    with pytest.raises(LabError, match="none of the 6 images"):
        read_captions("flickr8k", inside)
    assert len(read_captions("flickr8k", inside, follow_links=True)) == 6
    (inside / "captions.txt").unlink()
    (inside / "captions.txt").symlink_to(outside / "captions.txt")
    with pytest.raises(LabError, match="link that leads outside"):
        read_captions("flickr8k", inside)


def test_loops_of_links_end(tmp_path):
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a/1.txt").write_text("one")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert read_captions("sidecar", tmp_path).paths == ["a/1.jpg"]


# ---------------------------------------------------------------- hostile JSON

# an image record and a caption record beside a good pair -> kind of problem
COCO_CASES: dict[str, tuple[object, object, list[str]]] = {
    "no id": ({"file_name": "x.jpg"}, None, ["malformed row"]),
    "text as id": ({"id": "7", "file_name": "x.jpg"}, None, ["malformed row"]),
    "fraction as id": ({"id": 7.5, "file_name": "x.jpg"}, None, ["malformed row"]),
    "negative id": ({"id": -1, "file_name": "x.jpg"}, None, ["malformed row"]),
    "id beyond 63 bits": ({"id": 2**63, "file_name": "x.jpg"}, None, ["malformed row"]),
    "true as id": ({"id": True, "file_name": "x.jpg"}, None, ["malformed row"]),
    "list as id": (
        {"id": [1], "file_name": "x.jpg"},
        {"image_id": [1], "caption": "x"},
        ["malformed row"] * 2,
    ),
    "number as file name": ({"id": 7, "file_name": 5}, None, ["malformed row"]),
    "NUL in the file name": ({"id": 7, "file_name": "a\0.jpg"}, None, ["refused path"]),
    "path upwards": ({"id": 7, "file_name": "../val2014/a.jpg"}, None, ["refused path"]),
    "absolute path": ({"id": 7, "file_name": "/etc/passwd"}, None, ["refused path"]),
    "image is null": (None, None, ["malformed row"]),
    "image without captions": ({"id": 7, "file_name": "b.jpg"}, None, ["no caption"]),
    "caption of no image": (
        {"id": 1, "file_name": "a.jpg"},
        {"image_id": 3, "caption": "x"},
        ["malformed row"],
    ),
    "number as caption": ({"id": 1, "file_name": "a.jpg"}, {"image_id": 1, "caption": 5}, ["malformed row"]),
    "null as caption": ({"id": 1, "file_name": "a.jpg"}, {"image_id": 1, "caption": None}, ["malformed row"]),
    "lone surrogate": (
        {"id": 1, "file_name": "a.jpg"},
        {"image_id": 1, "caption": "x\ud83d"},
        ["repaired text"],
    ),
    "escaped NUL": ({"id": 1, "file_name": "a.jpg"}, {"image_id": 1, "caption": "x\0y"}, ["repaired text"]),
    "newline in a caption": ({"id": 1, "file_name": "a.jpg"}, {"image_id": 1, "caption": "x\ny"}, []),
}


@pytest.mark.parametrize("name", COCO_CASES)
def test_hostile_coco(name, tmp_path):
    image, annotation, problems = COCO_CASES[name]
    touch(tmp_path, "train2014/a.jpg", "train2014/b.jpg")
    images = [{"id": 1, "file_name": "a.jpg"}, image]
    annotations = [{"image_id": 1, "caption": "good"}, *([annotation] if annotation else [])]
    (tmp_path / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "annotations" / "captions_train2014.json").write_text(content)
    table = read_captions("coco", tmp_path)
    assert table.paths == ["train2014/a.jpg"]
    assert table.captions_of(0)[0] == "good"
    assert [kind for kind, _ in kinds(table)] == problems
    extra = {"lone surrogate": ["x\ufffd"], "escaped NUL": ["xy"], "newline in a caption": ["x y"]}
    assert table.captions_of(0)[1:] == extra.get(name, [])


KARPATHY_CASES: dict[str, object] = {
    "null": None,
    "no sentences": {"split": "train", "filename": "1.jpg", "imgid": 1},
    "sentences that are not a list": {"split": "train", "filename": "1.jpg", "imgid": 1, "sentences": "x"},
    "no split": {"filename": "1.jpg", "imgid": 1, "sentences": [{"raw": "x"}]},
    "no file name": {"split": "train", "imgid": 1, "sentences": [{"raw": "x"}]},
    "no id": {"split": "train", "filename": "1.jpg", "sentences": [{"raw": "x"}]},
    "path upwards": {"split": "train", "filename": "../1.jpg", "imgid": 1, "sentences": [{"raw": "x"}]},
    "sentence without text": {
        "split": "train",
        "filename": "1.jpg",
        "imgid": 1,
        "sentences": [{"tokens": []}],
    },
}


@pytest.mark.parametrize("name", KARPATHY_CASES)
def test_hostile_karpathy(name, tmp_path):
    touch(tmp_path, "Images/0.jpg", "Images/1.jpg")
    good = {"split": "test", "filename": "0.jpg", "imgid": 0, "sentences": [{"raw": "good"}]}
    content = {"images": [good, KARPATHY_CASES[name]], "dataset": "flickr30k"}
    (tmp_path / "k.json").write_text(json.dumps(content))
    table = read_captions("flickr30k", tmp_path, karpathy_file=tmp_path / "k.json")
    assert contents(table) == {"Images/0.jpg": ("test", ["good"])}
    assert table.problems[0]["kind"] in ("malformed row", "refused path")


def test_a_users_path_is_below_the_data_folder_or_as_it_stands(tmp_path, monkeypatch):
    write_flickr8k(tmp_path / "data")
    (tmp_path / "captions.txt").write_text("not a caption file")  # where the program was started
    monkeypatch.chdir(tmp_path)
    assert len(read_captions("flickr8k", "data", annotation_file="captions.txt")) == 6
    (tmp_path / "data" / "captions.txt").rename(tmp_path / "captions.txt")
    assert len(read_captions("flickr8k", "data", annotation_file="captions.txt")) == 6


JSON_CASES = {
    "row that is not an object": ("text", ["malformed row"]),
    "row without a path": ({"caption": "x"}, ["malformed row"]),
    "row without a caption": ({"image_path": "b.jpg"}, ["malformed row"]),
    "null in a list of captions": ({"image_path": "b.jpg", "caption": ["x", None]}, ["malformed row"]),
    "empty list of captions": ({"image_path": "b.jpg", "caption": []}, ["no caption"]),
    "path upwards": ({"image_path": "x/../../b.jpg", "caption": "x"}, ["refused path"]),
    "absolute path": ({"image_path": "/b.jpg", "caption": "x"}, ["refused path"]),
    "missing file": ({"image_path": "c.jpg", "caption": "x"}, ["missing image"]),
}


@pytest.mark.parametrize("name", JSON_CASES)
def test_hostile_json(name, tmp_path):
    row, problems = JSON_CASES[name]
    touch(tmp_path, "a.jpg", "b.jpg")
    rows = [{"image_path": "a.jpg", "caption": "good"}, row]
    (tmp_path / "annotations.json").write_text(json.dumps({"splits": {"train": rows}}), encoding="utf-8-sig")
    table = read_captions("json", tmp_path)
    assert table.captions_of(0) == ["good"]
    assert [kind for kind, _ in kinds(table)] == problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"splits": [1]}', 'no object "splits"'),
        ("[]", 'no object "splits"'),
        ('{"splits": {"train": 5}}', "split 'train' .* is not a list"),
        ('{"splits": {}}', "has no image with a caption"),
        ('{"splits": {"train": [{"image_path": "x.jpg", "caption": "y"}]}}', "none of the 1 images .*x.jpg"),
        ("<html>", "not valid JSON"),
        ('{"splits": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_unusable_json_is_one_sentence(content, message, tmp_path):
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(LabError, match=message) as caught:
        read_captions("json", tmp_path)
    assert len(str(caught.value)) < 400


# ---------------------------------------------------------------- leaks, missing things, many problems


def test_a_leaking_split_names_the_images(tmp_path):
    write_flickr8k(tmp_path)
    with (tmp_path / "Flickr_8k.testImages.txt").open("a") as file:
        file.write("0.jpg\n1.jpg\n")
    message = (
        r"2 images are in more than one split: Images/0.jpg \(train, test\), Images/1.jpg \(train, test\)"
    )
    with pytest.raises(LabError, match=message):
        read_captions("flickr8k", tmp_path)


def test_json_leak(tmp_path):
    touch(tmp_path, "a.jpg")
    row = {"image_path": "a.jpg", "caption": "x"}
    annotate(tmp_path, train=[row], test=[row | {"image_path": "./a.jpg"}])
    with pytest.raises(LabError, match=r"a.jpg \(train, test\)"):
        read_captions("json", tmp_path)


def test_karpathy_leak(tmp_path):
    write_karpathy_coco(tmp_path)
    content = json.loads(karpathy("coco"))
    content["images"].append(content["images"][0] | {"split": "restval"})
    (tmp_path / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(LabError, match=r"COCO_val2014_0.jpg \(train, restval\)"):
        read_captions("coco", tmp_path, karpathy_file="dataset_coco.json")


def test_one_id_in_two_coco_splits(tmp_path):
    write_coco(tmp_path)
    text = coco_file("val", [3, 4]).replace('"id": 104', '"id": 100')
    (tmp_path / "annotations" / "captions_val2014.json").write_text(text)
    with pytest.raises(LabError, match="same id 100"):
        read_captions("coco", tmp_path)


MISSING: dict[str, tuple[str, Callable[[Path], None], dict[str, Any], str]] = {
    "folder": ("flickr8k", lambda root: None, {}, "data folder .* does not exist"),
    "caption file": ("flickr8k", lambda root: touch(root, "Images/a.jpg"), {}, "has no captions.txt"),
    "annotations": (
        "coco",
        lambda root: touch(root, "train2014/a.jpg"),
        {},
        "no captions_.*2014.json .*annotations",
    ),
    "results.csv": ("flickr30k", lambda root: touch(root, "Images/a.jpg"), {}, "has no results.csv"),
    "Karpathy's file": (
        "coco",
        write_coco,
        {"karpathy_file": "x.json"},
        "karpathy_file 'x.json' does not exist",
    ),
    "table": (
        "table",
        lambda root: touch(root, "a.jpg"),
        {},
        "has no .csv, .tsv, .jsonl, .parquet file; name it",
    ),
    "JSON file": ("json", lambda root: touch(root, "a.jpg"), {}, "has no annotations.json"),
    "images": ("sidecar", lambda root: touch(root, "a.txt"), {}, "has no image with a caption"),
    "classes": ("class_folders", lambda root: touch(root, "a.jpg"), {}, "has no image with a caption"),
    "option": ("flickr8k", write_flickr8k, {"karpaty_file": "x"}, "no option 'karpaty_file'.*karpathy_file"),
    "reader": ("flick8k", write_flickr8k, {}, "reader 'flick8k' does not exist; did you mean 'flickr8k'"),
    "place for the class": ("class_folders", write_sidecar, {"template": "photo"}, "template 'photo'"),
}


@pytest.mark.parametrize("what", MISSING)
def test_missing_things_say_what_to_do(what, tmp_path):
    reader, write, options, message = MISSING[what]
    write(tmp_path / "data")
    with pytest.raises(LabError, match=message):
        read_captions(reader, tmp_path / "data", **options)


def test_missing_columns_are_named(tmp_path):
    write_flickr8k(tmp_path)
    (tmp_path / "captions.txt").write_text("file,caption\n0.jpg,x\n")
    with pytest.raises(LabError, match=r"has the columns \['file', 'caption'\]; its first line must be"):
        read_captions("flickr8k", tmp_path)
    (tmp_path / "results.csv").write_text("image_name,number\n0.jpg,x\n")
    with pytest.raises(LabError, match=r"or image_name\| comment_number\| comment"):
        read_captions("flickr30k", tmp_path)


def test_options_left_at_none_are_not_given(tmp_path):
    write_json(tmp_path)
    assert len(read_captions("json", tmp_path, karpathy_file=None)) == 6


def test_more_columns_and_another_order(tmp_path):
    touch(tmp_path, "Images/a.jpg")
    (tmp_path / "captions.txt").write_text(
        'caption,number,image\n"A dog, a cat",0,a.jpg\nA dog, a cat,0,a.jpg\n'
    )
    table = read_captions("flickr8k", tmp_path)
    assert list(table.captions) == ["A dog, a cat"]
    assert kinds(table) == [("malformed row", "captions.txt: line 3")]


def test_many_problems_stay_few_rows_but_are_all_counted(tmp_path):
    touch(tmp_path, "Images/a.jpg")
    rows = ["a.jpg,A dog", *(f"{n}.jpg,missing" for n in range(5000))]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    table = read_captions("flickr8k", tmp_path)
    assert len(table.problems) == 101
    assert table.problem_counts() == {"missing image": 5000}


# ---------------------------------------------------------------- tables of any kind

MANY = pd.DataFrame(
    [
        (f"{n:02d}.jpg", f"{WORDS[n % 11]} dog {n}, caption {each}", ("train", "val", "test")[n % 3])
        for n in range(60)
        for each in range(2)
    ],
    columns=["name", "says", "split"],
)
LISTS = MANY.groupby("name", as_index=False).agg({"says": list, "split": "first"})


def write_parts(root: Path, name: str) -> None:
    """One table for each split, beside or above its images."""
    for split, rows in MANY.groupby("split"):
        file = root / name.format(split)
        file.parent.mkdir(exist_ok=True)
        rows.rename(columns={"name": "file_name"})[["file_name", "says"]].to_csv(file, index=False)


def write_absolute(root: Path) -> None:
    MANY.assign(name=f"{root}/images/" + MANY["name"]).to_csv(root / "data.csv", index=False)


TABLES: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any]]] = {
    "commas": ("images", lambda root: MANY.to_csv(root / "data.csv", index=False), {}),
    "semicolons": ("images", lambda root: MANY.to_csv(root / "data.csv", sep=";", index=False), {}),
    "tabs": ("", lambda root: MANY.to_csv(root / "x.tsv", sep="\t", index=False, encoding="utf-16"), {}),
    "named columns": (
        "images",
        lambda root: MANY.assign(other=MANY["says"]).to_csv(root / "data.csv", sep="|", index=False),
        {"image_column": "name", "caption_column": "says", "split_column": "split"},
    ),
    "JSON lines": ("Images", lambda root: MANY.to_json(root / "a.jsonl", orient="records", lines=True), {}),
    "lists": ("images", lambda root: LISTS.to_json(root / "a.jsonl", orient="records", lines=True), {}),
    "lists as JSON": (
        "images",
        lambda root: LISTS.assign(says=LISTS["says"].map(json.dumps)).to_csv(root / "a.csv", index=False),
        {},
    ),
    "parquet": ("images", lambda root: MANY.to_parquet(root / "data.parquet"), {}),
    "absolute paths": ("images", write_absolute, {}),
    "a table for each split": ("images", lambda root: write_parts(root, "{}.csv"), {}),
    "imagefolder with splits": ("{}", lambda root: write_parts(root, "{}/metadata.csv"), {}),
    "one imagefolder": (
        "",
        lambda root: MANY.rename(columns={"name": "file_name"}).to_csv(root / "metadata.csv", index=False),
        {},
    ),
    "imagefolder with paths below the splits": (
        "{}",
        lambda root: MANY.assign(file_name=MANY["split"] + "/" + MANY["name"])[["file_name", "says"]].to_csv(
            root / "metadata.csv", index=False
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_the_same_images_through_every_table(case, tmp_path, capsys):
    place, write, options = TABLES[case]
    if case == "parquet" and not (
        importlib.util.find_spec("pyarrow") or importlib.util.find_spec("fastparquet")
    ):
        pytest.skip("no library for parquet")
    splits = dict(zip(MANY["name"], MANY["split"], strict=True))
    touch(tmp_path, *(f"{place.format(split)}/{name}".strip("/") for name, split in splits.items()))
    write(tmp_path)
    assert recognize(tmp_path) == "table"
    table = read_captions("auto", tmp_path, **options)
    expected = {row["name"]: (row["split"], row["says"]) for row in LISTS.to_dict("records")}
    assert {Path(path).name: rows for path, rows in contents(table).items()} == expected
    assert table.problems == []
    assert ("captions in column 'says'" in capsys.readouterr().out) is not bool(options)


def test_a_table_without_splits_is_divided_by_seed(tmp_path):
    touch(tmp_path, *(f"images/{name}" for name in LISTS["name"]))
    MANY.drop(columns="split").to_csv(tmp_path / "data.csv", index=False)
    assert read_captions("table", tmp_path).split_sizes() == {"train": 48, "val": 6, "test": 6}
    assert len(read_captions("auto", tmp_path / "data.csv")) == 60


TABLE_ERRORS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no captions": (
        "a.csv",
        "file,number\na.jpg,1\n",
        {},
        "no column of captions. Set caption_column to one of: file, number",
    ),
    "a column twice": (
        "a.csv",
        "file,words,words\na.jpg,x y,z\n",
        {},
        "has the column 'words' twice; rename one",
    ),
    "two captions": (
        "a.csv",
        "file,title,text\na.jpg,x,y\n",
        {},
        "several columns that may be the captions. Set caption_",
    ),
    "no images": (
        "a.csv",
        "a,caption\n1,x\n",
        {},
        "no column of images. Set image_column to one of: a, caption",
    ),
    "no such column": (
        "a.csv",
        "file,words\na.jpg,x y\n",
        {"caption_column": "word"},
        "no column 'word'; did you mean 'words'\\? Set caption_column",
    ),
    "missing image": ("a.csv", "file,words\nb.jpg,x y\n", {}, r"none of the 1 images listed .*such as b.jpg"),
    "outside": (
        "a.csv",
        "file,words\n../a.jpg,x y\n",
        {},
        "refused path: 1, such as a.csv: row 1: .*leads outside",
    ),
    "no such table": ("a.csv", "file,words\na.jpg,x y\n", {"annotation_file": "c.csv"}, "has no c.csv"),
    "empty": ("a.csv", "", {}, "is not a table"),
    "no parquet": ("a.parquet", "file,words", {}, "a.parquet is not a parquet file"),
}


@pytest.mark.parametrize("case", TABLE_ERRORS)
def test_an_unusable_table_is_one_sentence(case, tmp_path):
    name, content, options, message = TABLE_ERRORS[case]
    touch(tmp_path, "a.jpg")
    (tmp_path / name).write_text(content)
    with pytest.raises(LabError, match=message):
        read_captions("table", tmp_path, **options)


def test_several_tables_are_refused_unless_one_is_named(tmp_path):
    touch(tmp_path, "a.jpg")
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("file,words\na.jpg,x y\n")
    with pytest.raises(LabError, match="has the tables a.csv, b.csv; name one with annotation_file"):
        read_captions("auto", tmp_path)
    table = read_captions("auto", tmp_path, annotation_file="b.csv")
    report = check(table, num_workers=0, progress=False)
    assert (len(table), sum(report["undecodable"].values())) == (1, 1)  # the file's bytes are no image


def test_a_bad_row_of_a_table_costs_only_itself(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.csv").write_text("file,words\na.jpg,x y\na.jpg,x,y,z\nb.jpg,\nc.jpg,x y\n")
    table = read_captions("table", tmp_path)
    assert contents(table) == {"a.jpg": ("train", ["x y"])}
    assert table.problem_counts() == {
        "malformed row": 1, "empty caption": 1, "missing image": 1, "no caption": 1,
    }  # fmt: skip


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    def missing(*_: Any) -> None:
        raise ImportError("pyarrow or fastparquet is required")

    touch(tmp_path, "a.parquet", "a.jpg")
    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(
        LabError, match="a.parquet needs pyarrow; install it with `pip install pyarrow`, or save"
    ):
        read_captions("table", tmp_path)
    cells = [{"bytes": b"...", "path": "a.jpg"}]
    monkeypatch.setattr(pd, "read_parquet", lambda _: pd.DataFrame({"image": cells, "text": ["a dog"]}))
    with pytest.raises(LabError, match="column 'image' of .* has the images themselves; write them to files"):
        read_captions("table", tmp_path)


# ---------------------------------------------------------------- the table


def test_take_and_split_keep_captions_with_their_images(tmp_path):
    write_flickr8k(tmp_path)
    table = read_captions("flickr8k", tmp_path)
    taken = table.take([4, 0])
    assert [taken.captions_of(row) for row in range(2)] == [CAPTIONS[4], CAPTIONS[0]]
    assert taken.offsets.tolist() == [0, 2, 4]
    assert contents(table.take(table.splits == "val")) == contents(table.split("val"))
    assert len(table.split("train", "test")) == 4
    assert len(table.take([])) == len(table.take([]).captions) == 0
    with pytest.raises(
        LabError, match=r"split 'vall' has no image; did you mean 'val'\?.*train \(3 images\)"
    ):
        table.split("vall")


def test_a_table_from_plain_lists():
    table = CaptionTable(
        root=Path("."),
        image_ids=np.array([9, 4]),
        paths=["x.jpg", "y.jpg"],
        splits=np.array(["train", "val"]),
        captions=["a", "b", "c"],
        caption_image_ids=np.array([9, 9, 4]),
    )
    assert table.offsets.tolist() == [0, 2, 3]
    assert table.split("val").captions_of(0) == ["c"]
    ungrouped = dataclasses.replace(table, caption_image_ids=np.array([9, 4, 9]))
    with pytest.raises(LabError, match="grouped by image"):
        ungrouped.captions_of(0)


# ---------------------------------------------------------------- real files


def test_flickr8k_as_it_is():
    root = SHARED / "flickr8k"
    if not root.is_dir():
        pytest.skip("../shared/flickr8k is not here")
    table = read_captions("flickr8k", root)
    assert table.split_sizes() == {"train": 6000, "val": 1000, "test": 1000, "unused": 91}
    assert table.split_source == "Flickr8k's official lists"
    assert len(table.captions) == 40_455 - table.problem_counts().get("empty caption", 0)
    assert table.problems == []


def test_every_reader_is_tested():
    assert set(RECOGNIZED) == set(READERS)
    assert set(READERS) == {reader for reader, _, _ in LAYOUTS.values()} | {"class_folders"}


@pytest.mark.parametrize(("reader", "file"), [("flickr8k", "captions.txt"), ("sidecar", "a.txt")])
def test_a_pipe_in_place_of_captions_is_not_waited_for(reader, file, tmp_path):
    touch(tmp_path, "a.jpg", "Images/a.jpg")
    os.mkfifo(tmp_path / file)
    with pytest.raises(LabError, match=rf"{file} is not a regular file; give the path of a file"):
        read_captions(reader, tmp_path)


def test_a_sparse_file_is_not_read_into_memory(tmp_path):
    (tmp_path / "annotations.json").touch()
    os.truncate(tmp_path / "annotations.json", 60 * 10**9)
    with pytest.raises(LabError, match="has 60,000,000,000 bytes; such a file has at most 2,147,483,648"):
        read_captions("json", tmp_path)
