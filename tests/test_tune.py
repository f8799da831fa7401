"""Search spaces, studies that survive their workers, what a study leaves behind."""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
from matplotlib import pyplot
from small_disk import small_disk
from test_embeddings import write_split

import tune
from config import Config, load_config, make_config
from core.errors import LabError
from core.files import DiskFullError, write_json
from dataset import embeddings_at
from interface import cli
from interface.cli import one_sentence
from train import fit
from tune import expand, next_trial, read_space, read_study, suggest, trials_table


def write_space(folder, text):
    path = folder / "space.yaml"
    path.write_text(text)
    return path


SPACE = """
learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
image_head: {type: categorical, choices: [mlp, attention], also: [text_head]}
head_num_layers: {type: int, low: 1, high: 3, when: {image_head: attention}}
queue_size: {type: categorical, choices: [64, 128], when: {negatives: [queue, bank]}}
"""


def test_a_space_draws_what_applies(tmp_path):
    space = read_space(write_space(tmp_path, SPACE))
    assert space["learning_rate"].limits() == (1e-4, 1e-2)
    config = make_config("projection_heads")
    fixed = {"learning_rate": 1e-3, "image_head": "mlp", "head_num_layers": 3, "queue_size": 64}
    trial = optuna.trial.FixedTrial(fixed)
    assert suggest(space, trial, config) == {"learning_rate": 1e-3, "image_head": "mlp", "text_head": "mlp"}
    trial = optuna.trial.FixedTrial({**fixed, "image_head": "attention"})
    values = suggest(space, trial, config.updated(negatives="queue"))
    assert (values["head_num_layers"], values["queue_size"], values["text_head"]) == (3, 64, "attention")
    assert expand(space, trial.params) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {type: float, low: 1, high: 2}", "is not a field .* did you mean 'learning_rate'"),
        ("learning_rate: {type: float, low: 2, high: 1}", "learning_rate: low must be less than high"),
        ("learning_rate: {type: float, low: 0, high: 1, log: true}", "more than 0 where log is true"),
        ("learning_rate: {type: float, high: 1}", "type float takes low and high, and no choices"),
        ("learning_rate: {type: float, low: 1, high: 2, hihg: 3}", "learning_rate: hihg: Extra inputs"),
        ("image_head: {type: categorical, low: 1, high: 2}", "type categorical takes choices"),
        ("batch_size: {type: categorical, choices: [0]}", "'batch_size' takes .* not 0"),
        ("learning_rate: 0.1", "learning_rate: Input should be a valid dictionary"),
        ("head_dropout: {type: float, low: 0, high: 0.5, when: {image_haed: mlp}}", "'image_haed' is not a field"),
        ("head_dropout: {type: float, low: 0, high: 0.5, when: {loss: infonce}}\n"
         "loss: {type: categorical, choices: [infonce]}", "when names 'loss', which must come before it"),
        ("- a\n- b", "must contain `field: {type: ..., ...}` lines"),
        ("a: [", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_one_sentence(tmp_path, text, message):
    with pytest.raises(LabError, match=message) as caught:
        read_space(write_space(tmp_path, text))
    assert "\n" not in str(caught.value)
    with pytest.raises(LabError, match="search space .* does not exist"):
        read_space(tmp_path / "none.yaml")


LINE = (
    "learning_rate: {type: float, low: 0.001, high: 1.0}\nweight_decay: {type: float, low: 0.0, high: 1.0}\n"
)


def _peak(config):
    """Best at learning_rate 0.7, weight_decay 0.2; 1 there."""
    return 1 - (config.learning_rate - 0.7) ** 2 - (config.weight_decay - 0.2) ** 2


def trained(config: Config, epochs: int = 4, **options):
    """Stands for `fit`: a history that climbs to the peak's value."""
    rows = []
    for epoch in range(1, epochs + 1):
        measured = {"rsum": _peak(config) * epoch / epochs} if epoch % config.eval_every == 0 else {}
        rows.append({"epoch": epoch, **measured})
        options["on_epoch"](pd.DataFrame(rows))
    (config.runs_dir / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (config.runs_dir / "run" / "best.safetensors").write_bytes(b"weights")
    return SimpleNamespace(
        finished=True, history=pd.DataFrame(rows), training=options.get("training", {}), config=config
    )


def test_a_study_finds_a_peak_prunes_and_leaves_its_best(tmp_path):
    config = make_config("projection_heads", runs_dir=tmp_path / "runs", embed_dim=64, num_epochs=4)
    space = read_space(write_space(tmp_path, LINE))
    study = tune.tune(config, space, tmp_path / "study", num_trials=24, show=False, train=trained)
    table = trials_table(study)
    assert Counter(table["state"])["pruned"] > 5
    assert len(table) == 24
    assert study.best_value > 0.9
    pruned = table[table["state"] == "pruned"]
    assert pruned["epochs"].max() < 4
    best = load_config(tmp_path / "study" / "best_config.yaml")
    assert best.learning_rate == study.best_params["learning_rate"]
    assert (best.embed_dim, best.preset) == (64, "projection_heads")
    results = json.loads((tmp_path / "study" / "best_results.json").read_text())
    assert results["rsum"] == study.best_value
    assert results["settings"]["learning_rate"] == best.learning_rate
    text = (tmp_path / "study" / "best_hyperparameters.txt").read_text()
    assert f"learning_rate: {best.learning_rate}\n" in text
    more = tune.tune(config, space, tmp_path / "study", num_trials=99, timeout=0, show=False, train=trained)
    assert len(more.trials) == 24
    weights = list((tmp_path / "study" / "trials").glob("*/run/best.safetensors"))
    assert f"trials/{study.best_trial.number:04d}/run" in ["/".join(path.parts[-4:-1]) for path in weights]
    assert not list((tmp_path / "study" / "trials").glob("*/run/checkpoints"))


def test_figures_show_the_study_and_leave_no_style_behind(tmp_path):
    config, space = make_config("projection_heads", num_epochs=4), read_space(write_space(tmp_path, LINE))
    before = dict(pyplot.rcParams)
    study = tune.tune(config, space, tmp_path / "study", num_trials=12, show=False, train=trained)
    figures = tune.study_figures(study, "rsum", tmp_path / "figures")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(figures)
    points, best = figures["history"].axes[0].collections[0], figures["history"].axes[0].lines[0]
    assert len(points.get_offsets()) == len(tune.completed(study))
    assert best.get_ydata()[-1] == study.best_value
    assert len(figures["importance"].axes[0].patches) == 2
    assert dict(pyplot.rcParams) == before
    assert pyplot.get_fignums() == []
    nothing = optuna.create_study()
    with pytest.raises(LabError, match="no trial of this study has finished; there is nothing to plot"):
        tune.study_figures(nothing, "rsum")


def test_epochs_without_validation_are_neither_reported_nor_judged(tmp_path):
    config = make_config("projection_heads", num_epochs=6, eval_every=2)
    space = read_space(write_space(tmp_path, LINE))
    train = functools.partial(trained, epochs=6)
    study = tune.tune(config, space, tmp_path / "study", num_trials=8, show=False, train=train)
    for trial in study.trials:
        best = _peak(SimpleNamespace(**trial.params))
        reached = {epoch: best * epoch / 6 for epoch in (2, 4, 6)}
        steps = {"COMPLETE": [2, 4, 6], "PRUNED": list(reached)[: len(trial.intermediate_values)]}
        assert trial.intermediate_values == {step: reached[step] for step in steps[trial.state.name]}
    assert Counter(trial.state.name for trial in study.trials).keys() == {"COMPLETE", "PRUNED"}


def test_a_study_with_more_trials_continues_as_it_would_have(tmp_path):
    config = make_config("projection_heads")
    space = read_space(write_space(tmp_path, LINE))
    whole = tune.tune(config, space, tmp_path / "whole", num_trials=8, show=False, train=trained)
    tune.tune(config, space, tmp_path / "cut", num_trials=3, show=False, train=trained)
    cut = tune.tune(config, space, tmp_path / "cut", num_trials=8, show=False, train=trained)
    assert [t.params for t in cut.trials] == [t.params for t in whole.trials]
    again = tune.tune(config, space, tmp_path / "cut", num_trials=8, show=False, train=trained)
    assert len(again.trials) == 8


def test_a_failed_trial_is_kept_with_its_reason(tmp_path):
    def fails_below(config, **options):
        if config.learning_rate < 0.5:
            raise RuntimeError(f"out of memory at {config.learning_rate:.2f}")
        return trained(config, **options)

    space = read_space(write_space(tmp_path, LINE))
    config = make_config("projection_heads")
    study = tune.tune(config, space, tmp_path / "study", num_trials=12, show=False, train=fails_below)
    table = trials_table(study)
    failed = table[table["state"] == "fail"]
    assert len(failed) == (table["learning_rate"] < 0.5).sum() > 0
    assert failed["reason"].str.startswith("RuntimeError: out of memory at 0.").all()
    with pytest.raises(LabError, match="no trial of .* has finished: LabError: never"):
        tune.tune(config, space, tmp_path / "other", num_trials=2, show=False, train=_never)


def _never(config, **options):
    raise LabError("never")


def test_a_study_of_another_space_or_configuration_is_refused(tmp_path):
    config = make_config("projection_heads")
    space = read_space(write_space(tmp_path, LINE))
    tune.tune(config, space, tmp_path / "study", num_trials=1, show=False, train=trained)
    other = read_space(write_space(tmp_path, LINE.replace("high: 1.0", "high: 0.9", 1)))
    with pytest.raises(
        LabError, match=r"contains a study of another learning_rate \(.*1.0.* there, .*0.9.* here\)"
    ):
        tune.tune(config, other, tmp_path / "study", num_trials=2, show=False, train=trained)
    longer = config.updated(num_epochs=99)
    with pytest.raises(LabError, match="a study of another configuration"):
        tune.tune(longer, space, tmp_path / "study", num_trials=2, show=False, train=trained)


def test_a_study_that_cannot_be_read_is_one_sentence(tmp_path):
    config, space = make_config("projection_heads"), read_space(write_space(tmp_path, LINE))
    options = {"num_trials": 2, "show": False, "train": trained}
    whole = tune.tune(config, space, tmp_path / "study", **options)
    path = tmp_path / "study/trials/0001/trial.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(LabError, match=r"0001/trial.json is damaged .* delete it and run again"):
        tune.tune(config, space, tmp_path / "study", **options)
    path.unlink()
    assert told(tune.tune(config, space, tmp_path / "study", **options)) == told(whole)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "study.journal").touch()
    with pytest.raises(LabError, match=r"old contains a study of an earlier version; give another folder"):
        tune.tune(config, space, tmp_path / "old", **options)


def test_a_study_resumes_over_its_own_data_only(tmp_path):
    config, space = make_config("projection_heads"), read_space(write_space(tmp_path, LINE))

    def over(digest):
        data = {"train": {"sha256": digest}, "val": {"sha256": "v"}}
        return lambda config, **options: trained(config, training={"data": data}, **options)

    tune.tune(config, space, tmp_path / "study", num_trials=1, show=False, train=over("a"))
    with pytest.raises(
        LabError,
        match=r"study of another digest of the train data \(a there, b here\); give this one another",
    ):
        tune.tune(config, space, tmp_path / "study", num_trials=2, show=False, train=over("b"))
    study = tune.tune(config, space, tmp_path / "study", num_trials=2, show=False, train=over("a"))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]


def test_an_interrupted_trial_is_resumed(tmp_path, capsys):
    config, space = make_config("projection_heads"), read_space(write_space(tmp_path, LINE))
    places = []

    def interrupted(config, **options):
        places.append(config.runs_dir.name)
        if len(places) == 3:
            return SimpleNamespace(finished=False)
        return trained(config, **options)

    with pytest.raises(SystemExit, match="130"), one_sentence():
        tune.tune(config, space, tmp_path / "study", num_trials=5, show=False, train=interrupted)
    line = f"stopped in trial 2 of {tmp_path / 'study'}; run again to continue it."
    assert capsys.readouterr().err.strip() == line
    study = tune.tune(config, space, tmp_path / "study", num_trials=5, show=False, train=interrupted)
    whole = tune.tune(config, space, tmp_path / "whole", num_trials=5, show=False, train=trained)
    assert told(study) == told(whole)
    assert places[2:4] == ["0002", "0002"]  # in the same folder, so that its checkpoint is found


def told(study: optuna.Study) -> list[tuple]:
    """All of a study's trials that an interruption must not change."""
    return [(t.number, t.state, t.params, t.value, t.intermediate_values) for t in study.trials]


def _killed_at_write(config: Config, space, folder, number: int, moment: str) -> None:
    """Search, and SIGKILL this process before or after its number-th file gets its name."""
    rename, count = os.replace, 0

    def counted(source, target):
        nonlocal count
        count += 1
        if count != number or moment == "after":
            rename(source, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    tune.tune(config, space, folder, num_trials=14, show=False, train=trained)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_study_killed_at_any_write_has_the_trials_of_an_undisturbed_one(tmp_path, moment):
    config = make_config("projection_heads", num_epochs=4, runs_dir=tmp_path / "runs")
    space, fork = read_space(write_space(tmp_path, LINE)), multiprocessing.get_context("fork")
    whole = tune.tune(config, space, tmp_path / "whole", num_trials=14, show=False, train=trained)
    for number in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        child = fork.Process(
            target=_killed_at_write, args=(config, space, tmp_path / "killed", number, moment)
        )
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    study = tune.tune(config, space, tmp_path / "killed", num_trials=14, show=False, train=trained)
    assert {trial.state.name for trial in whole.trials} == {"COMPLETE", "PRUNED"}
    assert told(study) == told(whole)
    best, expected = (tmp_path / name / "best_config.yaml" for name in ("killed", "whole"))
    assert best.read_text() == expected.read_text()


@pytest.mark.parametrize("free", range(0, 40_000, 8_000))
def test_a_full_disk_stops_the_study_and_fails_no_trial(tmp_path, free):
    def writes(config: Config, **options):
        write_json(config.runs_dir / "metrics.json", {"words": "x" * 12_000})
        return trained(config, **options)

    config, space = make_config("projection_heads"), read_space(write_space(tmp_path, LINE))
    options = {"num_trials": 4, "show": False, "train": writes}
    whole = tune.tune(config, space, tmp_path / "whole", **options)
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        tune.tune(config, space, disk / "study", **{**options, "num_trials": 1})
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - free))
        with pytest.raises(DiskFullError, match="no space left in .*; free some space"):
            tune.tune(config, space, disk / "study", **options)
        ballast.unlink()
        assert told(tune.tune(config, space, disk / "study", **options)) == told(whole)


def _work(folder, space, log, hang_at):
    def train(config, **options):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {config.learning_rate} {config.runs_dir.name}\n")
        if hang_at == config.runs_dir.name and log.read_text().count(f" {hang_at}\n") == 1:
            time.sleep(600)
        time.sleep(0.05)
        return trained(config, **options)

    tune.tune(
        make_config("projection_heads"), read_space(space), folder, num_trials=16, show=False, train=train,
    )  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
def test_four_workers_lose_no_trial_and_double_none_even_when_one_is_killed(tmp_path, late):
    space, log, fork = write_space(tmp_path, LINE), tmp_path / "log", multiprocessing.get_context("fork")

    def start(count, hang_at=None):
        workers = [
            fork.Process(target=_work, args=(tmp_path / "study", space, log, hang_at), daemon=True)
            for _ in range(count)
        ]
        for worker in workers:
            worker.start()
        return workers

    workers = start(4, hang_at="0005")
    while not (log.exists() and " 0005\n" in log.read_text()):
        assert any(worker.is_alive() for worker in workers)
        time.sleep(0.01)
    pid = next(int(line.split()[0]) for line in log.read_text().splitlines() if line.endswith(" 0005"))
    hanging = next(worker for worker in workers if worker.pid == pid)
    others = [worker for worker in workers if worker is not hanging]
    for worker in others if late else ():  # then nobody is left who could take the trial up
        worker.join()
    hanging.kill()
    hanging.join()  # until it has ended it holds the trial's lock
    # whether the others met the dead worker's trial depends on who came first; one that starts later does
    for worker in [*others, *start(1)]:
        worker.join()
        assert worker.exitcode == 0
    table = trials_table(read_study(tmp_path / "study"))
    with next_trial(tmp_path / "study", 16) as trial:
        assert trial is None
    assert table["number"].tolist() == list(range(16))
    assert table["state"].isin(["complete", "pruned"]).all()
    assert table["learning_rate"].is_unique
    runs = Counter(line.split()[2] for line in log.read_text().splitlines())
    assert runs == {f"{number:04d}": 1 + (number == 5) for number in range(16)}


def test_tuning_trains_on_its_part_and_best_config_trains_on_all(tmp_path, capsys, monkeypatch):
    folder = write_split(tmp_path / "embeddings", "train", list(range(60)))
    for seed, split in enumerate(("tune", "val", "test"), start=1):
        write_split(folder, split, list(range(100 * seed, 100 * seed + 12)), seed=seed)
    small = make_config(
        "projection_heads", **embeddings_at(folder), runs_dir=tmp_path / "runs", device="cpu", num_epochs=2,
        batch_size=16, warmup_steps=1, head_hidden_dim=16, embed_dim=8,
    )  # fmt: skip
    small.save(tmp_path / "small.yaml")
    config = load_config(tmp_path / "small.yaml")
    space = write_space(tmp_path, "head_dropout: {type: float, low: 0.0, high: 0.5}\n"
                        "head_hidden_dim: {type: int, low: 8, high: 24}\n")  # fmt: skip
    folder = str(tmp_path / "study")
    tune.main(config, space=str(space), num_trials=4, tune_split="tune", folder=folder, n_jobs=2)
    shown = capsys.readouterr().out
    assert "head_dropout" in shown
    figures = {path.stem for path in (tmp_path / "study" / "figures").iterdir()}
    assert figures >= {"history", "parallel", "slices"}
    runs = list((tmp_path / "study" / "trials").glob("*/*/training.json"))
    assert {json.loads(path.read_text())["data"]["train"]["images"] for path in runs} == {12}
    best = load_config(tmp_path / "study" / "best_config.yaml")
    run = fit(best, show=False)
    assert run.training["data"]["train"]["images"] == 60
    files = [str(tmp_path / "small.yaml"), str(tmp_path / "study" / "best_config.yaml")]
    monkeypatch.setattr("sys.argv", ["tune.py", "compare", *files, "--seed", "0"])
    cli.tune()
    assert "i2t_recall@1" in capsys.readouterr().out
