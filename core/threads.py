"""How long OpenMP's threads spin while they wait; imported before torch, which reads it once.

By default they spin for milliseconds before they sleep. Beside another busy process the thread they wait for is often
not running, so a training step or a metric takes up to ten times as long (benchmarks/results/two_cores.md).
"""

from __future__ import annotations

import os

SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}  # turns of GNU's loop (25 us); milliseconds of LLVM's
if not {"OMP_WAIT_POLICY", *SPIN} & os.environ.keys():  # what the user has set stays
    os.environ.update(SPIN)
