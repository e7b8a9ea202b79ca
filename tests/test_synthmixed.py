"""Text between frames of a generated video: evenly spaced, equally long, silent about the frames, and worth reading."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from vlmbench.suite import Sample
from vlmbench.suites._synth.captions import (
    ANIMALS,
    CAPTION_VOCABULARY,
    EVERY,
    FROM_FRAMES,
    REMARKS,
    TYPES,
    WORDS,
    make_remarks,
    mixed_questions,
)
from vlmbench.suites._synth.files import source_hash
from vlmbench.suites._synth.picking import pick
from vlmbench.suites._synth.questions import NUMBERS, VOCABULARY, Question
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, Scene, make_scene
from vlmbench.suites.synthmixed import SynthMixed
from vlmbench.suites.synthvideo import SynthVideo
from vlmbench.video import Clip, Decoder

ALPHA = 1e-3
"""Chance that one test of balance would fail for a perfect generator; seeds are fixed, so it passes always or never."""
LENGTHS = (2, 5, 32, 128, 1000)


@cache
def samples(length: int = 128) -> list[Sample]:
    return list(SynthMixed(length=length).samples())


def one_a_video(length: int) -> list[Sample]:
    return list({sample.cluster: sample for sample in samples(length)}.values())


def test_questions_and_captions_never_change_within_a_version() -> None:
    """Whoever changes one on purpose raises `version` and puts the new digest here."""
    text = "\n".join(
        f"{s.id}|{s.question}|{s.answer}|{s.template}|{s.extra['seed']}|"
        + "/".join(f"{caption.time_s} {caption.text}" for caption in s.captions)
        for s in SynthMixed().samples()
    )
    assert (SynthMixed.version, hashlib.sha256(text.encode()).hexdigest()[:16]) == ("1", "5fa40458ea01a613")


def test_a_change_of_the_text_changes_the_data_hash_and_leaves_the_videos() -> None:
    suite = SynthMixed()
    assert suite.data_hash == source_hash("questions", "picking", "captions") != SynthVideo().data_hash
    assert source_hash() in str(suite.samples()[0].media[0].path)


def test_there_are_200_videos_of_128_frames_with_three_questions_of_six_types() -> None:
    found = SynthMixed().samples()
    assert found == samples(128)
    assert Counter(Counter(s.cluster for s in found).values()) == {3: 200}
    counts = Counter(s.strata["type"] for s in found)
    assert set(counts) == set(TYPES)
    # The type asked least comes next, but the last videos need not allow it.
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("kind", TYPES)
def test_one_type_can_be_asked_alone(kind: str) -> None:
    assert {s.strata["type"] for s in SynthMixed(length=32, type=kind).samples()} == {kind}


# The text.


@pytest.mark.parametrize("length", LENGTHS)
def test_a_caption_of_twelve_words_follows_every_second_frame(length: int) -> None:
    for sample in one_a_video(length):
        assert len(sample.captions) == -(-length // EVERY)
        for number, caption in enumerate(sample.captions):
            words = caption.text.split()
            assert len(words) == WORDS
            assert int("".join(words[1:4])) == EVERY * number  # the time stamp is the first frame that it covers
            # Behind its last frame and before the next one, at two frames a second.
            assert (EVERY * (number + 1) - 1) / 2 < caption.time_s < EVERY * (number + 1) / 2


def test_captions_lie_midway_between_decoded_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMBENCH_CACHE", str(tmp_path))
    suite = SynthMixed(length=7)
    sample = suite.samples()[0]
    suite.materialise(sample)
    with Decoder("pyav") as decoder:
        times = decoder.read(sample.media[0].path, kind="video", frames=None, rule="endpoints").times_s
    edges = [(times[i - 1] + times[i]) / 2 for i in range(EVERY, 7, EVERY)]
    assert [caption.time_s for caption in sample.captions] == pytest.approx([*edges, times[-1] + 0.75])


@pytest.mark.parametrize("length", LENGTHS)
def test_every_remark_has_an_animal_and_a_number_of_its_own(length: int) -> None:
    for sample in one_a_video(length):
        said = [c.text.split()[7:10:2] for c in sample.captions if " says " in c.text]
        assert len(said) == min(REMARKS, len(sample.captions))
        animals, numbers = zip(*said, strict=True)
        assert len(set(animals)) == len(animals)
        assert len(set(numbers)) == len(numbers)
        assert set(animals) <= set(ANIMALS)
        assert set(numbers) <= set(NUMBERS)


def test_captions_say_nothing_of_what_is_seen() -> None:
    words = {word for s in samples() for caption in s.captions for word in caption.text.split()}
    assert words.isdisjoint({*COLOURS, *SHAPES, *PLACES})
    # What is to be read is in the text, what is to be seen is not.
    for sample in samples():
        read = {word for caption in sample.captions for word in caption.text.split()}
        assert (sample.answer in read) == (sample.strata["type"] not in FROM_FRAMES)


# Nothing to be learnt from the question.


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return mixed_questions(scene, make_remarks(scene), rng)


@cache
def many(kind: str) -> list[tuple[Scene, Question]]:
    """One question of a type on each of 1500 videos that nobody is tested on, where the video allows it."""
    scenes = [make_scene(seed, 64) for seed in range(1500)]
    asked = pick(scenes, 1, (kind,), ask)
    return [(scene, question) for scene, found in zip(scenes, asked, strict=True) for question in found]


def quantile(cells: int) -> float:
    return float(stats.chi2.ppf(1 - ALPHA, cells - 1))


@pytest.mark.parametrize(("kind", "possible"), [("says", NUMBERS), ("speaker", ANIMALS), ("beside", ANIMALS)])
def test_every_possible_answer_is_equally_likely(kind: str, possible: tuple[str, ...]) -> None:
    counts = Counter(question.answer for _, question in many(kind))
    assert set(counts) == set(possible)
    assert {question.n_answers for _, question in many(kind)} == {len(possible)}
    assert sum(counts.values()) > 1000
    assert stats.chisquare(list(counts.values())).statistic < quantile(len(possible))


@pytest.mark.parametrize(("kind", "slot"), [("says", -3), ("speaker", -2), ("beside", -3), ("beside", -2)])
def test_what_a_question_names_does_not_tell_the_answer(kind: str, slot: int) -> None:
    table = Counter((question.text.split()[slot], question.answer) for _, question in many(kind))
    slots, answers = (sorted({pair[i] for pair in table}) for i in (0, 1))
    assert len(slots) >= 4
    test = stats.chi2_contingency([[table[one, other] for other in answers] for one in slots])
    assert test.pvalue > ALPHA


@pytest.mark.parametrize("kind", ["says", "speaker"])
def test_any_remark_may_be_asked_for(kind: str) -> None:
    ranks = []
    for scene, question in many(kind):
        pairs = [(remark.animal, remark.number) for remark in make_remarks(scene)]
        ranks.append(next(i for i, pair in enumerate(pairs) if question.answer in pair))
    assert stats.chisquare(np.bincount(ranks, minlength=REMARKS)).statistic < quantile(REMARKS)


@pytest.mark.parametrize("kind", ["says", "speaker", "beside"])
def test_no_tested_answer_is_much_commoner_than_chance(kind: str) -> None:
    answers = [s.answer for s in samples() if s.strata["type"] == kind]
    assert max(Counter(answers).values()) <= stats.binom.ppf(1 - ALPHA / 8, len(answers), 1 / 8)


# What the models that are asked read.


@pytest.mark.parametrize(("model", "share"), [("tiny-llava-ov", 0.26), ("tiny-qwen2.5-vl", 0.4)])
def test_words_and_frames_alternate_in_the_prompt(model: str, share: float) -> None:
    """A quarter of LLaVA-OneVision's tokens are words; Qwen2.5-VL has half as many tokens a frame."""
    from vlmbench.models.base import Features
    from vlmbench.models.llava import LlavaOnevision
    from vlmbench.models.qwen_vl import QwenVL
    from vlmbench.reference.build import make_model, make_processor

    processor = make_processor(model, (*VOCABULARY, *CAPTION_VOCABULARY))
    family: Any = LlavaOnevision if model == "tiny-llava-ov" else QwenVL
    adapter = family(make_model(model, processor.tokenizer), processor)
    sample = samples()[0]
    frames = np.zeros((128, 64, 64, 3), np.uint8)
    clip = Clip(frames, tuple(range(128)), tuple(i / 2 for i in range(128)), 2.0, "video", sample.media[0].path)
    inputs = adapter.inputs([clip], sample.question, sample.captions)
    text = processor.tokenizer.decode(inputs["input_ids"][0], clean_up_tokenization_spaces=False)
    assert processor.tokenizer.unk_token not in text
    words = [word for word in re.sub(r"<\w+>", " ", text).split() if word]
    assert words == [*(word for caption in sample.captions for word in caption.text.split()), *sample.question.split()]
    layout = adapter.splice(inputs, Features()).layout
    assert [span.media for span in layout if span.kind == "video" and span.frame == 0] == list(range(128 // EVERY))
    assert len(words) / layout.length == pytest.approx(share, abs=0.01)
