"""Training: the same seed gives the same run; a killed one ends as an undisturbed one; nothing poisons it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_data import ROOT, write_coco

from config import make_config
from core.errors import LabError
from losses import InfoNCELoss
from models import CLIPModel
from retrieval.figures import direction
from sources.side_by_side import PairRanks
from towers import base, image
from train import RunPlan, build_trainer, fit
from training.checkpoints import (
    STATE,
    exclusive_lock,
    last_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
    seed_everything,
    set_random_states,
    stop_after_step,
)
from training.optim import EMA, build_optimizer, build_scheduler
from utils import Run, load_run


@pytest.fixture
def small(trainable):
    """Heads alone, over cached features: trains in a second."""
    return trainable.updated(image_tower_mode="cached")


@pytest.fixture
def trainable(coco, tmp_path):
    """A quickstart on 24 small pictures."""
    return make_config(
        "quickstart", data_dir=coco, cache_dir=tmp_path / "cache", runs_dir=tmp_path / "runs", test_splits=("val",),
        image_size=32, num_epochs=3, batch_size=8, warmup_steps=2, device="cpu", head_dropout=0.1,
    )  # fmt: skip


TIMINGS = ["images_per_second", "data_share", "train_seconds", "peak_memory_gb"]


def outcome(run) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    return load_file(run.folder / "best.safetensors"), run.history.drop(columns=TIMINGS)


def assert_same(one, two) -> None:
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    pd.testing.assert_frame_equal(one[1], two[1], check_exact=True)


@pytest.mark.parametrize("mode", ["cached", "trainable"])
def test_the_same_seed_gives_the_same_run(small, tmp_path, mode):
    small = small.updated(image_tower_mode=mode)
    first = outcome(fit(small, show=False))
    assert_same(first, outcome(fit(small.updated(runs_dir=tmp_path / "again"), show=False)))
    other = outcome(fit(small.updated(seed=1), show=False))
    assert not torch.equal(first[0]["image_head.0.weight"], other[0]["image_head.0.weight"])


def test_a_finished_run_is_reused(small):
    run = fit(small, show=False)
    stamp = (run.folder / "best.safetensors").stat().st_mtime_ns
    assert fit(small, show=False).finished
    assert (run.folder / "best.safetensors").stat().st_mtime_ns == stamp


def test_stopped_in_the_middle_of_an_epoch_it_ends_the_same(trainable, tmp_path):
    small = trainable
    whole = outcome(fit(small.updated(runs_dir=tmp_path / "whole"), show=False))

    class StopAt:
        def __init__(self, step: int) -> None:
            self.left = step

        def is_set(self) -> bool:
            self.left -= 1
            return self.left == 0

    for step in (2, 3):  # steps 2 of epoch 1, then in epoch 2
        trainer = build_trainer(RunPlan(small, show=False), "auto")
        trainer.run(StopAt(step), None)
        assert load_checkpoint(last_checkpoint(trainer.folder / "checkpoints"))["progress"]["step"] == 2
    assert_same(whole, outcome(fit(small, show=False)))


def test_killed_it_continues_and_ends_the_same(trainable, tmp_path):
    config = trainable.updated(num_epochs=4, checkpoint_minutes=1e-6)
    whole = outcome(fit(config.updated(runs_dir=tmp_path / "whole"), show=False))
    path = config.save(tmp_path / "config.yaml")
    command = [sys.executable, str(ROOT / "train.py"), str(path)]
    checkpoints = Path(config.runs_dir)
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while len(list(checkpoints.glob("*/checkpoints/step_*5.pt"))) == 0 and child.poll() is None:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert last_checkpoint(next(checkpoints.iterdir()) / "checkpoints") is not None
    assert_same(whole, outcome(fit(config, show=False)))


def test_two_processes_do_not_train_one_run(small):
    with (
        exclusive_lock((plan := RunPlan(small, show=False)).folder, plan.checkpoints),
        pytest.raises(LabError, match="another process is training"),
    ):
        fit(small, show=False)


def test_a_sigterm_ends_the_process_once_the_step_is_saved():
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        with stop_after_step() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
            assert not ended
        assert ended == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_finishes_the_step():
    with stop_after_step() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(2)
    with stop_after_step() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(2)
        with pytest.raises(KeyboardInterrupt):  # the second one does not wait
            os.kill(os.getpid(), signal.SIGINT)


def test_a_checkpoint_of_other_settings_names_them(small):
    run = fit(small, show=False)
    path = str(last_checkpoint(run.folder / "checkpoints"))
    with pytest.raises(LabError, match=r"learning_rate \(0.001 there, 0.01 here\)"):
        fit(small.updated(learning_rate=1e-2), resume=path, show=False)


def test_other_data_under_the_same_name_is_refused(small, tmp_path):
    fit(small, show=False)
    other = write_coco(tmp_path / "other", {"train": 9, "val": 8})
    with pytest.raises(LabError, match="trained on other images or captions"):
        fit(small.updated(data_dir=other), show=False)


def test_checkpoints_keep_two_and_hold_no_code(tmp_path):
    for step in (1, 2, 3):
        state = {**dict.fromkeys(STATE, ()), "steps": step, "random": random_states()}
        save_checkpoint(tmp_path, state, step)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000002.pt", "step_000000003.pt"]
    assert load_checkpoint(last_checkpoint(tmp_path))["steps"] == 3


def test_random_states_come_back():
    seed_everything(3)
    states = random_states()
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002
    set_random_states(states)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == drawn  # noqa: NPY002


def test_schedule_warms_up_and_ends():
    config = make_config("flickr8k", num_epochs=10, warmup_steps=10, learning_rate=0.5)
    model = CLIPModel(base.CachedTower(4), base.CachedTower(4), text_head="linear")
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch=20)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert max(rates) == 0.5
    assert rates[105] == pytest.approx(0.25, rel=0.01)
    assert rates[-1] < 1e-3


def test_norms_and_biases_have_no_decay_and_towers_their_own_rate():
    config = make_config("quickstart", image_tower_learning_rate=1e-5)
    tower = image.efficientnet_lite0("random")
    model = CLIPModel(
        base.CachedTower(4), tower, text_head="linear", use_batch_norm=True, learn_temperature=True
    )
    groups = build_optimizer(model, config).param_groups
    assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [
        (1e-5, 0.0),
        (1e-5, 0.01),
        (1e-3, 0.0),
        (1e-3, 0.01),
    ]
    assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"])
    with pytest.raises(LabError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), config)


def test_ema_follows_and_gives_back():
    model = torch.nn.Linear(2, 1, bias=False)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        start = model.weight.clone()
        model.weight.add_(1.0)
    ema.update(model)
    decay = 2 / 11
    with ema.applied(model):
        assert torch.allclose(model.weight, start + 1 - decay)
    assert torch.allclose(model.weight, start + 1)


def test_ema_averages_batch_norm_statistics_with_the_weights():
    model = torch.nn.BatchNorm1d(1)
    ema = EMA(model, 0.9)
    means = []
    for value in (10.0, 20.0):
        model(torch.full((4, 1), value))
        means.append(model.running_mean.item())
        ema.update(model)
    assert means == pytest.approx([1.0, 2.9])  # momentum 0.1
    by_hand = (1 - 2 / 11) * means[0]
    by_hand += (1 - 3 / 12) * (means[1] - by_hand)
    with ema.applied(model):
        assert model.running_mean.item() == pytest.approx(by_hand)
        assert model.num_batches_tracked == 2  # a counter has no average
    assert model.running_mean.item() == pytest.approx(means[1])
    again = EMA(model, 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.step == 2
    with pytest.raises(LabError, match="lacks 'running_mean': it was written before"):
        again.load_state_dict({"step": 1, "average": dict.fromkeys(("weight", "bias", "running_var"))})


def test_a_loss_that_is_not_finite_stops_with_the_images(small, monkeypatch):
    monkeypatch.setattr(
        InfoNCELoss, "forward", lambda self, image_features, *args, **kw: image_features.sum() * float("nan")
    )
    with pytest.raises(LabError, match=r"the loss is nan at epoch 1, step 1 \(image ids \["):
        fit(small, show=False)


def test_a_run_without_weights_says_so(small):
    run = fit(small, show=False)
    (run.folder / "best.safetensors").unlink()
    with pytest.raises(LabError, match=r"holds no best.safetensors"):
        _ = load_run(run.folder).model


def test_weights_of_the_best_epoch_are_kept(small):
    run = fit(small, show=False)
    assert run.best_epoch == 1 + int(run.history["rsum"].argmax())
    assert run.training["data"]["train"]["images"] == 24


def test_the_metric_that_chooses_may_be_a_loss_and_must_exist(small):
    run = fit(small.updated(best_metric="val_loss"), show=False)
    assert run.best_epoch == 1 + int(run.history["val_loss"].argmin())
    with pytest.raises(
        LabError, match="best_metric 'i2t_recal@1' does not exist; did you mean 'i2t_recall@1'"
    ):
        fit(small.updated(best_metric="i2t_recal@1"), show=False)


@pytest.mark.parametrize("metric", ["modality_gap", "alignment", "image_uniformity", "t2i_median_rank"])
def test_a_metric_where_lower_is_better_keeps_its_lowest_epoch(metric, tmp_path):
    history = pd.DataFrame({"epoch": [1, 2, 3], metric: [2.0, -1.0, 3.0]})
    assert Run(tmp_path, make_config(best_metric=metric), history, {}, {}).best_epoch == 2


def test_every_figure_of_a_validation_has_a_direction_or_is_a_count(small):
    history = fit(small.updated(num_epochs=1), show=False).history
    validated = history.columns[history.columns.get_loc("val_loss") :].drop("peak_memory_gb")
    undirected = [name for name in validated if not has_direction(name)]
    assert {name.removeprefix("i2t_").removeprefix("t2i_") for name in undirected} == {
        "chance@1", "chance@5", "num_queries", "num_left_out", "num_images", "num_texts", "captions_per_image"
    }  # fmt: skip
    pairs = PairRanks(np.arange(2), np.ones(2), np.arange(2), np.ones(2, bool), num_classes=2)
    assert all(map(has_direction, pairs.figures()))
    assert "swapped" in pairs.figures()
    with pytest.raises(LabError, match="best_metric 'num_images' does not exist"):
        fit(small.updated(best_metric="num_images"), show=False)


def has_direction(metric: str) -> bool:
    try:
        return direction(metric) in (1, -1)
    except LabError:
        return False


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("nevr", "does not exist; did you mean 'never'"),
        ("runs/x/checkpoints/step_000000004.pt", "'auto', 'never' or a checkpoint"),
        ("runs/x/epoch_010.safetensors", "holds an epoch's weights alone; resume takes a checkpoint"),
    ],
)
def test_a_wrong_resume_is_noticed_before_anything_is_computed(resume, message, tmp_path):
    config = make_config(data_dir=tmp_path / "none", runs_dir=tmp_path / "runs")  # data is not looked for
    with pytest.raises(LabError, match=message):
        fit(config, resume=resume)
    assert not list(tmp_path.iterdir())


def test_a_setting_without_effect_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(LabError, match="queue_size 7 has no effect here: it needs negatives 'queue'"):
        fit(make_config(data_dir=tmp_path / "none", queue_size=7))
