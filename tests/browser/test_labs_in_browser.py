"""The sibling labs in JupyterLab: Run All in their quick setting, without an error, to the last cell."""

from __future__ import annotations

import pytest
from browser_lab import ROOT

pytestmark = [pytest.mark.browser, pytest.mark.browser_labs]

LABS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("notebooks/*.ipynb"))]


@pytest.mark.parametrize("notebook", LABS)
def test_run_all(open_lab, notebook):
    lab = open_lab()
    lab.open(notebook)
    seconds = lab.run_all(600)
    print(f"\n{notebook}, quick, from click to last output: {seconds:.0f} s")
    lab.save(notebook.replace("/", "_").removesuffix(".ipynb"))
    assert lab.errors() == []
    assert lab.not_run() == 0
