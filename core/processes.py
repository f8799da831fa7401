"""One function over many items, in worker processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from core.errors import LabError

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int | None = None,
    *,
    chunk_size: int = 32,
) -> Generator[Result, None, None]:
    """`function(item)` of each item, in order. The workers end when the generator is closed or this process dies.

    Args:
        function: defined at the top of a module, or a `functools.partial` of such a function.
        num_workers: processes; None: one per core; 0 or 1: this process does the work.
        chunk_size: items per task.
    Raises: LabError if a worker is killed; whatever `function` raises.
    """
    num_workers = min(num_cores() if num_workers is None else num_workers, -(-len(items) // chunk_size))
    if num_workers <= 1:
        yield from map(function, items)
        return
    # A fork starts at once and needs no guard in the user's script; only Linux's is safe beside threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(num_workers, context, _start_worker) as pool:
            yield from pool.map(function, items, chunksize=chunk_size)
    except BrokenProcessPool as error:
        raise LabError(
            "a worker process was killed, most often because memory ran out; run again with a smaller num_workers."
        ) from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that was killed leaves no worker behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
