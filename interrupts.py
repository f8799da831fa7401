"""One process a run, and Ctrl-C that finishes the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errors import LabError


class Stopped(Exception):  # noqa: N818  a signal, not an error
    """Training was asked to stop; everything is saved."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other process trains in this folder. Raises: LabError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise LabError(f"another process is training {folder}; wait for it, or stop it first.") from error


@contextmanager
def stop_after_step() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C or SIGTERM sets the event instead of raising; a second one raises."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
