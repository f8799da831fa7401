"""Killed at any moment and started again, a run ends with the bits of an undisturbed one.

`KILLS` sets how many random moments are tried (`make soak`: 20).
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_data import ROOT, add_results, write_coco

from config import Config, make_config
from train import fit
from training import checkpoints
from utils import Run

KILLS = int(os.environ.get("KILLS", "2"))
TIMINGS = ["images_per_second", "data_share", "train_seconds", "peak_memory_gb"]
tried: Counter[tuple[str, str]] = Counter()
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train"])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A small run with everything that has a state: tower, dropout, EMA, queue, augmentation, early stopping."""
    root = tmp_path_factory.mktemp("kill")
    return make_config(
        "quickstart", data_dir=write_coco(root / "coco", {"train": 24, "val": 8}), cache_dir=root / "cache",
        runs_dir=root / "runs", test_splits=("val",), image_size=32, num_epochs=3, batch_size=8, warmup_steps=2,
        device="cpu", head_dropout=0.1, checkpoint_minutes=1e-9, ema_decay=0.9, negatives="queue", queue_size=20,
        augment_jitter=0.2, learn_temperature=True, patience=5, captions_per_image=2,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def table():
    """Under `make soak`, what was tried and what came of it, for benchmarks/results."""
    yield
    if "KILLS" in os.environ:
        add_results("killed runs", tried)


@pytest.fixture(scope="module")
def whole(config) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    return outcome(fit(config.updated(runs_dir=config.runs_dir / "whole"), show=False))


def outcome(run: Run) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    assert run.finished
    return load_file(run.folder / "best.safetensors"), run.history.drop(columns=TIMINGS)


def assert_ends_as(whole, config: Config) -> None:
    tried["run killed at any moment", "tried"] += 1
    weights, history = outcome(fit(config, show=False))
    assert all(torch.equal(weights[name], whole[0][name]) for name in whole[0])
    pd.testing.assert_frame_equal(history, whole[1], check_exact=True)
    tried["run killed at any moment", "survived"] += 1


def killed_at_write(config: Config, moment: str, number: int) -> None:
    """Train, and kill this process at the number-th checkpoint: before, in the middle of, or after its writing."""
    write, count = torch.save, [0]

    def torn(state, path) -> None:
        count[0] += 1
        if count[0] == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write(state, path)
        if count[0] == number and moment == "during":
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if count[0] > number and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.torch.save = torn
    fit(config, show=False)


def train(config: Config) -> None:
    torch.set_num_threads(1)
    fit(config, show=False)


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_killed_around_a_write(config, whole, tmp_path, moment):
    mine = config.updated(runs_dir=tmp_path)
    child = processes.Process(target=killed_at_write, args=(mine, moment, 5))
    child.start()
    child.join(600)
    assert child.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("*/training.json")) or not fit_is_done(tmp_path)
    assert_ends_as(whole, mine)


def fit_is_done(folder) -> bool:
    return '"finished": true' in next(folder.glob("*/training.json")).read_text()


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(config, whole, tmp_path, number):
    mine = config.updated(runs_dir=tmp_path)
    wait = random.Random(f"{time.time_ns()} {number}").uniform(0.0, 4.0)
    child = processes.Process(target=train, args=(mine,))
    child.start()
    time.sleep(wait)
    child.kill()
    child.join(60)
    print(f"killed after {wait:.3f} s")
    assert_ends_as(whole, mine)


@pytest.mark.parametrize(("call", "saved"), [(1, "no checkpoint is saved yet"), (9, ".pt is saved")])
def test_interrupted_twice_it_ends_with_one_line_that_says_what_is_saved(config, tmp_path, call, saved):
    """From a shell, with two real signals in one step."""
    code = f"""
import os, signal
from interface.cli import one_sentence
from config import Config
from losses import InfoNCELoss
from train import fit

class Interrupted(InfoNCELoss):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        for _ in range(2 * (self.calls == {call})):
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(*args, **kwargs)

with one_sentence():
    fit(Config(**{config.updated(runs_dir=tmp_path).model_dump(mode="json")!r}), criterion=Interrupted(), show=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert saved in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("stopped at once: ")
