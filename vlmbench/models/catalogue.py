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
    "llava-1.5-7b": "LLaVA-1.5 7B (CLIP-L/336, Llama) shape; 576 tokens a picture or frame",
    "llava-next-video-7b": "LLaVA-NeXT-Video 7B (CLIP-L/336, Llama) shape; 144 tokens a frame",
    "longvila-7b": "LongVILA 7B (SigLIP 448 px, Qwen2-7B) shape for `plan` and `bench`, on LLaVA-OneVision's class",
    "llava-video-7b": "LLaVA-Video 7B (SigLIP 384 px, Qwen2-7B) shape for `plan` and `bench`, on LLaVA-OneVision's class",
    "blip-vqa-base": "BLIP base (ViT-B/16, BERT) for questions, 480 px as trained: vision tower alone, for `bench vision`",
    "blip-captioning-base": "BLIP base for captions, 384 px: vision tower alone, for `bench vision`",
    "blip-itm-base": "BLIP base for image-text matching, 384 px: vision tower alone, for `bench vision`",
    "mini-qwen2.5-vl": "four-layer Qwen2.5-VL for tests",
    "mini-qwen2-vl": "four-layer Qwen2-VL for tests",
    "mini-llava-ov": "four-layer LLaVA-OneVision for tests",
    "mini-llava-1.5": "four-layer LLaVA-1.5 for tests",
    "mini-llava-next-video": "four-layer LLaVA-NeXT-Video for tests",
    "mini-blip-vqa": "two-layer BLIP for questions, for tests",
    "mini-blip-captioning": "two-layer BLIP for captions, for tests",
    "mini-blip-itm": "two-layer BLIP for image-text matching, for tests",
}
"""Shapes that ``<preset>@random[:layers=n]`` fills with random weights."""

FRAME_TOKENS: dict[str, int] = {"longvila-7b": 257, "llava-video-7b": 210}
"""Published tokens a frame of shapes whose own class transformers has not: 16 × 16 and a line's end; 14 rows of 14 and theirs.

What stands in for that class ends a video and not a frame or a row: 256 and 196. `plan` counts the published ones; `bench`
takes them as ``--frame-tokens``.
"""


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
    """A did-you-mean over every known model name; of a preset's, how its random weights are asked for."""
    name, colon, params = text.partition(":")
    if name in PRESETS:
        return f" Did you mean '{name}@random{colon}{params}'?"
    return nearest(text, [name for name, _ in names()])
