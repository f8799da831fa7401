"""`python -m benchmarks [NAME ...] [--option ...]` runs the named benchmarks, or all of them, with their options.

An unknown name lists what there is.
"""

from __future__ import annotations

import sys
from itertools import takewhile

from benchmarks import (
    bench_busy,
    bench_data,
    bench_engine,
    bench_heads,
    bench_ingredients,
    bench_lab,
    bench_metrics,
    bench_paired,
    bench_retrieval,
    bench_scratch,
    bench_search,
    bench_text,
    bench_tuning,
)
from core.errors import choose
from interface.cli import one_sentence

BENCHMARKS = {
    "lab": bench_lab.main,
    "engine": bench_engine.main,
    "ingredients": bench_ingredients.main,
    "data": bench_data.main,
    "text": bench_text.main,
    "metrics": bench_metrics.main,
    "search": bench_search.main,
    "heads": bench_heads.main,
    "tuning": bench_tuning.main,
    "paired": bench_paired.main,
    "retrieval": bench_retrieval.main,
    "scratch": bench_scratch.main,
    "busy": bench_busy.main,
}

if __name__ == "__main__":
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    del sys.argv[1 : 1 + len(names)]  # what is left are a benchmark's own options
    with one_sentence():
        for run in [choose(BENCHMARKS, name, "benchmark") for name in names or BENCHMARKS]:
            run()
