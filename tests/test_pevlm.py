"""PEVLM inside the models: caches, hidden states and positions against the paper's procedure, and what it must refuse."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vlmbench import registry
from vlmbench.engine import generate
from vlmbench.kernels.block_attention import Plan, make_plan
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.method import Method
from vlmbench.methods.ape import Ape
from vlmbench.methods.block import Block
from vlmbench.methods.full import Full
from vlmbench.methods.pevlm import Pevlm
from vlmbench.methods.star import Star
from vlmbench.parallel import ParallelEncoding
from vlmbench.patch import Patcher
from vlmbench.suite import Caption
from vlmbench.trace import Trace

QUESTION = "where is the red circle ?"
PARALLEL = [
    example
    for name in registry.methods.names()
    if issubclass(cls := registry.methods.load(name), ParallelEncoding)
    for example in cls.examples()[:1]
]


class Encoded(NamedTuple):
    """What a prefill leaves behind."""

    hidden: Tensor
    """``[N, C]``"""
    keys: Tensor
    """``[layers, Hkv, N, D]``"""
    values: Tensor
    plan: Plan | None
    first: Tensor
    """Layer 0's attention output, ``[N, C]``."""


def spliced(adapter: Any, clips: list[Any], captions: tuple[Caption, ...] = ()) -> Prompt:
    with torch.inference_mode():
        inputs = adapter.to_device(adapter.inputs(clips, QUESTION, captions))
        return adapter.splice(inputs, adapter.encode_vision(inputs))


def forward(adapter: Any, prompt: Prompt, cache: Any, start: int, stop: int, **extras: Any) -> Tensor:
    """Hidden states ``[stop - start, C]`` of a part of the prompt behind what the cache holds."""
    return adapter.text(
        inputs_embeds=prompt.embeds[:, start:stop],
        position_ids=prompt.positions[..., start:stop],
        past_key_values=cache,
        use_cache=True,
        **extras,
    ).last_hidden_state[0]


@torch.inference_mode()
def encode(adapter: Any, method: Method, prompt: Prompt) -> Encoded:
    first: list[Tensor] = []
    with method.attach(adapter) as trace:
        prompt = method.prepare(prompt, trace)
        cache = adapter.new_cache(0)
        handle = adapter.layers[0].self_attn.register_forward_hook(lambda _, args, out: first.append(out[0][0]))
        try:
            extras = {"vlmbench_layout": prompt.layout, **prompt.extras}
            hidden = forward(adapter, prompt, cache, 0, prompt.length, **extras)
        finally:
            handle.remove()
    return Encoded(hidden, *held(cache), prompt.extras.get("block_plan"), first[0])


def held(cache: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.stack([getattr(layer, name)[0] for layer in cache.layers]) for name in ("keys", "values"))  # type: ignore[return-value]


@torch.inference_mode()
def three_passes(adapter: Any, prompt: Prompt, plan: Plan, order: list[int]) -> Encoded:
    """The paper's procedure with the stock model: the sink, each block alone behind a copy of its cache, then the tail."""

    def starting_with(keys: Tensor, values: Tensor) -> Any:
        cache = adapter.new_cache(0)
        for layer, key, value in zip(cache.layers, keys, values, strict=True):
            if key.shape[-2]:
                layer.update(key[None], value[None])
        return cache

    shapes = adapter.shapes
    empty = torch.empty(shapes.layers, shapes.kv_heads, 0, shapes.head_dim)
    sink, hidden = (empty, empty), prompt.embeds[0, :0]
    if plan.sink:
        cache = adapter.new_cache(0)
        hidden = forward(adapter, prompt, cache, 0, plan.sink)
        sink = held(cache)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for number in order:
        cache = starting_with(*sink)
        own = forward(adapter, prompt, cache, *plan.blocks[number])
        found[number] = (own, *(each[:, :, plan.sink :] for each in held(cache)))  # type: ignore[assignment]
    blocks = [found[number] for number in range(len(plan.blocks))]
    keys, values = (torch.cat([sink[i], *(block[i + 1] for block in blocks)], dim=2) for i in (0, 1))
    cache = starting_with(keys, values)
    tail = forward(adapter, prompt, cache, plan.tail, plan.length)
    return Encoded(torch.cat([hidden, *(block[0] for block in blocks), tail]), *held(cache), plan, hidden)


def close(ours: Encoded, theirs: Encoded) -> None:
    for name in ("hidden", "keys", "values"):
        # float32 rounding of a four-layer model, at values of a few units.
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=2e-5)


# What the paper's procedure gives.


@pytest.mark.parametrize("method", [Pevlm.neutral(), Pevlm(sink=1, block=3)], ids=repr)
def test_one_block_leaves_the_states_and_the_cache_of_full_attention(adapter: Any, clip: Any, method: Pevlm) -> None:
    """Left-over units are no second block: in the tail they see everything before them."""
    prompt = spliced(adapter, [clip(6)] if adapter.name != "qwen_vl" else [clip(12)])
    ours = encode(adapter, method, prompt)
    assert ours.plan is not None
    assert len(ours.plan.blocks) == 1
    assert (ours.plan.tail < prompt.layout.units[-1].stop) == (method.sink == 1)
    close(ours, encode(adapter, Full(), prompt))


def test_left_over_units_at_the_head_are_not_seen_by_the_block_behind_them(adapter: Any, clip: Any) -> None:
    """One full block behind a smaller one: with this planner, unlike with the other, that is not full attention."""
    prompt = spliced(adapter, [clip(6)] if adapter.name != "qwen_vl" else [clip(12)])
    ours = encode(adapter, Pevlm(sink=1, block=3, remainder="head"), prompt)
    full = encode(adapter, Full(), prompt)
    assert ours.plan is not None
    (_, head), (start, stop) = ours.plan.blocks
    torch.testing.assert_close(ours.hidden[:head], full.hidden[:head], rtol=1e-5, atol=2e-5)
    assert not torch.allclose(ours.hidden[start:stop], full.hidden[start:stop], rtol=0, atol=1e-3)


def test_every_state_and_every_key_is_the_three_passes_in_any_order_of_blocks(adapter: Any, clip: Any) -> None:
    """Twenty plans: text alone or no token at all as the sink, left-over units in either place, token blocks."""
    rng = random.Random(0)
    prompt = spliced(adapter, [clip(14)])
    grid = itertools.product((0, 1, 2, 4), (1, 2, 3), ("tail", "head"))
    methods = [Pevlm(sink=s, block=b, remainder=r) for s, b, r in rng.sample(list(grid), 18)]  # type: ignore[arg-type]
    methods += [Pevlm(sink=0, block=11, unit="token"), Pevlm(sink=7, block=10, unit="token", remainder="head")]
    for method in methods:
        ours = encode(adapter, method, prompt)
        assert ours.plan is not None
        order = rng.sample(range(len(ours.plan.blocks)), len(ours.plan.blocks))
        close(ours, three_passes(adapter, prompt, ours.plan, order))


@pytest.mark.parametrize(
    "media", [("video", "video"), ("image", "video"), ("image", "image", "image"), "captions"], ids=str
)
def test_units_come_from_the_layout_whatever_stands_between_them(adapter: Any, clip: Any, media: Any) -> None:
    """Several media and text of any length between frames: blocks begin with a frame, and the procedure is the same."""
    captions = tuple(Caption(i + 0.1, "where " * (1 + 3 * i)) for i in range(4)) if media == "captions" else ()
    clips = [clip(1, "image") if kind == "image" else clip(8) for kind in (("video",) if captions else media)]
    prompt = spliced(adapter, clips, captions)
    ours = encode(adapter, Pevlm(sink=1, block=1), prompt)
    plan = ours.plan
    assert plan is not None
    visual = [span for span in prompt.layout if span.kind in ("video", "image")]
    assert [start for start, _ in plan.blocks] == [span.start for span in visual[1:]]
    assert plan.tail == visual[-1].stop
    close(ours, three_passes(adapter, prompt, plan, list(range(len(plan.blocks)))))


def test_positions_reused_are_the_three_passes_at_those_positions(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    for positions in ("reused", "reused-1d"):
        method = Pevlm(sink=1, block=2, positions=positions)
        ours = encode(adapter, method, prompt)
        assert ours.plan is not None
        moved = method.prepare(prompt, Trace())
        close(ours, three_passes(adapter, moved, ours.plan, list(range(len(ours.plan.blocks)))))


def test_flattened_positions_count_tokens_on_every_axis_and_the_tail_keeps_its_own(adapter: Any, clip: Any) -> None:
    """What the prototype's stock model fills in when it is given no ids; with one axis it is the other ablation."""
    prompt = spliced(adapter, [clip(12)])
    flat = Pevlm(sink=1, block=2, positions="reused-1d").prepare(prompt, Trace())
    if prompt.positions.dim() == 2:
        assert torch.equal(
            flat.positions, Pevlm(sink=1, block=2, positions="reused").prepare(prompt, Trace()).positions
        )
        return
    plan = flat.extras["block_plan"]
    for axis, own in zip(flat.positions[:, 0], prompt.positions[:, 0], strict=True):
        assert torch.equal(axis[: plan.sink], torch.arange(plan.sink))
        for start, stop in plan.blocks:
            assert torch.equal(axis[start:stop], plan.sink + torch.arange(stop - start))
        assert torch.equal(axis[plan.tail :], own[plan.tail :])


@pytest.mark.parametrize("where", ["sink", "block", "tail"])
def test_noise_goes_where_the_rule_lets_it_and_nowhere_else(adapter: Any, clip: Any, where: str) -> None:
    """To the last bit: a block that cannot see another one computes the same numbers."""
    prompt = spliced(adapter, [clip(12)])
    method = Pevlm(sink=1, block=2)
    before = encode(adapter, method, prompt)
    plan = before.plan
    assert plan is not None
    start, stop = {"sink": (0, plan.sink), "block": plan.blocks[1], "tail": (plan.tail, plan.length)}[where]
    embeds = prompt.embeds.clone()
    embeds[:, start:stop] += torch.randn(stop - start, embeds.shape[2], generator=torch.Generator().manual_seed(0))
    after = encode(adapter, method, replace(prompt, embeds=embeds))
    reached = torch.zeros(plan.length, dtype=torch.bool)
    reached[start if where == "sink" else plan.tail :] = True
    reached[start:stop] = True
    assert torch.equal((after.hidden != before.hidden).any(-1), reached)
    for now, then in ((after.keys, before.keys), (after.values, before.values)):
        assert torch.equal(now[:, :, ~reached], then[:, :, ~reached])


def test_the_cache_holds_every_token_once_and_in_order(adapter: Any, clip: Any) -> None:
    """Layer 0's keys and values come before any attention: they are full attention's own, token by token."""
    prompt = spliced(adapter, [clip(12)])
    full = encode(adapter, Full(), prompt)
    for method in (Pevlm(sink=0, block=1), Pevlm(sink=1, block=2), Pevlm(sink=2, block=3, remainder="head")):
        ours = encode(adapter, method, prompt)
        assert ours.keys.shape == full.keys.shape
        assert torch.equal(ours.keys[0], full.keys[0])
        assert torch.equal(ours.values[0], full.values[0])
        assert not torch.equal(ours.keys[1], full.keys[1])


def test_the_tails_first_layer_is_full_attentions(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    ours, full = (encode(adapter, method, prompt) for method in (Pevlm(sink=1, block=2), Full()))
    assert ours.plan is not None
    tail = ours.plan.tail
    # The same sum over all keys, joined in another order.
    torch.testing.assert_close(ours.first[tail:], full.first[tail:], rtol=0, atol=1e-6)
    assert not torch.allclose(ours.first[:tail], full.first[:tail], rtol=0, atol=1e-6)


def test_the_same_frame_twice_has_equal_keys_where_positions_are_reused_and_turned_ones_elsewhere(
    adapter: Any, clip: Any
) -> None:
    """The turn of each pair of dimensions is its frequency times the distance on its own axis; two videos differ on all."""
    prompt = spliced(adapter, [clip(4), clip(4)])
    frames = [span for span in prompt.layout if span.kind == "video"]
    one, two = (slice(span.start, span.stop) for span in (frames[0], frames[-1]))
    embeds = prompt.embeds.clone()
    embeds[:, two] = embeds[:, one]
    prompt = replace(prompt, embeds=embeds)
    reused = encode(adapter, Pevlm(sink=0, block=1, positions="reused"), prompt).keys[0]
    assert torch.equal(reused[:, one], reused[:, two])
    keys = encode(adapter, Pevlm(sink=0, block=1), prompt).keys[0]
    positions = prompt.positions.reshape(-1, prompt.length)
    distance = (positions[:, two] - positions[:, one]).double()  # [axes, n]
    assert (distance != 0).all()
    frequencies = adapter.text.rotary_emb.inv_freq.double()
    axis = torch.zeros(len(frequencies), dtype=torch.long)
    if len(distance) == 3:
        sections = adapter.text.config.rope_parameters["mrope_section"]
        axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
    half = keys.shape[-1] // 2
    first, second = (
        torch.complex(keys[:, there, :half].double(), keys[:, there, half:].double()) for there in (one, two)
    )
    turn = torch.polar(torch.ones(1, dtype=torch.double), (distance[axis] * frequencies[:, None]).T)  # [n, D / 2]
    # float32 cosines of angles up to some hundred.
    torch.testing.assert_close(second, first * turn, rtol=0, atol=1e-5)


def test_a_unit_is_what_the_model_sees_at_once(adapter: Any, clip: Any) -> None:
    """Two sampled frames for Qwen-VL: a sink of one unit ends behind the second."""
    prompt = spliced(adapter, [clip(12)])
    plan = Pevlm(sink=1, block=1).plan(prompt, Trace())
    assert plan is not None
    assert len(prompt.layout.units) == (6 if adapter.name == "qwen_vl" else 12)
    assert plan.sink == prompt.layout.units[1].start
    assert len(plan.blocks) == len(prompt.layout.units) - 1


@pytest.mark.parametrize(
    ("frames", "per", "prefix", "sink", "block", "ratio"),
    [
        (256, 257, 14, 4, 8, 10.7),
        (256, 257, 14, 16, 16, 5.5),
        (256, 257, 14, 32, 32, 2.9),
        (128, 210, 14, 8, 8, 5.5),
        (128, 265, 15, 16, 16, 2.9),
        (128, 265, 15, 32, 32, 1.6),
    ],
)
def test_pairs_are_those_of_the_papers_cost_model(
    frames: int, per: int, prefix: int, sink: int, block: int, ratio: float
) -> None:
    """S²/2 + m (B S + B²/2) + R (S + m B) + R²/2 against N²/2, at the lengths of LongVILA, LLaVA-Video and Qwen2.5-VL."""
    length = prefix + frames * per + 60
    units = [(prefix + per * i, prefix + per * (i + 1)) for i in range(frames)]
    plan = make_plan(units, length, sink=sink, block=block)
    assert plan is not None
    s, b, m = prefix + sink * per, block * per, (frames - sink) // block
    r = length - s - m * b
    formula = s**2 / 2 + m * (b * s + b**2 / 2) + r * (s + m * b) + r**2 / 2
    assert plan.pairs == pytest.approx(formula, rel=1e-3)  # it leaves out what is linear in N
    assert length**2 / 2 / formula == pytest.approx(ratio, rel=0.03)  # the table has two digits


# The encodings it is compared with.


def test_a_block_that_sees_only_itself_is_the_same_wherever_it_stands(adapter: Any, clip: Any) -> None:
    """Block-Attention encodes from position zero and turns the keys to their place: that is encoding in place."""
    prompt = spliced(adapter, [clip(12)])
    before = encode(adapter, Block(block=2), prompt)
    assert before.plan is not None
    start, stop = before.plan.blocks[1]
    positions = prompt.positions.clone()
    positions[..., start:stop] -= positions[..., start:stop].min()
    moved = encode(adapter, Block(block=2), replace(prompt, positions=positions))
    assert not torch.allclose(moved.keys[0, :, start:stop], before.keys[0, :, start:stop], rtol=0, atol=1e-2)
    # float32 cosines of other angles, through four layers.
    torch.testing.assert_close(moved.hidden[start:stop], before.hidden[start:stop], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.values[:, :, start:stop], before.values[:, :, start:stop], rtol=1e-4, atol=1e-4)


def test_ape_weighs_the_context_in_the_question_and_in_every_generated_token(adapter: Any, clip: Any) -> None:
    """Against softmax over all scores written out in each layer, by the formula of its kernel's own test."""
    method, steps = Ape(block=2, temperature=0.7, scale=0.8), 4
    with method.attach(adapter) as trace:
        done = generate(adapter, method, trace, [clip(12)], QUESTION, max_new_tokens=steps, stop_at_eos=False)
    changed = method.prepare(spliced(adapter, [clip(12)]), Trace())
    plan: Plan = changed.extras["block_plan"]

    def weighed(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
        n, m = q.shape[2], k.shape[2]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = scaling * q @ k.transpose(-1, -2)
        i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
        allow = torch.ones(m, m, dtype=torch.bool).tril()
        allow[: plan.length, : plan.length] = plan.allow
        far = (j >= plan.sink) & (j < plan.tail) & (i >= plan.tail)
        lse = (scores / 0.7).masked_fill(~far, float("-inf")).logsumexp(-1, keepdim=True)
        context = torch.where(far, scores / 0.7 - lse + 0.7 * 0.8 * lse, scores)
        weights = context.masked_fill(~allow[m - n :, :], float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), None

    with torch.inference_mode(), Patcher(adapter) as patch:
        patch.attention(weighed)
        cache = adapter.new_cache(steps)
        logits = adapter.prefill(replace(changed, extras={}), cache)
        # The same sums in another order: float32 rounding of a four-layer model.
        torch.testing.assert_close(done.first_logits, logits[0], rtol=0, atol=1e-5)
        for step, token in enumerate(done.token_ids[:-1]):
            assert int(logits.argmax()) == token
            logits = adapter.decode(torch.tensor([[token]]), changed.next_position + step, cache)
    assert int(logits.argmax()) == done.token_ids[-1]


def laid(units: int, per: int = 4, before: int = 3) -> Prompt:
    """A prompt of zeros: text, `units` frames of `per` tokens, text."""
    frames = [Span("video", before + per * i, before + per * (i + 1), 0, i) for i in range(units)]
    end = before + per * units
    layout = TokenLayout((Span("text", 0, before), *frames, Span("text", end, end + 5)))
    return Prompt(torch.zeros(1, end + 5, 2), torch.arange(end + 5)[None], layout, end + 5)


@pytest.mark.parametrize(("units", "sink"), [(12, 1), (19, 1), (20, 2), (79, 7), (80, 8), (384, 8)])
def test_the_default_sink_is_a_tenth_of_the_video_from_one_unit_to_eight(units: int, sink: int) -> None:
    prompt = laid(units)
    plan = Pevlm().plan(prompt, Trace())
    assert plan is not None
    assert plan.sink == prompt.layout.units[sink].start
    assert {stop - start for start, stop in plan.blocks} == {8 * 4}


def test_blocks_of_tokens_start_behind_the_text_and_end_before_the_question() -> None:
    prompt = laid(9)
    plan = Pevlm(unit="token", block=7).plan(prompt, Trace())
    assert plan is not None
    assert plan.sink == 3
    assert plan.blocks == tuple((3 + 7 * i, 10 + 7 * i) for i in range(5))
    trace = Trace()
    assert Pevlm(unit="token", sink=999).plan(prompt, trace) is None
    assert trace.reason == "the sink of 999 takes all 39 units, and no block is left"


@pytest.mark.parametrize("sink", [5, 8, 11])
def test_a_sink_of_more_units_than_a_block_pushes_no_block_into_the_question(sink: int) -> None:
    """A public branch counts T/b − 1 blocks whatever the sink is."""
    prompt = laid(13)
    for remainder in ("tail", "head"):
        plan = Pevlm(sink=sink, block=2, remainder=remainder).plan(prompt, Trace())
        assert plan is not None
        assert len(plan.blocks) == (13 - sink) // 2 + (remainder == "head") * ((13 - sink) % 2)
        assert plan.tail <= prompt.layout.units[-1].stop


@pytest.mark.parametrize(("units", "quarter"), [(12, 3), (13, 4), (384, 96)])
def test_stars_blocks_are_a_quarter_of_the_video_behind_an_anchor_of_the_same_size(units: int, quarter: int) -> None:
    prompt = laid(units)
    plan = Star().plan(prompt, Trace())
    assert plan is not None
    assert plan.sink == prompt.layout.units[quarter].start
    assert [-(-(stop - start) // 4) for start, stop in plan.blocks][:-1] == [quarter] * 2
    assert plan.tail == prompt.layout.units[-1].stop


# What a prompt may look like.


@pytest.mark.parametrize("words", [1, 7, 40])
def test_a_question_before_the_video_is_in_the_sink_whatever_its_length(adapter: Any, clip: Any, words: int) -> None:
    prompt = spliced(adapter, [clip(12)], (Caption(-1.0, " ".join(["where"] * words)),))
    frames = [span for span in prompt.layout if span.kind == "video"]
    ours = encode(adapter, Pevlm(sink=0, block=2, remainder="head"), prompt)
    plan = ours.plan
    assert plan is not None
    assert plan.sink == frames[0].start >= words
    assert plan.tail == frames[-1].stop
    close(ours, three_passes(adapter, prompt, plan, list(range(len(plan.blocks)))))


def answered(adapter: Any, method: Method, clips: list[Any]) -> tuple[Tensor, Trace]:
    with method.attach(adapter) as trace:
        done = generate(adapter, method, trace, clips, QUESTION, max_new_tokens=2, stop_at_eos=False)
    return done.first_logits, trace


@pytest.mark.parametrize("method", [Pevlm(sink=0, block=1000), Block(block=1000), Star(block=1000)], ids=repr)
def test_a_block_longer_than_the_video_is_full_attention_and_says_so(adapter: Any, clip: Any, method: Method) -> None:
    full, _ = answered(adapter, Full(), [clip(6)])
    logits, trace = answered(adapter, method, [clip(6)])
    torch.testing.assert_close(logits, full, rtol=0, atol=1e-5)  # float32 rounding of a four-layer model
    assert (trace.applied, "equals full attention" in trace.reason) == (False, True)


@pytest.mark.parametrize("block", [1, 1000])
def test_a_sink_longer_than_the_video_is_cut_to_it_and_says_so(adapter: Any, clip: Any, block: int) -> None:
    full, _ = answered(adapter, Full(), [clip(6)])
    units = 3 if adapter.name == "qwen_vl" else 6
    for sink in (units, 99):
        logits, trace = answered(adapter, Pevlm(sink=sink, block=block), [clip(6)])
        assert torch.equal(logits, full)
        assert not trace.applied
        assert trace.reason == f"the sink of {sink} takes all {units} units, and no block is left"


def test_pictures_are_units_and_a_single_one_leaves_nothing_to_split(adapter: Any, clip: Any) -> None:
    one, two = [clip(1, "image")], [clip(1, "image"), clip(1, "image", side=96)]
    full, _ = answered(adapter, Full(), one)
    logits, trace = answered(adapter, Pevlm(), one)
    assert torch.equal(logits, full)
    assert not trace.applied
    assert "no block is left" in trace.reason
    assert answered(adapter, Pevlm(sink=0, block=1), two)[1].applied


def test_text_alone_is_answered_as_by_full(adapter: Any) -> None:
    full, _ = answered(adapter, Full(), [])
    logits, trace = answered(adapter, Pevlm(), [])
    assert torch.equal(logits, full)
    assert (trace.applied, trace.reason) == (False, "the prompt has no frames")


def test_a_clip_without_frames_is_refused_in_a_sentence(adapter: Any, clip: Any) -> None:
    none = replace(clip(4), frames=clip(4).frames[:0], indices=(), times_s=())
    with pytest.raises(ValueError, match=r"^noise has no frame left after sampling; ask for more frames\.$"):
        answered(adapter, Pevlm(), [none])


@pytest.mark.parametrize("method", PARALLEL, ids=repr)
def test_a_cache_that_is_not_empty_is_refused(adapter: Any, clip: Any, method: Method) -> None:
    prompt = spliced(adapter, [clip(6)])
    cache = adapter.new_cache(prompt.length)
    with torch.inference_mode(), method.attach(adapter) as trace:
        changed = method.prepare(prompt, trace)
        adapter.prefill(changed, cache)
        with pytest.raises(ValueError, match=f"the cache must be empty; it holds {prompt.length} tokens"):
            adapter.prefill(changed, cache)
