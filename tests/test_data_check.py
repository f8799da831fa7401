"""The data check reports and counts planted faults, and its figure can be drawn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import SHARED

from core.errors import LabError
from plots import figures
from sources import check as sources_check
from sources.check import check, load_report, report_table, save_report
from sources.readers import read_captions


def jpeg(seed: int, size=(24, 18)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def words(texts: list[str]) -> list[list[str]]:
    """A tokenizer: one token per word, and one at each end."""
    return [["<", *text.split(), ">"] for text in texts]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Ten images: two undecodable, one of them in train twice, one of train also in test."""
    (tmp_path / "Images").mkdir()
    images = {f"{n}.jpg": jpeg(n) for n in range(7)}
    images |= {"wide.jpg": jpeg(7, (60, 20)), "empty.jpg": b"", "page.jpg": b"<html>404</html>"}
    images |= {"copy.jpg": images["0.jpg"], "again.jpg": images["1.jpg"]}
    for name, data in images.items():
        (tmp_path / "Images" / name).write_bytes(data)
    rows = [f"{name},an image called {name}" for name in images]
    rows += ["0.jpg,", "0.jpg,", "1.jpg,a caf\ufffd", f"2.jpg,{'long ' * 30}", f"3.jpg,{'longer ' * 50}"]
    rows += ["nobody.jpg,a missing image", "../x.jpg,an escape", "broken"]
    text = "\n".join(["image,caption", *rows]).encode() + b"\n4.jpg,na\xefve\n"
    (tmp_path / "captions.txt").write_bytes(text)
    held = {"dev": ["5.jpg"], "test": ["6.jpg", "copy.jpg", "page.jpg"]}
    held["train"] = [name for name in images if name not in held["dev"] + held["test"]]
    for split, names in held.items():
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names))
    return tmp_path


@pytest.fixture
def table(planted):
    return read_captions("flickr8k", planted)


@pytest.fixture
def report(table):
    return check(table, tokenizer=words, max_length=20, progress=False)


def test_planted_faults_are_reported(report):
    assert report["images"] == 12
    assert report["captions"] == 12 + 4
    assert report["images_per_split"] == {"train": 8, "val": 1, "test": 3}
    assert report["captions_per_image"] == {1: 8, 2: 4}
    assert report["bad_images"] == {
        "Images/empty.jpg": "empty file",
        "Images/page.jpg": "a web page or XML, not an image",
    }
    assert report["undecodable"] == {"empty file": 1, "a web page or XML, not an image": 1}
    assert sorted(report["image_sizes"]) == [[24, 18]] * 9 + [[60, 20]]
    assert sorted(report["caption_lengths"]) == [1, 2] + [4] * 12 + [30, 50]
    assert report["duplicates"] == [
        {"paths": ["Images/0.jpg", "Images/copy.jpg"], "splits": ["train", "test"]}
    ]
    assert report["duplicates_within"] == 1
    assert report["empty_captions"] == 2
    assert report["undecodable_text"] == 2  # a line of Latin-1, and U+FFFD in a caption
    assert report["problem_counts"] == {
        "empty caption": 2,
        "malformed row": 1,
        "missing image": 1,
        "refused path": 1,
        "repaired text": 1,
    }


def test_cut_captions_are_counted_by_hand(report):
    cut = {"max_length": 20, "captions": 2, "tokens_cut": 12 + 32, "tokens": 32 + 52, "longest": 52}
    assert report["over_length"] == cut


def test_tokenizers_may_return_a_mapping(table):
    by_mapping = check(
        table, tokenizer=lambda texts: {"input_ids": words(texts)}, max_length=20, progress=False
    )
    assert by_mapping["over_length"]["captions"] == 2
    assert check(table, progress=False)["over_length"] is None


def test_the_table_shows_every_finding(report):
    rows = report_table(report).to_dict("records")
    counts = {row["finding"].strip(): row["count"] for row in rows}
    detail = {row["finding"]: row["detail"] for row in rows}
    assert counts == {
        "images": 12,
        "captions": 16,
        "sizes": 2,
        "undecodable images": 2,
        "empty file": 1,
        "a web page or XML, not an image": 1,
        "identical files in several splits": 1,
        "identical files in one split": 1,
        "empty captions": 2,
        "repaired or damaged captions": 2,
        "captions over 20 tokens": 2,
        "malformed rows": 1,
        "refused paths": 1,
        "missing images": 1,
        "images without captions": 0,
    }
    assert detail["identical files in several splits"] == "Images/0.jpg = Images/copy.jpg"
    assert detail["captions over 20 tokens"].startswith("44 tokens cut, 52% of theirs")
    assert "captions.txt: line 21 (1 columns, expected 2)" in detail["malformed rows"]


def test_processes_find_the_same(table, report, monkeypatch):
    monkeypatch.setattr(sources_check, "MIN_IMAGES_FOR_PROCESSES", 2)
    monkeypatch.setattr(sources_check, "CHUNK", 3)
    again = check(table, tokenizer=words, max_length=20, num_workers=2, progress=False)
    assert again == report


def test_saved_reports_come_back_equal(report, tmp_path):
    path = save_report(report, tmp_path)
    assert path.name == "data_report.json"
    assert load_report(tmp_path) == report
    assert len(path.read_text().splitlines()) == len(report) + 2  # one key per line
    json.loads(path.read_text())
    path.write_text("{}")
    with pytest.raises(LabError, match="is not a data report; make one with"):
        load_report(path)
    with pytest.raises(LabError, match="is not a data report"):
        load_report(tmp_path / "none.json")


def test_the_figure_can_be_drawn(report, tmp_path):
    figures.data_report(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_photographs():
    root = SHARED / "flickr8k"
    if not root.is_dir():
        pytest.skip("the photographs of ../shared/flickr8k are not here")
    table = read_captions("flickr8k", root).split("val")
    report = check(table, num_workers=2, progress=False)
    assert report["bad_images"] == {}
    assert report["duplicates"] == []
    assert {tuple(size) for size in report["image_sizes"]} == {(224, 224)}
    assert len(report["image_sizes"]) == 1000
