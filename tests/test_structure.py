"""The house's rules: imports point downwards, notebooks are stripped and only call."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    "distributed errors presets",
    "files",
    "augment compat data_folder downloads geometry heads pictures ranks scene_plan tensor_files tower_parts",
    "archives captions colab config hub identity metrics plots_style scenes transformer",
    "cli controls effects losses plots plots_data plots_features plots_ranks plots_tuning studies",
    "cache image_towers plots_demo run_notebook sources table_builder text_towers uncertainty",
    "caption_cache data_check image_store pair_ranks preencoded search towers",
    "image_cache mining models readers",
    "dataset export_clip optimisation runs watch",
    "export_model negatives training_set",
    "encode engine export pairs_data",
    "paired_data utils",
    "live open_data",
    "gallery trainer",
    "comparison queries",
    "paired_evaluation zero_shot",
    "looking_inside retrieval_evaluation",
    "explorers run_report",
    "evaluate train widgets",
    "tune",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
NOTEBOOKS = [ROOT / "main.ipynb", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    assert name in FLOOR, f"give {name} a floor"
    upwards = [other for other in imported(ROOT / f"{name}.py") if FLOOR[other] >= FLOOR[name]]
    assert not upwards


def test_the_configuration_needs_no_torch():
    assert imported(ROOT / "config.py") == {"errors", "files", "presets"}
    command = "import sys, config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stripped_and_thin(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 12
    assert not any(line.startswith(("def ", "class ")) for cell in code for line in cell.source.splitlines())
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert "FAST_RUN" in parameters[0].source


def test_every_notebook_sets_itself_up_alike():
    setups = set()
    for path in NOTEBOOKS:
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        setups.add(tuple(code[:2]))
    assert len(setups) == 1
