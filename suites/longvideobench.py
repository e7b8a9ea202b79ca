"""LongVideoBench (validation): 1,337 questions on videos of 8 s to an hour, with the subtitles between the frames.

Wu et al., NeurIPS 2024, and its loader, github.com/longvideobench/LongVideoBench. A subtitle stands behind the frames up to
the middle of its time, and only if a shown frame falls inside that time (widened to a second). Frames: at most 256, one a
second, every n-th from the start. One difference: the loader counts the frames of the stated duration, we those of the
file. The harnesses interleave alike; their prompts differ in blanks. Clusters are videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from vlmbench.errors import UsageError
from vlmbench.suite import Caption, Media, Sample, Score
from vlmbench.suites._official import data, subtitles
from vlmbench.suites._official.base import DIRECTLY, OfficialSuite, picked
from vlmbench.suites._official.choices import LETTERS, lettered, read_letter
from vlmbench.suites._official.data import Row, Table
from vlmbench.suites._official.subtitles import Line

GROUPS = ("15", "60", "600", "3600")
"""Longest seconds of a duration group."""
WIDTH_S = 1.0
"""Time that a subtitle covers at least when frames are looked for in it."""


@dataclass(frozen=True)
class LongVideoBench(OfficialSuite):
    """`subtitles=off` shows the frames alone; `duration` asks about one duration group only."""

    name: ClassVar[str] = "longvideobench"
    version: ClassVar[str] = "2"
    hub: ClassVar[tuple[str, ...]] = ("longvideobench/LongVideoBench",)
    layouts: ClassVar[Mapping[str, str]] = {
        "json": "lvb_val.json",
        "parquet": "validation.parquet",
        "hub": "validation-*.parquet",
    }
    archives: ClassVar[tuple[str, ...]] = ("videos.tar.part.*", "subtitles.tar")
    size: ClassVar[str] = "1.3 MB of questions, 117 MB of subtitles and 161 GB of videos"
    n_rows: ClassVar[int] = 1337
    lmms_task: ClassVar[str] = "longvideobench_val_v"
    id_field: ClassVar[str] = "id"
    media_on_hub: ClassVar[bool] = False
    default_sampler: ClassVar[str] = "stride"
    default_fps: ClassVar[float | None] = 1.0

    subtitles: bool = True
    duration: int | None = None

    def __post_init__(self) -> None:
        if self.duration is not None and str(self.duration) not in GROUPS:
            raise UsageError(f"{self.name}:duration must be one of {', '.join(GROUPS)}, not {self.duration}.")

    @property
    def default_frames(self) -> int | None:
        return 256

    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        if layout != "json":
            return data.read_parquet(files, folder)
        return Table(data.read_json(files[0]), str(files[0]), folder)

    def _hub(self, revision: str) -> Table:
        return data.from_hub(self.hub, revision, None, "validation")

    def _samples(self, table: Table) -> Iterator[Sample]:
        table.require("video_id", "id", "video_path", "subtitle_path", "question", "correct_choice", "duration")
        table.require("duration_group", "question_category", "level", "starting_timestamp_for_subtitles")
        if table.folder is None:
            raise UsageError(
                f"{self.name}'s videos are not on the hub as rows; give --data-root with {self.name}/videos/."
            )
        videos, texts = table.folder / "videos", table.folder / "subtitles"
        for row in table.rows:
            group = picked(row, "duration_group", GROUPS, table.origin)
            options = _options(row, table.origin)
            picked(row, "correct_choice", [str(i) for i in range(len(options))], table.origin)
            if self.duration not in (None, int(group)):
                continue
            path = texts / str(row["subtitle_path"])
            if self.subtitles and not path.exists():
                if self.partial:
                    continue
                raise UsageError(
                    f"{path} is missing; unpack subtitles.tar into {table.folder}, or write {self.name}:subtitles=off."
                )
            yield Sample(
                id=str(row["id"]),
                cluster=str(row["video_id"]),
                media=(Media("video", videos / str(row["video_path"])),),
                question=str(row["question"]),
                answer=LETTERS[int(row["correct_choice"])],
                template=str(row["question_category"]),
                strata={"duration": group, "category": str(row["question_category"]), "level": str(row["level"])},
                extra={
                    "options": options,
                    "subtitles": path if self.subtitles else None,
                    "starts_at_s": float(row["starting_timestamp_for_subtitles"]),
                    "duration_s": float(row["duration"]),
                },
            )

    def rows_by_id(self) -> dict[str, Row]:
        """The JSON file's list of options becomes the hub's five columns."""
        return {id_: {**row, **_columns(row)} for id_, row in super().rows_by_id().items()}

    def seconds_stated(self, sample: Sample) -> tuple[float, float]:
        return sample.extra["duration_s"], sample.extra["duration_s"]

    def subtitle_files(self) -> tuple[list[Path], int]:
        folder = (self._table.folder or Path()) / "subtitles"
        wanted = sorted({folder / str(row["subtitle_path"]) for row in self._table.rows})
        return [path for path in wanted if path.is_file()], len(wanted)

    @staticmethod
    def read_subtitles(path: Path) -> Sequence[Line]:
        return subtitles.read_json(path, 0.0, 0.0)

    def asked(self, sample: Sample, times_s: Sequence[float]) -> Sample:
        question = "\n".join([sample.question, *lettered(sample.extra["options"]), DIRECTLY])
        match self.prompt:
            case "official":
                question = f"Question: {question}"
            case "lmms-eval":
                question = f"{question}\n"
            case "vlmevalkit":
                pass
        path = sample.extra["subtitles"]
        lines = subtitles.read_json(path, sample.extra["starts_at_s"], sample.extra["duration_s"]) if path else ()
        captions = interleaved(lines, times_s)
        if self.prompt == "vlmevalkit":
            captions = tuple(Caption(each.time_s, f"{each.text}\n") for each in captions)
        return replace(sample, question=question, captions=captions)

    def score(self, sample: Sample, text: str) -> Score:
        letter = read_letter(text, sample.extra["options"])
        return Score(float(letter == sample.answer), letter)


def interleaved(lines: Sequence[subtitles.Line], times_s: Sequence[float]) -> tuple[Caption, ...]:
    """The lines in which a frame falls, each behind all frames up to its middle, in file order whatever their times."""
    captions = []
    reached_s = -math.inf
    for line in lines:
        middle_s = (line.start_s + line.end_s) / 2
        reached_s = max(reached_s, middle_s)  # a line that is out of order cannot go back before frames already placed
        start_s, end_s = line.start_s, line.end_s
        if end_s - start_s < WIDTH_S:
            start_s, end_s = middle_s - WIDTH_S / 2, middle_s + WIDTH_S / 2
        if any(start_s < time < end_s for time in times_s):
            # A caption stands before the first frame at or after its time; this one must stand behind one at `reached_s`.
            captions.append(Caption(math.nextafter(reached_s, math.inf), line.text))
    return tuple(captions)


def _options(row: Row, origin: str) -> tuple[str, ...]:
    """Of the JSON file's list, or of the hub's five columns, in which "N/A" fills the unused ones."""
    if "candidates" in row:
        options = tuple(str(option) for option in row["candidates"])
    else:
        found = [row.get(f"option{i}") for i in range(5)]
        options = tuple(str(option) for option in found if option not in (None, "N/A"))
    if not 2 <= len(options) <= len(LETTERS):
        raise UsageError(f"{origin} has {len(options)} options for the question {row['id']}; fetch it again.")
    return options


def _columns(row: Row) -> dict[str, str]:
    if "candidates" not in row:
        return {}
    return {f"option{i}": option for i, option in enumerate([*row["candidates"], *["N/A"] * 5][:5])}
