"""The loop's measurements: spans add up, bytes are bytes, and the closed-form FLOPs are what torch counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmbench import work
from vlmbench.backend import Identity
from vlmbench.engine import TOP, TorchBackend, first_token, generate
from vlmbench.methods.full import Full
from vlmbench.methods.uniform import Uniform
from vlmbench.record import Timing
from vlmbench.suite import Sample
from vlmbench.trace import Trace

QUESTION = "where is the red circle ?"
SAMPLE = Sample("s", "c", (), QUESTION, "topleft", "where ?")


@pytest.fixture
def backend(adapter: Any) -> TorchBackend:
    facts = ("mini", None, "", "float32", "cpu", "cpu", "sdpa", "sdpa", "sdpa")
    return TorchBackend(adapter, Identity(*facts))


def ask(backend: TorchBackend, clip: Any, pass_: Any, method: Any = None, tokens: int = 5) -> Any:
    method = method or Full()
    with backend.attach(method):
        return backend.answer(method, SAMPLE, QUESTION, [clip(6)], pass_=pass_, max_new_tokens=tokens)


def test_spans_are_contiguous_and_add_up_to_the_whole(backend: TorchBackend, clip: Any) -> None:
    timing: Timing = ask(backend, clip, "latency").timing
    spans = [
        getattr(timing, f.name) for f in dataclasses.fields(timing) if f.name not in ("decode_s", "ttft_s", "e2e_s")
    ]
    # Exactly the same clock readings, so only float64 rounding is left.
    assert math.isclose(sum(spans) + sum(timing.decode_s), timing.e2e_s, rel_tol=1e-9)
    assert math.isclose(timing.ttft_s, timing.vision_s + timing.prepare_s + timing.prefill_s, rel_tol=1e-9)
    assert min(spans) >= 0


def test_a_latency_pass_ignores_the_end_token(backend: TorchBackend, clip: Any, monkeypatch: Any) -> None:
    free = ask(backend, clip, "latency").output_ids
    monkeypatch.setattr(type(backend.adapter), "eos_ids", frozenset({free[0]}))
    timed = ask(backend, clip, "latency", tokens=7)
    assert len(timed.output_ids) == 7
    assert len(timed.timing.decode_s) == 6
    assert ask(backend, clip, "accuracy").output_ids == []


def test_peak_memory_holds_at_least_weights_and_cache(backend: TorchBackend, clip: Any) -> None:
    memory = ask(backend, clip, "memory").memory
    weights = sum(p.numel() * 4 for p in backend.adapter.model.parameters())
    assert memory.peak_bytes >= weights + memory.kv_bytes
    assert memory.peak_extra_bytes >= memory.kv_reserved_bytes >= memory.kv_bytes > 0
    assert memory.peak_bytes == max(memory.stages.values())
    assert set(memory.stages) == {"preprocess", "transfer", "vision", "prepare", "prefill", "decode"}
    assert memory.process_peak_bytes > memory.peak_bytes


def test_dropping_tokens_shrinks_the_cache_by_just_those(backend: TorchBackend, clip: Any) -> None:
    dense = ask(backend, clip, "memory").memory
    tokens = ask(backend, clip, "accuracy").tokens
    fewer = ask(backend, clip, "memory", Uniform(tokens=3)).memory
    shapes = backend.adapter.shapes
    per_token = 2 * shapes.layers * shapes.kv_heads * shapes.head_dim * 4
    assert dense.kv_bytes - fewer.kv_bytes == per_token * (tokens["visual"] - 3)


def test_first_token_probabilities_are_complete() -> None:
    for vocabulary in (10, 500):
        logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
        kept = first_token(logits)
        assert kept["ids"][0] == int(logits.argmax())
        assert len(kept["ids"]) == min(TOP, vocabulary)
        total = sum(math.exp(v) for v in kept["logprobs"]) + (math.exp(kept["tail"]) if kept["tail"] is not None else 0)
        # Log-probabilities are stored with five digits.
        assert math.isclose(total, 1.0, abs_tol=1e-4)


def test_closed_form_flops_are_what_torch_counts(adapter: Any, clip: Any) -> None:
    """torch counts the rectangle of a causal attention, so its attention term is set apart and compared as N² pairs."""
    shapes = adapter.shapes
    with torch.inference_mode():
        inputs = adapter.inputs([clip(6)], QUESTION)
        prompt = adapter.splice(inputs, adapter.encode_vision(inputs))
        counter = FlopCounterMode(display=False)
        with counter:
            adapter.prefill(prompt, adapter.new_cache(0))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counted.items() if "attention" in op)
    ours = Full().work(prompt, shapes, Trace())
    dense = dataclasses.replace(ours, pairs=(prompt.length**2,) * shapes.layers)
    assert attention in (0, work.attention_flops(dense, shapes))  # torch has no formula for its CPU kernel
    rotary = sum(n for op, n in counted.items() if "bmm" in op)  # positions × frequencies: not worth a term
    assert sum(counted.values()) - attention - rotary == work.flops(ours, shapes) - work.attention_flops(ours, shapes)
    assert rotary < 0.001 * work.flops(ours, shapes)


def test_a_failing_allocation_is_an_oom_outcome(backend: TorchBackend, clip: Any, monkeypatch: Any) -> None:
    def no_memory(*args: Any) -> None:
        torch.empty(1 << 62, dtype=torch.int8)

    monkeypatch.setattr(backend.adapter, "encode_vision", no_memory)
    outcome = ask(backend, clip, "accuracy")
    assert outcome.status == "oom"
    assert outcome.error


def test_headroom_is_never_outgrown(adapter: Any, clip: Any) -> None:
    done = generate(adapter, Full(), Trace(), [clip(6)], QUESTION, max_new_tokens=9, stop_at_eos=False)
    assert all(layer.physical <= layer._keys.shape[-2] == done.prompt.length + 9 for layer in done.cache.layers)
