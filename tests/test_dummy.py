"""The stand-in is deterministic, honours its parameters, and fills every field that store and report read."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbench.backend import Outcome
from vlmbench.errors import UsageError
from vlmbench.header import make_header
from vlmbench.method import Citation, Method
from vlmbench.models.dummy import DummyBackend
from vlmbench.record import Pass, SampleRecord
from vlmbench.report import rows, to_json
from vlmbench.spec import AnswerSpec, MeasureSpec, build, parse
from vlmbench.store import ResultStore
from vlmbench.suite import Sample

SCHEMAS = Path(__file__).resolve().parents[1] / "docs" / "schema"
SPEC = AnswerSpec(
    model="dummy",
    revision=None,
    weights_hash="",
    method="",
    method_params={},
    suite="colours",
    suite_version="1",
    suite_params={},
    prompt_style="default",
    frames=4,
    sampler="endpoints",
    fps=None,
    max_pixels=None,
    min_pixels=None,
    decoder="none",
    attention="dummy",
    dtype="float32",
    device_type="cpu",
    max_new_tokens=8,
    seed=0,
)
PASSES: tuple[Pass, ...] = ("accuracy", "latency", "memory")


class Full(Method):
    name = "full"
    cite = Citation("")


class Turbo(Full):
    name = "turbo"


def sample(number: int, answer: str = "red") -> Sample:
    return Sample(f"s{number}", f"v{number // 2}", (), "Which colour?", answer, "colour")


def ask(backend: DummyBackend, number: int = 0, pass_: Pass = PASSES[0], method: Method | None = None) -> Outcome:
    return backend.answer(method or Full(), sample(number), "?", (), pass_=pass_, max_new_tokens=8)


def test_a_spec_makes_one() -> None:
    made = build(DummyBackend, parse("dummy:accuracy=0.9,seed=3"), "model")
    assert made == DummyBackend(accuracy=0.9, seed=3)
    assert made.identity.facts["stand_in"]
    assert not made.needs_media
    assert made.best_dense_kernel() == "dummy"


@pytest.mark.parametrize("text", ["accuracy=1.1", "fail=-0.1", "oom=2", "delay_s=-1"])
def test_a_parameter_out_of_range_is_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=rf"dummy:{text.partition('=')[0]}.*not {text.partition('=')[2]}"):
        build(DummyBackend, parse(f"dummy:{text}"), "model")


@given(st.integers(), st.integers(0, 1000), st.sampled_from(PASSES))
def test_the_same_question_gets_the_same_answer(seed: int, number: int, pass_: Pass) -> None:
    assert ask(DummyBackend(seed=seed), number, pass_) == ask(DummyBackend(seed=seed), number, pass_)


@pytest.mark.parametrize("key", ["accuracy", "fail", "oom"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shares_are_met(key: str, share: float) -> None:
    n = 2000
    outcomes = [ask(DummyBackend(**{key: share}), number) for number in range(n)]  # type: ignore[arg-type]
    hits = {
        "accuracy": sum(each.raw_text == "red" for each in outcomes),
        "fail": sum(each.status == "error" for each in outcomes),
        "oom": sum(each.status == "oom" for each in outcomes),
    }[key]
    assert abs(hits - share * n) <= 4 * math.sqrt(n * share * (1 - share))  # four standard deviations


@pytest.mark.parametrize("answer", ["red", "Red", "A", "b", "a long answer"])
def test_a_wrong_answer_is_wrong_and_of_the_same_kind(answer: str) -> None:
    for number in range(20):
        said = DummyBackend(accuracy=0).answer(
            Full(), sample(number, answer), "?", (), pass_=PASSES[0], max_new_tokens=8
        )
        assert said.raw_text.lower() != answer.lower()
        assert (len(said.raw_text) == 1) == (len(answer) == 1)


def test_what_can_change_an_answer_changes_the_weights_hash() -> None:
    hashes = {DummyBackend(**change).identity.weights_hash for change in ({}, {"seed": 1}, {"fail": 0.1})}
    assert len(hashes) == 3
    assert DummyBackend(delay_s=0.1).identity.weights_hash == DummyBackend().identity.weights_hash


@given(st.integers(0, 1000))
def test_its_spans_add_up(number: int) -> None:
    timing = ask(DummyBackend(), number, "latency").timing
    assert timing is not None
    assert len(timing.decode_s) == 7
    first = timing.vision_s + timing.prepare_s + timing.prefill_s
    assert timing.ttft_s == pytest.approx(first)
    before = timing.preprocess_s + timing.transfer_s
    assert timing.e2e_s == pytest.approx(before + first + sum(timing.decode_s) + timing.other_s)


def test_from_answers_to_a_table(tmp_path: Path) -> None:
    backend, full = DummyBackend(oom=0.1, fail=0.1), Full()
    identity = backend.identity
    measure = MeasureSpec("all", 0, 1, 1, identity.device_name)
    for method in (full, Turbo()):
        answer = dataclasses.replace(SPEC, method=method.name, weights_hash=identity.weights_hash)
        header = make_header(answer, measure, identity, {"model": "dummy"}, traits=method.traits)
        with ResultStore(tmp_path).open(answer, header) as run:
            for pass_ in PASSES:
                for number in range(30):
                    run.append(recorded(backend, method, number, pass_))
    found = rows(tmp_path, include_dummy=True)
    jsonschema.validate(json.loads(to_json(found)), json.loads((SCHEMAS / "table.schema.json").read_text()))
    turbo = found[1]
    unknown = {name for name, value in turbo.items() if value is None}
    # It names no stages, and its answers carry no probabilities.
    later = {"n_kept_tokens", "vision_flops", "vision_dense_flops"}  # what the engine counts
    assert unknown == {"amdahl_prefill", "amdahl_e2e", "first_token_match", "first_token_kl", "recall", *later}
    assert turbo["n_failed"] > 0
    assert turbo["speedup_prefill"] > 1.5
    assert turbo["marks"] == ["cpu"]
    assert rows(tmp_path) == []
    for view in ResultStore(tmp_path).runs():
        jsonschema.validate(view.header, json.loads((SCHEMAS / "header.schema.json").read_text()))
        for line in (view.folder / "samples.jsonl").read_text().splitlines():
            jsonschema.validate(json.loads(line), json.loads((SCHEMAS / "record.schema.json").read_text()))


def recorded(backend: DummyBackend, method: Method, number: int, pass_: Pass) -> SampleRecord:
    """What the runner would write."""
    outcome, asked = ask(backend, number, pass_, method), sample(number)
    fields: dict[str, Any] = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    dense = ask(backend, number, pass_, Full()).timing
    if outcome.timing and dense:
        fields |= {"rounds": [outcome.timing], "baseline_rounds": [dense]}
    score = float(outcome.raw_text == asked.answer)
    return SampleRecord(asked.id, pass_, asked.cluster, prediction=outcome.raw_text, score=score, **fields)
