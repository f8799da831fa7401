"""main.ipynb from an empty folder with nothing but itself to its last cell, and what is exported."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from small_data import ROOT, SHARED, copy_lab

from core.errors import LabError
from interface.run_notebook import WIDGET, run_notebook, tables, without_network, without_widgets


@contextmanager
def chdir(folder: Path) -> Iterator[None]:  # contextlib's own is of Python 3.11
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def git(*words: str, cwd: Path) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *who, *words], cwd=cwd, check=True, capture_output=True)


def bare_repository(folder: Path) -> str:
    """A repository of the lab as it stands here; its address."""
    tree = folder / "tree"
    copy_lab(tree)
    git("init", "--quiet", cwd=tree)
    git("add", ".", cwd=tree)
    git("commit", "--quiet", "-m", "the lab", cwd=tree)
    git("clone", "--quiet", "--bare", "tree", "lab.git", cwd=folder)
    return f"file://{folder / 'lab.git'}"


def notebook_alone(folder: Path, repository: str) -> Path:
    """main.ipynb in a folder of its own, its form filled in as a reader would."""
    folder.mkdir()
    source = (ROOT / "main.ipynb").read_text(encoding="utf-8")
    source, count = re.subn(r'REPOSITORY = \\"[^"]*\\"', lambda _: f'REPOSITORY = \\"{repository}\\"', source)
    assert count == 1
    path = folder / "main.ipynb"
    path.write_text(source, encoding="utf-8")
    return path


SETTINGS = {"FAST_RUN": True, "OVERRIDES": {"use_attention_pooling": True}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("colab")
    notebook = notebook_alone(home / "content", bare_repository(home))
    with chdir(notebook.parent):
        checkpoints = {"CHECKPOINT_DIR": str(home / "drive")}
        return run_notebook(notebook, {**SETTINGS, **checkpoints}, home / "outputs")


@pytest.fixture(scope="module")
def lab(made) -> Path:
    """The clone that the notebook made."""
    return made["notebook"].parents[2] / "content" / "lab"


def test_every_cell_runs_and_says_something(made, lab):
    assert (lab / "config.py").is_file()
    cells = [c for c in nbformat.read(made["notebook"], as_version=4).cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    shown = tables(made["notebook"])
    assert "i2t_recall@1" in shown
    assert "quickstart_attn_" in shown


def test_checkpoints_lie_where_they_were_asked_for(made, lab):
    (kept,) = {path.parent.name for path in (made["notebook"].parents[2] / "drive").glob("*/step_*.pt")}
    assert kept.startswith("quickstart_attn_")
    assert not list(lab.glob("runs/*/checkpoints/*.pt"))


def test_the_page_is_whole_without_a_network(made):
    html = made["html"].read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?://", html)
    assert html.count("data:image/png;base64") >= 7
    assert len(list(made["figures"].glob("*.png"))) >= 7
    assert WIDGET not in html
    assert "model not found" not in html
    assert "text-embedding cache" in html.lower()


def test_run_again_it_reuses_what_is_finished(made, lab, tmp_path):
    (weights,) = lab.glob("runs/*/best.safetensors")
    stamp = weights.stat().st_mtime_ns
    with chdir(lab):
        run_notebook(lab / "main.ipynb", SETTINGS, tmp_path)
    assert weights.stat().st_mtime_ns == stamp


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/flickr8k here")
def test_photographs_take_the_same_cells(lab, tmp_path):
    photographs = {"PRESET": "flickr8k", "OVERRIDES": {"data_dir": str(SHARED / "flickr8k")}}
    with chdir(lab):
        found = run_notebook(lab / "main.ipynb", {"FAST_RUN": True, **photographs}, tmp_path)
    assert "i2t_recall@1" in tables(found["notebook"])


def test_each_run_has_its_own_folder_of_figures(tmp_path):
    code = "import pandas as pd\npd.DataFrame({'value': ['runs/mine_s0', '2']}, index=['run', 'best epoch'])"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code, metadata={"tags": ["result"]})]
    )
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "lab.ipynb")
    made = run_notebook(tmp_path / "lab.ipynb", {}, tmp_path / "out")
    assert {path.parent for path in made.values()} == {tmp_path / "out" / "mine_s0"}
    assert not (tmp_path / "out" / "lab.ipynb").exists()


def test_a_failing_cell_is_named_and_tuples_arrive_as_lists(tmp_path):
    cell = nbformat.v4.new_code_cell("SPLITS = ()", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("raise ValueError(SPLITS)")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(LabError, match=r"failed: ValueError: \['val', 'test'\]; see .*bad.ipynb"):
        run_notebook(tmp_path / "bad.ipynb", {"SPLITS": ("val", "test")}, tmp_path / "out")


def test_controls_become_their_image_and_table_and_progress_bars_nothing():
    cell = nbformat.v4.new_code_cell("x")
    view, plain = {WIDGET: {"model_id": "any"}}, {"text/plain": "a control"}
    bundles = [
        {**view, **plain, "image/png": "iVBORw==", "text/html": "<table></table>"},
        {**view, "text/plain": "0%|"},
        {**plain, "text/html": "<table></table>"},
    ]
    cell.outputs = [nbformat.v4.new_output("display_data", data=data) for data in bundles]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["widgets"] = {"state": {}}
    outputs = without_widgets(notebook).cells[0].outputs
    assert [out.data for out in outputs] == [
        {"image/png": "iVBORw=="},
        {"text/html": "<table></table>"},
        bundles[2],
    ]
    assert "widgets" not in notebook.metadata


def test_pages_lose_scripts_from_elsewhere_only():
    page = '<script src="https://x/y.js"></script><script>1</script><link href="http://x/z.css"><p>kept</p>'
    assert without_network(page) == "<script>1</script><p>kept</p>"
