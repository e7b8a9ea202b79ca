"""Talking to `lmms_worker`, the process in which lmms-eval lives."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any, Self

from vlmbench.errors import RunError, UsageError


class LmmsEval:
    """One worker process, started by the first request; threads take turns. A context manager."""

    def __init__(self, offline: bool = False) -> None:
        """Raises `UsageError` when lmms-eval is not installed."""
        if importlib.util.find_spec("lmms_eval") is None:
            raise UsageError("lmms-eval is not installed; install it with pip install 'vlmbench[lmms]'.")
        self._offline = offline
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, op: str, **values: Any) -> Any:
        """The answer. Raises `ValueError` with lmms-eval's own words, and `RunError` when the process ended."""
        with self._lock:
            process = self._started()
            try:
                process.stdin.write(json.dumps({"op": op, **values}, default=str) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                line = process.stdout.readline()  # type: ignore[union-attr]
            except BrokenPipeError:
                line = ""
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"lmms-eval's process ended ({last[:300]}); everything finished is kept.")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
            self._log.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
            path = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vlmbench.lmms_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, **(offline if self._offline else {}), "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the command, which then ends this
            )
        return self._process
