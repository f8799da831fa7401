"""Search spaces, and studies that outlive their workers: storage, who tries what, what a dead worker leaves behind."""

from __future__ import annotations

import os
import platform
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from config import Config
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
    try:
        lines = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
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

DIED = "its worker died; tried again"
LOCK_SECONDS = 120


def open_storage(storage: str, folder: Path) -> BaseStorage:
    """Where a study is kept.

    Args:
        storage: `sqlite` (one process), `journal` (several processes), both files in the folder; or the URL
            of a database, for several machines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if storage == "sqlite":
        return RDBStorage(f"sqlite:///{folder / 'study.db'}")
    if storage == "journal":
        path = str(folder / "study.journal")
        # the usual lock is a symbolic link, which Windows gives to administrators alone
        lock = JournalFileOpenLock(path) if os.name == "nt" else None
        return JournalStorage(JournalFileBackend(path, lock_obj=lock))
    if "://" in storage:
        return RDBStorage(storage)
    raise LabError(f"storage {storage!r} is none; choose sqlite, journal, or a database's URL.")


class Worker:
    """One process's part in a study: `with Worker(...) as worker`, then `worker.ask(...)` until it gives None.

    While it lives it holds the lock of a file of its own. Where a trial is running and that file is free, the
    trial's worker was killed: the trial is marked failed, and its values are tried again.

    Args:
        folder: of the study; workers that share it see one another's deaths.
        about: what the study is of, name -> text; must be equal for all its workers.
        storage: as in `open_storage`.
        seed: of the sampler; a trial's draw follows from it and the trial's number, so that a study that was
            cut goes on as it would have.
    Raises: LabError if the study is of something else, or another process uses a storage that only takes one.
    """

    def __init__(self, folder: Path, about: dict[str, str], storage: str = "sqlite", seed: int = 0) -> None:
        self.folder, self.storage, self.seed = folder, storage, seed
        self.name = f"{platform.node()}-{uuid.uuid4().hex[:12]}"
        self.about = about

    def __enter__(self) -> Worker:
        self.locks = [self._lock(f"workers/{self.name}")]
        if self.storage == "sqlite":
            self.locks.append(self._lock("study"))
        try:
            for lock in self.locks:
                lock.acquire(timeout=0)
        except Timeout as error:
            self.__exit__()
            raise LabError(
                f"another process works on {self.folder}; for several at once, start each with --storage journal."
            ) from error
        try:
            with self._turn():
                self.study = optuna.create_study(
                    study_name=self.folder.name,
                    storage=open_storage(self.storage, self.folder),
                    direction="maximize",
                    pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
                    load_if_exists=True,
                )
                self._check()
        except LabError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for lock in self.locks:
            lock.release()
        (self.folder / "workers" / f"{self.name}.lock").unlink(missing_ok=True)

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

    def ask(self, num_trials: int) -> Trial | None:
        """A trial to run, or None once as many were begun; trials that were tried again count once."""
        with self._turn():
            self._bury()
            begun = [t for t in self.trials() if t.state != TrialState.WAITING]
            died = sum(name.startswith("died_") for name in self.study.user_attrs)
            if len(begun) - died >= num_trials:
                return None
            seed = np.random.SeedSequence((self.seed, len(begun))).generate_state(1)[0]
            self.study.sampler = optuna.samplers.TPESampler(
                multivariate=True, group=True, constant_liar=True, seed=int(seed)
            )
            trial = self.study.ask()
            trial.set_user_attr("worker", self.name)
            return trial

    def _bury(self) -> None:
        """Mark the trials of dead workers failed, and have their values tried again."""
        for trial in self.trials():
            if trial.state != TrialState.RUNNING or self._lives(trial.user_attrs.get("worker")):
                continue
            place = {name: value for name, value in trial.user_attrs.items() if name != "worker"}
            self.study.set_user_attr(f"died_{trial.number}", DIED)
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params, user_attrs=place)

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
                "reason": trial.user_attrs.get("reason", study.user_attrs.get(f"died_{trial.number}", "")),
                **trial.params,
            }
        )
    return pd.DataFrame(rows)
