"""A letter is read where a text names one, and nowhere else: what names none or two is wrong, and never a guess."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbench.suites._official.choices import LETTERS, lettered, option_text, read_letter

OPTIONS = ("a cat", "a dog", "three birds", "none of the above")
letters = st.sampled_from(LETTERS[: len(OPTIONS)])
prose = st.lists(
    st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=2, max_size=8), min_size=1, max_size=12
).map(" ".join)
"""Words of two small letters at least: no letter stands alone in it."""


@pytest.mark.parametrize(
    "text",
    [
        "B", "b", "B.", "(b)", "(B)", "[B]", "**B**", " B \n", "B)", "B:", "B. a dog", "B) a dog", "B.a dog",
        "(b) a dog", "The answer is B", "The answer is B.", "the answer is b", "Answer: B", "**Answer:** B",
        "Answer:\nB", "answer = B", "The best answer is: B", "The correct option is (B).", "The answer is option B",
        "\\boxed{B}", "It's B", "B, because", "a dog", "A dog.", "Because it barks, (b)", "<think>A? C? no</think>B",
        "Not A, but B", "I think B is right", "Option A is wrong, option C is wrong. The answer is B.",
    ],
)  # fmt: skip
def test_a_text_that_names_b_is_b(text: str) -> None:
    assert read_letter(text, OPTIONS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "", "Because y", "Because it is a dog and barks", "A bird flies", "The answer is a bird", "cat and dog", "E",
        "(e)", "...", "A or B", "A and B", "A) and B)", "(A) or (C)", "Both B and C are right", "Not B",
        "The answer is A. No, the answer is C.", "At 9 A.M.", "Plan-B", "B's", "ABCD", "DABC is it",
        "Dogs Bark At Cats", "The answer is Dogs",
    ],
)  # fmt: skip
def test_a_text_that_names_none_or_two_is_nothing(text: str) -> None:
    assert read_letter(text, OPTIONS) is None


def test_the_letter_a_is_told_from_the_article() -> None:
    for text in (
        "A",
        "a.",
        "(a)",
        "The answer is A",
        "The answer is A because it meows",
        "A is right",
        "the answer is a",
    ):
        assert read_letter(text, OPTIONS) == "A", text
    for text in ("A bird flies", "The answer is A bird", "I see A bird"):
        assert read_letter(text, OPTIONS) is None, text


@given(letters, prose)
def test_what_is_said_after_a_leading_letter_or_before_a_cue_changes_nothing(letter: str, words: str) -> None:
    assert read_letter(f"{letter}. {words}", OPTIONS) == letter
    assert read_letter(f"{words}. The answer is {letter}.", OPTIONS) == letter
    assert read_letter(f"{words} ({letter.lower()}) {words}", OPTIONS) == letter


@given(prose)
def test_prose_is_no_answer(words: str) -> None:
    assert read_letter(words, OPTIONS) is None
    assert read_letter(words.capitalize(), OPTIONS) is None
    assert read_letter(words.title(), OPTIONS) is None


@given(st.text(max_size=60))
def test_any_text_gives_one_of_the_letters_in_it_or_none_and_always_the_same(text: str) -> None:
    letter = read_letter(text, OPTIONS)
    assert letter == read_letter(text, OPTIONS)
    assert letter in (None, *LETTERS[: len(OPTIONS)])
    if letter is not None and text.strip().lower() not in OPTIONS:
        assert re.search(letter, text, re.IGNORECASE)


@given(letters, st.sampled_from(["{}", "({})", "{}.", "The answer is {}", "**{}**"]), st.sampled_from(" \n\t"))
def test_blanks_around_a_text_change_nothing(letter: str, form: str, blank: str) -> None:
    text = form.format(letter)
    assert read_letter(f"{blank}{text}{blank}{blank}", OPTIONS) == read_letter(text, OPTIONS) == letter


@given(st.integers(2, 8))
def test_only_letters_that_have_an_option_count(n: int) -> None:
    options = [f"thing {i}" for i in range(n)]
    assert [read_letter(letter, options) for letter in LETTERS[:n]] == list(LETTERS[:n])
    assert read_letter(LETTERS[n], options) is None
    assert lettered(options)[-1] == f"{LETTERS[n - 1]}. thing {n - 1}"


def test_an_option_that_two_letters_share_is_nobodys() -> None:
    assert read_letter("red", ("red", "red", "blue")) is None
    assert read_letter("blue", ("red", "red", "blue")) == "C"


def test_an_options_own_letter_is_taken_off() -> None:
    assert [option_text(text) for text in ("B. a dog", "(B) a dog", "B) a dog", "a dog")] == ["a dog"] * 4
    assert option_text("A.") == ""


def test_a_letter_on_the_first_line_is_the_answer_whatever_explains_it() -> None:
    options = ["cat", "dog", "bird"]
    assert read_letter("B\nBecause A is no animal", options) == "B"
    assert read_letter("**(c)**\n\nA and B are wrong.", options) == "C"
    assert read_letter("A\nB\nC", options) is None
