"""Runs a notebook without a browser and exports one self-contained HTML page with the last state of its widgets."""

from __future__ import annotations

import argparse
import ast
import base64
import html as markup
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter

from core.errors import LabError
from core.files import atomic_path, make_folder, write_text
from interface.cli import one_sentence

WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def run_notebook(
    notebook: str | Path, parameters: dict[str, Any], folder: str | Path = "outputs"
) -> dict[str, Path]:
    """Execute a notebook with parameters and export its output.

    Args:
        parameters: replace the names in the cell tagged `parameters`.
        folder: output folder for the executed notebook, the HTML page and a folder of its figures.
    Returns: paths of `notebook`, `html` and `figures`.
    Raises: LabError with the cell's error; the executed notebook is kept for inspection.
    """
    notebook, folder = Path(notebook), make_folder(folder)
    executed = folder / notebook.name
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=_listed(parameters),
            cwd=str(notebook.parent),
            progress_bar=True,
        )
    except papermill.PapermillExecutionError as error:
        raise LabError(f"{notebook} failed: {error.ename}: {error.evalue}; see {executed}.") from error
    shown = widgets_as_shown(nbformat.read(executed, as_version=4))
    page = executed.with_suffix(".html")
    body, _ = HTMLExporter(
        exclude_input_prompt=True, exclude_output_prompt=True, mathjax_url=""
    ).from_notebook_node(shown)
    write_text(page, without_network(body))
    return {
        "notebook": executed,
        "html": page,
        "figures": save_figures(shown, folder / f"{notebook.stem}_figures"),
    }


def _listed(value: Any) -> Any:
    """A parameter with lists instead of tuples, which papermill would pass to the notebook as text."""
    if isinstance(value, dict):
        return {name: _listed(inner) for name, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def widgets_as_shown(notebook: Any) -> Any:
    """The notebook with each widget replaced by its last state as text, images and tables; closed ones are removed.

    If no state was saved, the cell keeps the output for pages without widgets.
    """
    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            model = output.get("data", {}).pop(WIDGET, {}).get("model_id")
            if model is None:
                kept.append(output)
            elif model in state:
                kept += _as_outputs(_shown(state, model))
            elif set(output["data"]) - {"text/plain"}:
                kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept
    notebook.metadata.pop("widgets", None)
    return notebook


Shown = list[Any]  # texts, and {mime type: data} of images and tables, in their order


def _shown(state: dict[str, Any], model: str) -> Shown:
    """What a widget and its children show; the texts of a row are one line."""
    values = state.get(model, {}).get("state", {})
    layout = str(values.get("layout", "")).removeprefix("IPY_MODEL_")
    if state.get(layout, {}).get("state", {}).get("display") == "none":
        return []
    if "children" not in values:
        make = LEAVES.get(values.get("_model_name", ""), _input)
        return [part for part in [make(values, state.get(model, {}))] if part]
    parts = [part for child in values["children"] for part in _shown(state, child.removeprefix("IPY_MODEL_"))]
    if values.get("_model_name") == "HBoxModel" and all(isinstance(part, str) for part in parts):
        return [" ".join(parts)] if parts else []
    return parts


def _bar(values: dict[str, Any], saved: Any) -> str:
    return f"|{'█' * round(20 * values['value'] / (values['max'] or 1)):<20}|"


def _image(values: dict[str, Any], saved: dict[str, Any]) -> dict[str, str] | None:
    data = [buffer["data"] for buffer in saved.get("buffers", []) if buffer["path"] == ["value"]]
    return {"image/png": data[0]} if data and data[0] else None


def _html(values: dict[str, Any], saved: Any) -> Any:
    value = str(values.get("value", ""))
    return {"text/html": value} if "<table" in value else _plain(value)


def _input(values: dict[str, Any], saved: Any) -> str:
    """`label: value` of an input; for a menu the selected options."""
    selected, labels = values.get("index"), values.get("_options_labels", [])
    rows = selected if isinstance(selected, (list, tuple)) else [] if selected is None else [selected]
    value = ", ".join(labels[row] for row in rows) if labels else values.get("value", "")
    text = "" if value == [] else _plain(str(value))
    label = _plain(str(values.get("description") or ""))
    return f"{label}: {text}" if label and text else text


def _plain(text: str) -> str:
    return markup.unescape(re.sub(r"<[^>]+>", "", text)).strip()


LEAVES: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "FloatProgressModel": _bar,
    "ImageModel": _image,
    "HTMLModel": _html,
}
"""How widgets without children become text or data; every other type is an input."""


def _as_outputs(parts: Shown) -> list[Any]:
    lines: list[str] = []
    outputs = []
    for part in [*parts, None]:
        if isinstance(part, str):
            lines.append(part)
            continue
        if lines:
            text = "".join(f"{line}\n" for line in lines)
            outputs.append(nbformat.v4.new_output("stream", name="stdout", text=text))
            lines = []
        if part is not None:
            outputs.append(nbformat.v4.new_output("display_data", data=part))
    return outputs


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
