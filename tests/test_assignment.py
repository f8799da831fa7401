"""notebooks/5_write_it_yourself.ipynb runs as it is, and nbgrader strips and grades it."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook
from small_data import ROOT

from labs import solutions
from labs.exercises import EXERCISES

NAME = "5_write_it_yourself.ipynb"
TOTAL = sum(exercise.points for exercise in EXERCISES.values())


def solution_of(cell: str) -> str:
    return re.search(r"### BEGIN SOLUTION\n(.*)    ### END SOLUTION", cell, re.DOTALL)[1]


def test_its_solutions_are_those_of_the_module():
    cells = nbformat.read(ROOT / "notebooks" / NAME, as_version=4).cells
    written = {
        c.metadata.nbgrader.grade_id: c.source
        for c in cells
        if c.metadata.get("nbgrader", {}).get("solution")
    }
    assert list(written) == list(EXERCISES)
    for name, cell in written.items():
        assert inspect.getsource(getattr(solutions, name)).endswith(solution_of(cell))


def mixed(released: Path) -> nbformat.NotebookNode:
    """One right answer, a wrong one, one that raises, one that is no Python, and the others left empty."""
    answers = {
        "projection_head": inspect.getsource(solutions.projection_head).replace(" -> nn.Module", ""),
        "recall_at_k": inspect.getsource(solutions.recall_at_k)
        .replace(">= own", "> own")
        .replace("Tensor", "object"),
        "zero_shot": "def zero_shot(*features):\n    return 1 / 0",
        "info_nce": "def info_nce(:",
    }
    notebook = nbformat.read(released, as_version=4)
    for cell in notebook.cells:
        cell.source = answers.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
    return notebook


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A copy of the lab with the course as `make assignment` makes it, and two submissions, graded."""
    lab = tmp_path_factory.mktemp("lab")
    for path in ROOT.iterdir():
        if path.name not in ("outputs", "runs", "cache"):
            (lab / path.name).symlink_to(path)
    path = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}  # nbgrader calls alembic by name
    make = ["make", "-C", str(lab), "-o", "install", f"BIN={sys.prefix}/bin", "assignment"]
    subprocess.run(make, check=True, capture_output=True)
    course = lab / "outputs" / "course"
    for student in ("full", "mixed"):
        (course / "submitted" / student / "write_it_yourself").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / NAME, course / "submitted/full/write_it_yourself")
    nbformat.write(
        mixed(course / "release/write_it_yourself" / NAME),
        course / "submitted/mixed/write_it_yourself" / NAME,
    )
    grade = ["nbgrader", "autograde", "write_it_yourself", "--course-dir", str(course)]
    subprocess.run(grade, check=True, capture_output=True, cwd=course, env=path)
    return course


def test_the_released_version_has_no_solution(course):
    text = (course / "release/write_it_yourself" / NAME).read_text()
    assert "SOLUTION" not in text
    assert text.count("raise NotImplementedError()") == len(EXERCISES)
    assert "softmax(dim=1)" not in text


@pytest.mark.parametrize(
    ("student", "points"), [("full", TOTAL), ("mixed", EXERCISES["projection_head"].points)]
)
def test_nbgrader_grades_it(course, student, points):
    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        assert book.find_submission("write_it_yourself", student).score == points


def test_a_wrong_answer_stops_nothing_and_each_is_one_sentence(course):
    cells = nbformat.read(course / "autograded/mixed/write_it_yourself" / NAME, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "projection_head is correct." in said
    assert "recall_at_k counts ties for the model" in said
    assert "zero_shot stopped with ZeroDivisionError: division by zero" in said
    assert "info_nce is not defined: write it in the cell above and run that cell." in said
    for name in EXERCISES.keys() - {"projection_head", "recall_at_k", "zero_shot", "info_nce"}:
        assert f"{name} is still empty: write it in the cell above." in said
