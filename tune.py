"""Search spaces, and studies that outlive their workers: storage, who tries what, who resumes a dead one's trial."""

from __future__ import annotations

import math
import platform
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from sqlalchemy.exc import SQLAlchemyError
from tqdm.auto import tqdm

from config import Config, load_yaml, make_config, run_name
from core.errors import LabError, nearest
from core.files import atomic_path, disk_full, is_disk_full
from evaluate import compare_runs, evaluate_run, readable
from interface.cli import Parser, one_sentence, parse_config, run_command
from metrics import recalls_of, told
from plots.style import saved
from plots.tuning import importances, parallel_coordinates, slices, study_history
from train import fit
from utils import Run, goodness

# --- Spaces ---


class Dimension(BaseModel):
    """The values of one field.

    Args:
        type: how values are drawn.
        low, high: both ends, included; of `float` and `int`.
        log: draw evenly over the logarithm.
        choices: of `categorical`.
        when: other fields and the value, or list of values, that each must have; else the field stays as
            the configuration has it.
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
    def _whole(self) -> Dimension:
        if self.type == "categorical":
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("type categorical takes choices, and no low or high")
            return self
        if self.low is None or self.high is None or self.choices:
            raise ValueError(f"type {self.type} takes low and high, and no choices")
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be less than high, and more than 0 where log is true")
        return self

    def ends(self) -> tuple[Any, ...]:
        """The choices, or low and high in the field's own type."""
        if self.type == "categorical":
            return self.choices
        make = float if self.type == "float" else int
        return tuple(make(end) for end in (self.low, self.high) if end is not None)

    def draw(self, trial: Any, field: str) -> Any:
        """A value, from an Optuna trial."""
        if self.type == "categorical":
            return trial.suggest_categorical(field, self.choices)
        suggest = trial.suggest_float if self.type == "float" else trial.suggest_int
        return suggest(field, *self.ends(), log=self.log)

    def applies(self, values: dict[str, Any]) -> bool:
        """Whether every field of `when` has one of its values."""
        return all(
            values[field] in (wanted if isinstance(wanted, list) else [wanted])
            for field, wanted in self.when.items()
        )


Space = dict[str, Dimension]
"""Field -> its values; a field stands after those that its `when` names."""


def read_space(path: str | Path) -> Space:
    """A space from its file.

    Raises: LabError naming the line that is wrong: an unknown field, ends that are none, a `when` that names
        a later field, a value that the configuration does not take.
    """
    space: Space = {}
    for field, given in _load(Path(path)).items():
        where = f"{path}: {field}"
        try:
            space[field] = Dimension.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = "".join(f"{part}: " for part in first["loc"])
            raise LabError(f"{where}: {name}{first['msg'].removeprefix('Value error, ')}.") from None
        for other in (field, *space[field].also):
            _check_field(where, other)
            for end in space[field].ends():
                Config(**{other: end})  # raises the one explanation
        for other in space[field].when:
            _check_field(where, other)
            if other not in space and other in _load(Path(path)):
                raise LabError(f"{where}: when names {other!r}, which must stand above it.")
    return space


def _check_field(where: str, field: str) -> None:
    if field not in Config.model_fields:
        hint = nearest(field, list(Config.model_fields)) or "."
        raise LabError(f"{where}: {field!r} is no field of the configuration{hint}")


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LabError(f"search space {path} does not exist; give the path of a .yaml file.")
    lines = load_yaml(path)
    if not isinstance(lines, dict) or not lines:
        raise LabError(f"{path} must hold `field: {{type: ..., ...}}` lines.")
    return lines


def draw(space: Space, trial: Any, config: Config) -> dict[str, Any]:
    """A trial's value of every field that applies; the others keep the configuration's."""
    values: dict[str, Any] = {}
    for field, dimension in space.items():
        if dimension.applies({**dict(config), **values}):
            values.update(dict.fromkeys((field, *dimension.also), dimension.draw(trial, field)))
    return values


def expand(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """A finished trial's values of all fields, from the drawn ones."""
    return {name: value for field, value in params.items() for name in (field, *space[field].also)}


def describe(space: Space) -> dict[str, str]:
    """Each field's values in one line; equal for equal spaces."""
    return {field: dimension.model_dump_json(exclude_defaults=True) for field, dimension in space.items()}


# --- Studies ---


optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

LOCK_SECONDS = 120


def open_storage(storage: str, folder: Path) -> BaseStorage:
    """Where a study is kept.

    Args:
        storage: `journal`, a file in the folder that several processes may share; or the URL of a database, for
            several machines.
    """
    if storage == "journal":
        path = folder / "study.journal"
        if path.is_file():
            _drop_unfinished_line(path)
        # the system frees this lock when its process is killed; Optuna's own ones stay for 30 s
        lock: Any = FileLock(f"{path}.flock")
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    if "://" in storage:
        return RDBStorage(storage)
    raise LabError(f"storage {storage!r} does not exist; choose journal, or give the URL of a database.")


def _drop_unfinished_line(path: Path) -> None:
    """Cut a journal behind its last whole line: a full disk or a kill may have left a part of one."""
    with FileLock(f"{path}.flock"), open(path, "r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


class Worker:
    """One process's part in a study: `with Worker(...) as worker`, then `worker.ask(...)` until it gives None.

    While it lives it holds the lock of a file of its own. Where a trial is running and that file is free, the
    trial's worker was killed: the next worker that asks resumes this very trial. So a study that was killed at
    any point has the trials of an undisturbed one.

    Args:
        folder: of the study; workers that share it see one another's deaths.
        about: what the study is of, name -> text; must be equal for all its workers.
        storage: as in `open_storage`.
        seed: of the sampler; a trial's values follow from it, the trial's number and the trials before.
    Raises: LabError if the study is of something else, or its storage cannot be opened.
    """

    def __init__(self, folder: Path, about: dict[str, str], storage: str = "journal", seed: int = 0) -> None:
        self.folder, self.storage, self.seed = folder, storage, seed
        self.name = f"{platform.node()}-{uuid.uuid4().hex[:12]}"
        self.about = about

    def __enter__(self) -> Worker:
        self.lock = self._lock(f"workers/{self.name}")
        self.lock.acquire()
        try:
            with self._turn():
                self.study = self._open()
                self._check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        (self.folder / "workers" / f"{self.name}.lock").unlink(missing_ok=True)

    def _open(self) -> optuna.Study:
        if self.storage == "journal" and (old := self.folder / "study.db").exists():
            raise LabError(
                f"{old} holds a study of an earlier version; give another folder, or --storage sqlite:///{old}."
            )
        try:
            return optuna.create_study(
                study_name=self.folder.name,
                storage=open_storage(self.storage, self.folder),
                direction="maximize",
                sampler=optuna.samplers.RandomSampler(),  # unused: `_add` draws all values of a trial
                load_if_exists=True,
            )
        except LabError:
            raise
        except (ValueError, LookupError, RuntimeError, ImportError, SQLAlchemyError, OptunaError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise LabError(
                f"the study in {self.folder} (storage {self.storage}) cannot be opened: {first}; "
                "give another folder, or check the storage."
            ) from error

    def _lock(self, name: str) -> FileLock:
        path = self.folder / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock("turn").acquire(timeout=LOCK_SECONDS):
            yield

    def _check(self) -> None:
        known = self.study.user_attrs.get("about")
        if known is None:
            self.study.set_user_attr("about", self.about)
        elif known != self.about:
            wrong = [n for n in sorted(known.keys() | self.about.keys()) if known.get(n) != self.about.get(n)]
            n = wrong[0]
            raise LabError(
                f"{self.folder} holds a study of another {', '.join(wrong)} ({n}: {known.get(n)} there, "
                f"{self.about.get(n)} here); give this one another folder."
            )

    def ask(self, num_trials: int, draw_values: Callable[[Trial], Any]) -> Trial | None:
        """A trial to run: one whose worker was killed, or a new one; None once as many were begun.

        Args: draw_values: draws all values of a new trial, as `draw` does.
        """
        with self._turn():
            trial = self._abandoned()
            if trial is None:
                if len(self.trials()) >= num_trials:
                    return None
                self._add(draw_values)
                trial = next(t for t in self.trials()[::-1] if t.user_attrs.get("worker") == self.name)
            resumed = Trial(self.study, trial._trial_id)
            resumed.set_user_attr("worker", self.name)
            return resumed

    def _abandoned(self) -> FrozenTrial | None:
        """The first running trial whose worker is dead."""
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and not self._lives(trial.user_attrs.get("worker")):
                latest = self.trials()[trial.number]
                # a worker that ended its trial and left since the first look is no dead one
                if latest.state == TrialState.RUNNING:
                    return latest
        return None

    def _add(self, draw_values: Callable[[Trial], Any]) -> None:
        """Add the next trial with all its values in one write, so that a kill leaves a whole trial or none."""
        number = len(self.trials())
        seed = np.random.SeedSequence((self.seed, number)).generate_state(1)[0]
        sampler = optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, seed=int(seed)
        )
        in_memory = optuna.create_study(direction="maximize", sampler=sampler)
        in_memory.add_trials(self.trials())
        trial = in_memory.ask()
        draw_values(trial)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={"worker": self.name},
            )
        )

    def _lives(self, worker: str | None) -> bool:
        """Whether a worker holds its lock; one of another machine whose lock is not here counts as alive."""
        if worker is None or worker == self.name:
            return worker is not None
        path = self.folder / "workers" / f"{worker}.lock"
        if not path.exists():
            return not worker.startswith(f"{platform.node()}-")
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
        path.unlink(missing_ok=True)
        return False

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)


def is_behind(study: optuna.Study, number: int) -> bool:
    """Whether a trial is below the best third at a rung that it has just reached (1, 3, 9, ... epochs).

    As Optuna's SuccessiveHalvingPruner, but a function of the reported values alone: asked again after a kill, it
    gives the same answer. That one notes which rungs it has judged before the verdict is carried out.

    Source: ASHA, Li et al. 2020.
    """
    trials = study.get_trials(deepcopy=False)
    *before, step = sorted(trials[number].intermediate_values)
    rung = 1
    while rung <= step:
        if all(earlier < rung for earlier in before):
            reached = [_at_rung(trial, rung) for trial in trials]
            values = sorted(value for value in reached if not np.isnan(value))
            if not trials[number].intermediate_values[step] >= values[-max(1, len(values) // 3)]:
                return True
        rung *= 3
    return False


def _at_rung(trial: FrozenTrial, rung: int) -> float:
    """A trial's value at its first report from a rung on; nan where it has none."""
    steps = [step for step in trial.intermediate_values if step >= rung]
    return trial.intermediate_values[min(steps)] if steps else np.nan


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """One row a trial: `number`, `state`, `value` (of a pruned one its last), `epochs`, `reason`, the fields tried."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        last = trial.last_step
        reached = trial.intermediate_values[last] if last is not None else np.nan
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "value": reached if trial.value is None else trial.value,
                "epochs": last or 0,
                "reason": trial.user_attrs.get("reason", ""),
                **trial.params,
            }
        )
    return pd.DataFrame(rows)


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
        "history": study_history(trials, metric),
        **({"importance": importances(shares)} if shares else {}),
        "parallel": parallel_coordinates(trials, metric, log),
        "slices": slices(trials, metric, log),
    }
    for name, figure in figures.items() if folder else ():
        saved(figure, Path(str(folder)) / f"{name}.png")
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
