"""VQA accuracy: the official normalisation of short answers, and agreement with ten annotators, one left out at a time.

Goyal et al. 2017 (VQA v2), https://visualqa.org/evaluation.html; TextVQA is scored alike but takes words apart first. We
normalise both sides always; the official script leaves them as they are when all ten annotators agree to the letter.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've
you'd you'd've you'll you're you've
"""
"""Those whose form without an apostrophe is no word of its own ("well" and "ill" are)."""


def normalise(text: str, *, tokenise: bool = False) -> str:
    """Lower case, numbers as digits, no articles, no punctuation, contractions with their apostrophes.

    With `tokenise`, as for TextVQA, commas and question marks go first and a possessive 's becomes a word.
    """
    text = " ".join(text.split())
    if tokenise:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_apostrophes().get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, how many of the others said it / 3); both sides normalised already."""
    same = [answer == said for answer in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same) if same else 0.0


def vqa_score(text: str, answers: Sequence[str], *, tokenise: bool = False) -> tuple[float, str | None]:
    """(accuracy, what was read) of a text; a text that nothing is left of is not read."""
    said = normalise(text, tokenise=tokenise)
    if not said:
        return 0.0, None
    return vqa_accuracy(said, [normalise(answer, tokenise=tokenise) for answer in answers]), said


def exact(text: str) -> str:
    """What GQA compares: lower case, no punctuation, single blanks."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _without_punctuation(text: str) -> str:
    """A sign goes when a blank is beside it somewhere (or the text has a number like 1,000), else it becomes a blank."""
    number = re.search(r"\d,+\d", text) is not None
    out = text
    for sign in _PUNCTUATION:
        beside = f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if beside or number else " ")
    return re.sub(r"\.(?!\d)", "", out)


@cache
def _apostrophes() -> dict[str, str]:
    """Each contraction with one of its apostrophes forgotten -> as it should be."""
    return {
        word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, char in enumerate(word) if char == "'"
    }
