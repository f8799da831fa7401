"""Runs a notebook headless and exports one self-contained HTML page, progress bars as text."""

from __future__ import annotations

import argparse
import ast
import base64
import html as markup
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter

from cli import one_sentence
from errors import LabError

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def run_notebook(
    notebook: str | Path, parameters: dict[str, Any], folder: str | Path = "outputs"
) -> dict[str, Path]:
    """Execute a notebook with parameters and export what it shows.

    Args:
        parameters: replace the names in the cell tagged `parameters`.
        folder: where the executed notebook, the HTML page and a folder of its figures go.
    Returns: paths of `notebook`, `html` and `figures`.
    Raises: LabError naming the cell's error; the executed notebook is kept to look at.
    """
    notebook, folder = Path(notebook), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / notebook.name
    try:
        papermill.execute_notebook(
            str(notebook), str(executed), parameters=parameters, cwd=str(notebook.parent), progress_bar=True
        )
    except papermill.PapermillExecutionError as error:
        raise LabError(f"{notebook} failed: {error.ename}: {error.evalue}; see {executed}.") from error
    shown = widgets_as_text(nbformat.read(executed, as_version=4))
    page = executed.with_suffix(".html")
    body, _ = HTMLExporter(
        exclude_input_prompt=True, exclude_output_prompt=True, mathjax_url=""
    ).from_notebook_node(shown)
    page.write_text(without_network(body), encoding="utf-8")
    return {
        "notebook": executed,
        "html": page,
        "figures": save_figures(shown, folder / f"{notebook.stem}_figures"),
    }


def widgets_as_text(notebook: Any) -> Any:
    """The notebook with each progress bar's last state as text, and bars that were closed left out."""
    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            model = output.get("data", {}).get(WIDGET, {}).get("model_id")
            if model is None:
                kept.append(output)
            elif text := _widget_text(state, model):
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=f"{text}\n"))
        if "outputs" in cell:
            cell.outputs = kept
    notebook.metadata.pop("widgets", None)
    return notebook


def _widget_text(state: dict[str, Any], model: str) -> str:
    """What a widget and its children say, in order; empty for one that is gone."""
    values = state.get(model, {}).get("state", {})
    if "children" in values:
        parts = [_widget_text(state, child.removeprefix("IPY_MODEL_")) for child in values["children"]]
        return " ".join(part for part in parts if part)
    if "max" in values:
        share = values["value"] / (values["max"] or 1)
        return f"|{'█' * round(20 * share):<20}|"
    return markup.unescape(re.sub(r"<[^>]+>", "", str(values.get("value", "")))).strip()


def without_network(html: str) -> str:
    """The page without scripts and styles from elsewhere: it is whole where there is no network."""
    html = re.sub(r"<script[^>]+src=[\"']https?://[^>]*>\s*</script>", "", html)
    return re.sub(r"<link[^>]+href=[\"']https?://[^>]*>", "", html)


def save_figures(notebook: Any, folder: Path) -> Path:
    """Every picture a notebook shows, as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = (
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    )
    for number, picture in enumerate(pictures, start=1):
        (folder / f"{number:02d}.png").write_bytes(base64.b64decode(picture))
    return folder


def tables(notebook: Path) -> str:
    """The plain text of the outputs of the cells tagged `result`."""
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
    """Run a notebook, print its results and where everything lies."""
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
