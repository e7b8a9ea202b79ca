"""The process that measures: one workload of `bench_gpu` after another, each row written the moment it is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmbench.bench_gpu_workloads import PREFETCHED, Workload

TESTS_S = 100.0
ROWS, MACHINE = "rows.jsonl", "machine.json"
ROOT = Path(__file__).resolve().parents[1]
FRESH = 3
"""Exit code of a worker whose row is written and whose process is no longer fit for another."""
NAME = "» "
"""A line of the worker that begins with it names the workload that starts."""


def work(out: Path, workloads: list[Workload], smoke: bool) -> int:
    """`VLMBENCH_COMMIT` names the source where it is no checkout, as on a machine to which only the files were copied."""
    import torch

    from vlmbench import header
    from vlmbench.errors import RunError, UsageError
    from vlmbench.graphs import CudaGraphs

    if not smoke and not torch.cuda.is_available():
        print("No CUDA device is here; SMOKE=1 rehearses the same on a CPU.")
        return 2
    deadline = float(os.environ["VLMBENCH_DEADLINE"])
    device = "cpu" if smoke else "cuda"
    commit = os.environ.get("VLMBENCH_COMMIT") or header.source_name()
    _machine(out, device, commit)
    for each in workloads:
        left = deadline - time.time()
        if left < each.about_s and not smoke:
            print(f"skipped {each.name}: it may take {each.about_s} s and {max(0, left):.0f} s are left")
            continue
        print(f"{NAME}{each.name} ({left:.0f} s left)")
        begin = time.monotonic()
        cut_off = False
        try:
            line = _tests(left) if each.op == "tests" else _bench(out, each, device, commit)
        except subprocess.TimeoutExpired as error:
            line, cut_off = f"failed {each.name}: not done after {error.timeout:.0f} s", True
        except (RunError, UsageError) as error:
            line = f"failed {each.name}: {error}"
        print(f"{line} [{time.monotonic() - begin:.1f} s]")
        # The tests' own processes, still on the card, end with this one's group; and after a failed capture the device's
        # random numbers, with which models are filled, may not work any more.
        if cut_off or CudaGraphs.failed:
            return FRESH
        if not smoke:
            torch.cuda.empty_cache()
    return 0


def _bench(out: Path, workload: Workload, device: str, commit: str | None) -> str:
    from vlmbench import bench

    shape, options = workload.split()
    if "memory_gb" in options:
        both = bench.bench_offload(workload.method, shape, device=device, dtype=None, **options)
        # The row that counts as the workload's comes last: until then nothing was measured.
        rows = dict(zip((workload.name + PREFETCHED, workload.name), both.values(), strict=True))
    else:
        settings = {"rounds": 7, "check": False} | options
        rows = {workload.name: bench.bench(workload.op, workload.method, shape, device=device, dtype=None, **settings)}
    for name, row in rows.items():
        if device == "cpu":
            row["marks"] = [*row["marks"], "smoke"]
        with (out / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"workload": name, "commit": commit, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return bench.to_text([*rows.values()])


def _tests(left: float) -> str:
    """The tests marked gpu, in files that hold any: others import what is not on that machine. Raises `TimeoutExpired`."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        return "skipped gpu-tests: there are none"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    if find_spec("xdist"):  # most of their time is the compiler's, on one core each
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(TESTS_S, left))  # noqa: S603
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode:
        print("\n".join(last[-40:]))
        return f"failed gpu-tests: {last[-1] if last else 'no output'}"
    return f"gpu-tests: {last[-1]}"


def _machine(out: Path, device: str, commit: str | None) -> None:
    """What the rows were measured on, and the rates that this device reaches."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from vlmbench import ceiling
    from vlmbench.machine import pick_dtype

    on = torch.device(device)
    facts: dict[str, Any] = {
        "commit": commit,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
            print(f"{name} is not installed here; what needs it takes its reference path and is marked masked.")
    if device == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        facts |= {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "cuda": torch.version.cuda,
            "driver": driver.read_text().split("\n", 1)[0] if driver.exists() else None,
        }
    reached = ceiling.measure(on, pick_dtype(None, on))
    facts |= {"device_flops": reached.flops_per_s, "device_bytes_per_s": reached.bytes_per_s}
    (out / MACHINE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(
        f"{facts['device']}: {reached.flops_per_s / 1e12:.4g} TFLOP/s and {reached.bytes_per_s / 1e12:.3g} TB/s "
        f"reached; torch {facts['torch']}, triton {facts['triton']}"
    )
