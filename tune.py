"""Grids of settings, search spaces, and Optuna studies that resume after a kill."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from interface import cli

    cli.tune()
    raise SystemExit

import math
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
import yaml
from filelock import Timeout
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from tqdm.auto import tqdm

from config import Config, run_name
from core.errors import LabError, StoppedAtOnceError, nearest
from core.files import disk_full, is_disk_full, locked, read_json, write_json, write_text
from core.settings_files import load_yaml
from evaluate import compare_runs, evaluate_run, readable
from metrics import recalls_of, with_interval
from plots.style import saved
from train import fit
from utils import Run, goodness

# --- Search spaces ---


class Dimension(BaseModel):
    """The values of one field.

    Args:
        type: how values are sampled.
        low, high: both limits, included; of `float` and `int`.
        log: sample uniformly on a logarithmic scale.
        choices: of `categorical`.
        when: other fields and the value, or list of values, that each must have; otherwise the field keeps the
            configuration's value.
        also: further fields that get the same value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["float", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: dict[str, Any] = {}
    also: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        if self.type == "categorical":
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("type categorical takes choices, and no low or high")
            return self
        if self.low is None or self.high is None or self.choices:
            raise ValueError(f"type {self.type} takes low and high, and no choices")
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be less than high, and more than 0 where log is true")
        return self

    def limits(self) -> tuple[Any, ...]:
        """The choices, or low and high in the field's own type."""
        if self.type == "categorical":
            return self.choices
        cast = float if self.type == "float" else int
        return tuple(cast(limit) for limit in (self.low, self.high) if limit is not None)

    def suggest(self, trial: Any, field: str) -> Any:
        """A value from an Optuna trial."""
        if self.type == "categorical":
            return trial.suggest_categorical(field, self.choices)
        suggest = trial.suggest_float if self.type == "float" else trial.suggest_int
        return suggest(field, *self.limits(), log=self.log)

    def applies(self, values: dict[str, Any]) -> bool:
        """Whether every field of `when` has one of its values."""
        return all(
            values[field] in (allowed if isinstance(allowed, list) else [allowed])
            for field, allowed in self.when.items()
        )


Space = dict[str, Dimension]
"""Field -> its values; a field comes after those that its `when` names."""


def read_space(path: str | Path) -> Space:
    """Read a search space from a YAML file.

    Raises: LabError naming the wrong line: an unknown field, missing limits, a `when` that names a later field, a
        value that the configuration does not take.
    """
    if not Path(path).is_file():
        raise LabError(f"search space {path} does not exist; give the path of a .yaml file.")
    lines, space = load_yaml(path), {}
    if not isinstance(lines, dict) or not lines:
        raise LabError(f"{path} must contain `field: {{type: ..., ...}}` lines.")
    for field, line in lines.items():
        where = f"{path}: {field}"
        try:
            space[field] = Dimension.model_validate(line)
        except ValidationError as error:
            first = error.errors()[0]
            name = "".join(f"{part}: " for part in first["loc"])
            raise LabError(f"{where}: {name}{first['msg'].removeprefix('Value error, ')}.") from None
        for other in (field, *space[field].also):
            _check_field(where, other)
            for limit in space[field].limits():
                Config(**{other: limit})  # raises where the configuration does not take it
        for other in space[field].when:
            _check_field(where, other)
            if other not in space and other in lines:
                raise LabError(f"{where}: when names {other!r}, which must come before it.")
    return space


def _check_field(where: str, field: str) -> None:
    if field not in Config.model_fields:
        hint = nearest(field, list(Config.model_fields)) or "."
        raise LabError(f"{where}: {field!r} is not a field of the configuration{hint}")


def suggest(space: Space, trial: Any, config: Config) -> dict[str, Any]:
    """A trial's value of every field that applies; the other fields keep the configuration's."""
    values: dict[str, Any] = {}
    for field, dimension in space.items():
        if dimension.applies({**dict(config), **values}):
            values.update(dict.fromkeys((field, *dimension.also), dimension.suggest(trial, field)))
    return values


def expand(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """A trial's values of all fields, from the sampled ones."""
    return {name: value for field, value in params.items() for name in (field, *space[field].also)}


def describe(space: Space) -> dict[str, str]:
    """Each field's values in one line; equal for equal spaces."""
    return {field: dimension.model_dump_json(exclude_defaults=True) for field, dimension in space.items()}


# --- Studies ---
#
# A study is a folder. trials/0007/ contains the run of a trial and trial.json: the trial's values when it starts, its
# result when it ends. The process that runs a trial holds the lock file beside it, which the system frees when the
# process ends. So a trial that has neither ended nor is locked was interrupted: the next process continues it, with
# the same values and from the run's checkpoint, and a study that was killed has the trials of an undisturbed one.


def read_study(folder: Path, seed: int = 0, without: Path | None = None) -> optuna.Study:
    """The trials of a study's folder as an Optuna study in memory.

    Args:
        seed: of the values that its `ask` samples, by TPE.
        without: file of a trial that is left out.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(study_name=folder.name, direction="maximize", sampler=sampler, pruner=pruner)
    study.add_trials([_read_trial(path) for path in _trial_files(folder) if path != without])
    return study


def _trial_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("trials/*/trial.json"))


def _read_trial(path: Path) -> FrozenTrial:
    trial = read_json(path)
    trial["state"] = TrialState[trial["state"]]
    for field, text in trial["distributions"].items():
        trial["distributions"][field] = optuna.distributions.json_to_distribution(text)
    trial["intermediate_values"] = {int(epoch): v for epoch, v in trial["intermediate_values"].items()}
    return optuna.trial.create_trial(**trial)


def _write_trial(path: Path, trial: FrozenTrial) -> None:
    to_json = optuna.distributions.distribution_to_json
    content = {
        "state": trial.state.name,
        "value": trial.value,
        "params": trial.params,
        "distributions": {field: to_json(values) for field, values in trial.distributions.items()},
        "intermediate_values": trial.intermediate_values,
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,  # what the pruner has compared
    }
    write_json(path, content)


@contextmanager
def next_trial(folder: Path, num_trials: int) -> Iterator[Path | None]:
    """File of the first trial that has not ended and that no process runs, locked; None if there is none."""
    for number in range(num_trials):
        path = folder / "trials" / f"{number:04d}" / "trial.json"
        with ExitStack() as lock:
            try:
                lock.enter_context(locked(path.with_name("lock"), timeout=0))
            except Timeout:
                continue
            if not path.is_file() or not _read_trial(path).state.is_finished():
                yield path
                return
    yield None


def check_study(folder: Path, name: str, content: dict[str, str]) -> None:
    """Keep in study.json what the trials of a study have in common.

    Raises: OtherStudyError if the folder contains trials with something else in common.
    """
    if any((folder / old).exists() for old in ("study.journal", "study.db")):
        raise OtherStudyError(f"{folder} contains a study of an earlier version; give another folder.")
    known = read_json(folder / "study.json")
    before = known.get(name, content)
    wrong = [part for part in sorted(before.keys() | content.keys()) if before.get(part) != content.get(part)]
    if wrong:
        raise OtherStudyError(
            f"{folder} contains a study of another {wrong[0]} ({before.get(wrong[0])} there, "
            f"{content.get(wrong[0])} here); give this one another folder."
        )
    if name not in known:
        write_json(folder / "study.json", {**known, name: content})


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained to their end."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """One row per trial: `number`, `state`, `value` (the last one if pruned), `epochs`, `reason`, the fields tried."""
    rows = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": np.nan if trial.value is None else trial.value,
            "epochs": trial.last_step or 0,
            "reason": trial.user_attrs.get("reason", ""),
            **trial.params,
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    return pd.DataFrame(rows)


# --- Searches ---


DATA_FIELDS = frozenset({"data_dir", "reader", "train_splits", "val_splits", "max_samples", "split_seed"})
"""A space with one of these has trials over different data on purpose."""

FAILURES = (LabError, RuntimeError, ValueError, ArithmeticError, MemoryError, OSError)
"""Errors that end one trial and not the study."""


class OtherStudyError(LabError):
    """The folder contains a study of another space, configuration or data."""


def study_folder(config: Config, space: str | Path) -> Path:
    """Default folder of a configuration's study over a space."""
    return config.runs_dir / "tuning" / f"{config.preset}_{Path(space).stem}"


def tune(
    config: Config,
    space: Space,
    folder: str | Path,
    *,
    num_trials: int = 60,
    timeout: float = math.inf,
    trial_settings: dict[str, Any] | None = None,
    show: bool = True,
    train: Callable[..., Run] = fit,
) -> optuna.Study:
    """Search a space, or resume a search; the best settings are written to best_config.yaml in the folder.

    Values are sampled by TPE; after each epoch successive halving (ASHA, Li et al. 2020) stops a trial that is
    behind those before it. A trial's value is its best validation `best_metric`. A trial that fails is kept with its
    reason. Several processes may search in one folder at the same time.

    Args:
        config: what every trial starts from.
        folder: of the study; its trials' runs are in `trials/`, without checkpoints.
        num_trials: of all processes and all calls together.
        timeout: seconds after which no further trial starts.
        trial_settings: fields that differ in trials only, such as `train_splits=("tune",)`.
        train: called with a trial's configuration, `show` and `on_epoch`.
    Returns: the Optuna study. Interrupted (Ctrl-C), it raises a KeyboardInterrupt of one line; the next call resumes.
    Raises: LabError if the folder contains a study of another space, configuration or data, or no trial finished;
        DiskFullError if no space is left, after which the same call resumes.
    """
    folder = Path(folder)
    trial_config = config.updated(**{"checkpoint_dir": None, **(trial_settings or {})})
    check_study(folder, "about", {**describe(space), "configuration": _settings(trial_config)})
    running, start = True, time.monotonic()
    with tqdm(total=num_trials, desc=folder.name, unit="trial", disable=not show) as bar:
        while running:
            study = read_study(folder)
            write_best(study, config, space, folder)  # also what a killed process has left to write
            _show(bar, study, config.best_metric)
            if time.monotonic() - start > timeout:
                break
            with next_trial(folder, num_trials) as path:
                running = path is not None
                if path is not None:
                    try:
                        run_trial(path, trial_config, space, train)
                    except KeyboardInterrupt:
                        line = (
                            f"stopped in trial {int(path.parent.name)} of {folder}; run again to continue it."
                        )
                        raise StoppedAtOnceError(line) from None
                    _remove_weights(folder)
    if not completed(study):
        reasons = [t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs]
        reason = reasons[0] if reasons else "none was completed; raise num_trials or timeout."
        raise LabError(f"no trial of {folder} has finished: {reason}")
    return study


def _settings(config: Config) -> str:
    """What all trials have in common, folders apart."""
    changes = {name: value for name, value in config.changes().items() if not name.endswith("_dir")}
    return yaml.safe_dump({"preset": config.preset, **changes}, default_flow_style=True, width=10**6).strip()


def _show(bar: tqdm, study: optuna.Study, metric: str) -> None:
    if completed(study):
        bar.set_postfix({f"best {metric}": f"{study.best_value:.4g}"}, refresh=False)
    bar.n = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    bar.refresh()


def run_trial(path: Path, config: Config, space: Space, train: Callable[..., Run] = fit) -> None:
    """Train one trial's values and write the result; an interrupted trial continues with the values of its file."""
    folder, metric = path.parents[2], config.best_metric
    seed = np.random.SeedSequence((config.seed, int(path.parent.name))).generate_state(1)[0]
    study = read_study(folder, int(seed), without=path)
    if path.is_file():
        study.enqueue_trial(_read_trial(path).params)
    trial = study.ask()
    values = suggest(space, trial, config)

    def state() -> FrozenTrial:
        return study.get_trials(deepcopy=False)[trial.number]

    def report(history: pd.DataFrame) -> None:
        measured = history.dropna(subset=[metric]) if metric in history else history.iloc[:0]
        for epoch, value in zip(measured["epoch"].astype(int), measured.get(metric, []), strict=True):
            if epoch in state().intermediate_values:
                continue
            trial.report(float(goodness(value, metric)), epoch)
            if epoch < config.num_epochs and trial.should_prune():
                raise optuna.TrialPruned

    _write_trial(path, state())
    try:
        run = train(config.updated(**values, runs_dir=path.parent), show=False, on_epoch=report)
        if not run.finished:
            raise KeyboardInterrupt  # the trial has not ended, and the next call continues it
        digests = {
            f"digest of the {part} data": about["sha256"]
            for part, about in run.training.get("data", {}).items()
        }
        if digests and not DATA_FIELDS & space.keys():
            check_study(folder, "data", digests)
        report(run.history)
        value = float(goodness(run.history[metric], metric).max())
        if math.isnan(value):
            raise LabError(f"its {metric} is nan")
        study.tell(trial, value)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except FAILURES as error:
        if is_disk_full(error):
            raise error if isinstance(error, LabError) else disk_full(path) from error
        if isinstance(error, OtherStudyError):
            raise
        trial.set_user_attr("reason", f"{type(error).__name__}: {error}")
        study.tell(trial, state=TrialState.FAIL)
    _write_trial(path, state())


def _remove_weights(folder: Path) -> None:
    """Delete the checkpoints of all ended trials, and their weights except those of the best trial."""
    trials = {path.parent: _read_trial(path) for path in _trial_files(folder)}
    values = {home: t.value for home, t in trials.items() if t.value and t.state == TrialState.COMPLETE}
    best = max(values, key=values.__getitem__, default=None)
    for home in (home for home, trial in trials.items() if trial.state.is_finished()):
        for checkpoints in home.glob("*/checkpoints"):
            shutil.rmtree(checkpoints, ignore_errors=True)
        for weights in home.glob("*/best.safetensors") if home != best else ():
            weights.unlink(missing_ok=True)


def best_config(study: optuna.Study, config: Config, space: Space) -> Config:
    """The configuration with the best trial's values. Raises: LabError if no trial has finished."""
    if not completed(study):
        raise LabError("no trial of this study has finished; run more.")
    return config.updated(**expand(space, study.best_params))


def write_best(study: optuna.Study, config: Config, space: Space, folder: Path) -> None:
    """Write the best settings once a trial has finished: best_config.yaml, as `train.py --config` takes it,
    best_hyperparameters.txt, one searched field per line, and best_results.json, the best trial's value beside them."""
    if completed(study):
        best = best_config(study, config, space)
        content = {"preset": best.preset, **best.changes()}
        write_text(folder / "best_config.yaml", yaml.safe_dump(content, sort_keys=False))
        found = expand(space, study.best_params)
        lines = [f"{field}: {value}\n" for field, value in found.items()]
        write_text(folder / "best_hyperparameters.txt", "".join(lines))
        results = {config.best_metric: study.best_value, "trial": study.best_trial.number, "settings": found}
        write_json(folder / "best_results.json", results)


def study_figures(study: optuna.Study, metric: str, folder: Path | None = None) -> dict[str, Figure]:
    """Optuna's figures of a study: history, importance (fANOVA, Hutter et al. 2014), parallel coordinates, slices.

    The last two show the most important fields.

    Args: folder: where each is saved as PNG.
    Raises: LabError if no trial has finished.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter
    from optuna.visualization import matplotlib as draw

    if not completed(study):
        raise LabError("no trial of this study has finished; there is nothing to plot.")
    fields = list(study.best_params)
    axes: dict[str, Any] = {}
    style: Any = {"figure.figsize": (8, 4), "savefig.bbox": "tight"}  # Optuna sets the rest, globally
    with pyplot.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of values that are all equal, and of Optuna's experimental functions
        axes["history"] = draw.plot_optimization_history(study, target_name=metric)
        if len({trial.value for trial in completed(study)}) > 1:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            fields = list(optuna.importance.get_param_importances(study, evaluator=evaluator))
            axes["importance"] = draw.plot_param_importances(study, evaluator=evaluator, target_name=metric)
        axes["parallel"] = draw.plot_parallel_coordinate(study, params=fields[:6], target_name=metric)
        axes["slices"] = draw.plot_slice(study, params=fields[:4], target_name=metric)
        for panel in np.ravel(axes["slices"]):
            panel.tick_params("x", labelrotation=30)
            panel.xaxis.set_minor_formatter(NullFormatter())
        figures = {name: np.ravel(panels)[0].figure for name, panels in axes.items()}
        for name, figure in figures.items():
            saved(figure, folder and folder / f"{name}.png")
            pyplot.close(figure)
    return figures


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
    """Train and compare every combination; finished runs are only read, interrupted ones are resumed.

        run_grid(config, {"use_batch_norm": [False, True], "seed": [0, 1, 2]})

    Args:
        grid: field -> values; seeds are averaged in the table.
        show: one progress bar over the whole grid, one step per epoch.
    Returns: `compare_runs` of the combinations finished so far; after an interruption the next call resumes.
    Raises: LabError as `grid_settings`, or if not one combination is finished.
    """
    runs = [run for run in train_all(grid_settings(config, grid), show=show) if run.finished]
    return compare_runs(runs)


def grid_table(config: Config, tables: Mapping[str, Mapping[str, dict[str, Any]]]) -> pd.DataFrame:
    """Train a configuration under every combination of named settings; one row per combination.

        grid_table(config, {"head": {"mlp": {"image_head": "mlp"}, ...}, "loss": {...}})

    Interrupted, the table contains what is finished, and the next call resumes.

    Args: tables: name of a column -> name of a setting -> its fields; a later column's fields replace earlier ones.
    Returns: recalls of the first test split in percent with their 95 % intervals, and seconds of training.
    """
    combinations = list(product(*tables.values()))
    settings = []
    for names in combinations:
        fields = [table[name] for table, name in zip(tables.values(), names, strict=True)]
        settings.append(config.updated(**{field: value for part in fields for field, value in part.items()}))
    rows = []
    for names, run in zip(combinations, train_all(settings), strict=False):
        row: dict[str, Any] = dict(zip(tables, names, strict=True))
        if run.finished:
            metrics = evaluate_run(run, show=False)[run.config.test_splits[0]]
            row |= {name: with_interval(metrics, name) for name in recalls_of(metrics)}
            row["seconds"] = round(run.training["train_seconds"], 1)
        rows.append(row)
    return pd.DataFrame(rows).set_index(list(tables))


def train_all(settings: Sequence[Config], *, show: bool = True) -> list[Run]:
    """Train every configuration in turn with one progress bar; stops after one that was interrupted."""
    runs: list[Run] = []
    with tqdm(total=sum(setting.num_epochs for setting in settings), unit="epoch", disable=not show) as bar:
        for setting in settings:

            def move(history: Sized, start: float = bar.n) -> None:
                bar.update(start + len(history) - bar.n)

            bar.set_description(f"{len(runs) + 1} of {len(settings)}: {run_name(setting)}")
            runs.append(fit(setting, show=False, on_epoch=move))
            if not runs[-1].finished:
                done = f"{len(runs) - 1} of {len(settings)} finished"
                bar.write(f"stopped in {runs[-1].name}, {done}; run again to continue.")
                break
            move(range(setting.num_epochs))  # a run that stopped early counts all of its epochs
    return runs


# --- Command line ---


def compare(configs: Sequence[Config]) -> None:
    """Train every configuration and print one table of the finished runs."""
    runs = [run for run in train_all(configs) if run.finished]
    print(readable(compare_runs(runs)).to_string())


def main(
    config: Config,
    space: str = "configs/tuning/default.yaml",
    num_trials: int = 60,
    folder: str = "",
    tune_split: str = "",
    timeout: float = math.inf,
    n_jobs: int = 1,
) -> None:
    """Search, draw the study's figures, and print the best trials and the output paths."""
    dimensions = read_space(space)
    home = Path(folder) if folder else study_folder(config, space)
    settings = {"train_splits": (tune_split,)} if tune_split else {}
    search = partial(
        tune, config, dimensions, home, num_trials=num_trials, timeout=timeout, trial_settings=settings
    )
    with ProcessPoolExecutor(max(1, n_jobs - 1), multiprocessing.get_context("spawn")) as others:
        jobs = [others.submit(search, show=False) for _ in range(n_jobs - 1)]
        study = search()
        for job in jobs:
            study = job.result()
    study_figures(study, config.best_metric, home / "figures")
    best = trials_table(study).query("state == 'complete'").nlargest(5, "value")
    print(best.drop(columns=["state", "reason"]).to_string(index=False))
    print(f"{home}: best_config.yaml, best_hyperparameters.txt, best_results.json, figures/, trials/")
