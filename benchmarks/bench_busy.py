"""The lab beside other busy processes: `python -m benchmarks busy [--rounds N] [--seconds S]`.

Each setting of OpenMP's waiting runs in a process of its own; all take turns at the same job, alone and beside one and
two processes that do nothing but count. The fair share beside n of them is cores / (cores + n) of the speed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd

TORCH = "torch's default"
SETTINGS = {
    "the lab's": {},
    TORCH: {"GOMP_SPINCOUNT": "300000"},  # libgomp's value where nothing is set
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BUSY = (0, 1, 2)


def jobs() -> dict[str, Callable[[], Any]]:
    """One small unit of each kind of work, by name."""
    from core.devices import reuse_freed_memory

    import torch

    from benchmarks.bench_engine import made_up
    from benchmarks.bench_metrics import make_features
    from config import make_config
    from dataset import make_loader
    from losses import build_loss
    from metrics import retrieval_metrics
    from models import build_model
    from retrieval.mining import mine_semantic
    from towers.image import build_image_tower
    from training.engine import Engine
    from training.optim import build_optimizer, build_scheduler

    reuse_freed_memory()
    config = make_config("quickstart", device="cpu", batch_size=16)
    model = build_model(config).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config)
    engine = Engine(model, build_loss(config), optimizer, build_scheduler(optimizer, config, 10_000), config)
    (batch,) = make_loader(made_up(config.batch_size, config.image_size), config.batch_size)
    tower = build_image_tower(config.updated(image_tower_mode="frozen")).eval()
    tower.to(memory_format=torch.channels_last)
    features = make_features(600, 3_000)
    small = make_features(200, 1_000)
    captions = [f"caption {n % 97} of image {n % 89}" for n in range(1_000)]

    def encode() -> None:
        with torch.inference_mode():
            tower(batch["image"])

    return {
        "encoding": encode,
        "training": lambda: engine.step(batch).item(),
        "metrics": lambda: retrieval_metrics(*features),
        "mining": lambda: mine_semantic(small[0], small[1], small[2].numpy(), small[3].numpy(), captions, 1),
    }


def serve() -> None:
    """Answers each `job seconds` line with the units per second."""
    units = jobs()
    for unit in units.values():
        unit()
    print(json.dumps(list(units)), flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < float(seconds):
            units[name]()
            count += 1
        print(json.dumps(count / (time.perf_counter() - start)), flush=True)


class Worker:
    """A process with one setting."""

    def __init__(self, environment: dict[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if name[:4] not in ("OMP_", "GOMP", "KMP_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_busy"], env=kept | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.names: list[str] = self.answer()  # one worker starts after another

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def speed(self, job: str, seconds: float) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{job} {seconds}\n")
        self.process.stdin.flush()
        return self.answer()


@contextmanager
def beside(count: int) -> Iterator[None]:
    """`count` processes that count for as long as the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(settings: dict[str, dict[str, str]], rounds: int, seconds: float) -> pd.DataFrame:
    """Units per second: one row per job, setting and round, one column per number of busy processes."""
    workers = {name: Worker(environment) for name, environment in settings.items()}
    names = next(iter(workers.values())).names
    speeds: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for turn in range(rounds):
        for busy in BUSY:
            with beside(busy):
                for job in names:
                    for name, worker in workers.items():
                        speeds[job, name, turn][busy] = worker.speed(job, seconds)
    for worker in workers.values():
        worker.process.communicate()  # closes its input, which ends it
    return pd.DataFrame.from_dict(speeds, orient="index").rename_axis(["job", "setting", "round"])


def ratios(speeds: pd.DataFrame) -> pd.DataFrame:
    """Speed alone as a share of torch's default, and beside n busy processes as a share of the fair share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    median = speeds.groupby(level=["job", "setting"], sort=False).median()
    best = median[0].unstack()[TORCH]
    table = pd.DataFrame({"units per second alone": median[0]})
    table["of torch's default, alone"] = median[0] / best.reindex(median.index, level="job")
    for busy in BUSY[1:]:
        fair = best.reindex(median.index, level="job") * cores / (cores + busy)
        table[f"of the fair share beside {busy}"] = median[busy] / fair
    return table.round(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--spin", type=int, nargs="*", default=[], help="further values of GOMP_SPINCOUNT")
    given = parser.parse_args()
    further = {f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in given.spin}
    table = ratios(measure(SETTINGS | further, given.rounds, given.seconds))
    print(table.to_string())
    ours = table.xs("the lab's", level="setting")
    lowest = ", ".join(f"{value} {name}" for name, value in ours.iloc[:, 1:].min().items())
    print(f"targets: alone at least 0.95, beside others at least 0.7; the lab's lowest: {lowest}")


if __name__ == "__main__":
    serve()
