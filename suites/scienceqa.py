"""ScienceQA: 4,241 multiple-choice questions from school, about half with a picture, and 12,726 to train on.

Lu et al., NeurIPS 2022. Broken down as in its paper: by subject (NAT, SOC, LAN), by context (with text, with a picture, with
neither) and by grade. The wording is LLaVA's and lmms-eval's; VLMEvalKit has its own, and ``prompt=qcm-a`` is the paper's
(question, context, choices; the answer is a letter). lmms-eval takes only "B" or "B." for an answer; we read "The answer is B"
as well. Questions are independent: each is its own cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.spec import params_of
from vlmbench.suite import Media, Sample, Score
from vlmbench.suites._official import data
from vlmbench.suites._official.base import DIRECTLY, OfficialSuite, picked
from vlmbench.suites._official.choices import LETTERS, lettered, read_letter
from vlmbench.suites._official.data import Row, Table

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
Split = Literal["test", "train"]


@dataclass(frozen=True)
class ScienceQA(OfficialSuite):
    """`subset=img` asks only the questions that have a picture; so does its train split.

    ``captions=on`` puts what a captioning model said of the picture behind the context, as some of the published results do
    (the paper's own, and MemVP's evaluation, but not its training). They are in ``captions.json`` of the original files.
    """

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
    n_pictured: ClassVar[int] = 2017
    """Questions with a picture."""
    split: ClassVar[Split] = "test"
    """What the files are read for."""
    lmms_task: ClassVar[str] = "scienceqa"
    id_field: ClassVar[str] = "id"

    prompt: Literal["official", "lmms-eval", "vlmevalkit", "qcm-a"] = "official"  # type: ignore[assignment]
    subset: Literal["full", "img"] = "full"
    captions: bool = False

    @property
    def said(self) -> str:
        wording = {"qcm-a": "QCM-A", "vlmevalkit": "VLMEvalKit's wording"}.get(self.prompt, "LLaVA's wording")
        asked = "all questions" if self.subset == "full" else "questions with a picture"
        return f"{self.name} ({asked}, {wording}, captions {'on' if self.captions else 'off'})"

    # -- the train split ------------------------------------------------------------------------------------------------

    def samples(self, split: Split = "test") -> Sequence[Sample]:
        return self._all if split == self.split else self._train._all

    @cached_property
    def _train(self) -> ScienceQA:
        """The questions to train on, whose files are looked for only when they are asked for."""
        return ScienceQATrain(**params_of(self)).at(self._root, offline=self._offline)

    def materialise(self, sample: Sample) -> None:
        if sample.extra.get("split", self.split) == self.split:
            super().materialise(sample)
        else:
            self._train.materialise(sample)

    # -- rows -----------------------------------------------------------------------------------------------------------

    @property
    def _expected_rows(self) -> int:
        return self.n_rows if self.subset == "full" else self.n_pictured

    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        if layout == "json":
            return self._kept(_problems(folder, files[0], self.split, self.captions))
        self._no_captions(str(files[0]))
        return self._kept(data.read_parquet(files, folder))

    def _hub(self, revision: str) -> Table:
        self._no_captions(self.hub[0])
        return self._kept(data.from_hub(self.hub, revision, f"ScienceQA-{self.subset.upper()}", self.split))

    def _no_captions(self, origin: str) -> None:
        if self.captions:
            raise UsageError(
                f"{self.name}:captions=on needs the original files (problems.json, pid_splits.json, captions.json, images/), "
                f"and {origin} has no captions; name their folder, or leave captions out."
            )

    def _kept(self, table: Table) -> Table:
        """The rows of the subset, each with its number in the file, where its picture is found."""
        has = table.has_picture or [bool(row.get("image")) for row in table.rows]
        rows = [
            {**row, "number": number, "pictured": pictured}
            for number, (row, pictured) in enumerate(zip(table.rows, has, strict=True))
            if pictured or self.subset == "full"
        ]
        if self.subset == "full" and all(has) and len(rows) == self.n_pictured and not self.partial:
            raise UsageError(f"{table.origin} holds the questions with pictures alone; write {self.name}:subset=img.")
        return Table(rows, table.origin, table.folder, table.picture, mark=table.mark)

    def _samples(self, table: Table) -> Iterator[Sample]:
        table.require("question", "choices", "answer", "hint", "grade", "subject", "topic")
        for row in table.rows:
            options = tuple(map(str, row["choices"]))
            picked(row, "answer", [str(i) for i in range(len(options))], table.origin)
            subject = SUBJECTS[picked(row, "subject", tuple(SUBJECTS), table.origin)]
            grade = picked(row, "grade", [f"grade{i}" for i in range(1, 13)], table.origin)
            train = self.split == "train"
            id_ = str(row.get("id", f"{'train-' if train else ''}row-{row['number']}"))
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
                extra={"options": options, "picture": row["number"]} | ({"split": "train"} if train else {}),
            )

    def _media(self, table: Table, row: Row, id_: str) -> tuple[Media, ...]:
        if not row["pictured"]:
            return ()
        if table.picture is not None:
            return self._picture(table, id_)
        return (Media("image", (table.folder or Path()) / "images" / self.split / id_ / str(row["image"])),)

    def _asked(self, row: Row, options: Sequence[str]) -> str:
        choices = "\n".join(lettered(options))
        told = " ".join(filter(None, (row["hint"], row.get("caption"))))
        if self.prompt == "qcm-a":
            inline = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
            return f"Question: {row['question']}\nContext: {told or 'N/A'}\nOptions: {inline}\nAnswer:"
        if self.prompt == "vlmevalkit":
            hint = f"Hint: {told}\n" if told else ""
            cue = "Please select the correct answer from the options above. \n"
            return f"{hint}Question: {row['question']}\nOptions:\n{choices}\n{cue}"
        context = f"Context: {told}\n" if told else ""
        return f"{context}{row['question']}\n{choices}\n{DIRECTLY}"

    def score(self, sample: Sample, text: str) -> Score:
        letter = read_letter(text, sample.extra["options"])
        return Score(float(letter == sample.answer), letter)


@dataclass(frozen=True)
class ScienceQATrain(ScienceQA):
    """What `ScienceQA` trains on; it has no name of its own."""

    layouts: ClassVar[Mapping[str, str]] = {
        layout: pattern.replace("test", "train") for layout, pattern in ScienceQA.layouts.items()
    }
    size: ClassVar[str] = "about 0.4 GB: 12,726 questions, 6,218 with a picture"
    wanted: ClassVar[str] = "ScienceQA-FULL/train-*"
    n_rows: ClassVar[int] = 12_726
    n_pictured: ClassVar[int] = 6218
    split: ClassVar[Split] = "train"


def _problems(folder: Path, path: Path, split: Split, captions: bool) -> Table:
    """A split's questions of the original files: all problems, the ids of each split, and captions by id when wanted."""
    problems, splits = data.read_json(path), data.read_json(folder / "pid_splits.json")
    ids = splits.get(split, ())
    if missing := [id_ for id_ in ids if id_ not in problems]:
        raise UsageError(f"{path} lacks {len(missing)} questions that pid_splits.json names; fetch both again.")
    if split == "train" and (both := set(ids) & set(splits.get("test", ()))):
        raise UsageError(
            f"{folder / 'pid_splits.json'} has {len(both)} questions in both train and test; fetch it again."
        )
    said = data.read_json(folder / "captions.json")["captions"] if captions else {}
    rows = [{**problems[id_], "id": id_, **({"caption": said[id_]} if id_ in said else {})} for id_ in ids]
    return Table(rows, str(path), folder)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
