"""One operation of a method against the best dense kernel, in turns, on a made-up prompt of a given shape.

Attention is here: the method's own function is timed, as its `install` hands it to the patcher, on random queries, keys and
values. What its kernel makes from a plan is made anew in every round, inside the time; what `prepare` works out once a
prompt (`index_s`) is timed apart and shown. Rounds are interleaved and kept. Whole stages of a model are in `bench_model`;
the rows of both have the same columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmbench import ceiling, cost
from vlmbench.dense import Flex, backends, causal_sdpa, label, only
from vlmbench.errors import RunError, UsageError
from vlmbench.kernels.block_attention import forget, runs_fast
from vlmbench.machine import pick_device, pick_dtype
from vlmbench.madeup import Shape, shapes
from vlmbench.rounds import Clock, Race, Side, fastest, first_line, out_of_memory, peak_bytes, race, release
from vlmbench.session import make_methods
from vlmbench.spec import params_of
from vlmbench.stats import ratio_interval
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.method import Method

__all__ = ["COLUMNS", "OPS", "Shape", "attention", "bench", "make_methods", "shapes", "to_text"]

OPS = ("attention", "prefill", "decode", "vision")
CHECKED_ROWS = 256
MASK_LIMIT = 2**31
"""Entries of an N² mask above which the masked reference is not run on a device without a kernel."""
Attention = Callable[[], Tensor]
COLUMNS = (
    *("op", "method", "params", "tokens", "frames", "frame_tokens", "shape", "heads", "kv_heads", "head_dim", "batch"),
    *("dtype", "device", "dense_s", "dense_kernel", "method_s", "dense_rounds_s", "method_rounds_s"),
    *("ratio", "ratio_low", "ratio_high", "pairs_limit", "index_s", "check", "peak_bytes", "per_layer"),
    # Beyond the contract's:
    *("layers", "model_layers", "steps", "whole_dense_s", "whole_method_s", "flops_limit"),
    *("dense_flops", "dense_bytes", "method_flops", "method_bytes", "device_flops", "device_bytes_per_s"),
    *("dense_flops_share", "dense_bytes_share", "flops_share", "bytes_share"),
    *("dense_tokens_per_s", "method_tokens_per_s", "dense_peak_bytes", "dense_kernels_s", "dense_refused"),
    *("method_kernels_s", "method_refused"),
    *("marks", "note"),
)


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
    if op == "attention":
        return attention(spec, shape, device=device, dtype=dtype, rounds=rounds, check=check, rivals=rivals, seed=seed)
    from vlmbench import bench_model

    (method,) = make_methods([spec])
    on = pick_device(device)
    if check:
        raise UsageError("--check compares one layer's attention; leave it out here or use bench attention.")
    dtype_ = pick_dtype(dtype, on)
    return bench_model.row(op, method, shape, on, dtype_, rounds, layers, steps, seed, graphs, alone)


class _Collector:
    """Stands in for the patcher and keeps the attention that a method would install."""

    attend: Callable[..., Any] | None = None

    def attention(self, fn: Callable[..., Any], layers: Any = None) -> None:
        self.attend = fn

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # hooks and overrides play no part here


@torch.inference_mode()
def attention(
    spec: str,
    shape: Shape,
    *,
    device: str | None,
    dtype: str | None,
    rounds: int,
    check: bool,
    rivals: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """One row of the contract's bench table.

    Raises `UsageError` when the method replaces no attention, and `RunError` when `check` finds a wrong row: then no
    ratio exists.
    """
    (method,) = make_methods([spec])
    on = pick_device(device)
    return _attention(method, shape, on, pick_dtype(dtype, on), rounds, check, rivals, seed)


def _attention(
    method: Method,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    check: bool,
    rivals: bool,
    seed: int,
) -> dict[str, Any]:
    if shape.batch != 1:
        raise UsageError(f"bench attention takes one prompt at a time; --batch is {shape.batch}.")
    if check and not getattr(method, "plain", True):
        raise UsageError(
            f"{method.name} reweighs its context, which no plain reference does; check it at weights of 1."
        )
    row = new_row("attention", method, shape, device, dtype) | {"per_layer": True}
    clock = Clock(device)
    trace = Trace()
    prompt, row["index_s"] = prepared(method, shape.prompt(device), trace, clock)
    plan = prompt.extras.get("block_plan")
    if plan is not None:
        row["pairs_limit"] = shape.tokens * (shape.tokens + 1) / 2 / plan.pairs
    try:
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v = (
            # As a model hands them over: heads behind tokens in memory.
            torch.randn(
                1, shape.tokens, heads, shape.head_dim, device=device, dtype=dtype, generator=generator
            ).transpose(1, 2)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        if plan is not None and not runs_fast(q, k, v):
            trace.facts["masked"] = True
        mark_masked(row, trace, device)
        if hasattr(method, "plant"):  # what is looked for in queries and keys must be there to be found
            method.plant(prompt, q, k)
        rule = plan
        if hasattr(method, "rule"):  # known only from queries and keys
            rule = method.rule(prompt, q, k)
            row["pairs_limit"] = shape.tokens * (shape.tokens + 1) / 2 / rule.pairs
        attend = _method_attention(method, prompt, trace, q, k, v)
        if check:
            row["check"] = _check(attend(), q, k, v, rule, seed)
        own = Side("method", lambda _: attend(), lambda _: forget())
        best, seconds, refused = fastest(_dense_sides(q, k, v), clock)
        if best is None and not any("memory" in reason for reason in refused.values()):
            raise RunError("No dense attention kernel takes this shape here; choose another --dtype or --head-dim.")
        run = race(best, own, rounds, clock)
        note_masked(row, trace)  # what the kernel refused at its launch is known now
        close_row(row, run, best, seconds, refused)
        if rivals and plan is not None and getattr(method, "plain", True):
            _, row["method_kernels_s"], row["method_refused"] = fastest(_rivals(q, k, v, plan, check, seed), clock)
        if "method" not in run.failed:
            row["peak_bytes"] = peak_bytes(own, [q, k, v], device)
        sizes = (shape.tokens, shape.heads, shape.kv_heads, shape.head_dim, dtype.itemsize)
        n = shape.tokens
        dense_cost = cost.attention(n * (n + 1) // 2, *sizes)
        own_cost = cost.attention(rule.pairs if rule is not None else n * (n + 1) // 2, *sizes)
        add_shares(row, device, dtype, dense_cost, own_cost)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        ran_out(row, "the operation", error)
    return row


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
    """Say once that a mask stood in for a kernel."""
    if trace.facts.get("masked") and "masked" not in row["marks"]:
        row["marks"] = [*row["marks"], "masked"]
        add_note(row, "no kernel for this device or shape: plain calls ran that compute scores and mask them")


def close_row(
    row: dict[str, Any], run: Race, best: Side | None, seconds: Mapping[str, float], refused: Mapping[str, str]
) -> None:
    """Put what was measured into the row: rounds, ratio with its interval, and who ran out of memory."""
    row["dense_kernels_s"], row["dense_refused"] = dict(seconds), dict(refused)
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
        row["flops_limit"] = dense.flops / own.flops


def ran_out(row: dict[str, Any], who: str, error: BaseException | str) -> None:
    """Mark the row: out of memory ends it, and no other one."""
    row["marks"] = [*row["marks"], *(["oom"] if "oom" not in row["marks"] else [])]
    add_note(row, f"{who} ran out of memory ({' '.join(str(error).split())[:160]})")
    release()


def add_note(row: dict[str, Any], says: str) -> None:
    row["note"] = f"{row['note']}; {says}" if row["note"] else says


def to_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A few columns of the rows for people."""
    return "\n".join(_line(row) for row in rows)


def _line(row: Mapping[str, Any]) -> str:
    where = f"{row['op']}: {row['method']} {row['tokens']} tokens"
    if row["per_layer"] and row["layers"]:
        where += f", {row['layers']} of {row['model_layers']} layers"
    says = [f"{row['dtype']} on {row['device']}"]
    if row["op"] == "attention":
        says.append(f"check: {row['check'] or 'not asked for'}")
    if row["flops_share"] is not None:
        says.append(f"{row['flops_share']:.0%} of the device's matrix rate, {row['bytes_share']:.0%} of its bandwidth")
    says += [f"marks: {', '.join(row['marks'])}"] if row["marks"] else []
    says += [row["note"]] if row["note"] else []
    own, dense = (f"{row[key]:.4g} s" if row[key] is not None else "no time" for key in ("method_s", "dense_s"))
    ratio = "no ratio"
    if row["ratio"] is not None:
        ratio = f"{row['ratio']:.2f}×"
        ratio += f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if row["ratio_low"] is not None else ""
        ratio += f" of at most {row['pairs_limit']:.2f}" if row["pairs_limit"] else ""
    return f"{where}: {ratio} ({own} against {dense} with {row['dense_kernel'] or 'no kernel'}; {'; '.join(says)})"


def _method_attention(method: Method, prompt: Prompt, trace: Trace, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    collector = _Collector()
    method.install(collector, trace)  # type: ignore[arg-type]
    attend = collector.attend
    if attend is None:
        raise UsageError(f"{method.name} replaces no attention, so there is nothing to time here.")
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    options = {"scaling": q.shape[-1] ** -0.5, "vlmbench_layout": prompt.layout, **prompt.extras}
    return lambda: attend(module, q, k, v, None, **options)[0].transpose(1, 2)


def _dense_sides(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Side]:
    """Every causal kernel that may take these tensors. The matmul one only where its N² scores are small."""
    sides = {
        label(backend): Side(label(backend), lambda _: causal_sdpa(q, k, v), around=only(backend))
        for backend in backends(q.device, q.shape[1] * q.shape[2] ** 2 * 4)
    }
    if q.device.type == "cuda":
        flex = Flex()
        sides["flex"] = Side("flex", lambda _: flex(q, k, v), lambda _: flex.prepare(q.shape[2], q.device))
    return sides


def _rivals(q: Tensor, k: Tensor, v: Tensor, plan: Any, check: bool, seed: int) -> dict[str, Side]:
    """Every way there is to compute a plan's attention but the masked one; with `check`, a wrong one has no time."""
    from vlmbench.kernels.block_attention import blocks, flex, fused, varlen

    ways = {"fused": fused, "flex": flex, "varlen": varlen} | ({"blocks": blocks} if q.device.type == "cpu" else {})

    def side(name: str, attend: Attention) -> Side:
        @lru_cache  # once, outside the time
        def first() -> None:
            if check:
                try:
                    _check(attend(), q, k, v, plan, seed)
                except RunError as error:
                    raise ValueError(str(error)) from None

        def ready(_: Any) -> None:
            first()
            forget()

        return Side(name, lambda _: attend(), ready)

    return {name: side(name, partial(way.block_attention, q, k, v, plan)) for name, way in ways.items()}


def _check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Any, seed: int) -> str:
    """256 random query rows against softmax in float64 over just the keys that the rule allows. Raises `RunError`."""
    n = q.shape[2]
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:CHECKED_ROWS]
    visible = plan.visible(rows) if plan is not None else torch.arange(n) <= rows[:, None]
    groups = q.shape[1] // k.shape[1]
    worst = 0.0
    for head in range(q.shape[1]):
        keys, values = k[0, head // groups].double(), v[0, head // groups].double()
        scores = q[0, head, rows.to(q.device)].double() @ keys.T * q.shape[-1] ** -0.5
        seen = visible if visible.dim() == 2 else visible[head]  # the same for all heads, or one's own
        scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
        right = scores.softmax(-1) @ values
        error = (right - out[0, head, rows.to(q.device)].double()).abs().amax(-1) / right.square().mean(-1).sqrt()
        worst = max(worst, float(error.max()))
    # Of a row's own size, which shrinks with the keys it averages: a few units in the last place of a short dtype, and for
    # float32 what its exponentials and long sums lose.
    bound = max(16 * torch.finfo(q.dtype).eps, 1e-3)
    if worst > bound:
        raise RunError(f"A row is wrong by {worst:.2g} of its size where {bound:.2g} is allowed; no ratio is given.")
    return f"{len(rows)} rows within {worst:.1e} of their size"
