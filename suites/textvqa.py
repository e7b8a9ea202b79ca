"""TextVQA (validation): 5,000 questions on text in pictures, ten answers each, scored as VQA v2 after taking words apart.

Singh et al., CVPR 2019. LLaVA's papers put the text that an OCR program found into the prompt, others do not, and the numbers
differ: `ocr` says which. lmms-eval lower-cases all of a question but its first letter; that is in `prompt=lmms-eval` alone.
Clusters are pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vlmbench.errors import UsageError
from vlmbench.suite import Media, Sample, Score
from vlmbench.suites._official import data
from vlmbench.suites._official.base import OfficialSuite, short_answer
from vlmbench.suites._official.data import Table
from vlmbench.suites._official.vqa import vqa_score

OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"


@dataclass(frozen=True)
class TextVQA(OfficialSuite):
    """`ocr` adds a line with the words that the data set's OCR program found in the picture."""

    name: ClassVar[str] = "textvqa"
    version: ClassVar[str] = "1"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/textvqa", "lmms-lab/textvqa")
    layouts: ClassVar[Mapping[str, str]] = {
        "parquet": "validation/*.parquet",
        "hub": "data/validation-*.parquet",
        "json": "TextVQA_0.5.1_val.json",
    }
    archives: ClassVar[tuple[str, ...]] = ("train_val_images.zip",)
    size: ClassVar[str] = "920 MB: 5,000 questions with pictures"
    wanted: ClassVar[str] = "data/validation-*"
    n_rows: ClassVar[int] = 5000
    lmms_task: ClassVar[str] = "textvqa_val"

    ocr: bool = False

    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        if layout != "json":
            return data.read_parquet(files, folder)
        rows = [dict(row) for row in data.read_json(files[0])["data"]]
        if self.ocr:
            found = Table(data.read_json(folder / OCR)["data"], str(folder / OCR)).require("image_id", "ocr_tokens")
            words = {row["image_id"]: row["ocr_tokens"] for row in found.rows}
            rows = [row | {"ocr_tokens": words.get(row.get("image_id"), [])} for row in rows]
        return Table(rows, str(files[0]), folder)

    def _hub(self, revision: str) -> Table:
        return data.from_hub(self.hub, revision, None, "validation")

    def _samples(self, table: Table) -> Iterator[Sample]:
        table.require("question_id", "question", "image_id", "answers", *(["ocr_tokens"] if self.ocr else []))
        folder = table.folder or Path()
        for number, row in enumerate(table.rows):
            answers = tuple(map(str, row["answers"] or ()))
            if not answers:
                raise UsageError(
                    f"{table.origin} has no answers to {row['question_id']}; only validation can be scored."
                )
            asked = str(row["question"])
            if self.prompt == "lmms-eval":
                asked = asked.capitalize()
            if self.ocr:
                asked = f"{asked}\nReference OCR token: {', '.join(map(str, row['ocr_tokens']))}"
            picture = str(row["image_id"])
            file = Media(
                "image", folder / "train_images" / f"{picture}.jpg"
            )  # its pictures are among OpenImages' train
            yield Sample(
                id=str(row["question_id"]),
                cluster=picture,
                media=self._picture(table, picture) if table.picture else (file,),
                question=short_answer(asked),
                answer=Counter(answers).most_common(1)[0][0],
                template="textvqa",
                extra={"answers": answers, "picture": number},
            )

    def score(self, sample: Sample, text: str) -> Score:
        return Score(*vqa_score(text, sample.extra["answers"], tokenise=True))
