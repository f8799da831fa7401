"""Every control without a browser: the plain call, the input that changes it, and the sentence where it cannot."""

import asyncio
import base64
import io
import json
import types

import ipywidgets
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import widgets
from config import Config, choices, make_config
from core.errors import LabError
from dataset import load_table
from evaluate import evaluate_run, open_gallery
from interface import controls
from interface.controls import WIDGET_VIEW, Control, after_pause
from reports.search import GallerySearch
from reports.sections import failure_figure, worst_captions
from sources.check import check
from sources.drawing import write_scenes
from train import fit
from utils import load_run
from widgets import Interrupted, LiveView


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    write_scenes(root / "scenes", num_train=40, num_val=12, num_test=20, num_novel=12)
    return root


def config_of(home, **settings):
    return make_config(
        "quickstart", data_dir=home / "scenes", cache_dir=home / "cache", runs_dir=home / "runs", device="cpu",
        image_tower_mode="cached", image_size=64, batch_size=16, **{"num_epochs": 2, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(home):
    return fit(config_of(home), show=False)


@pytest.fixture(scope="module")
def gallery(run):
    return open_gallery(run, "test", show=False)


def picture_of(control) -> Image.Image:
    return Image.open(io.BytesIO(control.image.value))


# --- what all controls share ---


def double(number: int) -> pd.DataFrame:
    if number < 0:
        raise LabError("number is negative; give one from 0.")
    return pd.DataFrame({"twice": [2 * number]})


def test_a_control_is_its_function_of_its_inputs():
    control = Control(double, number=ipywidgets.IntText(3))
    assert control.result["twice"].tolist() == [6]
    control.inputs["number"].value = 5
    assert control.result["twice"].tolist() == [10]
    assert control.set(number=7)["twice"].tolist() == [14]
    assert "14" in control.table.value


def test_a_control_says_what_is_wrong_and_keeps_its_result():
    control = Control(double, number=ipywidgets.IntText(3))
    control.inputs["number"].value = -1
    assert "number is negative; give one from 0." in control.message.value
    assert control.result["twice"].tolist() == [6]
    control.inputs["number"].value = 1
    assert control.message.value == ""
    with pytest.raises(LabError, match="number is negative"):
        control.set(number=-1)


def test_a_page_without_widgets_shows_the_result():
    bundle = Control(double, number=ipywidgets.IntText(3)).bundle()
    assert "<table" in bundle["text/html"]
    assert WIDGET_VIEW in bundle
    json.dumps(bundle)


def test_a_cell_publishes_what_colab_adds_its_metadata_to(monkeypatch):
    published = []
    monkeypatch.setattr(controls, "display", lambda data, raw: published.append((data, raw)))
    control, form = Control(double, number=ipywidgets.IntText(3)), controls.ExperimentForm(make_config())
    for shown in (control, form):
        shown._ipython_display_()
    assert [(data[WIDGET_VIEW]["model_id"], raw) for data, raw in published] == [
        (control.widget.model_id, True),
        (form.widget.model_id, True),
    ]


def test_an_upload_is_read_in_the_form_of_both_versions():
    file = {"content": memoryview(b"pixels")}
    assert controls.uploaded({"a.png": file}) == controls.uploaded(({"content": b"first"}, file)) == b"pixels"
    assert controls.uploaded({}) is controls.uploaded(()) is None
    assert controls.uploaded(ipywidgets.FileUpload().value) is None


def test_typing_is_waited_for():
    async def type_quickly() -> list[str]:
        heard = []
        ask = after_pause(lambda: heard.append("asked"), seconds=0.02)
        for _ in range(5):
            ask()
            await asyncio.sleep(0.002)
        assert heard == []
        await asyncio.sleep(0.05)
        return heard

    assert asyncio.run(type_quickly()) == ["asked"]


# --- the form ---


def test_the_form_is_the_configuration():
    groups = controls.field_groups()
    assert list(groups) == [name for name in Config.model_fields if name not in ("preset", "settings_file")]
    assert groups["use_batch_norm"] == "flags"
    assert groups["queue_size"] == "loss"
    assert all(group and controls.help_of(name) for name, group in groups.items())
    assert choices("loss")[:2] == ("infonce", "sigmoid")
    assert choices("precision") == ("auto", "fp32", "bf16", "fp16")
    kinds = {name: type(controls.make_input(name, Config()[name])) for name in groups}
    assert kinds["use_batch_norm"] is ipywidgets.Checkbox
    assert kinds["batch_size"] is ipywidgets.IntText
    assert kinds["learning_rate"] is ipywidgets.FloatText
    assert kinds["image_tower"] is ipywidgets.Dropdown
    assert kinds["max_samples"] is ipywidgets.Text


def test_every_field_takes_its_own_value_back():
    config = make_config("quickstart")
    before = config.model_dump()
    made = widgets.experiment_form(config)
    made.group.value = controls.EVERY
    assert made.visible() == [name for name in Config.model_fields if name not in ("preset", "settings_file")]
    for name, row in made.rows.items():
        assert made.enter(name, row.input.value), made.message.value
    assert config.model_dump() == before


def test_a_change_in_the_form_is_one_in_the_configuration():
    config = make_config("quickstart")
    made = widgets.experiment_form(config)
    made.rows["use_batch_norm"].input.value = True
    assert config.use_batch_norm is True
    assert "quickstart_bn_s0" in made.summary.value
    assert "●" in made.rows["use_batch_norm"].name.value
    assert made.differences().loc["use_batch_norm"].tolist() == ["True", "False"]
    made.group.value = "optimization"
    for text, value in [("3", 3), ("", None)]:
        made.rows["patience"].input.value = text
        assert config.patience == value
    made.group.value = "evaluation (not part of a run's name)"
    made.rows["recall_ks"].input.value = "1, 3"
    assert config.recall_ks == (1, 3)
    made.group.value = controls.CHANGED
    assert made.visible() == ["use_batch_norm", "recall_ks"]


def test_a_wrong_value_is_explained_and_the_old_one_kept():
    config = make_config("quickstart")
    made = widgets.experiment_form(config)
    made.group.value = "optimization"
    made.rows["batch_size"].input.value = 0
    assert config.batch_size == 32
    assert made.rows["batch_size"].input.value == 32
    assert "configuration field &#x27;batch_size&#x27; takes int" in made.message.value
    assert not made.enter("bach_size", 3)
    assert "did you mean &#x27;batch_size&#x27;?" in made.message.value


def test_words_find_a_field_and_another_preset_keeps_the_places(tmp_path):
    config = make_config("quickstart", runs_dir=tmp_path, seed=3)
    made = widgets.experiment_form(config)
    made.find.value = "temperature clamped"
    assert made.visible() == ["learn_temperature"]
    made.preset.value = "flickr8k"
    assert config == make_config("flickr8k", runs_dir=tmp_path, seed=3)


# --- explorers ---


def test_search_is_the_exact_ranking(gallery):
    control = widgets.search_box(gallery, "a red circle", k=4)
    assert isinstance(control.result, Figure)
    assert picture_of(control).width > 800
    first = control.image.value
    control.inputs["query"].value = "a blue square"
    assert control.image.value != first
    control.inputs["query"].value = " ; "
    assert "describe the image" in control.message.value


def test_search_takes_words_away_and_adds_a_picture(gallery):
    search = GallerySearch(gallery)
    path = gallery.dataset.image_files([2])[0]
    plain = widgets.search_figure(search, "a red circle", k=3)
    without = widgets.search_figure(search, "a red circle", minus="a circle", k=3)
    like = widgets.search_figure(search, "", k=3, image=path)
    num_images = [sum(bool(axes.images) for axes in figure.axes) for figure in (plain, without, like)]
    assert num_images == [3, 3, 4]  # the image of the query comes before its results


def test_zero_shot_follows_labels_and_an_upload(gallery):
    control = widgets.zero_shot_playground(gallery, "a red circle; a blue square")
    before = control.image.value
    path = gallery.dataset.image_files([int(control.inputs["item"].value)])[0]
    same = control.function(item=0, upload=[{"content": memoryview(path.read_bytes())}],
                            labels="a red circle; a blue square", templates="a photo of {}.")  # fmt: skip
    assert isinstance(same, Figure)
    control.inputs["labels"].value = "a star; a cross; a ring"
    assert control.image.value != before
    control.inputs["templates"].value = "no place for it"
    assert "needs {}" in control.message.value


def test_failures_begin_with_the_worst(gallery):
    ranks = gallery.ranks.t2i
    worst = worst_captions(ranks)
    assert ranks.best[worst[0]] == ranks.best.max()
    assert len(set(ranks.image_id[worst])) == len(worst)  # one a picture
    expected = {int(i) for i in ranks.image_id[ranks.best > 1]}
    assert {int(i) for i in ranks.image_id[worst]} == expected
    figure = failure_figure(gallery, first=0, count=1)
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any(f"rank {ranks.best.max()} of 20" in text for text in texts)
    caption = gallery.captions[int(ranks.rows[worst[0]])]
    assert any(caption.split()[0] in text for text in texts)
    with pytest.raises(LabError, match="no failure to show"):
        failure_figure(gallery, first=10**6)


def test_attention_needs_its_pooling(gallery):
    control = widgets.attention_explorer(gallery)
    assert "use_attention_pooling" in control.message.value


# --- browsers ---


def test_runs_are_compared_with_a_baseline(home, run):
    other = fit(config_of(home, seed=1), show=False)
    for measured in (run, other):
        evaluate_run(measured, show=False)
    unmeasured = fit(config_of(home, seed=2, num_epochs=1), show=False)
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")}
    control = widgets.run_browser(home / "runs", run.name)
    figure, table = control.result
    assert list(table.index) == sorted([run.name, other.name, unmeasured.name])
    assert table.loc[unmeasured.name, "note"] == "not evaluated"
    assert before == {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")}
    assert len(figure.axes) == 3
    assert table.loc[run.name, "points over baseline, i2t"] == "baseline"
    gap = 100 * (
        load_run(other.folder).metrics["test"]["i2t_recall@1"]
        - load_run(run.folder).metrics["test"]["i2t_recall@1"]
    )
    assert table.loc[other.name, "points over baseline, i2t"].startswith(f"{gap:+.1f} [")
    control.inputs["names"].value = ()
    assert "choose at least one run" in control.message.value


def test_no_run_no_browser(tmp_path):
    with pytest.raises(LabError, match="contains no finished run; train one first"):
        widgets.run_browser(tmp_path)


def test_captions_are_filtered(home):
    table = load_table(config_of(home), ("train",))
    rows = widgets.find_rows(table, "RED circle")
    assert rows == [
        row for row in range(len(table))
        if any("red" in text.lower() and "circle" in text.lower() for text in table.captions_of(row))
    ]  # fmt: skip
    control = widgets.data_browser(table)
    control.inputs["words"].value = "red circle"
    assert control.result[1]["images found"].tolist() == [len(rows)]
    control.inputs["words"].value = "zebra"
    assert "no caption contains" in control.message.value


def test_flags_are_what_the_check_found(home, tmp_path):
    table = load_table(config_of(home), ("train",))
    report = check(table, num_workers=0, progress=False)
    report["bad_images"] = {table.paths[0]: "not a picture"}
    flags = widgets.check_flags(report)
    assert flags.loc[table.paths[0], "detail"] == "not a picture"
    _, about = widgets.browse_figure(table, "", bad=report["bad_images"])
    assert about["images found"].tolist() == [len(table) - 1]
    control = widgets.data_browser(table, report)
    control.inputs["show"].value = widgets.FLAGS
    assert control.result.index.tolist() == [table.paths[0]]
    assert widgets.check_flags(report, "no such word").empty


# --- the training view ---


class Page:
    """Stands for a page: what was displayed, and what was put in its place."""

    def __init__(self, monkeypatch):
        self.shown, self.updates = [], []
        monkeypatch.setattr("widgets.display", self.display)

    def display(self, part, display_id):
        self.shown.append(part)
        return types.SimpleNamespace(update=self.updates.append)


def history_of(epochs: int) -> pd.DataFrame:
    return pd.DataFrame({"epoch": np.arange(1.0, epochs + 1), "train_loss": 2.0, "val_loss": 1.5,
                         "i2t_recall@1": 0.25, "t2i_recall@1": 0.2, "learning_rate": 1e-3,
                         "temperature": 0.07, "images_per_second": 1234.0, "train_seconds": 60.0})  # fmt: skip


def test_a_long_run_leaves_one_figure_and_one_line(monkeypatch):
    page, clock = Page(monkeypatch), iter(range(0, 10**6, 5))
    monkeypatch.setattr("widgets.time.monotonic", lambda: next(clock))
    view = LiveView("a run", num_epochs=6)
    for epochs in range(1, 7):
        view(history_of(epochs))
    assert [type(part).__name__ for part in page.shown] == ["LabFigure", "DataFrame"]
    assert len(page.updates) == 2 * 5
    line = page.updates[-1].iloc[0]
    assert line["epoch"] == "6 of 6"
    assert line["image-to-text Recall@1"] == "25.0%"
    assert line["training left"] == "0:00:00"
    assert view.status(history_of(2)).iloc[0]["training left"] == "0:04:00"
    assert line["images per second"] == "1,234"


def test_quick_epochs_are_drawn_now_and_then_and_the_last_always(monkeypatch):
    page = Page(monkeypatch)
    monkeypatch.setattr("widgets.time.monotonic", lambda: 0.0)
    view = LiveView("a run", num_epochs=5)
    for epochs in range(1, 6):
        view(history_of(epochs))
    assert len(page.shown) == 2
    assert [part.iloc[0]["epoch"] for part in page.updates[1::2]] == ["5 of 5"]


def test_a_cell_run_again_begins_where_the_run_is(monkeypatch, run, home):
    page = Page(monkeypatch)
    view = widgets.live_training(config_of(home), chance=0.05)
    assert page.shown[1].iloc[0]["epoch"] == "2 of 2"
    view.finish(run)
    assert len(page.shown) == 2
    run_half = types.SimpleNamespace(history=history_of(1), finished=False, config=run.config, best_epoch=1)
    with pytest.raises(Interrupted, match="after 1 of 2 epochs; run this cell again to continue") as stopped:
        view.finish(run_half)
    assert stopped.value._render_traceback_() == [f"Interrupted: {stopped.value}"]


def test_the_picture_in_the_bundle_is_a_picture(gallery):
    bundle = widgets.failure_explorer(gallery).bundle()
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).format == "PNG"
