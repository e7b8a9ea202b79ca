"""The fixed workloads of a GPU (contract, section 5), most important first, and tiny ones that rehearse them on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmbench.madeup import Shape


PREFETCHED = "-prefetched"


@dataclass(frozen=True)
class Workload:
    """One `vlmbench bench` call, or with `op` "tests" the tests marked gpu.

    One with `memory_gb` among its options has a second row, against prefetched offload, named with `PREFETCHED` behind its own.
    """

    name: str
    op: str
    method: str = "full"
    options: tuple[tuple[str, Any], ...] = ()
    part: int = 1
    about_s: int = 30
    """What it is expected to take at most: it does not start with less left."""

    def split(self) -> tuple[Shape, dict[str, Any]]:
        """Its shape, and what else `bench` is told."""
        from vlmbench.madeup import shapes

        rest = dict(self.options)
        names = ("frames", "frame_tokens", "heads", "kv_heads", "head_dim", "batch", "text_tokens")
        given = {name: rest.pop(name) for name in names if name in rest}
        sizes = {"frames": 1, "frame_tokens": 1} | given
        (shape,) = shapes(tokens=None, preset=rest.pop("shape", None), **sizes)
        return shape, rest


def _of(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


PEVLM = "pevlm:sink=4,block=8"
LONG = {"frames": 256, "frame_tokens": 257}  # LongVILA's frames (contract, section 5)
HEADS = {"heads": 28, "kv_heads": 4, "head_dim": 128}
QWEN = {"shape": "qwen2.5-vl-7b"}
LLAVA = {"shape": "llava-1.5-7b"}  # its language model is LLaMA-7B, its tower CLIP-L/336
MILLION = {"frames": 3890, "frame_tokens": 257}
DECODE = _of(**QWEN, frames=64, frame_tokens=256)
TEXT, RANKED = 74, 2**17
"""Text tokens of a prompt (`madeup.TEXT`), and tokens at which long prompts' kernels are ranked (`dense.RANKED`)."""
LONG_ONES = ("360k", "720k", "1m")
FRAMES = {"16k": 63, "64k": 255, "128k": 511, "360k": 1406, "720k": 2812, "1m": 3906}
"""Of 256 tokens, in prompts of these lengths."""


RATE = 400e12
"""FLOP/s at which guesses take dense attention: what torch's own flash kernel may be held to; cuDNN's is faster."""
STARTED = 35
"""Seconds until the kernels of a row are compiled and tuned, where no earlier row has done it."""
FLEX = 30
"""Seconds to compile FlexAttention for a rival's one or two tables."""
BUDGETS = (0.25, 0.5, 2.0, 4.0)
"""Times published sizes, beside the published ones: points of the curve of time over density."""


def _dense_s(length: str, most: int = RANKED) -> float:
    """Seconds of one layer's dense attention over so many of the prompt's tokens, by arithmetic."""
    n = min(FRAMES[length] * 256 + TEXT, most)
    return 2 * n**2 * HEADS["heads"] * HEADS["head_dim"] / RATE


def _mm(pattern: str, length: str, part: int = 2, *, rivals: bool = False, budget: float = 1) -> Workload:
    """One layer of MMInference's heads on planted queries and keys; float64 beside it where that is quick.

    Dense kernels are called some fifteen times to be ranked, and once for every round and the warm-up; the pattern takes at
    most a quarter of dense, and is called a few times more.
    """
    long = length in LONG_ONES
    rounds = 2 if long else 7
    options = _of(frames=FRAMES[length], frame_tokens=256, **HEADS, check=not long, rounds=rounds)
    calls = (1 + rounds) + (4 + rounds) / 4
    about = STARTED + 15 * _dense_s(length) + calls * _dense_s(length, 2**30) + FLEX * rivals
    name, spec = f"gpu-mm-{pattern}-{length}", f"mminference:pattern={pattern}"
    if budget != 1:
        name, spec = f"gpu-density-{pattern}-{length}-{budget:g}", f"{spec},budget={budget:g}"
    return Workload(name, "attention", spec, options + (_of(rivals=True) if rivals else ()), part, ceil(about))


def _mm_prefill(length: str) -> Workload:
    """One layer of a whole prefill; hidden states are random, so indices are scattered as no video's are.

    Dense runs four times (chosen, warm-up, round, peak) and so does the method, each with as much again for the other products
    at 100k tokens and a tenth of it at a million.
    """
    options = _of(**QWEN, frames=FRAMES[length], frame_tokens=256, layers=1, rounds=1)
    about = STARTED + 15 * _dense_s(length) + 5.5 * _dense_s(length, 2**30)
    return Workload(f"gpu-mm-prefill-{length}", "prefill", "mminference:pattern=mix", options, 2, ceil(about))


CORE = _of(**LLAVA, frames=1, frame_tokens=576, text_tokens=64, steps=128)
# Dense has all 256 in its input. Of so few tokens, launches would take longer than what is launched: so both are recorded.
MEMORY = _of(**LLAVA, frames=1, frame_tokens=256, text_tokens=64, batch=8, graphs=True)
SMALL_CARD = _of(**LLAVA, frames=1, frame_tokens=576, text_tokens=64, steps=128, memory_gb=12, rounds=2)
WORKLOADS = (
    Workload("gpu-tests", "tests", about_s=100),
    Workload("gpu-pevlm", "attention", PEVLM, _of(**LONG, **HEADS, check=True), about_s=60),
    Workload("gpu-prefill-whole", "prefill", PEVLM, _of(**QWEN, **LONG, rounds=3), about_s=90),
    _mm("mix", "128k", 1),
    Workload("gpu-core", "decode", "corematching:beta=0.4", CORE, about_s=80),
    # 32 frames; at r=21 the tower with its projector takes 1.65 times fewer FLOPs.
    Workload("gpu-turbo", "vision", "turbo:r=21", _of(**LLAVA, frames=32), about_s=45),
    Workload("gpu-memvp", "prefill", "memvp:artefact=untrained", MEMORY, about_s=40),
    # Against dense attention that streams what does not fit: about 4 GB a token over the bus, twice 256 tokens, both ways.
    Workload("gpu-core-12gb", "decode", "corematching:beta=0.4,offload=on", SMALL_CARD, about_s=80),
    # Part 2: goes on where an earlier call with the same OUT stopped.
    _mm("grid", "1m"),
    _mm("grid", "16k"),
    # Core neurons read where they lie, beside the compact copies of gpu-core.
    Workload("gpu-core-gathered", "decode", "corematching:beta=0.4,ffn=gathered", CORE, 2, about_s=90),
    _mm("mix", "1m"),
    *(_mm_prefill(length) for length in LONG_ONES),
    # Behind them what a library's compiler could hold up.
    _mm("vs", "64k", rivals=True),
    *(_mm(pattern, "128k", rivals=True) for pattern in ("grid", "vs", "a_shape")),
    *(_mm(pattern, "64k", rivals=True) for pattern in ("grid", "a_shape")),
    # The proof that a million tokens fit; three runs of it, of 15 s at the card's published rate.
    Workload("gpu-prefill-1m", "prefill", PEVLM, _of(**QWEN, **MILLION, rounds=1, alone=True), 2, 100),
    Workload("gpu-pevlm-rivals", "attention", PEVLM, _of(**LONG, **HEADS, check=True, rivals=True), 2, 90),
    Workload("gpu-decode", "decode", "uniform:ratio=0.25", DECODE, 2, 70),
    Workload("gpu-vision", "vision", "full", _of(**QWEN, frames=16, frame_tokens=256), 2, 40),
    # SigLIP-so400m/384, the other tower of gpu-turbo.
    Workload("gpu-turbo-siglip", "vision", "turbo:r=22", _of(shape="llava-ov-7b", frames=32), 2, 60),
    *(_mm(pattern, "1m") for pattern in ("vs", "a_shape")),
    *(_mm(pattern, "16k") for pattern in ("mix", "vs", "a_shape")),
    _mm("mix", "64k"),
    *(_mm(pattern, length) for length in ("360k", "720k") for pattern in ("mix", "grid", "vs", "a_shape")),
    # Time against density: with the rows above, five budgets of every pattern at each length.
    *(
        _mm(pattern, length, budget=budget)
        for length in ("16k", "64k", "128k", "360k", "1m")
        for pattern in ("grid", "vs", "a_shape")
        for budget in (BUDGETS if length != "1m" else BUDGETS[::3])
    ),
    Workload("gpu-prefill-layer", "prefill", PEVLM, _of(**QWEN, **LONG, layers=1), 2, 50),
    Workload("gpu-prefill-uniform", "prefill", "uniform:ratio=0.25", _of(**QWEN, **LONG, layers=1), 2, 40),
    Workload("gpu-noise", "prefill", "full", _of(**QWEN, **LONG, layers=1), 2, 40),
    Workload("gpu-vision-llava", "vision", "full", _of(shape="llava-ov-7b", frames=32), 2, 40),
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
TINY_LLAVA = {"shape": "mini-llava-1.5", "frames": 1, "frame_tokens": 16, "text_tokens": 64, "rounds": 2}
TINY_PLANTED = {"frames": 12, "frame_tokens": 16, "heads": 5, "kv_heads": 1, "head_dim": 32, "rounds": 2}
SMOKE = (
    Workload("smoke-pevlm", "attention", "pevlm:sink=2,block=2", _of(**TINY_ATTENTION, check=True, rivals=True)),
    Workload("smoke-prefill-layer", "prefill", "pevlm:sink=2,block=2", _of(**TINY_MODEL)),
    # What a card records as CUDA graphs is recorded as lists of operations.
    Workload("smoke-decode", "decode", "uniform:ratio=0.25", _of(**TINY_MODEL, steps=4, graphs=True)),
    Workload("smoke-vision", "vision", "full", _of(**TINY_MODEL, graphs=True)),
    Workload("smoke-prefill-alone", "prefill", "pevlm:sink=2,block=2", _of(**TINY_MODEL, alone=True)),
    Workload("smoke-core", "decode", "corematching:beta=0.4", _of(**TINY_LLAVA, steps=4, graphs=True)),
    Workload(
        "smoke-core-gathered", "decode", "corematching:beta=0.4,ffn=gathered", _of(**TINY_LLAVA, steps=4, graphs=True)
    ),
    Workload("smoke-turbo", "vision", "turbo:r=2", _of(shape="mini-llava-1.5", frames=3, rounds=2, graphs=True)),
    Workload("smoke-memvp", "prefill", "memvp:artefact=untrained", _of(**TINY_LLAVA, batch=2, graphs=True)),
    *(
        Workload(
            f"smoke-mm-{pattern}",
            "attention",
            f"mminference:pattern={pattern}",
            _of(**TINY_PLANTED, check=True, rivals=pattern != "mix"),
        )
        for pattern in ("mix", "grid", "vs", "a_shape")
    ),
    Workload(
        "smoke-core-12gb",
        "decode",
        "corematching:beta=0.4,offload=on",
        _of(**TINY_LLAVA, steps=4, graphs=True, memory_gb=12, resident=1),
    ),
    Workload("smoke-density", "attention", "mminference:pattern=grid,budget=2", _of(**TINY_PLANTED)),
    Workload("smoke-mm-prefill", "prefill", "mminference:pattern=mix", _of(**TINY_MODEL)),
    Workload("smoke-block", "attention", "block:block=3", _of(**TINY_ATTENTION, check=True), 2),
)
