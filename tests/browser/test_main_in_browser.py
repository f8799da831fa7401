"""main.ipynb in JupyterLab, as a hand uses it: run all, change, search, classify, compare, interrupt, reload."""

from __future__ import annotations

import pandas as pd
import pytest

pytestmark = pytest.mark.browser

FORM, SEARCH, ZERO_SHOT = "experiment_form", "widgets.search_box", "widgets.zero_shot_playground"
TRAIN, RUNS, DATA = "fit(CONFIG", "widgets.run_browser", "widgets.data_browser"


def test_main_as_an_instrument(open_lab, home):
    lab = open_lab()
    lab.open("main.ipynb")
    seconds = lab.run_all()
    print(f"\nmain.ipynb, quick, from click to last output: {seconds:.0f} s")
    lab.save("main")
    assert lab.errors() == []
    assert lab.not_run() == 0

    search_in_words(lab)
    classify(lab)
    filter_captions(lab)

    size = lab.reload(home, "main.ipynb")
    if lab.errors():  # a busy kernel may name its widgets too late; loading again asks again
        lab.page.reload()
        lab.wait_idle()
    print(f"saved: {size / 1e6:.1f} MB")
    assert lab.errors() == []
    search_in_words(lab, "a green square", "reloaded")

    change_a_flag(lab)
    interrupt_and_continue(lab, home)
    compare(lab)
    lab.menu("Settings", "Theme", "JupyterLab Dark")
    lab.save("dark")


def search_in_words(lab, words="a red circle", name="search"):
    before = lab.picture(SEARCH)
    lab.cell(SEARCH).get_by_label("search").fill(words)
    lab.wait_new_picture(SEARCH, before)
    lab.save(name, SEARCH)


def classify(lab):
    before = lab.picture(ZERO_SHOT)
    lab.cell(ZERO_SHOT).get_by_label("labels").fill("a red circle; a blue square; nothing at all")
    lab.wait_new_picture(ZERO_SHOT, before)
    lab.save("classify", ZERO_SHOT)
    lab.cell(ZERO_SHOT).get_by_label("labels").fill("one label")
    lab.cell(ZERO_SHOT).get_by_text("zero-shot labels must be at least two").wait_for()


def filter_captions(lab):
    lab.cell(DATA).get_by_label("captions containing").fill("red circle")
    lab.cell(DATA).locator("th:text-is('red circle')").wait_for()
    lab.save("captions", DATA)


def compare(lab):
    lab.run_cell(RUNS)
    lab.wait_idle()
    rows = lab.cell(RUNS).locator("tbody tr")
    assert rows.count() == 2
    told = " ".join(rows.all_inner_texts())
    assert "baseline" in told
    assert "another gallery" not in told
    lab.save("compare", RUNS)


def change_a_flag(lab):
    form = lab.cell(FORM)
    form.get_by_label("show").select_option("flags")
    form.locator("input[type=checkbox]").first.check()
    form.get_by_text("quickstart_bn_").wait_for()
    form.get_by_label("show").select_option("optimization")
    epochs = form.locator("input[type=number]").first
    epochs.fill("0")
    epochs.press("Enter")
    form.get_by_text("configuration field 'num_epochs' takes int").wait_for()
    epochs.fill("6")
    epochs.press("Enter")
    lab.save("form", FORM)


def interrupt_and_continue(lab, home):
    lab.run_cell(TRAIN)
    cell = lab.cell(TRAIN)
    cell.get_by_text("1 of 6", exact=True).wait_for(timeout=120_000)
    lab.page.click("[data-command='notebook:interrupt-kernel'], [title^='Interrupt the kernel']")
    cell.get_by_text("run this cell again to continue").wait_for(timeout=60_000)
    lab.save("interrupted", TRAIN)
    lab.wait_idle()
    (path,) = home.glob("runs/quickstart_bn_*/history.csv")
    before = pd.read_csv(path)
    assert 1 <= len(before) < 6
    lab.run_cell(TRAIN)
    cell.get_by_text("6 of 6", exact=True).wait_for(timeout=120_000)
    lab.wait_idle()
    lab.save("continued", TRAIN)
    pd.testing.assert_frame_equal(pd.read_csv(path).head(len(before)), before)
    assert cell.locator("img").count() == 1  # one figure, however often it was drawn
