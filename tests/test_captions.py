"""Text between frames: it stands where its time says, is read in order, and outlives the frames a method drops."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import for_generate
from vlmbench.backend import Identity
from vlmbench.engine import TorchBackend, generate
from vlmbench.methods.ape import Ape
from vlmbench.methods.blind import Blind
from vlmbench.methods.downsample import Downsample
from vlmbench.methods.full import Full
from vlmbench.methods.pevlm import Pevlm
from vlmbench.methods.uniform import Uniform
from vlmbench.models.base import Features
from vlmbench.models.loading import load
from vlmbench.models.written import interleaved
from vlmbench.suite import Caption, Sample
from vlmbench.trace import Trace
from vlmbench.video import Clip

QUESTION = "who speaks ?"
CAPTIONS = (
    Caption(-1.0, "before all"),
    Caption(0.9, "the cat"),  # frames come every half second: between the second and the third
    Caption(1.0, "says four"),  # at the third frame's own time, so before it
    Caption(2.4, "wind is calm"),
    Caption(99.0, "after all"),
)
PIECES = ((0, 2), (2, 5), (5, 7))
"""How they cut seven frames. Two odd numbers, so a pair of Qwen-VL is filled up."""
TEXTS = ("before all", "the cat says four", "wind is calm", f"after all\n{QUESTION}")
EVEN = tuple(Caption(time, "calm") for time in (0.0, 0.4, 0.9, 1.4, 1.9, 2.4, 2.9, 3.4))
"""After every frame."""


def inputs_of(adapter: Any, clips: list[Any], captions: tuple[Caption, ...] = CAPTIONS) -> Any:
    return adapter.to_device(adapter.inputs(clips, QUESTION, captions))


def prompt_of(adapter: Any, inputs: Any) -> Any:
    with torch.inference_mode():
        return adapter.splice(inputs, adapter.encode_vision(inputs))


def units_of(adapter: Any, frames: int) -> int:
    return -(-frames // 2) if adapter.name == "qwen_vl" else frames


# Where a caption stands.


def marked(times: list[float]) -> Clip:
    """A clip whose frames show their own number."""
    frames = np.arange(len(times), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    return Clip(frames, tuple(range(len(times))), tuple(times), 2.0, "video", Path("marked"))


moments = st.floats(-1, 9, allow_nan=False)


@given(st.lists(moments, min_size=1, max_size=12, unique=True).map(sorted), st.lists(moments, max_size=8))
def test_every_caption_stands_before_the_first_frame_at_or_after_it(times: list[float], when: list[float]) -> None:
    captions = [Caption(time, f"<{number}>") for number, time in enumerate(when)]
    parts = interleaved([marked(times)], captions, QUESTION)
    shown: list[int | str] = []
    for part in parts:
        if isinstance(part, str):
            shown += part.split()
        else:
            assert part.times_s == tuple(times[i] for i in part.frames[:, 0, 0, 0])
            shown += part.frames[:, 0, 0, 0].tolist()
    assert [each for each in shown if isinstance(each, int)] == list(range(len(times)))
    assert shown[-2:] == QUESTION.split()[-2:]
    assert sorted(each for each in map(str, shown) if each[0] == "<") == sorted(c.text for c in captions)
    for number, time in enumerate(when):
        behind = shown[shown.index(f"<{number}>") :]
        assert [each for each in behind if isinstance(each, int)] == [i for i, t in enumerate(times) if t >= time]
    assert not any(isinstance(one, str) and isinstance(other, str) for one, other in pairwise(parts))
    assert all(isinstance(part, str) or len(part.frames) for part in parts)


@given(st.lists(moments, min_size=2, max_size=8), st.randoms())
def test_captions_stand_in_order_of_time(when: list[float], random: Any) -> None:
    captions = [Caption(time, f"<{number}>") for number, time in enumerate(sorted(when))]
    shuffled = random.sample(captions, len(captions))
    if len(set(when)) == len(when):
        assert repr(interleaved([marked([0.0])], shuffled, "?")) == repr(interleaved([marked([0.0])], captions, "?"))


@pytest.mark.parametrize(
    ("kinds", "said"), [([], "none"), (["image"], "image"), (["video", "video"], "video, video")], ids=str
)
def test_captions_need_exactly_one_video(adapter: Any, clip: Any, kinds: list[Any], said: str) -> None:
    clips = [clip(1 if kind == "image" else 4, kind) for kind in kinds]
    with pytest.raises(ValueError, match=rf"exactly one video; the media here are: {said}\.$"):
        adapter.inputs(clips, QUESTION, CAPTIONS)


# What the model reads.


def test_the_layout_holds_every_piece_and_every_text_in_order(adapter: Any, clip: Any) -> None:
    inputs = inputs_of(adapter, [clip(7)])
    prompt = prompt_of(adapter, inputs)
    ids, layout = inputs["input_ids"][0], prompt.layout
    visual = [span for span in layout if span.kind == "video"]
    numbered = [(m, f) for m, (a, b) in enumerate(PIECES) for f in range(units_of(adapter, b - a))]
    assert [(span.media, span.frame) for span in visual] == numbered
    assert len({len(span) for span in visual}) == 1
    assert all(span.grid is not None and span.grid[0] * span.grid[1] == len(span) for span in visual)
    placeholder = torch.zeros(len(ids), dtype=torch.bool)
    for span in layout:
        placeholder[span.start : span.stop] = span.kind != "text"
    assert torch.equal(placeholder, torch.isin(ids, torch.tensor(adapter.placeholder_ids)))
    read = [adapter.processor.tokenizer.decode(ids[s.start : s.stop]) for s in layout if s.kind == "text"]
    read = [text for text in read if text.strip()]  # a line break may part frames
    assert len(read) == len(TEXTS)
    for span_text, text in zip(read, TEXTS, strict=True):
        assert text in span_text
    assert len(layout.units) == len(visual)


def test_every_piece_shows_the_clips_own_frames(adapter: Any, clip: Any) -> None:
    """Features of the pieces are those of the same frames as separate videos."""
    whole = clip(7)
    apart = [
        replace(whole, frames=whole.frames[a:b], indices=whole.indices[: b - a], times_s=whole.times_s[: b - a])
        for a, b in PIECES
    ]
    with torch.inference_mode():
        ours, theirs = (
            adapter.encode_vision(adapter.to_device(inputs)).video
            for inputs in (adapter.inputs([whole], QUESTION, CAPTIONS), adapter.inputs(apart, QUESTION))
        )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("captions", [CAPTIONS[1:4], EVEN], ids=["odd", "even"])
def test_greedy_tokens_equal_generate(adapter: Any, clip: Any, captions: tuple[Caption, ...]) -> None:
    """The library finds positions and places of its own, so ours are right."""
    captions = (*captions, Caption(1.4, "dry"))  # no piece of more than one unit of Qwen-VL
    if adapter.name in ("llava", "llava_next_video") and captions[0] != EVEN[0]:
        pytest.skip("the library stacks LLaVA's videos, so it takes none of different lengths")
    done = generate(
        adapter, Full(), Trace(), [clip(7)], QUESTION, captions=captions, max_new_tokens=8, stop_at_eos=False
    )
    inputs = inputs_of(adapter, [clip(7)], captions)
    theirs = adapter.model.generate(
        **for_generate(inputs), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert done.token_ids == theirs[0, inputs["input_ids"].shape[1] :].tolist()


def test_positions_start_anew_behind_every_text(adapter: Any, clip: Any) -> None:
    prompt = prompt_of(adapter, inputs_of(adapter, [clip(7)]))
    positions = prompt.positions.reshape(-1, prompt.length)
    assert prompt.next_position == int(positions.max()) + 1
    for before, span in pairwise(prompt.layout):
        if span.kind == "text":  # one step a token, alike on all axes
            steps = torch.arange(len(span)) + positions[0, span.start]
            assert torch.equal(positions[:, span.start : span.stop], steps.expand(len(positions), -1))
        elif before.kind == "text":  # a medium starts where its text ends, on every axis
            assert (positions[:, span.start] == positions[0, before.stop - 1] + 1).all()


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("fps", [2.0, 29.97, 23.976])
def test_seconds_between_frames_are_those_of_the_whole_clip(clip: Any, fps: float, ratio: float) -> None:
    adapter = load("mini-qwen2.5-vl@random", dtype=torch.float32, device="cpu", attention="sdpa").adapter
    whole = Downsample(ratio=ratio).prepare_clip(replace(clip(14), fps=fps), Trace())
    once = adapter.inputs([whole], QUESTION)["second_per_grid_ts"]
    pieces = adapter.inputs([whole], QUESTION, CAPTIONS)["second_per_grid_ts"]
    assert len(pieces) == 3
    assert set(pieces.tolist()) == set(once.tolist())


def test_without_captions_nothing_changes(adapter: Any, clip: Any) -> None:
    before, after = adapter.inputs([clip(6)], QUESTION), adapter.inputs([clip(6)], QUESTION, ())
    assert {key: str(value) for key, value in before.items()} == {key: str(value) for key, value in after.items()}


# With a method.


def test_dropping_frames_keeps_all_the_text(adapter: Any, clip: Any) -> None:
    whole = clip(7)
    fewer = Downsample(ratio=0.3).prepare_clip(whole, Trace())
    assert fewer.indices == (1, 5)  # no frame is left between "the cat says four" and "wind is calm"
    inputs = inputs_of(adapter, [fewer])
    layout = prompt_of(adapter, inputs).layout
    assert [span.media for span in layout if span.kind == "video"] == [0, 1]
    text = adapter.processor.tokenizer.decode(inputs["input_ids"][0])
    assert "the cat says four wind is calm" in text
    for caption in CAPTIONS:
        assert text.count(caption.text) == 1
    done = generate(adapter, Downsample(ratio=0.3), Trace(), [whole], QUESTION, captions=CAPTIONS, max_new_tokens=1)
    assert done.prompt.layout == layout


def test_dropping_tokens_keeps_all_the_text(adapter: Any, clip: Any) -> None:
    options: dict[str, Any] = {"captions": CAPTIONS, "max_new_tokens": 1}
    full = generate(adapter, Full(), Trace(), [clip(7)], QUESTION, **options).prompt
    few = generate(adapter, Uniform(tokens=3), Trace(), [clip(7)], QUESTION, **options).prompt
    assert few.layout.n_visual == 3
    text, kept = (prompt.layout.indices("text") for prompt in (full, few))
    assert torch.equal(few.embeds[:, kept], full.embeds[:, text])
    assert torch.equal(few.positions[..., kept], full.positions[..., text])


def test_blind_reads_the_captions_and_sees_nothing(adapter: Any, clip: Any) -> None:
    def logits(frames: Any, captions: tuple[Caption, ...]) -> torch.Tensor:
        done = generate(adapter, Blind(), Trace(), [frames], QUESTION, captions=captions, max_new_tokens=1)
        assert {span.kind for span in done.prompt.layout} == {"text"}
        return done.first_logits

    dark = replace(clip(7), frames=np.zeros_like(clip(7).frames))
    other = tuple(replace(caption, text=caption.text.replace("four", "five")) for caption in CAPTIONS)
    assert torch.equal(logits(clip(7), CAPTIONS), logits(dark, CAPTIONS))
    assert not torch.equal(logits(clip(7), CAPTIONS), logits(clip(7), other))


def test_parallel_blocks_take_a_caption_with_the_frame_before_it(adapter: Any, clip: Any) -> None:
    method = Pevlm(sink=0, block=1)
    with method.attach(adapter) as trace:
        done = generate(adapter, method, trace, [clip(7)], QUESTION, captions=CAPTIONS, max_new_tokens=2)
        plan = trace.facts["plan"]
    layout = done.prompt.layout
    frames = [span.start for span in layout if span.kind == "video"]
    assert [start for start, _ in plan["blocks"]] == frames
    assert plan["sink"] == frames[0]
    assert plan["blocks"][-1][1] == [span.stop for span in layout if span.kind == "video"][-1]
    assert done.prompt.next_position == int(done.prompt.positions.max()) + 1


def test_one_block_equals_full_attention(adapter: Any, clip: Any) -> None:
    logits = []
    for method in (Full(), Pevlm(sink=0, block=10**6)):
        with method.attach(adapter) as trace:
            done = generate(adapter, method, trace, [clip(7)], QUESTION, captions=CAPTIONS, max_new_tokens=1)
        logits.append(done.first_logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)  # float32 rounding of a four-layer model


def test_a_samples_captions_reach_the_model(adapter: Any, clip: Any) -> None:
    backend = TorchBackend(adapter, Identity("mini", None, "", "float32", "cpu", "cpu", "sdpa", "sdpa", "sdpa"))
    sample = Sample("s", "c", (), QUESTION, "cat", QUESTION, captions=CAPTIONS)
    method = Full()
    with backend.attach(method):
        outcome = backend.answer(method, sample, QUESTION, [clip(7)], pass_="accuracy", max_new_tokens=2)
    assert outcome.status == "ok"
    prompt = adapter.splice(inputs_of(adapter, [clip(7)]), Features())
    assert outcome.tokens == {"prompt": prompt.length, "visual": prompt.layout.n_visual}


@pytest.mark.parametrize("method", [Pevlm(sink=0, block=2, positions="reused"), Ape(block=2)], ids=["pevlm", "ape"])
def test_blocks_at_the_same_positions_share_them_on_every_axis(adapter: Any, clip: Any, method: Any) -> None:
    """Captions advance all three axes of M-RoPE; a query behind blocks that were moved back stands behind them."""
    inputs = inputs_of(adapter, [clip(12)], EVEN)
    prompt = adapter.splice(inputs, adapter.encode_vision(inputs))
    changed = method.prepare(prompt, Trace())
    plan = changed.extras["block_plan"]
    for axis in changed.positions.reshape(-1, changed.length):
        assert len({int(axis[start:stop].min()) for start, stop in plan.blocks}) == 1
    assert changed.next_position == int(changed.positions.max()) + 1
