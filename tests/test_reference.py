"""The shipped reference models: whole, loadable like any checkpoint, and trained by code that resumes exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.methods.full import Full
from vlmbench.models.base import ModelAdapter
from vlmbench.models.llava import LlavaOnevision
from vlmbench.models.loading import load
from vlmbench.models.qwen_vl import QwenVL
from vlmbench.reference import SHIPPED, expected_hash, hash_of, read_log, verify
from vlmbench.reference.build import (
    LLAVA,
    QWEN,
    TOKENS_PER_UNIT,
    UNK,
    make_model,
    make_processor,
    make_tokenizer,
    match_words,
)
from vlmbench.reference.data import IMAGE, VALIDATION_SEED, Library, Pool, clip_of, make_pool, scene_of
from vlmbench.reference.evaluate import teacher_forced
from vlmbench.reference.features import group_of, pool_features
from vlmbench.reference.hints import named_targets, order_targets, remark_targets, said_targets
from vlmbench.reference.lessons import answer_logits, ask_all, gaps, hidden_states
from vlmbench.reference.prompts import IGNORED, image_prefix, make_batch, video_prefix
from vlmbench.reference.recipes import Phase, Recipe, Stage
from vlmbench.reference.train import Trainer
from vlmbench.reference.words import VOCABULARY
from vlmbench.suite import Caption
from vlmbench.suites._synth.captions import ANIMALS, EVERY, TEXT_TYPES
from vlmbench.suites._synth.encode import FPS
from vlmbench.suites._synth.questions import NUMBERS, questions, sample_questions
from vlmbench.suites._synth.scene import COLOURS, PLACES, SHAPES, TEST_SEED, Scene, make_scene
from vlmbench.trace import Trace
from vlmbench.video import Clip

NAMES = [LLAVA, QWEN]
AS_TRAINED: Any = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa"}


def tiny(model: str) -> Recipe:
    """Runs in seconds and learns next to nothing."""
    return Recipe(
        model,
        (
            Stage("vision", 3, 1e-3, (Phase(1, ("16", IMAGE)),), tokens=256),
            Stage(
                "language",
                4,
                1e-3,
                (
                    Phase(0.25, ("12",), 4, (0,), (0.2, 0)),
                    Phase(1, ("12+text", IMAGE), 4, (0, 64), (0.2, 0.2), 2.0),
                ),
                tokens=400,
                horizon=8,
            ),
        ),
        pools={"16": 20, IMAGE: 4},
        validation={"8": 2},
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few clips, decoded once for all tests."""
    return tmp_path_factory.mktemp("pools")


@pytest.fixture(scope="module", params=NAMES)
def untrained(request: pytest.FixtureRequest) -> tuple[str, ModelAdapter]:
    processor = make_processor(request.param, VOCABULARY)
    model = make_model(request.param, processor.tokenizer, seed=3)
    return request.param, (QwenVL if request.param == QWEN else LlavaOnevision)(model, processor)


@pytest.fixture(scope="module", params=sorted(SHIPPED))
def shipped(request: pytest.FixtureRequest) -> tuple[str, ModelAdapter]:
    return request.param, load(request.param, **AS_TRAINED).adapter


def film(frames: np.ndarray, kind: str = "video") -> Clip:
    times = tuple(i / FPS for i in range(len(frames)))
    return Clip(np.array(frames), tuple(range(len(frames))), times, FPS, kind, Path("film"))  # type: ignore[arg-type]


def between(texts: list[str]) -> tuple[Caption, ...]:
    return tuple(Caption((EVERY * (i + 1) - 0.5) / FPS, text) for i, text in enumerate(texts))


# What ships.


def test_the_names_of_the_shipped_models_need_no_torch() -> None:
    code = "import sys, vlmbench.reference as r; assert r.SHIPPED; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shipped_weights_are_those_that_were_trained(shipped: tuple[str, ModelAdapter]) -> None:
    name, adapter = shipped
    folder = verify(name)
    assert hash_of(folder / "model.safetensors") == expected_hash(name)
    assert (folder / "model.safetensors").stat().st_size <= 16e6
    family = "Qwen2_5_VL" if name == QWEN else "LlavaOnevision"
    assert type(adapter.model).__name__ == f"{family}ForConditionalGeneration"
    assert type(adapter.processor).__name__ == f"{family}Processor"
    assert adapter.shapes.layers >= 6
    assert adapter.shapes.heads > adapter.shapes.kv_heads > 1
    log = read_log(folder)
    assert log["stages_done"] == [stage["name"] for stage in log["recipe"]["stages"]]
    assert {"seed", "curves", "versions", "seconds"} <= log.keys()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "absent", "no log"])
def test_a_damaged_copy_is_refused_in_a_sentence(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / LLAVA
    shutil.copytree(SHIPPED[LLAVA], folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-100] ^= 1
        weights.write_bytes(data)
    elif damage == "absent":
        weights.unlink()
    else:
        (folder / "training.json").write_text("{")
    with pytest.raises(UsageError, match=r"restore it") as error:
        verify(LLAVA, folder)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="tiny-lava"):
        verify("tiny-lava")


def test_the_shipped_model_answers_unseen_videos(shipped: tuple[str, ModelAdapter]) -> None:
    """60 questions of every type, greedily: guessing (at best 1 in 4) gets 27 right less than once in 1,000."""
    _, adapter = shipped
    n, p, needed = 60, 1 / 4, 27
    assert sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(needed, n + 1)) < 1e-3
    right = asked = 0
    seed = TEST_SEED - 1
    while asked < n:
        scene = make_scene(seed, 16)
        clip = film(clip_of(scene))
        for question in sample(scene, seed, min(4, n - asked)):
            right += said(adapter, clip, question.text) == question.answer
            asked += 1
        seed -= 1
    assert right >= needed


def sample(scene: Scene, seed: int, k: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return sample_questions(questions(scene, rng), rng, k)


def said(adapter: ModelAdapter, clip: Clip, question: str, captions: tuple[Caption, ...] = ()) -> str:
    done = generate(adapter, Full(), Trace(), [clip], question, captions=captions, max_new_tokens=16)
    return str(adapter.processor.tokenizer.decode(done.token_ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("with_text", [False, True])
def test_teacher_forcing_agrees_with_greedy_decoding(
    shipped: tuple[str, ModelAdapter], pools: Path, with_text: bool
) -> None:
    """The quick measure of training is the accuracy a user gets."""
    name, adapter = shipped
    pool = make_pool(pools, "8", 2, VALIDATION_SEED, workers=1)
    quick = teacher_forced(
        adapter.model, name, adapter.processor.tokenizer, pool, pool_features(adapter.model, pool), with_text
    )
    asked, texts = ask_all(list(pool.scenes), with_text, 16, np.random.default_rng(0))
    slow: dict[str, list[bool]] = {}
    for i, (clip, row) in enumerate(zip(pool.frames, asked, strict=True)):
        captions = between(texts[i]) if texts else ()
        for question in row:
            hit = said(adapter, film(clip), question.text, captions) == question.answer
            slow.setdefault(question.type, []).append(hit)
    assert quick == {kind: sum(hits) / len(hits) for kind, hits in sorted(slow.items())}


# What they are made of.


def test_every_word_is_one_token_and_no_two_words_share_one() -> None:
    tokenizer = make_tokenizer(VOCABULARY)
    encoded = [tokenizer.encode(word, add_special_tokens=False) for word in VOCABULARY]
    assert {len(ids) for ids in encoded} == {1}
    assert tokenizer.convert_tokens_to_ids(UNK) not in {ids[0] for ids in encoded}
    assert len({ids[0] for ids in encoded}) == len(VOCABULARY)
    text = "what color comes before the red circle ?"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(("kind", "n_media"), [("video", 0), ("video", 1), ("video", 2), ("image", 1), ("image", 2)])
def test_the_chat_template_takes_any_number_of_media(
    untrained: tuple[str, ModelAdapter], kind: str, n_media: int
) -> None:
    name, adapter = untrained
    clips = [film(clip_of(make_scene(0, 2))[: 2 if kind == "video" else 1], kind)] * n_media
    ids = adapter.inputs(clips, "what color is the first shape ?")["input_ids"][0].tolist()
    assert adapter.processor.tokenizer.convert_tokens_to_ids(UNK) not in ids
    expected = ["what", "color", "is", "the", "first", "shape", "?<answer>"]
    assert adapter.processor.tokenizer.convert_ids_to_tokens(ids[-7:]) == expected
    if kind == "video":
        per_video = TOKENS_PER_UNIT if name == QWEN else 2 * TOKENS_PER_UNIT + 1
        assert ids.count(adapter.config.video_token_id) == n_media * per_video


@pytest.mark.parametrize(("kind", "with_text"), [("8", False), ("8", True), (IMAGE, False)])
def test_training_sees_what_a_user_makes_the_model_see(
    untrained: tuple[str, ModelAdapter], pools: Path, kind: str, with_text: bool
) -> None:
    """Tokens, positions and the logits of a question: the path of training against the adapter's."""
    name, adapter = untrained
    pool = make_pool(pools, kind, 2, workers=1)
    asked, texts = ask_all(list(pool.scenes), with_text, 3, np.random.default_rng(0))
    with torch.no_grad():
        features = pool_features(adapter.model, pool)
    if kind == IMAGE:
        prefix, flat = image_prefix(name), features
    else:
        prefix, flat = video_prefix(name, features.shape[1], with_text), features.flatten(1, 2)
    batch = make_batch(prefix, asked, adapter.processor.tokenizer, texts)
    with torch.no_grad():
        taught = answer_logits(adapter.model, hidden_states(adapter.model, flat, batch)[-1], batch)

    clip = film(pool.frames[0], "image" if kind == IMAGE else "video")
    inputs = adapter.inputs([clip], asked[0][1].text, between(texts[0]) if texts else ())
    prompt = adapter.splice(inputs, adapter.encode_vision(inputs))
    part, unanswered = batch.part[0], batch.labels[0] == -100
    shown = torch.cat([(part == 0).nonzero(), ((part == 2) & unanswered).nonzero()]).flatten()
    assert torch.equal(batch.ids[0, shown], inputs["input_ids"][0])
    assert torch.equal(
        batch.positions[..., 0, :][..., shown] if name == QWEN else batch.positions[:1, shown],
        prompt.positions[..., 0, :] if name == QWEN else prompt.positions,
    )
    with torch.no_grad():
        asked_for = adapter.prefill(prompt, adapter.new_cache(1))[0]
    first_of_second = int((~unanswered)[part == 1].sum())
    # Two attention kernels (an explicit mask and none) over six layers in float32.
    torch.testing.assert_close(taught[first_of_second], asked_for, atol=2e-5, rtol=1e-4)


# What they are trained on.


@pytest.fixture(scope="module", params=[1, 2])
def library(request: pytest.FixtureRequest, pools: Path) -> tuple[Library, Pool]:
    """Every unit's features are its own number."""
    pool = make_pool(pools, "16", 20, workers=1)
    units = 16 // request.param
    numbers = torch.arange(20 * units, dtype=torch.float32).view(20, units, 1, 1).expand(-1, -1, TOKENS_PER_UNIT, 1)
    return Library(pool, numbers, request.param), pool


@pytest.mark.parametrize("n_units", [8, 40])
def test_an_assembled_clip_shows_its_scene_and_nothing_else(library: tuple[Library, Pool], n_units: int) -> None:
    made, pool = library
    per_clip = 16 // made.group
    for seed in range(50):
        rows, scene = made.assemble(n_units, 4, np.random.default_rng(seed))
        assert (len(rows), scene.n_frames, len(scene.events)) == (n_units, n_units * made.group, 4)
        assert len({(e.colour, e.shape) for e in scene.events}) == 4
        assert all(a.stop <= b.start for a, b in zip(scene.events, scene.events[1:], strict=False))
        for unit, row in enumerate(rows.tolist()):
            filmed, start = pool.scenes[row // per_clip], row % per_clip * made.group
            for t in range(made.group):
                there = {look(e) for e in filmed.events if e.start <= start + t < e.stop}
                told = {look(e) for e in scene.events if e.start <= unit * made.group + t < e.stop}
                assert there == told


def look(event: Any) -> tuple[str, str, str]:
    return event.colour, event.shape, event.place


@pytest.mark.parametrize("group", [1, 2])
def test_what_a_token_should_know_of_the_order_is_what_happened(group: int) -> None:
    """At the four tokens of an event's quadrant, in each unit that shows it: its predecessor, and how many came before."""
    scenes = [make_scene(seed, 32) for seed in range(20)]
    targets = order_targets(scenes, 32 // group, group).view(20, 32 // group, 4, 4, 3)  # rows, columns of a unit
    for scene, found in zip(scenes, targets, strict=True):
        for unit in range(32 // group):
            shown = [e for e in scene.events if e.start < (unit + 1) * group and unit * group < e.stop]
            for row, column in np.ndindex(2, 2):
                there = [e for e in shown if e.place == PLACES[2 * row + column]]
                quadrant = found[unit, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1, 3).tolist()
                assert len({tuple(each) for each in quadrant}) == 1
                if not there:
                    assert quadrant[0] == [IGNORED] * 3
                    continue
                number = scene.events.index(there[-1])
                before = scene.events[number - 1] if number else None
                colour = COLOURS.index(before.colour) if before else len(COLOURS)
                shape = SHAPES.index(before.shape) if before else len(SHAPES)
                assert quadrant[0] == [colour, shape, number]


def test_a_word_of_a_question_knows_of_the_event_that_it_names() -> None:
    """Wherever a question holds colour and shape of an event, and nowhere in an answer or in the clip."""
    scenes = [make_scene(seed, 16) for seed in range(4)]
    tokenizer, rng = make_tokenizer(VOCABULARY), np.random.default_rng(0)
    asked, texts = ask_all(scenes, True, 30, rng)
    asked = [[*row, *questions(scene, rng)] for row, scene in zip(asked, scenes, strict=True)]
    batch = make_batch(video_prefix(LLAVA, 16, True), asked, tokenizer, texts)
    found = named_targets(scenes, batch, tokenizer)
    expected = torch.full_like(found, IGNORED)
    for b, scene in enumerate(scenes):
        events = scene.events
        looks = [(event.colour, event.shape) for event in events]
        for k, question in enumerate(asked[b], 1):
            words = question.text.split()
            places = (batch.part[b] == k).nonzero().flatten()
            for i, pair in enumerate(itertools.pairwise(words), 1):
                if pair in looks:
                    number = looks.index(pair)
                    before = events[number - 1] if number else None
                    colour = COLOURS.index(before.colour) if before else len(COLOURS)
                    shape = SHAPES.index(before.shape) if before else len(SHAPES)
                    expected[b, places[i]] = torch.tensor([colour, shape, number])
    assert torch.equal(found, expected)
    assert (found[..., 2] != IGNORED).sum() > 50


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_text", [False, True])
def test_gaps_in_positions_are_those_of_the_longer_video(name: str, with_text: bool) -> None:
    """Each unit stands where it stands in the longer video of which only these units are shown, and so does the question."""
    scene, group, n_units, span = make_scene(0, 16), group_of_name(name), 16 // group_of_name(name), 128
    rng = np.random.default_rng(0)
    asked, texts = ask_all([scene], with_text, 2, rng)
    blanks = gaps(scene, n_units, span, group, with_text, rng)
    per_medium = EVERY // group if with_text else 1
    assert int(blanks.sum()) * per_medium == span - n_units
    shown, longer = video_prefix(name, n_units, with_text), video_prefix(name, span, with_text)
    batch = make_batch(shown, asked, make_tokenizer(VOCABULARY), texts, blanks[None])
    positions = batch.positions[:, 0] if name == QWEN else batch.positions[:1]
    assert (positions[:, batch.part[0] == 1][:, 0] == longer.next).all()
    moved = blanks.cumsum(0) * per_medium
    for unit in range(n_units):
        here, there = (
            [i for i, u in enumerate(prefix.unit) if u == number]
            for prefix, number in ((shown, unit), (longer, unit + int(moved[unit])))
        )
        assert [shown.tokens[i] for i in here] == [longer.tokens[i] for i in there]
        assert torch.equal(positions[:, here], longer.positions[:, there])


def group_of_name(name: str) -> int:
    return group_of(make_model(name, make_tokenizer(VOCABULARY)))


def test_validation_scenes_are_neither_trained_nor_tested_on() -> None:
    assert max(Recipe(LLAVA, ()).pools.values()) < VALIDATION_SEED < TEST_SEED
    with pytest.raises(ValueError, match="training seed"):
        scene_of(TEST_SEED, "8")


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_resumes_exactly(tmp_path: Path, pools: Path, name: str) -> None:
    recipe = tiny(name)
    whole = Trainer(recipe, tmp_path / "whole", pools, workers=1)
    whole.run(["vision", "language"], save_every=2, log_every=1)
    losses = [line["answers"] for line in whole.curves if "answers" in line]
    assert losses[-1] < losses[0]

    class Stop(Exception):
        pass

    class Interrupted(Trainer):
        def _save(self, optimizers: list[torch.optim.Optimizer]) -> None:
            super()._save(optimizers)
            if self.stage == 1 and self.step == 2:
                raise Stop

    out = tmp_path / "parts"
    with pytest.raises(Stop):
        Interrupted(recipe, out, pools, workers=1).run(["vision", "language"], save_every=2)
    resumed = Trainer(recipe, out, pools, workers=1)
    assert (resumed.stage, resumed.step) == (1, 2)
    resumed.run(["vision", "language"], save_every=2)
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[key]), key
    assert verify(name, out / name) == out / name

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="another recipe or seed"):
        Trainer(dataclasses.replace(recipe, seed=1), out, pools, workers=1)
    with pytest.raises(UsageError, match="no such stage"):
        resumed.run(["sight"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_training_folder_that_cannot_be_gone_on_from_is_refused_and_left_alone(tmp_path: Path, pools: Path) -> None:
    recipe = dataclasses.replace(tiny(LLAVA), stages=tiny(LLAVA).stages[:1])
    Trainer(recipe, tmp_path, pools, workers=1).run(["vision"])
    weights = (tmp_path / LLAVA / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / LLAVA)  # as when it was stopped before the checkpoint was written
    Trainer(recipe, tmp_path, pools, workers=1).run(["vision"])
    assert (tmp_path / LLAVA / "model.safetensors").read_bytes() == weights

    state = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(UsageError, match="cannot be read"):
        Trainer(recipe, tmp_path, pools, workers=1)
    (tmp_path / "state.pt").unlink()
    with pytest.raises(UsageError, match=r"no state\.pt"):
        Trainer(recipe, tmp_path, pools, workers=1)
    assert (tmp_path / LLAVA / "model.safetensors").read_bytes() == weights


def test_what_a_remark_should_know_stands_at_its_own_words() -> None:
    """Both words of a remark know who speaks and the latest event, the number itself too; checked on the text itself."""
    tokenizer = make_tokenizer(VOCABULARY)
    scenes = [make_scene(seed, 32) for seed in range(10)]
    for name, n_units in ((LLAVA, 32), (QWEN, 16)):
        prefix = video_prefix(name, n_units, captions=True)
        asked, texts = ask_all(scenes, True, 8, np.random.default_rng(0))
        batch = make_batch(prefix, asked, tokenizer, texts)
        targets = remark_targets(scenes, prefix, batch, tokenizer)
        expected = torch.full_like(targets, IGNORED)
        for b, scene in enumerate(scenes):
            words = [tokenizer.decode(i) for i in batch.ids[b]]
            for i, word in enumerate(words):
                if i >= len(prefix.tokens):
                    if batch.labels[b, i] == IGNORED:  # in a question
                        who = ANIMALS.index(word) if word in ANIMALS else IGNORED
                        number = NUMBERS.index(word) if word in NUMBERS else IGNORED
                        expected[b, i, :2] = torch.tensor([who, number])
                elif word == "says":
                    frame = int("".join(words[i - 7 : i - 4])) + EVERY - 1  # at 0 1 2 and now the cat says …
                    seen = [e for e in scene.events if e.start <= frame]
                    look = [COLOURS.index(seen[-1].colour), SHAPES.index(seen[-1].shape)] if seen else [IGNORED] * 2
                    who = ANIMALS.index(words[i - 1])
                    expected[b, i - 1] = torch.tensor([who, IGNORED, *look])
                    expected[b, i + 1] = torch.tensor([who, NUMBERS.index(words[i + 1]), *look])
        assert torch.equal(targets, expected)
        assert (expected[:, len(prefix.tokens) :] != IGNORED).any()


def test_a_word_asked_about_should_know_the_answer() -> None:
    """In a question about captions that is its last word but the mark; other questions have no such word."""
    tokenizer, scenes = make_tokenizer(VOCABULARY), [make_scene(seed, 32) for seed in range(6)]
    asked, texts = ask_all(scenes, True, 20, np.random.default_rng(0))
    batch = make_batch(video_prefix(LLAVA, 32, captions=True), asked, tokenizer, texts)
    found = said_targets(asked, batch, tokenizer)
    expected = torch.full_like(found, IGNORED)
    for b, row in enumerate(asked):
        for k, question in enumerate(row, 1):
            if question.type in TEXT_TYPES:
                words = question.text.split()
                last = max(i for i, word in enumerate(words) if word in {*ANIMALS, *NUMBERS, *SHAPES})
                at = (batch.part[b] == k).nonzero().flatten()[last]
                expected[b, at] = [*ANIMALS, *NUMBERS].index(question.answer)
    assert torch.equal(found, expected)
    assert (found != IGNORED).sum() > 20


def test_a_model_may_begin_with_the_language_side_of_a_shipped_one(tmp_path: Path, pools: Path) -> None:
    begun = Trainer(dataclasses.replace(tiny(QWEN), start=LLAVA), tmp_path, pools, workers=1)
    theirs = load(LLAVA, **AS_TRAINED).adapter.text.state_dict()
    ours = begun.model.model.language_model.state_dict()
    assert all(torch.equal(ours[key], weight) for key, weight in theirs.items())


def test_a_resumed_training_names_the_weights_that_it_began_with(
    tmp_path: Path, pools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped model may be another one by then."""
    recipe = dataclasses.replace(tiny(QWEN), start=LLAVA)
    Trainer(recipe, tmp_path, pools, workers=1)._save([])
    began = read_log(SHIPPED[LLAVA])["weights_sha256"]
    monkeypatch.setattr("vlmbench.reference.train.read_log", lambda folder: {"seed": 0, "weights_sha256": "another"})
    log = json.loads((Trainer(recipe, tmp_path, pools, workers=1).export() / "training.json").read_text())
    assert log["start_weights_sha256"] == began


def test_matched_words_find_themselves_and_other_words_nothing_new() -> None:
    """One head of two layers scores a word against itself as far as in its slow frequencies; words outside are untouched."""
    model = make_model(LLAVA, make_tokenizer(VOCABULARY)).model.language_model
    words = F.normalize(torch.randn(16, 192, generator=torch.Generator().manual_seed(0)), dim=-1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    match_words(model, words, seed=0)
    changed = {
        name: weight - before[name]
        for name, weight in model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert set(changed) == {f"layers.{layer}.self_attn.{part}.weight" for layer in (2, 3) for part in parts}
    outside = torch.randn(8, 192, generator=torch.Generator().manual_seed(1))
    basis = torch.linalg.qr(words.T).Q
    outside = outside - outside @ basis @ basis.T
    for layer in (2, 3):
        query, key, value, out = (changed[f"layers.{layer}.self_attn.{part}.weight"] for part in parts)
        query, key, value, out = query[96:128], key[32:], value[32:], out[:, 96:128]
        scores = (words @ query.T) @ (words @ key.T).T
        assert (scores.argmax(-1) == torch.arange(16)).all()
        assert (scores.diagonal() > 0).all()
        assert not query[[*range(8), *range(16, 24)]].any()  # what turns fast
        copied = (words @ value.T) @ out.T @ words.T
        assert (copied.diagonal() > 0).all()
        for weight in (query, key, value):
            torch.testing.assert_close(outside @ weight.T, torch.zeros(8, 32), rtol=0, atol=1e-5)
