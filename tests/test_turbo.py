"""Turbo inside the towers: against the plain procedure, on every family, with every way to hand tokens on and to refuse."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmbench import counted
from vlmbench.cache import lengths
from vlmbench.cards import CARDS
from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.kernels.token_merge import reference
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.method import Method
from vlmbench.methods.full import Full
from vlmbench.methods.turbo import Clipped, Turbo
from vlmbench.patch import Patcher
from vlmbench.plan import stages
from vlmbench.spec import build, parse
from vlmbench.trace import Trace
from vlmbench.turbo_plan import Medium, Plan, Rule
from vlmbench.turbo_text import _Prefill, attention_of_tail, tail_of, visual_left
from vlmbench.turbo_tower import Call
from vlmbench.turbo_vision import Plans, Tower, tower_of, vit, watch_vit, windows_of

QUESTION = "where is the red circle ?"
SMALL: dict[str, Any] = {"r": 4, "min_tokens": 0}
"""Merges in the 16-token towers of the presets."""


def rule(schedule: tuple[int, ...], **changes: Any) -> Rule:
    about = Rule(schedule, 5.0, 30.0, 1.0, 0.0, 0, "both", True, False, False, False)
    return replace(about, **changes)


@torch.inference_mode()
def encoded(adapter: Any, method: Method, clips: list[Any], question: str = QUESTION) -> tuple[Prompt, Trace]:
    """The prompt as prefilled, and the trace with what the tower left for `prepare`."""
    method.check(adapter)
    with method.attach(adapter) as trace:
        trace.reset("sample")
        inputs = adapter.inputs(clips, question)
        return method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace), trace


@cache
def without_storage(model_type: str) -> Any:
    from tests.conftest import MINI, load_mini

    adapter = next(each for each in map(load_mini, MINI) if each.config.model_type == model_type)
    return counted.model_without_storage(adapter.config, adapter.dtype)


def visual(prompt: Prompt) -> Tensor:
    return prompt.embeds[0, prompt.layout.indices("video", "image")]


# The class-token form, on a CLIP tower: exactly as published.

CLIP_LAYERS, CLIP_USED = 4, 2


@cache
def clip_tower() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=CLIP_LAYERS,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return CLIPVisionModel(config).double().eval()


def clip_blocks() -> Any:
    model = clip_tower()
    return getattr(model, "vision_model", model).encoder.layers


@torch.inference_mode()
def through_clip(about: Rule, pixels: Tensor) -> tuple[list[Tensor], Call]:
    """Outputs of every block, and the pass."""
    model = clip_tower()
    calls: list[Call] = []
    tower = vit(clip_blocks(), model.config, class_token=True, used=CLIP_USED)
    with Patcher(SimpleNamespace()) as patch:  # type: ignore[arg-type]
        watch_vit(patch, tower, Plans(tower, about), calls.append, lambda: "image")
        found = [model(pixels, output_hidden_states=True).hidden_states for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))  # nothing is left of the first pass
    return list(found[0]), calls[0]


@torch.inference_mode()
def plainly(about: Rule, pixels: Tensor) -> list[Tensor]:
    """The last used block's full grid by the plain procedure, one picture at a time."""
    model = clip_tower()
    core = getattr(model, "vision_model", model)
    outputs = []
    for picture in pixels:
        x = core.pre_layrnorm(core.embeddings(picture[None]))[0]
        mass = torch.ones(len(x), dtype=x.dtype)
        origin = [[i] for i in range(len(x))]
        for index, block in enumerate(clip_blocks()[: CLIP_USED + 1]):
            own, h = block.self_attn, block.layer_norm1(x)
            q, k, v = (
                linear(h).view(len(h), own.num_heads, -1).transpose(0, 1)
                for linear in (own.q_proj, own.k_proj, own.v_proj)
            )
            out, p = reference.attention(
                q[None], k[None], v[None], mass[None] if about.proportional else None, own.scale
            )
            x = x + own.out_proj(out[0].transpose(0, 1).flatten(1))
            found = reference.merge_layer(
                x,
                mass,
                reference.metric(k),
                reference.importance(p[0], class_token=True),
                about.schedule[index],
                weight=about.alpha * about.c if about.score == "both" else 0.0,
                class_token=True,
            )
            x, mass, origin = found.x, found.mass, [[o for i in group for o in origin[i]] for group in found.groups]
            x = x + block.mlp(block.layer_norm2(x))
        full = torch.empty(sum(map(len, origin)), x.shape[1], dtype=x.dtype)
        for value, group in zip(x, origin, strict=True):
            full[group] = value
        outputs.append(full)
    return outputs


def pictures(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("changes", [{}, {"score": "redundancy"}, {"proportional": False}, {"alpha": 0.1}], ids=str)
def test_a_clip_tower_is_the_plain_procedure(changes: dict[str, Any]) -> None:
    about = rule((3, 4, 2, 5), **changes)
    outputs, call = through_clip(about, pictures())
    torch.testing.assert_close(outputs[CLIP_USED + 1], torch.stack(plainly(about, pictures())), rtol=0, atol=1e-11)
    assert [outputs[i].shape[1] for i in (1, 2)] == [14, 10]
    assert call.plan.tokens == (28, 20, 16, 34)
    assert call.mass is not None
    assert call.mass.view(2, -1).sum(1).tolist() == [17, 17]
    assert call.mass.view(2, -1)[:, 0].tolist() == [1, 1]
    assert call.into.view(2, -1)[:, 0].tolist() == [0, 8]  # the class token stays first


def test_no_merging_and_merging_below_the_least_number_are_the_stock_tower() -> None:
    with torch.inference_mode():
        stock = clip_tower()(pictures(), output_hidden_states=True).hidden_states
    for about in (rule((0,) * 4), rule((4,) * 4, min_tokens=18)):
        outputs, _ = through_clip(about, pictures())
        for ours, theirs in zip(outputs, stock, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_a_block_that_nobody_reads_gets_none_of_r() -> None:
    """LLaVA-1.5 reads the last block but one; FOLDER removes there, r for each of all blocks."""
    about = rule((3,) * CLIP_LAYERS, once=True)
    outputs, call = through_clip(about, pictures())
    assert call.plan.tokens == (34, 34, 10, 34)  # 17 - 12 a picture
    assert len(outputs[CLIP_USED + 1][0].unique(dim=0)) == 5


def test_a_batch_is_its_pictures_one_by_one() -> None:
    about = rule((3, 4, 2, 5))
    together = through_clip(about, pictures())[0][CLIP_USED + 1]
    alone = [through_clip(about, picture[None])[0][CLIP_USED + 1] for picture in pictures()]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


def test_a_padded_batch_is_refused() -> None:
    tower = vit(clip_blocks(), clip_tower().config, class_token=True)
    with Patcher(SimpleNamespace()) as patch:  # type: ignore[arg-type]
        watch_vit(patch, tower, Plans(tower, rule((1,) * 4)), lambda call: None, lambda: "image")
        with pytest.raises(ValueError, match="padded batch"):
            clip_blocks()[0](torch.zeros(1, 17, 16).double(), torch.zeros(1, 1, 17, 17).double())


# Every family.


def test_r_0_encodes_to_the_last_bit_as_the_stock_tower(adapter: Any, clip: Any) -> None:
    for clips in ([clip(6)], [clip(1, "image")]):
        full, _ = encoded(adapter, Full(), clips)
        none, trace = encoded(adapter, Turbo(r=0, mode="drop"), clips)
        torch.testing.assert_close(none.embeds, full.embeds, rtol=0, atol=1e-6)  # one batch instead of several
        assert (trace.applied, trace.reason) == (False, "r is 0")


def test_pictures_below_the_least_number_of_tokens_stay_whole_and_say_so(adapter: Any, clip: Any) -> None:
    full, _ = encoded(adapter, Full(), [clip(6)])
    same, trace = encoded(adapter, Turbo(r=4, min_tokens=80, mode="drop"), [clip(6)])
    torch.testing.assert_close(same.embeds, full.embeds, rtol=0, atol=1e-6)
    tokens = tower_of(adapter).tokens or 16
    assert (trace.applied, trace.reason) == (False, f"pictures of {tokens} tokens are below min_tokens=80")


def test_a_prompt_without_pictures_says_so(adapter: Any) -> None:
    _, trace = encoded(adapter, Turbo(**SMALL), [])
    assert (trace.applied, trace.reason) == (False, "the prompt has no visual tokens")


def test_tokens_and_flops_are_what_torch_counts(adapter: Any, clip: Any) -> None:
    """On tensors without data, so that every shape is seen to follow from the grid alone."""
    inputs = adapter.inputs([clip(2, side=84)], QUESTION)
    twin = without_storage(adapter.config.model_type)
    dense = counted.vision(twin, inputs).cost.flops
    for method in (Turbo(**SMALL), Turbo(r=5, where="last", score="redundancy")):
        with method.attach(twin) as trace:
            own = counted.vision(twin, inputs).cost.flops
            seen = trace.scratch["turbo"]
        saved = [sum(c.plan.flops(seen.widths, dense=d) for c in seen.calls) for d in (True, False)]
        assert saved[0] - saved[1] == dense - own
        assert own < dense


def test_work_counts_the_tower_and_the_shorter_prompt(adapter: Any, clip: Any) -> None:
    from vlmbench.work import to_json

    full, _ = encoded(adapter, Full(), [clip(6)])
    for mode in ("unmerge", "drop"):
        method = Turbo(**SMALL, mode=mode)
        prompt, trace = encoded(adapter, method, [clip(6)])
        work = to_json(method.work(prompt, adapter.shapes, trace), adapter.shapes)
        assert work["vision_flops"] < work["vision_dense_flops"]
        assert (prompt.length < full.length) == (mode == "drop")
        assert work["tokens"] == [prompt.length] * adapter.shapes.layers
    assert "vision_flops" not in to_json(Full().work(full, adapter.shapes, Trace()), adapter.shapes)


def test_a_plan_is_what_a_run_counts(adapter: Any, clip: Any) -> None:
    inputs = adapter.inputs([clip(6)], QUESTION)
    full, _ = encoded(adapter, Full(), [clip(6)])
    twin = without_storage(adapter.config.model_type)
    for video in ("per_frame", "temporal"):
        method = Turbo(**SMALL, mode="drop", video=video, score="redundancy")
        prompt, _ = encoded(adapter, method, [clip(6)])
        rows = {row["stage"]: row for row in stages(twin, method, full.layout, inputs, CARDS["h200"], 2)}
        assert rows["prefill"]["tokens"] == prompt.length


@pytest.mark.parametrize("video", ["per_frame", "shared", "temporal"])
def test_dropping_keeps_text_positions_and_the_place_of_the_answer(adapter: Any, clip: Any, video: str) -> None:
    full, _ = encoded(adapter, Full(), [clip(6)])
    prompt, trace = encoded(adapter, Turbo(**SMALL, mode="drop", video=video), [clip(6)])  # type: ignore[arg-type]
    keep = torch.tensor(trace.kept["prompt"])
    text = full.layout.indices("text", "separator")
    assert set(text.tolist()) <= set(keep.tolist())
    assert torch.equal(prompt.positions, full.positions[..., keep])
    assert prompt.next_position == full.next_position
    kept_text = prompt.layout.indices("text", "separator")
    assert torch.equal(prompt.embeds[0, kept_text], full.embeds[0, text])
    per_frame = [len(span) for span in prompt.layout if span.kind == "video"]
    if video == "temporal":
        assert len(set(per_frame[1:])) <= 1
        assert per_frame[0] == max(len(span) for span in full.layout if span.kind == "video")
    else:
        assert len(set(per_frame)) == 1
    assert prompt.layout.n_visual < full.layout.n_visual


def test_frames_that_share_a_plan_keep_the_same_places(adapter: Any, clip: Any) -> None:
    def places(video: Any, frames: int) -> set[tuple[int, ...]]:
        full, _ = encoded(adapter, Full(), [clip(frames)])
        # One token of four: half of them would be all those that may go.
        r = 4 if adapter.name == "qwen_vl" else 2
        _, trace = encoded(adapter, Turbo(r=r, min_tokens=0, mode="drop", video=video), [clip(frames)])
        kept = trace.kept["prompt"]
        spans = [span for span in full.layout if span.kind == "video"]
        return {tuple(i - span.start for i in kept if span.start <= i < span.stop) for span in spans}

    for frames in (6, 16):
        assert len(places("shared", frames)) == 1
    assert len(places("per_frame", 6) | places("per_frame", 16)) > 1


def test_pictures_and_videos_are_each_shortened_by_their_own_pass(adapter: Any, clip: Any) -> None:
    clips = [clip(4), clip(1, "image"), clip(6)]
    method = Turbo(**SMALL, mode="drop")
    together, _ = encoded(adapter, method, clips)
    for media, each in enumerate(clips):
        alone, _ = encoded(adapter, method, [each])
        ours = [i for span in together.layout if span.media == media for i in range(span.start, span.stop)]
        theirs = [i for span in alone.layout if span.media == 0 for i in range(span.start, span.stop)]
        # Float32 rounding: other pictures of the prompt go through the same products.
        torch.testing.assert_close(together.embeds[0, ours], alone.embeds[0, theirs], rtol=0, atol=1e-5)


def test_temporal_merging_leaves_a_still_video_its_first_frame(adapter: Any, clip: Any) -> None:
    noise = clip(6)
    still = replace(noise, frames=noise.frames[:1].repeat(6, axis=0))
    full, _ = encoded(adapter, Full(), [still])
    prompt, trace = encoded(adapter, Turbo(**SMALL, mode="drop", video="temporal"), [still])
    kept = torch.tensor(trace.kept["prompt"])
    torch.testing.assert_close(prompt.embeds, full.embeds[:, kept], rtol=0, atol=1e-5)  # means of equals
    assert prompt.layout.n_visual < full.layout.n_visual
    one = replace(noise, frames=noise.frames[:2], indices=(0, 1), times_s=(0.0, 0.5))
    if adapter.name == "qwen_vl":  # two frames are one unit: nothing comes before it
        _, trace = encoded(adapter, Turbo(**SMALL, mode="drop", video="temporal"), [one])
        assert not trace.applied


def test_without_a_class_token_importance_counts_in_multiples_of_its_mean_whatever_the_length(
    adapter: Any, clip: Any
) -> None:
    """The published c is for 577 tokens: in a window of 16 an average token's penalty would be 36 times as large."""
    tower = tower_of(adapter)
    for side in (64, 84):
        _, trace = encoded(adapter, Turbo(**SMALL, mode="drop", video="temporal"), [clip(4, side=side)])
        (call,) = trace.scratch["turbo"].calls  # in time nothing merges inside the tower
        about, (medium,) = trace.scratch["turbo"].rule, call.plan.media
        by_frame = call.importance.view(medium.frames, medium.units)
        if tower.protected:  # as published: a row of the softmax
            assert about.weight(0) == 150
            torch.testing.assert_close(by_frame.sum(1), torch.ones(medium.frames))
        else:
            assert about.weight(0) == 150 / 577
            torch.testing.assert_close(by_frame.mean(1), torch.ones(medium.frames))


def test_the_ablation_chooses_differently(adapter: Any, clip: Any) -> None:
    found = [encoded(adapter, Turbo(**SMALL, score=score), [clip(6)])[0].embeds for score in ("redundancy", "value")]
    assert not torch.equal(*found)
    none, _ = encoded(adapter, Turbo(**SMALL, alpha=0.0), [clip(6)])
    assert torch.equal(none.embeds, found[0])


def test_more_than_half_is_clipped_and_said_once(adapter: Any, clip: Any) -> None:
    method = Turbo(r=40, min_tokens=0)
    with pytest.warns(
        Clipped, match=r"^turbo:r=40 is above what one matching can merge .* it is clipped there\.$"
    ) as said:
        _, trace = encoded(adapter, method, [clip(6), clip(4)])
    assert len(said) == 1
    assert trace.facts["clipped"][0] == {"block": 0, "asked": 40, "merged": (tower_of(adapter).tokens or 16) // 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "clipped" not in encoded(adapter, Turbo(**SMALL), [clip(6)])[1].facts


def test_the_command_line_says_it_in_a_sentence_without_a_line_of_code(tmp_path: Path) -> None:
    asked = ["--suite", "synthvideo:length=32", "--frames", "4", "--limit", "1", "--no-baseline", "--mode", "accuracy"]
    method = ["--model", "mini-llava-ov@random", "--method", "turbo:r=40,min_tokens=0", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "vlmbench", "run", *method, *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "\nWarning: turbo:r=40 is above what one matching can merge (half of the tokens) in blocks 0, 1;" in done.stderr
    )
    assert ".py" not in done.stderr


def test_a_pass_that_fails_leaves_nothing_for_the_next(adapter: Any, clip: Any) -> None:
    method = Turbo(**SMALL)
    alone, _ = encoded(adapter, method, [clip(4)])
    with torch.inference_mode(), method.attach(adapter) as trace:
        inputs = adapter.inputs([clip(6)], QUESTION)
        last = tower_of(adapter).blocks[-1]
        handle = last.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapter.encode_vision(inputs)
        handle.remove()
        trace.reset("next")
        inputs = adapter.inputs([clip(4)], QUESTION)
        after = method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
    assert torch.equal(alone.embeds, after.embeds)


# Qwen's units and windows.

QWENS = ("mini-qwen2-vl@random", "mini-qwen2.5-vl@random")


@pytest.fixture(params=QWENS)
def qwen(request: pytest.FixtureRequest) -> Any:
    from tests.conftest import load_mini

    return load_mini(request.param)


def test_dropping_whole_units_drops_nothing_but_copies(adapter: Any, clip: Any) -> None:
    if adapter.name != "qwen_vl":
        return
    whole, _ = encoded(adapter, Turbo(**SMALL), [clip(6)])
    short, trace = encoded(adapter, Turbo(**SMALL, mode="drop"), [clip(6)])
    assert torch.equal(short.embeds, whole.embeds[:, trace.kept["prompt"]])
    for before, after in zip(
        (s for s in whole.layout if s.kind == "video"), (s for s in short.layout if s.kind == "video"), strict=True
    ):
        rows = whole.embeds[0, before.start : before.stop].unique(dim=0)
        assert torch.equal(rows, short.embeds[0, after.start : after.stop].unique(dim=0))
        assert len(after) == 2  # of four: one unit in each of two blocks
    assert trace.kept["vision"] == [i for frame in range(3) for i in _places(whole, trace, frame)]


def _places(whole: Prompt, trace: Trace, frame: int) -> list[int]:
    spans = [span for span in whole.layout if span.kind == "video"]
    first = spans[0].start
    return [i - first for i in trace.kept["prompt"] if spans[frame].start <= i < spans[frame].stop]


@pytest.mark.parametrize(("height", "width", "side"), [(4, 4, 2), (5, 7, 4), (3, 3, 4), (6, 2, None)])
def test_windows_are_the_towers_own(height: int, width: int, side: int | None) -> None:
    sizes, order = windows_of((height, width), side)
    assert sorted(order) == list(range(height * width))
    assert sum(sizes) == height * width
    if side is None:
        assert order == list(range(height * width))
        return
    from transformers.vision_utils import get_vision_window_index

    grid = torch.tensor([[1, 2 * height, 2 * width]])
    index, cu_seqlens = get_vision_window_index(grid, 2, 28 * side, 14)
    assert index.tolist() == order
    assert cu_seqlens.diff().tolist() == [4 * size for size in sizes]


def test_windows_lose_alike_in_proportion_to_their_size() -> None:
    """r counts tokens of the picture: 32 of 448 are 2 units of each whole window of 16, and 1 of each of 8."""
    groups = (16, 16, 16, 16, 8, 8, 16, 16)
    plan = Plan(rule((8,) * 8), (Medium(3, groups),), 4, 0, 8, 7, frozenset({3, 7}))
    for block in range(8):
        step = plan.step(0, block)
        assert len({(n, r) for n, r in zip(groups, step.merged, strict=True)}) == len(set(groups))
        assert sum(sum(plan.step(0, i).merged) for i in range(block + 1)) * 4 <= 8 * (block + 1)
    assert plan.step(0, 7).after == tuple(n - 64 * n // 448 for n in groups)


def test_many_windows_of_several_sizes_merge_inside_themselves(clip: Any) -> None:
    """A picture of 3 × 5 units in windows of 2 × 2 units and what is left at the edges."""
    from tests.conftest import load_mini

    adapter = load_mini("mini-qwen2.5-vl@random")
    tower = tower_of(adapter)
    assert tower.window == 2
    torch.manual_seed(0)
    pixels = torch.randn(2 * 60, 1176)
    grid = torch.tensor([[2, 6, 10]])
    visual_tower = tower.visual
    with torch.inference_mode(), Turbo(r=12, min_tokens=0).attach(adapter) as trace:
        features = adapter.encode_vision({"pixel_values_videos": pixels, "video_grid_thw": grid}).video
        calls = trace.scratch["turbo"].calls
    assert features is not None
    (call,) = calls
    sizes, order = windows_of((3, 5), 2)
    assert sizes == (4, 4, 2, 2, 2, 1)
    assert call.mass.sum() == 30
    window_of = torch.tensor([w for w, size in enumerate(sizes) for _ in range(size)]).repeat(2)
    frame_of = torch.arange(2).repeat_interleave(15)
    place = call.keep[call.into]
    assert torch.equal(window_of[place], window_of)
    assert torch.equal(frame_of[place], frame_of)
    assert features.shape[0] == 30
    raster = features.view(2, 15, -1)[:, order].flatten(0, 1)
    assert torch.equal(raster, raster[place])
    assert len(features.unique(dim=0)) == len(call.keep) < 30
    assert visual_tower.merger.forward.__func__ is type(visual_tower.merger).forward


def test_packed_videos_merge_as_each_alone(qwen: Any, clip: Any) -> None:
    together, _ = encoded(qwen, Turbo(**SMALL), [clip(4), clip(6, side=84)])
    alone = [encoded(qwen, Turbo(**SMALL), [each])[0] for each in (clip(4), clip(6, side=84))]
    torch.testing.assert_close(visual(together), torch.cat([visual(each) for each in alone]), rtol=0, atol=1e-5)


# The text side.


def test_the_text_side_keeps_what_the_question_attends_to(adapter: Any, clip: Any) -> None:
    method = Turbo(r=0, text_step=0.3)
    full, _ = encoded(adapter, Full(), [clip(6)])
    with method.attach(adapter) as trace:
        done = generate(adapter, method, trace, [clip(6)], QUESTION, max_new_tokens=3, stop_at_eos=False)
    left = visual_left(full.layout.n_visual, 4, 0.3)
    assert left[0] > left[1] > left[2] > left[3] > 0
    text = full.length - full.layout.n_visual
    logical, physical = lengths(done.cache)
    assert physical == [text + n + 2 for n in left]
    assert set(logical) == {full.length + 2}
    work = method.work(done.prompt, adapter.shapes, trace)
    assert work.tokens == tuple(text + n for n in left)


def test_a_text_side_that_drops_none_is_full_attention(adapter: Any, clip: Any) -> None:
    """A step below one token in a thousand leaves nothing to drop, through the same hooks."""
    answers = []
    for method in (Full(), Turbo(r=0, text_step=1e-5)):
        with method.attach(adapter) as trace:
            done = generate(adapter, method, trace, [clip(6)], QUESTION, max_new_tokens=3, stop_at_eos=False)
        answers.append(done)
    torch.testing.assert_close(answers[1].first_logits, answers[0].first_logits, rtol=0, atol=1e-5)
    assert answers[0].token_ids == answers[1].token_ids


def test_attention_of_the_tail_is_that_of_causal_attention_with_shared_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 7, 5, generator=generator), torch.randn(1, 2, 7, 5, generator=generator)
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.4).masked_fill(
        ~torch.ones(7, 7, dtype=torch.bool).tril(), float("-inf")
    )
    want = logits.softmax(-1)[0, :, -3:].sum((0, 1))
    torch.testing.assert_close(attention_of_tail(q, k, 3, 0.4), want, rtol=0, atol=1e-6)


def test_the_text_sides_scores_are_counted(adapter: Any, clip: Any) -> None:
    """As torch counts the product of queries and keys, in every layer that chooses."""
    from torch.utils.flop_counter import FlopCounterMode

    method, shapes = Turbo(r=0, text_step=0.3), adapter.shapes
    with method.attach(adapter) as trace:
        prompt = generate(adapter, method, trace, [clip(6)], QUESTION, max_new_tokens=1).prompt
    visual = prompt.layout.indices("video")
    tail = prompt.length - int(visual[-1]) - 1
    counted = 0
    for left in visual_left(len(visual), shapes.layers, 0.3)[:-1]:
        n = prompt.length - len(visual) + left
        with FlopCounterMode(display=False) as counter:
            q, k = (torch.empty(1, heads, n, shapes.head_dim) for heads in (shapes.heads, shapes.kv_heads))
            attention_of_tail(q, k, tail, 1.0)
        counted += counter.get_total_flops()
    assert tail > 1
    assert method.work(prompt, shapes, trace).own_flops == counted > 0
    assert Turbo(r=0).work(prompt, shapes, trace).own_flops == 0


def test_where_no_text_stands_behind_the_media_the_last_token_asks_and_stays() -> None:
    layout = TokenLayout((Span("text", 0, 2), Span("video", 2, 10, 0, 0)))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 10, 5, generator=generator), torch.randn(1, 2, 10, 5, generator=generator)
    k[:, :, -1] = -100 * q[:, :, -1].unflatten(1, (2, 2)).sum(2)  # nobody looks at it
    logits = (q[:, :, -1:] @ k.repeat_interleave(2, 1).transpose(-1, -2))[0, :, 0]
    received = logits.softmax(-1).sum(0)
    assert received[2:].argmin() == 7
    torch.testing.assert_close(attention_of_tail(q, k, tail_of(layout), 1.0), received)
    now = _Prefill(layout, 4, 0.3, torch.device("cpu"))
    now.choose(0, q, k, 1.0)
    assert now.chosen is not None
    best = received[2:-1].topk(now.left[1] - 1).indices + 2
    assert now.chosen.tolist() == [0, 1, *sorted(best.tolist()), 9]


def test_only_a_setting_that_ignores_the_question_lets_the_next_one_reuse_keys() -> None:
    assert Turbo().traits.prefix_reusable
    assert Turbo(mode="drop").traits.stages == {"vision", "prompt"}
    assert not Turbo(text_step=0.07).traits.prefix_reusable
    assert Turbo.traits.stages == {"vision"}


# What is refused.


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("turbo:r=-1", "turbo:r must be at least 0, not -1."),
        ("turbo:schedule=4/-1", "turbo:schedule must hold numbers of at least 0, not 4/-1."),
        ("turbo:inflection=2", "turbo:inflection must be from -1 to 1, not 2.0."),
        (
            "turbo:inflection=0.5,schedule=4/2",
            "turbo:inflection=0.5 tilts a constant r, and schedule=4/2 gives a number",
        ),
        ("turbo:alpha=nan", "turbo:alpha must be a finite number, not 'nan'."),
        ("turbo:text_step=1", "turbo:text_step must be at least 0 and below 1 (published: 0.07), not 1.0."),
        ("turbo:video=temporal", "give mode=drop too, not unmerge."),
        ("turbo:score=value,alpha=0", "turbo:score=value needs alpha and c above 0"),
        ("turbo:mode=merge", "turbo:mode must be one of unmerge, drop, not 'merge'."),
    ],
)
def test_unusable_parameters_are_refused_in_a_sentence(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        build(Turbo, parse(spec), "method")
    assert says in str(refused.value)


def test_a_schedule_longer_than_the_tower_and_a_tower_read_twice_are_refused(adapter: Any) -> None:
    blocks = len(adapter.vision_blocks)
    says = rf"^turbo:schedule=1(/1)* has {blocks + 1} numbers, and the vision tower has {blocks} blocks;"
    with pytest.raises(UsageError, match=says):
        Turbo(schedule=(1,) * (blocks + 1)).check(adapter)
    if adapter.name == "llava":
        config = SimpleNamespace(vision_feature_layer=[-1, -2])
        twice = SimpleNamespace(
            name="llava", config=config, vision_config=adapter.vision_config, vision_blocks=adapter.vision_blocks
        )
        with pytest.raises(UsageError, match=r"reads vision_feature_layer=\[-1, -2\]"):
            Turbo().check(twice)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"beta": 2.0, "gamma": 1e9}, {"beta": 2.0, "gamma": -2000.0}, {"alpha": 1e200, "c": 1e200}, {"alpha": 1e35}],
    ids=str,
)
def test_a_weight_that_no_score_can_hold_is_refused(adapter: Any, options: dict[str, Any]) -> None:
    """The power overflows, or the product does, or float32 would: infinity times no attention is no number."""
    with pytest.raises(
        UsageError, match=r"^turbo:alpha=.* weigh attention by more than a score can hold in block 0 of "
    ):
        Turbo(**options, score="value").check(adapter)


def test_a_decay_however_steep_and_the_largest_weight_are_taken(adapter: Any, clip: Any) -> None:
    tome, _ = encoded(adapter, Turbo(**SMALL, alpha=0.0), [clip(6)])
    vanished, _ = encoded(adapter, Turbo(**SMALL, beta=0.5, gamma=1e9), [clip(6)])
    torch.testing.assert_close(vanished.embeds, tome.embeds, rtol=0, atol=1e-5)  # importance is still read off
    alone, _ = encoded(adapter, Turbo(**SMALL, score="value", normalise=False), [clip(6)])
    heavy, _ = encoded(
        adapter, Turbo(**SMALL, alpha=2.0**90, c=1.0, normalise=False), [clip(6)]
    )  # times it nothing rounds
    assert torch.equal(heavy.embeds, alone.embeds)


def test_a_family_without_the_signal_is_refused() -> None:
    other = SimpleNamespace(name="internvl", vision_config=None)
    with pytest.raises(
        UsageError,
        match=r"^turbo knows the vision towers of the LLaVAs, of Qwen-VL and of BLIP, not that of 'internvl'",
    ):
        Turbo().check(other)  # type: ignore[arg-type]


def test_a_budget_that_leaves_no_token_is_refused_and_leaves_the_model_alone(adapter: Any, clip: Any) -> None:
    """Where a picture's tokens are known, before anything runs; else when the picture is there."""
    tower = tower_of(adapter)
    if tower.tokens is not None:
        r, most = tower.tokens // 2, (tower.tokens - tower.protected - 1) // len(tower.blocks)
        method = Turbo(r=r, where="last", mode="drop")
        says = (
            rf"would merge {r * len(tower.blocks)} of {tower.tokens} tokens and leave none; r must be at most {most} on"
        )
        with pytest.raises(UsageError, match=says):
            method.check(adapter)
        Turbo(r=most, where="last", mode="drop").check(adapter)
        total = tower.tokens - tower.protected - 1
        with pytest.raises(
            UsageError, match=rf"schedule={total + 1} would merge .*; its sum must be at most {total} on"
        ):
            Turbo(schedule=(total + 1,), where="last", mode="drop").check(adapter)
        Turbo(schedule=(total,), where="last", mode="drop").check(adapter)
    else:
        with pytest.raises(ValueError, match=r"would merge 16 tokens of the 16 of a picture; lower r"):
            encoded(adapter, Turbo(r=8, where="last", mode="drop"), [clip(6)])
    full, _ = encoded(adapter, Full(), [clip(6)])
    assert full.layout.n_visual


def test_dropping_without_a_tower_is_refused(adapter: Any, clip: Any) -> None:
    full, _ = encoded(adapter, Full(), [clip(6)])
    with pytest.raises(UsageError, match="chooses tokens in the vision tower, which has not run here"):
        Turbo(mode="drop").prepare(full, Trace())


def test_towers_say_where_they_end(adapter: Any) -> None:
    tower: Tower = tower_of(adapter)
    assert tower.used == 1
    assert tower.units_are_tokens == (adapter.name in ("qwen_vl", "llava_15"))
    assert tower.protected == (adapter.name in ("llava_15", "llava_next_video"))
