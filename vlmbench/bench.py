"""One operation of a method against the best dense kernel, in turns, on a made-up prompt of a given shape.

The attention of one layer is in `bench_attention`, whole stages of a model are in `bench_model`; the rows of both have the
same columns (`bench_row`).
"""

from __future__ import annotations

from typing import Any

import torch

from vlmbench.bench_row import COLUMNS
from vlmbench.bench_text import to_text
from vlmbench.errors import UsageError
from vlmbench.machine import pick_device, pick_dtype
from vlmbench.madeup import Shape, shapes
from vlmbench.rounds import release
from vlmbench.session import make_methods

__all__ = ["COLUMNS", "OPS", "Shape", "bench", "make_methods", "shapes", "to_text"]

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

    (method,) = make_methods([spec])
    on = pick_device(device)
    release()  # a model of an earlier row counts in no peak of this one
    if on.type == "cuda":
        # Of one function torch compiles for eight shapes, and runs a ninth as it is written.
        torch.compiler.reset()
    if check and op != "attention":
        raise UsageError("--check compares one layer's attention; leave it out here or use bench attention.")
    dtype_ = pick_dtype(dtype, on)
    if op == "attention":
        return bench_attention.row(method, shape, on, dtype_, rounds, check, rivals, seed)
    return bench_model.row(op, method, shape, on, dtype_, rounds, layers, steps, seed, graphs, alone)
