"""The only prefill and decode loop: inputs -> vision -> splice -> prepare -> prefill -> decode, one sample at a time.

`generate()` is not used: it runs the vision tower inside its own prefill, synchronises at every step, and has no place to
stand between vision and layer 0. That the greedy tokens are the same is a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlmbench import work
from vlmbench.backend import Backend, Identity, Outcome
from vlmbench.cache import cache_bytes
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.meter import MemoryMeter, Meter, Stopwatch
from vlmbench.models.base import Features, ModelAdapter
from vlmbench.trace import Trace

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.record import Pass
    from vlmbench.suite import Caption, Sample
    from vlmbench.video import Clip

TOP = 64
"""Log-probabilities kept of the first token; the rest is one number, so that a divergence can be bounded."""

QUESTION_ROOM = 256
"""Tokens by which the next question may be longer than the first before the cache has to move to a larger buffer."""


class Generation(NamedTuple):
    """What one sample left behind; tensors live until the caller drops them."""

    token_ids: list[int]
    first_logits: Tensor
    """``[V]``, of the first generated token."""
    prompt: Prompt
    """As prefilled: of a next question (`generate_next`) the tokens behind the prefix alone."""
    cache: Cache
    clips: tuple[Clip, ...] = ()
    """As the method left them."""


class Prefix(NamedTuple):
    """What the next questions on the same media may start from: a prompt's tokens up to the last visual one."""

    cache: Cache
    length: int
    """Tokens of the cache that are the prefix's; those behind it are forgotten by the next question."""
    position: Tensor
    """``[1, 1]``, or ``[3, 1, 1]``: of the first token behind."""
    next_position: int
    """Position of the first generated token, if no token stood behind."""
    clips: tuple[Clip, ...]
    text: list[int]
    """Token ids before and between the media, one placeholder a medium: a question behind others is refused."""


@torch.inference_mode()
def generate(
    adapter: ModelAdapter,
    method: Method,
    trace: Trace,
    clips: Sequence[Clip],
    question: str,
    *,
    captions: Sequence[Caption] = (),
    max_new_tokens: int,
    stop_at_eos: bool = True,
    sample_id: str = "",
    meter: Meter | None = None,
    reserve: int = 0,
) -> Generation:
    """Answer one question greedily with an attached method. The end-of-answer token is not part of the ids.

    `reserve` is room in the cache for so many more tokens, of longer questions to come (`generate_next`).
    """
    meter = meter or Meter()
    trace.reset(sample_id)
    meter.start()
    clips = tuple(method.prepare_clip(clip, trace) for clip in clips)
    inputs = adapter.inputs(clips, question, captions)
    meter.stage("preprocess")
    inputs = adapter.to_device(inputs)
    meter.stage("transfer")
    features = adapter.encode_vision(inputs) if method.traits.sees_vision else Features()
    meter.stage("vision")
    prompt = method.prepare(adapter.splice(inputs, features), trace)
    del inputs, features  # of a long video gigabytes, and prefill needs them for its own
    meter.stage("prepare")
    cache = adapter.new_cache(headroom=max_new_tokens + reserve)
    logits = adapter.prefill(prompt, cache)
    return _decoded(adapter, Generation([], logits[0], prompt, cache, clips), max_new_tokens, stop_at_eos, meter)


def prefix_of(adapter: ModelAdapter, done: Generation, question: str, captions: Sequence[Caption] = ()) -> Prefix:
    """The prefix that the answer to `question` left, of a method with `Traits.prefix_reusable` that stays attached.

    Raises `ValueError` when there is nothing visual to keep.
    """
    prompt = done.prompt
    if all(span.kind == "text" for span in prompt.layout):
        raise ValueError("the prompt holds no visual token whose keys the next question could reuse")
    before, behind = adapter.text_ids(done.clips, question, captions)
    length = prompt.length - len(behind)  # a frame that lost all of its tokens may have text behind it
    return Prefix(
        cache=done.cache,
        length=length,
        position=prompt.positions[..., length : length + 1],
        next_position=prompt.next_position - (prompt.length - length),
        clips=done.clips,
        text=before,
    )


@torch.inference_mode()
def generate_next(
    adapter: ModelAdapter,
    prefix: Prefix,
    question: str,
    *,
    captions: Sequence[Caption] = (),
    max_new_tokens: int,
    stop_at_eos: bool = True,
    meter: Meter | None = None,
) -> Generation:
    """Answer the next question on the same media: only the text behind the last visual token is prefilled.

    The answer is the one that `generate` would give, and its cache is the prefix's own, for the question after this one.
    Raises `ValueError` when the text before or between the media is another.
    """
    meter = meter or Meter()
    meter.start()
    before, ids = adapter.text_ids(prefix.clips, question, captions)
    if before != prefix.text:
        raise ValueError("the next question must have the same media and captions; the text before it is another")
    meter.stage("preprocess")
    tokens = torch.tensor([ids], device=adapter.device)
    meter.stage("transfer")
    prefix.cache.crop(prefix.length)
    n = len(ids)
    positions = prefix.position + torch.arange(n, device=prefix.position.device)  # text counts up on every axis
    layout = TokenLayout((Span("text", 0, n),))
    prompt = Prompt(adapter.model.get_input_embeddings()(tokens), positions, layout, prefix.next_position + n)
    meter.stage("prepare")
    logits = adapter.extend(prompt.embeds, prompt.positions, prefix.cache)
    done = Generation([], logits[0], prompt, prefix.cache, prefix.clips)
    return _decoded(adapter, done, max_new_tokens, stop_at_eos, meter)


def _decoded(
    adapter: ModelAdapter, done: Generation, max_new_tokens: int, stop_at_eos: bool, meter: Meter
) -> Generation:
    """The generation with its tokens, from the first one's logits on."""
    prompt, cache = done.prompt, done.cache
    token = done.first_logits[None].argmax(-1, keepdim=True)
    ids = [int(token)]  # the first id is on the host here: this is where time to first token ends
    meter.stage("prefill")
    eos = adapter.eos_ids if stop_at_eos else frozenset()
    for step in range(max_new_tokens - 1):
        if ids[-1] in eos:
            break
        token = adapter.decode(token, prompt.next_position + step, cache).argmax(-1, keepdim=True)
        ids.append(int(token))
        meter.stage("decode")
    return done._replace(token_ids=ids[:-1] if ids[-1] in eos else ids)


class TorchBackend(Backend):
    """A loaded model that answers samples for the runner."""

    def __init__(self, adapter: ModelAdapter, identity: Identity) -> None:
        self.adapter = adapter
        self._identity = identity
        self._trace = Trace()

    @property
    def identity(self) -> Identity:
        return self._identity

    def check(self, method: Method) -> None:
        self.adapter.check_prompted()
        method.check(self.adapter)

    @contextmanager
    def attach(self, method: Method) -> Iterator[None]:
        with method.attach(self.adapter) as trace:
            self._trace = trace
            yield

    def answer(
        self,
        method: Method,
        sample: Sample,
        prompt: str,
        clips: Sequence[Clip],
        *,
        pass_: Pass,
        max_new_tokens: int,
        kernel: str | None = None,
    ) -> Outcome:
        if not method.traits.uses_model:
            return Outcome(raw_text=method.answer(sample), tokens={"prompt": 0, "visual": 0})
        (outcome,) = self._in_memory(
            kernel, lambda: [self._answer(method, sample, prompt, clips, pass_, max_new_tokens)]
        )
        return outcome

    def answer_together(
        self,
        method: Method,
        samples: Sequence[Sample],
        prompts: Sequence[str],
        clips: Sequence[Clip],
        *,
        max_new_tokens: int,
        kernel: str | None = None,
    ) -> list[Outcome]:
        if not method.traits.prefix_reusable:
            raise ValueError(f"{method.name}'s keys of a video may depend on the question: nothing can be reused")
        return self._in_memory(kernel, lambda: list(self._each(method, samples, prompts, clips, max_new_tokens)))

    def _each(
        self,
        method: Method,
        samples: Sequence[Sample],
        prompts: Sequence[str],
        clips: Sequence[Clip],
        max_new_tokens: int,
    ) -> Iterator[Outcome]:
        adapter, trace = self.adapter, self._trace
        prefix: Prefix | None = None
        for sample, prompt in zip(samples, prompts, strict=True):
            with (meter := Stopwatch(adapter.device)):
                options: dict[str, Any] = {
                    "captions": sample.captions,
                    "max_new_tokens": max_new_tokens,
                    "stop_at_eos": False,
                    "meter": meter,
                }
                if prefix is None:
                    options |= {"sample_id": sample.id, "reserve": QUESTION_ROOM}
                    done = generate(adapter, method, trace, clips, prompt, **options)
                    prefix = prefix_of(adapter, done, prompt, sample.captions)
                else:
                    done = generate_next(adapter, prefix, prompt, **options)
                timing = meter.timing()
            yield Outcome(
                output_ids=done.token_ids,
                timing=timing,
                applied=trace.applied,
                reason=trace.reason,
                tokens={"prompt": done.prompt.length, "visual": done.prompt.layout.n_visual},
                trace=trace.to_json(),
            )

    def _in_memory(self, kernel: str | None, ask: Callable[[], list[Outcome]]) -> list[Outcome]:
        """What `ask` gives under an attention kernel; one outcome `oom` alone when memory runs out."""
        try:
            with self.adapter.attention(kernel):
                return ask()
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            return [Outcome(status="oom", error=_first_line(error))]
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # the CPU allocator has no exception class of its own
                return [Outcome(status="oom", error=_first_line(error))]
            raise

    def _answer(
        self, method: Method, sample: Sample, prompt: str, clips: Sequence[Clip], pass_: Pass, max_new_tokens: int
    ) -> Outcome:
        adapter, trace = self.adapter, self._trace
        meter: Meter = Meter()
        if pass_ == "latency":
            meter = Stopwatch(adapter.device)
        elif pass_ == "memory":
            meter = MemoryMeter(adapter.model, adapter.device)
        with meter:
            done = generate(
                adapter,
                method,
                trace,
                clips,
                prompt,
                captions=sample.captions,
                max_new_tokens=max_new_tokens,
                stop_at_eos=pass_ == "accuracy",
                sample_id=sample.id,
                meter=meter,
            )
            timing = meter.timing() if isinstance(meter, Stopwatch) else None
        outcome = Outcome(
            output_ids=done.token_ids,
            timing=timing,
            applied=trace.applied,
            reason=trace.reason,
            tokens={"prompt": done.prompt.length, "visual": done.prompt.layout.n_visual},
            trace=trace.to_json(),
        )
        if isinstance(meter, MemoryMeter):
            outcome.memory = meter.memory(*cache_bytes(done.cache))
        if pass_ == "accuracy":
            outcome.raw_text = adapter.processor.tokenizer.decode(done.token_ids, skip_special_tokens=True)
            outcome.first_token = first_token(done.first_logits)
            counted = method.work(done.prompt, adapter.shapes, trace)
            outcome.work = {
                **work.to_json(counted, adapter.shapes),
                "visual_tokens": work.visual_tokens(counted, done.prompt.length, done.prompt.layout.n_visual),
                "kv_bytes": cache_bytes(done.cache)[0],
            }
        return outcome

    def best_dense_kernel(self) -> str:
        """``sdpa`` picks the fastest kernel that torch has for the device; no faster stock implementation is installed."""
        return "sdpa"


def first_token(logits: Tensor) -> dict[str, Any]:
    """Log-probabilities of the `TOP` likeliest first tokens, and of all others together."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    top = logprobs.topk(min(TOP, logprobs.shape[-1]))
    rest = max(0.0, 1.0 - float(top.values.exp().sum()))
    tail = float(torch.tensor(rest).log()) if rest > 0 else None
    return {"ids": top.indices.tolist(), "logprobs": [round(v, 5) for v in top.values.tolist()], "tail": tail}


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
