"""A flipped byte or a cut file ends in a rebuild or in one sentence, never in wrong numbers or a traceback.

`DAMAGES` sets how many places of each kind of file are tried (`make soak`: 24).
"""

import contextlib
import os
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from small_data import DAMAGES, add_results, damage, write_coco

from config import Config, make_config
from core.errors import LabError
from core.files import read_json, write_json
from core.tensor_files import load_archive, load_tensors
from evaluate import evaluate_run, open_search
from reports.gallery import ranks_of
from train import fit
from utils import Run, load_run

TIMINGS = ["images_per_second", "data_share", "train_seconds", "peak_memory_gb"]
OF_RUN = {  # what a file is called below the run's folder, and what its damage may end in beside the right result
    "weights": ("best.safetensors", "best.safetensors is damaged"),
    "metrics": ("metrics.json", ""),
    "training": ("training.json", ""),
    "history": ("history.csv", ""),
    "features": ("features_val.safetensors", ""),
}
OF_CACHE = {
    "text features": "features/text-*.safetensors",
    "captions": "captions/*.npz",
    "pixels": "images/*_raw/pictures.u8",
    "image digests": "images/*_raw/rows.u64",
    "image bitmap": "images/*_raw/finished.bits",
    "image header": "images/*_raw/header.json",
}
tried: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Config:
    """The configuration of a finished, evaluated and indexed run, whose checkpoints are those of its last epoch."""
    root = tmp_path_factory.mktemp("damage")
    config = make_config(
        "quickstart", data_dir=write_coco(root / "coco", {"train": 16, "val": 6}), cache_dir=root / "cache",
        runs_dir=root / "runs", test_splits=("val",), image_size=32, num_epochs=2, batch_size=8, warmup_steps=1,
        device="cpu", head_dropout=0.1, checkpoint_minutes=1e-9, image_tower="vit", image_weights="random",
        image_patch_size=16, image_width=16, image_num_layers=1, image_num_heads=2, num_workers=0,
    )  # fmt: skip
    outcome(fit(config, show=False))
    return config


@pytest.fixture(scope="module")
def right(made) -> dict[str, Any]:
    return outcome(fit(made, show=False))


@pytest.fixture
def config(made, tmp_path) -> Config:
    """The same on a copy of its runs and caches."""
    shutil.copytree(made.runs_dir, tmp_path / "runs")
    shutil.copytree(made.cache_dir, tmp_path / "cache")
    return made.updated(runs_dir=tmp_path / "runs", cache_dir=tmp_path / "cache")


@pytest.fixture(scope="module", autouse=True)
def table():
    """Under `make soak`, what was tried and what came of it, for benchmarks/results."""
    yield
    if "DAMAGES" in os.environ:
        add_results("damaged files", tried)


def outcome(run: Run) -> dict[str, Any]:
    """Everything that is read back: history, weights, metrics, ranks, what a search finds."""
    assert run.finished
    metrics = evaluate_run(run, show=False)
    found = open_search(run, show=False).by_text(["a red circle"], k=3)[0]
    return {
        "history": run.history.drop(columns=TIMINGS),
        "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
        "metrics": {name: value for name, value in metrics["val"].items() if isinstance(value, float)},
        "ranks": ranks_of(run, "val", show=False).t2i.values,
        "found": [
            (str(image), round(score, 6)) for image, score in zip(found.images, found.scores, strict=True)
        ],
    }


def assert_same(result: dict[str, Any], right: dict[str, Any]) -> None:
    pd.testing.assert_frame_equal(result["history"], right["history"], check_exact=True)
    assert all(torch.equal(value, right["weights"][name]) for name, value in result["weights"].items())
    assert result["metrics"] == right["metrics"]
    assert result["found"] == right["found"]
    assert np.array_equal(result["ranks"], right["ranks"])


@pytest.mark.parametrize("number", range(DAMAGES))
@pytest.mark.parametrize("kind", OF_RUN)
def test_a_damaged_file_of_a_run(config, right, kind, number):
    name, refusal = OF_RUN[kind]
    damage(next(config.runs_dir.glob(f"*/{name}")), number)
    tried[kind, "tried"] += 1
    if refusal:
        with pytest.raises(LabError, match=f"{refusal} .*; restore a copy of it, or train the run again"):
            outcome(fit(config, show=False))
    else:
        assert_same(outcome(fit(config, show=False)), right)
    tried[kind, "survived"] += 1


@pytest.mark.parametrize("number", range(DAMAGES))
@pytest.mark.parametrize("kind", OF_CACHE)
def test_a_damaged_cache(config, right, kind, number):
    """Trained again on the damaged cache, the run is the same."""
    for path in config.cache_dir.glob(OF_CACHE[kind]):
        damage(path, number)
    tried[kind, "tried"] += 1
    assert_same(outcome(fit(config, resume="never", show=False)), right)
    tried[kind, "survived"] += 1


@pytest.mark.parametrize("number", range(DAMAGES))
@pytest.mark.parametrize("which", [-1, 0])
def test_a_damaged_checkpoint(config, right, capsys, which, number):
    """A run that was stopped, its checkpoints damaged: it is finished from the one before, or from the start."""
    folder = next(config.runs_dir.glob("*/training.json")).parent
    for name in ("training.json", "metrics.json", "features_val.safetensors"):
        (folder / name).unlink()
    for path in sorted(folder.glob("checkpoints/*.pt"))[which:]:
        damage(path, number)
    tried["checkpoint", "tried"] += 1
    assert_same(outcome(fit(config, show=False)), right)
    said = capsys.readouterr().out
    assert "is damaged (" in said
    assert "it is deleted and training resumes from step_000000003.pt." in said
    assert ("it is deleted and training starts again." in said) != bool(which)
    tried["checkpoint", "survived"] += 1


@pytest.mark.parametrize("number", range(DAMAGES))
def test_a_damaged_configuration(config, right, number):
    """A text that a person may edit has no checksum; it is read, written again from a checkpoint, or refused."""
    damage(next(config.runs_dir.glob("*/config.yaml")), number)
    tried["configuration", "tried"] += 1
    with contextlib.suppress(LabError):
        outcome(fit(config, show=False))
    tried["configuration", "survived"] += 1


@pytest.mark.parametrize("content", [b"", b"epoch", b"\xff\xfe\0", b"epoch,train_loss\n1,x\n", b'a,"b\n'])
def test_an_edited_history_is_not_believed(config, right, content):
    next(config.runs_dir.glob("*/history.csv")).write_bytes(content)
    run = fit(config, show=False)
    pd.testing.assert_frame_equal(run.history.drop(columns=TIMINGS), right["history"], check_exact=True)
    (run.folder / "training.json").unlink()
    unfinished = load_run(run.folder)
    assert unfinished.history.empty
    with pytest.raises(LabError, match="has no history of rsum; train the run to the end first"):
        _ = unfinished.best_epoch


@pytest.mark.parametrize("name", ["protocol", "gallery", "num_images", "num_texts"])
def test_metrics_without_a_key_are_measured_again(config, right, capsys, name):
    path = next(config.runs_dir.glob("*/metrics.json"))
    metrics = read_json(path)
    del metrics["val"][name]
    write_json(path, metrics)
    assert_same(outcome(fit(config, show=False)), right)
    assert f"{path} lacks figures of val; they are measured again." in capsys.readouterr().out


def test_training_without_its_data_is_written_again(config, right):
    path = next(config.runs_dir.glob("*/training.json"))
    training = read_json(path)
    del training["data"]
    write_json(path, training)
    assert_same(outcome(fit(config, show=False)), right)
    assert read_json(path)["data"]["train"]["images"] == 16


@pytest.mark.parametrize("name", ["config.yaml", "history.csv"])
def test_resuming_from_what_is_no_checkpoint_is_one_sentence(config, name):
    path = next(config.runs_dir.glob(f"*/{name}"))
    with pytest.raises(LabError, match=r"is damaged \(.*\); give a file step_\*\.pt of a run's checkpoints"):
        fit(config, resume=str(path), show=False)
    empty = path.with_name("empty.pt")
    torch.save({"model": {}}, empty)
    with pytest.raises(LabError, match=r"it has no 'config'\); give a file step_"):
        fit(config, resume=str(empty), show=False)


def test_files_without_a_checksum_still_open(config, right):
    run = load_run(next(config.runs_dir.glob("*/best.safetensors")).parent)
    weights, _ = load_tensors(run.folder / "best.safetensors", "")
    save_file({name: value.clone() for name, value in weights.items()}, run.folder / "best.safetensors")
    for name in ("metrics.json", "training.json"):
        write_json(run.folder / name, read_json(run.folder / name))
    checkpoint = max(run.folder.glob("checkpoints/*.pt"))
    torch.save(load_archive(checkpoint, "cpu", ""), checkpoint)
    assert load_archive(checkpoint, "cpu", "")["run"] == run.name
    result = outcome(fit(config, show=False))
    assert_same(result, right)
