"""The notebooks' controls and live views; each is also a plain call.

| control | the same as a plain call |
|---|---|
| `experiment_form(config)` | `config[name] = value` |
| `search_box(gallery)` | `search_figure(GallerySearch.of(gallery), query)` |
| `zero_shot_playground(gallery)` | `zero_shot_figure(run, picture, labels)` |
| `attention_explorer(gallery)` | `attention_figure(gallery, first)` |
| `failure_explorer(gallery)` | `failure_figure(gallery, first)` |
| `run_browser(runs_dir)` | `runs_table(runs, baseline)`, `runs_figure(runs)` |
| `data_browser(table)` | `browse_figure(table, words)`, `check_flags(report)` |
| `fit(config, on_epoch=live_training(config))` | `plots.learning_curves({name: run.history})` |
"""

from __future__ import annotations

from controls import experiment_form
from explorers import (
    attention_explorer,
    attention_figure,
    browse_figure,
    check_flags,
    data_browser,
    failure_explorer,
    failure_figure,
    run_browser,
    runs_figure,
    runs_table,
    search_box,
    search_figure,
    zero_shot_figure,
    zero_shot_playground,
)
from live import live_curves, live_training

__all__ = [
    "attention_explorer",
    "attention_figure",
    "browse_figure",
    "check_flags",
    "data_browser",
    "experiment_form",
    "failure_explorer",
    "failure_figure",
    "live_curves",
    "live_training",
    "run_browser",
    "runs_figure",
    "runs_table",
    "search_box",
    "search_figure",
    "zero_shot_figure",
    "zero_shot_playground",
]
