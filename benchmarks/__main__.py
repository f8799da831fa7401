"""`python -m benchmarks [NAME ...]` runs the named benchmarks, or all: lab, data, metrics, text."""

from __future__ import annotations

import sys

from benchmarks import bench_data, bench_lab, bench_metrics, bench_text
from cli import one_sentence
from errors import choose

BENCHMARKS = {
    "lab": bench_lab.main,
    "data": bench_data.main,
    "metrics": bench_metrics.main,
    "text": bench_text.main,
}

if __name__ == "__main__":
    with one_sentence():
        for run in [choose(BENCHMARKS, name, "benchmark") for name in sys.argv[1:] or BENCHMARKS]:
            run()
