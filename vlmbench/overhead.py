"""What the harness itself costs: one sample through the engine against a bare loop of the same calls, in turns.

``python -m vlmbench.overhead --out results/cpu/overhead.json`` writes the committed table. The bound that the project holds
itself to is 2 ms a sample and 0.1 ms a generated token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from vlmbench.engine import TorchBackend
from vlmbench.header import measured_on
from vlmbench.machine import load_backend
from vlmbench.request import RunRequest
from vlmbench.session import make_methods, make_suite
from vlmbench.video import Decoder, default_decoder

if TYPE_CHECKING:
    from vlmbench.models.base import ModelAdapter
    from vlmbench.video import Clip

BOUND_S = 2e-3
BOUND_PER_TOKEN_S = 1e-4


@torch.inference_mode()
def bare_loop(adapter: ModelAdapter, clips: Sequence[Clip], question: str, tokens: int) -> float:
    """Seconds of the same greedy answer with nothing around it: no method, no trace, no clock between stages."""
    begin = time.perf_counter()
    inputs = adapter.to_device(adapter.inputs(clips, question))
    prompt = adapter.splice(inputs, adapter.encode_vision(inputs))
    cache = adapter.new_cache(headroom=tokens)
    token = adapter.prefill(prompt, cache).argmax(-1, keepdim=True)
    ids = [int(token)]
    for step in range(tokens - 1):
        token = adapter.decode(token, prompt.next_position + step, cache).argmax(-1, keepdim=True)
        ids.append(int(token))
    return time.perf_counter() - begin


def measure(model: str, length: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds, the order turned round each time; medians in seconds."""
    suite = make_suite(f"synthvideo:length={length}")
    (full,) = make_methods(["full"])
    backend = load_backend(RunRequest(), model)
    if not isinstance(backend, TorchBackend):
        raise typer.BadParameter("a real model is needed", param_hint="--model")
    sample = suite.samples("test")[0]
    suite.materialise(sample)
    with Decoder(default_decoder()) as decoder:
        clips = [decoder.read(m.path, kind=m.kind, frames=None, rule="endpoints") for m in sample.media]
    question = suite.asked(sample, [t for clip in clips for t in clip.times_s]).question
    ours: list[float] = []
    other: list[float] = []
    bare: list[float] = []

    def engine() -> None:
        begin = time.perf_counter()
        with backend.attach(full):
            outcome = backend.answer(full, sample, question, clips, pass_="latency", max_new_tokens=tokens)
        ours.append(time.perf_counter() - begin)
        other.append(outcome.timing.other_s if outcome.timing else 0.0)

    def plain() -> None:
        bare.append(bare_loop(backend.adapter, clips, question, tokens))

    for turn in range(rounds + 2):
        for each in (engine, plain) if turn % 2 else (plain, engine):
            each()
    differences = [a - b for a, b in zip(ours[2:], bare[2:], strict=True)]  # two rounds of warm-up
    return {
        "model": model,
        "frames": length,
        "tokens": tokens,
        "rounds": rounds,
        "engine_s": median(ours[2:]),
        "bare_s": median(bare[2:]),
        "difference_s": median(differences),
        "other_s": median(other[2:]),
        "bound_s": BOUND_S + BOUND_PER_TOKEN_S * tokens,
    }


def main(
    out: Annotated[Path | None, typer.Option(help="Write the rows there as JSON.")] = None,
    model: str = "tiny-llava-ov",
    rounds: int = 30,
) -> None:
    """Measure at two answer lengths and print one JSON document."""
    rows = [measure(model, 32, tokens, rounds) for tokens in (2, 32)]
    text = json.dumps({"schema": 1, **measured_on(), "rows": rows}, indent=1) + "\n"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    typer.run(main)
