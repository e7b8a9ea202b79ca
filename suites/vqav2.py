"""VQA v2 (validation): 214,354 questions on COCO pictures with ten answers each, scored by agreement with the annotators.

Goyal et al., CVPR 2017. The scorer is the official normalisation and the mean over ten leave-one-out sets of min(matches/3, 1).
The question alone has no official wording: a line that asks for a word or short phrase follows it, as in both harnesses.
Clusters are pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlmbench.errors import UsageError
from vlmbench.suite import Media, Sample, Score
from vlmbench.suites._official import data
from vlmbench.suites._official.base import OfficialSuite, picked, short_answer
from vlmbench.suites._official.data import Table
from vlmbench.suites._official.vqa import vqa_score

ANSWER_TYPES = ("yes/no", "number", "other")
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@dataclass(frozen=True)
class VQAv2(OfficialSuite):
    """`type` asks questions of one answer type only: yes/no, number or other."""

    name: ClassVar[str] = "vqav2"
    version: ClassVar[str] = "1"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2")
    layouts: ClassVar[Mapping[str, str]] = {
        "parquet": "validation/*.parquet",
        "hub": "data/validation-*.parquet",
        "json": "v2_OpenEnded_mscoco_val2014_questions.json",
    }
    archives: ClassVar[tuple[str, ...]] = (
        "val2014.zip",
        "v2_Questions_Val_mscoco.zip",
        "v2_Annotations_Val_mscoco.zip",
    )
    size: ClassVar[str] = (
        "214,354 questions with pictures: 6.6 GB as the official val2014.zip, unknown for the hub's files"
    )
    wanted: ClassVar[str] = "data/validation-*"
    n_rows: ClassVar[int] = 214_354
    lmms_task: ClassVar[str] = "vqav2_val"

    type: str | None = None

    def __post_init__(self) -> None:
        if self.type not in (None, *ANSWER_TYPES):
            raise UsageError(f"{self.name}:type must be one of {', '.join(ANSWER_TYPES)}, not {self.type!r}.")

    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        if layout != "json":
            return data.read_parquet(files, folder)
        questions = Table(data.read_json(files[0])["questions"], str(files[0])).require("question_id", "question")
        asked = {row["question_id"]: row["question"] for row in questions.rows}
        answered = Table(data.read_json(folder / ANNOTATIONS)["annotations"], str(folder / ANNOTATIONS), folder)
        answered.require("question_id")
        if odd := [row["question_id"] for row in answered.rows if row["question_id"] not in asked]:
            raise UsageError(f"{files[0]} lacks {len(odd)} questions that {ANNOTATIONS} answers; fetch both again.")
        rows = [row | {"question": asked[row["question_id"]]} for row in map(dict, answered.rows)]
        return Table(rows, str(files[0]), folder)

    def _hub(self, revision: str) -> Table:
        return data.from_hub(self.hub, revision, None, "validation")

    def _samples(self, table: Table) -> Iterator[Sample]:
        table.require("question_id", "question", "image_id", "answers", "answer_type", "question_type")
        table.require("multiple_choice_answer")
        for number, row in enumerate(table.rows):
            kind = picked(row, "answer_type", ANSWER_TYPES, table.origin)
            if self.type not in (None, kind):
                continue
            if not row["answers"]:
                raise UsageError(
                    f"{table.origin} has no answers to {row['question_id']}; only validation can be scored."
                )
            picture = str(row["image_id"])
            yield Sample(
                id=str(row["question_id"]),
                cluster=picture,
                media=self._picture(table, picture) if table.picture else (_file(table, picture),),
                question=short_answer(str(row["question"])),
                answer=str(row["multiple_choice_answer"]),
                template=str(row["question_type"]),
                strata={"answer_type": kind, "question_type": str(row["question_type"])},
                extra={"answers": tuple(str(each["answer"]) for each in row["answers"]), "picture": number},
            )

    def score(self, sample: Sample, text: str) -> Score:
        return Score(*vqa_score(text, sample.extra["answers"]))


def _file(table: Table, picture: str) -> Media:
    folder = table.folder or Path()
    return Media("image", folder / "val2014" / f"COCO_val2014_{int(picture):012d}.jpg")
