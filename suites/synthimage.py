"""Generated pictures of one to four coloured shapes, with questions of colour, shape, place and number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.spec import nearest
from vlmbench.suite import Media, Sample, Score, Suite
from vlmbench.suites._synth.files import ensure, media_path, source_hash

if TYPE_CHECKING:
    from vlmbench.suites._synth.scene import Scene

PICTURES = {"test": 200, "train": 2000}
"""The first 200 of the train split are what they always were; methods that train need the others."""
QUESTIONS = 3


@dataclass(frozen=True)
class SynthImage(Suite):
    """`synthvideo` with one picture: the same shapes, colours, places and scorer. Clusters are pictures."""

    name: ClassVar[str] = "synthimage"
    version: ClassVar[str] = "1"
    default_model: ClassVar[str] = "tiny-llava-ov"
    max_new_tokens: ClassVar[int] = 24

    type: str | None = None

    def __post_init__(self) -> None:
        from vlmbench.suites._synth.questions import IMAGE_TYPES

        if self.type is not None and self.type not in IMAGE_TYPES:
            known = ", ".join(IMAGE_TYPES)
            raise UsageError(
                f"synthimage:type must be one of {known}, not {self.type!r}.{nearest(self.type, IMAGE_TYPES)}"
            )

    @property
    def data_hash(self) -> str:
        return source_hash("questions", "picking")

    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        from vlmbench.suites._synth.picking import pick
        from vlmbench.suites._synth.questions import IMAGE_TYPES

        scenes = self._scenes(split)
        types = IMAGE_TYPES if self.type is None else (self.type,)
        found = []
        for index, (scene, asked) in enumerate(zip(scenes, pick(scenes, QUESTIONS, types), strict=True)):
            cluster = f"synthimage-{index:04d}" + ("" if split == "test" else "-train")
            path = media_path(self.name, self.version, split, f"{index:04d}.png")
            for number, question in enumerate(asked):
                found.append(
                    Sample(
                        id=f"{cluster}-{number}-{question.type}",
                        cluster=cluster,
                        media=(Media("image", path),),
                        question=question.text,
                        answer=question.answer,
                        template=question.template,
                        strata={"type": question.type},
                        extra={"seed": scene.seed},
                    )
                )
        return found

    def _scenes(self, split: str) -> list[Scene]:
        from vlmbench.suites._synth.scene import TEST_SEED, make_image

        first = TEST_SEED if split == "test" else 0
        return [make_image(first + i) for i in range(PICTURES[split])]

    def materialise(self, sample: Sample) -> None:
        from vlmbench.suites._synth.scene import make_image

        ensure(make_image(sample.extra["seed"]), sample.media[0].path)

    def score(self, sample: Sample, text: str) -> Score:
        from vlmbench.suites._synth.scoring import read_answer

        return Score(*read_answer(sample.strata["type"], text, sample.answer))
