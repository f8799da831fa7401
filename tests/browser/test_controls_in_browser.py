"""Every control in a page: with ipywidgets 8 in JupyterLab, with ipywidgets 7 (as on Colab) in the classic notebook."""

from __future__ import annotations

import ipywidgets
import nbformat
import pytest
from browser_lab import SHOTS, LabPage, serve

pytestmark = pytest.mark.browser

MAJOR = ipywidgets.__version__.split(".")[0]
CLASSIC = MAJOR == "7"
CELL = ".code_cell" if CLASSIC else ".jp-CodeCell"
SETUP = """
import widgets
from config import make_config
from dataset import load_table, prepare_data
from evaluate import evaluate_run, open_gallery
from train import fit
SMALL = dict(fast_run=True, device="cpu", runs_dir="runs_of_controls")
CONFIG = make_config("quickstart", image_tower_mode="cached", **SMALL)
prepare_data(CONFIG)
run = fit(CONFIG, show=False)
evaluate_run(run)
gallery = open_gallery(run, "test", show=False)
pooled = fit(make_config("quickstart", use_attention_pooling=True, **SMALL), show=False)
attentive = open_gallery(pooled, "test", show=False)
"""
CONTROLS = {
    "experiment_form": "widgets.experiment_form(CONFIG)",
    "data_browser": "widgets.data_browser(load_table(CONFIG, CONFIG.train_splits))",
    "search_box": "widgets.search_box(gallery, 'a red circle')",
    "failure_explorer": "widgets.failure_explorer(gallery)",
    "zero_shot_playground": "widgets.zero_shot_playground(gallery)",
    "attention_explorer": "widgets.attention_explorer(attentive)",
    "run_browser": "widgets.run_browser('runs_of_controls')",
}


class ClassicPage(LabPage):
    """The same in the classic notebook."""

    def open(self, notebook: str) -> None:
        self.page.goto(f"{self.address}/notebooks/{notebook}")
        self.page.wait_for_function("() => window.Jupyter?.notebook?.kernel?.is_connected()")

    def run_all(self, seconds: float = 300) -> float:
        self.page.evaluate("Jupyter.notebook.execute_all_cells()")
        idle = "() => ![...document.querySelectorAll('.input_prompt')].some(prompt => /\\*/.test(prompt.textContent))"
        self.page.wait_for_function(idle, timeout=1000 * seconds)
        return 0.0


def test_every_control_shows_and_answers(browser, home):
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *CONTROLS.values())]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, home / "controls.ipynb")
    with serve(home, "notebook" if CLASSIC else "jupyterlab") as address:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        lab = (ClassicPage if CLASSIC else LabPage)(page, address)
        lab.open("controls.ipynb")
        lab.run_all(540)
        assert page.get_by_text("Traceback (most recent call last)").count() == 0
        assert page.get_by_text("Error displaying widget").count() == 0
        for number, name in enumerate(CONTROLS, start=1):
            cell = page.locator(CELL).nth(number)
            cell.locator(".jupyter-widgets").first.wait_for()
            image = cell.locator("img.widget-image:visible")
            assert name == "experiment_form" or image.evaluate("image => image.naturalWidth") > 200, name
            SHOTS.mkdir(parents=True, exist_ok=True)
            cell.screenshot(path=SHOTS / f"ipywidgets{MAJOR}_{name}.png")
        answer_and_upload(page)
        page.close()


def answer_and_upload(page) -> None:
    """Another query, then an image (a screenshot of the control): the result changes each time."""
    cell = page.locator(CELL).nth(1 + list(CONTROLS).index("search_box"))
    shot = SHOTS / f"ipywidgets{MAJOR}_search_box.png"

    def upload() -> None:
        with page.expect_file_chooser() as chooser:
            cell.get_by_role("button", name="similar to image").click()
        chooser.value.set_files(shot)

    image = cell.locator("img.widget-image")
    for act in (lambda: cell.get_by_label("search").fill("a blue square"), upload):
        before = image.get_attribute("src")
        act()
        page.wait_for_function(
            "([image, before]) => image.src !== before", arg=[image.element_handle(), before]
        )
    cell.screenshot(path=SHOTS / f"ipywidgets{MAJOR}_search_box_uploaded.png")
