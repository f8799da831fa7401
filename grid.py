"""The ablation grid: every combination of some fields' values, trained once, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from itertools import product
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from comparison import compare_runs
from config import Config, run_name
from errors import LabError
from train import fit
from utils import Run


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
