"""Measures a finished run's test splits once, and keeps figures and ranks in its folder."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

import plots
from cache import atomic_path
from errors import LabError
from gallery import Gallery, open_gallery
from ranks import QueryRanks, Ranks
from runs import Run, write_json

RANK_FIELDS = [field.name for field in fields(QueryRanks)]


def evaluate_run(run: Run, *, again: bool = False, show: bool = True) -> dict[str, dict[str, Any]]:
    """Metrics of a run's test splits, measured once and kept in metrics.json, and their figures.

    Args:
        again: measure anew.
    Returns: split -> metrics; recalls in [0, 1].
    """
    measured(run, again=again, show=show)
    figures = run.folder / "figures"
    plots.learning_curves({run.name: run.history}, figures / "learning_curves.png", best_epoch=run.best_epoch)
    for split in run.config.test_splits:
        found = run.metrics[split]
        if recalls_of(found):
            plots.recall_bars(found, figures / f"recall_{split}.png", chance=chance(found))
    return run.metrics


def measured(run: Run, *, again: bool = False, show: bool = True) -> dict[str, dict[str, Any]]:
    """`evaluate_run` without figures."""
    for split in run.config.test_splits:
        if again or "gallery" not in run.metrics.get(split, {}):
            keep_measured(open_gallery(run, split, show=show))
    return run.metrics


def keep_measured(gallery: Gallery) -> None:
    """Measure a gallery and write its figures into its run's metrics.json, its ranks beside it."""
    run = gallery.run
    run.metrics[gallery.split] = gallery.metrics()
    if not gallery.measures_itself:
        save_ranks(gallery.ranks, ranks_path(run, gallery.split), gallery.fingerprint)
    write_json(run.folder / "metrics.json", run.metrics)


# --- figures ---


def chance(metrics: dict[str, Any]) -> dict[str, float]:
    """Recalls of a random ranking, by the metric they stand beside."""
    return {
        name.replace("_chance@", "_recall@"): value for name, value in metrics.items() if "_chance@" in name
    }


def is_recall(name: str) -> bool:
    return bool(re.fullmatch(r"(i2t|t2i)_recall@\d+", name))


def recalls_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The recalls among the figures, without their intervals' ends."""
    return {name: value for name, value in metrics.items() if is_recall(name)}


def figures_of(metrics: dict[str, Any]) -> dict[str, float]:
    """What a table shows: the recalls, or every number where the data set measures itself."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not re.search(r"^num_|^left_out$|_(low|high)$", name)
    }
    return recalls_of(metrics) or numbers


def as_text(name: str, value: float) -> str:
    """A figure as tables show it: recalls and their chance levels in percent, others to three digits."""
    if "recall@" in name or "chance@" in name:
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def told(metrics: dict[str, Any], name: str) -> str:
    """A figure with its interval where one is known: `27.1 [25.0, 29.3]`."""
    ends = [as_text(name, metrics[end]) for end in (f"{name}_low", f"{name}_high") if end in metrics]
    return as_text(name, metrics[name]) + (f" [{', '.join(ends)}]" if ends else "")


def metrics_table(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Figures with intervals and protocol, recalls in percent; a row a split and one for its chance level."""
    rows = []
    for split, found in metrics.items():
        sizes = {"images": found["num_images"], "captions": found["num_texts"]}
        protocol = {"split": split, "protocol": found["protocol"], **sizes}
        rows.append({**protocol, "": "model", **{name: told(found, name) for name in figures_of(found)}})
        by_chance = {name: as_text(name, value) for name, value in chance(found).items()}
        rows += [{**protocol, "": "chance", **by_chance}] if by_chance else []
    return pd.DataFrame(rows).fillna("").set_index(["split", "protocol", "images", "captions", ""])


# --- ranks kept beside metrics.json ---


def ranks_path(run: Run, split: str) -> Path:
    return run.folder / f"ranks_{split}.npz"


def ranks_of(run: Run, split: str, *, show: bool = True) -> Ranks:
    """The ranks of a run's split as they were measured; measured now where they were not kept.

    Raises: LabError if they belong to another gallery than the figures in metrics.json.
    """
    path = ranks_path(run, split)
    if not path.is_file():
        keep_measured(open_gallery(run, split, show=show))
    return load_ranks(path, run.metrics[split]["gallery"])


def save_ranks(ranks: Ranks, path: Path, gallery: str) -> None:
    """Write ranks whole or not at all, with the fingerprint of their gallery."""
    arrays: dict[str, Any] = {
        f"{way}_{name}": np.asarray(value)
        for way in ("i2t", "t2i")
        for name in RANK_FIELDS
        if (value := getattr(getattr(ranks, way), name)) is not None
    }
    with atomic_path(path) as beside, open(beside, "wb") as file:
        np.savez_compressed(file, gallery=np.array(gallery), **arrays)


def load_ranks(path: Path, gallery: str) -> Ranks:
    """Read what `save_ranks` wrote. Raises: LabError if it is damaged or of another gallery."""
    try:
        with np.load(path) as kept:
            arrays = {name: kept[name] for name in kept.files}
        ways = [_query_ranks(arrays, way) for way in ("i2t", "t2i")]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise LabError(f"{path} cannot be read ({error}); evaluate the run again (--again).") from error
    if arrays["gallery"].item() != gallery:
        raise LabError(f"{path} holds ranks of another gallery; evaluate the run again (--again).")
    return Ranks(*ways)


def _query_ranks(arrays: dict[str, np.ndarray], way: str) -> QueryRanks:
    kept = [name for name in RANK_FIELDS if name != "crowd" or f"{way}_crowd" in arrays]
    parts: dict[str, Any] = {name: arrays[f"{way}_{name}"] for name in kept}
    numbers = {name: int(parts[name]) for name in ("gallery_size", "num_left_out")}
    return QueryRanks(**{**parts, **numbers})
