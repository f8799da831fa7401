"""Searches a space: `python tune.py --config configs/mlp.yaml --space configs/tuning/mlp.yaml`; trains a grid.

Start the same command again after an interruption, or several at once: together they run
`--num_trials` trials. `python tune.py compare configs/*.yaml` trains several configurations and prints one table.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.trial import Trial, TrialState
from tqdm.auto import tqdm

import plots_tuning
from cli import Parser, one_sentence, parse_config, run_command
from comparison import compare_runs, readable
from config import Config, make_config, run_name
from errors import LabError
from files import atomic_path, disk_full, is_disk_full
from gallery import evaluate_run, recalls_of, told
from runs import Run, goodness
from studies import Space, Worker, describe, draw, expand, is_behind, read_space, trials_table
from train import fit

# --- Grids ---


def grid_settings(config: Config, grid: Mapping[str, Sequence[Any]]) -> list[Config]:
    """The configuration under every combination of the grid's values, the last field changing first.

    Raises: LabError on an unknown field, a value it does not take, an empty list, or two combinations
        that make the same run.
    """
    empty = [name for name, values in grid.items() if isinstance(values, str) or not list(values)]
    if empty:
        raise LabError(f"the grid's field {empty[0]!r} needs a list of values, such as [False, True].")
    settings = [config.updated(**dict(zip(grid, values, strict=True))) for values in product(*grid.values())]
    names = [run_name(setting) for setting in settings]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise LabError(f"two combinations of the grid make the same run {twice}; give each value once.")
    return settings


def run_grid(config: Config, grid: Mapping[str, Sequence[Any]], *, show: bool = True) -> pd.DataFrame:
    """Train and compare every combination; what is finished is only read, what was cut goes on.

        run_grid(config, {"use_batch_norm": [False, True], "seed": [0, 1, 2]})

    Args:
        grid: field -> values; seeds are averaged in the table.
        show: one progress bar over the whole grid, an epoch a step.
    Returns: `compare_runs` of the combinations finished so far: interrupted, the grid says how far it is, and
        the next call goes on.
    Raises: LabError as `grid_settings`, or if not one combination is finished.
    """
    runs = [run for run in train_all(grid_settings(config, grid), show=show) if run.finished]
    return compare_runs(runs)


def train_all(settings: Sequence[Config], *, show: bool = True) -> list[Run]:
    """Train every configuration in turn under one bar; stops after one that was interrupted."""
    runs: list[Run] = []
    with tqdm(total=sum(setting.num_epochs for setting in settings), unit="epoch", disable=not show) as bar:
        for setting in settings:
            bar.set_description(f"{len(runs) + 1} of {len(settings)}: {run_name(setting)}")
            runs.append(_train_one(setting, bar))
            if not runs[-1].finished:
                done = f"{len(runs) - 1} of {len(settings)} finished"
                bar.write(f"stopped in {runs[-1].name}, {done}; run again to continue.")
                break
    return runs


def _train_one(setting: Config, bar: tqdm) -> Run:
    """Train, the bar moving on by the epochs behind; a run that stopped early moves it to its end."""
    start = bar.n

    def move(history: Sized) -> None:
        bar.update(start + len(history) - bar.n)

    run = fit(setting, show=False, on_epoch=move)
    if run.finished:
        bar.update(start + setting.num_epochs - bar.n)
    return run


# --- Searches ---


DATA_FIELDS = frozenset({"data_dir", "reader", "train_splits", "val_splits", "max_samples", "split_seed"})
"""Where a space holds one of these, its trials are of different data by intention."""


FAILURES = (LabError, RuntimeError, ValueError, ArithmeticError, MemoryError)  # of a trial, not of the study
Settings = Mapping[str, dict[str, Any]]
"""Name -> fields of the configuration."""


def study_folder(config: Config, space: str | Path) -> Path:
    """Where a configuration's study over a space is kept, unless another folder is named."""
    return config.runs_dir / "tuning" / f"{config.preset}_{Path(space).stem}"


def tune(
    config: Config,
    space: Space,
    folder: str | Path,
    *,
    num_trials: int = 60,
    storage: str = "journal",
    trial_settings: dict[str, Any] | None = None,
    show: bool = True,
    train: Callable[..., Run] = fit,
) -> optuna.Study:
    """Search a space, or go on with a search; the best settings stand in the folder's best_config.yaml.

    Values are drawn by TPE; after each epoch successive halving (ASHA, Li et al. 2020) stops a trial that is
    behind at that epoch. A trial's value is its best validation `best_metric`. A trial that fails is kept with
    its reason.

    Args:
        config: what every trial starts from.
        folder: of the study; its trials' runs lie in `trials/`, without checkpoints.
        num_trials: of all workers and all calls together.
        storage: `journal`, a file in the folder, or the URL of a database.
        trial_settings: fields that differ in trials only, such as `train_splits=("tune",)`.
        train: called with a trial's configuration, `show` and `on_epoch`.
    Returns: the Optuna study. Interrupted, it raises KeyboardInterrupt; the next call goes on.
    Raises: LabError if the folder holds a study of another space, configuration or data, or no trial finished;
        DiskFullError if no space is left, after which the same call resumes.
    """
    folder = Path(folder)
    trial_config = config.updated(**{"checkpoint_dir": None, **(trial_settings or {})})
    about = {**describe(space), "configuration": _settings(trial_config)}
    with (
        _disk_full_in_one_sentence(folder),
        Worker(folder, about, storage, config.seed) as worker,
        tqdm(total=num_trials, desc=folder.name, unit="trial", disable=not show) as bar,
    ):
        while trial := worker.ask(num_trials, lambda trial: draw(space, trial, trial_config)):
            _show(bar, worker.study, config.best_metric)
            run_trial(worker.study, trial, trial_config, space, folder, train)
            write_best(worker.study, config, space, folder)
        write_best(worker.study, config, space, folder)  # the last worker may have been killed before its own
        _show(bar, worker.study, config.best_metric)
    if not _done(worker.study):
        raise LabError(f"no trial of {folder} has finished: {_first_reason(worker.study)}")
    return worker.study


@contextmanager
def _disk_full_in_one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, LabError) or not is_disk_full(error):
            raise
        raise disk_full(folder / "study.journal") from error


def _settings(config: Config) -> str:
    """What trials have in common, places apart."""
    names = config.differences(make_config(config.preset))
    changed = {name: config.model_dump(mode="json")[name] for name in names if not name.endswith("_dir")}
    return yaml.safe_dump({"preset": config.preset, **changed}, default_flow_style=True, width=10**6).strip()


def _show(bar: tqdm, study: optuna.Study, metric: str) -> None:
    trials = study.get_trials(deepcopy=False)
    done = _done(study)
    if done:
        bar.set_postfix({f"best {metric}": f"{max(t.value or 0.0 for t in done):.4g}"}, refresh=False)
    bar.n = sum(t.state.is_finished() for t in trials)
    bar.refresh()


def _done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _first_reason(study: optuna.Study) -> str:
    reasons = (trial.user_attrs.get("reason") for trial in study.get_trials(deepcopy=False))
    return next((reason for reason in reasons if reason), "all were pruned; raise num_trials.")


class OtherDataError(LabError):
    """The data are others than those of a study's earlier trials."""


def _check_data(study: optuna.Study, run: Run, space: Space) -> None:
    """Keep the data's digests in the study. Raises: OtherDataError if earlier trials were trained on other data."""
    data = {part: about["sha256"] for part, about in run.training.get("data", {}).items()}
    if not data or DATA_FIELDS & space.keys():
        return
    known = study.user_attrs.get("data")
    if known is None:
        study.set_user_attr("data", data)
    elif known != data:
        raise OtherDataError(
            f"the trials of study {study.study_name!r} were trained on other images or captions than "
            f"{run.config.data_dir} holds now; give this search another folder."
        )


def run_trial(
    study: optuna.Study,
    trial: Trial,
    config: Config,
    space: Space,
    folder: Path,
    train: Callable[..., Run] = fit,
) -> None:
    """Train one trial's settings and tell the study how it ended.

    A trial whose worker was killed finds its run's checkpoint in its folder and is judged from its last report on.
    """
    home = folder / "trials" / f"{trial.number:04d}"
    metric = config.best_metric
    reported = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    first = max(reported, default=1)  # a kill may have come between this report and its judgement

    def report(history: pd.DataFrame) -> None:
        nonlocal first
        if metric not in history:  # no epoch was validated yet
            return
        measured = history.dropna(subset=[metric])
        for epoch, value in zip(measured["epoch"].astype(int), measured[metric], strict=True):
            if epoch < first:
                continue
            if epoch not in reported:
                trial.report(float(goodness(value, metric)), step=epoch)
            if epoch < config.num_epochs and is_behind(study, trial.number):
                raise optuna.TrialPruned
            first = epoch + 1

    try:
        settings = config.updated(**expand(space, trial.params), runs_dir=home)
        run = train(settings, show=False, on_epoch=report)
        if not run.finished:
            raise KeyboardInterrupt  # the trial stays open, and the next worker takes it up
        _check_data(study, run, space)
        report(run.history)
        value = float(goodness(run.history[metric], metric).max())
        if math.isnan(value):
            raise LabError(f"its {metric} is nan")
        study.tell(trial, value)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except FAILURES as error:
        if is_disk_full(error) or isinstance(error, OtherDataError):
            raise  # not a fault of these values: the trial stays open, and the study stops
        trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
        study.tell(trial, state=TrialState.FAIL)
    _tidy(study, folder)


def _tidy(study: optuna.Study, folder: Path) -> None:
    """Drop the checkpoints of all ended trials, and their weights except the best one's."""
    for trial in study.get_trials(deepcopy=False):
        home = folder / "trials" / f"{trial.number:04d}"
        if trial.state.is_finished():
            for checkpoints in home.glob("*/checkpoints"):
                shutil.rmtree(checkpoints, ignore_errors=True)
            if not _done(study) or study.best_trial.number != trial.number:
                for weights in home.glob("*/best.safetensors"):
                    weights.unlink(missing_ok=True)


def best_config(study: optuna.Study, config: Config, space: Space) -> Config:
    """The configuration with the best trial's values. Raises: LabError if no trial has finished."""
    if not _done(study):
        raise LabError("no trial of this study has finished; run more.")
    return config.updated(**expand(space, study.best_params))


def write_best(study: optuna.Study, config: Config, space: Space, folder: Path) -> Path | None:
    """best_config.yaml: the configuration with the best trial's values, as `train.py --config` takes it."""
    if not _done(study):
        return None
    best = best_config(study, config, space)
    base = make_config(best.preset)
    changed = {name: best.model_dump(mode="json")[name] for name in best.differences(base)}
    path = folder / "best_config.yaml"
    with atomic_path(path) as beside:
        beside.write_text(
            yaml.safe_dump({"preset": best.preset, **changed}, sort_keys=False), encoding="utf-8"
        )
    return path


def field_importances(study: optuna.Study, seed: int = 0) -> dict[str, float]:
    """Share of the values' variance that each field used by every finished trial explains; {} for too few.

    Source: fANOVA, Hutter et al. 2014.
    """
    values = {trial.value for trial in _done(study)}
    if len(values) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def study_figures(
    study: optuna.Study, space: Space, metric: str, folder: Path | None = None
) -> dict[str, Any]:
    """History, importance, parallel coordinates and slices by name; saved as PNG where a folder is given.

    Raises: LabError if no trial has finished.
    """
    trials = trials_table(study)
    log = {field for field, dimension in space.items() if dimension.log}
    shares = field_importances(study)
    figures: dict[str, Any] = {
        "history": plots_tuning.study_history(trials, metric),
        **({"importance": plots_tuning.importances(shares)} if shares else {}),
        "parallel": plots_tuning.parallel_coordinates(trials, metric, log),
        "slices": plots_tuning.slices(trials, metric, log),
    }
    for name, figure in figures.items() if folder else ():
        plots_tuning.saved(figure, Path(str(folder)) / f"{name}.png")
    return figures


# --- comparison ---


def crossed(config: Config, rows: Settings, columns: Settings) -> dict[tuple[str, str], Config]:
    """A configuration under every setting of two tables, by their names.

    Args: rows, columns: name -> fields; a column's come last.
    """
    return {
        (row, column): config.updated(**{**rows[row], **columns[column]})
        for row in rows
        for column in columns
    }


def grid_table(configs: Mapping[tuple[str, str], Config], names: Sequence[str]) -> pd.DataFrame:
    """Train every configuration of a grid; a row each: its recalls in percent with their 95 % intervals.

    Interrupted, the table holds what is finished, and the next call goes on.

    Args: names: what rows and columns of the grid are, for the table.
    Returns: recalls of the first test split as text, and seconds of training.
    """
    table = []
    for (row, column), run in zip(configs, train_all(list(configs.values())), strict=False):
        found = evaluate_run(run, show=False)[run.config.test_splits[0]] if run.finished else {}
        recalls = {name: told(found, name) for name in recalls_of(found)}
        seconds = {"seconds": round(run.training["train_seconds"], 1)} if run.finished else {}
        table.append({names[0]: row, names[1]: column, **recalls, **seconds})
    return pd.DataFrame(table).set_index(list(names))


def compare(arguments: list[str]) -> None:
    """`python tune.py compare FILE ... [--FIELD VALUE ...]`: train each file's settings, print one table."""
    files = [word for word in arguments if word.endswith((".yaml", ".yml", ".json"))]
    flags = [word for word in arguments if word not in files]
    if not files:
        raise LabError("give the configurations to compare, such as `python tune.py compare configs/*.yaml`.")
    runs = [run for run in train_all([_read(file, flags) for file in files]) if run.finished]
    print(readable(compare_runs(runs)).to_string())


def _read(file: str, flags: list[str]) -> Config:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config_file")
    parser.add_argument("--config", dest="config_flag")
    return parse_config(parser, [file, *flags])


def main(
    config: Config,
    space: str = "configs/tuning/default.yaml",
    num_trials: int = 60,
    storage: str = "journal",
    folder: str = "",
    tune_split: str = "",
) -> None:
    """Search, draw the study's figures, and say where the best settings lie."""
    dimensions = read_space(space)
    home = Path(folder) if folder else study_folder(config, space)
    settings = {"train_splits": (tune_split,)} if tune_split else {}
    study = tune(config, dimensions, home, num_trials=num_trials, storage=storage, trial_settings=settings)
    study_figures(study, dimensions, config.best_metric, home / "figures")
    best = trials_table(study).query("state == 'complete'").nlargest(5, "value")
    print(best.drop(columns=["state", "reason"]).to_string(index=False))
    print(f"{home}: best_config.yaml, figures/, the study itself")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        with one_sentence():
            compare(sys.argv[2:])
    else:
        run_command(main, __doc__)
