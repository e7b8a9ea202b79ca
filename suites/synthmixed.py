"""Generated videos with text between the frames: time stamps and remarks; what is asked for lies in either, or in both.

The videos are those of `synthvideo`; a quarter of a prompt of LLaVA-OneVision is text, and two fifths of one of Qwen2.5-VL.
Clusters are videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.spec import nearest
from vlmbench.suite import Caption, Media, Sample, Score, Suite
from vlmbench.suites._synth.files import ensure, media_path, source_hash

if TYPE_CHECKING:
    from vlmbench.suites._synth.scene import Scene

LENGTHS = (128,)
"""Frames of a video."""
VIDEOS = 200
"""Of a length, in either split."""
QUESTIONS = 3


@dataclass(frozen=True)
class SynthMixed(Suite):
    """`length` frames a video (128 when none is named); `type` asks one type of question only.

    `colour`, `shape` and `place` are seen, `says` and `speaker` are read, and `beside` needs both.
    """

    name: ClassVar[str] = "synthmixed"
    version: ClassVar[str] = "1"
    default_model: ClassVar[str] = "tiny-llava-ov"

    length: int | None = None
    type: str | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            from vlmbench.suites._synth.captions import MAX_FRAMES

            if not 2 <= self.length <= MAX_FRAMES:
                raise UsageError(f"{self.name}:length must be from 2 to {MAX_FRAMES} frames, not {self.length}.")
        if self.type is not None and self.type not in self._types:
            known = ", ".join(self._types)
            raise UsageError(
                f"{self.name}:type must be one of {known}, not {self.type!r}.{nearest(self.type, self._types)}"
            )

    @cached_property
    def _types(self) -> tuple[str, ...]:
        from vlmbench.suites._synth.captions import TYPES

        return TYPES

    @property
    def data_hash(self) -> str:
        return source_hash("questions", "picking", "captions")

    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        return self._test if split == "test" else list(self._make("train"))

    @cached_property
    def _test(self) -> list[Sample]:
        return list(self._make("test"))

    def _make(self, split: Literal["test", "train"]) -> Iterator[Sample]:
        from vlmbench.suites._synth.captions import make_remarks, mixed_questions
        from vlmbench.suites._synth.picking import pick
        from vlmbench.suites._synth.scene import TEST_SEED, make_scene

        first = TEST_SEED if split == "test" else 0
        types = self._types if self.type is None else (self.type,)
        for length in LENGTHS if self.length is None else (self.length,):
            scenes = [make_scene(first + i, length) for i in range(VIDEOS)]
            picked = pick(scenes, QUESTIONS, types, lambda scene, rng: mixed_questions(scene, make_remarks(scene), rng))
            for index, (scene, asked) in enumerate(zip(scenes, picked, strict=True)):
                cluster = f"{self.name}-{length}-{index:04d}" + ("" if split == "test" else "-train")
                path = media_path(self.name, self.version, split, str(length), f"{index:04d}.mp4")
                between = _captions(scene)
                for number, question in enumerate(asked):
                    yield Sample(
                        id=f"{cluster}-{number}-{question.type}",
                        cluster=cluster,
                        media=(Media("video", path),),
                        question=question.text,
                        answer=question.answer,
                        template=question.template,
                        strata={"length": str(length), "type": question.type},
                        extra={"seed": scene.seed},
                        captions=between,
                    )

    def materialise(self, sample: Sample) -> None:
        from vlmbench.suites._synth.scene import make_scene

        ensure(make_scene(sample.extra["seed"], int(sample.strata["length"])), sample.media[0].path)

    def score(self, sample: Sample, text: str) -> Score:
        from vlmbench.suites._synth.scoring import read_answer

        return Score(*read_answer(sample.strata["type"], text, sample.answer))


def _captions(scene: Scene) -> tuple[Caption, ...]:
    """Every caption midway between the last frame that it covers and the next one."""
    from vlmbench.suites._synth.captions import EVERY, captions, make_remarks
    from vlmbench.suites._synth.encode import FPS

    texts = captions(scene, make_remarks(scene))
    return tuple(Caption((EVERY * (i + 1) - 0.5) / FPS, text) for i, text in enumerate(texts))
