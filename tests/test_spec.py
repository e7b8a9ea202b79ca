"""The grammar: what is written is read back, what cannot be read is one sentence, a slug is a safe folder name."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbench.errors import UsageError
from vlmbench.spec import AnswerSpec, Spec, build, parse, parse_chain, slug

# A quote inside a value cannot be written down, and space around a value is not part of it.
characters = st.characters(exclude_categories=["C", "Z"], exclude_characters="'\"", include_characters=" ")
text = st.text(characters).map(str.strip)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/@-]*", fullmatch=True)
keys = st.from_regex(r"[a-z][a-z_0-9]*", fullmatch=True)
specs = st.builds(Spec, names, st.dictionaries(keys, text, max_size=4))


@given(specs)
def test_a_spec_reads_back_as_it_was_written(spec: Spec) -> None:
    assert parse(str(spec)) == spec


@given(st.lists(specs, min_size=1, max_size=3))
def test_a_chain_reads_back_in_order(chain: list[Spec]) -> None:
    assert parse_chain("+".join(map(str, chain))) == tuple(chain)


@given(st.text())
def test_any_text_parses_or_is_a_usage_error(anything: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse(anything).name


@given(st.text())
def test_a_slug_is_a_safe_folder_name_and_its_own_slug(anything: str) -> None:
    once = slug(anything)
    assert re.fullmatch(r"[a-z0-9_=][a-z0-9._=-]*", once)
    assert slug(once) == once


def test_values_may_be_quoted_and_only_the_first_colon_splits() -> None:
    assert parse('videomme:duration="short,long"').params == {"duration": "short,long"}
    assert parse("x:a=C:/d").params == {"a": "C:/d"}
    assert [spec.name for spec in parse_chain("turbo:r=8,mode=drop+pevlm:sink=4")] == ["turbo", "pevlm"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("", "'' has no name"),
        (":a=1", "':a=1' has no name"),
        ("pevlm:sink", "'sink' in 'pevlm:sink' is not key=value"),
        ("pevlm:=3", "'=3' in 'pevlm:=3' is not key=value"),
        ("pevlm:sink=1,sink=2", "'sink' is given twice"),
        ("pevlm:sink='4", "never closed"),
    ],
)
def test_what_is_not_a_spec_is_named_in_the_error(wrong: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse(wrong)


@dataclasses.dataclass(frozen=True)
class Knobs:
    sink: int = 4
    ratio: float = 0.5
    unit: Literal["frame", "token"] = "frame"
    layers: tuple[int, ...] = ()
    cap: int | None = None
    deep: bool = False


def test_parameters_take_the_types_of_their_fields() -> None:
    made = build(Knobs, parse("knobs:sink=8,ratio=1e-1,unit=token,layers=1/2/3,cap=none,deep=on"), "method")
    assert made == Knobs(8, 0.1, "token", (1, 2, 3), None, True)
    assert build(Knobs, parse("knobs:cap=7"), "method").cap == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("knobs:snik=1", "Did you mean 'sink'?"),
        ("knobs:sink=1.5", "whole number"),
        ("knobs:ratio=half", "number"),
        ("knobs:ratio=nan", "knobs:ratio must be a finite number, not 'nan'."),
        ("knobs:ratio=-inf", "knobs:ratio must be a finite number, not '-inf'."),
        ("knobs:ratio=1e999", "knobs:ratio must be a finite number, not '1e999'."),
        ("knobs:sink=9223372036854775808", "knobs:sink must lie between -2**63 and 2**63, not '9223372036854775808'."),
        ("knobs:unit=frames", "Did you mean 'frame'?"),
        ("knobs:deep=perhaps", "on or off"),
        ("knobs:layers=1/x", "whole number"),
    ],
)
def test_a_wrong_parameter_is_one_sentence_with_the_remedy(given: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        build(Knobs, parse(given), "method")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


ANSWER = AnswerSpec(
    model="m", revision=None, weights_hash="0", method="full", method_params={}, suite="s", suite_version="1",
    suite_params={}, prompt_style="plain", frames=8, sampler="endpoints", fps=None, max_pixels=None, min_pixels=None,
    decoder="decord", attention="sdpa", dtype="float32", device_type="cpu", max_new_tokens=16, seed=0,
)  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(AnswerSpec)])
def test_every_field_that_can_change_an_answer_changes_the_folder(field: str) -> None:
    value = getattr(ANSWER, field)
    other: Any = {"a": 1} if isinstance(value, dict) else f"{value}x" if isinstance(value, str) else (value or 0) + 1
    assert dataclasses.replace(ANSWER, **{field: other}).folder != ANSWER.folder


def test_the_folder_is_the_same_in_every_process() -> None:
    swapped = dataclasses.replace(ANSWER, method_params={"b": 1, "a": 2})
    assert swapped.hash == dataclasses.replace(ANSWER, method_params={"a": 2, "b": 1}).hash
    assert re.fullmatch(r"s/m/full-[0-9a-f]{10}", ANSWER.folder)
