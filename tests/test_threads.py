"""OpenMP's waiting is set before torch is imported, whichever module comes first, and what the user has set stays."""

import os
import subprocess
import sys

import pytest
from small_data import ROOT

PROGRAM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Refuse())
try:
    import {module}
except KeyboardInterrupt:
    pass
import os
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"))
"""


def values(module: str, **environment: str) -> str:
    outside = {name: value for name, value in os.environ.items() if name[:4] not in ("OMP_", "GOMP", "KMP_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)],
        cwd=ROOT, env=outside | environment, text=True, capture_output=True, check=True,
    ).stdout.strip()  # fmt: skip


@pytest.mark.parametrize(
    "module", ["config", "core.devices", "interface.colab", "interface.cli", "metrics", "models"]
)
def test_set_before_torch(module):
    assert values(module) == "1000 1"


def test_what_the_user_has_set_stays():
    assert values("config", OMP_WAIT_POLICY="ACTIVE") == "None None"
    assert values("config", GOMP_SPINCOUNT="5") == "5 None"
