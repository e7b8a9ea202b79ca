"""``run --questions-per-video K``: what K questions on one video cost when the next ones reuse the video's keys and values.

A video's first question pays for vision and the whole prompt. Under a method with `Traits.prefix_reusable` the next ones
prefill their own tokens behind it; full attention may as well, and is what the speed-up is taken against. A method without it
answers each question separately. Every method is also timed without reuse, all ways in turns, on the same videos.
Decoding the video counts once in every way: its frames are in memory. The times go into a file beside the runs; answers
do not change, so nothing else is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from vlmbench import aside, header, stats
from vlmbench.errors import UsageError
from vlmbench.loaded import INACTIVE_LIMIT, typed
from vlmbench.record import SCHEMA
from vlmbench.session import Session, make_methods
from vlmbench.spec import joined, params_of

if TYPE_CHECKING:
    from vlmbench.backend import Backend, Outcome
    from vlmbench.method import Method
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest
    from vlmbench.suite import Sample
    from vlmbench.video import Clip

Rounds = list[tuple[float, ...]]
"""Of each round, the end-to-end seconds of every question on one video, the first one's with decoding the video."""


@dataclass(frozen=True)
class Way:
    """A method, whether the next questions reuse its prefix, and the attention kernel; None for the run's own."""

    method: Method = field(hash=False)
    reuse: bool
    kernel: str | None = None


@dataclass
class Timed:
    """One video."""

    cluster: str
    rounds: dict[Way, Rounds] = field(default_factory=dict)
    last: dict[Way, list[Outcome]] = field(default_factory=dict)
    failed: dict[Way, str] = field(default_factory=dict)
    """Why a way has no times here."""


def run(request: RunRequest, progress: Progress, backend: Backend | None = None) -> int:
    """Time the videos, print the table, and return the exit code. Raises `UsageError` and `RunError`.

    `backend` is one that is loaded already.
    """
    k = request.questions_per_video
    if k is None:
        raise ValueError("the request has no number of questions per video")
    with Session(request, progress, backend=backend, stored=False) as session:
        methods = [method for method in session.methods if method.traits.uses_model]
        if not methods:
            raise UsageError("--questions-per-video needs a method that calls the model; name one with --method.")
        videos = together(session, k)
        progress.note(f"{session.describe()}; {k} questions on each of {len(videos)} videos")
        dense, pairs = ways_of(session, methods)
        ways = list(dict.fromkeys([*dense, *(way for pair in pairs for way in pair)]))
        session.clips(videos[0][0], session.blank(videos[0][0], "latency"))  # starts the decoder: no video's cost
        progress.start(len(videos), f"{k} questions a video")
        timed = []
        for samples in videos:
            timed.append(_video(session, samples, ways))
            progress.advance()
        progress.finish()
        rows = [_row(session, timed, dense, *pair) for pair in pairs]
        _write(session, methods, rows, k)
        print(to_text(session, rows, k, len(videos)))
    return 1 if request.strict and any(video.failed for video in timed) else 0


def together(session: Session, k: int) -> list[list[Sample]]:
    """`k` questions on each of the timed videos that have so many, with the same captions. Raises `UsageError`."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in session.suite.samples("test"):
        groups[_media(sample)].append(sample)
    found = [groups[_media(sample)] for sample in session.timed_samples() if sample.media]
    enough = [samples[:k] for samples in found if len(samples) >= k]
    if not enough:
        most = max(map(len, found), default=0)
        raise UsageError(
            f"--questions-per-video {k} needs media with so many questions; those of {session.request.suite} "
            f"have at most {most}."
        )
    if len(enough) < len(found):
        session.progress.note(f"{len(found) - len(enough)} videos have fewer than {k} questions and are left out")
    return enough


def _media(sample: Sample) -> str:
    return repr((sample.media, sample.captions))


def ways_of(session: Session, methods: Sequence[Method]) -> tuple[list[Way], list[tuple[Way, Way]]]:
    """(full attention with reuse under every kernel that may be the fastest, each method's ways: reused if it may, apart)."""
    full = next((method for method in methods if method.name == "full"), None) or make_methods(("full",))[0]
    best, own = session.backend.best_dense_kernel(), session.backend.identity.attention
    dense = [Way(full, True, kernel) for kernel in dict.fromkeys([best, own])]
    pairs = []
    for method in methods:
        kernel = own if method.name == "full" else None
        pairs.append((Way(method, method.traits.prefix_reusable, kernel), Way(method, False, kernel)))
    return dense, pairs


def _video(session: Session, samples: Sequence[Sample], ways: Sequence[Way]) -> Timed:
    """All ways in turns; the order turns by one each round, warm-up is dropped, and who fails is out."""
    timed = Timed(samples[0].cluster, rounds={way: [] for way in ways})
    blank = session.blank(samples[0], "latency")
    clips = session.clips(samples[0], blank, timed=True)
    if clips is None:
        timed.failed = dict.fromkeys(ways, f"{blank.status}: {blank.error}")
        return timed
    video_s = blank.timing.video_s if blank.timing else 0.0
    for turn in range(session.request.warmup + session.request.repeats):
        first = turn % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            if way in timed.failed:
                continue
            session.progress.stage(f"{way.method.name}{', reused' if way.reuse else ''}, round {turn + 1}")
            outcomes = timed.last[way] = _ask(session, way, samples, clips)
            bad = [each for each in outcomes if each.status != "ok" or each.timing is None]
            if bad:
                timed.failed[way] = f"{bad[0].status}: {bad[0].error}"
            elif turn >= session.request.warmup:
                seconds = [each.timing.e2e_s for each in outcomes if each.timing]
                timed.rounds[way].append((seconds[0] + video_s, *seconds[1:]))
    return timed


def _ask(session: Session, way: Way, samples: Sequence[Sample], clips: Sequence[Clip]) -> list[Outcome]:
    with session.backend.attach(way.method):
        if way.reuse:
            return session.ask_together(way.method, samples, clips, way.kernel)
        return [session.ask(way.method, sample, clips, "latency", way.kernel) for sample in samples]


def _row(session: Session, videos: Sequence[Timed], dense: Sequence[Way], own: Way, apart: Way) -> dict[str, Any]:
    """One method: medians over videos of medians over rounds, and medians of paired ratios."""
    method = own.method
    good = [video for video in videos if own not in video.failed and apart not in video.failed]
    paired = [(video, full) for video in good if (full := _fastest(video, dense)) is not None]
    idle = sum(not video.last[own][0].applied for video in good)
    return {
        "method": method.name,
        "params": params_of(method) | method.fitted(),
        "reuse": own.reuse,
        "n_videos": len(good),
        "n_failed": len(videos) - len(good),
        "n_inactive": idle,
        "first_s": _median(good, own, _first),
        "next_s": _median(good, own, _next),
        "e2e_s": _median(good, own, _a_question),
        "separate_next_s": _median(good, apart, _next),
        "separate_e2e_s": _median(good, apart, _a_question),
        # A method with nothing to do was compared with itself.
        **_ratio(
            "speedup_e2e",
            [(video.cluster, video.rounds[full], video.rounds[own]) for video, full in paired]
            if idle <= INACTIVE_LIMIT * len(good)
            else [],
        ),
        **_ratio(
            "speedup_reuse",
            [(video.cluster, video.rounds[apart], video.rounds[own]) for video in good] if own.reuse else [],
        ),
        "same_tokens": _same_tokens(good, own, apart) if own.reuse else None,
        "marks": _marks(session, method, [each for video in good for each in video.last[own]]),
        "note": "" if own.reuse else "each question separately: its keys of the video may depend on the question",
        "videos": [
            {
                "cluster": video.cluster,
                "rounds_s": [list(each) for each in video.rounds[own]],
                "separate_rounds_s": [list(each) for each in video.rounds[apart]],
                "failed": video.failed.get(own) or video.failed.get(apart) or "",
            }
            for video in videos
        ],
    }


def _first(seconds: Sequence[float]) -> float:
    return seconds[0]


def _next(seconds: Sequence[float]) -> float:
    """Mean over the questions after the first."""
    return sum(seconds[1:]) / (len(seconds) - 1)


def _a_question(seconds: Sequence[float]) -> float:
    """All of one round, shared out over its questions."""
    return sum(seconds) / len(seconds)


def _median(videos: Sequence[Timed], way: Way, of: Callable[[Sequence[float]], float]) -> float | None:
    return median(median(map(of, video.rounds[way])) for video in videos) if videos else None


def _fastest(video: Timed, dense: Sequence[Way]) -> Way | None:
    """What is taken for the best kernel need not be."""
    known = [way for way in dense if way not in video.failed]
    return min(known, key=lambda way: median(map(_a_question, video.rounds[way])), default=None)


def _ratio(name: str, pairs: Sequence[tuple[str, Rounds, Rounds]]) -> dict[str, float | None]:
    """Seconds of the one over the other, paired round by round; above 1 the other is faster."""
    ratios = [
        median(_a_question(one) / _a_question(other) for one, other in zip(ones, others, strict=True))
        for _, ones, others in pairs
    ]
    found = stats.ratio_interval(ratios, [cluster for cluster, *_ in pairs]) or (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def _same_tokens(videos: Sequence[Timed], own: Way, apart: Way) -> float | None:
    """Share of questions with the same token ids with reuse and without, all of them, whatever the answer's length."""
    same = [
        one.output_ids == other.output_ids
        for video in videos
        for one, other in zip(video.last[own], video.last[apart], strict=True)
    ]
    return sum(same) / len(same) if same else None


def _marks(session: Session, method: Method, outcomes: Sequence[Outcome]) -> list[str]:
    known = {
        "cpu": session.backend.identity.device_type == "cpu",
        "masked": method.traits.masked or any((each.trace or {}).get("masked") for each in outcomes),
    }
    return [mark for mark, holds in known.items() if holds]


def path_of(session: Session, methods: Sequence[Method], k: int) -> Path:
    """Beside the runs; what can change an answer or its seconds is in the name's hash, so no command overwrites another's."""
    request = session.request
    folders = [session.folder(method) for method in methods]
    measured = (request.limit, request.timed, request.warmup, request.repeats, request.threads)
    text = json.dumps([sorted(folder.name for folder in folders), measured])
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return folders[0].parent / f"questions-per-video-{k}-{digest}.json"


def _write(session: Session, methods: Sequence[Method], rows: Sequence[Mapping[str, Any]], k: int) -> None:
    data = {
        "schema": SCHEMA,
        "rows": rows,
        "questions_per_video": k,
        "frames": session.frames,
        **aside.conditions(session),
    }
    aside.write(path_of(session, methods, k), data)


def to_text(session: Session, rows: Sequence[Mapping[str, Any]], k: int, n_videos: int) -> str:
    """The table, and what its columns rest on."""
    lines = [
        "| method | first, s | next, s | per question, s | without reuse, s | reuse × | over full × | same tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        seconds = [_shown(row[name], ".4g") for name in ("first_s", "next_s", "e2e_s", "separate_e2e_s")]
        ratios = [_interval(row, name) for name in ("speedup_reuse", "speedup_e2e")]
        name = f"`{joined(row['method'], typed(row['params']))}`".replace("|", "\\|")
        cells = [name, *seconds, *ratios, _shown(row["same_tokens"], ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    request, identity = session.request, session.backend.identity
    said = [
        f"{k} questions on each of {n_videos} videos, {session.max_new_tokens} tokens each whatever the answer; medians over "
        f"videos of {request.repeats} interleaved rounds after {request.warmup} of warm-up",
        "first: with decoding the video, vision and the whole prompt; next: its own text behind the kept keys and values; per "
        f"question: the sum over {k}; decoding the video counts once with reuse and without",
        "×: above 1 is faster; over full: over full attention with the best dense kernel, which reuses as well",
        "same tokens: questions whose token ids are the same with reuse and without",
        f"{identity.device_name} ({header.cpu_name()}, {identity.facts.get('threads', 0)} threads), {identity.dtype}, "
        f"attention {identity.attention_kernel}: seconds are this machine's",
    ]
    said += [f"`{row['method']}`: {row['note']}" for row in rows if row["note"]]
    for row in rows:
        if row["n_failed"]:
            why = next(video["failed"] for video in row["videos"] if video["failed"])
            said.append(f"`{row['method']}`: failed on {row['n_failed']} videos ({why})")
        if row["n_inactive"]:
            said.append(f"`{row['method']}`: had nothing to do on {row['n_inactive']} of {row['n_videos']} videos")
        if "masked" in row["marks"]:
            said.append(f"`{row['method']}`: masked, so its time says nothing about the method")
    said += [f"left out: `{each.name}`, which calls no model" for each in session.methods if not each.traits.uses_model]
    head = f"**{identity.model}** on **{request.suite}**, {k} questions a video"
    return "\n".join([head, "", *lines, "", *(f"- {each}" for each in said)])


def _shown(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _interval(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row[name + part] for part in ("", "_low", "_high"))
    return _shown(value, ".2f") + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
