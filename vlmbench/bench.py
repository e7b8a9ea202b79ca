"""One operation of a method against the best dense kernel, in turns, on a made-up prompt of a given shape.

The attention of one layer is in `bench_attention`, whole stages of a model are in `bench_model`; the rows of both have the
same columns (`bench_row`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmbench.bench_row import COLUMNS
from vlmbench.bench_text import to_text
from vlmbench.errors import UsageError
from vlmbench.machine import pick_device, pick_dtype
from vlmbench.madeup import Shape, shapes
from vlmbench.rounds import release
from vlmbench.session import make_methods

if TYPE_CHECKING:
    from vlmbench.method import Method

__all__ = ["COLUMNS", "OPS", "Shape", "bench", "bench_offload", "make_methods", "shapes", "to_text"]

OPS = ("attention", "prefill", "decode", "vision")


def bench(
    op: str,
    spec: str,
    shape: Shape,
    *,
    device: str | None,
    dtype: str | None,
    rounds: int,
    check: bool,
    layers: int | None = None,
    steps: int = 32,
    rivals: bool = False,
    seed: int = 0,
    graphs: bool | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """One row; with `rivals` every way to compute the method's attention is timed too.

    `graphs` and `alone` are `bench_model.row`'s.

    Raises `UsageError` when the method has nothing to do in `op`, `RunError` when `check` finds a wrong row.
    """
    from vlmbench import bench_attention, bench_model

    method, on, dtype_ = _begin(spec, device, dtype)
    if check and op != "attention":
        raise UsageError("--check compares one layer's attention; leave it out here or use bench attention.")
    if rivals and op != "attention":
        raise UsageError("--rivals times kernels of one layer's attention; leave it out here or use bench attention.")
    if op == "attention":
        return bench_attention.row(method, shape, on, dtype_, rounds, check, rivals, seed)
    return bench_model.row(op, method, shape, on, dtype_, rounds, layers, steps, seed, graphs, alone)


def bench_offload(
    spec: str,
    shape: Shape,
    *,
    device: str | None,
    dtype: str | None,
    memory_gb: float,
    rounds: int,
    steps: int = 32,
    resident: int | None = None,
    graphs: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Dense side (plain and prefetched offload) -> its row, on a card of so many GB: `bench_offload.rows`."""
    from vlmbench import bench_offload

    if not memory_gb > 0:
        raise UsageError(f"--memory-gb must be above 0, not {memory_gb:g}.")
    method, on, dtype_ = _begin(spec, device, dtype)
    sizes: dict[str, Any] = {"memory_gb": memory_gb, "rounds": rounds, "steps": steps, "resident": resident}
    return bench_offload.rows(method, shape, on, dtype_, graphs=graphs, **sizes)


def _begin(spec: str, device: str | None, dtype: str | None) -> tuple[Method, torch.device, torch.dtype]:
    (method,) = make_methods([spec])
    on = pick_device(device)
    release()  # a model of an earlier row counts in no peak of this one
    if on.type == "cuda":
        # Of one function torch compiles for eight shapes, and runs a ninth as it is written.
        torch.compiler.reset()
    return method, on, pick_dtype(dtype, on)
