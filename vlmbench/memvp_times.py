"""What visual tokens in the prompt cost beside MemVP's memory: a training step, and prefill at the shape of LLaMA-7B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.memvp_data import Material, Question
from vlmbench.memvp_learner import MemoryLearner
from vlmbench.memvp_lora import Lora, LoraLearner
from vlmbench.memvp_memory import SCALE, SLOTS, Memory, VisualMemory, lay_out
from vlmbench.memvp_prompt import add_memory, shape_for
from vlmbench.memvp_train import Recipe, Trainer
from vlmbench.patch import Patcher
from vlmbench.rounds import Clock, Side, race

if TYPE_CHECKING:
    from vlmbench.memvp_results import Row
    from vlmbench.methods.memvp import Memvp
    from vlmbench.models.base import ModelAdapter
    from vlmbench.progress import Progress

VISUAL, TEXT, ANSWER, BATCH, ROUNDS = 256, 64, 2, 8, 7
"""Tokens of a made-up question, questions a step, and rounds of the timing."""
TEXTS = (64, 256)
"""Text tokens of the prefill."""
LLAMA = "llava-1.5-7b@random:layers=2"
"""Its language model has the shape of LLaMA-7B."""


def made_up(adapter: ModelAdapter, visual: int, text: int, answer: int, batch: int) -> Material:
    """One batch of questions of these lengths: noise, for times alone."""
    generator = torch.Generator().manual_seed(0)
    before = text // 2
    layout = TokenLayout(
        (
            Span("text", 0, before),
            Span("image", before, before + visual, 0, 0),
            Span("text", before + visual, text + visual),
        )
    )
    places = torch.arange(layout.length).expand(*adapter.decode_positions(0).shape[:-1], -1).to(adapter.device)
    prompt = Prompt(torch.empty(1, layout.length, 0, device=adapter.device), places, layout, layout.length)
    ids = torch.randint(adapter.shapes.vocab, (batch, layout.length + answer), generator=generator).to(adapter.device)
    pictures = torch.randn(batch, visual, adapter.shapes.hidden, generator=generator).to(adapter.device, adapter.dtype)
    questions = [
        Question(prompt, row[: layout.length], row[layout.length :], index, str(index)) for index, row in enumerate(ids)
    ]
    return Material(questions, (), list(pictures), "made up")


def steps(fresh: Callable[[], ModelAdapter], method: Memvp, folder: Path, progress: Progress) -> Row:
    """Seconds and memory of a training step, in turns: MemVP, and LoRA with the visual tokens in the prompt.

    `fresh` loads the model: each side trains its own.
    """
    trainers = {}
    for name in ("memvp", "lora"):
        adapter = fresh()
        material, memory = made_up(adapter, VISUAL, TEXT, ANSWER, BATCH), method.new_memory(adapter)
        learner = (
            MemoryLearner(adapter, material, memory)
            if name == "memvp"
            else LoraLearner(adapter, material, Lora(adapter, memory.count, 0))
        )
        trainers[name] = Trainer(learner, Recipe(ROUNDS + 3, BATCH, 1e-4, 0), folder / "times", name, progress)
    progress.start(ROUNDS, "training step", "round")
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(ROUNDS + 2):
        for name in sorted(trainers, reverse=bool(turn % 2)):
            seconds[name].append(trainers[name].timed_step())
        progress.advance()
    progress.finish()
    kept = {name: each[2:] for name, each in seconds.items()}
    return {
        "visual_tokens": VISUAL,
        "text_tokens": TEXT,
        "batch": BATCH,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        **{f"{name}_s": median(each) for name, each in kept.items()},
        **{f"{name}_bytes": trainer.step_bytes() for name, trainer in trainers.items()},
        **_ratio(kept["lora"], kept["memvp"]),
    }


@torch.inference_mode()
def prefill(adapter: ModelAdapter, text: int, rounds: int, batch: int = BATCH) -> Row:
    """Seconds of the language model's prefill of `text` tokens, `VISUAL` visual ones before them or in memory.

    Every question of the batch has a picture of its own. What MemVP makes of it, the projector and all slots, is in its time.
    """
    shapes = adapter.shapes
    memory = VisualMemory(shape_for(adapter, SLOTS), scale=SCALE).start(0).eval()
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(batch, VISUAL, shapes.hidden, generator=generator)
    said = torch.randn(batch, text, shapes.hidden, generator=generator)
    slots = [lay_out([(picture, None)], SLOTS, 1, picture) for picture in seen]
    with_tokens = _prompt(adapter, torch.cat([seen, said], 1))
    held: Memory | None = None

    def ours(prompt: Prompt) -> None:
        nonlocal held
        with Patcher(adapter) as patch:
            add_memory(patch, memory, lambda: held)
            held = memory(slots)
            adapter.prefill(prompt, adapter.new_cache(1))

    dense = Side("tokens", lambda prompt: adapter.prefill(prompt, adapter.new_cache(1)), lambda _: with_tokens)
    own = Side("memory", ours, lambda _: _prompt(adapter, said))
    found = race(dense, own, rounds, Clock(adapter.device))
    return {
        "text_tokens": text,
        "visual_tokens": VISUAL,
        "slots": SLOTS,
        "batch": batch,
        "layers": shapes.layers,
        "hidden": shapes.hidden,
        "intermediate": shapes.intermediate,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "tokens_s": median(found.dense_s),
        "memory_s": median(found.method_s),
        "expected": expected(text, VISUAL, SLOTS, shapes.hidden, shapes.intermediate),
        **_ratio(found.dense_s, found.method_s),
    }


def expected(text: int, visual: int, slots: int, hidden: int, intermediate: int) -> float:
    """FLOPs of a LLaMA layer over text and visual tokens, over those on the text and a memory of so many slots."""
    token = 8 * hidden**2 + 6 * hidden * intermediate

    def layer(n: int, memory: int) -> int:
        return n * (token + 4 * memory * hidden) + 4 * n**2 * hidden

    return layer(text + visual, 0) / layer(text, slots)


def _prompt(adapter: ModelAdapter, embeds: Tensor) -> Prompt:
    batch, n = embeds.shape[:2]
    places = torch.arange(n).expand(*adapter.decode_positions(0).shape[:-2], batch, -1)
    layout = TokenLayout((Span("text", 0, n),))
    return Prompt(embeds.to(adapter.device, adapter.dtype), places.to(adapter.device), layout, n)


def _ratio(theirs: list[float], own: list[float]) -> Row:
    """Median, least and most of the rounds."""
    ratios = [slow / fast for slow, fast in zip(theirs, own, strict=True)]
    return {"ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
