"""The sentences and tables about time: each takes one model's rows of its part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmbench.claims_study import QUESTIONS
from vlmbench.claims_text_accuracy import LOSS, WORST, by
from vlmbench.claims_verdict import Verdict, above, counted, direction, judged, near, number, sentence, shown, signed
from vlmbench.reference.inside_format import table

Row = Mapping[str, Any]

SHARE = 0.8
"""Of Amdahl's bound on prefill that is asked for."""


def latency(rows: Sequence[Row]) -> Iterable[str]:
    head = ["method", "frames in time", "seconds", "n", "accuracy", "against full, each at its own frames"]
    lines = [
        [
            f"`{row['method']}`",
            number(row["frames"], "d"),
            number(row["seconds"], ".3g"),
            counted(row) if row["n"] else "—",
            shown(row, "accuracy"),
            "—" if row["method"] == "full" else signed(row, "delta"),
        ]
        for row in rows
    ]
    limit, length = rows[0]["limit_s"], rows[0]["length"]
    yield f"At most {limit:g} s from the video file to the last token, of {length} frames:\n\n" + table(head, lines)
    yield "\n".join(_in_time(rows))


def _in_time(rows: Sequence[Row]) -> Iterable[str]:
    at = {row["method"]: row for row in rows}
    own, full = at["pevlm"], at["full"]
    if own["frames"] is None:
        yield sentence(Verdict.FAILED, f"PEVLM meets {own['limit_s']:g} s at some number of frames.")
        return
    most = full["frames"] or 0
    verdict = Verdict.HELD if own["frames"] > most else Verdict.FAILED if own["frames"] < most else Verdict.OPEN
    yield sentence(
        verdict,
        f"in that time PEVLM sees more frames than full attention: {own['frames']} against {most} (steps of a factor of two, "
        f"so a smaller gain does not show).",
    )
    yield sentence(
        above(own, "delta"),
        f"in that time PEVLM is more accurate than full attention: {signed(own, 'delta')} ({shown(own, 'accuracy')} against "
        f"{shown(full, 'accuracy')}).",
    )


def lengths(rows: Sequence[Row]) -> Iterable[str]:
    timed = by([row for row in rows if row["kind"] == "time"], "length", "method")
    frames = sorted({length for length, _ in timed})
    head = ["frames", "tokens", "videos", "full, s", "PEVLM, s", "×", "pairs of full"]
    lines = []
    for length in frames:
        own, full = timed[length, "pevlm"], timed[length, "full"]
        lines.append(
            [
                str(length),
                number(own["tokens"], ".0f"),
                str(own["videos"]),
                number(full["prefill_s"], ".3g"),
                number(own["prefill_s"], ".3g"),
                shown(own, "speedup_prefill"),
                number(own["pairs_relative"], ".3f"),
            ]
        )
    yield table(head, lines)
    yield "\n".join(_growth(timed, frames, next((row for row in rows if row["kind"] == "end"), None)))


def _growth(timed: Mapping[tuple[Any, ...], Row], frames: Sequence[int], end: Row | None) -> Iterable[str]:
    known = [length for length in frames if timed[length, "pevlm"]["speedup_prefill_low"] is not None]
    if len(known) > 1:
        short, long = (timed[length, "pevlm"] for length in (known[0], known[-1]))
        low, high = (f"speedup_prefill_{each}" for each in ("low", "high"))
        verdict = (
            Verdict.HELD if long[low] > short[high] else Verdict.FAILED if long[high] < short[low] else Verdict.OPEN
        )
        yield sentence(
            verdict,
            f"the longer the video, the more PEVLM saves: {shown(short, 'speedup_prefill', unit='×')} at {known[0]} frames, "
            f"{shown(long, 'speedup_prefill', unit='×')} at {known[-1]}.",
        )
    else:
        yield sentence(
            Verdict.OPEN, "the longer the video, the more PEVLM saves: fewer than two lengths have an interval."
        )
    done = [length for length in frames if timed[length, "full"]["prefill_s"] and timed[length, "pevlm"]["prefill_s"]]
    if len(done) > 1:
        one, other = done[-2:]
        powers = [_power(timed[one, each]["prefill_s"], timed[other, each]["prefill_s"], other / one) for each in _BOTH]
        yield (
            f"- From {one} to {other} frames full attention's prefill grows with the power {powers[0]:.2f} of the length, "
            f"PEVLM's with the power {powers[1]:.2f} (1 is linear, 2 quadratic; the layers besides attention are linear)."
        )
    if end is None:
        return
    if end["reason"] == "failed":
        yield f"- Here this machine stops: {end['length']} frames failed ({end['error']})."
    else:
        yield (
            f"- Here this machine stops: {end['length']} frames were not begun, since full attention's prefill would "
            f"take up to {end['predicted_s']:.0f} s and {end['limit_s']:g} s was the most."
        )


_BOTH = ("full", "pevlm")


def _power(before: float, after: float, factor: float) -> float:
    return math.log(after / before) / math.log(factor)


def speed(rows: Sequence[Row]) -> Iterable[str]:
    at = by(rows, "questions")
    row = at["all",]
    head = [
        "frames",
        "tokens",
        "videos",
        "prefill ×",
        "at most",
        "share of it",
        "n",
        *(f"against full, {q}" for q in QUESTIONS),
    ]
    yield table(
        head,
        [
            [
                str(row["length"]),
                number(row["tokens"], ".0f"),
                str(row["videos"]),
                shown(row, "speedup_prefill"),
                number(row["amdahl_prefill"], ".2f"),
                shown(row, "share"),
                counted(row),
                *(signed(at[questions,], "delta") for questions in QUESTIONS),
            ]
        ],
    )
    bound = judged(row, above(row, "share", SHARE))
    price = judged(row, near(row, "delta", LOSS, WORST))
    said = [
        sentence(bound, f"prefill reaches at least {SHARE} of its bound: {shown(row, 'share')}."),
        sentence(
            price,
            f"with its defaults PEVLM loses at most {100 * LOSS:.0f} points against full attention and the lower end of the "
            f"interval is above −{100 * WORST:.0f}: {signed(row, 'delta')} on {row['n']} questions.",
        ),
    ]
    if price is not Verdict.HELD:
        order, other = (f"{direction(at[q,], 'delta')} ({signed(at[q,], 'delta')})" for q in ("order", "other"))
        said.append(
            f"- Where it comes from: on order questions {order}; on others {other}. The curve over sink and block is above, "
            f"under *Sink and block*."
        )
    yield "\n".join(said)


def questions(rows: Sequence[Row]) -> Iterable[str]:
    head = [
        "method",
        "keeps the keys",
        "first, s",
        "next, s",
        "per question, s",
        "without, s",
        "reuse ×",
        "over full ×",
        "same tokens",
    ]
    lines = [
        [
            f"`{row['method']}`",
            "yes" if row["reuse"] else "no",
            *(number(row[name], ".3g") for name in ("first_s", "next_s", "e2e_s", "separate_e2e_s")),
            *(shown(row, f"speedup_{name}") for name in ("reuse", "e2e")),
            number(row["same_tokens"], ".2f"),
        ]
        for row in rows
    ]
    first = rows[0]
    yield f"{first['k']} questions on each of {first['n_videos']} videos of {first['length']} frames:\n\n" + table(
        head, lines
    )
    kept = [row for row in rows if row["reuse"]]
    keeping = ", ".join(f"`{row['method']}`" for row in kept)
    apart = ", ".join(f"`{row['method']}`" for row in rows if not row["reuse"]) or "none"
    same = [row["same_tokens"] for row in kept if row["same_tokens"] is not None]
    verdict = Verdict.MISSING if not same else Verdict.HELD if min(same) == 1 else Verdict.FAILED
    own = next(row for row in rows if row["method"] == "pevlm")
    yield "\n".join(
        [
            sentence(
                verdict,
                f"{keeping} may keep a video's keys and give the same tokens with them as without; {apart} may not.",
            ),
            sentence(
                above(own, "speedup_reuse", 1.0),
                f"keeping them makes PEVLM's questions faster: {shown(own, 'speedup_reuse', unit='×')} a question.",
            ),
            sentence(
                above(own, "speedup_e2e", 1.0),
                f"with full attention keeping its own as well, PEVLM is faster a question: "
                f"{shown(own, 'speedup_e2e', unit='×')}.",
            ),
        ]
    )
