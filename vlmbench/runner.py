"""One ``vlmbench run``: what is missing in the store is computed, pass by pass, sample by sample, and appended at once.

Accuracy keeps a method attached and walks the samples. Latency turns that round: for each video, rounds in which all
methods and the dense baseline take turns in rotating order, so that a drifting machine hits them alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from vlmbench.backend import Outcome
from vlmbench.errors import RunError
from vlmbench.record import FINISHED, SampleRecord, Timing
from vlmbench.request import RunRequest
from vlmbench.session import Entry, Session, make_methods

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.progress import Progress
    from vlmbench.suite import Sample
    from vlmbench.video import Clip

Runner = tuple["Method", str | None]
"""A method, and the attention kernel to run it under; None for the run's own."""


def run(request: RunRequest, progress: Progress) -> int:
    """Do what is asked, print the table, and return the exit code. Raises `UsageError` and `RunError`."""
    with warnings.catch_warnings():
        if request.strict:  # by its text: its class would bring torch, which the stand-in `dummy` never needs
            warnings.filterwarnings("error", message="(?s).*(masked|gathered) reference stands in")
        if request.latency_limit is not None:
            from vlmbench import latency_limit

            return latency_limit.run(request, progress)
        if request.questions_per_video is not None:
            from vlmbench import questions_per_video

            return questions_per_video.run(request, progress)
        return _passes(request, progress)


def _passes(request: RunRequest, progress: Progress) -> int:
    with Session(request, progress) as session:
        progress.note(session.describe())
        if "accuracy" in request.passes:
            for entry in session.entries:
                accuracy(session, entry)
            for entry in session.add(_rivals(session)) if request.trivial else ():
                accuracy(session, entry)
        if "latency" in request.passes:
            latency(session)
        if "memory" in request.passes:
            for entry in session.entries:
                memory(session, entry)
        return conclude(session)


def _rivals(session: Session) -> tuple[str, ...]:
    """The trivial methods at the budgets that the methods were found to have."""
    from vlmbench.loaded import Loaded
    from vlmbench.rivals import wanted

    runs = [Loaded(entry.run) for entry in session.entries]
    if any(run.mixed for run in runs):
        session.progress.note(
            "--trivial found videos of several lengths, for which one number of tokens is no budget; choose one length."
        )
    return wanted(runs)


def accuracy(session: Session, entry: Entry) -> None:
    """Answer and score every sample that the run does not hold yet."""
    done = entry.run.done("accuracy", retry_errors=True)
    missing = [sample for sample in session.samples if sample.id not in done]
    if not missing:
        return
    with session.backend.attach(entry.method):
        for sample in session.each(missing, f"accuracy · {entry.method.name}", ahead=True):
            _append(entry, scored(session, entry.method, sample))


def scored(session: Session, method: Method, sample: Sample) -> SampleRecord:
    """One question answered by an attached method, and scored."""
    record = session.blank(sample, "accuracy")
    clips = session.clips(sample, record)
    if clips is None:
        return record
    session.progress.stage("answer")
    outcome = session.ask(method, sample, clips, "accuracy")
    record = _filled(record, outcome)
    record.output_ids, record.raw_text = outcome.output_ids, outcome.raw_text
    record.first_token, record.work = outcome.first_token, outcome.work
    if outcome.status == "ok":
        score = session.suite.score(sample, outcome.raw_text)
        record.score, record.prediction = score.value, score.prediction
        record.status = "ok" if score.prediction is not None else "parse_fail"
    return record


def latency(session: Session) -> None:
    """Time each video under every method in interleaved rounds; each record carries the baseline's rounds beside its own."""
    entries = [entry for entry in session.entries if entry.method.traits.uses_model]
    done = [entry.run.done("latency", retry_errors=True) for entry in entries]
    missing = [s for s in session.timed_samples() if any(s.id not in ids for ids in done)]
    if not missing:
        return
    full = next((e.method for e in entries if e.method.name == "full"), make_methods(("full",))[0])
    best, own = session.backend.best_dense_kernel(), session.backend.identity.attention
    runners: dict[str, Runner] = {"best": (full, best)}
    if own != best:
        runners["own"] = (full, own)
    names = [
        ("own" if own != best else "best") if entry.method.name == "full" else str(number)
        for number, entry in enumerate(entries)
    ]
    runners |= {name: (entry.method, None) for name, entry in zip(names, entries, strict=True) if name.isdigit()}
    session.clips(missing[0], session.blank(missing[0], "latency"))  # starts the decoder, which is no video's cost
    for sample in session.each(missing, "latency"):
        blank = session.blank(sample, "latency")
        clips = session.clips(sample, blank, timed=True)
        video_s = blank.timing.video_s if blank.timing else 0.0
        rounds, last = ({}, {}) if clips is None else interleaved(session, runners, sample, clips, video_s)
        for entry, name, ids in zip(entries, names, done, strict=True):
            if sample.id in ids:
                continue
            record = replace(blank, timing=None)
            if name in last:
                record = _filled(record, last[name])
            if record.status == "ok" and rounds.get(name):
                record.rounds, record.timing = rounds[name], median_timing(rounds[name])
                record.baseline_rounds = rounds[_faster_dense(rounds)]
                record.same_kernel_rounds = rounds.get("own", [])
            _append(entry, record)


def _faster_dense(rounds: dict[str, list[Timing]]) -> str:
    """Of the dense baselines that were timed, the faster: what is taken for the best kernel need not be."""
    known = [name for name in ("best", "own") if rounds.get(name)]
    return min(known, key=lambda name: median(each.e2e_s for each in rounds[name]), default="best")


def interleaved(
    session: Session, runners: dict[str, Runner], sample: Sample, clips: Sequence[Clip], video_s: float
) -> tuple[dict[str, list[Timing]], dict[str, Outcome]]:
    """(timings, last outcome) of every runner. The order turns by one each round; warm-up is dropped; who fails is out."""
    names = list(runners)
    rounds: dict[str, list[Timing]] = {name: [] for name in names}
    last: dict[str, Outcome] = {}
    for turn in range(session.request.warmup + session.request.repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in last and last[name].status != "ok":
                continue
            method, kernel = runners[name]
            session.progress.stage(f"{method.name}, round {turn + 1}")
            with session.backend.attach(method):
                outcome = last[name] = session.ask(method, sample, clips, "latency", kernel)
            if outcome.timing is not None and turn >= session.request.warmup:
                whole = outcome.timing.e2e_s + video_s
                rounds[name].append(replace(outcome.timing, video_s=video_s, e2e_s=whole))
    return rounds, last


def memory(session: Session, entry: Entry) -> None:
    """Peak and cache bytes of the timed videos, in a pass of their own."""
    if not entry.method.traits.uses_model:
        return
    done = entry.run.done("memory", retry_errors=True)
    missing = [sample for sample in session.timed_samples() if sample.id not in done]
    if not missing:
        return
    with session.backend.attach(entry.method):
        for sample in session.each(missing, f"memory · {entry.method.name}"):
            record = session.blank(sample, "memory")
            clips = session.clips(sample, record)
            if clips is not None:
                outcome = session.ask(entry.method, sample, clips, "memory")
                record = _filled(record, outcome)
                record.memory = outcome.memory
            _append(entry, record)


def conclude(session: Session) -> int:
    """Close the runs, print the table, and give the exit code."""
    from vlmbench import report

    runs = [entry.run for entry in session.entries]
    for each in runs:
        each.finish("done")
    session.progress.finish()
    if rows := report.rows(runs):
        print(report.to_markdown(rows))
    for entry in session.entries:
        _refuse_if_idle(entry)
    failed = sum(record.status not in FINISHED for each in runs for record in each.records.values())
    return 1 if failed and session.request.strict else 0


def _refuse_if_idle(entry: Entry) -> None:
    """A method that had nothing to do on every sample was compared with itself: that is an error, not a result.

    A rival that ``--trivial`` asked is marked in the table, and nobody's error: of several pictures in a prompt no fewer
    frames can be taken, which a record does not tell.
    """
    if not entry.asked:
        return
    records = [record for record in entry.run.records.values() if record.status in FINISHED]
    if records and not any(record.applied for record in records):
        raise RunError(
            f"{entry.method.name} had nothing to do on any of {len(records)} records ({records[-1].reason}); "
            f"choose other parameters or a suite that it can act on."
        )


def median_timing(rounds: Sequence[Timing]) -> Timing:
    """Field by field, step by step: the median over the rounds."""
    scalars = {
        name: median(getattr(each, name) for each in rounds)
        for name in Timing.__dataclass_fields__
        if name != "decode_s"
    }
    steps = zip(*(each.decode_s for each in rounds), strict=True)
    return Timing(decode_s=tuple(median(step) for step in steps), **scalars)


def _append(entry: Entry, record: SampleRecord) -> None:
    """Write it, counting the attempts: a sample that failed in an earlier session is tried again."""
    if (record.id, record.pass_) in entry.run.records:
        record.attempts = entry.run.records[record.id, record.pass_].attempts + 1
    entry.run.append(record)


def _filled(record: SampleRecord, outcome: Outcome) -> SampleRecord:
    """The record with what every pass notes of an outcome."""
    return replace(
        record,
        status=outcome.status,
        error=outcome.error,
        applied=outcome.applied,
        reason=outcome.reason,
        tokens=outcome.tokens,
        trace=outcome.trace,
        timing=None,
    )
