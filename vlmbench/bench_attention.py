"""One layer's attention as a method installs it, against the best dense kernel, on made-up queries, keys and values.

What the method's kernel makes from a plan is made anew in every round, inside the time; what `prepare` works out once a
prompt (`index_s`) is timed apart and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmbench import cost
from vlmbench.bench_row import add_note, add_shares, close_row, mark_masked, new_row, note_masked, prepared, ran_out
from vlmbench.composed import parts_of
from vlmbench.dense import RANKED, ranked
from vlmbench.errors import RunError, UsageError
from vlmbench.kernels.block_attention import forget, runs_fast
from vlmbench.madeup import Shape
from vlmbench.rounds import Clock, Side, out_of_memory, peak_bytes, race, turns
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.method import Method

CHECKED_ROWS = 256
Attention = Callable[[], Tensor]


@torch.inference_mode()
def row(
    method: Method,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    check: bool,
    rivals: bool,
    seed: int,
) -> dict[str, Any]:
    """One row; with `rivals` every way to compute the method's attention is timed too.

    Raises `UsageError` when the method replaces no attention, and `RunError` when `check` finds a wrong row: then no
    ratio exists.
    """
    if len(parts_of(method)) > 1:
        raise UsageError(
            f"bench attention takes one method at a time, not {method.name}; bench prefill takes them joined."
        )
    if shape.batch != 1:
        raise UsageError(f"bench attention takes one prompt at a time; --batch is {shape.batch}.")
    if check and not getattr(method, "plain", True):
        raise UsageError(
            f"{method.name} reweighs its context, which no plain reference does; check it at weights of 1."
        )
    found = new_row("attention", method, shape, device, dtype) | {"per_layer": True}
    clock = Clock(device)
    trace = Trace()
    prompt, found["index_s"] = prepared(method, shape.prompt(device), trace, clock)
    plan = prompt.extras.get("block_plan")
    if plan is not None:
        found["pairs_limit"] = shape.tokens * (shape.tokens + 1) / 2 / plan.pairs
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
        mark_masked(found, trace, device)
        if hasattr(method, "plant"):  # what is looked for in queries and keys must be there to be found
            method.plant(prompt, q, k)
        rule = plan
        if hasattr(method, "rule"):  # known only from queries and keys
            rule = method.rule(prompt, q, k)
            found["pairs_limit"] = shape.tokens * (shape.tokens + 1) / 2 / rule.pairs
        attend = _method_attention(method, prompt, trace, q, k, v)
        if check:
            found["check"] = _check(attend(), q, k, v, rule, seed)
        own = Side("method", lambda _: attend(), lambda _: forget())
        order, seconds, refused = ranked(q, k, v, clock)
        if shape.tokens > RANKED:
            add_note(found, f"dense kernels were ranked at {RANKED} tokens")
        if not order and not any("memory" in reason for reason in refused.values()):
            raise RunError("No dense attention kernel takes this shape here; choose another --dtype or --head-dim.")
        run = race(order[0] if order else None, own, rounds, clock, order[1:])
        note_masked(found, trace)  # what the kernel refused at its launch is known now
        close_row(found, run, seconds, refused)
        if rivals:
            ways = _ways(method, prompt, q, k, v)
            run_of, found["method_refused"] = turns(_rivals(ways, q, k, v, rule, check, seed), rounds, clock)
            found["method_kernels_s"] = {name: median(each) for name, each in run_of.items()}
        if "method" not in run.failed:
            found["peak_bytes"] = peak_bytes(own, [q, k, v], device)
        sizes = (shape.tokens, shape.heads, shape.kv_heads, shape.head_dim, dtype.itemsize)
        n = shape.tokens
        dense_cost = cost.attention(n * (n + 1) // 2, *sizes)
        own_cost = cost.attention(rule.pairs if rule is not None else n * (n + 1) // 2, *sizes)
        add_shares(found, device, dtype, dense_cost, own_cost)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        ran_out(found, "the operation", error)
    return found


class _Collector:
    """Stands in for the patcher and keeps the attention that a method would install."""

    attend: Callable[..., Any] | None = None

    def attention(self, fn: Callable[..., Any], layers: Any = None) -> None:
        self.attend = fn

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # hooks and overrides play no part here


def _method_attention(method: Method, prompt: Prompt, trace: Trace, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    collector = _Collector()
    method.install(collector, trace)  # type: ignore[arg-type]
    attend = collector.attend
    if attend is None:
        raise UsageError(f"{method.name} replaces no attention, so there is nothing to time here.")
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    options = {"scaling": q.shape[-1] ** -0.5, "vlmbench_layout": prompt.layout, **prompt.extras}
    return lambda: attend(module, q, k, v, None, **options)[0].transpose(1, 2)


def _ways(method: Method, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Attention]:
    """Every way there is to compute the method's attention but the masked one, its tables and indices included.

    None where the method does not say what it attends to, or reweighs it.
    """
    plan, scene = prompt.extras.get("block_plan"), prompt.extras.get("mm_scene")
    if plan is not None and getattr(method, "plain", True):
        from vlmbench.kernels.block_attention import blocks, flex, fused, varlen

        kernels: dict[str, Any] = {"fused": fused, "flex": flex, "varlen": varlen}
        kernels |= {"blocks": blocks} if q.device.type == "cpu" else {}
        return {name: partial(kernel.block_attention, q, k, v, plan) for name, kernel in kernels.items()}
    if scene is None:
        return {}
    from vlmbench import mm_attention, mm_flex

    heads = method.heads(scene, 0, q.shape[1])  # type: ignore[attr-defined]

    def own() -> Tensor:  # without what is only noted in a trace
        return mm_attention.attention(q, k, v, heads, scene, probe=False, settle=False)[0]

    return {"own": own, "flex": lambda: mm_flex.attention(q, k, v, heads, scene)}


def _rivals(
    ways: Mapping[str, Attention], q: Tensor, k: Tensor, v: Tensor, rule: Any, check: bool, seed: int
) -> dict[str, Side]:
    """Sides of these ways; with `check`, a wrong one has no time."""

    def side(name: str, attend: Attention) -> Side:
        @lru_cache  # once, outside the time
        def first() -> None:
            if check:
                try:
                    _check(attend(), q, k, v, rule, seed)
                except RunError as error:
                    raise ValueError(str(error)) from None

        def ready(_: Any) -> None:
            first()
            forget()

        return Side(name, lambda _: attend(), ready)

    return {name: side(name, attend) for name, attend in ways.items()}


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
