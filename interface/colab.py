"""What a notebook needs on Colab and Kaggle: packages, the account's secrets, a Drive folder, which runtime to choose.

Elsewhere only missing packages are installed. This module needs only packages that every notebook kernel has.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import core.threads  # noqa: F401  read when torch is imported

from packaging.requirements import Requirement

from core.errors import LabError

KERNEL = ("ipywidgets", "ipython", "ipykernel", "torch", "torchvision", "numpy")
"""Installed versions of these stay: the page or the running kernel depends on them."""
SECRETS = ("KAGGLE_USERNAME", "KAGGLE_KEY", "HF_TOKEN")
DRIVE = Path("/content/drive")


def on_colab() -> bool:
    """Whether this is a Colab runtime."""
    return "google.colab" in sys.modules or bool(os.environ.get("COLAB_RELEASE_TAG"))


def on_kaggle() -> bool:
    """Whether this is a Kaggle notebook."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def missing_packages(requirements: str | Path = "requirements.txt") -> list[str]:
    """The requirements that are not met; a package within its range, such as Colab's own torch, is not reinstalled."""
    lines = [
        line.split("#")[0].strip() for line in Path(requirements).read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and not line.startswith("-") and not _is_met(Requirement(line))]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def install(requirements: str | Path = "requirements.txt") -> list[str]:
    """Install missing packages with this kernel's pip and return them; makes no request if none is missing.

    Raises: LabError if a package of `KERNEL` is too old, or if pip fails.
    """
    missing = missing_packages(requirements)
    versions = {name: version for name in KERNEL if (version := _version(name))}
    too_old = [f"{line} (installed: {versions[Requirement(line).name]})" for line in missing
               if Requirement(line).name in versions]  # fmt: skip
    if too_old:
        raise LabError(
            f"this kernel needs {', '.join(too_old)}; update with `pip install --upgrade` and restart the kernel, "
            "or start a new runtime."
        )
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            pins = Path(folder, "constraints.txt")
            pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(pins), *missing]
            if subprocess.run(command, check=False).returncode:
                raise LabError(
                    f"pip could not install {', '.join(missing)} (its message is above); check the network and run "
                    "this cell again."
                )
        importlib.invalidate_caches()
    return missing


def prepare() -> str:
    """Install missing packages and read the secrets; returns one line about what was done."""
    installed, secrets = install(), read_secrets()
    where = "Kaggle: outputs go to /kaggle/working; " if on_kaggle() else ""
    packages = len(installed) or "none missing"
    return f"{where}packages installed: {packages}; secrets read: {', '.join(secrets) or 'none'}"


def read_secrets(names: tuple[str, ...] = SECRETS) -> list[str]:
    """Copy the account's secrets into environment variables, and return the names of those found.

    A secret that is missing, or that the notebook may not read, is skipped: public data need none.
    """
    if not on_colab():
        return []
    userdata: Any = importlib.import_module("google.colab.userdata")
    names_found = []
    for name in names:
        try:
            os.environ[name] = userdata.get(name)
            names_found.append(name)
        except (userdata.SecretNotFoundError, userdata.NotebookAccessError, userdata.TimeoutException):
            continue
    return names_found


def checkpoint_folder(folder: str) -> Path | None:
    """The folder for checkpoints, with Drive mounted if the folder is on it; None for an empty name.

    A Drive folder is `/content/drive/MyDrive/...`. After a dropped session, running all cells again
    mounts it and resumes from the checkpoints in it.
    """
    if not folder.strip():
        return None
    path = Path(folder.strip()).expanduser()
    if on_colab() and path.is_relative_to(DRIVE) and not DRIVE.joinpath("MyDrive").is_dir():
        importlib.import_module("google.colab.drive").mount(str(DRIVE))
    from core.files import make_folder  # filelock may only be installed by `install`

    return make_folder(path)


def runtime_advice(config: Any) -> str:
    """Which runtime a configuration needs, in one sentence."""
    from core.devices import get_device

    import torch  # may only be installed by `install`

    if config.image_tower_mode == "cached":
        return "a CPU runtime is enough: the image tower's features are cached and only heads are trained."
    if get_device(config.device).type != "cpu":
        count = torch.cuda.device_count()
        more = f"; `train.fit_in_processes(CONFIG)` uses all {count}" if count > 1 else ""
        return f"this runtime has a GPU, which training an image tower needs{more}."
    where = "choose Runtime > Change runtime type > T4 GPU" if on_colab() else "use a machine with one"
    if on_kaggle():
        where = "choose an accelerator in the notebook's settings"
    if config.preset.startswith("coco"):
        return f"no GPU here, and {config.preset} would take days on a CPU: {where}, or choose quickstart."
    return f"no GPU here, which is enough for quickstart; to train on photographs, {where}."


def write_address(root: str | Path = ".") -> None:
    """Write the address in pyproject.toml into the notebooks' setup cells and the README's Colab badge."""
    root = Path(root)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    page = address.removeprefix("https://github.com/").removesuffix(".git")
    page = f"{page}/blob/main/main.ipynb" if page else ""
    for path in (root / "README.md", root / "main.ipynb", *root.glob("notebooks/*.ipynb")):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'REPOSITORY = \\"[^"]*\\"', lambda _: f'REPOSITORY = \\"{address}\\"', text)
        text = re.sub(r"(colab\.research\.google\.com/github/)[^)\s]*", rf"\g<1>{page}", text)
        path.write_text(text, encoding="utf-8")
