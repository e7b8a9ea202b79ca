"""Video-MME: 2,700 questions with four options on 900 videos from 11 s to an hour, with or without subtitles.

Fu et al., CVPR 2025; prompt from the README of github.com/MME-Benchmarks/Video-MME. With subtitles, the lines on screen at
the times of the shown frames come before the question, each once; a video without any is asked as without subtitles. Two
things differ in the harnesses and are not imitated: lmms-eval picks lines for 32 frames, however many are shown, and
VLMEvalKit reads another letter out of some texts (we never guess one). Clusters are videos.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.suite import Media, Sample, Score
from vlmbench.suites._official import data, subtitles
from vlmbench.suites._official.base import DIRECTLY, OfficialSuite, picked
from vlmbench.suites._official.choices import option_text, read_letter
from vlmbench.suites._official.data import Row, Table

VIDEOS = ("data", "video", "videos")
"""Folders that the archives, VLMEvalKit and others unpack the videos to."""
SUBTITLES = ("subtitle", "subtitles")
DURATIONS = ("short", "medium", "long")
SECONDS = {"short": (0.0, 120.0), "medium": (240.0, 900.0), "long": (1800.0, 3600.0)}
"""Shortest and longest video of a group, by the paper."""
N_SUBTITLED = 744
"""Videos with a subtitle file."""
_SELECT = "Select the best answer to the following multiple-choice question based on the video"
_LETTER = "Respond with only the letter (A, B, C, or D) of the correct option."
_LISTED = "This video's subtitles are listed below:"
_ALIASES = {
    "duration_category": "duration",
    "video_category": "domain",
    "video_sub_category": "sub_category",
    "video_subcategory": "sub_category",
    "choices": "options",
}
"""Names in the JSON files of the benchmark's own repository -> names on the hub."""


@dataclass(frozen=True)
class VideoMME(OfficialSuite):
    """`subtitles` adds those of the shown frames; `duration` asks about short, medium or long videos only."""

    name: ClassVar[str] = "videomme"
    version: ClassVar[str] = "2"
    hub: ClassVar[tuple[str, ...]] = ("lmms-eval/Video-MME", "lmms-lab/Video-MME")
    layouts: ClassVar[Mapping[str, str]] = {
        "parquet": "test.parquet",
        "hub": "videomme/test-*.parquet",
        "shards": "test-*.parquet",
        "json": "Video-MME.json",
    }
    archives: ClassVar[tuple[str, ...]] = ("videos_chunked_*.zip", "subtitle.zip")
    size: ClassVar[str] = "0.4 MB of questions, and videos in zip files of 26.7 GB each"
    n_rows: ClassVar[int] = 2700
    lmms_task: ClassVar[str] = "videomme"
    media_on_hub: ClassVar[bool] = False

    subtitles: bool = False
    duration: Literal["short", "medium", "long"] | None = None

    @property
    def default_frames(self) -> int | None:
        return 64

    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        if layout != "json":
            return data.read_parquet(files, folder)
        return Table(_flat(data.read_json(files[0])), str(files[0]), folder)

    def _hub(self, revision: str) -> Table:
        return data.from_hub(self.hub, revision, "videomme", "test")

    def _samples(self, table: Table) -> Iterator[Sample]:
        table.require("duration", "domain", "sub_category", "videoID", "question_id", "task_type")
        table.require("question", "options", "answer")
        if table.folder is None:
            raise UsageError(
                f"{self.name}'s videos are not on the hub as rows; give --data-root with {self.name}/data/."
            )
        folder = data.home(table.folder, VIDEOS)
        videos = data.by_stem(folder, VIDEOS)
        texts = data.by_stem(folder, SUBTITLES) if self.subtitles else {}
        self._check_subtitles(table, folder, texts)
        for row in table.rows:
            duration = picked(row, "duration", DURATIONS, table.origin)
            options = tuple(option_text(option) for option in row["options"])
            if self.duration not in (None, duration):
                continue
            video = str(row["videoID"])
            strata = {"duration": duration} | {key: str(row[key]) for key in ("domain", "sub_category", "task_type")}
            yield Sample(
                id=str(row["question_id"]),
                cluster=video,
                media=(Media("video", videos.get(video, folder / "data" / f"{video}.mp4")),),
                question=str(row["question"]),
                answer=picked(row, "answer", "ABCD"[: len(options)], table.origin),
                template=str(row["task_type"]),
                strata=strata,
                extra={"options": options, "subtitles": texts.get(video)},
            )

    def seconds_stated(self, sample: Sample) -> tuple[float, float]:
        return SECONDS[sample.strata["duration"]]

    def subtitle_files(self) -> tuple[list[Path], int]:
        table = self._table
        wanted = {str(row["videoID"]) for row in table.rows}
        found = data.by_stem(data.home(table.folder or Path(), VIDEOS), SUBTITLES)
        return [path for stem, path in found.items() if stem in wanted], N_SUBTITLED

    def _check_subtitles(self, table: Table, folder: Path, texts: Mapping[str, Path]) -> None:
        """Raises `UsageError` when subtitles are wanted and not all of them are there."""
        found = len({str(row["videoID"]) for row in table.rows} & texts.keys())
        if self.subtitles and (not found or (found < N_SUBTITLED and not self.partial)):
            raise UsageError(
                f"{folder / 'subtitle'} holds subtitles (.srt) of {found} videos where {self.name} has {N_SUBTITLED}; unpack "
                f"subtitle.zip there, or write {self.name}:subtitles=off."
            )

    def asked(self, sample: Sample, times_s: Sequence[float]) -> Sample:
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", sample.extra["options"], strict=False))
        question = f"{sample.question}\n{options}"
        listed = self._listed(sample, times_s)
        match self.prompt:
            case "official":
                text = f"{_SELECT}. {_LETTER}\n{question}\nThe best answer is:"
                text = f"{_LISTED}\n{listed}\n{text}" if listed else text
            case "lmms-eval":
                # It speaks of subtitles when there are none, and closes with a cue of its own after an empty line.
                text = f"{_SELECT} and the subtitles. {_LETTER}\n{question}\n"
                text += "The best answer is:" if self.subtitles else f"\n{DIRECTLY}"
                if self.subtitles:
                    none = "" if sample.extra["subtitles"] else "No subtitles available"
                    text = f"{_LISTED} \n{listed or none}\n{text}"
            case "vlmevalkit":
                listed = f"{_LISTED}\n{listed}\n" if self.subtitles else ""
                text = (
                    f"\nThese are the frames of a video. {listed}{_SELECT}. {_LETTER}\nQuestion: {question}\nAnswer: "
                )
        return replace(sample, question=text)

    def _listed(self, sample: Sample, times_s: Sequence[float]) -> str:
        path = sample.extra["subtitles"]
        if path is None:
            return ""
        lines = subtitles.read_srt(path)
        if self.prompt == "vlmevalkit":  # the first line around each frame, as often as it is shown
            around = [[line.text for line in lines if line.start_s < time < line.end_s] for time in times_s]
            return "\n".join(texts[0] for texts in around if texts)
        return "\n".join(line.text for line in subtitles.shown_at(lines, times_s))

    def score(self, sample: Sample, text: str) -> Score:
        letter = read_letter(text, sample.extra["options"])
        return Score(float(letter == sample.answer), letter)


def _flat(videos: Any) -> list[Row]:
    """Rows with the hub's names from a list of videos with their `questions`, or from a list of questions."""
    rows: list[Row] = []
    for video in videos if isinstance(videos, list) else [videos]:
        shared = {_ALIASES.get(key, key): value for key, value in video.items() if key != "questions"}
        address = re.search(r"(?:v=|youtu\.be/|shorts/)([\w-]{11})", str(shared.get("url", "")))
        if "videoID" not in shared and address:
            shared["videoID"] = address[1]
        for question in video.get("questions", [{}]):
            rows.append(shared | {_ALIASES.get(key, key): value for key, value in question.items()})
    return rows
