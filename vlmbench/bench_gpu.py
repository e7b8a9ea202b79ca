"""One line for whoever has a GPU for ten minutes: the fixed workloads, most important first (``make bench-gpu OUT=dir``).

A worker process measures and writes each row the moment it is known; this one only watches the time. A workload that
crashes costs itself and a new worker, one that would not fit in what is left is skipped and said so, and being killed loses
what was not reached. Needs torch and transformers and no network, no decoder, no data set, no installation.
``--smoke`` rehearses the same on a CPU with tiny shapes; its rows are marked and are no GPU figures.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vlmbench.bench_gpu_watch import LOG, Watch
from vlmbench.bench_gpu_worker import MACHINE, ROWS, work
from vlmbench.bench_gpu_workloads import SMOKE, WORKLOADS, Workload

__all__ = ["BUDGET_S", "LOG", "MACHINE", "ROWS", "SMOKE", "WORKLOADS", "Watch", "Workload", "main"]

BUDGET_S = 540


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every workload of the part was measured or skipped for lack of time, 1 when one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; no GPU figure is written")
    parser.add_argument("--part", type=int, default=1, choices=(1, 2))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.worker is not None:
        return work(given.out, [_named(name) for name in given.worker], given.smoke)
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in (SMOKE if given.smoke else WORKLOADS) if each.part == given.part]
    with (given.out / LOG).open("a", encoding="utf-8") as log:
        return Watch(given.out, log, time.monotonic() + given.budget, given.smoke).run(chosen)


def _named(name: str) -> Workload:
    return next(each for each in (*WORKLOADS, *SMOKE) if each.name == name)


if __name__ == "__main__":
    # A way out through `finally`: the worker is in a group of its own, which no shell's or timeout's signal reaches.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
