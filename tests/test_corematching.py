"""CoreMatching: its pure functions against loops, and inside the models against one dense pass under masks."""

from __future__ import annotations

import itertools
import json
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from vlmbench import core_release
from vlmbench.cache import lengths
from vlmbench.core_projection import contribution, spearman
from vlmbench.core_trace import pack_neurons, unpack_neurons
from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.kernels.core_neurons import (
    co_activation,
    compact,
    core_counts,
    core_set,
    core_tokens,
    count,
    knee,
    n_core,
    reference,
)
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.method import Method
from vlmbench.methods.corematching import Corematching
from vlmbench.methods.full import Full
from vlmbench.patch import Patcher
from vlmbench.trace import Trace

QUESTION = "where is the red circle ?"
ROUNDING = 1e-5
"""float32 rounding of a four-layer model at values of a few units."""
FRACTIONS = (0.07, 0.2, 0.5, 1.0)


def activations(tokens: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Quarters: many are equal, and sums of them are exact. The first token has no positive entry."""
    values = torch.randint(-9, 10, (tokens, width), generator=torch.Generator().manual_seed(seed)) / 4
    values[0] = -values[0].abs()
    return values.to(dtype)


# Core neurons.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rho", FRACTIONS)
def test_core_neurons_are_those_of_a_count_by_hand(rho: float, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(count, "ROWS", 4)  # several pieces, the last a part of one
    values = activations(11, 100, dtype=dtype)
    counts = core_counts(values, rho)
    assert counts.frequency.tolist() == reference.core_counts(values, rho)
    for beta in FRACTIONS:
        n = n_core(beta, 100)
        found = core_set(counts, n).tolist()
        assert found == reference.core_set(values, rho, beta)
        assert len(found) == n == round(beta * 100)


def test_what_a_device_selects_is_what_the_processor_selects() -> None:
    values = activations(20, 64)
    wanted = torch.randint(1, 33, (20,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(count.by_topk(values, wanted, 32), count.quickselect(values, wanted))


def test_a_fraction_is_rounded_as_written_and_not_as_its_binary_neighbour() -> None:
    ascending = torch.arange(1.0, 101)[None]
    assert 0.07 * 100 > 7
    assert core_counts(ascending, 0.07).frequency.nonzero()[:, 0].tolist() == [
        *range(93, 100)
    ]  # the top, not the bottom
    assert 0.29 * 100 < 29
    assert n_core(0.29, 100) == 29


def test_equal_counts_go_by_activation_and_then_by_index() -> None:
    values = torch.tensor([[1.0, 3, 2, 0, 2, -1], [1.0, 0, 1, 0, 1, -9]])
    assert core_counts(values, 1.0).frequency.tolist() == [2, 1, 2, 0, 2, 0]
    ranks = [core_set(core_counts(values, 1.0), n).tolist() for n in range(1, 7)]
    assert ranks == [[2], [2, 4], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 12), st.sampled_from(FRACTIONS))
def test_a_larger_share_never_loses_a_neuron(seed: int, tokens: int, width: int, rho: float) -> None:
    counts = core_counts(activations(tokens, width, seed), rho)
    sets = [set(core_set(counts, n).tolist()) for n in range(width + 1)]
    assert all(small < large for small, large in itertools.pairwise(sets))


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(FRACTIONS))
def test_co_activation_counts_all_positive_core_neurons(seed: int, beta: float) -> None:
    values = activations(5, 20, seed)
    neurons = core_set(core_counts(values, 0.2), n_core(beta, 20))
    scores = co_activation(values, neurons)
    assert scores.tolist() == reference.co_activation(values, neurons.tolist())
    assert ((scores >= 0) & (scores <= len(neurons))).all()
    weak = values.clamp(max=0.01)  # however weak: the strongest alone would be another rule
    assert torch.equal(co_activation(weak, neurons), scores)


def test_the_rule_keeps_what_is_frequent_and_drops_what_is_rare() -> None:
    """Not a fault but the rule: every token votes alike, so a brief object on much background is no core token."""
    values = -torch.ones(100, 20)
    values[:90, :8] = 1.0  # background
    values[90:, 8:16] = 5.0  # an object, however strong
    neurons = core_set(core_counts(values, 0.5), n_core(0.4, 20))
    assert neurons.tolist() == [*range(8)]
    assert core_tokens(co_activation(values, neurons)).kept.tolist() == [True] * 90 + [False] * 10


# The knee.


@given(st.lists(st.integers(0, 50), min_size=3, max_size=40), st.integers(1, 7), st.integers(-20, 20), st.randoms())
def test_the_knee_is_the_point_farthest_from_the_line(scores: list[int], factor: int, shift: int, rng: Any) -> None:
    found = knee(torch.tensor(scores))
    if len(set(scores)) == 1:
        assert found == (0, scores[0], 0.0)
    elif found.bend > 1e-6:
        # Of points at one distance the reference's rounding may prefer another; as far as that one it must be.
        points = sorted(scores, reverse=True)
        fall, last = points[0] - points[-1], len(points) - 1

        def distance(i: int) -> float:
            return abs(i / last + (points[i] - points[-1]) / fall - 1)

        assert distance(found.place) == pytest.approx(distance(reference.knee([*map(float, scores)])), abs=1e-12)
        assert found.bend == pytest.approx(distance(found.place), abs=1e-12)
    moved = rng.sample(scores, len(scores))
    other = knee(torch.tensor(moved) * factor + shift)
    assert (other.place, other.threshold) == (found.place, found.threshold * factor + shift)
    assert other.bend == pytest.approx(found.bend, abs=1e-12)
    for compare in ("ge", "gt"):
        kept = core_tokens(torch.tensor(scores), compare).kept
        assert kept.any()
        assert sorted(torch.tensor(scores)[kept].tolist()) == sorted(
            torch.tensor(moved)[core_tokens(torch.tensor(moved), compare).kept].tolist()
        )


@pytest.mark.parametrize(
    ("curve", "ge", "gt"),
    [
        ([7, 7, 7, 7], 4, 4),  # flat: no knee, all stay
        ([9, 8, 7, 6, 5], 5, 5),  # straight, exactly
        ([90, 80, 9, 8, 7, 6, 5, 4, 3, 2], 3, 2),  # convex: few
        ([90, 89, 88, 87, 86, 85, 84, 83, 9, 2], 8, 7),  # concave: the shoulder, most
        ([5, 5, 5, 1, 1, 1, 1, 1], 8, 3),  # the knee is among equals: ge keeps them all
        ([5, 3], 2, 2),
        ([5], 1, 1),
    ],
)
def test_shapes_of_curves(curve: list[int], ge: int, gt: int) -> None:
    scores = torch.tensor(curve)
    assert [int(core_tokens(scores, compare).kept.sum()) for compare in ("ge", "gt")] == [ge, gt]


def test_at_least_so_many_tokens_are_kept_and_of_equals_the_first() -> None:
    scores = torch.tensor([2, 90, 4, 80, 4, 4, 4, 3])
    assert core_tokens(scores, "gt").kept.nonzero()[:, 0].tolist() == [1, 3]
    assert core_tokens(scores, "gt", 4).kept.nonzero()[:, 0].tolist() == [1, 2, 3, 4]
    assert core_tokens(scores, "gt", 99).kept.all()
    # Above a knee that is the best score itself there is nothing.
    assert core_tokens(torch.tensor([9, 9, 1]), "gt").kept.tolist() == [True, False, False]


def test_no_scores_have_no_knee() -> None:
    with pytest.raises(ValueError, match="no scores, so no knee"):
        core_tokens(torch.tensor([], dtype=torch.int32))


# The FFN of a few neurons.


class Matrices(NamedTuple):
    gate: Tensor
    up: Tensor
    down: Tensor


@pytest.fixture
def ffn() -> tuple[Matrices, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((24, 8), (24, 8), (8, 24), (5, 8))
    gate, up, down, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return Matrices(gate, up, down), x


def test_compact_equals_masked_in_any_order_and_complements_add_up(ffn: tuple[Matrices, Tensor]) -> None:
    weights, x = ffn
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    chosen, others = order[:9], order[9:]
    parts = [compact(*weights, each)(x, functional.silu) for each in (chosen, others)]
    torch.testing.assert_close(parts[0], reference.sparse_ffn(x, *weights, chosen, functional.silu))
    torch.testing.assert_close(parts[0], compact(*weights, chosen.sort().values)(x, functional.silu))
    whole = reference.sparse_ffn(x, *weights, torch.arange(24), functional.silu)
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(compact(*weights, order)(x, functional.silu), whole)


def test_with_relu_the_neurons_that_ever_act_are_all_that_is_needed(ffn: tuple[Matrices, Tensor]) -> None:
    weights, x = ffn
    x = x[:1]
    active = (functional.relu(x @ weights.gate.T) != 0).any(0).nonzero()[:, 0]
    assert 0 < len(active) < 24
    whole = reference.sparse_ffn(x, *weights, torch.arange(24), functional.relu)
    torch.testing.assert_close(compact(*weights, active)(x, functional.relu), whole)


# In the models.


class Decoded(NamedTuple):
    logits: Tensor
    """``[1 + steps, V]``, of the same tokens in every run."""
    cache: Any
    trace: Trace


TOKENS = (5, 9, 2)


def spliced(adapter: Any, clips: list[Any]) -> Prompt:
    with torch.inference_mode():
        inputs = adapter.to_device(adapter.inputs(clips, QUESTION))
        return adapter.splice(inputs, adapter.encode_vision(inputs))


@torch.inference_mode()
def decoded(adapter: Any, method: Method, prompt: Prompt, attention: str = "sdpa") -> Decoded:
    """Prefill and three given tokens."""
    with adapter.attention(attention), method.attach(adapter) as trace:
        prompt = method.prepare(prompt, trace)
        cache = adapter.new_cache(len(TOKENS))
        logits = [adapter.prefill(prompt, cache)]
        for step, token in enumerate(TOKENS):
            logits.append(adapter.decode(torch.tensor([[token]]), prompt.next_position + step, cache))
    return Decoded(torch.cat(logits), cache, trace)


@torch.inference_mode()
def masked(
    adapter: Any,
    method: Corematching,
    prompt: Prompt,
    keep: list[int],
    neurons: dict[int, Tensor],
    *,
    zero: bool = False,
) -> Tensor:
    """The same logits by one dense pass over everything: who left is masked, or (`zero`) has key and value zero."""
    n, total = prompt.length, prompt.length + len(TOKENS)
    gone = torch.ones(total, dtype=torch.bool)
    gone[keep] = False
    gone[n:] = False

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if module.layer_idx >= method.select_layer:
            if zero:
                k, v = k * ~gone[:, None], v * ~gone[:, None]
            else:
                seen[:, gone] = False
        elif method.early_kv == "pruned":
            seen[n:, gone] = False
        seen.fill_diagonal_(True)  # those who left see themselves, and nobody sees them
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2), None

    def sparse(index: int, mlp: Any, dense: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            out = dense(x)
            if index in neurons:
                weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
                out[:, n:] = reference.sparse_ffn(x[:, n:], *weights, neurons[index], mlp.act_fn)
            return out

        return forward

    steps = torch.arange(len(TOKENS)) + prompt.next_position
    positions = torch.cat([prompt.positions, steps.expand(*prompt.positions.shape[:-1], -1)], -1)
    embeds = torch.cat([prompt.embeds, adapter.model.get_input_embeddings()(torch.tensor([TOKENS]))], 1)
    with Patcher(adapter) as patch:
        patch.attention(attend)
        for index, layer in enumerate(adapter.layers):
            patch.forward(layer.mlp, sparse(index, layer.mlp, layer.mlp.forward))
        options = {"past_key_values": adapter.new_cache(0), "use_cache": True}
        hidden = adapter.text(inputs_embeds=embeds, position_ids=positions, **options).last_hidden_state
    return adapter.model.lm_head(hidden[0, n - 1 :])


def chosen(trace: Trace) -> dict[int, Tensor]:
    """Core neurons as the record has them."""
    facts = json.loads(json.dumps(trace.to_json())).get("core_neurons", {"layers": {}})
    return {int(layer): torch.tensor(unpack_neurons(text, facts["of"])) for layer, text in facts["layers"].items()}


METHODS = [
    Corematching(),
    Corematching(early_kv="kept", select_layer=1, neuron_layers="1/2"),
    Corematching(part="tokens", select_layer=3, compare="gt"),
    Corematching(part="neurons", beta=0.2),
    Corematching(ffn="gathered", beta=0.3),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_removing_equals_masking_and_decoding_equals_one_pass(adapter: Any, clip: Any, method: Corematching) -> None:
    """Hence also: every survivor has its old position, generated tokens go on from the prompt's, the sets stay fixed."""
    prompt = spliced(adapter, [clip(12)])
    ours = decoded(adapter, method, prompt)
    keep = ours.trace.kept.get(f"layer {method.select_layer}", list(range(prompt.length)))
    assert (len(keep) < prompt.length) == (method.part != "neurons")
    right = masked(adapter, method, prompt, keep, chosen(ours.trace))
    torch.testing.assert_close(ours.logits, right, rtol=0, atol=ROUNDING)
    if method.part == "tokens":
        wrong = masked(adapter, method, prompt, keep, {}, zero=True)
        assert not torch.allclose(ours.logits, wrong, rtol=0, atol=100 * ROUNDING)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_other_attention_gives_the_same(adapter: Any, clip: Any, method: Corematching) -> None:
    """Eager attention builds one mask for all layers, of the first one's length."""
    prompt = spliced(adapter, [clip(12)])
    ours, eager = decoded(adapter, method, prompt), decoded(adapter, method, prompt, "eager")
    assert ours.trace.kept == eager.trace.kept
    torch.testing.assert_close(ours.logits, eager.logits, rtol=0, atol=ROUNDING)


def test_everything_kept_is_full_attention_to_the_last_bit(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    full, ours = (decoded(adapter, method, prompt) for method in (Full(), Corematching.neutral()))
    assert torch.equal(ours.logits, full.logits)
    for a, b in zip(ours.cache.layers, full.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    assert len(ours.trace.kept["layer 2"]) == prompt.length
    assert all(len(each) == adapter.shapes.intermediate for each in chosen(ours.trace).values())
    assert (ours.trace.applied, ours.trace.reason) == (False, "every visual token and every neuron is kept")


@pytest.mark.parametrize("early_kv", ["pruned", "kept"])
def test_what_each_layer_processes_and_holds(adapter: Any, clip: Any, early_kv: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    method = Corematching(early_kv=early_kv)
    ours = decoded(adapter, method, prompt)
    keep, n, steps = ours.trace.kept["layer 2"], prompt.length, len(TOKENS)
    early = len(keep) if early_kv == "pruned" else n
    assert lengths(ours.cache) == ([n + steps] * 4, [early + steps] * 2 + [len(keep) + steps] * 2)
    full = decoded(adapter, Full(), prompt).cache
    held = [
        (a.keys[0, :, :early], b.keys[0][:, keep if early_kv == "pruned" else slice(n)])
        for a, b in zip(ours.cache.layers[:2], full.layers, strict=False)
    ]
    assert all(torch.equal(a, b) for a, b in held)  # before the removal nothing else happens
    work = method.work(prompt, adapter.shapes, ours.trace)
    k = len(keep)
    assert work.tokens == (n, n, k, k)
    assert work.pairs == tuple(t * (t + 1) // 2 for t in work.tokens)
    assert set(work.neurons) == {adapter.shapes.intermediate}  # prefill's FFN is dense
    assert method.work(prompt, adapter.shapes, Trace()).tokens == (n,) * 4  # before it ran nobody knows


def test_all_text_stays_and_the_order_too(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(1, "image"), clip(6)])
    trace = decoded(adapter, Corematching(compare="gt"), prompt).trace
    keep = trace.kept["layer 2"]
    assert keep == sorted(set(keep))
    text = set(prompt.layout.indices("text", "separator").tolist())
    assert text < set(keep)
    facts = trace.facts["core_tokens"]
    assert (facts["kept"], facts["of"]) == (len(keep) - len(text), prompt.layout.n_visual)


def test_neurons_and_tokens_are_what_the_activations_say(adapter: Any, clip: Any) -> None:
    """Neurons by all tokens that the layer has, text too; tokens by the last layer that has them all."""
    prompt = spliced(adapter, [clip(12)])
    method = Corematching(rho=0.3, beta=0.25)
    seen: list[Tensor] = []
    with torch.inference_mode(), method.attach(adapter) as trace:
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
            for layer in adapter.layers
        ]
        adapter.prefill(prompt, adapter.new_cache(0))
        for handle in handles:
            handle.remove()
    keep = trace.kept["layer 2"]
    assert [len(each) for each in seen] == [prompt.length] * 2 + [len(keep)] * 2
    sets = chosen(trace)
    assert {i: each.tolist() for i, each in sets.items()} == {
        i: reference.core_set(each, 0.3, 0.25) for i, each in enumerate(seen)
    }
    visual = prompt.layout.indices("video", "image")
    scores = torch.tensor(reference.co_activation(seen[1][visual], sets[1].tolist()))
    kept = visual[scores >= scores.sort(descending=True).values[reference.knee([*map(float, scores)])]]
    assert set(kept.tolist()) == set(keep) & set(visual.tolist())
    size = 3 * adapter.shapes.hidden * n_core(0.25, adapter.shapes.intermediate) * 4 * 4
    assert trace.facts["core_neurons"]["copied_bytes"] == size


def test_sets_survive_being_written_down() -> None:
    sets = {3: torch.tensor([0, 7, 8, 18]), 5: torch.tensor([1, 2, 3, 17])}
    assert {int(k): unpack_neurons(v, 19) for k, v in pack_neurons(sets, 19).items()} == {
        k: v.tolist() for k, v in sets.items()
    }
    assert pack_neurons({}, 19) == {}


@torch.inference_mode()
def test_two_caches_are_decoded_each_with_its_own_neurons_which_go_when_it_goes(adapter: Any, clip: Any) -> None:
    method = Corematching()
    prompts = [spliced(adapter, [clip(frames)]) for frames in (12, 6)]
    alone = [decoded(adapter, method, prompt).logits for prompt in prompts]
    with method.attach(adapter):
        caches = [adapter.new_cache(3) for _ in prompts]
        logits = [[adapter.prefill(prompt, cache)] for prompt, cache in zip(prompts, caches, strict=True)]
        for step, token in enumerate(TOKENS):
            for prompt, cache, found in zip(prompts, caches, logits, strict=True):
                found.append(adapter.decode(torch.tensor([[token]]), prompt.next_position + step, cache))
        for found, right in zip(logits, alone, strict=True):
            assert torch.equal(torch.cat(found), right)
        run = adapter.layers[0].mlp.forward.func.__self__
        weights = weakref.ref(next(iter(run._known.values())).ffn[0].gate)
        assert weights() is not None
        del caches, cache
        assert weights() is None


def test_text_alone_is_answered_by_the_dense_model(adapter: Any) -> None:
    prompt = spliced(adapter, [])
    full = decoded(adapter, Full(), prompt)
    for method in (*METHODS, Corematching(mode="release"), Corematching(spearman=True)):
        ours = decoded(adapter, method, prompt)
        torch.testing.assert_close(ours.logits, full.logits, rtol=0, atol=ROUNDING)
        assert (ours.trace.applied, ours.trace.reason) == (False, "the prompt has no visual tokens")


def test_a_single_picture_of_a_few_tokens_is_kept_whole(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(1, "image")]) if adapter.name == "qwen_vl" else spliced(adapter, [clip(1)])
    visual = prompt.layout.indices("video", "image")
    prompt = prompt.select(torch.cat([prompt.layout.indices("text", "separator"), visual[:2]]).sort().values)
    trace = decoded(adapter, Corematching(), prompt).trace
    assert trace.facts["core_tokens"]["kept"] == 2


def test_a_cache_that_is_not_empty_and_several_tokens_at_once_are_refused(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(6)])
    with torch.inference_mode(), Corematching().attach(adapter):
        cache = adapter.new_cache(4)
        adapter.prefill(prompt, cache)
        with pytest.raises(ValueError, match=f"the cache must be empty; it holds {prompt.length} tokens"):
            adapter.prefill(prompt, cache)
        cache = adapter.new_cache(4)
        adapter.prefill(prompt, cache)
        with pytest.raises(ValueError, match="one at a time; 2 came at once"):
            adapter.extend(prompt.embeds[:, :2], prompt.positions[..., :2], cache)


# The public code's rule.


def test_the_release_zeroes_keys_in_its_window_and_the_first_token_is_full_attentions(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    full, ours = (decoded(adapter, method, prompt) for method in (Full(), Corematching(mode="release")))
    assert torch.equal(ours.logits[0], full.logits[0])
    assert not torch.allclose(ours.logits[1:], full.logits[1:], rtol=0, atol=100 * ROUNDING)
    assert lengths(ours.cache) == lengths(full.cache)
    assert list(ours.trace.kept) == ["layer 0", "layer 1"]
    n = prompt.length
    for index, (a, b) in enumerate(zip(ours.cache.layers, full.cache.layers, strict=True)):
        kept = ours.trace.kept.get(f"layer {index}", list(range(n)))
        lost = sorted(set(range(n)) - set(kept))
        assert bool(lost) == (index < 2)
        assert set(lost) <= set(prompt.layout.indices("video", "image").tolist())
        for states, dense in ((a.keys, b.keys), (a.values, b.values)):
            assert not states[:, :, lost].any()
            assert torch.equal(states[:, :, kept], dense[:, :, kept])
    assert ours.trace.facts["masked"]
    assert Corematching(mode="release").work(prompt, adapter.shapes, ours.trace) == Full().work(
        prompt, adapter.shapes, full.trace
    )


def test_the_releases_score_is_with_the_fifth_token_from_the_end(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    seen: list[Tensor] = []
    with torch.inference_mode(), Corematching(mode="release").attach(adapter) as trace:
        handle = adapter.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        adapter.prefill(prompt, adapter.new_cache(0))
        handle.remove()
    positive = seen[0] > 0
    visual = prompt.layout.indices("video", "image").tolist()
    scores = [int((positive[i] & positive[prompt.length - 5]).sum()) for i in visual]
    least = sorted(scores, reverse=True)[reference.knee([*map(float, scores)])]
    kept = {i for i, score in zip(visual, scores, strict=True) if score > least}
    assert set(trace.kept["layer 1"]) & set(visual) == kept


def test_the_releases_window_is_its_own_at_its_own_depth() -> None:
    assert core_release.window(32) == range(5, 19)
    assert core_release.window(4) == range(2)


# The yardstick.


def test_contributions_are_projections_on_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator) for size in ((4, 8), (2, 6, 8), (2, 6, 8)))
    found = contribution(q, k, v, 0.5)
    out, shares = [], []
    for head in range(4):
        alpha = torch.softmax(k[head // 2] @ q[head] * 0.5, 0)
        shares.append(alpha[:, None] * v[head // 2])
        out.append(shares[-1].sum(0))
    whole, parts = torch.cat(out), torch.cat(shares, 1)
    cos = functional.cosine_similarity(parts, whole[None], dim=1)
    torch.testing.assert_close(found, parts.norm(dim=1) * cos)  # float32 rounding
    torch.testing.assert_close(found.sum(), whole.norm())


def test_rank_correlation() -> None:
    up = torch.tensor([1, 2, 3, 4])
    assert spearman(up, up**3) == 1
    assert spearman(up, -up) == -1
    assert spearman(torch.tensor([1, 1, 2]), torch.tensor([1.0, 2.0, 3.0])) == 0.866  # ranks 1.5 1.5 3: √3 / 2
    assert spearman(up, torch.ones(4)) is None
    assert spearman(up[:1], up[:1]) is None


def test_the_correlation_is_noted_for_every_layer_and_changes_nothing(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    plain, noted = (decoded(adapter, Corematching(spearman=on), prompt) for on in (False, True))
    assert torch.equal(plain.logits, noted.logits)
    found = noted.trace.facts["spearman"]
    assert list(found) == ["0", "1", "2", "3"]
    assert all(-1 <= value <= 1 for value in found.values())
    assert "spearman" not in plain.trace.facts


def test_the_study_takes_medians_over_samples_layer_by_layer(cli: Any, tmp_path: Any) -> None:
    from vlmbench.core_study import study, to_markdown

    common = ("--suite", "synthvideo:length=32", "--no-baseline", "--mode", "accuracy")
    own, none = tmp_path / "own", tmp_path / "none"
    assert cli("run", *common, "--model", "dummy", "--method", "uniform", "--limit", 1, "--out", none).code == 0
    with pytest.raises(UsageError, match=r"holds no run of corematching:spearman=on"):
        study(none)
    asked = ("--method", "corematching:spearman=on", "--max-new-tokens", 1, "--limit", 2)
    assert cli("run", *common, *asked, "--out", own).code == 0
    found = study(own)
    (records,) = (path.read_text().splitlines() for path in own.rglob("samples.jsonl"))
    noted = [json.loads(line)["trace"]["spearman"] for line in records]
    assert len(noted) == 2
    assert [row["layer"] for row in found] == sorted(map(int, noted[0]))
    for row in found:
        values = [each[str(row["layer"])] for each in noted]
        assert row["n"] == 2
        assert row["median"] == pytest.approx(sum(values) / 2)
        assert row["q1"] <= row["median"] <= row["q3"]
        assert row["positive"] == sum(value > 0 for value in values) / 2
    assert to_markdown(found).count("corematching:rho=0.2") == len(found)


# What is not known before.


def test_a_plan_says_that_it_counts_tokens_that_will_leave(cli: Any) -> None:
    small = ("plan", "--model", "mini-qwen2.5-vl", "--frames", 12, "--frame-tokens", 4, "--device", "h200")

    def notes(method: str) -> dict[str, Any]:
        called = cli(*small, "--method", method, "--format", "json")
        assert called.code == 0, called.err
        return {row["stage"]: row["note"] for row in json.loads(called.out)["rows"]}

    found = notes("corematching:select_layer=3")
    assert found["vision"] is None
    assert found["prefill"] == found["decode"]
    assert found["prefill"].startswith("corematching's prefill and cache count every token")
    assert "after layer 3" in found["prefill"]
    assert notes("uniform:ratio=0.5+corematching:ffn=gathered")["decode"].startswith("corematching's prefill")
    for method in ("full", "corematching:part=neurons", "corematching:mode=release", "blind+full"):
        assert set(notes(method).values()) == {None}
    # Where nothing is done there is nothing to add.
    assert not Corematching().unplanned(TokenLayout((Span("text", 0, 4),)))
    said = cli(*small, "--method", "corematching").out.splitlines()
    assert said[-1].startswith("At most: corematching's prefill and cache count every token")
    assert not any(line.startswith("At most") for line in cli(*small, "--method", "full").out.splitlines())


def test_a_plan_of_the_gathered_ffn_holds_less_and_reads_its_index_too(cli: Any) -> None:
    """51 of 128 neurons in 4 layers of 64 channels, 2 bytes a number; 64 columns of down are held for them."""
    rows = {}
    for method in ("corematching", "corematching:ffn=gathered"):
        called = cli(
            *("plan", "--model", "mini-qwen2.5-vl", "--frames", 12, "--frame-tokens", 4, "--device", "h200"),
            *("--method", method, "--format", "json"),
        )
        (rows[method],) = (row for row in json.loads(called.out)["rows"] if row["stage"] == "decode")
    compact, gathered = rows.values()
    assert gathered["bytes"] - compact["bytes"] == 4 * (64 * (64 - 51) * 2 + 51 * 4)
    assert compact["peak_bytes"] - gathered["peak_bytes"] == 4 * (3 * 64 * 51 * 2 - (64 * 64 * 2 + 51 * 4))
    assert gathered["flops"] == compact["flops"]


# What is refused.


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("rho=0", "corematching:rho must be above 0 and at most 1, not 0.0."),
        ("rho=nan", "corematching:rho must be a finite number, not 'nan'."),
        ("beta=1.5", "corematching:beta must be above 0 and at most 1, not 1.5."),
        ("select_layer=0", "corematching:select_layer must be at least 1, not 0."),
        ("min_keep=0", "corematching:min_keep must be at least 1, not 0."),
        ("compare=lt", "corematching:compare must be one of ge, gt, not 'lt'."),
        ("neuron_layers=6-26", "corematching:neuron_layers must be all, or first/last such as 6/26, not '6-26'."),
        ("neuron_layers=9/3", "corematching:neuron_layers must be all, or first/last such as 6/26, not '9/3'."),
        ("mode=release,part=tokens", "corematching:mode=release has one form; leave part=tokens"),
        ("mode=release,compare=ge", "corematching:mode=release has one form; leave part=both, compare=ge"),
        (
            "offload=on,part=tokens",
            "corematching:offload=on leaves core neurons on the device, and part=tokens,mode=paper",
        ),
        ("resident=2", "corematching:resident=2 must be at least 0 and needs offload=on;"),
        ("resident=-1,offload=on", "corematching:resident=-1 must be at least 0 and needs offload=on;"),
    ],
)
def test_parameters_that_cannot_be_are_refused_in_a_sentence(spec: str, says: str) -> None:
    from vlmbench.session import make_methods

    with pytest.raises(UsageError) as refused:
        make_methods([f"corematching:{spec}"])
    assert str(refused.value).startswith(says)


def test_models_that_cannot_take_it_are_refused_before_anything_is_attached(adapter: Any, monkeypatch: Any) -> None:
    for method, says in (
        (Corematching(select_layer=4), "select_layer=4 leaves no layer behind it: the model has 4"),
        (Corematching(neuron_layers="2/4"), "neuron_layers=2/4 goes beyond the model's last layer, 3 counted from 0"),
        (Corematching(beta=0.001), "beta=0.001 keeps none of 128 neurons; give at least 0.0078"),
    ):
        with pytest.raises(UsageError, match=says):
            method.check(adapter)
    Corematching(select_layer=4, part="neurons").check(adapter)
    monkeypatch.delattr(adapter.layers[2].mlp, "gate_proj")
    with pytest.raises(UsageError, match="needs gated FFNs of plain matrices"):
        Corematching().check(adapter)
    for layer in adapter.layers:
        assert "forward" not in vars(layer.mlp)
        assert not layer._forward_pre_hooks


def test_a_share_is_what_is_kept_and_each_half_can_be_had_alone(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    for method, tokens, neurons in (
        (Corematching(beta=0.25), True, True),
        (Corematching(beta=0.25, part="tokens"), True, False),
        (Corematching(beta=0.25, part="neurons"), False, True),
    ):
        trace = decoded(adapter, method, prompt).trace
        assert ("core_tokens" in trace.facts, "core_neurons" in trace.facts) == (tokens, neurons)
        assert {len(each) for each in chosen(trace).values()} == ({32} if neurons else set())


def test_the_engine_answers_with_it(adapter: Any, clip: Any) -> None:
    method = Corematching(beta=0.5)
    with method.attach(adapter) as trace:
        done = generate(adapter, method, trace, [clip(6)], QUESTION, max_new_tokens=4, stop_at_eos=False)
    assert len(done.token_ids) == 4
    assert set(trace.facts) == {"core_tokens", "core_neurons"}
