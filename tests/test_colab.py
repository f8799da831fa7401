"""What a notebook does on Colab and Kaggle, with pretended runtimes, and the packages it asks for."""

import importlib.metadata
import json
import re
import shutil
import types
from pathlib import Path

import pytest
from packaging.version import Version
from small_data import ROOT

from config import make_config
from core.errors import LabError
from interface import colab


def test_only_what_is_missing_is_installed(tmp_path, monkeypatch):
    file = tmp_path / "requirements.txt"
    file.write_text("# the lab\n-r other.txt\ntorch>=2.6\nno-such-package-here>=1  # wanted\npandas>=99\n")
    missing = ["no-such-package-here>=1", "pandas>=99"]
    assert colab.missing_packages(file) == missing
    asked, pins, done = [], [], types.SimpleNamespace(returncode=0)

    def run(command, check):
        asked.append(command)
        pins.append(Path(command[command.index("--constraint") + 1]).read_text())
        return done

    monkeypatch.setattr(colab.subprocess, "run", run)
    assert colab.install(file) == missing
    assert asked[0][-2:] == missing
    assert asked[0][1:4] == ["-m", "pip", "install"]
    for name in (
        "ipywidgets",
        "ipython",
        "ipykernel",
        "torch",
        "numpy",
    ):  # Colab's page breaks if these change
        assert f"{name}=={importlib.metadata.version(name)}\n" in pins[0]
    done.returncode = 1
    with pytest.raises(
        LabError, match="could not install no-such-package-here>=1, pandas>=99.*run this cell"
    ):
        colab.install(file)
    file.write_text("torch>=2.6\n")
    assert colab.install(file) == []
    file.write_text("ipywidgets>=99\n")
    with pytest.raises(LabError, match=r"needs ipywidgets>=99 \(installed: .*restart the kernel"):
        colab.install(file)
    assert len(asked) == 2


def test_runtime_requirements_hold_no_tool_and_no_page():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split("[<>=]", line)[0] for line in lines}
    assert not names & {"jupyter", "jupyterlab", "notebook", "papermill", "pytest", "ruff", "mypy", "ipython"}
    assert colab.missing_packages(ROOT / "requirements.txt") == []


@pytest.fixture
def runtime(monkeypatch):
    """A pretended Colab runtime with one secret, and the folders that were mounted."""
    mounted = []

    class SecretNotFoundError(Exception):
        pass

    def get(name):
        if name != "KAGGLE_KEY":
            raise SecretNotFoundError
        return "a key"

    userdata = types.SimpleNamespace(
        get=get,
        SecretNotFoundError=SecretNotFoundError,
        NotebookAccessError=PermissionError,
        TimeoutException=TimeoutError,
    )
    parts = {"google.colab": types.ModuleType("google.colab"), "google.colab.userdata": userdata,
             "google.colab.drive": types.SimpleNamespace(mount=mounted.append)}  # fmt: skip
    for name, module in parts.items():
        monkeypatch.setitem(colab.sys.modules, name, module)
    for name in colab.SECRETS:
        monkeypatch.delenv(name, raising=False)
    return mounted


def test_on_colab_secrets_are_read_and_drive_is_mounted(runtime, monkeypatch, tmp_path):
    assert colab.read_secrets() == ["KAGGLE_KEY"]
    assert colab.os.environ.pop("KAGGLE_KEY") == "a key"
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    folder = colab.checkpoint_folder(str(tmp_path / "drive" / "MyDrive" / "lab"))
    assert runtime == [str(tmp_path / "drive")]
    assert folder.is_dir()
    colab.checkpoint_folder(str(folder))
    assert len(runtime) == 1  # it is there
    assert "T4 GPU" in colab.runtime_advice(make_config("quickstart", device="cpu"))


def test_elsewhere_nothing_is_asked_for(tmp_path):
    assert colab.read_secrets() == []
    assert colab.checkpoint_folder(" ") is None
    assert colab.checkpoint_folder(str(tmp_path / "here")).is_dir()
    assert "CPU runtime is enough" in colab.runtime_advice(make_config("flickr8k"))
    assert "use a machine with one" in colab.runtime_advice(make_config("quickstart", device="cpu"))
    assert colab.prepare().endswith("secrets read: none")
    advice = colab.runtime_advice(make_config("coco_resnet50", device="cpu"))
    assert advice == (
        "no GPU here, and coco_resnet50 would take days on a CPU: use a machine with one, or choose quickstart."
    )


def test_the_oldest_versions_stated_are_those_that_colab_test_installs():
    lines = (ROOT / "constraints-colab.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and line[0] != "#")
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and line[0] != "#":
            name, floor = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
            assert Version(pins[name]).release[: len(floor.split("."))] == Version(floor).release, line


def test_the_address_stands_in_one_place(tmp_path):
    names = [path.relative_to(ROOT) for path in [*ROOT.glob("*.ipynb"), *ROOT.glob("notebooks/*.ipynb")]]
    names += [Path("README.md"), Path("pyproject.toml")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    colab.write_address(tmp_path)
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in names)
    project = tmp_path / "pyproject.toml"
    project.write_text(
        re.sub(
            '(?m)^Repository = "[^"]*"', 'Repository = "https://github.com/a/lab.git"', project.read_text()
        )
    )
    colab.write_address(tmp_path)
    for name in names[:-2]:
        source = json.loads((tmp_path / name).read_text())["cells"][2]["source"]
        assert 'REPOSITORY = "https://github.com/a/lab.git"  # @param {type:"string"}\n' in source
    assert (
        "(https://colab.research.google.com/github/a/lab/blob/main/main.ipynb)"
        in (tmp_path / "README.md").read_text()
    )


def test_on_kaggle_the_line_says_where_outputs_go(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert colab.prepare().startswith("Kaggle: outputs go to /kaggle/working; packages installed: none")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match="is a file.*choose another folder"):
        colab.checkpoint_folder(str(tmp_path / "file" / "lab"))
