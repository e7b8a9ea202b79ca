"""Which method takes which model family, and the reason where one does not: ``python -m vlmbench.families > docs/families.md``.

The answers are those of the methods' own checks on a small random model of each family.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vlmbench.errors import UsageError
from vlmbench.registry import methods
from vlmbench.spec import build, parse

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.models.base import ModelAdapter


class Family(NamedTuple):
    name: str
    preset: str
    """The small random model that is asked."""
    parts: str
    frame: str
    """What a video's frame is in the prompt."""


FAMILIES = (
    Family(
        "LLaVA-OneVision", "mini-llava-ov", "SigLIP, Qwen2", "196 tokens (14 × 14, pooled); one newline ends the video"
    ),
    Family("LLaVA-1.5", "mini-llava-1.5", "CLIP, Llama", "576 tokens (24 × 24): each frame is shown as a picture"),
    Family("LLaVA-NeXT-Video", "mini-llava-next-video", "CLIP, Llama", "144 tokens (12 × 12, pooled)"),
    Family("Qwen2-VL", "mini-qwen2-vl", "own ViT, Qwen2 with M-RoPE", "two frames are a unit; tokens by their size"),
    Family(
        "Qwen2.5-VL",
        "mini-qwen2.5-vl",
        "own windowed ViT, Qwen2 with M-RoPE",
        "two frames are a unit; tokens by their size",
    ),
    Family(
        "BLIP", "mini-blip-vqa", "ViT-B/16, BERT with cross-attention", "none: 901 (480 px) or 577 (384 px) beside it"
    ),
)


MORE = {"downsample": ("downsample:ratio=0.5,axis=pixels",)}
"""Settings that are asked beside a method's examples, since what they need is a matter of the family."""


def answers(adapter: ModelAdapter) -> dict[str, list[str]]:
    """Method -> for each setting that is asked the sentence with which this model refuses it, empty when it does not."""
    found = {}
    for name in methods.names():
        cls = methods.load(name)
        settings = [*cls.examples(), *(build(cls, parse(spec), "method") for spec in MORE.get(name, ()))]
        found[name] = [_refusal(adapter, each) for each in settings]
    return found


def _refusal(adapter: ModelAdapter, method: Method) -> str:
    try:
        adapter.check_prompted()
        method.check(adapter)
    except UsageError as error:
        return str(error)
    return ""


def _in_tower(adapter: ModelAdapter, name: str) -> bool:
    """Whether some example acts in the vision tower alone, and on this one."""
    for method in methods.load(name).examples():
        with suppress(UsageError):
            method.check(adapter)
            if method.traits.stages == {"vision"}:
                return True
    return False


def to_markdown() -> str:
    """The whole page."""
    import torch

    from vlmbench.models.loading import load

    notes: list[str] = []
    rows = []
    for family in FAMILIES:
        options = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa"}
        adapter = load(f"{family.preset}@random", **options).adapter  # type: ignore[arg-type]
        found = answers(adapter)
        cells = []
        for name, said in found.items():
            reasons = [each for each in dict.fromkeys(said) if each]
            notes += [each for each in reasons if each not in notes]
            marks = "".join(f" [{notes.index(each) + 1}]" for each in reasons)
            word = "no" if all(said) else "partly" if reasons else "yes"
            cells.append(f"{'tower' if word == 'no' and _in_tower(adapter, name) else word}{marks}")
        rows.append((family.name, *cells))
    names = ("", *methods.names())
    lines = [
        "# Model families",
        "",
        "Written by `python -m vlmbench.families > docs/families.md`; a test keeps it true.",
        "",
        *_table([("family", "parts", "a frame"), *((each.name, each.parts, each.frame) for each in FAMILIES)]),
        "",
        "## Which method takes which family",
        "",
        "As the methods' own checks answer, asked with their example settings on a small random model. *Tower*: on the vision",
        "tower alone, and not in a run.",
        "",
        *_table(list(zip(*(names, *rows), strict=True))),
        "",
        *(f"{number}. {text}" for number, text in enumerate(notes, 1)),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + " --- |" * len(rows[0]), *body]


if __name__ == "__main__":
    print(to_markdown(), end="")
