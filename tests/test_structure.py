"""The house's rules: one import order, names imported from where they are defined, notebooks that only call."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    "core config interface retrieval losses metrics sources plots towers models training dataset utils reports "
    "encode evaluate train tune widgets labs"
).split()
"""Each name imports only names before it; inside a package there are no circles."""
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for name in ORDER
    for path in (
        [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else sorted((ROOT / name).glob("*.py"))
    )
    if path.name != "__init__.py"
}
NOTEBOOKS = [ROOT / "main.ipynb", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def imports(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name) of every import of a file of ours, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, "") if whole in FILES else (node.module, alias.name))
    return [(module, name) for module, name in found if module.split(".")[0] in ORDER]


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def test_the_order_names_every_python_file():
    tracked = {path.relative_to(ROOT).parts[0] for path in [*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py")]}
    assert {name.removesuffix(".py") for name in tracked} - {"tests", "benchmarks"} == set(ORDER)
    assert not any(path.read_text() for name in ORDER for path in (ROOT / name).glob("__init__.py"))


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_order(module):
    place = ORDER.index(module.split(".")[0])
    others = {other for other, _ in imports(parsed(module)) if other.split(".")[0] != module.split(".")[0]}
    assert not [other for other in others if ORDER.index(other.split(".")[0]) > place]


def test_no_package_holds_a_circle():
    inside = {
        module: {other for other, _ in imports(parsed(module)) if other in FILES and other != module}
        for module in FILES
    }
    while inside:
        free = [module for module, others in inside.items() if not others & inside.keys()]
        assert free, f"a circle among {sorted(inside)}"
        for module in free:
            del inside[module]


@pytest.mark.parametrize("module", FILES)
def test_names_come_from_the_file_that_defines_them(module):
    wrong = []
    for other, name in imports(parsed(module)):
        if not name or (other, name) == ("losses", "InfoNCELoss"):
            continue
        body = parsed(other).body
        defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            defined |= {
                each.id for target in targets if target for each in ast.walk(target) if hasattr(each, "id")
            }
        if name not in defined:
            wrong.append(f"{other}.{name}")
    assert not wrong


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("config", "torch"),
        ("dataset", "transformers timm faiss optuna sklearn matplotlib sentence_transformers"),
    ],
)
def test_heavy_libraries_are_imported_where_they_are_used(module, heavy):
    code = f"import sys, {module}; sys.exit(', '.join(set({heavy.split()}) & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert result.stderr.strip() == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stripped_and_thin(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 12
    if path.name == "5_write_it_yourself.ipynb":
        return  # exercises: functions to write, nothing to set
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_import_what_a_student_reads(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    modules = {module for cell in code for module, _ in imports(ast.parse(cell))}
    machinery = {
        module for module in modules if "." in module and module.split(".")[0] not in ("plots", "labs")
    }
    assert machinery <= {"interface.colab"}
    labs = {module for module in modules if module.split(".")[0] == "labs"}
    assert len(labs) <= 1, "a notebook uses its own labs file only"
