"""The fixed workloads of a GPU (contract, section 5), most important first, and tiny ones that rehearse them on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmbench.madeup import Shape


@dataclass(frozen=True)
class Workload:
    """One `vlmbench bench` call, or with `op` "tests" the tests marked gpu."""

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
FRAMES = {"16k": 63, "64k": 255, "128k": 511, "360k": 1406, "720k": 2812, "1m": 3906}
"""Of 256 tokens, in prompts of these lengths."""


def _mm(pattern: str, length: str, part: int = 2) -> Workload:
    """One layer of MMInference's heads on planted queries and keys; float64 beside it where that is quick."""
    long = length in ("360k", "720k", "1m")
    options = _of(frames=FRAMES[length], frame_tokens=256, **HEADS, check=not long, rounds=2 if long else 7)
    return Workload(
        f"gpu-mm-{pattern}-{length}", "attention", f"mminference:pattern={pattern}", options, part, 70 if long else 45
    )


def _mm_prefill(length: str) -> Workload:
    """One layer of a whole prefill; hidden states are random, so indices are scattered as no video's are."""
    options = _of(**QWEN, frames=FRAMES[length], frame_tokens=256, layers=1, rounds=1)
    return Workload(f"gpu-mm-prefill-{length}", "prefill", "mminference:pattern=mix", options, 2, 110)


CORE = _of(**LLAVA, frames=1, frame_tokens=576, text_tokens=64, steps=128)
# Dense has all 256 in its input. Of so few tokens, launches would take longer than what is launched: so both are recorded.
MEMORY = _of(**LLAVA, frames=1, frame_tokens=256, text_tokens=64, batch=8, graphs=True)
WORKLOADS = (
    Workload("gpu-tests", "tests", about_s=100),
    Workload("gpu-pevlm", "attention", PEVLM, _of(**LONG, **HEADS, check=True), about_s=60),
    Workload("gpu-prefill-whole", "prefill", PEVLM, _of(**QWEN, **LONG, rounds=3), about_s=90),
    _mm("mix", "128k", 1),
    Workload("gpu-core", "decode", "corematching:beta=0.4", CORE, about_s=80),
    # 32 frames; at r=21 the tower with its projector takes 1.65 times fewer FLOPs.
    Workload("gpu-turbo", "vision", "turbo:r=21", _of(**LLAVA, frames=32), about_s=45),
    Workload("gpu-memvp", "prefill", "memvp:artefact=untrained", MEMORY, about_s=40),
    _mm("mix", "1m", 1),
    # Part 2: goes on where an earlier call with the same OUT stopped.
    # The proof that a million tokens fit; three runs of it, of 15 s at the card's published rate.
    Workload("gpu-prefill-1m", "prefill", PEVLM, _of(**QWEN, **MILLION, rounds=1, alone=True), 2, 100),
    Workload("gpu-pevlm-rivals", "attention", PEVLM, _of(**LONG, **HEADS, check=True, rivals=True), 2, 60),
    Workload("gpu-decode", "decode", "uniform:ratio=0.25", DECODE, 2, 70),
    Workload("gpu-vision", "vision", "full", _of(**QWEN, frames=16, frame_tokens=256), 2, 40),
    # SigLIP-so400m/384, the other tower of gpu-turbo.
    Workload("gpu-turbo-siglip", "vision", "turbo:r=22", _of(shape="llava-ov-7b", frames=32), 2, 60),
    *(_mm(pattern, length) for length in ("128k", "1m") for pattern in ("grid", "vs", "a_shape")),
    *(_mm_prefill(length) for length in ("360k", "720k", "1m")),
    *(
        _mm(pattern, length)
        for length in ("16k", "64k", "360k", "720k")
        for pattern in ("mix", "grid", "vs", "a_shape")
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
    Workload("smoke-turbo", "vision", "turbo:r=2", _of(shape="mini-llava-1.5", frames=3, rounds=2, graphs=True)),
    Workload("smoke-memvp", "prefill", "memvp:artefact=untrained", _of(**TINY_LLAVA, batch=2, graphs=True)),
    *(
        Workload(f"smoke-mm-{pattern}", "attention", f"mminference:pattern={pattern}", _of(**TINY_PLANTED, check=True))
        for pattern in ("mix", "grid", "vs", "a_shape")
    ),
    Workload("smoke-mm-prefill", "prefill", "mminference:pattern=mix", _of(**TINY_MODEL)),
    Workload("smoke-block", "attention", "block:block=3", _of(**TINY_ATTENTION, check=True), 2),
)
