"""Questions about a scene, with their answers, in a small fixed vocabulary. (How texts are scored is in `scoring`.)

A question is only asked when it has exactly one answer, and its words say nothing about which of the possible answers
is right: colours, shapes, places and directions are drawn symmetrically, and candidates are listed in random order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmbench.suites._synth.scene import COLOURS, DIRECTIONS, PLACES, SHAPES, Event, Scene

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CANDIDATES = 4
"""Events named in a `which_first` question."""
LIST_EVENTS = 5
"""A `list` question needs at least so many events, so that its answer takes several decoding steps."""

TEMPLATES = {
    "colour": "what color is the {shape} ?",
    "shape": "what shape is the {color} thing ?",
    "place": "where is the {color} {shape} ?",
    "first": "what color is the first shape ?",
    "last": "what color is the last shape ?",
    "before": "what color comes before the {color} {shape} ?",
    "after": "what color comes after the {color} {shape} ?",
    "which_first": "which comes first {a} or {b} or {c} or {d} ?",
    "motion": "which way does the {color} {shape} move ?",
    "count": "how many shapes appear ?",
    "list": "list the colors in order ?",
}
TYPES = tuple(TEMPLATES)
IMAGE_TYPES = ("colour", "shape", "place", "count")
HAYSTACK_TYPES = ("colour", "shape", "place", "motion")
MIN_FRAMES = {"before": 2, "after": 2, "motion": 3, "which_first": 4, "list": LIST_EVENTS}
"""Shortest video in which a type can be asked; the others need one frame."""

VOCABULARY = tuple(
    dict.fromkeys(
        [word for template in TEMPLATES.values() for word in template.split() if "{" not in word]
        + [*COLOURS, *SHAPES, *PLACES, *DIRECTIONS, *NUMBERS]
    )
)
"""Every word that any question or answer holds, in a fixed order."""


class Question(NamedTuple):
    type: str
    template: str
    """The text with its slots open, as in ``where is the {color} {shape} ?``."""
    text: str
    answer: str
    n_answers: int
    """Answers that are (about) equally likely before the video is seen."""


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All that can be asked about this scene; `rng` picks and orders the candidates of `which_first`."""
    events = scene.events
    found: list[Question] = []
    for event in events:
        if _only([e.shape for e in events], event.shape):
            found.append(_ask("colour", event.colour, len(COLOURS), shape=event.shape))
        if _only([e.colour for e in events], event.colour):
            found.append(_ask("shape", event.shape, len(SHAPES), color=event.colour))
        found.append(_ask("place", event.place, len(PLACES), color=event.colour, shape=event.shape))
        if event.motion:
            found.append(_ask("motion", event.motion, len(DIRECTIONS), color=event.colour, shape=event.shape))
    found.append(_ask("count", NUMBERS[len(events) - 1], CANDIDATES))
    return found + (_order(events, rng) if scene.kind == "video" else [])


def sample_questions(found: Iterable[Question], rng: np.random.Generator, k: int) -> list[Question]:
    """Up to `k` different ones: a type at random among those left, then one of it. Types come as equally as they can."""
    by_type: dict[str, list[Question]] = {}
    for question in found:
        by_type.setdefault(question.type, []).append(question)
    chosen: list[Question] = []
    while by_type and len(chosen) < k:
        kind = list(by_type)[int(rng.integers(len(by_type)))]
        left = by_type[kind]
        chosen.append(left.pop(int(rng.integers(len(left)))))
        if not left:
            del by_type[kind]
    return chosen


def _order(events: Sequence[Event], rng: np.random.Generator) -> list[Question]:
    """Questions about what came when."""
    n = len(COLOURS)
    found = [_ask("first", events[0].colour, n), _ask("last", events[-1].colour, n)]
    for earlier, later in itertools.pairwise(events):
        found.append(_ask("before", earlier.colour, n, color=later.colour, shape=later.shape))
        found.append(_ask("after", later.colour, n, color=earlier.colour, shape=earlier.shape))
    if len(events) >= CANDIDATES:
        for _ in events:
            picked = rng.permutation(len(events))[:CANDIDATES].tolist()
            slots = {slot: _name(events[i]) for slot, i in zip("abcd", picked, strict=True)}
            found.append(_ask("which_first", _name(events[min(picked)]), CANDIDATES, **slots))
    if len(events) >= LIST_EVENTS:
        found.append(_ask("list", " ".join(event.colour for event in events), n ** len(events)))
    return found


def ask(kind: str, template: str, answer: str, n_answers: int, **slots: str) -> Question:
    """The question with its slots filled."""
    return Question(kind, template, template.format(**slots), answer, n_answers)


def _ask(kind: str, answer: str, n_answers: int, **slots: str) -> Question:
    return ask(kind, TEMPLATES[kind], answer, n_answers, **slots)


def _name(event: Event) -> str:
    return f"{event.colour} {event.shape}"


def _only(values: list[str], value: str) -> bool:
    return values.count(value) == 1
