"""One attention operation of a method against the best dense kernel, in turns, on a made-up prompt of a given shape.

The method's own function is timed, as its `install` hands it to the patcher, on random queries, keys and values; what it
works out once a prompt (`index_s`) is timed apart and shown. Rounds are interleaved and kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmbench.errors import RunError, UsageError
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.live import LiveStorages
from vlmbench.machine import pick_device, pick_dtype
from vlmbench.session import make_methods
from vlmbench.spec import nearest, params_of
from vlmbench.stats import ratio_interval
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.method import Method

PREFIX, SUFFIX = 14, 60
"""Text tokens before and after the video in every made-up prompt (the fixed workloads' numbers)."""
CHECKED_ROWS = 256
WARMUP = 1
Attention = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention layer and the prompt that goes through it."""

    frames: int
    frame_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    name: str | None = None
    """The preset that heads and dimensions are of."""

    def __post_init__(self) -> None:
        """Raises `UsageError`."""
        for field in ("frames", "frame_tokens", "heads", "kv_heads", "head_dim", "batch"):
            if getattr(self, field) < 1:
                raise UsageError(f"--{field.replace('_', '-')} must be at least 1, not {getattr(self, field)}.")
        if self.heads % self.kv_heads:
            raise UsageError(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}.")

    @property
    def tokens(self) -> int:
        return PREFIX + self.frames * self.frame_tokens + SUFFIX

    def prompt(self) -> Prompt:
        """Text, frames, text; without embeddings."""
        stop = PREFIX + self.frames * self.frame_tokens
        spans = [Span("text", 0, PREFIX)]
        for frame in range(self.frames):
            start = PREFIX + frame * self.frame_tokens
            spans.append(Span("video", start, start + self.frame_tokens, 0, frame))
        layout = TokenLayout((*spans, Span("text", stop, self.tokens)))
        return Prompt(torch.empty(1, self.tokens, 0), torch.arange(self.tokens)[None], layout, self.tokens)


class _Collector:
    """Stands in for the patcher and keeps the attention that a method would install."""

    attend: Callable[..., Any] | None = None

    def attention(self, fn: Callable[..., Any], layers: Any = None) -> None:
        self.attend = fn

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # hooks and overrides play no part here


def shapes(
    *, tokens: str | None, preset: str | None, heads: int, kv_heads: int, head_dim: int, **sizes: int
) -> list[Shape]:
    """The shapes that the options name: one, or one for each prompt length in ``N/N``. Raises `UsageError`."""
    if preset is not None:
        from vlmbench.models.catalogue import PRESETS
        from vlmbench.models.presets import head_shape

        if preset not in PRESETS:
            raise UsageError(f"No preset is called {preset!r}.{nearest(preset, PRESETS)}")
        heads, kv_heads, head_dim = head_shape(preset)
    one = Shape(heads=heads, kv_heads=kv_heads, head_dim=head_dim, name=preset, **sizes)
    if tokens is None:
        return [one]
    found = []
    for text in tokens.split("/"):
        if not text.isdigit() or int(text) < PREFIX + SUFFIX + one.frame_tokens:
            least = PREFIX + SUFFIX + one.frame_tokens
            raise UsageError(f"--tokens must be numbers of at least {least} with / between them, not {tokens!r}.")
        found.append(replace(one, frames=(int(text) - PREFIX - SUFFIX) // one.frame_tokens))
    return found


@torch.inference_mode()
def attention(
    spec: str, shape: Shape, *, device: str | None, dtype: str | None, rounds: int, check: bool, seed: int = 0
) -> dict[str, Any]:
    """One row of the contract's bench table.

    Raises `UsageError` when the method replaces no attention, and `RunError` when `check` finds a wrong row: then no
    ratio exists.
    """
    (method,) = make_methods([spec])
    on = pick_device(device)
    return _attention(method, shape, on, pick_dtype(dtype, on), rounds, check, seed)


def _attention(
    method: Method, shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int, check: bool, seed: int
) -> dict[str, Any]:
    if shape.batch != 1:
        raise UsageError(f"bench attention takes one prompt at a time; --batch is {shape.batch}.")
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        # As a model hands them over: heads behind tokens in memory.
        torch.randn(1, shape.tokens, heads, shape.head_dim, device=device, dtype=dtype, generator=generator).transpose(
            1, 2
        )
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    begin = time.perf_counter()
    prompt = method.prepare(shape.prompt(), Trace())
    index_s = time.perf_counter() - begin
    plan = prompt.extras.get("block_plan")
    own = _method_attention(method, prompt, q, k, v)
    kernels = _dense_kernels(q, k, v)
    if check and not getattr(method, "plain", True):
        raise UsageError(
            f"{method.name} reweighs its context, which no plain reference does; check it at weights of 1."
        )
    checked = _check(own(), q, k, v, plan, seed) if check else None
    clock = _Clock(device)
    best = min(kernels, key=lambda name: median(clock(kernels[name]) for _ in range(2)))
    clock(own)
    dense_s: list[float] = []
    method_s: list[float] = []
    for turn in range(WARMUP + rounds):
        pair = [(kernels[best], dense_s), (own, method_s)]
        for call, into in pair if turn % 2 else reversed(pair):
            into.append(clock(call))
    dense_s, method_s = dense_s[WARMUP:], method_s[WARMUP:]
    ratios = [dense / mine for dense, mine in zip(dense_s, method_s, strict=True)]
    interval = ratio_interval(ratios, [str(i) for i in range(rounds)])
    return {
        "op": "attention",
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
        "dense_s": median(dense_s),
        "dense_kernel": best,
        "method_s": median(method_s),
        "dense_rounds_s": dense_s,
        "method_rounds_s": method_s,
        "ratio": median(ratios),
        "ratio_low": interval.low if interval else None,
        "ratio_high": interval.high if interval else None,
        "pairs_limit": shape.tokens * (shape.tokens + 1) / 2 / plan.pairs if plan is not None else None,
        "index_s": index_s,
        "check": checked,
        "peak_bytes": _peak(own, [q, k, v], device),
        "per_layer": True,
    }


def to_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A few columns of the rows for people."""
    lines = []
    for row in rows:
        limit = f" of at most {row['pairs_limit']:.2f}" if row["pairs_limit"] else ""
        interval = f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if row["ratio_low"] is not None else ""
        lines.append(
            f"{row['method']} {row['tokens']} tokens: {row['ratio']:.2f}×{interval}{limit} "
            f"({row['method_s']:.4g} s against {row['dense_s']:.4g} s with {row['dense_kernel']}, {row['dtype']} on "
            f"{row['device']}; check: {row['check'] or 'not asked for'})"
        )
    return "\n".join(lines)


def _method_attention(method: Method, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    collector = _Collector()
    method.install(collector, Trace())  # type: ignore[arg-type]
    attend = collector.attend
    if attend is None:
        raise UsageError(f"{method.name} replaces no attention, so there is nothing to time here.")
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    options = {"scaling": q.shape[-1] ** -0.5, "vlmbench_layout": prompt.layout, **prompt.extras}
    return lambda: attend(module, q, k, v, None, **options)[0].transpose(1, 2)


def _dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Attention]:
    """Every kernel of torch that takes these tensors, causal. The matmul one only where its N² scores are small."""
    kernels: dict[str, Attention] = {}
    backends = [SDPBackend.FLASH_ATTENTION]
    if q.device.type == "cuda":
        backends += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if q.shape[1] * q.shape[2] ** 2 * 4 < 2**28:
        backends.append(SDPBackend.MATH)
    for backend in backends:

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                )

        try:
            call()
        except RuntimeError:
            continue  # not for this device, dtype or head size
        kernels[f"sdpa/{backend.name.lower()}"] = call
    if not kernels:
        raise RunError("No dense attention kernel takes this shape here; choose another --dtype or --head-dim.")
    return kernels


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
        scores = scores.masked_fill(~visible.to(q.device), float("-inf"))
        right = scores.softmax(-1) @ values
        error = (right - out[0, head, rows.to(q.device)].double()).abs().amax(-1) / right.square().mean(-1).sqrt()
        worst = max(worst, float(error.max()))
    # Of a row's own size, which shrinks with the keys it averages: a few units in the last place of a short dtype, and for
    # float32 what its exponentials and long sums lose.
    bound = max(16 * torch.finfo(q.dtype).eps, 1e-3)
    if worst > bound:
        raise RunError(f"A row is wrong by {worst:.2g} of its size where {bound:.2g} is allowed; no ratio is given.")
    return f"{len(rows)} rows within {worst:.1e} of their size"


def _peak(call: Attention, inputs: list[Tensor], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with LiveStorages(inputs) as live:
        call()
    return live.peak


class _Clock:
    """Seconds of one call, the device idle before and after."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, call: Attention) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin
