"""One near-neutral oracle per method: a setting close to full attention, computed a second, independent way."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.layout import Prompt
from vlmbench.method import Method
from vlmbench.methods.ape import Ape
from vlmbench.methods.blind import Blind
from vlmbench.methods.block import Block
from vlmbench.methods.downsample import Downsample
from vlmbench.methods.full import Full
from vlmbench.methods.memvp import Memvp
from vlmbench.methods.pevlm import Pevlm
from vlmbench.methods.prior import Prior
from vlmbench.methods.random import Random
from vlmbench.methods.star import Star
from vlmbench.methods.uniform import Uniform
from vlmbench.trace import Trace

QUESTION = "where is the red circle ?"


def answer(adapter: Any, method: Method, clips: list[Any], **options: Any) -> Any:
    with method.attach(adapter) as trace:
        return generate(adapter, method, trace, clips, QUESTION, max_new_tokens=4, stop_at_eos=False, **options)


def spliced(adapter: Any, clips: list[Any]) -> Prompt:
    with torch.inference_mode():
        inputs = adapter.to_device(adapter.inputs(clips, QUESTION))
        return adapter.splice(inputs, adapter.encode_vision(inputs))


def by_hand(adapter: Any, prompt: Prompt, keep: list[int], allow: torch.Tensor | None = None) -> torch.Tensor:
    """First logits of the kept tokens through the stock text model, with an explicit mask and no code of ours."""
    n = len(keep)
    mask = torch.ones(n, n, dtype=torch.bool).tril() if allow is None else allow
    # Qwen's text model reads four rows of positions as text + M-RoPE; three rows are M-RoPE alone, as in the engine.
    with torch.inference_mode():
        hidden = adapter.text(
            inputs_embeds=prompt.embeds[:, keep],
            position_ids=prompt.positions[..., keep],
            attention_mask={"full_attention": mask[None, None]} if takes_mapping(adapter) else mask[None, None],
            use_cache=False,
        ).last_hidden_state
        return adapter.model.lm_head(hidden[:, -1])[0]


def takes_mapping(adapter: Any) -> bool:
    """Text models take a ready mask as one tensor or by layer type, depending on the family."""
    return "causal_mask_mapping" in inspect.getsource(type(adapter.text).forward)


def rule(region: torch.Tensor) -> torch.Tensor:
    """The paper's visibility: region 0 is the sink, -1 the tail, any other number a block."""
    rows, columns = region[:, None], region[None]
    return ((rows == -1) | (columns == 0) | (rows == columns)).tril()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # float32 rounding of a four-layer model whose logits are near one.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_full_is_the_stock_model(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(6)])
    same(answer(adapter, Full(), [clip(6)]).first_logits, by_hand(adapter, prompt, list(range(prompt.length))))


def test_uniform_without_one_token_is_the_prompt_without_it(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(6)])
    done = answer(adapter, Uniform(tokens=prompt.layout.n_visual - 1), [clip(6)])
    visual = prompt.layout.indices("video").tolist()
    n = len(visual)
    kept = {visual[int((i + 0.5) * n / (n - 1))] for i in range(n - 1)}
    (dropped,) = set(visual) - kept
    same(done.first_logits, by_hand(adapter, prompt, [i for i in range(prompt.length) if i != dropped]))


def test_random_without_one_token_is_the_prompt_without_it(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(6)])
    method = Random(tokens=prompt.layout.n_visual - 1)
    with method.attach(adapter) as trace:
        done = generate(adapter, method, trace, [clip(6)], QUESTION, max_new_tokens=1, sample_id="x")
        kept = trace.kept["prompt"]
    assert len(kept) == prompt.length - 1
    same(done.first_logits, by_hand(adapter, prompt, kept))


def test_random_draws_for_each_sample_anew_and_evenly(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(6)])
    drawn = np.zeros(prompt.length)
    trials = 400
    for i in range(trials):
        trace = Trace(sample_id=str(i))
        Random(ratio=0.5).prepare(prompt, trace)
        drawn[trace.kept["prompt"]] += 1
    visual = prompt.layout.indices("video").numpy()
    share = round(0.5 * len(visual)) / len(visual)
    # Five standard deviations of a binomial count.
    assert np.abs(drawn[visual] / trials - share).max() < 5 * (share * (1 - share) / trials) ** 0.5


def test_blind_is_the_text_alone_and_never_calls_the_tower(adapter: Any, clip: Any, monkeypatch: Any) -> None:
    prompt = spliced(adapter, [clip(6)])
    monkeypatch.setattr(adapter, "encode_vision", lambda inputs: pytest.fail("the tower was called"))
    done = answer(adapter, Blind(), [clip(6)])
    same(done.first_logits, by_hand(adapter, prompt, prompt.layout.indices("text").tolist()))


def test_blind_cannot_tell_two_videos_apart(adapter: Any, clip: Any) -> None:
    other = replace(clip(6), frames=255 - clip(6).frames)
    assert torch.equal(answer(adapter, Blind(), [clip(6)]).first_logits, answer(adapter, Blind(), [other]).first_logits)


def test_downsampled_frames_equal_a_clip_that_never_had_the_others(adapter: Any, clip: Any) -> None:
    whole = clip(8)
    kept = [1, 3, 5, 7]
    less = replace(
        whole,
        frames=whole.frames[kept],
        indices=tuple(whole.indices[i] for i in kept),
        times_s=tuple(whole.times_s[i] for i in kept),
    )
    assert torch.equal(
        answer(adapter, Downsample(ratio=0.5), [whole]).first_logits, answer(adapter, Full(), [less]).first_logits
    )


def test_fewer_pixels_give_fewer_tokens_or_are_refused(adapter: Any, clip: Any) -> None:
    method = Downsample(ratio=0.25, axis="pixels")
    if adapter.fixed_resolution:
        with pytest.raises(UsageError, match="axis=frames"):
            method.check(adapter)
        return
    small = method.prepare_clip(clip(4, side=64), Trace())
    assert small.frames.shape == (4, 32, 32, 3)
    flat = replace(small, frames=np.full_like(small.frames, 9))
    assert (Downsample(ratio=0.25, axis="pixels").prepare_clip(replace(flat), Trace()).frames == 9).all()


@pytest.mark.parametrize("remainder", ["tail", "head"])
@pytest.mark.parametrize(("sink", "block"), [(0, 1), (1, 2), (2, 1)])
def test_pevlm_is_the_stock_model_under_the_papers_mask(
    adapter: Any, clip: Any, sink: int, block: int, remainder: Any
) -> None:
    frames = 12
    prompt = spliced(adapter, [clip(frames)])
    units = prompt.layout.units
    left = (len(units) - sink) % block
    region = torch.full((prompt.length,), -1)  # the tail
    region[: units[sink].start] = 0
    members = units[sink:]
    shift = block - left if remainder == "head" and left else 0
    for i, unit in enumerate(members):
        if remainder == "head" or i < len(members) - left:
            region[unit.start : unit.stop] = 1 + (i + shift) // block
    allow = rule(region)
    done = answer(adapter, Pevlm(sink=sink, block=block, remainder=remainder), [clip(frames)])
    same(done.first_logits, by_hand(adapter, prompt, list(range(prompt.length)), allow))


def test_pevlm_decodes_as_a_fresh_masked_pass_over_prompt_and_answer(adapter: Any, clip: Any) -> None:
    """Generated tokens follow the tail's rule: they see everything."""
    prompt = spliced(adapter, [clip(12)])
    done = answer(adapter, Pevlm(sink=1, block=2), [clip(12)])
    units = prompt.layout.units
    region = torch.full((prompt.length,), -1)
    region[: units[1].start] = 0
    for i, unit in enumerate(units[1:]):
        if i < (len(units) - 1) // 2 * 2:
            region[unit.start : unit.stop] = 1 + i // 2
    embeds, positions = prompt.embeds, prompt.positions
    for step, token in enumerate(done.token_ids[:-1]):
        embeds = torch.cat([embeds, adapter.model.get_input_embeddings()(torch.tensor([[token]]))], 1)
        new = torch.full_like(positions[..., :1], prompt.next_position + step)
        positions = torch.cat([positions, new], -1)
        region = torch.cat([region, torch.tensor([-1])])
        longer = replace(prompt, embeds=embeds, positions=positions)
        logits = by_hand(adapter, longer, list(range(longer.length)), rule(region))
        assert int(logits.argmax()) == done.token_ids[step + 1]


def test_reused_positions_repeat_the_first_blocks_and_leave_the_tail(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    changed = Pevlm(sink=1, block=1, positions="reused").prepare(prompt, Trace())
    temporal = changed.positions[0] if changed.positions.dim() == 2 else changed.positions[0, 0]
    blocks = changed.extras["block_plan"].blocks
    first = temporal[blocks[0][0] : blocks[0][1]]
    for start, stop in blocks:
        # A block may end with a separator that the others lack, or lack the line break that the others end with.
        n = min(stop - start, len(first))
        assert torch.equal(temporal[start : start + n], first[:n])
    tail = blocks[-1][1]
    assert torch.equal(changed.positions[..., tail:], prompt.positions[..., tail:])
    if changed.positions.dim() == 3:
        assert torch.equal(changed.positions[1:], prompt.positions[1:])


def regions(prompt: Prompt, groups: list[int], sink_stop: int) -> torch.Tensor:
    """Region of every token: 0 below `sink_stop`, the group number of its unit, and -1 behind the last unit."""
    region = torch.full((prompt.length,), -1)
    for unit, group in zip(prompt.layout.units, groups, strict=True):
        region[unit.start : unit.stop] = group
    region[:sink_stop] = 0
    return region


def test_block_is_the_stock_model_when_no_block_sees_another(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    units = prompt.layout.units
    region = regions(prompt, [1 + i // 2 for i in range(len(units))], 0)
    region[: units[0].start] = 1  # the text before the video belongs to the first block
    done = answer(adapter, Block(block=2), [clip(12)])
    same(done.first_logits, by_hand(adapter, prompt, list(range(prompt.length)), rule(region)))


def test_star_is_the_stock_model_when_blocks_see_the_first(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    units = prompt.layout.units
    region = regions(prompt, [i // 2 for i in range(len(units))], units[2].start)
    done = answer(adapter, Star(block=2), [clip(12)])
    same(done.first_logits, by_hand(adapter, prompt, list(range(prompt.length)), rule(region)))


def test_ape_without_its_weights_is_the_stock_model_at_reused_positions(adapter: Any, clip: Any) -> None:
    prompt = spliced(adapter, [clip(12)])
    units = prompt.layout.units
    region = regions(prompt, [1 + i // 2 for i in range(len(units))], units[0].start)
    positions = prompt.positions.clone()
    axis = positions[0] if positions.dim() == 2 else positions[0, 0]
    before = int(axis[: units[-1].stop].max())
    for first in range(0, len(units), 2):
        last = min(first + 2, len(units)) - 1
        axis[units[first].start : units[last].stop] -= int(axis[units[first].start]) - int(axis[units[0].start])
    positions[..., units[-1].stop :] -= before - int(axis[: units[-1].stop].max())
    moved = replace(prompt, positions=positions)
    done = answer(adapter, Ape(block=2, temperature=1.0, scale=1.0), [clip(12)])
    same(done.first_logits, by_hand(adapter, moved, list(range(prompt.length)), rule(region)))


def test_memvp_is_the_stock_model_with_wider_blocks(adapter: Any, clip: Any) -> None:
    """Its slots are more neurons of every block: gate rows K, other rows 0 with bias 1, down columns s · V."""
    from vlmbench.memvp_memory import lay_out
    from vlmbench.memvp_prompt import units_of

    method, clips = Memvp(artefact="untrained", slots=20, scale=0.5), [clip(1, "image")]
    done = answer(adapter, method, clips)
    prompt = spliced(adapter, clips)
    with torch.inference_mode():
        memory = method.new_memory(adapter).eval()([lay_out(units_of(prompt), 20, 1, prompt.embeds)])
    keys, values = memory.keys[0], memory.values[0]
    before = [layer.mlp for layer in adapter.layers]
    for layer in adapter.layers:
        layer.mlp = wider(layer.mlp, keys, values)
    try:
        # Vicuna's template leaves a line break where the picture was.
        vicuna = adapter.name in ("llava_15", "llava_next_video")
        text = done.prompt if vicuna else spliced(adapter, [])
        theirs = by_hand(adapter, text, list(range(text.length)))
    finally:
        for layer, mlp in zip(adapter.layers, before, strict=True):
            layer.mlp = mlp
    same(done.first_logits, theirs)


def wider(mlp: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """The block with so many more neurons."""
    found, n = copy.deepcopy(mlp), len(keys)
    neurons, hidden = mlp.gate_proj.weight.shape
    for name in ("gate_proj", "up_proj"):
        setattr(found, name, torch.nn.Linear(hidden, neurons + n, bias=name == "up_proj"))
    found.down_proj = torch.nn.Linear(neurons + n, hidden, bias=False)
    with torch.no_grad():
        found.gate_proj.weight.copy_(torch.cat([mlp.gate_proj.weight, keys]))
        found.up_proj.weight.copy_(torch.cat([mlp.up_proj.weight, torch.zeros_like(keys)]))
        found.up_proj.bias.copy_(torch.arange(neurons + n) >= neurons)
        found.down_proj.weight.copy_(torch.cat([mlp.down_proj.weight, values.T], 1))
    return found


def test_prior_is_the_commonest_training_answer() -> None:
    from collections import Counter

    from vlmbench.suites.synthvideo import SynthVideo

    suite, method = SynthVideo(length=32), Prior()
    method.fit(suite)
    for sample in suite.samples("test")[:30]:
        answers = Counter(each.answer for each in suite.samples("train") if each.template == sample.template)
        if answers:
            assert answers[method.answer(sample)] == max(answers.values())
        else:
            assert method.answer(sample) == ""


def test_every_method_has_an_oracle() -> None:
    """Here, or among the tests of its own."""
    from vlmbench import registry

    here = Path(__file__)
    for name in registry.methods.names():
        texts = [path.read_text() for path in (here, here.with_name(f"test_{name}.py")) if path.exists()]
        assert any(f"{registry.methods.load(name).__name__}(" in text for text in texts), name
