"""The house's rules: imports point downwards, notebooks are stripped and only call."""

import ast
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    "errors presets",
    "config compat tower_parts transformer_blocks distributed data_folder plots_style scene_plan "
    "ranks augment matching heads caption_augment balancing interpolation",
    "vit text_transformer clip_tokenizer hub export_heads margin_losses swap_loss pair_ranks",
    "image_towers text_towers cache cifar_files captions search_spaces studies interrupts logs "
    "pictures downloads losses metrics cli plots_parts plots_data scene_captions scene_pictures",
    "feature_rows report plots_tuning archives table_builder caption_rows caption_cache image_store "
    "plots uncertainty towers scenes search paired_scenes",
    "mining sources folder_readers image_cache data_check plots_features plots_ranks plots_demo "
    "models preencoded",
    "memory export_clip export_model readers optimisation checkpoints runs watch",
    "export_text negatives",
    "export engine",
    "precision",
    "dataset paired_cifar",
    "training_set",
    "encode pairs_data",
    "paired_data",
    "open_data",
    "utils",
    "gallery",
    "queries labelled measure",
    "zero_shot comparison",
    "looking_inside paired_evaluation",
    "run_report",
    "evaluate",
    "trainer",
    "train retrieval_evaluation",
    "caption_order",
    "controls colab live grid",
    "form explorers browsers",
    "widgets run_notebook tune",
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
    assert imported(ROOT / "config.py") == {"errors", "presets"}
    assert "torch" not in (ROOT / "config.py").read_text()


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
