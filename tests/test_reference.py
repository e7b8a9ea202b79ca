"""The shipped reference models: whole, loadable like any checkpoint, and trained by code that resumes exactly."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmbench.errors import UsageError
from vlmbench.reference import SHIPPED, expected_hash, hash_of, read_log, verify
from vlmbench.reference.build import TOKENS_PER_FRAME, UNK, make_model, make_processor, make_tokenizer
from vlmbench.reference.data import IMAGE, VALIDATION_SEED, clip_of, make_batch, make_pool, scene_of, to_pixels
from vlmbench.reference.evaluate import answer, prompt_of, teacher_forced
from vlmbench.reference.stages import Phase, Recipe, Stage, answer_logits, pool_features
from vlmbench.reference.train import Trainer
from vlmbench.suites._synth.questions import VOCABULARY, sample_questions
from vlmbench.suites._synth.scene import TEST_SEED, make_scene

NAME = "tiny-llava-ov"
TINY = Recipe(
    NAME,
    (
        Stage("vision", 3, 1e-3, (Phase(1, ("4x3",)),), tokens=128),
        Stage("language", 4, 1e-3, (Phase(0.5, ("4x3",), 4), Phase(1, ("4x3", IMAGE), 4)), tokens=200),
    ),
    pools={"4x3": 6, IMAGE: 4},
    validation=2,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    """(model, processor), by the auto classes."""
    folder = SHIPPED[NAME]
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_the_names_of_the_shipped_models_need_no_torch() -> None:
    code = "import sys, vlmbench.reference as r; assert r.SHIPPED; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shipped_weights_are_those_that_were_trained(shipped: tuple[Any, Any]) -> None:
    folder = verify(NAME)
    assert hash_of(folder / "model.safetensors") == expected_hash(NAME)
    assert (folder / "model.safetensors").stat().st_size <= 16e6
    assert type(shipped[0]).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert type(shipped[1]).__name__ == "LlavaOnevisionProcessor"
    assert {"seed", "history", "note", "curves", "versions"} <= read_log(folder).keys()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "absent", "no log"])
def test_a_damaged_copy_is_refused_in_a_sentence(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / NAME
    shutil.copytree(SHIPPED[NAME], folder)
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
        verify(NAME, folder)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="tiny-lava"):
        verify("tiny-lava")


def test_every_word_of_the_suite_is_one_token(shipped: tuple[Any, Any]) -> None:
    tokenizer = shipped[1].tokenizer
    unknown = tokenizer.convert_tokens_to_ids(UNK)
    for word in VOCABULARY:
        ids = tokenizer.encode(word, add_special_tokens=False)
        assert len(ids) == 1
        assert ids[0] != unknown
    text = "what color comes before the red circle ?"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(("kind", "n_media"), [("video", 0), ("video", 1), ("video", 2), ("image", 1), ("image", 2)])
def test_the_chat_template_takes_any_number_of_media(shipped: tuple[Any, Any], kind: str, n_media: int) -> None:
    model, processor = shipped
    clip = clip_of(make_scene(0, 2))
    content = [{"type": kind}] * n_media + [{"type": "text", "text": "what color is the first shape ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    media: dict[str, Any] = {}
    if n_media:
        media = {"images": [clip[0]] * n_media} if kind == "image" else {"videos": [clip] * n_media}
    inputs = processor(text=[text], return_tensors="pt", **media)
    ids = inputs["input_ids"][0].tolist()
    assert processor.tokenizer.convert_tokens_to_ids(UNK) not in ids
    assert processor.tokenizer.convert_ids_to_tokens(ids[-7:]) == [
        "what",
        "color",
        "is",
        "the",
        "first",
        "shape",
        "?<answer>",
    ]
    if kind == "video":
        assert ids.count(model.config.video_token_id) == n_media * (2 * TOKENS_PER_FRAME + 1)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > len(ids)


@pytest.mark.parametrize("kind", ["5", IMAGE])
def test_training_sees_what_the_processor_makes(kind: str, tmp_path: Path) -> None:
    """Pixels, features and the logits of a question: the path of training against that of a user."""
    processor = make_processor(VOCABULARY)
    model = make_model(processor.tokenizer, seed=3)
    pool = make_pool(tmp_path, kind, 1, workers=1)
    clip, scene = pool.frames[0], pool.scenes[0]
    batch = make_batch(pool, np.array([0]), processor.tokenizer, np.random.default_rng(0), n_pairs=2)
    second = sample_questions(scene, np.random.default_rng(0), 2)[1]
    inputs = prompt_of(processor, second.text, np.array(clip), scene.kind)
    pixels = inputs["pixel_values_videos"][0] if kind != IMAGE else inputs["pixel_values"][0, :1]
    # Both divide, subtract and scale in float32, in another order: a few units in the last place of 1.
    torch.testing.assert_close(pixels, to_pixels(clip), atol=5e-7, rtol=0)
    with torch.no_grad():
        features = pool_features(model, pool)
        taught = answer_logits(model, features, batch)
        first_of_second = int((batch.labels[0] != -100)[batch.part[0] == 1].sum())
        asked = model(**inputs).logits[0, -1]
    # Two different attention kernels (an explicit mask and none) over six layers in float32.
    torch.testing.assert_close(taught[first_of_second], asked, atol=2e-5, rtol=1e-4)


def test_gaps_in_positions_keep_the_order_and_the_text_behind_the_clip(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "4", 2, workers=1)
    batch = make_batch(pool, np.arange(2), make_tokenizer(VOCABULARY), np.random.default_rng(0), n_pairs=3, span=384)
    for positions, part in zip(batch.positions, batch.part, strict=True):
        prefix = positions[part == 0]
        assert (prefix.diff() > 0).all()
        assert int(prefix[-1]) == 1 + 384 * TOKENS_PER_FRAME
        for k in range(1, int(part.max()) + 1):
            assert int(positions[part == k][0]) == int(prefix[-1]) + 1


def test_training_lowers_the_loss_and_resumes_exactly(tmp_path: Path) -> None:
    whole = Trainer(TINY, tmp_path / "whole", tmp_path / "pools", workers=1)
    whole.run(["vision", "language"], save_every=2, log_every=1)
    losses = [line["loss"] for line in whole.curves if line["stage"] == "language" and "loss" in line]
    assert losses[-1] < losses[0]

    class Stop(Exception):
        pass

    class Interrupted(Trainer):
        def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
            super()._save(optimizer)
            if self.stage == 1 and self.step == 2:
                raise Stop

    out = tmp_path / "parts"
    with pytest.raises(Stop):
        Interrupted(TINY, out, tmp_path / "pools", workers=1).run(["vision", "language"], save_every=2)
    resumed = Trainer(TINY, out, tmp_path / "pools", workers=1)
    assert (resumed.stage, resumed.step) == (1, 2)
    resumed.run(["vision", "language"], save_every=2)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert verify(NAME, out / NAME) == out / NAME

    other = dataclasses.replace(TINY, seed=1)
    with pytest.raises(UsageError, match="another recipe or seed"):
        Trainer(other, out, tmp_path / "pools", workers=1)
    with pytest.raises(UsageError, match="no such stage"):
        resumed.run(["sight"])


def test_validation_scenes_are_neither_trained_nor_tested_on() -> None:
    assert max(TINY.pools.values()) < VALIDATION_SEED < TEST_SEED
    with pytest.raises(ValueError, match="training seed"):
        scene_of(TEST_SEED, "8")


def test_the_shipped_model_answers_unseen_videos(shipped: tuple[Any, Any]) -> None:
    """60 questions of every type, greedily: guessing (at best 1 in 4) gets 27 right less than once in 1,000."""
    model, processor = shipped
    n, p, needed = 60, 1 / 4, 27
    assert sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(needed, n + 1)) < 1e-3
    right = asked = 0
    seed = TEST_SEED - 1
    while asked < n:
        scene = make_scene(seed, 16)
        clip = clip_of(scene)
        for question in sample_questions(scene, np.random.default_rng(seed), 4)[: n - asked]:
            right += answer(model, processor, question.text, clip) == question.answer
            asked += 1
        seed -= 1
    assert right >= needed


def test_teacher_forcing_agrees_with_greedy_decoding(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    """The quick measure of training is the accuracy a user gets."""
    model, processor = shipped
    pool = make_pool(tmp_path, "8", 2, VALIDATION_SEED, workers=1)
    features = pool_features(model, pool)
    quick = teacher_forced(model, processor.tokenizer, pool, features, 2)
    rng = np.random.default_rng(0)
    asked = [sample_questions(scene, rng, 16) for scene in pool.scenes]
    slow: dict[str, list[bool]] = {}
    for clip, row in zip(pool.frames, asked, strict=True):
        for question in row:
            said = answer(model, processor, question.text, np.array(clip))
            slow.setdefault(question.type, []).append(said == question.answer)
    assert quick == {kind: sum(hits) / len(hits) for kind, hits in sorted(slow.items())}
