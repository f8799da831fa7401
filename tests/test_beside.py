"""Several processes on one run: evaluations beside a training that starts over."""

import multiprocessing
import os
import re
import time

import pytest
import torch
from small_data import write_coco

from config import Config, make_config
from core.errors import LabError
from evaluate import evaluate_command
from interface import cli
from train import fit
from training.checkpoints import evaluation_lock
from utils import load_run

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train", "matplotlib.pyplot"])


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(
        "quickstart", data_dir=write_coco(tmp_path / "coco", {"train": 16, "val": 6}), cache_dir=tmp_path / "cache",
        runs_dir=tmp_path / "runs", test_splits=("val",), image_size=32, num_epochs=1, batch_size=8, warmup_steps=1,
        device="cpu", image_tower="vit", image_weights="random", image_patch_size=16, image_width=16,
        image_num_layers=1, image_num_heads=2, num_workers=0,
    )  # fmt: skip


def evaluate(folder, delay: float, log) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(2, 1)
    time.sleep(delay)
    cli.evaluate([str(folder), "--again"])


def test_evaluations_beside_a_run_that_starts_over_end_whole_or_in_a_sentence(config, tmp_path):
    folder = fit(config, show=False).folder
    logs = [tmp_path / f"log_{number}" for number in range(3)]
    children = [
        processes.Process(target=evaluate, args=(folder, 0.2 * number, log))
        for number, log in enumerate(logs)
    ]
    for child in children:
        child.start()
    while folder.joinpath("report.html").is_file() is False and any(child.is_alive() for child in children):
        time.sleep(0.01)
    fit(config, resume="never", show=False)
    for child, log in zip(children, logs, strict=True):
        child.join(120)
        said = log.read_text()
        assert "Traceback" not in said, said
        assert child.exitcode == 0 or re.search(
            r"^error: .*(no config.yaml|no best.safetensors)", said, re.M
        ), said
    run = load_run(folder)
    assert {of["weights"] for of in run.metrics.values()} <= {run.weights}


def test_a_run_is_not_deleted_while_it_is_evaluated(config, capsys):
    """The run that starts over waits; meanwhile every file of the earlier one is there."""
    folder = fit(config, show=False).folder
    child = processes.Process(target=fit, args=(config,), kwargs={"resume": "never", "show": False})
    with evaluation_lock(folder):
        first = load_run(folder).weights
        child.start()
        child.join(4)
        assert child.is_alive()
        assert load_run(folder).weights == first
    child.join(120)
    assert child.exitcode == 0
    assert load_run(folder).finished


def test_a_run_without_weights_is_one_sentence(config):
    folder = fit(config, show=False).folder
    (folder / "best.safetensors").unlink()
    with pytest.raises(LabError, match=r"holds no best\.safetensors: the run has not finished an epoch"):
        evaluate_command(str(folder), {}, again=True)
