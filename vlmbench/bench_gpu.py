"""One line for whoever has a GPU for ten minutes: the fixed workloads, most important first (``make bench-gpu OUT=dir``).

A worker process measures and writes each row the moment it is known; this one only watches the time. A workload that
crashes costs itself and a new worker, one that would not fit in what is left is skipped and said so, and being killed loses
what was not reached. Needs torch and transformers and no network, no decoder, no data set, no installation.
``--smoke`` rehearses the same on a CPU with tiny shapes; its rows are marked and are no GPU figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

BUDGET_S = 540
TESTS_S = 100.0
ROWS, LOG, MACHINE = "rows.jsonl", "log.txt", "machine.json"
ROOT = Path(__file__).resolve().parents[1]
FRESH = 3
"""Exit code of a worker whose row is written and whose process is no longer fit for another."""
NAME = "» "
"""A line of the worker that begins with it names the workload that starts."""


@dataclass(frozen=True)
class Workload:
    """One `vlmbench bench` call, or with `op` "tests" the tests marked gpu."""

    name: str
    op: str
    method: str = "full"
    options: tuple[tuple[str, Any], ...] = ()
    part: int = 1
    about_s: int = 30
    """What it is expected to take at most: it does not start with less left."""


def _of(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


PEVLM = "pevlm:sink=4,block=8"
LONG = {"frames": 256, "frame_tokens": 257}  # LongVILA's frames (contract, section 5)
HEADS = {"heads": 28, "kv_heads": 4, "head_dim": 128}
QWEN = {"shape": "qwen2.5-vl-7b"}
MILLION = {"frames": 3890, "frame_tokens": 257}
WORKLOADS = (
    Workload("gpu-tests", "tests", about_s=100),
    Workload("gpu-pevlm", "attention", PEVLM, _of(**LONG, **HEADS, check=True), about_s=70),
    Workload("gpu-prefill-whole", "prefill", PEVLM, _of(**QWEN, **LONG, rounds=3), about_s=90),
    Workload("gpu-pevlm-rivals", "attention", PEVLM, _of(**LONG, **HEADS, check=True, rivals=True), about_s=60),
    Workload("gpu-decode", "decode", "uniform:ratio=0.25", _of(**QWEN, frames=64, frame_tokens=256), about_s=70),
    Workload("gpu-vision", "vision", "full", _of(**QWEN, frames=16, frame_tokens=256), about_s=40),
    # The proof that a million tokens fit; three runs of it, of 15 s at the card's published rate.
    Workload("gpu-prefill-1m", "prefill", PEVLM, _of(**QWEN, **MILLION, rounds=1, alone=True), about_s=100),
    Workload("gpu-prefill-layer", "prefill", PEVLM, _of(**QWEN, **LONG, layers=1), 2, 50),
    Workload("gpu-prefill-uniform", "prefill", "uniform:ratio=0.25", _of(**QWEN, **LONG, layers=1), 2, 40),
    Workload("gpu-noise", "prefill", "full", _of(**QWEN, **LONG, layers=1), 2, 40),
    Workload("gpu-vision-llava", "vision", "full", _of(shape="llava-ov-7b", frames=32), 2, 40),
    # SigLIP-so400m/384, 32 frames: the tower of gpu-turbo that a preset has. At r=22 it takes 1.66 times fewer FLOPs.
    Workload("gpu-turbo-siglip", "vision", "turbo:r=22", _of(shape="llava-ov-7b", frames=32), 2, 60),
    # gpu-core's method and lengths on another shape: 576 visual tokens, 128 steps, and no LLaVA-1.5-7B.
    Workload(
        "gpu-core-qwen", "decode", "corematching:beta=0.4", _of(**QWEN, frames=9, frame_tokens=64, steps=128), 2, 90
    ),
    *(
        Workload(
            f"gpu-pevlm-{frames}",
            "attention",
            PEVLM,
            _of(frames=frames, frame_tokens=257, **HEADS, check=True),
            2,
            120 if frames > 512 else 40,
        )
        for frames in (512, 128, 64, 32, 1024)
    ),
    *(
        Workload(f"gpu-{method.partition(':')[0]}", "attention", method, _of(**LONG, **HEADS, check=True), 2)
        for method in ("star", "block:block=8", "ape:block=8,temperature=1,scale=1")
    ),
    Workload("gpu-pevlm-d64", "attention", PEVLM, _of(**LONG, shape="llava-ov-0.5b", check=True), 2),
    Workload("gpu-decode-short", "decode", "uniform:ratio=0.25", _of(**QWEN, frames=8, frame_tokens=256), 2, 60),
    Workload(
        "gpu-prefill-360k", "prefill", PEVLM, _of(**QWEN, frames=1400, frame_tokens=257, layers=1, rounds=3), 2, 120
    ),
)
TINY = {"frames": 12, "frame_tokens": 4, "rounds": 2}
TINY_ATTENTION = {**TINY, "heads": 4, "kv_heads": 2, "head_dim": 16}
TINY_MODEL = {**TINY, "shape": "mini-qwen2.5-vl", "layers": 2}
SMOKE = (
    Workload("smoke-pevlm", "attention", "pevlm:sink=2,block=2", _of(**TINY_ATTENTION, check=True, rivals=True)),
    Workload("smoke-prefill-layer", "prefill", "pevlm:sink=2,block=2", _of(**TINY_MODEL)),
    # What a card records as CUDA graphs is recorded as lists of operations.
    Workload("smoke-decode", "decode", "uniform:ratio=0.25", _of(**TINY_MODEL, steps=4, graphs=True)),
    Workload("smoke-vision", "vision", "full", _of(**TINY_MODEL, graphs=True)),
    Workload("smoke-prefill-alone", "prefill", "pevlm:sink=2,block=2", _of(**TINY_MODEL, alone=True)),
    Workload("smoke-block", "attention", "block:block=3", _of(**TINY_ATTENTION, check=True), 2),
)


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
        return _work(given.out, [_named(name) for name in given.worker], given.smoke)
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in (SMOKE if given.smoke else WORKLOADS) if each.part == given.part]
    with (given.out / LOG).open("a", encoding="utf-8") as log:
        return _Watch(given.out, log, time.monotonic() + given.budget, given.smoke).run(chosen)


def _named(name: str) -> Workload:
    return next(each for each in (*WORKLOADS, *SMOKE) if each.name == name)


# -- the process that watches ---------------------------------------------------------------------------------------------


class _Watch:
    """Starts workers, keeps the log, and ends them when the time is up."""

    def __init__(self, out: Path, log: IO[str], deadline: float, smoke: bool) -> None:
        self.out, self.log, self.deadline, self.smoke = out, log, deadline, smoke
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def run(self, workloads: list[Workload]) -> int:
        left = list(workloads)
        while left:
            code, began = self._worker(left)
            if code == 2 and not began:
                return 2
            if code == 0:
                break
            names = [each.name for each in left]
            broken = names.index(began[-1]) if began else 0
            if code == FRESH:
                left = left[broken + 1 :]
                continue
            if self.deadline <= time.monotonic():
                self.skipped += [f"{name}: the time was up" for name in names[broken:]]
                break
            self.failed.append(names[broken])
            self._say(f"{names[broken]} ended its worker (exit code {code}); the others go on in a new one.")
            left = left[broken + 1 :]
        self._summary(workloads)
        return 1 if self.failed else 0

    def _worker(self, workloads: list[Workload]) -> tuple[int, list[str]]:
        """Exit code (not 0: it broke or was ended) and the workloads that it began, in order."""
        command = [sys.executable, "-m", "vlmbench.bench_gpu", "--out", str(self.out.resolve())]
        command += ["--smoke"] if self.smoke else []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        offline["VLMBENCH_DEADLINE"] = str(time.time() + self.deadline - time.monotonic())
        process = subprocess.Popen(  # noqa: S603 (our own module)
            [*command, "--worker", *(each.name for each in workloads)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **offline},
            start_new_session=True,  # with a group of its own, in which the tests that it starts end with it
        )
        timer = threading.Timer(max(0.0, self.deadline - time.monotonic()), _end_group, [process.pid])
        timer.start()
        began: list[str] = []
        try:
            for line in process.stdout or ():
                self._say(line.rstrip("\n"))
                if line.startswith(NAME):
                    began.append(line[len(NAME) :].split()[0])
                elif line.startswith("skipped "):
                    self.skipped.append(line.removeprefix("skipped ").strip())
                elif line.startswith("failed "):
                    self.failed.append(line.split()[1].rstrip(":"))
            return process.wait(), began
        finally:
            timer.cancel()
            _end_group(process.pid)
            process.wait()

    def _summary(self, workloads: list[Workload]) -> None:
        path = self.out / ROWS
        known = {each.name for each in workloads}
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._say(
            f"{len({row['workload'] for row in rows} & known)} of {len(workloads)} workloads have a row in {path}."
        )
        for line in self.skipped:
            self._say(f"Skipped {line}.")
        for name in self.failed:
            self._say(f"Failed {name}: see {self.out / LOG}.")

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()


def _end_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


# -- the process that measures --------------------------------------------------------------------------------------------


def _work(out: Path, workloads: list[Workload], smoke: bool) -> int:
    import torch

    from vlmbench.errors import RunError, UsageError
    from vlmbench.graphs import CudaGraphs

    if not smoke and not torch.cuda.is_available():
        print("No CUDA device is here; SMOKE=1 rehearses the same on a CPU.")
        return 2
    deadline = float(os.environ["VLMBENCH_DEADLINE"])
    device = "cpu" if smoke else "cuda"
    _machine(out, device)
    for each in workloads:
        left = deadline - time.time()
        if left < each.about_s and not smoke:
            print(f"skipped {each.name}: it may take {each.about_s} s and {max(0, left):.0f} s are left")
            continue
        print(f"{NAME}{each.name} ({left:.0f} s left)")
        begin = time.monotonic()
        try:
            line = _tests(left) if each.op == "tests" else _bench(out, each, device)
        except (RunError, UsageError) as error:
            line = f"failed {each.name}: {error}"
        print(f"{line} [{time.monotonic() - begin:.1f} s]")
        if CudaGraphs.failed:  # the device's random numbers, with which models are filled, may not work any more
            return FRESH
        if not smoke:
            torch.cuda.empty_cache()
    return 0


def _bench(out: Path, workload: Workload, device: str) -> str:
    from vlmbench import bench

    options = dict(workload.options)
    names = ("frames", "frame_tokens", "heads", "kv_heads", "head_dim")
    sizes = {name: options.pop(name, 1) for name in names}
    (shape,) = bench.shapes(tokens=None, preset=options.pop("shape", None), **sizes)
    settings = {"rounds": 7, "check": False} | options
    row = bench.bench(workload.op, workload.method, shape, device=device, dtype=None, **settings)
    if device == "cpu":
        row["marks"] = [*row["marks"], "smoke"]
    with (out / ROWS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"workload": workload.name, **row}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return bench.to_text([row])


def _tests(left: float) -> str:
    """The tests marked gpu, in files that hold any: others import what is not on that machine."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        return "skipped gpu-tests: there are none"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    if find_spec("xdist"):  # most of their time is the compiler's, on one core each
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(TESTS_S, left))  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"failed gpu-tests: not done after {TESTS_S:.0f} s"
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode:
        print("\n".join(last[-40:]))
        return f"failed gpu-tests: {last[-1] if last else 'no output'}"
    return f"gpu-tests: {last[-1]}"


def _machine(out: Path, device: str) -> None:
    """What the rows were measured on, and the rates that this device reaches."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from vlmbench import ceiling
    from vlmbench.machine import pick_dtype

    on = torch.device(device)
    facts: dict[str, Any] = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
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


if __name__ == "__main__":
    # A way out through `finally`: the worker is in a group of its own, which no shell's or timeout's signal reaches.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
