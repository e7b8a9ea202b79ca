"""The promises of `vlmbench check contract`, each tried on a `Subject`: a loaded model, a method and a prompt of noise.

A promise returns a detail to show, or raises `Broken` or `Skipped` with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmbench.cache import lengths
from vlmbench.composed import neutral_of, parts_of
from vlmbench.engine import Generation, generate
from vlmbench.method import Method
from vlmbench.models.base import ModelAdapter
from vlmbench.patch import fingerprint
from vlmbench.trace import Trace
from vlmbench.video import Clip

STEPS = 8
"""Tokens of every answer."""
QUESTION = "What is shown here?"
SLACK = 4.0
"""How many times the difference between two orders of the same sums, see `Subject.rounding`, a neutral setting may show."""


class Answer(NamedTuple):
    done: Generation
    trace: Trace


class Broken(Exception):
    """A promise that is not kept, in words."""


class Skipped(Exception):
    """A promise that does not apply, and why."""


@dataclass
class Subject:
    """A loaded model, a method, and the prompt that both are tried on."""

    adapter: ModelAdapter
    method: Method
    full: Method
    frames: int
    side: int = 64

    def clip(self, frames: int | None = None, kind: Any = "video") -> Clip:
        """Noise, the same for the same arguments; `side` pixels, which a tower of one size rescales."""
        n = frames or self.frames
        noise = np.random.default_rng(n).integers(0, 256, (n, self.side, self.side, 3), dtype=np.uint8)
        return Clip(noise, tuple(range(n)), tuple(i / 2 for i in range(n)), 2.0, kind, Path("noise"))

    def answer(self, method: Method, clips: list[Clip]) -> Answer:
        with method.attach(self.adapter) as trace:
            return Answer(self.ask(method, trace, clips), trace)

    def ask(self, method: Method, trace: Trace, clips: list[Clip]) -> Generation:
        return generate(
            self.adapter,
            method,
            trace,
            clips,
            QUESTION,
            max_new_tokens=STEPS,
            stop_at_eos=False,
            sample_id="check",
        )

    def rounding(self) -> float:
        """Largest difference of the first logits of full attention under sdpa and eager: the same sums in another order."""
        found = []
        for kernel in ("sdpa", "eager"):
            with self.adapter.attention(kernel):
                found.append(self.answer(self.full, [self.clip()]).done.first_logits)
        return _gap(*found)


def generates(subject: Subject) -> str:
    """Full attention's greedy tokens are those of the model's own ``generate``."""
    adapter, clips = subject.adapter, [subject.clip()]
    ours = subject.answer(subject.full, clips).done.token_ids
    inputs = adapter.to_device(adapter.inputs(clips, QUESTION))
    with torch.inference_mode():
        theirs = adapter.model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, eos_token_id=None
        )
    other = theirs[0, inputs["input_ids"].shape[1] :].tolist()
    if ours != other:
        raise Broken(f"{ours} here, {other} by generate")
    return f"{STEPS} tokens"


def restores(subject: Subject) -> None:
    """After a sample, and after an exception, the model is as before, bit for bit."""
    subject.answer(subject.full, [subject.clip()])  # some families install permanent hooks in their first pass
    before = fingerprint(subject.adapter.model)
    subject.answer(subject.method, [subject.clip()])
    if fingerprint(subject.adapter.model) != before:
        raise Broken("after a sample the model is not what it was")
    try:
        with subject.method.attach(subject.adapter):
            raise KeyError
    except KeyError:
        pass
    if fingerprint(subject.adapter.model) != before:
        raise Broken("after an exception the model is not what it was")


def neutral(subject: Subject) -> str:
    """The neutral setting equals full attention through the method's own path, up to the order of sums."""
    setting = neutral_of(subject.method)
    if setting is None:
        raise Skipped("no setting of it equals full attention")
    full = subject.answer(subject.full, [subject.clip()]).done
    gap, bound = (
        _gap(subject.answer(setting, [subject.clip()]).done.first_logits, full.first_logits),
        subject.rounding(),
    )
    if gap > SLACK * bound:
        raise Broken(f"logits differ by {gap:.3g}; sdpa and eager differ by {bound:.3g}")
    return f"logits differ by {gap:.3g}; sdpa and eager by {bound:.3g}"


def acts(subject: Subject) -> str:
    """On a prompt that is long enough the method changes something."""
    if subject.method.name == subject.full.name:
        raise Skipped("it is full attention")
    answer = subject.answer(subject.method, [subject.clip()])
    if not answer.trace.applied:
        raise Skipped(
            f"nothing to do on {subject.frames} frames ({answer.trace.reason}); give --frames a larger number"
        )
    if subject.method.traits.exact:
        raise Skipped("it changes where something is computed and no answer")
    full = subject.answer(subject.full, [subject.clip()]).done
    same_cache = all(map(_same, _held(answer.done), _held(full)))
    if same_cache and torch.equal(answer.done.first_logits, full.first_logits):
        raise Broken("it says that it acted, and first logits and cache are full attention's")
    visual = (answer.done.prompt.layout.n_visual, full.prompt.layout.n_visual)
    return f"{visual[0]} of {visual[1]} visual tokens"


def repeats(subject: Subject) -> None:
    """The same sample gives the same answer twice, bit for bit."""
    first, second = (subject.answer(subject.method, [subject.clip()]).done for _ in range(2))
    _equal(first, second, "a second time the same sample")


def forgets(subject: Subject) -> None:
    """Nothing goes from one sample to the next while the method stays attached."""
    alone = subject.answer(subject.method, [subject.clip()]).done
    with subject.method.attach(subject.adapter) as trace:
        subject.ask(subject.method, trace, [subject.clip(subject.frames + 2)])
        after = subject.ask(subject.method, trace, [subject.clip()])
    _equal(alone, after, "behind another sample the same one")


def counts(subject: Subject) -> str:
    """The cache has seen every token but the last generated one, and never holds more than it saw."""
    done = subject.answer(subject.method, [subject.clip()]).done
    logical, physical = lengths(done.cache)
    if set(logical) != {done.prompt.length + STEPS - 1}:
        raise Broken(f"layers saw {sorted(set(logical))} tokens, not {done.prompt.length + STEPS - 1}")
    if any(held > seen for held, seen in zip(physical, logical, strict=True)):
        raise Broken("a layer holds more keys than it saw tokens")
    return f"{sum(physical)} keys in {len(physical)} layers"


def reads(subject: Subject) -> None:
    """A prompt without pictures is answered as by full attention, unless something was trained, and marked."""
    if "weights" in subject.method.traits.takes:
        raise Skipped("what it does to weights has nothing to do with pictures")
    if any(part.on_text for part in parts_of(subject.method)):
        raise Skipped("it means to act on text alone as well")
    full = subject.answer(subject.full, []).done
    answer = subject.answer(subject.method, [])
    if not subject.method.traits.trained:
        _equal(answer.done, full, "without pictures, it and full attention")
    if answer.trace.applied and subject.method.name != subject.full.name:
        raise Broken("it says that it acted on a prompt without pictures")
    if subject.method.traits.trained:
        raise Skipped("it is trained, and what it learned stays where there is no picture")


def mixes(subject: Subject) -> None:
    """Pictures and videos in one prompt."""
    for kinds in (["image"], ["video", "video"], ["image", "video"]):
        clips = [subject.clip(1, "image") if kind == "image" else subject.clip() for kind in kinds]
        done = subject.answer(subject.method, clips).done
        if len(done.token_ids) != STEPS or done.prompt.layout.length != done.prompt.length:
            raise Broken(
                f"{' and '.join(kinds)}: {len(done.token_ids)} tokens, a layout of {done.prompt.layout.length}"
            )


def works(subject: Subject) -> str:
    """The tokens and neurons that the method reports are those that every layer was handed."""
    adapter, method = subject.adapter, subject.method
    with torch.inference_mode(), method.attach(adapter) as trace:
        trace.reset("check")
        inputs = adapter.to_device(adapter.inputs([method.prepare_clip(subject.clip(), trace)], QUESTION))
        prompt = method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
        with _counting(adapter) as (tokens, neurons):
            adapter.prefill(prompt, adapter.new_cache(0))
        work = method.work(prompt, adapter.shapes, trace)
    for what, said, seen in (("tokens", work.tokens, tokens), ("neurons", work.neurons, neurons)):
        if list(said) != seen:
            raise Broken(f"it reports {what} {_short(said)}, and the layers were handed {_short(seen)}")
    return f"{sum(tokens)} tokens in all layers"


PROMISES: dict[str, Callable[[Subject], str | None]] = {
    "the model's own generate": generates,
    "leaving restores the model": restores,
    "neutral is full attention": neutral,
    "the method acts": acts,
    "the same sample twice": repeats,
    "nothing leaks to the next sample": forgets,
    "the cache counts every token": counts,
    "text alone is left alone": reads,
    "pictures and videos mix": mixes,
    "reported work is done work": works,
}


@contextmanager
def _counting(adapter: ModelAdapter) -> Iterator[tuple[list[int], list[int]]]:
    tokens: list[int] = []
    neurons: list[int] = []

    def layer_sees(module: Any, args: Any, kwargs: Any) -> None:
        tokens.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    def ffn_sees(module: Any, args: Any) -> None:
        neurons.append(args[0].shape[2])

    handles = [layer.register_forward_pre_hook(layer_sees, with_kwargs=True) for layer in adapter.layers]
    handles += [layer.mlp.down_proj.register_forward_pre_hook(ffn_sees) for layer in adapter.layers]
    try:
        yield tokens, neurons
    finally:
        for handle in handles:
            handle.remove()


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def _held(done: Generation) -> list[Tensor]:
    return [each for layer in done.cache.layers for each in (layer.keys, layer.values)]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _equal(one: Generation, other: Generation, what: str) -> None:
    if not torch.equal(one.first_logits, other.first_logits):
        raise Broken(f"{what} has other logits, by {_gap(one.first_logits, other.first_logits):.3g} at most")
    if one.token_ids != other.token_ids:
        raise Broken(f"{what} has other tokens: {one.token_ids} and {other.token_ids}")


def _short(values: Any) -> str:
    shown = ", ".join(map(str, list(values)[:4]))
    return f"[{shown}{', …' if len(values) > 4 else ''}]"
