"""Reading an answer from free text, without a judge: one known answer word, or none that counts."""

from __future__ import annotations

import itertools
import re

from vlmbench.suites._synth.captions import ANIMALS
from vlmbench.suites._synth.questions import NUMBERS
from vlmbench.suites._synth.scene import COLOURS, DIRECTIONS, PLACES, SHAPES

_SINGLE = {
    "colour": COLOURS,
    "shape": SHAPES,
    "place": PLACES,
    "first": COLOURS,
    "last": COLOURS,
    "before": COLOURS,
    "after": COLOURS,
    "motion": DIRECTIONS,
    "count": NUMBERS,
    "says": NUMBERS,
    "speaker": ANIMALS,
    "beside": ANIMALS,
}
_NUMERIC = ("count", "says")
"""Types whose answer may be written as a digit."""
_DIGITS = {str(i): word for i, word in enumerate(NUMBERS, 1)}


def normalise(text: str) -> str:
    """Lower case, punctuation to blanks, blanks collapsed; ``top-left`` and ``top left`` become ``topleft``."""
    text = " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())
    return re.sub(r"\b(top|bottom) (left|right)\b", r"\1\2", text)


def read_answer(kind: str, text: str, answer: str) -> tuple[float, str | None]:
    """(score, prediction) of a text for a question of type `kind`.

    An exact match counts at once. Otherwise only the text up to its first newline or full stop is read, and it must name
    exactly one of the possible answers: "red or blue" is no answer. A list is the sequence of its colour words, right as
    a whole or not at all.
    """
    if normalise(text) == normalise(answer):
        return 1.0, normalise(answer)
    words = normalise(re.split(r"[\n.]", text.strip(), maxsplit=1)[0]).split()
    if kind == "list":
        prediction: str | None = " ".join(word for word in words if word in COLOURS) or None
    elif kind == "which_first":
        pairs = itertools.pairwise(words)
        prediction = _unique({f"{colour} {shape}" for colour, shape in pairs if colour in COLOURS and shape in SHAPES})
    else:
        named = {_DIGITS.get(word, word) if kind in _NUMERIC else word for word in words}
        prediction = _unique(named & set(_SINGLE[kind]))
    return float(prediction == answer), prediction


def _unique(found: set[str]) -> str | None:
    return found.pop() if len(found) == 1 else None
