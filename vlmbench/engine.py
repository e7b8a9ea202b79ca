"""The only prefill and decode loop: inputs -> vision -> splice -> prepare -> prefill -> decode, one sample at a time.

`generate()` is not used: it runs the vision tower inside its own prefill, synchronises at every step, and has no place to
stand between vision and layer 0. That the greedy tokens are the same is a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlmbench import work
from vlmbench.backend import Backend, Identity, Outcome
from vlmbench.cache import cache_bytes
from vlmbench.layout import Prompt
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


class Generation(NamedTuple):
    """What one sample left behind; tensors live until the caller drops them."""

    token_ids: list[int]
    first_logits: Tensor
    """``[V]``, of the first generated token."""
    prompt: Prompt
    cache: Cache


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
) -> Generation:
    """Answer one question greedily with an attached method. The end-of-answer token is not part of the ids."""
    meter = meter or Meter()
    trace.reset(sample_id)
    meter.start()
    inputs = adapter.inputs([method.prepare_clip(clip, trace) for clip in clips], question, captions)
    meter.stage("preprocess")
    inputs = adapter.to_device(inputs)
    meter.stage("transfer")
    features = adapter.encode_vision(inputs) if method.traits.sees_vision else Features()
    meter.stage("vision")
    prompt = method.prepare(adapter.splice(inputs, features), trace)
    meter.stage("prepare")
    cache = adapter.new_cache(headroom=max_new_tokens)
    logits = adapter.prefill(prompt, cache)
    token = logits.argmax(-1, keepdim=True)
    ids = [int(token)]  # the first id is on the host here: this is where time to first token ends
    meter.stage("prefill")
    first_logits = logits[0]
    eos = adapter.eos_ids if stop_at_eos else frozenset()
    for step in range(max_new_tokens - 1):
        if ids[-1] in eos:
            break
        token = adapter.decode(token, prompt.next_position + step, cache).argmax(-1, keepdim=True)
        ids.append(int(token))
        meter.stage("decode")
    return Generation(ids[:-1] if ids[-1] in eos else ids, first_logits, prompt, cache)


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
        try:
            with self.adapter.attention(kernel):
                return self._answer(method, sample, prompt, clips, pass_, max_new_tokens)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            return Outcome(status="oom", error=_first_line(error))
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # the CPU allocator has no exception class of its own
                return Outcome(status="oom", error=_first_line(error))
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
            outcome.work = work.to_json(method.work(done.prompt, adapter.shapes, trace), adapter.shapes)
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
