"""The letter that a text answers a multiple-choice question with, or none: never a guess, and never the first capital.

Tried in this order: the whole text, or its first line alone, is a letter; it starts with one ("B. a dog"); "answer is B" or
"boxed{B}"; it is one option's own words; exactly one letter stands in brackets, or as a word of its own. Two letters with
equal claim are none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
_NO_ARTICLE = "because|since|as|is|was|and|or|nor|but|vs"
"""Words that may follow the letter A; after the article "a" comes another word."""


def read_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of one of the `options` (their texts, without letters), or None when the text names none or several."""
    text = text.rpartition("</think>")[2].strip()
    known = LETTERS[: len(options)]
    any_case = f"[{known}{known.lower()}]"
    if found := re.fullmatch(rf"[\W_]*({any_case})[\W_]*", text):
        return found[1].upper()
    alone = [re.fullmatch(rf"[\W_]*({any_case})[\W_]*", line) for line in text.splitlines()]
    if alone and alone[0] and sum(map(bool, alone)) == 1:  # an explanation follows
        return alone[0][1].upper()
    # "A) and B)" starts with a letter too, but does not choose it; "A.M." is no letter.
    more = rf"(?!\s*(?:and|or|&|/)\s*\W?{any_case}\b)"
    if found := re.match(rf"[\W_]*(?:([{known}])[.):](?!\w\.)|\(({any_case})\)){more}", text):
        return (found[1] or found[2]).upper()
    if cued := _cued(text, known):
        return cued.pop() if len(cued) == 1 else None
    if (named := _option(text, options)) is not None:
        return LETTERS[named]
    for letters in (_bracketed(text, any_case), _alone(text, known)):
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def option_text(option: str) -> str:
    """An option without the letter that some files put before it: "B. a dog" is "a dog"."""
    return re.sub(r"^\s*\(?[A-J][.):]\s*", "", option).strip()


def lettered(options: Sequence[str]) -> list[str]:
    """``["A. a cat", "B. a dog"]``."""
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def _cued(text: str, known: str) -> set[str]:
    """Letters that follow "answer is", "answer:", "option is", "boxed{"; a small one too, if it can be no article."""
    cue = r"(?:\b(?:answer|choice|option)\b\s*(?:is|would be|should be|must be|[:=])|\\boxed\{|\\text\{)"
    filler = r"[\W_]*(?:(?:option|choice|letter)\b[\W_]*)?(?:\\(?:boxed|text)\{[\W_]*)?"
    pattern = re.compile(rf"(?i:{cue}{filler})([{known}{known.lower()}])(?![\w'’])")
    found = [(match[1].upper(), text[match.end() :]) for match in pattern.finditer(text)]
    return {letter for letter, rest in found if letter != "A" or not _article(rest)}


def _option(text: str, options: Sequence[str]) -> int | None:
    """The number of the option whose words are all of the text, if it is one."""
    said = _plain(text)
    same = [i for i, option in enumerate(options) if said and _plain(option) == said]
    return same[0] if len(same) == 1 else None


def _bracketed(text: str, any_case: str) -> set[str]:
    return {letter.upper() for letter in re.findall(rf"\(({any_case})\)", text)}


def _alone(text: str, known: str) -> set[str]:
    """Capitals that are words of their own: not in a name, not an abbreviation, not an article, not negated."""
    pattern = re.compile(rf"(?<![\w.'’-])(?<!\b[Nn]ot )([{known}])(?![\w'’-])(?!\.\w)")
    found = [(match[1], text[match.end() :]) for match in pattern.finditer(text)]
    return {letter for letter, rest in found if letter != "A" or not _article(rest)}


def _article(rest: str) -> bool:
    """Whether what follows an A makes it the article: a word that is none of those that follow the letter."""
    return re.match(rf"[ \t]+(?!(?:{_NO_ARTICLE})\b)[a-z]", rest) is not None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())
