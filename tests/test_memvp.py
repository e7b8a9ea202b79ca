"""MemVP: what the paper's formula says of the memory, what a prompt without pictures is, and which files are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.test_memvp_file import written
from vlmbench import cost
from vlmbench.engine import generate
from vlmbench.layout import Prompt
from vlmbench.memvp_data import teach
from vlmbench.memvp_memory import Memory, MemoryShape, Slots, VisualMemory, flops, lay_out, memory_term, pool
from vlmbench.memvp_prompt import add_memory, shape_for, text_alone, units_of
from vlmbench.memvp_train import frozen
from vlmbench.method import one_token
from vlmbench.methods.memvp import Memvp
from vlmbench.models.base import Features
from vlmbench.models.loading import load
from vlmbench.patch import Patcher
from vlmbench.trace import Trace
from vlmbench.work import FORMULA

QUESTION = "where is the red circle ?"
seeds = st.integers(0, 10**6)
few = settings(max_examples=25)
D, FFN, SEEN, SLOTS = 6, 10, 5, 8


def random(seed: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Normal float64 tensors: what two orders of one sum may differ in is then far below 1e-12."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def made(seed: int = 0, slots: int = SLOTS, **options: Any) -> VisualMemory:
    """A small memory in evaluation mode whose values are not zero either."""
    memory = VisualMemory(MemoryShape(4, D, slots, **options), scale=0.1, weight=0.5).start(seed).double().eval()
    with torch.no_grad():
        for parameter in (memory.p_k, memory.p_v, memory.unit_k, memory.unit_v):
            parameter.copy_(random(seed + 1, tuple(parameter.shape))[0])
    return memory


def seen(memory: VisualMemory, *pictures: Tensor) -> Slots:
    like = torch.zeros(1, memory.shape.size, dtype=torch.float64)
    return lay_out([(each, None) for each in pictures], memory.shape.slots, memory.shape.units, like)


@pytest.fixture(scope="module")
def mini() -> Any:
    return load("mini-llava-ov@random", dtype=torch.float32, device="cpu", attention="sdpa").adapter


# The formula.


@few
@given(seeds, st.sampled_from([F.gelu, F.relu]))
def test_beside_a_plain_block_memory_is_more_of_its_keys_and_values(seed: int, activation: Any) -> None:
    """The form of BART and T5: FFN'(x) = φ(x [W1; K]ᵀ) [W2; V]."""
    x, w1, w2, keys, values = random(seed, (1, 3, D), (FFN, D), (FFN, D), (1, SLOTS, D), (1, SLOTS, D))
    wide = activation(x @ torch.cat([w1, keys[0]]).T) @ torch.cat([w2, values[0]])
    same(activation(x @ w1.T) @ w2 + memory_term(x, Memory(keys, values), activation), wide)


@few
@given(seeds)
def test_beside_a_gated_block_memory_is_more_gate_rows_whose_other_branch_is_one(seed: int) -> None:
    x, w1, w3, w2, keys, values = random(seed, (1, 3, D), (FFN, D), (FFN, D), (D, FFN), (1, SLOTS, D), (1, SLOTS, D))
    up, bias = torch.cat([w3, torch.zeros_like(keys[0])]), torch.cat([torch.zeros(FFN), torch.ones(SLOTS)]).double()
    wide = (F.silu(x @ torch.cat([w1, keys[0]]).T) * (x @ up.T + bias)) @ torch.cat([w2, values[0].T], 1).T
    own = (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T + memory_term(x, Memory(keys, values))
    same(own, wide)


def test_the_memory_is_written_as_published() -> None:
    memory = made()
    z, u = random(3, (SEEN, 4), (1, 2, D))
    projected = torch.cat([0.5 * memory.projector(z), torch.zeros(SLOTS - SEEN, D)])
    keys, values = projected + memory.p_k, projected + memory.p_v
    held = memory([seen(memory, z)])
    same(held.keys[0], keys)
    same(held.values[0], 0.1 * values)
    loop = sum(0.1 * F.silu(u @ keys[i])[..., None] * values[i] for i in range(SLOTS))
    same(memory_term(u, held), loop)  # type: ignore[arg-type]


@few
@given(seeds)
def test_a_memory_without_values_adds_exactly_nothing_whatever_its_keys(seed: int) -> None:
    memory = made(seed)
    z, u = random(seed + 2, (SEEN, 4), (1, 3, D))
    with torch.no_grad():
        memory.p_v.zero_()
        assert memory_term(u, memory([seen(memory)])).abs().max() == 0  # no picture: the indicator is 0
        assert memory_term(u, memory([seen(memory, z)])).abs().max() > 0  # the published start is no identity
        memory.weight = 0.0
        assert memory_term(u, memory([seen(memory, z)])).abs().max() == 0


@few
@given(seeds)
def test_the_term_is_linear_in_s_and_zero_at_zero(seed: int) -> None:
    memory = made(seed)
    z, u = random(seed + 2, (SEEN, 4), (1, 3, D))
    terms = {}
    for memory.scale in (0.0, 0.1, 0.2):
        terms[memory.scale] = memory_term(u, memory([seen(memory, z)]))
    assert terms[0.0].abs().max() == 0
    same(terms[0.2], 2 * terms[0.1])


@few
@given(seeds)
def test_slots_have_no_order_but_by_their_own_vectors(seed: int) -> None:
    memory = made(seed)
    z, u = random(seed + 2, (SLOTS, 4), (1, 3, D))
    before = memory_term(u, memory([seen(memory, z)]))
    turned = torch.arange(SLOTS).roll(3)
    alone = memory_term(u, memory([seen(memory, z[turned])]))
    with torch.no_grad():
        memory.p_k.copy_(memory.p_k[turned])
        memory.p_v.copy_(memory.p_v[turned])
    same(memory_term(u, memory([seen(memory, z[turned])])), before)
    assert not torch.allclose(alone, before)


@few
@given(seeds, st.integers(0, SLOTS))
def test_the_term_is_the_sum_over_any_split_of_the_slots(seed: int, cut: int) -> None:
    """Softmax, or a division by the number of slots, would break it."""
    u, keys, values = random(seed, (2, 3, D), (2, SLOTS, D), (2, SLOTS, D))
    parts = [Memory(keys[:, part], values[:, part]) for part in (slice(cut), slice(cut, None))]
    same(memory_term(u, parts[0]) + memory_term(u, parts[1]), memory_term(u, Memory(keys, values)))


@few
@given(seeds, st.integers(0, 3))
def test_a_position_reads_the_slots_and_no_other_position(seed: int, at: int) -> None:
    u, keys, values = random(seed, (1, 4, D), (1, SLOTS, D), (1, SLOTS, D))
    other = u.clone()
    other[:, at] += 1
    changed = (memory_term(u, Memory(keys, values)) != memory_term(other, Memory(keys, values))).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [at]


@few
@given(seeds, st.integers(1, SEEN))
def test_a_batch_of_different_pictures_is_each_picture_by_itself(seed: int, n: int) -> None:
    """The smaller one is padded with slots that are masked: by itself a padded slot would fire."""
    memory = made(seed, slots=3)
    small, large, u = random(seed + 2, (n, 4), (3, 4), (2, 3, D))
    wide = replace_units(memory, 4)
    samples = [seen(wide, small[:2]), seen(wide, large, large + 1, large - 1)]
    held = wide(samples)
    assert held.mask is not None
    assert held.mask.sum(1).tolist() == [len(each.row) for each in samples]
    for row, each in enumerate(samples):
        same(memory_term(u, held)[row], memory_term(u[row : row + 1], wide([each]))[0])
    unmasked = memory_term(u, held._replace(mask=None))
    assert not torch.allclose(unmasked[0], memory_term(u, held)[0])


def replace_units(memory: VisualMemory, units: int) -> VisualMemory:
    return made(7, slots=memory.shape.slots, units=units)


@few
@given(seeds, st.integers(1, 9))
def test_masked_slots_add_exact_zeros(seed: int, more: int) -> None:
    """The same to the last bit where the sum goes slot by slot; a matrix product may sum in another order."""
    u, keys, values, k, v = random(seed, (1, 3, D), (1, SLOTS, D), (1, SLOTS, D), (1, more, D), (1, more, D))
    mask = torch.arange(SLOTS + more)[None] < SLOTS
    padded = Memory(torch.cat([keys, k], 1), torch.cat([values, v], 1), mask)
    same(memory_term(u, padded), memory_term(u, Memory(keys, values)))
    only = padded._replace(mask=~mask[:, SLOTS:], keys=k, values=v)
    assert memory_term(u, only._replace(mask=mask[:, SLOTS:])).abs().max() == 0


def test_dropout_is_of_training_alone(mini: Any, clip: Any) -> None:
    prompt = spliced(mini, [clip(2)])
    memory = VisualMemory(shape_for(mini, 20), scale=0.5).start(0)
    held = memory([lay_out(units_of(prompt), 20, 1, prompt.embeds)])
    with torch.inference_mode(), Patcher(mini) as patch:
        add_memory(patch, memory, lambda: held)
        teaching = [text_alone(prompt)], [torch.tensor([5, 6])]
        evaluated = [teach(mini, *teaching).logits for _ in range(2) if memory.eval()]
        dropped = [teach(mini, *teaching).logits for _ in range(2) if memory.train()]
    assert torch.equal(*evaluated)
    assert not torch.equal(*dropped)


# How many, and what learns.


@pytest.mark.parametrize(("hidden", "slots", "total"), [(4096, 320, 3_879_040), (5120, 400, 5_487_744)])
def test_parameters_are_the_published_ones(hidden: int, slots: int, total: int) -> None:
    """LLaMA 7B and 13B with CLIP ViT-L/14; the paper also counts an embedding [2, d] that its forward never reads."""
    shape = MemoryShape(1024, hidden, slots, vision_blocks=24, vision_hidden=1024, vision_width=12)
    with torch.device("meta"):
        memory = VisualMemory(shape, scale=0.1)
    projector = 1024 * 128 + 128 + 128 * hidden + hidden
    assert sum(p.numel() for p in memory.projector.parameters()) == projector
    assert (memory.p_k.numel(), memory.p_v.numel()) == (slots * hidden, slots * hidden)
    assert sum(p.numel() for p in memory.vision.parameters()) == 589_824
    assert memory.count + 2 * hidden == total


def test_work_is_two_products_a_slot_and_the_projector_once() -> None:
    # 4 · n · d a token and layer: 1.3 % of a 7B layer at 320 slots (8 d² + 6 d D).
    own = flops(320, 1024, 4096, tokens=1) - flops(320, 1024, 4096, tokens=0)
    assert own == 4 * 320 * 4096
    assert own / (8 * 4096**2 + 6 * 4096 * 11008) == pytest.approx(0.013, abs=5e-4)


def test_only_what_is_trained_has_gradients_and_the_projector_learns_by_key_and_value(adapter: Any, clip: Any) -> None:
    memory = VisualMemory(shape_for(adapter, 20, vision=4), scale=0.5).start(0)
    texts, answers = [], [torch.tensor([5, 6])]
    with frozen(adapter.model), Patcher(adapter) as patch:
        held: Memory | None = None
        add_memory(patch, memory, lambda: held)
        inputs = adapter.to_device(adapter.inputs([clip(2)], QUESTION))
        prompt = adapter.splice(inputs, adapter.encode_vision(inputs))
        texts = [text_alone(prompt)]
        held = whole = memory([lay_out(units_of(prompt), 20, 1, prompt.embeds)])
        teach(adapter, texts, answers).loss.backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in adapter.model.parameters())
        # The second matrix of an adapter in the tower starts at zero, so the first learns a step later.
        learning = {name for name, p in memory.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        # What is read is of the block before the last in some families, and an adapter in the last never runs for nothing.
        read = len(memory.vision) + getattr(adapter.config, "vision_feature_layer", -1) + 1
        unread = tuple(f"vision.{index}." for index in range(read, len(memory.vision)))
        trained = {
            name for name, p in memory.named_parameters() if p.numel() and not name.startswith(("", *unread)[1:])
        }
        assert learning == {name for name in trained if not name.endswith("down.weight")}
        for part in ("keys", "values"):
            memory.zero_grad()
            held = whole._replace(**{part: getattr(whole, part).detach()})
            teach(adapter, texts, answers).loss.backward(retain_graph=True)
            assert memory.get_parameter("projector.0.weight").grad.abs().max() > 0  # type: ignore[union-attr]


# Slots.


def test_one_picture_fills_the_first_slots_and_the_others_are_plain_memory() -> None:
    memory = made()
    (z,) = random(0, (SEEN, 4))
    slots = seen(memory, z)
    assert slots.n_visual == SEEN
    assert slots.row.tolist() == list(range(SLOTS))
    assert set(slots.unit.tolist()) == {0}
    assert torch.equal(slots.features[SEEN:], torch.zeros(SLOTS - SEEN, 4, dtype=torch.float64))
    assert len(seen(memory).row) == SLOTS  # no picture: as many, all of them learned


@few
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30))
def test_every_prompt_finds_room(units: int, size: int, slots: int) -> None:
    features = torch.arange(units * size * 2.0).reshape(units, size, 2)
    found = lay_out([(each, None) for each in features], slots, 4, torch.zeros(1, 2))
    assert int(found.row.max()) == slots - 1
    assert int(found.unit.max()) == min(units, 4) - 1
    assert found.n_visual == min(units, 4) * min(size, slots)
    # Averages of equal groups keep the mean of what is seen.
    if units <= 4 and size <= slots:
        assert torch.equal(found.features[: found.n_visual], features.flatten(0, 1))


def test_a_frame_with_a_grid_is_pooled_over_squares() -> None:
    features = torch.arange(32 * 32.0)[:, None]
    assert pool(features, (32, 32), 256).flatten()[:2].tolist() == [16.5, 18.5]  # of rows 0 and 1, columns 0 to 3
    assert len(pool(features, None, 256)) == 256
    assert pool(features[:200], (10, 20), 256) is not None
    assert torch.equal(pool(features[:200], (10, 20), 256), features[:200])


def test_the_order_of_frames_matters_where_they_have_codes_and_only_there() -> None:
    frames, u = random(1, (3, 4, 4), (1, 2, D))
    for units, matters in ((3, True), (1, False)):
        memory = made(2, units=units)
        there, back = (memory_term(u, memory([seen(memory, *each)])) for each in (frames, frames.flip(0)))
        assert torch.allclose(there, back) != matters


def test_more_than_256_visual_slots_weaken_each_other() -> None:
    memory = made(slots=256, units=2)
    (z,) = random(1, (256, 4))
    one, two = memory([seen(memory, z)]), memory([seen(memory, z, z)])
    with torch.no_grad():
        memory.scale /= 2
        same(two.values, memory([seen(memory, z, z)])._replace().values * 2)
    assert one.values.shape[1] == 256
    same(two.values[0, 0] * 512 / 256, 0.1 * (0.5 * memory.projector(z[0]) + memory.p_v[0] + memory.unit_v[0]))


# In a model.


def spliced(adapter: Any, clips: list[Any]) -> Prompt:
    with torch.no_grad():
        inputs = adapter.to_device(adapter.inputs(clips, QUESTION))
        return adapter.splice(inputs, adapter.encode_vision(inputs) if clips else Features())


def line_breaks(adapter: Any, clips: list[Any]) -> int:
    """How many line breaks the template writes for placeholders: one for each, or none."""
    placeholders = [piece for each in clips for piece in adapter.content_of(each)]
    return (
        len(placeholders) if "<image>\n" in adapter._written([clips[0]], "", ())[0].replace("<video>", "<image>") else 0
    )


@pytest.mark.parametrize("media", [["video"], ["image"], ["video", "image"], ["image", "video"]], ids="+".join)
def test_what_is_read_is_the_prompt_of_the_question_alone(adapter: Any, clip: Any, media: list[str]) -> None:
    """The same tokens at the same positions: no placeholder, separator or mark of a medium is left.

    Some templates write a line break behind every placeholder, which is text like any other and stays.
    """
    clips = [clip(4 if kind == "video" else 1, kind) for kind in media]
    with_pictures, without = text_alone(spliced(adapter, clips)), spliced(adapter, [])
    breaks = line_breaks(adapter, clips)
    (line,) = adapter.model.get_input_embeddings()(torch.tensor(adapter.processor.tokenizer("\n")["input_ids"]))
    is_break = (with_pictures.embeds[0] == line).all(-1)
    kept = ~(is_break & (is_break.cumsum(0) <= breaks))
    assert torch.equal(with_pictures.embeds[:, kept], without.embeds)
    n = without.layout.length + breaks
    assert torch.equal(with_pictures.positions, torch.arange(n).expand_as(with_pictures.positions))
    assert with_pictures.next_position == with_pictures.layout.length == with_pictures.layout.count("text") == n


def memory_method(artefact: str = "untrained", **options: Any) -> Memvp:
    return Memvp(artefact=artefact, slots=20, scale=0.5, **options)


def test_prefill_and_decoding_are_one_pass_over_the_whole_as_in_training(adapter: Any, clip: Any) -> None:
    """Memory stays for every generated token, and two prompts of a batch are each as if alone."""
    method, clips = memory_method(), [[clip(2)], [clip(1, "image"), clip(6)]]
    done, prompts = [], []
    with method.attach(adapter) as trace:
        for each in clips:
            done.append(generate(adapter, method, trace, each, QUESTION, max_new_tokens=5, stop_at_eos=False))
    memory = method.new_memory(adapter).eval()
    held = memory([lay_out(units_of(spliced(adapter, each)), 20, 1, done[0].prompt.embeds) for each in clips])
    longer = [5, 6, 7]  # more text in the second row, so that the first one is padded
    prompts = [text_alone(spliced(adapter, each)) for each in clips]
    embed = adapter.model.get_input_embeddings()
    with torch.inference_mode(), Patcher(adapter) as patch:
        add_memory(patch, memory, lambda: held)
        prompts[1] = replace(prompts[1], embeds=torch.cat([prompts[1].embeds, embed(torch.tensor([longer]))], 1))
        n = prompts[1].length
        places = torch.arange(n).expand(*prompts[1].positions.shape[:-1], -1)
        prompts[1] = replace(prompts[1], positions=places, next_position=n)
        taught = teach(adapter, prompts, [torch.tensor(done[0].token_ids), torch.tensor([5, 6])])
        first = taught.logits[taught.row == 0]
        held = Memory(held.keys[1:], held.values[1:], None if held.mask is None else held.mask[1:])
        alone = teach(adapter, prompts[1:], [torch.tensor([5, 6])])
    # Float32 rounding of four layers whose logits are near one.
    torch.testing.assert_close(first[0], done[0].first_logits, rtol=0, atol=1e-5)
    assert first.argmax(-1).tolist() == done[0].token_ids
    torch.testing.assert_close(taught.logits[taught.row == 1], alone.logits, rtol=0, atol=1e-5)


def test_work_counts_every_slot_for_every_token_in_every_layer(adapter: Any, clip: Any) -> None:
    method, trace = memory_method(), Trace()
    prompt = method.prepare(spliced(adapter, [clip(2)]), trace)
    n, d = len(prompt.extras["memvp_slots"].row), adapter.shapes.hidden
    own = method.work(prompt, adapter.shapes, trace).own_flops
    assert own == 4 * d * n * prompt.length * adapter.shapes.layers + 2 * n * 128 * (d + d)
    assert "memvp: 4 · hidden · slots per token and layer, and its projector" in FORMULA


def test_a_generated_token_reads_and_multiplies_the_memory_in_every_layer(adapter: Any, clip: Any) -> None:
    """Two products of slots × hidden a layer, and one memory that the layers share; the projector ran in prefill."""
    method, shapes = memory_method(), adapter.shapes
    found = {}
    for frames in (1, 4):
        trace = Trace()
        prompt = method.prepare(spliced(adapter, [clip(frames)]), trace)
        held = 2 * len(prompt.extras["memvp_slots"].row) * shapes.hidden
        for step in (0, 3):
            work = found[frames, step] = method.decode_work(prompt, shapes, trace, step, size=4)
            plain = one_token(prompt.length + step + 1, shapes)
            assert (work.pairs, work.tokens, work.neurons) == (plain.pairs, plain.tokens, plain.neurons)
            assert work.own_flops == 2 * held * shapes.layers
            assert work.own_bytes == work.own_read == 4 * held
            more = tuple(
                a - b for a, b in zip(cost.decode(work, shapes, 4), cost.decode(plain, shapes, 4), strict=True)
            )
            assert more == (2 * held * shapes.layers, 4 * held)
        once = flops(held // 2 // shapes.hidden, shapes.hidden, shapes.hidden, tokens=0)
        prefill = method.work(prompt, shapes, Trace()).own_flops - once
        assert prefill == prompt.length * found[frames, 0].own_flops  # a prompt's token costs as much


def test_without_scale_the_answer_is_that_of_the_question_alone(adapter: Any, clip: Any) -> None:
    found = {}
    for scale, clips in ((0.0, [clip(4)]), (0.5, [clip(4)]), (0.0, [])):
        method = Memvp(artefact="untrained", scale=scale)
        with method.attach(adapter) as trace:
            done = generate(adapter, method, trace, clips, QUESTION, max_new_tokens=3, stop_at_eos=False)
        found[scale, len(clips)] = done
        assert done.cache.get_seq_length() == done.prompt.length + 2
    prompt = text_alone(spliced(adapter, [clip(4)]))
    with torch.inference_mode():
        alone = adapter.prefill(prompt, adapter.new_cache(0))[0]
    assert torch.equal(found[0.0, 1].first_logits, alone)
    assert not torch.equal(found[0.5, 1].first_logits, alone)
    assert found[0.5, 1].prompt.length == prompt.length
    assert found[0.0, 0].prompt.length == prompt.length - line_breaks(adapter, [clip(4)])


def test_a_trained_memory_without_a_picture_is_what_was_learned(adapter: Any, tmp_path: Path) -> None:
    method = memory_method(written(adapter, tmp_path))
    with method.attach(adapter) as trace:
        done = generate(adapter, method, trace, [], QUESTION, max_new_tokens=2, stop_at_eos=False)
    assert (trace.applied, done.prompt.length) == (False, spliced(adapter, []).length)
    assert trace.facts["memory"] == {"slots": 20, "visual": 0}
    with (blind := memory_method()).attach(adapter) as trace:
        other = generate(adapter, blind, trace, [], QUESTION, max_new_tokens=2, stop_at_eos=False)
    assert not torch.equal(done.first_logits, other.first_logits)


def test_a_vision_adapter_changes_what_is_seen(adapter: Any, clip: Any, tmp_path: Path) -> None:
    first = {}
    for vision in (0, 4):
        path = written(adapter, tmp_path, vision=vision)
        method = Memvp(artefact=path)
        with method.attach(adapter) as trace:
            done = generate(adapter, method, trace, [clip(2)], QUESTION, max_new_tokens=2, stop_at_eos=False)
        first[vision] = done.first_logits
    assert not torch.equal(first[0], first[4])


def test_frames_beyond_the_codes_are_averaged_into_them(adapter: Any, clip: Any, tmp_path: Path) -> None:
    method = Memvp(artefact=written(adapter, tmp_path, units=2))
    for frames, slots in ((2, None), (12, None)):
        trace = Trace()
        prompt = method.prepare(spliced(adapter, [clip(frames)]), trace)
        per_unit = min(20, prompt.extras["memvp_slots"].n_visual)
        slots = prompt.extras["memvp_slots"]
        assert int(slots.unit.max()) <= 1
        assert slots.n_visual <= 2 * per_unit
        assert trace.kept["prompt"]
