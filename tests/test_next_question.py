"""The next question on a video: reusing the keys before it gives the answer of a run of its own, where a method says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmbench import registry
from vlmbench.engine import Generation, Prefix, generate, generate_next, prefix_of
from vlmbench.method import Method
from vlmbench.methods.blind import Blind
from vlmbench.methods.full import Full
from vlmbench.methods.pevlm import Pevlm
from vlmbench.methods.random import Random
from vlmbench.suite import Caption

QUESTIONS = (
    "where is the red circle ?",
    "which colour moves first , the one on the left or the one on the right of the square ?",
    "how many ?",
)
CAPTIONS = (Caption(-1.0, "before all"), Caption(0.9, "the cat says four"), Caption(99.0, "after all"))
STEPS = 4
METHODS = [registry.methods.load(name) for name in registry.methods.names()]
EXAMPLES = [example for cls in METHODS if cls.traits.uses_model for example in cls.examples()]
REUSABLE = [example for example in EXAMPLES if example.traits.prefix_reusable]
SEVEN_FRAMES = 7
"""Left-over units in every plan with blocks of two; an odd number, so a pair of Qwen-VL is filled up."""


def alone(
    adapter: Any, method: Method, clips: list[Any], question: str, captions: tuple[Caption, ...] = ()
) -> tuple[Generation, Any]:
    """A run of its own, and the prefix that it leaves."""
    with method.attach(adapter) as trace:
        done = generate(
            adapter, method, trace, clips, question,
            captions=captions, max_new_tokens=STEPS, stop_at_eos=False, sample_id=question,
        )  # fmt: skip
    return done, keys_and_values(done)


def keys_and_values(done: Generation) -> torch.Tensor:
    """``[2, layers, Hkv, n, D]`` of the tokens up to the last visual one."""
    n = max(span.stop for span in done.prompt.layout if span.kind != "text")
    held = [torch.stack([getattr(layer, name)[0, :, :n] for layer in done.cache.layers]) for name in ("keys", "values")]
    return torch.stack(held).clone()


def in_a_row(
    adapter: Any, method: Method, clips: list[Any], questions: tuple[str, ...], captions: tuple[Caption, ...] = ()
) -> tuple[list[Generation], Prefix]:
    """One run of all the questions, the next ones behind the first one's prefix."""
    options: dict[str, Any] = {"captions": captions, "max_new_tokens": STEPS, "stop_at_eos": False}
    with method.attach(adapter) as trace:
        found = [generate(adapter, method, trace, clips, questions[0], sample_id=questions[0], **options)]
        prefix = prefix_of(adapter, found[0], questions[0], captions)
        found += [generate_next(adapter, prefix, question, **options) for question in questions[1:]]
    return found, prefix


@pytest.mark.parametrize("captions", [(), CAPTIONS], ids=["video", "captions"])
@pytest.mark.parametrize("method", REUSABLE, ids=repr)
def test_a_reusable_prefix_does_not_depend_on_the_question(
    adapter: Any, clip: Any, method: Method, captions: tuple[Caption, ...]
) -> None:
    first, second = (alone(adapter, method, [clip(SEVEN_FRAMES)], each, captions)[1] for each in QUESTIONS[:2])
    assert first.shape == second.shape
    # The same sums over a longer prompt: float32 rounding of a four-layer model, at values of a few units.
    torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("captions", [(), CAPTIONS], ids=["video", "captions"])
@pytest.mark.parametrize("method", REUSABLE, ids=repr)
def test_answers_behind_a_kept_prefix_are_those_of_separate_runs(
    adapter: Any, clip: Any, method: Method, captions: tuple[Caption, ...]
) -> None:
    clips = [clip(SEVEN_FRAMES)]
    together, prefix = in_a_row(adapter, method, clips, QUESTIONS, captions)
    for question, done in zip(QUESTIONS, together, strict=True):
        apart, _ = alone(adapter, method, clips, question, captions)
        # The same sums in another order: float32 rounding of a four-layer model.
        torch.testing.assert_close(done.first_logits, apart.first_logits, rtol=0, atol=1e-5)
        assert done.token_ids == apart.token_ids
        assert done.prompt.next_position == apart.prompt.next_position
        behind = slice(None if done is together[0] else prefix.length, None)
        assert torch.equal(done.prompt.embeds, apart.prompt.embeds[:, behind])
        assert torch.equal(done.prompt.positions, apart.prompt.positions[..., behind])


@pytest.mark.parametrize("media", [["image"], ["video", "video"], ["image", "video"]], ids="+".join)
def test_any_mix_of_media_is_kept(adapter: Any, clip: Any, media: list[str]) -> None:
    clips = [clip(1, "image") if kind == "image" else clip(4 + 2 * i) for i, kind in enumerate(media)]
    for method in (Full(), Pevlm(sink=0, block=1)):
        together, _ = in_a_row(adapter, method, clips, QUESTIONS)
        assert [d.token_ids for d in together] == [alone(adapter, method, clips, q)[0].token_ids for q in QUESTIONS]


def test_a_method_that_draws_anew_for_each_sample_has_no_such_prefix(adapter: Any, clip: Any) -> None:
    method = Random(ratio=0.5)
    first, second = (alone(adapter, method, [clip(6)], each)[1] for each in QUESTIONS[:2])
    assert not method.traits.prefix_reusable
    assert first.shape != second.shape or float((first - second).abs().max()) > 0.1  # other tokens, no rounding


def test_a_longer_question_moves_the_cache_and_changes_nothing(adapter: Any, clip: Any) -> None:
    long = " ".join(QUESTIONS * 20)
    together, prefix = in_a_row(adapter, Full(), [clip(4)], (QUESTIONS[2], long, QUESTIONS[2]))
    apart, _ = alone(adapter, Full(), [clip(4)], long)
    assert together[1].prompt.length > together[0].prompt.length - prefix.length + STEPS  # no room was left for it
    torch.testing.assert_close(together[1].first_logits, apart.first_logits, rtol=0, atol=1e-5)
    assert together[0].token_ids == together[2].token_ids


def test_only_the_question_is_prefilled(adapter: Any, clip: Any, monkeypatch: Any) -> None:
    done, prefix = in_a_row(adapter, Full(), [clip(6)], QUESTIONS[:1])
    monkeypatch.setattr(type(adapter), "encode_vision", None)
    lengths: list[int] = []
    handle = adapter.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    try:
        generate_next(adapter, prefix, QUESTIONS[0], max_new_tokens=2, stop_at_eos=False)
    finally:
        handle.remove()
    assert lengths == [done[0].prompt.length - prefix.length, 1]
    assert done[0].cache.get_seq_length() == done[0].prompt.length + 1


def test_other_text_before_the_video_is_refused(adapter: Any, clip: Any) -> None:
    _, prefix = in_a_row(adapter, Full(), [clip(6)], QUESTIONS[:1], CAPTIONS)
    with pytest.raises(ValueError, match="the text before it is another"):
        generate_next(adapter, prefix, QUESTIONS[1], max_new_tokens=1)


def test_a_prompt_without_visual_tokens_leaves_nothing_to_reuse(adapter: Any, clip: Any) -> None:
    assert not Blind().traits.prefix_reusable
    for clips in ([], [clip(6)]):
        with pytest.raises(ValueError, match="no visual token"):
            in_a_row(adapter, Blind(), clips, QUESTIONS)


def test_a_cache_is_cropped_to_what_it_holds(adapter: Any, clip: Any) -> None:
    done, _ = alone(adapter, Full(), [clip(4)], QUESTIONS[0])
    (layer, *_), n = done.cache.layers, done.cache.get_seq_length()
    before, capacity = layer.keys.clone(), layer.reserved_bytes
    done.cache.crop(n - 3)
    assert torch.equal(layer.keys, before[:, :, : n - 3])
    assert layer.get_seq_length() == n - 3
    assert layer.reserved_bytes == capacity
    with pytest.raises(ValueError, match="cannot crop"):
        layer.crop(n)
    layer.evicted = 1
    with pytest.raises(ValueError, match="1 evicted"):
        layer.crop(1)
