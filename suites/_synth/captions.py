"""Text between the frames of a scene: a time stamp and a sentence after every few frames, a few of them worth finding.

Most sentences say nothing (the wind is calm); in a remark an animal says a number. No animal and no number comes twice.
A needle then lies in the frames, in the text, or in both: who speaks at the red circle?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmbench.suites._synth.questions import NUMBERS, Question, ask, questions
from vlmbench.suites._synth.scene import Scene

EVERY = 2
"""Frames from one caption to the next: 33 visual tokens of LLaVA-OneVision, 16 of Qwen2.5-VL."""
WORDS = 12
"""Of every caption."""
ANIMAL_WORD, NUMBER_WORD = 7, 9
"""Which words of a remark are its own."""
REMARKS = 4
"""In a video; fewer when it has fewer captions."""
MAX_FRAMES = 1000
"""A time stamp has three digits."""
ANIMALS = ("cat", "dog", "fox", "owl", "bee", "cow", "hen", "pig")
SUBJECTS = ("wind", "rain", "road", "river", "wall", "field")
STATES = ("calm", "slow", "warm", "grey", "dry", "still")
FROM_FRAMES = ("colour", "shape", "place")
"""Types of `synthvideo` that are asked here as well."""
TEMPLATES = {
    "says": "what number does the {animal} say ?",
    "speaker": "which animal says {number} ?",
    "beside": "which animal speaks at the {color} {shape} ?",
}
TEXT_TYPES = tuple(TEMPLATES)
TYPES = (*FROM_FRAMES, *TEXT_TYPES)

CAPTION_VOCABULARY = tuple(
    dict.fromkeys(
        [word for template in TEMPLATES.values() for word in template.split() if "{" not in word]
        + ["at", "and", "now", "the", "says", "to", "us", "is", "as", "ever"]
        + [*"0123456789", *ANIMALS, *SUBJECTS, *STATES, *NUMBERS]
    )
)
"""Every word of a caption or of a question about one."""


@dataclass(frozen=True)
class Remark:
    caption: int
    """Which one it is, from 0; it follows frame EVERY · (caption + 1) - 1."""
    animal: str
    number: str


def make_remarks(scene: Scene) -> tuple[Remark, ...]:
    """In order of time. Half of them, as far as they go, follow the frames in which an event is seen last."""
    rng = np.random.Generator(np.random.PCG64([scene.seed, scene.n_frames, 5]))
    n_captions = len_captions(scene.n_frames)
    n = min(REMARKS, n_captions)
    ends = rng.permutation(sorted({caption_after(event.stop - 1) for event in scene.events})).tolist()
    places = ends[: (n + 1) // 2]
    others = [c for c in rng.permutation(n_captions).tolist() if c not in places]
    places = sorted(places + others[: n - len(places)])
    animals, numbers = rng.permutation(len(ANIMALS)).tolist(), rng.permutation(len(NUMBERS)).tolist()
    return tuple(
        Remark(place, ANIMALS[animal], NUMBERS[number])
        for place, animal, number in zip(places, animals, numbers, strict=False)
    )


def len_captions(n_frames: int) -> int:
    """Captions of a video: one after every EVERY frames and one after what is left."""
    return -(-n_frames // EVERY)


def caption_after(frame: int) -> int:
    """The first caption that follows this frame."""
    return frame // EVERY


def captions(scene: Scene, remarks: Sequence[Remark]) -> list[str]:
    """All captions of the scene in order, `WORDS` words each."""
    rng = np.random.Generator(np.random.PCG64([scene.seed, scene.n_frames, 6]))
    said = {remark.caption: remark for remark in remarks}
    texts = []
    for caption in range(len_captions(scene.n_frames)):
        digits = " ".join(f"{caption * EVERY:03d}")
        subject, state = SUBJECTS[int(rng.integers(len(SUBJECTS)))], STATES[int(rng.integers(len(STATES)))]
        remark = said.get(caption)
        words = f"{remark.animal} says {remark.number} to us" if remark else f"{subject} is {state} as ever"
        texts.append(f"at {digits} and now the {words}")
    return texts


def mixed_questions(scene: Scene, remarks: Sequence[Remark], rng: np.random.Generator) -> list[Question]:
    """All that can be asked about the frames, the captions, and both together."""
    found = [question for question in questions(scene, rng) if question.type in FROM_FRAMES]
    for remark in remarks:
        found.append(_ask("says", remark.number, len(NUMBERS), animal=remark.animal))
        found.append(_ask("speaker", remark.animal, len(ANIMALS), number=remark.number))
    for event in scene.events:
        # A shape that two captions follow must not leave open which of them is meant.
        during = {caption_after(frame) for frame in range(event.start, event.stop)}
        heard = [remark for remark in remarks if remark.caption in during]
        others = {caption_after(other.stop - 1) for other in scene.events if other is not event}
        if len(heard) == 1 and heard[0].caption == caption_after(event.stop - 1) and heard[0].caption not in others:
            found.append(_ask("beside", heard[0].animal, len(ANIMALS), color=event.colour, shape=event.shape))
    return found


def _ask(kind: str, answer: str, n_answers: int, **slots: str) -> Question:
    return ask(kind, TEMPLATES[kind], answer, n_answers, **slots)
