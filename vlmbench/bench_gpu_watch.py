"""The process that watches: starts workers of `bench_gpu`, keeps the log, and ends them when the time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vlmbench.bench_gpu_worker import FRESH, NAME, ROOT, ROWS
from vlmbench.bench_gpu_workloads import Workload

LOG = "log.txt"


class Watch:
    """Starts workers, keeps the log, and ends them when the time is up."""

    def __init__(self, out: Path, log: IO[str], deadline: float, smoke: bool) -> None:
        self.out, self.log, self.deadline, self.smoke = out, log, deadline, smoke
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def run(self, workloads: list[Workload]) -> int:
        measured = {row["workload"] for row in self._rows()}
        left = [each for each in workloads if each.name not in measured]
        if len(left) < len(workloads):
            self._say(f"{len(workloads) - len(left)} workloads have their row in {self.out / ROWS} already.")
        # What an earlier call began and has no row of may have held it up: the others come first.
        begun = self._begun()
        left.sort(key=lambda each: each.name in begun)
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
        measured = {row["workload"] for row in self._rows()} & {each.name for each in workloads}
        self._say(f"{len(measured)} of {len(workloads)} workloads have a row in {self.out / ROWS}.")
        for line in self.skipped:
            self._say(f"Skipped {line}.")
        for name in self.failed:
            self._say(f"Failed {name}: see {self.out / LOG}.")

    def _rows(self) -> list[dict[str, Any]]:
        """What is there, also from an earlier call; a line that a kill has torn is none."""
        path, found = self.out / ROWS, []
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _begun(self) -> set[str]:
        """Workloads that earlier calls with the same folder began, by their log."""
        path = self.out / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
        return {line[len(NAME) :].split()[0] for line in lines if line.startswith(NAME)}

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()


def _end_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
