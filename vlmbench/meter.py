"""Time, memory and counted work: one quantity per pass, since measuring one disturbs the others.

Time is wall clock between stage borders. The device is synchronised at the borders only; a span begins where the one before
it ended, so the spans of a sample add up to its end-to-end time with nothing hidden between them.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from types import TracebackType
from typing import Self

import torch

from vlmbench.live import LiveStorages
from vlmbench.record import Memory, Timing


class Meter:
    """Marks the borders of stages. This one measures nothing: accuracy passes use it."""

    def start(self) -> None:
        """The sample begins."""

    def stage(self, name: str) -> None:
        """Stage `name` ends here; it began where the one before ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop measuring."""


class Stopwatch(Meter):
    """Wall-clock seconds per stage."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[float]] = defaultdict(list)
        self._begin = self._last = 0.0

    def start(self) -> None:
        self._begin = self._last = self._now()

    def stage(self, name: str) -> None:
        now = self._now()
        self._spans[name].append(now - self._last)
        self._last = now

    def timing(self) -> Timing:
        """The sample ends here. `video_s` is the runner's to add."""
        e2e = self._now() - self._begin
        spans = {name: sum(values) for name, values in self._spans.items()}
        decode = tuple(self._spans.get("decode", ()))
        ttft = sum(spans.get(name, 0.0) for name in ("vision", "prepare", "prefill"))
        return Timing(
            preprocess_s=spans.get("preprocess", 0.0),
            transfer_s=spans.get("transfer", 0.0),
            vision_s=spans.get("vision", 0.0),
            prepare_s=spans.get("prepare", 0.0),
            prefill_s=spans.get("prefill", 0.0),
            decode_s=decode,
            other_s=max(0.0, e2e - sum(spans.values())),
            ttft_s=ttft,
            e2e_s=e2e,
        )

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class MemoryMeter(Meter):
    """Peak bytes of every stage: the allocator's count on CUDA, live tensor storages elsewhere. Weights are included."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        weights = [*model.parameters(), *model.buffers()]
        self._live = None if device.type == "cuda" else LiveStorages(weights)
        self._stages: dict[str, int] = {}
        self._before = 0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, tb)

    def start(self) -> None:
        if self._live is None:
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._before = self._live.current
            self._live.restart_peak()

    def stage(self, name: str) -> None:
        if self._live is None:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = self._live.peak
            self._live.restart_peak()
        self._stages[name] = max(peak, self._stages.get(name, 0))

    def memory(self, kv_bytes: int, kv_reserved_bytes: int) -> Memory:
        peak = max(self._stages.values(), default=self._before)
        return Memory(
            peak_bytes=peak,
            peak_extra_bytes=max(0, peak - self._before),
            kv_bytes=kv_bytes,
            kv_reserved_bytes=kv_reserved_bytes,
            process_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            stages=dict(self._stages),
        )
