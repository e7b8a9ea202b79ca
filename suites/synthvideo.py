"""Generated videos of coloured shapes at random moments, with questions of what, where, when and in which order.

Deterministic from seeds: rendered, encoded as H.264 and decoded again like any video. Test seeds are disjoint from training
seeds. Clusters are videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.spec import LATER, nearest
from vlmbench.suite import Media, Sample, Score, Suite
from vlmbench.suites._synth.files import ensure, media_path, source_hash

if TYPE_CHECKING:
    from vlmbench.suites._synth.scene import Scene

LENGTHS = (32, 128, 384)
"""Frames of a video."""
VIDEOS = {384: 60}
"""Test videos of a length; 200 of every other one."""
TRAIN_VIDEOS = 200
QUESTIONS = 3
MAX_LENGTH = 100_000


@dataclass(frozen=True)
class SynthVideo(Suite):
    """`length` frames a video (32, 128 and 384 when none is named); `type` asks one type of question only.

    With `depth`, each video holds a single event at that relative depth: for maps of length × depth. With `cuts`, the
    background of each video changes that often and its events and questions stay; by default one video in three has 1 to 3.
    """

    name: ClassVar[str] = "synthvideo"
    version: ClassVar[str] = "1"
    default_model: ClassVar[str] = "tiny-llava-ov"
    max_new_tokens: ClassVar[int] = 24

    length: int | None = None
    type: str | None = None
    depth: float | None = None
    cuts: int | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if self.length is not None and not 1 <= self.length <= MAX_LENGTH:
            raise UsageError(f"{self.name}:length must be from 1 to {MAX_LENGTH} frames, not {self.length}.")
        if self.type is not None and self.type not in self._types:
            known = ", ".join(self._types)
            raise UsageError(
                f"{self.name}:type must be one of {known}, not {self.type!r}.{nearest(self.type, self._types)}"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UsageError(f"{self.name}:depth must be from 0 (start) to 1 (end), not {self.depth}.")
        if self.depth is not None and self.length is None:
            raise UsageError(f"{self.name}:depth needs a length; write {self.name}:length=128,depth={self.depth}.")
        if self.cuts is not None and self.length is None:
            raise UsageError(f"{self.name}:cuts needs a length; write {self.name}:length=128,cuts={self.cuts}.")
        if self.cuts is not None and self.length is not None and not 0 <= self.cuts < self.length:
            raise UsageError(
                f"{self.name}:cuts must be from 0 to {self.length - 1} in {self.length} frames, not {self.cuts}."
            )

    @cached_property
    def _types(self) -> tuple[str, ...]:
        from vlmbench.suites._synth.questions import HAYSTACK_TYPES, TYPES

        return TYPES if self.depth is None else HAYSTACK_TYPES

    @property
    def _lengths(self) -> tuple[int, ...]:
        return LENGTHS if self.length is None else (self.length,)

    @property
    def data_hash(self) -> str:
        return source_hash("questions", "picking", *(() if self.cuts is None else ("cuts",)))

    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        return self._test if split == "test" else list(self._make("train"))

    @cached_property
    def _test(self) -> list[Sample]:
        return list(self._make("test"))

    def _make(self, split: Literal["test", "train"]) -> Iterator[Sample]:
        from vlmbench.suites._synth.picking import pick

        types = self._types if self.type is None else (self.type,)
        for length in self._lengths:
            scenes = self._scenes(split, length)
            for index, (scene, asked) in enumerate(zip(scenes, pick(scenes, QUESTIONS, types), strict=True)):
                depth = "" if self.depth is None else f"-at{self.depth:g}"
                cuts = "" if self.cuts is None else f"-cuts{self.cuts}"
                video = f"{length}{depth}{cuts}"
                cluster = f"{self.name}-{video}-{index:04d}" + ("" if split == "test" else "-train")
                made_by = "" if self.cuts is None else f"-{source_hash('cuts')}"
                path = media_path(self.name, self.version, split, f"{video}{made_by}", f"{index:04d}.mp4")
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
                    )

    def _scenes(self, split: str, length: int) -> list[Scene]:
        from vlmbench.suites._synth.scene import TEST_SEED

        n = VIDEOS.get(length, 200) if split == "test" else TRAIN_VIDEOS
        first = TEST_SEED if split == "test" else 0
        return [self._scene(first + i, length) for i in range(n)]

    def _scene(self, seed: int, length: int) -> Scene:
        from vlmbench.suites._synth.cuts import with_cuts
        from vlmbench.suites._synth.scene import make_haystack, make_scene

        scene = make_scene(seed, length) if self.depth is None else make_haystack(seed, length, self.depth)
        return scene if self.cuts is None else with_cuts(scene, self.cuts)

    def materialise(self, sample: Sample) -> None:
        ensure(self._scene(sample.extra["seed"], int(sample.strata["length"])), sample.media[0].path)

    def score(self, sample: Sample, text: str) -> Score:
        from vlmbench.suites._synth.scoring import read_answer

        return Score(*read_answer(sample.strata["type"], text, sample.answer))
