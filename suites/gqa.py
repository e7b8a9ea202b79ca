"""GQA (testdev, balanced): 12,578 questions about scenes, each with one right word or phrase.

Hudson and Manning, CVPR 2019. The scorer is exact match but for case and punctuation: "yes, it is" is wrong. Broken down as by
the official script: by structure and meaning of the question, and binary against open ones. Clusters are pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from vlmbench.errors import UsageError
from vlmbench.suite import Media, Sample, Score
from vlmbench.suites._official import data
from vlmbench.suites._official.base import OfficialSuite, short_answer
from vlmbench.suites._official.data import Table
from vlmbench.suites._official.vqa import exact

PICTURES = ("images.parquet", "testdev_balanced_images/*.parquet")


@dataclass(frozen=True)
class GQA(OfficialSuite):
    name: ClassVar[str] = "gqa"
    version: ClassVar[str] = "1"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
    layouts: ClassVar[Mapping[str, str]] = {
        "parquet": "instructions.parquet",
        "hub": "testdev_balanced_instructions/*.parquet",
        "json": "testdev_balanced_questions.json",
        "zip": "questions1.2/testdev_balanced_questions.json",
    }
    archives: ClassVar[tuple[str, ...]] = ("images.zip", "questions1.2.zip")
    size: ClassVar[str] = "68 MB: 12,578 questions and 398 pictures"
    wanted: ClassVar[str] = "testdev_balanced_*"
    n_rows: ClassVar[int] = 12_578
    lmms_task: ClassVar[str] = "gqa"
    id_field: ClassVar[str] = "id"

    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        if layout in ("json", "zip"):
            rows = [{"id": id_, **row} for id_, row in data.read_json(files[0]).items()]
            return Table(rows, str(files[0]), folder)
        found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in PICTURES)), [])
        if not found:
            raise UsageError(f"{folder} holds no pictures ({', '.join(PICTURES)}) for {files[0].name}; put them there.")
        return self._joined(data.read_parquet(files, folder), data.read_parquet(found, folder))

    def _hub(self, revision: str) -> Table:
        configs = ("testdev_balanced_instructions", "testdev_balanced_images")
        questions, pictures = (data.from_hub(self.hub, revision, config, "testdev") for config in configs)
        return self._joined(questions, pictures)

    def _joined(self, questions: Table, pictures: Table) -> Table:
        """Questions with the pictures of another table, by picture id."""
        questions.require("imageId")
        pictures.require("id")
        read = pictures.picture
        if read is None:
            raise UsageError(f"{pictures.origin} has no column image; fetch it again.")
        where = {str(row["id"]): number for number, row in enumerate(pictures.rows)}
        rows = [row for row in questions.rows if str(row["imageId"]) in where]
        if len(rows) < len(questions.rows) and not self.partial:
            raise UsageError(
                f"{pictures.origin} lacks the pictures of {len(questions.rows) - len(rows)} questions; fetch it again, or "
                f"run what is there with --allow-partial."
            )
        numbers = [where[str(row["imageId"])] for row in rows]
        return replace(questions, rows=rows, picture=lambda row: read(numbers[row]), mark=pictures.mark)

    def _samples(self, table: Table) -> Iterator[Sample]:
        table.require("id", "imageId", "question", "answer", "types")
        folder = table.folder or Path()
        for number, row in enumerate(table.rows):
            types = row["types"] or {}
            if not {"structural", "semantic"} <= types.keys() or not row["answer"]:
                raise UsageError(f"{table.origin} has no types or answer for the question {row['id']}; fetch it again.")
            picture = str(row["imageId"])
            structure, meaning = str(types["structural"]), str(types["semantic"])
            file = Media("image", folder / "images" / f"{picture}.jpg")
            yield Sample(
                id=str(row["id"]),
                cluster=picture,
                media=self._picture(table, picture) if table.picture else (file,),
                question=short_answer(str(row["question"])),
                answer=str(row["answer"]),
                template=f"{structure}-{meaning}",
                strata={
                    "kind": "open" if structure == "query" else "binary",
                    "structural": structure,
                    "semantic": meaning,
                },
                extra={"picture": number},
            )

    def score(self, sample: Sample, text: str) -> Score:
        said = exact(text)
        return Score(float(said == exact(sample.answer)), said) if said else Score(0.0, None)
