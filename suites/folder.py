"""A folder of one's own videos and pictures (folder:PATH), with a questions file or without one.

With ``questions.jsonl``, ``.json`` or ``.csv`` in the folder (or `questions=FILE`) each entry names a `media` file (or several)
and a `question`, and may have `options`, an `answer`, an `id` and a `type`. With options the answer is a letter or one of
them; otherwise it is right when it equals the answer (or one of a list) after the normalisation of VQA. Without answers there
is no accuracy: what the table then shows is how often a method says the same as full attention. Without a questions file
every medium is asked about once. Clusters are media.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from vlmbench.errors import UsageError
from vlmbench.suite import Media, Sample, Score, Suite
from vlmbench.suites._official.base import DIRECTLY, short_answer
from vlmbench.suites._official.choices import LETTERS, lettered, option_text, read_letter
from vlmbench.suites._official.vqa import normalise

VIDEOS = frozenset(
    [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif", ".3gp"]
)
PICTURES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"])
QUESTIONS = ("questions.jsonl", "questions.json", "questions.csv")
MEDIA_KEYS = ("media", "video", "image", "file")
ASK = {"video": "What happens in this video? Answer in one sentence.", "image": "What does this picture show?"}
EDGE_BYTES = 1 << 16
"""Bytes at the start and at the end of a file that go into the content hash: all of an hour of video would take minutes."""


@dataclass(frozen=True)
class Folder(Suite):
    """`path`: a folder, or one file. `questions`: a file beside `QUESTIONS`. `ask`: what is asked when there is none."""

    name: ClassVar[str] = "folder"
    version: ClassVar[str] = "1"
    default_model: ClassVar[str] = "Qwen/Qwen2.5-VL-7B-Instruct"
    needs_data: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 64
    bare: ClassVar[str] = "path"
    """``folder:PATH`` is ``folder:path=PATH``."""

    path: str = ""
    questions: str | None = None
    ask: str | None = None

    _partial: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError("folder needs a path; write folder:PATH (in quotes where it holds a comma or an =).")
        if self.ask is not None and not self.ask.strip():
            raise UsageError("folder:ask is empty; give the question, or leave it out.")

    @property
    def default_frames(self) -> int | None:
        return 32

    @property
    def scored(self) -> bool:
        return any(sample.answer for sample in self.samples())

    def located(self, root: Path | None, *, allow_partial: bool = False, offline: bool = False) -> Self:
        """With a `root` the path is relative to it and stays as it is, else it becomes absolute."""
        path = Path(self.path).expanduser()
        suite = dataclasses.replace(self, path=str(path if root else path.resolve()))
        object.__setattr__(suite, "_top", (root or Path()) / path)
        object.__setattr__(suite, "_partial", allow_partial)
        suite.samples()
        return suite

    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        if split == "train":
            raise UsageError("folder is for testing alone: it has no train split; fit on a synth suite.")
        return self._all

    def materialise(self, sample: Sample) -> None:
        for media in sample.media:
            if not media.path.exists():
                raise FileNotFoundError(errno.ENOENT, "the file is missing", str(media.path))

    def score(self, sample: Sample, text: str) -> Score:
        """Without an answer the text itself is the prediction, to be compared with full attention's."""
        if options := sample.extra["options"]:
            letter = read_letter(text, options)
            return Score(float(bool(sample.answer) and letter == sample.answer), letter)
        if not sample.answer:
            return Score(0.0, text.strip() or None)
        said = normalise(text)
        return Score(float(said in map(normalise, sample.extra["answers"])), said) if said else Score(0.0, None)

    @cached_property
    def data_hash(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples():
            digest.update(repr((sample.id, sample.question, sample.answer, sorted(sample.extra.items()))).encode())
        for path in sorted({media.path for sample in self.samples() for media in sample.media}):
            digest.update(_fingerprint(path))
        return digest.hexdigest()[:8]

    # -- reading ----------------------------------------------------------------------------------------------------------

    @property
    def _place(self) -> Path:
        return self.__dict__.get("_top") or Path(self.path)

    @cached_property
    def _all(self) -> list[Sample]:
        place = self._place
        if not os.path.exists(place):  # Path.exists raises in a folder that may not be looked into
            raise UsageError(f"{place} is not there; name a folder with videos or pictures, as in folder:PATH.")
        try:
            file = self._questions_file(place)
            folder = place if place.is_dir() else place.parent
            found = self._asked_once(place) if file is None else self._from_file(file, folder)
        except OSError as error:
            where = error.filename or place
            raise UsageError(
                f"{where} cannot be read ({error.strerror}); mend that, or name another folder."
            ) from error
        if not found:
            kinds = ", ".join(sorted(VIDEOS | PICTURES))
            raise UsageError(f"{place} holds no video and no picture ({kinds}); name another folder.")
        if twice := [id_ for id_, n in Counter(sample.id for sample in found).items() if n > 1]:
            raise UsageError(f"{file} gives the id {twice[0]!r} to several questions; give each its own.")
        answered = sum(bool(sample.answer) for sample in found)
        if 0 < answered < len(found):
            first = next(sample.id for sample in found if not sample.answer)
            raise UsageError(
                f"{file} answers {answered} of {len(found)} questions (not {first}); answer all of them, for accuracy, or "
                f"none, for fidelity to full attention alone."
            )
        return found

    def _questions_file(self, place: Path) -> Path | None:
        if self.questions is not None:
            given = [Path(self.questions).expanduser(), place / self.questions]
            found = next((path for path in given if path.is_file()), None)
            if found is None:
                raise UsageError(f"folder:questions={self.questions} is no file; name one, or leave it out.")
            return found
        return next((place / name for name in QUESTIONS if (place / name).is_file()), None)

    def _asked_once(self, place: Path) -> list[Sample]:
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        top = place.parent if place.is_file() else place
        shown = [path for path in files if kind_of(path) and not any(p[0] == "." for p in path.relative_to(top).parts)]
        return [_sample(path.relative_to(top).as_posix(), [path], self._question_on(path)) for path in shown]

    def _question_on(self, path: Path) -> str:
        return self.ask or ASK[kind_of(path) or "video"]

    def _from_file(self, file: Path, folder: Path) -> list[Sample]:
        entries = read_entries(file)
        samples, missing, seen = [], [], Counter[str]()
        for where, entry in entries:
            key = next((key for key in MEDIA_KEYS if entry.get(key)), None)
            if key is None:
                raise UsageError(f"{file}, {where}: it names no medium ({', '.join(MEDIA_KEYS)}); give a file's name.")
            names = [str(name) for name in (entry[key] if isinstance(entry[key], list) else [entry[key]])]
            paths = [folder / name for name in names]
            if odd := [name for name in names if kind_of(Path(name)) is None]:
                raise UsageError(
                    f"{file}, {where}: {odd[0]!r} has the ending of neither a video nor a picture; rename it."
                )
            cluster = "+".join(names)
            seen[cluster] += 1
            if absent := [path for path in paths if not path.is_file()]:
                missing += absent
                continue
            question = str(entry.get("question") or self._question_on(paths[0]))
            id_ = str(entry["id"]) if entry.get("id") not in (None, "") else f"{cluster}#{seen[cluster]}"
            samples.append(_sample(id_, paths, question, cluster, entry, f"{file}, {where}"))
        if missing and not (self._partial and samples):
            raise UsageError(
                f"{file} names {len(set(missing))} files that are not in {folder} (the first: {missing[0].name}); put them "
                f"there{', or run what is there with --allow-partial' if samples else ''}."
            )
        return samples


def kind_of(path: Path) -> Literal["video", "image"] | None:
    """By the name's ending."""
    ending = path.suffix.lower()
    return "video" if ending in VIDEOS else "image" if ending in PICTURES else None


def read_entries(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(where, entry) of a JSON list, JSON lines or a CSV file with a header. Raises `UsageError`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            rows: list[Any] = [_from_csv(row) for row in csv.DictReader(io.StringIO(text))]
        elif file.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(
            f"{file} cannot be read ({' '.join(str(error).split())}); write JSON lines, JSON or CSV."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UsageError(f"{file} is no list of objects; write one like {{'media': 'a.mp4', 'question': …}} for each.")
    if not rows:
        raise UsageError(f"{file} holds no question; write some, or delete it to ask about every file once.")
    return [(f"question {number}", row) for number, row in enumerate(rows, 1)]


def _from_csv(row: Mapping[str, Any]) -> dict[str, Any]:
    """Options stand in one cell, parted by bars; what is empty is not given."""
    if None in row:
        raise ValueError(f"a row has more cells than the header: {row[None]}")  # type: ignore[index]
    found: dict[str, Any] = {key: value for key, value in row.items() if value}
    if "options" in found:
        found["options"] = [option.strip() for option in found["options"].split("|")]
    return found


def _sample(
    id_: str,
    paths: Sequence[Path],
    question: str,
    cluster: str | None = None,
    entry: Mapping[str, Any] | None = None,
    where: str = "",
) -> Sample:
    entry = entry or {}
    options = tuple(option_text(str(option)) for option in entry.get("options") or ())
    given = entry.get("answer")
    answers = tuple(str(each) for each in (given if isinstance(given, list) else [given]) if each not in (None, ""))
    answer = answers[0] if answers else ""
    if options:
        if not 2 <= len(options) <= len(LETTERS):
            raise UsageError(f"{where}: it has {len(options)} options; give 2 to {len(LETTERS)}.")
        question = "\n".join([question, *lettered(options), DIRECTLY])
        answer = _letter(answers, options, where) if answers else ""
    elif answer:
        question = short_answer(question)
    kinds = [kind_of(path) or "video" for path in paths]
    strata = {"kind": "+".join(sorted(set(kinds)))} | ({"type": str(entry["type"])} if entry.get("type") else {})
    return Sample(
        id=id_,
        cluster=cluster or id_,
        media=tuple(Media(kind, path) for kind, path in zip(kinds, paths, strict=True)),
        question=question,
        answer=answer,
        template=str(entry.get("type") or "folder"),
        strata=strata,
        extra={"options": options, "answers": answers},
    )


def _letter(answers: Sequence[str], options: Sequence[str], where: str) -> str:
    """The one answer as a letter, however it was written: "B", "(b)" or the option's own words."""
    letter = read_letter(answers[0], options) if len(answers) == 1 else None
    if letter is None:
        raise UsageError(
            f"{where}: the answer {'/'.join(answers)!r} is none of its {len(options)} options; give its letter."
        )
    return letter


def _fingerprint(path: Path) -> bytes:
    """Of name, size, start and end; a file that cannot be read has its name alone."""
    digest = hashlib.sha256(path.name.encode())
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(str(size).encode())
            for start in {0, max(0, size - EDGE_BYTES)}:
                file.seek(start)
                digest.update(file.read(EDGE_BYTES))
    except OSError:
        digest.update(b"?")
    return digest.digest()
