"""The claims about time: accuracy under a latency limit, prefill against length, the share of Amdahl's bound, more questions.

Each part takes a `Study`, runs what its store lacks, and gives rows. What the rows mean is written in `claims_text`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmbench import latency_limit, questions_per_video, report
from vlmbench.claims_accuracy import OWN
from vlmbench.claims_study import (
    QUESTIONS,
    Answers,
    Row,
    Study,
    accuracies,
    difference,
    estimate,
    pairs_relative,
    suite_of,
)
from vlmbench.loaded import Loaded, median_of
from vlmbench.session import Session
from vlmbench.store import RunView

LIMITED = ("full", OWN, "star")
CLIMBED = 2
"""Videos on which every frame count is timed."""
ASKED_TOGETHER = ("full", OWN, "block", "ape", "star", "random:ratio=0.25")
TOGETHER = 3
"""Questions on one video: as many as synthvideo has."""
LONG_VIDEOS = 1
"""Timed at lengths beyond those that the model was trained for."""


def speed(study: Study) -> list[Row]:
    """Prefill against full attention at the longest length, the bound on it, and what it costs in accuracy."""
    length = study.scale.longest
    found = study.timed(suite_of(length), ["full", OWN], study.scale.timed, study.scale.questions(length))
    own, full = found.of[OWN], found.of["full"]
    row = _timed(found, OWN)
    bound = row["amdahl_prefill"]
    share = {f"share{end}": _over(row[f"speedup_prefill{end}"], bound) for end in ("", "_low", "_high")}
    rows = []
    for questions in QUESTIONS:
        ids = found.ids(questions)
        answered = {**accuracies(own, ids), **difference("delta", own, full, ids)}
        rows.append({"length": length, "questions": questions, "method": OWN, **row, **share, **answered})
    return rows


def _over(value: float | None, bound: float | None) -> float | None:
    return value / bound if value is not None and bound else None


def _timed(found: Answers, method: str) -> Row:
    """Seconds, speed-up and bound of one method, as the table of its run has them."""
    rows = report.rows([each.view for each in found.runs.values()])
    row = next(row for row in rows if row["method"] == method)
    names = ("prefill_s", "ttft_s", "speedup_prefill", "speedup_prefill_low", "speedup_prefill_high", "amdahl_prefill")
    latencies = found.runs[method].latency.values()
    return {name: row[name] for name in names} | {
        "videos": len({each.cluster for each in latencies}),
        "tokens": median_of(each.tokens["prompt"] for each in latencies if "prompt" in each.tokens),
    }


def lengths(study: Study) -> list[Row]:
    """Prefill seconds at the study's lengths, then at twice the longest again and again, until the machine is too slow.

    The last row says which length was not begun, and why.
    """
    scale = study.scale
    rows: list[Row] = []
    length, known = min(scale.lengths), sorted(scale.lengths)
    while True:
        beyond = length not in known
        videos = LONG_VIDEOS if beyond else scale.timed
        found = study.timed(suite_of(length), ["full", OWN], videos, min(videos, scale.questions(length)))
        ids = found.ids()
        times = {method: _timed(found, method) for method in found.of}
        for method, own in found.of.items():
            pairs = pairs_relative(own, found.of["full"], ids)
            rows.append({"kind": "time", "length": length, "method": method, **times[method], "pairs_relative": pairs})
        dense = times["full"]["prefill_s"]
        if dense is None:  # the machine has no memory for it
            records = found.runs["full"].view.records.of("latency").values()
            why = next((each.error for each in records if each.error), "no answer")
            return [*rows, {"kind": "end", "length": length, "reason": "failed", "error": why, "predicted_s": None}]
        later = [each for each in known if each > length]
        following = later[0] if later else 2 * length
        predicted = dense * (following / length) ** 2  # an upper bound: only attention is quadratic
        if not later and predicted > scale.longest_prefill_s:
            end = {"reason": "slow", "error": "", "predicted_s": predicted, "limit_s": scale.longest_prefill_s}
            return [*rows, {"kind": "end", "length": following, **end}]
        length = following


def latency(study: Study) -> list[Row]:
    """The most frames that each method answers in time, and its accuracy there (`vlmbench.latency_limit`)."""
    scale = study.scale
    request = study.request(
        suite_of(scale.longest),
        LIMITED,
        limit=scale.questions(scale.longest),
        timed=CLIMBED,
        repeats=scale.repeats,
        latency_limit=scale.latency_limit_s,
    )
    with Session(request, study.progress, backend=study.backend, stored=False) as session:
        path = latency_limit.path_of(session, latency_limit.climbs_of(session))
    data = _aside(path)
    if data is None or any(row["frames"] and not row["run"] for row in data["rows"]):  # stopped before the answers
        latency_limit.run(request, study.progress, study.backend)
        data = _written(path)
    _rests_on(study, data)
    runs = {
        row["method"]: Loaded(RunView(path.parent / row["run"])).accuracy if row["run"] else {} for row in data["rows"]
    }
    asked = [sample.id for sample in session.samples]
    rows = []
    for row in data["rows"]:
        own, full = runs[row["method"]], runs["full"]
        gap = difference("delta", own, full, asked) if own and full else estimate("delta", None)
        answered = accuracies(own, asked) if own else {"n": 0, **estimate("accuracy", None)}
        seconds = {"limit_s": data["limit_s"], "frames": row["frames"], "seconds": row["seconds"]}
        rows.append({"length": scale.longest, "method": row["method"], **seconds, **answered, **gap})
    return rows


def questions(study: Study) -> list[Row]:
    """Seconds of several questions on one video, keys kept where that is exact (`vlmbench.questions_per_video`)."""
    scale = study.scale
    length = scale.middle
    request = study.request(
        suite_of(length),
        ASKED_TOGETHER,
        limit=scale.questions(length),
        timed=scale.timed,
        repeats=scale.repeats,
        questions_per_video=TOGETHER,
    )
    with Session(request, study.progress, backend=study.backend, stored=False) as session:
        path = questions_per_video.path_of(session, session.methods, TOGETHER)
    data = _aside(path)
    if data is None:
        questions_per_video.run(request, study.progress, study.backend)
        data = _written(path)
    _rests_on(study, data)
    names = ("reuse", "n_videos", "n_failed", "first_s", "next_s", "e2e_s", "separate_e2e_s", "same_tokens")
    ratios = [f"speedup_{what}{end}" for what in ("reuse", "e2e") for end in ("", "_low", "_high")]
    return [
        {"length": length, "k": TOGETHER, "method": method, **{name: row[name] for name in (*names, *ratios)}}
        for method, row in zip(ASKED_TOGETHER, data["rows"], strict=True)
    ]


def _aside(path: Path) -> Any:
    """What an earlier call measured under the same conditions."""
    return _written(path) if path.is_file() else None


def _written(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _rests_on(study: Study, data: Mapping[str, Any]) -> None:
    study.rests_on(data["device"], data["threads"], data)
