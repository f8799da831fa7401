"""main.ipynb from an empty folder with nothing but itself to its last cell, and what is exported."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill.translators
import pytest
from small_data import ROOT, SHARED

from core.errors import LabError
from interface.run_notebook import _listed, run_notebook, tables, widgets_as_shown, without_network

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


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
    for pattern in ("*.py", "[!.]*/*.py", "*.ipynb", "requirements*.txt", "configs/**/*.*"):
        for path in ROOT.glob(pattern):
            target = tree / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    git("init", "--quiet", cwd=tree)
    git("add", ".", cwd=tree)
    git("commit", "--quiet", "-m", "the lab", cwd=tree)
    git("clone", "--quiet", "--bare", "tree", "lab.git", cwd=folder)
    return f"file://{folder / 'lab.git'}"


def notebook_alone(folder: Path, repository: str) -> Path:
    """main.ipynb in a folder of its own, its form filled in as a reader would."""
    folder.mkdir()
    source = (ROOT / "main.ipynb").read_text(encoding="utf-8")
    assert source.count('REPOSITORY = \\"\\"') == 1
    path = folder / "main.ipynb"
    path.write_text(
        source.replace('REPOSITORY = \\"\\"', f'REPOSITORY = \\"{repository}\\"'), encoding="utf-8"
    )
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
    return made["notebook"].parent.parent / "content" / "lab"


def test_every_cell_runs_and_says_something(made, lab):
    assert (lab / "config.py").is_file()
    cells = [c for c in nbformat.read(made["notebook"], as_version=4).cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    shown = tables(made["notebook"])
    assert "i2t_recall@1" in shown
    assert "quickstart_attn_" in shown


def test_checkpoints_lie_where_they_were_asked_for(made, lab):
    (kept,) = {path.parent.name for path in (made["notebook"].parent.parent / "drive").glob("*/step_*.pt")}
    assert kept.startswith("quickstart_attn_")
    assert not list(lab.glob("runs/*/checkpoints/*.pt"))


def test_the_page_is_whole_without_a_network(made):
    html = made["html"].read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?://", html)
    assert html.count("data:image/png;base64") >= 7
    assert len(list(made["figures"].glob("*.png"))) >= 7
    assert VIEW not in html
    assert "model not found" not in html
    assert "labels: " in html  # the playground's inputs, above its picture
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


def test_a_failing_cell_is_named(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(LabError, match="ZeroDivisionError: division by zero; see"):
        run_notebook(tmp_path / "bad.ipynb", {}, tmp_path / "out")


# --- widgets as what they last showed ---


def shown(state: dict, *outputs: dict) -> list:
    """What is left of a cell's outputs."""
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [nbformat.v4.new_output("display_data", data=dict(data)) for data in outputs]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["widgets"] = {STATE: {"state": state}}
    return widgets_as_shown(notebook).cells[0].outputs


def widget(kind: str, **values) -> dict:
    return {"state": {"_model_name": f"{kind}Model", **values}}


def test_progress_bars_become_text():
    state = {
        "box": widget("HBox", children=["IPY_MODEL_a", "IPY_MODEL_b", "IPY_MODEL_c"]),
        "a": widget("HTML", value="captions:&nbsp;<b>100%</b>"),
        "b": widget("FloatProgress", value=5, max=10),
        "c": widget("HTML", value=" 5/10"),
        "gone": widget("HBox", children=[], layout="IPY_MODEL_hidden"),
        "hidden": widget("Layout", display="none"),
    }
    (output,) = shown(
        state, {VIEW: {"model_id": "box"}}, {VIEW: {"model_id": "gone"}}, {VIEW: {"model_id": "?"}}
    )
    assert output.text == "captions:\xa0100% |██████████          | 5/10\n"


def test_a_control_becomes_its_inputs_its_picture_and_its_table():
    state = {
        "all": widget("VBox", children=[f"IPY_MODEL_{name}" for name in ("row", "say", "png", "empty", "table")]),
        "row": widget("HBox", children=["IPY_MODEL_text", "IPY_MODEL_menu", "IPY_MODEL_several", "IPY_MODEL_file"]),
        "text": widget("Text", description="search", value="a dog & a cat"),
        "menu": widget("Dropdown", description="show", _options_labels=["one", "two"], index=1),
        "several": widget("SelectMultiple", description="runs", _options_labels=["x", "y", "z"], index=[0, 2]),
        "file": widget("FileUpload", description="upload", value=[]),
        "say": widget("HTML", value="<b>write something.</b>"),
        "png": {**widget("Image"), "buffers": [{"path": ["value"], "data": "iVBORw==", "encoding": "base64"}]},
        "empty": widget("Image"),
        "table": widget("HTML", value="<table><tr><td>1</td></tr></table>"),
    }  # fmt: skip
    words, picture, table = shown(state, {VIEW: {"model_id": "all"}, "image/png": "older"})
    assert words.text == "search: a dog & a cat show: two runs: x, z\nwrite something.\n"
    assert picture.data == {"image/png": "iVBORw=="}
    assert table.data == {"text/html": "<table><tr><td>1</td></tr></table>"}


def test_without_a_saved_state_the_fallback_stays():
    (output,) = shown({}, {VIEW: {"model_id": "gone"}, "image/png": "iVBORw==", "text/plain": "x"})
    assert output.data == {"image/png": "iVBORw==", "text/plain": "x"}


def test_pages_lose_scripts_from_elsewhere_only():
    page = '<script src="https://x/y.js"></script><script>1</script><link href="http://x/z.css"><p>kept</p>'
    assert without_network(page) == "<script>1</script><p>kept</p>"


def test_tuples_arrive_in_a_notebook_as_lists():
    given = {"OVERRIDES": {"test_splits": ("val", "test"), "recall_ks": [(1,)], "seed": 3}}
    told = papermill.translators.PythonTranslator.codify(_listed(given), "")
    values: dict = {}
    exec(told, values)
    assert values["OVERRIDES"] == {"test_splits": ["val", "test"], "recall_ks": [[1]], "seed": 3}
