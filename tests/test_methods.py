"""The contract that every method keeps on every family; a new method's file is picked up by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlmbench import registry
from vlmbench.cache import lengths
from vlmbench.composed import neutral_of
from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.kernels.a_shape import banded
from vlmbench.kernels.calls.tiles import Softmaxed, softmaxed
from vlmbench.kernels.grid import lines
from vlmbench.kernels.vertical_slash import gathered
from vlmbench.method import Method
from vlmbench.mm_told import DID
from vlmbench.patch import fingerprint
from vlmbench.session import make_methods
from vlmbench.trace import Trace

STEPS = 4
ATTENTION = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
METHODS = [registry.methods.load(name) for name in registry.methods.names()]
METHODS_BY_NAME = {cls.name: cls for cls in METHODS}
JOINED = make_methods(
    [
        "turbo:r=4,min_tokens=0,mode=drop+pevlm:sink=0,block=1",
        "uniform:ratio=0.75+mminference:pattern=grid,local=4+corematching:early_kv=kept",
        "pevlm:sink=0,block=1+corematching+int8",
    ]
)
EXAMPLES = [*(example for cls in METHODS if cls.traits.uses_model for example in cls.examples()), *JOINED]
ACTING = [example for example in EXAMPLES if example.name != "full" and not example.traits.exact]
NEUTRAL = [
    *(neutral for cls in METHODS if cls.traits.uses_model and (neutral := cls.neutral()) is not None),
    *(neutral for each in JOINED if (neutral := neutral_of(each)) is not None),
]


def run(
    adapter: Any, method: Method, clips: list[Any], question: str = "where is the red circle ?"
) -> tuple[Any, Trace]:
    """One greedy answer of a fixed number of tokens, with the trace that it left."""
    method.check(adapter)
    with method.attach(adapter) as trace:
        done = generate(
            adapter, method, trace, clips, question, max_new_tokens=STEPS, stop_at_eos=False, sample_id="sample"
        )
    return done, trace


@pytest.fixture(params=[repr(example) for example in EXAMPLES])
def method(request: pytest.FixtureRequest) -> Method:
    return next(example for example in EXAMPLES if repr(example) == request.param)


def test_leaving_restores_the_model_bit_for_bit(adapter: Any, clip: Any, method: Method) -> None:
    full = METHODS_BY_NAME["full"]()
    before_run, _ = run(adapter, full, [clip(6)])  # a first pass: some families install permanent hooks then
    before = fingerprint(adapter.model)
    run(adapter, method, [clip(6)])
    assert fingerprint(adapter.model) == before
    again, _ = run(adapter, full, [clip(6)])
    assert torch.equal(before_run.first_logits, again.first_logits)


def test_leaving_by_an_exception_restores_too(adapter: Any, clip: Any, method: Method) -> None:
    run(adapter, METHODS_BY_NAME["full"](), [clip(6)])
    before = fingerprint(adapter.model)
    with pytest.raises(KeyError), method.attach(adapter):
        raise KeyError
    assert fingerprint(adapter.model) == before


@pytest.mark.parametrize("neutral", NEUTRAL, ids=repr)
def test_neutral_setting_equals_full_through_the_methods_own_path(adapter: Any, clip: Any, neutral: Method) -> None:
    full, _ = run(adapter, METHODS_BY_NAME["full"](), [clip(6)])
    done, _ = run(adapter, neutral, [clip(6)])
    # The same sums in another order: float32 rounding of a four-layer model.
    torch.testing.assert_close(done.first_logits, full.first_logits, rtol=0, atol=1e-5)
    assert done.token_ids == full.token_ids


@pytest.mark.parametrize("acting", ACTING, ids=repr)
def test_any_other_setting_changes_something_and_says_so(adapter: Any, clip: Any, acting: Method) -> None:
    full, _ = run(adapter, METHODS_BY_NAME["full"](), [clip(6)])
    done, trace = run(adapter, acting, [clip(6)])
    assert trace.applied
    if "decode" in acting.traits.stages:  # the first token may be full attention's, and what is generated behind it not
        ours, theirs = ([t for layer in each.cache.layers for t in (layer.keys, layer.values)] for each in (done, full))
        assert not all(map(torch.equal, ours, theirs))
    else:
        assert not torch.equal(done.first_logits, full.first_logits)


def test_the_same_sample_gives_the_same_answer_twice(adapter: Any, clip: Any, method: Method) -> None:
    first, _ = run(adapter, method, [clip(6)])
    second, _ = run(adapter, method, [clip(6)])
    assert torch.equal(first.first_logits, second.first_logits)
    assert first.token_ids == second.token_ids


def test_one_attached_method_carries_nothing_from_sample_to_sample(adapter: Any, clip: Any, method: Method) -> None:
    alone, _ = run(adapter, method, [clip(4)])
    with method.attach(adapter) as trace:
        for frames in (6, 4):
            done = generate(
                adapter,
                method,
                trace,
                [clip(frames)],
                "where is the red circle ?",
                max_new_tokens=STEPS,
                stop_at_eos=False,
                sample_id="sample",
            )
    assert torch.equal(alone.first_logits, done.first_logits)


def test_cache_counts_every_token_and_keeps_the_last(adapter: Any, clip: Any, method: Method) -> None:
    done, _ = run(adapter, method, [clip(6)])
    logical, physical = lengths(done.cache)
    # The last generated token is never fed back, so it is in no cache.
    assert set(logical) == {done.prompt.length + STEPS - 1}
    assert all(held <= seen for held, seen in zip(physical, logical, strict=True))
    whole, _ = run(adapter, METHODS_BY_NAME["full"](), [clip(6)])
    assert torch.equal(done.prompt.embeds[0, -1], whole.prompt.embeds[0, -1])


def test_dropping_tokens_never_moves_the_answer(adapter: Any, clip: Any, method: Method) -> None:
    done, _ = run(adapter, method, [clip(6)])
    assert done.prompt.next_position == int(done.prompt.positions.max()) + 1


def test_a_prompt_without_pictures_is_answered_as_by_full_and_marked(adapter: Any, method: Method) -> None:
    if "weights" in method.traits.takes:
        pytest.skip("what it does to weights has nothing to do with pictures")
    full, _ = run(adapter, METHODS_BY_NAME["full"](), [])
    done, trace = run(adapter, method, [])
    assert torch.equal(done.first_logits, full.first_logits)
    if method.name != "full":  # which never acts, and says so of no sample
        assert not trace.applied
        assert trace.reason


@pytest.mark.parametrize("media", [["image"], ["video", "video"], ["image", "video"]], ids="+".join)
def test_every_mix_of_media_runs(adapter: Any, clip: Any, method: Method, media: list[str]) -> None:
    clips = [clip(1, "image") if kind == "image" else clip(4 + 2 * i) for i, kind in enumerate(media)]
    done, _ = run(adapter, method, clips)
    assert len(done.token_ids) == STEPS
    assert done.prompt.layout.length == done.prompt.length


class CountPairs(TorchDispatchMode):
    """Query-key pairs of every attention kernel call, summed over heads: those let through, and those multiplied."""

    pairs = 0
    computed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            q, k, mask = given["query"], given["key"], given.get("attn_mask")
            causal, n, m = given.get("is_causal", False), q.shape[2], k.shape[2]
            assert not causal or n == m  # top-left and bottom-right alignment differ otherwise
            heads = q.shape[0] * q.shape[1]
            held = heads * (n * (n + 1) // 2 if causal else n * m)
            self.computed += held
            if mask is None:
                self.pairs += held
            else:  # boolean or added to the scores, the same wherever it has fewer dimensions
                allowed = mask if mask.dtype == torch.bool else mask == 0
                self.pairs += int(allowed.sum()) * (heads * n * m // mask.numel())
        return func(*args, **(kwargs or {}))

    def softmaxed(self, scores: Callable[[], Tensor], own: Callable[[Tensor], Tensor]) -> Softmaxed:
        """Tiles of scores are attention without a kernel call; what is left out is -inf, a causal tile's corner free."""
        found = scores()
        seen = int((found > float("-inf")).sum())
        self.pairs += seen
        self.computed += seen if isinstance(scores, partial) and scores.args[0].causal else found.numel()
        return softmaxed(scores, own)


def test_work_equals_what_hooks_counted(
    adapter: Any, clip: Any, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = CountPairs()
    for module in (banded, lines, gathered):
        monkeypatch.setattr(module, "softmaxed", counted.softmaxed)
    tokens: list[int] = []
    neurons: list[int] = []

    def layer_sees(module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    def ffn_sees(module: nn.Module, args: Any) -> None:
        neurons.append(args[0].shape[2])

    with torch.inference_mode(), method.attach(adapter) as trace:
        trace.reset("sample")
        inputs = adapter.inputs([method.prepare_clip(clip(6), trace)], "where ?")
        prompt = method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
        handles = [layer.register_forward_pre_hook(layer_sees, with_kwargs=True) for layer in adapter.layers]
        handles += [layer.mlp.down_proj.register_forward_pre_hook(ffn_sees) for layer in adapter.layers]
        try:
            with counted:
                adapter.prefill(prompt, adapter.new_cache(0))
        finally:
            for handle in handles:
                handle.remove()
        work = method.work(prompt, adapter.shapes, trace)
    assert (list(work.tokens), list(work.neurons)) == (tokens, neurons)
    shapes = adapter.shapes
    pairs = sum(work.pairs) * shapes.heads
    if DID not in trace.scratch:
        assert pairs == counted.pairs
        return
    # MMInference's pairs are its patterns', rounded up to whole ones a head. Rows that it computes again and the corners of
    # its masks are among its FLOPs, and nothing that kernels multiplied is missing there.
    assert pairs - shapes.heads * shapes.layers < counted.pairs
    assert 4 * shapes.head_dim * (counted.computed - pairs) <= work.own_flops


def test_unusable_parameters_are_refused_in_one_sentence() -> None:
    for spec in ("uniform:ratio=0", "random:ratio=1.5", "uniform:tokens=0", "pevlm:block=0", "pevlm:sink=-1"):
        with pytest.raises(UsageError, match=spec.split("=")[0]):
            make_methods([spec])
