"""Which models can be named, without importing torch: the trained ones shipped here, presets, and the stand-in."""

from __future__ import annotations

from vlmbench.spec import Spec, nearest, parse

PRESETS: dict[str, str] = {
    "qwen2.5-vl-7b": "Qwen2.5-VL 7B shape",
    "qwen2.5-vl-3b": "Qwen2.5-VL 3B shape",
    "qwen2-vl-7b": "Qwen2-VL 7B shape",
    "qwen2-vl-2b": "Qwen2-VL 2B shape",
    "llava-ov-7b": "LLaVA-OneVision 7B (Qwen2) shape",
    "llava-ov-0.5b": "LLaVA-OneVision 0.5B (Qwen2) shape",
    "mini-qwen2.5-vl": "four-layer Qwen2.5-VL for tests",
    "mini-qwen2-vl": "four-layer Qwen2-VL for tests",
    "mini-llava-ov": "four-layer LLaVA-OneVision for tests",
}
"""Shapes that ``<preset>@random[:layers=n]`` fills with random weights."""


def names() -> list[tuple[str, str]]:
    """(name, one line) of every model that needs no download."""
    from vlmbench.reference import SHIPPED

    trained = [(name, "trained here on synthvideo, shipped with its log") for name in sorted(SHIPPED)]
    random = [(f"{name}@random", f"{text}, random weights") for name, text in PRESETS.items()]
    stand_in = [("dummy", "no model at all: a stand-in for store, fault and report tests, never in a table")]
    return [*trained, *random, *stand_in]


def split_preset(text: str) -> tuple[str, Spec] | None:
    """``name@random[:layers=n]`` as (preset, spec); None when `text` names no random preset."""
    spec = parse(text)
    name, at, kind = spec.name.partition("@")
    return (name, spec) if at and kind == "random" else None


def suggestion(text: str) -> str:
    """A did-you-mean over every known model name."""
    return nearest(text, [name for name, _ in names()])
