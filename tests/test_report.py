"""The page to hand in: whole without a network, and complete; the comparison's page; copies in other forms."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
from evaluated import config_of, write_home, write_run
from PIL import Image

import evaluate
from core.errors import LabError
from evaluate import measure_run
from interface import cli
from reports import report
from reports.report import FOLD_ROWS, Page, markdown_table, save_table

VOID = {"meta", "img", "br", "link"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.images = [], [], []

    def handle_starttag(self, tag, attrs):
        self.images += [dict(attrs)["src"]] if tag == "img" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(path):
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    return page


# --- the page ---


def test_a_page_is_whole_and_escaped(tmp_path):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "red.png")
    page = Page("A <page>")
    page.heading("Figures & tables")
    page.table(pd.DataFrame({"name": ["a<b"], "value": [1234567]}, index=pd.Index([1], name="row")), "told")
    page.figure(tmp_path / "red.png", 'a "red" picture')
    found = parsed(page.save(tmp_path / "page.html"))
    text = " ".join(found.texts)
    assert "A <page>" in text
    assert "a<b" in text
    assert "1,234,567" in text
    assert base64.b64decode(found.images[0].partition(",")[2]) == (tmp_path / "red.png").read_bytes()
    source = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|<script|<link", source)
    assert "prefers-color-scheme: dark" in source
    assert '<a href="#part1">Figures &amp; tables</a>' in source


def test_numbers_are_aligned_to_the_right_and_long_tables_are_folded(tmp_path):
    page = Page("t")
    cells = {"a": ["1.0 [0.5, 1.5]", "2.0 ± 0.1"], "b": ["x", "3"]}
    page.table(pd.DataFrame(cells, index=pd.Index([0, 1], name="n")))
    page.table(pd.DataFrame({"a": ["<b>"] * (FOLD_ROWS + 1)}), "many")
    parsed(page.save(tmp_path / "page.html"))
    short, folded = (tmp_path / "page.html").read_text().split("<details>")
    assert short.count('class="number"') == 6  # n and a, with their headers
    assert folded.startswith("<summary>many 21 rows.</summary>")
    assert folded.count("<td>&lt;b&gt;</td>") == FOLD_ROWS + 1


def test_markdown_and_csv_hold_the_table(tmp_path):
    table = pd.DataFrame({"a|b": ["x|y", "two\nlines"], "n": [1.5, float("nan")]}, index=["r", "s"])
    assert markdown_table(table) == (
        "|  | a\\|b | n |\n| --- | --- | --- |\n| r | x\\|y | 1.5 |\n| s | two lines |  |\n"
    )
    csv, markdown = save_table(table, tmp_path / "t")
    assert pd.read_csv(csv, index_col=0)["n"].iloc[0] == 1.5
    assert markdown.read_text() == markdown_table(table)


# --- a run's report ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def run(home):
    broken = sorted((home / "scenes" / "test2014").iterdir())[0]
    broken.write_bytes(b"")
    return write_run(config_of(home, test_splits=("test",)), torch="2.0")


def test_a_report_names_the_data_that_was_read(home, tmp_path):
    (tmp_path / "my_holiday").mkdir()
    config = config_of(home, data_dir=tmp_path / "my_holiday", reader="sidecar", source="flickr8k")
    data = {
        "train": {
            "splits": "train",
            "images": 8,
            "captions": 8,
            "split_source": "drawn by image, split_seed 0",
        }
    }
    run = SimpleNamespace(
        config=config, training={"data": data}, history=pd.DataFrame({"epoch": [1]}), best_epoch=1
    )
    table = report.facts(run)["value"]
    assert table["data"] == "my_holiday, reader sidecar"
    assert table["split"] == "drawn by image, split_seed 0"


def test_a_report_says_what_was_trained_and_what_was_left_out(run, tmp_path, capsys):
    cli.evaluate([str(run.folder), "--output_file", str(tmp_path / "copy.html")])
    assert "report.html" in capsys.readouterr().out
    page = parsed(run.folder / "report.html")
    text = " ".join(page.texts)
    for told in ("train: 8 images, 40 captions", "12 min 30 s", "a machine", "torch", "test2014/COCO_test2014",
                 "empty file", "19", "full", "embed_dim", "2 of 2, epoch 2 kept"):  # fmt: skip
        assert told in text, told
    assert len(page.images) == 2
    assert (tmp_path / "copy.html").read_bytes() == (run.folder / "report.html").read_bytes()
    left_out = pd.read_csv(run.folder / "tables" / "left_out.csv")
    assert left_out["cause"].tolist() == ["empty file"]
    results = pd.read_csv(run.folder / "tables" / "results.csv")
    assert results["images"].tolist() == [19, 19]
    assert (run.folder / "tables" / "results.md").read_text().startswith("| split | protocol | images |")


def test_a_comprehensive_report_shows_everything_that_fits(run):
    evaluate.report_run(run, comprehensive=True, show=False)
    figures = {path.name for path in (run.folder / "figures").iterdir()}
    names = "recall_by_gallery_size_i2t ranks failures similarity map_pca map_tsne recall confusion_shapes"
    assert {f"{name}_test.png" for name in names.split()} <= figures
    tables = {path.stem for path in (run.folder / "tables").glob("*.csv")}
    assert {
        "protocols_test",
        "every_figure_test",
        "geometry_test",
        "zero_shot_test",
        "classes_shapes_test",
    } <= tables
    page = parsed(run.folder / "report.html")
    assert len(page.images) == len(figures)
    assert "attention is not shown" in " ".join(page.texts)
    assert "one_caption" in " ".join(page.texts)


def test_labelled_folders_take_no_splits_place_and_not_each_others(run, tmp_path):
    for folder in ("first/test", "second/test"):
        for name, colour in (("car", (200, 0, 0)), ("boat", (0, 0, 200))):
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("RGB", (40, 30), colour).save(tmp_path / folder / name / "1.png")
    given = [tmp_path / "first" / "test", tmp_path / "second" / "test", tmp_path / "second" / "test"]
    evaluate.report_run(run, labelled=given, show=False)
    tables = {path.name for path in (run.folder / "tables").glob("zero_shot_*_test.csv")}
    assert tables == {"zero_shot_first_test.csv", "zero_shot_second_test.csv"}
    assert (run.folder / "figures" / "confusion_second_test_second_test.png").is_file()


@pytest.mark.parametrize("ending", ["json", "csv", "md"])
def test_copies_hold_the_results(run, tmp_path, ending):
    path = tmp_path / f"out.{ending}"
    evaluate.report_run(run, output_file=path, show=False)
    content = path.read_text()
    assert json.loads(content) == run.metrics if ending == "json" else "i2t_recall@1" in content


def test_another_ending_is_refused_before_anything_is_done(run):
    with pytest.raises(LabError, match=r"output_file ending '.pdf' does not exist"):
        evaluate.report_run(run, output_file="report.pdf")


@pytest.mark.parametrize(("seconds", "told"), [(97.2, "97 s"), (750, "12 min 30 s"), (7500, "2 h 5 min")])
def test_durations_are_readable(seconds, told):
    assert report.duration(seconds) == told


def test_a_comparison_has_its_own_page(home, run, tmp_path, capsys):
    other = write_run(config_of(home, test_splits=("test",), use_batch_norm=True))
    unfinished = write_run(config_of(home, seed=5), finished=False)
    folders = [str(one.folder) for one in (run, other, unfinished)]
    cli.evaluate(["compare", *folders, "--folder", str(tmp_path / "all"), "--baseline", other.name])
    shown = capsys.readouterr().out
    assert f"{unfinished.folder} is left out: its training is not finished." in shown
    assert "test images only" in shown
    page = parsed(tmp_path / "all" / "report.html")
    assert len(page.images) == 2
    assert "use_batch_norm" in " ".join(page.texts)
    table = pd.read_csv(tmp_path / "all" / "comparison.csv", index_col=0)
    assert table["i2t_recall@1_verdict"].iloc[1] == "baseline"
    assert table["i2t_recall@1"].iloc[0] == pytest.approx(measure_run(run)["test"]["i2t_recall@1"])


def test_one_broken_run_does_not_stop_a_comparison(home, run, tmp_path, capsys):
    broken = write_run(config_of(home, seed=6))
    (broken.folder / "config.yaml").write_text("batch_size: [")
    no_split = write_run(config_of(home, seed=7, test_splits=()))
    folders = [str(one.folder) for one in (broken, no_split, run)]
    cli.evaluate(["compare", *folders, "--folder", str(tmp_path / "all")])
    shown = capsys.readouterr().out
    assert f"{broken.folder} is left out: " in shown
    assert f"{no_split.name} is left out: {no_split.name} has no test split; set test_splits" in shown
    assert len(pd.read_csv(tmp_path / "all" / "comparison.csv")) == 1
    names = [one.name for one in evaluate.finished_runs(home / "runs")]
    assert broken.name not in names
    assert run.name in names
    with pytest.raises(LabError, match="has no test split"):
        evaluate.report_comparison([no_split], tmp_path / "none", show=False)


def test_a_run_without_a_test_split_has_its_report(home, capsys):
    run = write_run(config_of(home, seed=8, test_splits=()))
    cli.evaluate([str(run.folder), "--comprehensive"])
    assert "There is no test split, so nothing was measured" in " ".join(
        parsed(run.folder / "report.html").texts
    )
    assert len(pd.read_csv(run.folder / "tables" / "results.csv")) == 0
    with pytest.raises(SystemExit, match=f"error: {run.name} has no test split"):
        cli.evaluate(["search", str(run.folder), "a dog"])


@pytest.mark.parametrize("table", [pd.DataFrame(), pd.DataFrame(columns=["a"]), pd.DataFrame(index=["x"])])
def test_a_table_without_rows_or_columns_is_shown(table, tmp_path):
    page = Page("nothing")
    page.table(table, "nothing")
    assert "nothing" in parsed(page.save(tmp_path / "page.html")).texts
    assert all(path.is_file() for path in save_table(table, tmp_path / "nothing"))


def test_no_spreadsheet_runs_what_a_table_holds(tmp_path):
    texts = ["=HYPERLINK(1)", "+1+1", "-1-1", "@SUM(A1)", "a = b", "-0.5", "+3.1 ± 0.2", "−"]
    csv, _ = save_table(
        pd.DataFrame({"=name": texts, "n": range(8)}, index=["-x", *"bcdefgh"]), tmp_path / "t"
    )
    read = pd.read_csv(csv, index_col=0)
    assert read["'=name"].tolist() == [f"'{text}" for text in texts[:4]] + texts[4:]
    assert read.index[0] == "'-x"
    assert read["n"].tolist() == list(range(8))
