"""The grid: every combination once, finished ones only read, an interrupted one continued."""

import pytest
from small_data import write_coco

import tune
from config import make_config, run_name
from core.errors import LabError
from train import fit
from tune import grid_settings, run_grid, train_all

GRID = {"use_batch_norm": [False, True], "seed": [0, 1]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    home = tmp_path_factory.mktemp("grid")
    write_coco(home / "coco", {"train": 24, "val": 12})
    return make_config(
        "quickstart", data_dir=home / "coco", cache_dir=home / "cache", runs_dir=home / "runs", test_splits=("val",),
        image_tower_mode="cached", image_size=32, num_epochs=2, batch_size=8, warmup_steps=2, device="cpu",
    )  # fmt: skip


def test_the_combinations_in_their_order(config):
    found = [(setting.use_batch_norm, setting.seed) for setting in grid_settings(config, GRID)]
    assert found == [(False, 0), (False, 1), (True, 0), (True, 1)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"use_bach_norm": [True]}, "did you mean 'use_batch_norm'"),
        ({"batch_size": [0]}, "'batch_size' takes int"),
        ({"loss": "infonce"}, r"'loss' needs a list of values"),
        ({"seed": []}, "'seed' needs a list of values"),
        ({"seed": [1, 1]}, "two combinations of the grid make the same run"),
    ],
)
def test_a_wrong_grid_is_named_before_anything_trains(config, wrong, message):
    with pytest.raises(LabError, match=message):
        grid_settings(config, wrong)


def test_a_grid_is_trained_once_and_continued(config, monkeypatch, capsys):
    trained, stop_after = [], [3]

    def counted(setting, **options):
        trained.append(run_name(setting))
        run = fit(setting, **options)
        if len(trained) == stop_after[0]:
            run.training["finished"] = False  # as after Ctrl-C
        return run

    monkeypatch.setattr(tune, "fit", counted)
    table = run_grid(config, GRID, show=False)
    assert len(trained) == 3  # the fourth is not begun
    assert table["seeds"].tolist() == [2]

    stop_after[0] = 0
    folders = {run.name: (run.folder / "best.safetensors").stat().st_mtime_ns
               for run in train_all(grid_settings(config, GRID)[:3], show=False)}  # fmt: skip
    table = run_grid(config, GRID, show=False)
    assert table["seeds"].tolist() == [2, 2]
    assert len(table) == 2
    assert table["i2t_recall@1"].between(0, 1).all()
    for name, stamp in folders.items():
        assert (config.runs_dir / name / "best.safetensors").stat().st_mtime_ns == stamp


def test_one_bar_counts_the_epochs_of_the_whole_grid(config, capsys):
    run_grid(config, GRID)
    said = capsys.readouterr().err
    assert "8/8" in said
    assert "4 of 4: quickstart_bn_" in said
