"""What the measurements behind the claims share: one loaded model, the store, and methods compared on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmbench import stats
from vlmbench.loaded import Loaded
from vlmbench.record import FINISHED, SampleRecord
from vlmbench.reference.discrimination import ORDER
from vlmbench.request import RunRequest
from vlmbench.runner import accuracy, latency
from vlmbench.session import Session, make_methods
from vlmbench.store import RunView
from vlmbench.tables import versions_text, wrote

if TYPE_CHECKING:
    from vlmbench.backend import Backend
    from vlmbench.progress import Progress
    from vlmbench.suite import Sample

QUESTIONS = ("all", "order", "other")
"""Questions of what came when apart from the others: those are the ones that attention between blocks is for."""

LIMITS = ((32, 132), (128, 66), (384, 33))
"""(frames up to which, questions): multiples of the eleven types of question, fewer the longer an answer takes."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured: by default what one model takes a quarter of an hour for on two CPU cores."""

    lengths: tuple[int, ...] = (32, 128, 384)
    """Frames of the videos."""
    limit: int | None = None
    """Questions of every comparison; None: as many as `LIMITS` has for the length."""
    timed: int = 6
    """Videos of every time with an interval; a median has none on fewer."""
    repeats: int = 3
    latency_limit_s: float = 1.0
    longest_prefill_s: float = 10.0
    """No longer video is begun than one whose dense prefill should take so long."""
    threads: int | None = None

    def questions(self, length: int) -> int:
        return self.limit or next((n for most, n in LIMITS if length <= most), LIMITS[-1][1])

    @property
    def shortest(self) -> int:
        return min(self.lengths)

    @property
    def middle(self) -> int:
        return sorted(self.lengths)[len(self.lengths) // 2]

    @property
    def longest(self) -> int:
        return max(self.lengths)


class Answers(NamedTuple):
    """The same questions under several methods."""

    samples: Sequence[Sample]
    of: Mapping[str, Mapping[str, SampleRecord]]
    """Method as it was named -> sample id -> its record."""
    runs: Mapping[str, Loaded]

    def ids(self, questions: str = "all") -> list[str]:
        return [sample.id for sample in self.samples if asks(questions, sample.strata["type"])]


def asks(questions: str, kind: str) -> bool:
    return questions == "all" or (kind in ORDER) == (questions == "order")


@dataclass
class Study:
    """One model under measurement."""

    model: str
    backend: Backend
    runs: Path
    scale: Scale
    progress: Progress
    measured_on: dict[str, None] = field(default_factory=dict)
    """Machines and versions that the part in hand rests on, in order."""

    def request(self, suite: str, methods: Sequence[str], **more: Any) -> RunRequest:
        given = {"baseline": False, "device": "cpu", "offline": True, "threads": self.scale.threads, **more}
        return RunRequest(methods=tuple(methods), model=self.model, suite=suite, out=self.runs, **given)

    def answers(self, suite: str, methods: Sequence[str], limit: int, **more: Any) -> Answers:
        """The accuracy pass, as ``vlmbench run`` stores it: what is there already is not run again."""
        return self._stored(suite, methods, ("accuracy",), limit=limit, mode="accuracy", **more)

    def timed(self, suite: str, methods: Sequence[str], videos: int, limit: int, **more: Any) -> Answers:
        """Accuracy and interleaved latency passes of the same runs; each method's bound comes from the former's work."""
        repeats = self.scale.repeats
        return self._stored(suite, methods, ("accuracy", "latency"), limit=limit, timed=videos, repeats=repeats, **more)

    def _stored(self, suite: str, methods: Sequence[str], passes: Sequence[str], **more: Any) -> Answers:
        request = self.request(suite, methods, **more)
        with Session(request, self.progress, backend=self.backend) as session:
            self.progress.note(session.describe())
            if "accuracy" in passes:
                for entry in session.entries:
                    accuracy(session, entry)
            if "latency" in passes:
                latency(session)
            made = [entry.method for entry in session.entries]
        # As they are on disk, rounded: a call that runs nothing writes the same numbers.
        runs = [Loaded(RunView(entry.run.folder)) for entry in session.entries]
        for run in runs:
            for each in wrote(run.view):
                self.rests_on(each["device"], each["measure"]["threads"], each)
        at = {text: made.index(make_methods((text,))[0]) for text in methods}
        ids = [sample.id for sample in session.samples]
        of = {text: {id_: runs[number].accuracy[id_] for id_ in ids} for text, number in at.items()}
        return Answers(session.samples, of, {text: runs[number] for text, number in at.items()})

    def rests_on(self, device: Mapping[str, Any], threads: int, versions: Mapping[str, Any]) -> None:
        said = f"{device['cpu']}, {device['cores']} cores, {threads} threads; {versions_text(versions)}"
        self.measured_on[said] = None


def score(record: SampleRecord) -> float:
    """Unfinished and unreadable answers are wrong."""
    return record.score if record.status == "ok" else 0.0


def estimate(name: str, found: stats.Estimate | None) -> Row:
    """`name`, `name_low` and `name_high`; None where nothing is known."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), found or (None, None, None), strict=True))


def accuracies(own: Mapping[str, SampleRecord], ids: Sequence[str]) -> Row:
    """How one method answered these questions."""
    records = [own[id_] for id_ in ids]
    return {
        "n": len(ids),
        "n_failed": sum(each.status not in FINISHED for each in records),
        "n_inactive": sum(not each.applied for each in records if each.status in FINISHED),
        **estimate("accuracy", stats.accuracy_interval([*map(score, records)], [each.cluster for each in records])),
    }


def difference(
    name: str, own: Mapping[str, SampleRecord], other: Mapping[str, SampleRecord], ids: Sequence[str]
) -> Row:
    """Accuracy of `own` minus `other`'s on the same questions, clustered by video."""
    mine, theirs = ([score(each[id_]) for id_ in ids] for each in (own, other))
    return estimate(name, stats.paired_delta(mine, theirs, [own[id_].cluster for id_ in ids]))


def contrast(
    name: str,
    one: Sequence[Mapping[str, SampleRecord]],
    other: Sequence[Mapping[str, SampleRecord]],
    ids: Sequence[str],
) -> Row:
    """Mean accuracy under the settings `one` minus that under `other`, question by question."""
    mine, theirs = ([fmean(score(each[id_]) for each in side) for id_ in ids] for side in (one, other))
    return estimate(name, stats.paired_delta(mine, theirs, [one[0][id_].cluster for id_ in ids]))


def suite_of(length: int, **more: object) -> str:
    return "synthvideo:" + ",".join(f"{key}={value}" for key, value in {"length": length, **more}.items())


def pairs_relative(
    own: Mapping[str, SampleRecord], full: Mapping[str, SampleRecord], ids: Sequence[str]
) -> float | None:
    """Query-key pairs of `own` over full attention's, mean over questions; None where none were counted."""
    works = [(own[id_].work, full[id_].work) for id_ in ids]
    known = [mine["attention_flops"] / theirs["attention_flops"] for mine, theirs in works if mine and theirs]
    return fmean(known) if known else None
