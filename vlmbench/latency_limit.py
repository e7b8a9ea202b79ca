"""``run --latency-limit``: for each method the most frames that it answers in time on this machine, and its accuracy there.

What is limited is what a user waits for: from the video file to the last token of the answer (`Timing.e2e_s` with
`video_s`), whatever the answer's length, as in a latency pass. Methods climb one ladder of frame counts (1, 2, 4, … and the
videos' own length), timed in turns on the same videos; a method leaves the ladder when it misses the limit on two steps
in a row. Accuracy at the chosen count is an ordinary stored run. The ladder goes into a file beside the runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from vlmbench import aside, header, stats
from vlmbench.errors import UsageError
from vlmbench.loaded import Loaded, typed
from vlmbench.record import FINISHED, SCHEMA
from vlmbench.runner import Runner, accuracy, interleaved
from vlmbench.session import Session
from vlmbench.spec import joined, params_of
from vlmbench.store import RunView

if TYPE_CHECKING:
    from vlmbench.backend import Backend
    from vlmbench.method import Method
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest
    from vlmbench.suite import Sample
    from vlmbench.video import Clip

MISSES = 2
"""Steps in a row on which a method must miss the limit: one could be another process's fault."""


@dataclass(frozen=True)
class Step:
    """One frame count under one method: e2e seconds of each round on each video."""

    frames: int
    rounds_s: tuple[tuple[float, ...], ...]
    failed: str = ""
    """Why a video was not answered, if one was not; then the limit is missed."""

    @property
    def median_s(self) -> float | None:
        """Median over videos of the median over rounds; None when a video failed."""
        return None if self.failed or not self.rounds_s else median(median(each) for each in self.rounds_s)


@dataclass
class Climb:
    """One method's way up the ladder, and what became of it."""

    method: Method
    limit_s: float
    steps: list[Step] = field(default_factory=list)
    view: RunView | None = None
    """The accuracy run at the chosen frame count."""

    def meets(self, step: Step) -> bool:
        return step.median_s is not None and step.median_s <= self.limit_s

    @property
    def chosen(self) -> Step | None:
        """The largest count that meets the limit."""
        return max((step for step in self.steps if self.meets(step)), key=lambda step: step.frames, default=None)

    @property
    def climbing(self) -> bool:
        last = self.steps[-MISSES:]
        return len(last) < MISSES or any(self.meets(step) for step in last)


def run(request: RunRequest, progress: Progress, backend: Backend | None = None) -> int:
    """Climb, answer, print the table, and return the exit code. Raises `UsageError` and `RunError`.

    `backend` is one that is loaded already.
    """
    limit_s = request.latency_limit
    if limit_s is None:
        raise ValueError("the request has no latency limit")
    with Session(request, progress, backend=backend, stored=False) as session:
        progress.note(f"{session.describe()}; at most {limit_s:g} s from the video file to the last token")
        climbs = climbs_of(session)
        if not climbs:
            raise UsageError("--latency-limit needs a method that calls the model; name one with --method.")
        videos = _decoded(session)
        native = max(frames for _, frames in videos)
        climb(session, climbs, videos, native)
        path = path_of(session, climbs)
        _write(path, session, climbs, native)
        for each in climbs:
            if each.chosen is not None:
                frames = request.frames if each.chosen.frames == native else each.chosen.frames
                each.view = _answer(request, session, each.method, frames)
        progress.finish()
        _write(path, session, climbs, native)
        print(to_text(session, climbs, native))
    records = [record for each in climbs if each.view for record in each.view.records.of("accuracy").values()]
    unfinished = any(record.status not in FINISHED for record in records)
    return 1 if request.strict and (unfinished or any(step.failed for each in climbs for step in each.steps)) else 0


def climbs_of(session: Session) -> list[Climb]:
    """One for each method that calls the model, at the foot of its ladder."""
    limit_s = session.request.latency_limit or 0.0
    return [Climb(method, limit_s) for method in session.methods if method.traits.uses_model]


def path_of(session: Session, climbs: Sequence[Climb]) -> Path:
    """Beside the runs; what can change an answer or its seconds is in the name's hash, so no command overwrites another's."""
    request = session.request
    folders = [session.folder(each.method) for each in climbs]
    measured = (request.limit, request.timed, request.warmup, request.repeats, request.threads)
    text = json.dumps([sorted(folder.name for folder in folders), measured])
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return folders[0].parent / f"latency-limit-{climbs[0].limit_s:g}s-{digest}.json"


def ladder(native: int) -> list[int]:
    """Powers of two below `native`, and `native`."""
    return [2**i for i in range(native.bit_length()) if 2**i < native] + [native]


def _decoded(session: Session) -> list[tuple[Sample, int]]:
    """The timed videos with the frames that each has, at most as many as the run asks for. Raises `UsageError`."""
    found = []
    for sample in session.timed_samples():
        clips = session.clips(sample, session.blank(sample, "latency")) or ()
        found.append((sample, max((len(clip.indices) for clip in clips), default=0)))
    usable = [(sample, frames) for sample, frames in found if frames > 1]
    if not usable:
        raise UsageError(f"--latency-limit needs videos to take frames from; {session.request.suite} gave none.")
    return usable


def climb(session: Session, climbs: Sequence[Climb], videos: Sequence[tuple[Sample, int]], native: int) -> None:
    """Time every step on the videos that have so many frames."""
    steps = ladder(native)
    progress = session.progress
    progress.start(len(steps), "frames in time")
    for frames in steps:
        left = [each for each in climbs if each.climbing]
        timed: dict[int, list[tuple[float, ...]]] = {number: [] for number in range(len(left))}
        failed: dict[int, str] = {}
        for sample, own_frames in videos if left else ():
            if own_frames < frames:
                continue
            for number, rounds_s, why in _timed(session, left, sample, frames):
                timed[number].append(rounds_s)
                if why or not rounds_s:
                    failed[number] = why or "failed"
        for number, each in enumerate(left):
            step = Step(frames, tuple(timed[number]), failed.get(number, ""))
            each.steps.append(step)
            shown = step.failed or f"{step.median_s:.4g} s"
            progress.note(f"{_name(each.method)}, {frames} frames: {shown}{'' if each.meets(step) else ' (missed)'}")
        progress.advance()


def _timed(
    session: Session, climbs: Sequence[Climb], sample: Sample, frames: int
) -> Iterator[tuple[int, tuple[float, ...], str]]:
    """(number of the climb, e2e seconds of its rounds, why it failed) on one video."""
    record = session.blank(sample, "latency")
    clips: tuple[Clip, ...] | None = session.clips(sample, record, timed=True, frames=frames)
    if clips is None:
        yield from ((number, (), record.error) for number in range(len(climbs)))
        return
    video_s = record.timing.video_s if record.timing else 0.0
    runners: dict[str, Runner] = {str(number): (each.method, None) for number, each in enumerate(climbs)}
    rounds, last = interleaved(session, runners, sample, clips, video_s)
    for number in range(len(climbs)):
        name = str(number)
        why = "" if last[name].status == "ok" else f"{last[name].status}: {last[name].error}"
        yield number, tuple(each.e2e_s for each in rounds[name]), why


def _answer(request: RunRequest, session: Session, method: Method, frames: int | None) -> RunView:
    """The accuracy pass of one method at one frame count, as ``run --frames`` would store it."""
    asked = replace(
        request,
        methods=(joined(method.name, typed(params_of(method))),),
        frames=frames,
        baseline=False,
        mode="accuracy",
        latency_limit=None,
    )
    with Session(asked, session.progress, backend=session.backend) as inner:
        (entry,) = inner.entries
        accuracy(inner, entry)
    return RunView(entry.run.folder)


def _rows(climbs: Sequence[Climb]) -> list[dict[str, Any]]:
    rows = []
    for each in climbs:
        step = each.chosen
        row: dict[str, Any] = {
            "method": each.method.name,
            "params": params_of(each.method) | each.method.fitted(),
            "frames": step.frames if step else None,
            "seconds": step.median_s if step else None,
            "accuracy": None,
            "accuracy_low": None,
            "accuracy_high": None,
            "n": 0,
            "n_inactive": 0,
            "run": None,
            "ladder": [
                {
                    "frames": s.frames,
                    "median_s": s.median_s,
                    "rounds_s": [list(r) for r in s.rounds_s],
                    "failed": s.failed,
                }
                for s in each.steps
            ],
        }
        if each.view is not None:
            loaded = Loaded(each.view)
            clusters = [record.cluster for record in loaded.accuracy.values()]
            estimate = stats.accuracy_interval(list(loaded.scores.values()), clusters)
            row |= {"n": len(loaded.accuracy), "n_inactive": loaded.n_inactive, "run": each.view.folder.name}
            if estimate is not None:
                row |= {"accuracy": estimate.value, "accuracy_low": estimate.low, "accuracy_high": estimate.high}
        rows.append(row)
    return rows


def _write(path: Path, session: Session, climbs: Sequence[Climb], native: int) -> None:
    data = {
        "schema": SCHEMA,
        "rows": _rows(climbs),
        "limit_s": climbs[0].limit_s,
        "span": "video_s + e2e_s",
        "steps": ladder(native),
        **aside.conditions(session),
    }
    aside.write(path, data)


def to_text(session: Session, climbs: Sequence[Climb], native: int) -> str:
    """The table, and what its columns rest on."""
    lines = ["| method | frames | seconds | accuracy | n |", "| --- | ---: | ---: | ---: | ---: |"]
    for each, row in zip(climbs, _rows(climbs), strict=True):
        name = f"`{_name(each.method)}`"
        if each.chosen is None:
            lines.append(f"| {name} | meets the limit at no frame count{_nearest(each)} | — | — | — |")
            continue
        low, high = row["accuracy_low"], row["accuracy_high"]
        shown = "—" if row["accuracy"] is None else f"{row['accuracy']:.2f} [{low:.2f}, {high:.2f}]"
        n = f"{row['n']} ({row['n_inactive']} inactive)" if row["n_inactive"] else str(row["n"])
        lines.append(f"| {name} | {row['frames']} | {row['seconds']:.4g} | {shown} | {n} |")
    request, identity = session.request, session.backend.identity
    videos = max((len(step.rounds_s) for each in climbs for step in each.steps), default=0)
    return "\n".join(
        [
            f"**{identity.model}** on **{request.suite}**, at most {climbs[0].limit_s:g} s",
            "",
            *lines,
            "",
            f"- frames: the most of {', '.join(map(str, ladder(native)))} whose median time meets the limit; seconds: from the "
            f"video file to the last of {session.max_new_tokens} tokens, median over up to {videos} videos of the median of "
            f"{request.repeats} interleaved rounds after {request.warmup} of warm-up",
            f"- {identity.device_name} ({header.cpu_name()}, {identity.facts.get('threads', 0)} threads), {identity.dtype}, "
            f"attention {identity.attention_kernel}: seconds are this machine's",
            *(
                f"- left out: `{each.name}`, which calls no model"
                for each in session.methods
                if not each.traits.uses_model
            ),
            "- accuracy counts every sample, unfinished ones as wrong; brackets are 95 % intervals clustered by video",
        ]
    )


def _nearest(climb: Climb) -> str:
    known = [step for step in climb.steps if step.median_s is not None]
    if not known:
        return f" ({climb.steps[0].failed})" if climb.steps else ""
    best = min(known, key=lambda step: step.median_s or math.inf)
    return f" (at {best.frames} it takes {best.median_s:.4g} s)"


def _name(method: Method) -> str:
    return joined(method.name, typed(params_of(method) | method.fitted()))
