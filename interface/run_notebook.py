"""Runs a notebook without a browser and exports one self-contained HTML page."""

from __future__ import annotations

import argparse
import ast
import base64
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter

from core.errors import LabError
from core.files import atomic_path, make_folder, write_text
from interface.cli import one_sentence

WIDGET = "application/vnd.jupyter.widget-view+json"


def run_notebook(
    notebook: str | Path, parameters: dict[str, Any], folder: str | Path = "outputs"
) -> dict[str, Path]:
    """Execute a notebook with parameters and export its output.

    Args:
        parameters: replace the names in the cell tagged `parameters`.
        folder: output folder for the executed notebook, the HTML page and a folder of its figures; below it they
            are in a folder of the run's name, if the notebook's result names a run.
    Returns: paths of `notebook`, `html` and `figures`.
    Raises: LabError with the cell's error; the executed notebook is kept for inspection.
    """
    notebook, folder = Path(notebook), make_folder(folder)
    executed = folder / notebook.name
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=json.loads(json.dumps(parameters)),  # papermill passes a tuple on as text
            cwd=str(notebook.parent),
            progress_bar=True,
        )
    except papermill.PapermillExecutionError as error:
        raise LabError(f"{notebook} failed: {error.ename}: {error.evalue}; see {executed}.") from error
    if run := re.search(r"^run +(?:\S*[/\\])?([\w-]+) *$", tables(executed), re.MULTILINE):
        folder = make_folder(folder / run[1])
        executed = executed.replace(folder / notebook.name)
    static = without_widgets(nbformat.read(executed, as_version=4))
    page = executed.with_suffix(".html")
    body, _ = HTMLExporter(
        exclude_input_prompt=True, exclude_output_prompt=True, mathjax_url=""
    ).from_notebook_node(static)
    write_text(page, without_network(body))
    return {
        "notebook": executed,
        "html": page,
        "figures": save_figures(static, folder / f"{notebook.stem}_figures"),
    }


def without_widgets(notebook: Any) -> Any:
    """The notebook with each control replaced by the image and the table of its fallback; progress bars are removed."""
    for cell in notebook.cells:
        outputs = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            parts = [{kind: data[kind]} for kind in ("image/png", "text/html") if kind in data]
            in_parts = [nbformat.v4.new_output("display_data", data=part) for part in parts]
            outputs += in_parts if WIDGET in data else [output]
        if "outputs" in cell:
            cell.outputs = outputs
    notebook.metadata.pop("widgets", None)
    return notebook


def without_network(html: str) -> str:
    """The page without scripts and styles from other servers, so that it works without a network."""
    html = re.sub(r"<script[^>]+src=[\"']https?://[^>]*>\s*</script>", "", html)
    return re.sub(r"<link[^>]+href=[\"']https?://[^>]*>", "", html)


def save_figures(notebook: Any, folder: Path) -> Path:
    """Save all images in a notebook's output as numbered PNG files."""
    make_folder(folder)
    for old in folder.glob("*.png"):
        old.unlink()
    images = (
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    )
    for number, image in enumerate(images, start=1):
        with atomic_path(folder / f"{number:02d}.png") as beside:
            beside.write_bytes(base64.b64decode(image))
    return folder


def tables(notebook: Path) -> str:
    """The text of the tables in cells tagged `result`."""
    texts = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "result" in cell.metadata.get("tags", []):
            texts += [o["data"]["text/plain"] for o in cell.outputs if "text/html" in o.get("data", {})]
    return "\n\n".join(texts)


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise LabError(f"-p takes NAME=VALUE, not {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> None:
    """Run a notebook, print its result tables and the output paths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", nargs="?", default="main.ipynb")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--folder", default="outputs")
    given = parser.parse_args()
    with one_sentence():
        made = run_notebook(given.notebook, dict(_parameter(text) for text in given.parameter), given.folder)
    print(tables(made["notebook"]))
    for what, path in made.items():
        print(f"{what:9} {path}")


if __name__ == "__main__":
    main()
