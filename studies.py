"""Search spaces, and studies that outlive their workers: storage, who tries what, who resumes a dead one's trial."""

from __future__ import annotations

import platform
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
from filelock import FileLock, Timeout
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from sqlalchemy.exc import SQLAlchemyError

from config import Config, load_yaml
from errors import LabError, nearest

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
