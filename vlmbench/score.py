"""``vlmbench score``: a suite's scorer on answers from a file, whichever program gave them, with no model.

The file holds one JSON object a line, or a JSON list of them, or one object id -> text. A record of ours will do, and so will
the answer files of the published benchmarks: ids and texts are looked for under the names in use (`IDS`, `TEXTS`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vlmbench.errors import UsageError

if TYPE_CHECKING:
    from vlmbench.suite import Suite

IDS = ("id", "question_id", "questionId", "qid")
TEXTS = ("raw_text", "text", "response", "prediction", "answer")
"""Ours first: in a record of ours, `prediction` is what was read from `raw_text`, and `answer` the reference."""


def score(suite: Suite, path: Path) -> list[dict[str, Any]]:
    """Rows ``field value n n_missing n_unread accuracy``: all questions first (`field` and `value` empty), then by stratum.

    Only the answered questions count in `n` and `accuracy`; `n_missing` says how many the file does not answer. Raises
    `UsageError` for a file that cannot be read and for ids that the suite does not have.
    """
    said = read_texts(path)
    if not suite.scored:
        raise UsageError(f"{suite.name} has no reference answers to score {path} with; give each question an answer.")
    samples = suite.samples("test")
    unknown = said.keys() - {sample.id for sample in samples}
    if unknown:
        raise UsageError(
            f"{path} answers {len(unknown)} questions that {suite.name} does not have (one is {min(unknown)!r}, one of "
            f"its own {samples[0].id!r}); name the suite with the parameters that the answers are for."
        )
    groups: dict[tuple[str, str], list[tuple[float, bool] | None]] = {}
    for sample in samples:
        found = suite.score(sample, said[sample.id]) if sample.id in said else None
        mark = None if found is None else (found.value, found.prediction is None)
        for key in (("", ""), *sample.strata.items()):
            groups.setdefault(key, []).append(mark)
    return [_row(field, value, marks) for (field, value), marks in sorted(groups.items())]


def to_text(rows: list[dict[str, Any]]) -> str:
    """One line a row: what, accuracy, how many answers, and what is missing or could not be read."""
    whats = [" ".join(filter(None, (row["field"], row["value"]))) or "all" for row in rows]
    width = max(map(len, whats))
    lines = []
    for what, row in zip(whats, rows, strict=True):
        accuracy = "     –" if row["accuracy"] is None else f"{row['accuracy']:6.1%}"
        notes = [f"{row[key]} {word}" for key, word in (("n_unread", "unread"), ("n_missing", "missing")) if row[key]]
        lines.append(f"{what:<{width}}  {accuracy}  of {row['n']}" + (f" ({', '.join(notes)})" if notes else ""))
    return "\n".join(lines)


def read_texts(path: Path) -> dict[str, str]:
    """id -> text; of several texts for an id the last. Raises `UsageError`."""
    found: dict[str, str] = {}
    for where, item in _items(path):
        if not isinstance(item, Mapping):
            raise UsageError(
                f"{path}, {where}: {str(item)[:60]!r} is no object with an id and a text; write {{'id': …, 'text': …}}."
            )
        if item.get("pass", "accuracy") != "accuracy" or item.get("status") not in (None, "ok", "parse_fail"):
            continue  # of our own records, those that answer nothing
        names = [next((name for name in known if item.get(name) is not None), None) for known in (IDS, TEXTS)]
        if None in names:
            raise UsageError(
                f"{path}, {where}: it needs an id ({', '.join(IDS)}) and a text ({', '.join(TEXTS)}), and has "
                f"{', '.join(item) or 'nothing'}."
            )
        found[str(item[names[0]])] = str(item[names[1]])
    if not found:
        raise UsageError(f"{path} holds no answer; write lines like {{'id': …, 'text': …}} in JSON.")
    return found


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, item) of every entry, nested `questions` (Video-MME's answer file) included."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read ({why}); name a file of answers.") from error
    try:
        whole = json.loads(text)
    except ValueError:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError as error:
                    raise UsageError(
                        f"{path}, line {number} is no JSON ({error}); write lines like {{'id': …, 'text': …}} in JSON."
                    ) from error
        return
    if isinstance(whole, Mapping) and not any(name in whole for name in IDS):
        yield from ((f"id {id_}", {"id": id_, "text": said}) for id_, said in whole.items())
        return
    for number, item in enumerate(whole if isinstance(whole, list) else [whole], 1):
        nested = item.get("questions") if isinstance(item, Mapping) else None
        for each in nested if isinstance(nested, list) else [item]:
            yield f"item {number}", each


def _row(field: str, value: str, marks: list[tuple[float, bool] | None]) -> dict[str, Any]:
    answered = [mark for mark in marks if mark is not None]
    return {
        "field": field,
        "value": value,
        "n": len(answered),
        "n_missing": len(marks) - len(answered),
        "n_unread": sum(unread for _, unread in answered),
        "accuracy": fmean(value for value, _ in answered) if answered else None,
    }
