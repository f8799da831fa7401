"""The data check's report, drawn: every panel holds what the check found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from figures import overlaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from small_data import write_coco

from core.errors import LabError
from plots import figures
from sources.check import check, load_report, save_report
from sources.readers import read_captions


def test_data_report_draws_a_panel_for_each_finding():
    report = {
        "images_per_split": {"train": 6000, "test": 1000},
        "captions_per_image": {5: 6998, 4: 2},
        "image_sizes": [(500, 375), (500, 375), (375, 500)],
        "caption_lengths": [8, 9, 9, 12],
        "undecodable": {"truncated": 3, "empty": 1},
    }
    figure = figures.data_report(report)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [
        "7,000 images", "34,998 captions", "2 sizes, most 500×375", "median 9 words", "4 undecodable images",
    ]  # fmt: skip
    heights = [[patch.get_height() for patch in axes.patches] for axes in figure.axes]
    assert heights[0] == [6000, 1000]
    assert heights[1] == [2, 6998]
    assert heights[3] == [1, 2, 0, 0, 1]
    assert [patch.get_width() for patch in figure.axes[4].patches] == [3, 1]
    assert len(figures.data_report({"images_per_split": {"train": 1}, "undecodable": {}}).axes) == 1
    with pytest.raises(LabError, match="nothing to draw; it needs one of images_per_split"):
        figures.data_report({})


@pytest.fixture
def report(tmp_path: Path) -> dict:
    """The check of a small folder: six pictures to train and four to validate on, two of them undecodable."""
    root = write_coco(tmp_path / "coco", {"train": 6, "val": 4})
    (root / "train2014" / "COCO_train2014_000000000001.jpg").write_bytes(b"")
    broken = root / "val2014" / "COCO_val2014_000000000008.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    return check(read_captions("coco", root), num_workers=0, progress=False)


def test_a_real_report_is_drawn_as_it_was_found(report, tmp_path):
    figure = figures.data_report(report, tmp_path / "figures" / "report.png")
    splits, captions, sizes, lengths, causes = figure.axes
    drawn = {
        label.get_text(): bar.get_height()
        for label, bar in zip(splits.get_xticklabels(), splits.patches, strict=True)
    }
    assert drawn == report["images_per_split"] == {"train": 6, "val": 4}
    assert captions.get_title("left") == "30 captions"
    assert sizes.get_title("left") == "all 48×48"
    counted, edges = np.histogram(report["caption_lengths"], np.arange(100) - 0.5)
    heights = {bar.get_x() + 0.5: bar.get_height() for bar in lengths.patches if bar.get_height()}
    assert heights == {edges[n] + 0.5: counted[n] for n in np.flatnonzero(counted)}
    assert all(tick == round(tick) for tick in lengths.get_xticks())
    assert causes.get_title("left") == "2 undecodable images"
    names = [" ".join(label.get_text().split()) for label in causes.get_yticklabels()]
    assert names == list(report["undecodable"])
    assert [bar.get_width() for bar in causes.patches] == list(report["undecodable"].values())


def test_a_large_report_stays_within_its_figure():
    report = {"images_per_split": {"train": 113_287, "restval": 30_504, "val": 5000, "test": 5000}}
    figure = figures.data_report({**report, "caption_lengths": [9] * 300_000 + [10] * 100_000})
    FigureCanvasAgg(figure).draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert min(box.x0 for box in boxes) >= 0
    assert overlaps(boxes) == []


def test_a_saved_report_gives_the_same_picture(report, tmp_path):
    figures.data_report(report, tmp_path / "found.png")
    read = load_report(save_report(report, tmp_path / "report.json"))
    figures.data_report(read, tmp_path / "read.png")
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "read.png").read_bytes()
