"""ScienceQA (test): 4,241 multiple-choice questions from school, about half with a picture.

Lu et al., NeurIPS 2022. Broken down as in its paper: by subject (NAT, SOC, LAN), by context (with text, with a picture, with
neither) and by grade. The wording is LLaVA's and lmms-eval's; VLMEvalKit has its own. lmms-eval takes only "B" or "B." for an
answer; we read "The answer is B" as well. Questions are independent: each is its own cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.suite import Media, Sample, Score
from vlmbench.suites._official import data
from vlmbench.suites._official.base import DIRECTLY, OfficialSuite, picked
from vlmbench.suites._official.choices import LETTERS, lettered, read_letter
from vlmbench.suites._official.data import Row, Table

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
N_PICTURED = 2017
"""Questions with a picture."""


@dataclass(frozen=True)
class ScienceQA(OfficialSuite):
    """`subset=img` asks only the questions that have a picture."""

    name: ClassVar[str] = "scienceqa"
    version: ClassVar[str] = "2"
    hub: ClassVar[tuple[str, ...]] = ("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA")
    layouts: ClassVar[Mapping[str, str]] = {
        "parquet": "test.parquet",
        "full": "ScienceQA-FULL/test-*.parquet",
        "img": "ScienceQA-IMG/test-*.parquet",
        "json": "problems.json",
    }
    size: ClassVar[str] = "134 MB: 4,241 questions, 2,017 with a picture"
    wanted: ClassVar[str] = "ScienceQA-FULL/test-*"
    n_rows: ClassVar[int] = 4241
    lmms_task: ClassVar[str] = "scienceqa"
    id_field: ClassVar[str] = "id"

    subset: Literal["full", "img"] = "full"

    @property
    def _expected_rows(self) -> int:
        return self.n_rows if self.subset == "full" else N_PICTURED

    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        if layout == "json":
            return self._kept(_problems(folder, files[0]))
        return self._kept(data.read_parquet(files, folder))

    def _hub(self, revision: str) -> Table:
        return self._kept(data.from_hub(self.hub, revision, f"ScienceQA-{self.subset.upper()}", "test"))

    def _kept(self, table: Table) -> Table:
        """The rows of the subset, each with its number in the file, where its picture is found."""
        has = table.has_picture or [bool(row.get("image")) for row in table.rows]
        rows = [
            {**row, "number": number, "pictured": pictured}
            for number, (row, pictured) in enumerate(zip(table.rows, has, strict=True))
            if pictured or self.subset == "full"
        ]
        if self.subset == "full" and all(has) and len(rows) == N_PICTURED and not self.partial:
            raise UsageError(f"{table.origin} holds the questions with pictures alone; write {self.name}:subset=img.")
        return Table(rows, table.origin, table.folder, table.picture, mark=table.mark)

    def _samples(self, table: Table) -> Iterator[Sample]:
        table.require("question", "choices", "answer", "hint", "grade", "subject", "topic")
        for row in table.rows:
            options = tuple(map(str, row["choices"]))
            picked(row, "answer", [str(i) for i in range(len(options))], table.origin)
            subject = SUBJECTS[picked(row, "subject", tuple(SUBJECTS), table.origin)]
            grade = picked(row, "grade", [f"grade{i}" for i in range(1, 13)], table.origin)
            id_ = str(row.get("id", f"row-{row['number']}"))
            yield Sample(
                id=id_,
                cluster=id_,
                media=self._media(table, row, id_),
                question=self._asked(row, options),
                answer=LETTERS[int(row["answer"])],
                template=str(row["topic"]),
                strata={
                    "subject": subject,
                    "TXT": _yes(bool(row["hint"])),
                    "IMG": _yes(row["pictured"]),
                    "NO": _yes(not row["hint"] and not row["pictured"]),
                    "grade": "G1-6" if int(grade.removeprefix("grade")) <= 6 else "G7-12",
                },
                extra={"options": options, "picture": row["number"]},
            )

    def _media(self, table: Table, row: Row, id_: str) -> tuple[Media, ...]:
        if not row["pictured"]:
            return ()
        if table.picture is not None:
            return self._picture(table, id_)
        return (Media("image", (table.folder or Path()) / "images" / "test" / id_ / str(row["image"])),)

    def _asked(self, row: Row, options: Sequence[str]) -> str:
        choices = "\n".join(lettered(options))
        if self.prompt == "vlmevalkit":
            hint = f"Hint: {row['hint']}\n" if row["hint"] else ""
            cue = "Please select the correct answer from the options above. \n"
            return f"{hint}Question: {row['question']}\nOptions:\n{choices}\n{cue}"
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        return f"{context}{row['question']}\n{choices}\n{DIRECTLY}"

    def score(self, sample: Sample, text: str) -> Score:
        letter = read_letter(text, sample.extra["options"])
        return Score(float(letter == sample.answer), letter)


def _problems(folder: Path, path: Path) -> Table:
    """The test questions of the original files: all problems, and the ids of each split."""
    problems, splits = data.read_json(path), data.read_json(folder / "pid_splits.json")
    if missing := [id_ for id_ in splits.get("test", ()) if id_ not in problems]:
        raise UsageError(f"{path} lacks {len(missing)} questions that pid_splits.json names; fetch both again.")
    return Table([{**problems[id_], "id": id_} for id_ in splits.get("test", ())], str(path), folder)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
