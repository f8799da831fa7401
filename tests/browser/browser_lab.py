"""JupyterLab on loopback and a headless Chromium that clicks in it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from small_data import ROOT, copy_lab

SHOTS = ROOT / "outputs" / "browser"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, seen or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
}
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The browser: $CHROMIUM, or the first known name on the path."""
    given = os.environ.get("CHROMIUM")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


def make_home(home: Path, parameters: dict[str, Any]) -> Path:
    """A folder with the lab's modules and notebooks, the parameters put into every notebook's own cell."""
    copy_lab(home)
    for name in ("data", "cache"):  # drawn and encoded once; what is not there is made
        if (ROOT / name).is_dir():
            (home / name).symlink_to(ROOT / name)
    for path in [*home.glob("*.ipynb"), *home.glob("notebooks/*.ipynb")]:
        _set_parameters(path, parameters)
    return home


def _set_parameters(path: Path, parameters: dict[str, Any]) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            lines = [line for line in cell.source.splitlines() if line.split(" ")[0] not in parameters]
            cell.source = "\n".join([*lines, *(f"{name} = {value!r}" for name, value in parameters.items())])
    nbformat.write(notebook, path)


@contextmanager
def serve(home: Path, program: str = "jupyterlab") -> Iterator[str]:
    """JupyterLab, or the classic notebook, over a folder; its address."""
    settings = home / ".settings"
    for name, values in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", program, "--no-browser", "--allow-root", f"--port={port}"]
    app = "NotebookApp" if program == "notebook" else "ServerApp"
    token = "NotebookApp.token" if program == "notebook" else "IdentityProvider.token"
    command += [f"--{token}=", f"--{app}.ip=127.0.0.1", f"--{app}.port_retries=0"]
    places = {"JUPYTERLAB_SETTINGS_DIR": settings, "JUPYTER_CONFIG_DIR": home / ".jupyter"}
    places |= {"JUPYTER_RUNTIME_DIR": home / ".runtime", "IPYTHONDIR": home / ".ipython"}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **{name: str(path) for name, path in places.items()}}
    with open(home / ".jupyter.log", "w") as log:
        server = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/api/status")
            yield address
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(address: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


class LabPage:
    """One notebook in the browser."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        page.set_default_timeout(60_000)

    def open(self, notebook: str) -> None:
        """Open a notebook and wait until its kernel answers."""
        self.page.goto(f"{self.address}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}?reset")
        self.wait_idle()
        self.page.keyboard.press("Control+b")  # without the list of files

    def wait_idle(self, seconds: float = 300) -> None:
        """Wait until the kernel is connected and idle and no cell waits to run."""
        self.page.wait_for_selector("#jp-main-statusbar :text('| Idle')", timeout=1000 * seconds)
        self.page.wait_for_function(NOTHING_RUNS, timeout=1000 * seconds)

    def run_all(self, seconds: float = 300) -> float:
        """Run > Run All Cells; seconds from the click to the last output."""
        self.menu("Run", "Run All Cells")
        start = time.monotonic()
        self.page.wait_for_function(SOMETHING_RUNS)
        self.wait_idle(seconds)
        return time.monotonic() - start

    def reload(self, home: Path, notebook: str) -> int:
        """Save the notebook and load the page again; the kernel lives on. The saved file's bytes."""
        path = home / notebook
        before = path.stat().st_mtime_ns
        self.menu("File", "Save Notebook")
        deadline = time.monotonic() + 60
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, f"{notebook} was not saved"
            self.page.wait_for_timeout(200)
        self.page.reload()
        self.wait_idle()
        return path.stat().st_size

    def menu(self, name: str, *entries: str) -> None:
        """Choose an entry of a menu of the menu bar, or of a menu in it."""
        self.page.click(f".lm-MenuBar-itemLabel:text-is('{name}')")
        for entry in entries:
            self.page.click(f".lm-Menu-itemLabel:text-is('{entry}')")

    def cell(self, source: str) -> Any:
        """The code cell whose source holds a text."""
        return self.page.locator(".jp-CodeCell").filter(has=self.page.locator(".cm-content", has_text=source))

    def run_cell(self, source: str) -> None:
        """Select a cell and run it, without waiting for its end."""
        self.cell(source).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Control+Enter")

    def errors(self) -> list[str]:
        """What failed: the texts of error outputs, and of widgets that cannot be shown."""
        failed = self.page.locator(".jp-Notebook .jp-OutputArea-output").filter(
            has_text="Traceback (most recent call last)"
        )
        lost = self.page.locator(".jp-Notebook").get_by_text("Error displaying widget")
        return [*failed.all_inner_texts(), *lost.all_inner_texts()]

    def not_run(self) -> int:
        """How many code cells have no number."""
        return self.page.evaluate(f"{PROMPTS}.filter(text => !/\\d/.test(text)).length")

    def picture(self, source: str) -> str:
        """The address of a control's picture, which changes with the picture."""
        return self.cell(source).locator("img.widget-image").get_attribute("src") or ""

    def wait_new_picture(self, source: str, before: str) -> str:
        """Wait until a control's picture is another one."""
        deadline = time.monotonic() + 60
        while (now := self.picture(source)) == before:
            assert time.monotonic() < deadline, f"the picture of {source!r} did not change"
            self.page.wait_for_timeout(200)
        return now

    def save(self, name: str, cell: str = "") -> Path:
        """A screenshot of a cell with its output, or of the whole notebook."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        if cell:
            self.cell(cell).screenshot(path=path)
            return path
        size = self.page.viewport_size
        self.page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
        height = self.page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
        self.page.set_viewport_size({"width": size["width"], "height": min(int(height) + 120, 16_000)})
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=path)
        self.page.set_viewport_size(size)
        return path


PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
SOMETHING_RUNS = f"() => {PROMPTS}.some(text => text.includes('*'))"
NOTHING_RUNS = f"() => !{PROMPTS}.some(text => text.includes('*'))"
