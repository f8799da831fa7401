"""Studies that outlive their workers: storage, who works on which trial, and what became of dead workers' trials."""

from __future__ import annotations

import os
import platform
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from errors import LabError

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
