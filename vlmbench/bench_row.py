"""The row that `bench` writes: its columns, who fills them, and how what went wrong gets in."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from vlmbench import ceiling, cost
from vlmbench.errors import UsageError
from vlmbench.madeup import Shape
from vlmbench.rounds import Clock, Race, Side, first_line, out_of_memory, release
from vlmbench.spec import params_of
from vlmbench.stats import ratio_interval
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.method import Method

MASK_LIMIT = 2**31
"""Entries of an N² mask above which the masked reference is not run on a device without a kernel."""
COLUMNS = (
    *("op", "method", "params", "tokens", "frames", "frame_tokens", "shape", "heads", "kv_heads", "head_dim", "batch"),
    *("dtype", "device", "dense_s", "dense_kernel", "method_s", "dense_rounds_s", "method_rounds_s"),
    *("ratio", "ratio_low", "ratio_high", "pairs_limit", "index_s", "check", "peak_bytes", "per_layer"),
    # Beyond the contract's:
    *("layers", "model_layers", "steps", "whole_dense_s", "whole_method_s", "flops_limit", "bytes_limit"),
    *("dense_flops", "dense_bytes", "method_flops", "method_bytes", "device_flops", "device_bytes_per_s"),
    *("dense_flops_share", "dense_bytes_share", "flops_share", "bytes_share"),
    *("dense_tokens_per_s", "method_tokens_per_s", "dense_peak_bytes", "dense_kernels_s", "dense_refused"),
    *("method_kernels_s", "method_refused"),
    *("marks", "note"),
)

STOOD_IN = {
    "masked": "no kernel for this device or shape: plain calls ran that compute scores and mask them",
    "dequantised": "no kernel for this device or dtype: int8 weights were written out as floats at every call",
}
"""`Trace.facts` that say so, and marks -> what ran instead."""


def new_row(op: str, method: Method, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A row with everything that is known before anything runs."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    return row | {
        "op": op,
        "method": method.name,
        "params": params_of(method),
        "tokens": shape.tokens,
        "frames": shape.frames,
        "frame_tokens": shape.frame_tokens,
        "shape": shape.name,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "batch": shape.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "dense_rounds_s": [],
        "method_rounds_s": [],
        "per_layer": False,
        "marks": ["cpu"] if device.type == "cpu" else [],
    }


def prepared(method: Method, prompt: Prompt, trace: Trace, clock: Clock) -> tuple[Prompt, float]:
    """The prompt as the method leaves it, and the seconds that takes when all of it is imported already."""
    method.prepare(prompt, Trace(sample_id=trace.sample_id))
    left = prompt

    def prepare(_: Any) -> None:
        nonlocal left
        left = method.prepare(prompt, trace)

    seconds = Side("prepare", prepare).seconds(clock)
    return left, seconds


def mark_masked(row: dict[str, Any], trace: Trace, device: torch.device) -> None:
    """Before anything runs: a mask will stand in for a kernel. Raises `UsageError` where it alone would be too large."""
    tokens = row["tokens"]
    if trace.facts.get("masked") and tokens**2 > MASK_LIMIT:
        raise UsageError(
            f"{row['method']} has no kernel on {device.type} here (is triton installed?), and the mask that stands in for "
            f"it would take {tokens**2 / 2**30:.0f} GiB at {tokens} tokens; use fewer."
        )
    note_masked(row, trace)


def note_masked(row: dict[str, Any], trace: Trace) -> None:
    """Say once that something stood in for a kernel."""
    for mark, says in STOOD_IN.items():
        if trace.facts.get(mark) and mark not in row["marks"]:
            row["marks"] = [*row["marks"], mark]
            add_note(row, says)


def close_row(row: dict[str, Any], run: Race, seconds: Mapping[str, float], refused: Mapping[str, str]) -> None:
    """Put what was measured into the row: rounds, ratio with its interval, and who ran out of memory."""
    best = run.dense
    row["dense_kernels_s"], row["dense_refused"] = dict(seconds), {**refused, **run.refused}
    row["dense_kernel"] = best.name if best else None
    row["dense_rounds_s"], row["method_rounds_s"] = run.dense_s, run.method_s
    row["dense_s"] = median(run.dense_s) if run.dense_s else None
    row["method_s"] = median(run.method_s) if run.method_s else None
    for side, said in run.failed.items():
        ran_out(row, "dense attention" if side == "dense" else row["method"], said)
    if best is None and not refused:
        add_note(row, "dense attention was not timed")
    elif best is None:
        ran_out(row, "dense attention", "; ".join(refused.values()))
    elif ratios := run.ratios:
        interval = ratio_interval(ratios, [str(i) for i in range(len(ratios))])
        row["ratio"] = median(ratios)
        row["ratio_low"], row["ratio_high"] = (interval.low, interval.high) if interval else (None, None)


def add_shares(
    row: dict[str, Any], device: torch.device, dtype: torch.dtype, dense: cost.Cost, own: cost.Cost | None
) -> None:
    """FLOPs and least bytes of both sides, and the shares of the device's measured rates that their times come to.

    Where the rates themselves run out of memory there are no shares; what was timed before stands.
    """
    try:
        reached = ceiling.measure(device, dtype)
        row["device_flops"], row["device_bytes_per_s"] = reached
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reached = None
        add_note(row, f"no memory was left to measure the device's rates ({first_line(error)})")
        release()
    for side, work, prefix in (("dense", dense, "dense_"), ("method", own, "")):
        if work is None:
            continue
        row[f"{side}_flops"], row[f"{side}_bytes"] = work
        if reached is not None and (seconds := row[f"{side}_s"]):
            row[f"{prefix}flops_share"] = work.flops / seconds / reached.flops_per_s
            row[f"{prefix}bytes_share"] = work.bytes / seconds / reached.bytes_per_s
    if own is not None and own.flops:
        row["flops_limit"], row["bytes_limit"] = dense.flops / own.flops, dense.bytes / own.bytes


def ran_out(row: dict[str, Any], who: str, error: BaseException | str) -> None:
    """Mark the row: out of memory ends it, and no other one."""
    row["marks"] = [*row["marks"], *(["oom"] if "oom" not in row["marks"] else [])]
    add_note(row, f"{who} ran out of memory ({' '.join(str(error).split())[:160]})")
    release()


def add_note(row: dict[str, Any], says: str) -> None:
    row["note"] = f"{row['note']}; {says}" if row["note"] else says
