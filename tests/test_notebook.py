"""main.ipynb from an empty folder to its last cell, and what is exported."""

import os
import re
import shutil

import nbformat
import pytest
from conftest import ROOT, SHARED

from errors import LabError
from run_notebook import run_notebook, tables, widgets_as_text, without_network


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, home)
    notebook = shutil.copy(ROOT / "main.ipynb", home)
    before = os.getcwd()
    os.chdir(home)
    try:
        return run_notebook(
            notebook, {"FAST_RUN": True, "OVERRIDES": {"use_attention_pooling": True}}, home / "outputs"
        )
    finally:
        os.chdir(before)


def test_every_cell_runs_and_says_something(made):
    cells = [c for c in nbformat.read(made["notebook"], as_version=4).cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    shown = tables(made["notebook"])
    assert "i2t_recall@1" in shown
    assert "quickstart_attn_" in shown


def test_the_page_is_whole_without_a_network(made):
    html = made["html"].read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?://", html)
    assert html.count("data:image/png;base64") >= 7
    assert len(list(made["figures"].glob("*.png"))) >= 7
    assert "application/vnd.jupyter.widget-view" not in html
    assert "text-embedding cache" in html.lower()


def test_run_again_it_reuses_what_is_finished(made):
    home = made["notebook"].parent.parent
    (weights,) = home.glob("runs/*/best.safetensors")
    stamp = weights.stat().st_mtime_ns
    before = os.getcwd()
    os.chdir(home)
    try:
        run_notebook(
            home / "main.ipynb",
            {"FAST_RUN": True, "OVERRIDES": {"use_attention_pooling": True}},
            home / "again",
        )
    finally:
        os.chdir(before)
    assert weights.stat().st_mtime_ns == stamp


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/flickr8k here")
def test_photographs_take_the_same_cells(made, tmp_path):
    home = made["notebook"].parent.parent
    os.chdir(home)
    try:
        settings = {
            "PRESET": "flickr8k",
            "FAST_RUN": True,
            "OVERRIDES": {"data_dir": str(SHARED / "flickr8k")},
        }
        photographs = run_notebook(home / "main.ipynb", settings, tmp_path)
    finally:
        os.chdir(ROOT)
    assert "i2t_recall@1" in tables(photographs["notebook"])


def test_a_failing_cell_is_named(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(LabError, match="ZeroDivisionError: division by zero; see"):
        run_notebook(tmp_path / "bad.ipynb", {}, tmp_path / "out")


def test_progress_bars_become_text():
    view = "application/vnd.jupyter.widget-view+json"
    state = {
        "box": {"state": {"children": ["IPY_MODEL_a", "IPY_MODEL_b", "IPY_MODEL_c"]}},
        "a": {"state": {"value": "captions:&nbsp;<b>100%</b>"}},
        "b": {"state": {"value": 5, "max": 10}},
        "c": {"state": {"value": " 5/10"}},
    }
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [
        nbformat.v4.new_output("display_data", data={view: {"model_id": "box"}}),
        nbformat.v4.new_output("display_data", data={view: {"model_id": "closed"}}),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    (output,) = widgets_as_text(notebook).cells[0].outputs
    assert output.text == "captions:\xa0100% |██████████          | 5/10\n"


def test_pages_lose_scripts_from_elsewhere_only():
    page = '<script src="https://x/y.js"></script><script>1</script><link href="http://x/z.css"><p>kept</p>'
    assert without_network(page) == "<script>1</script><p>kept</p>"
