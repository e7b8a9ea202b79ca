"""Subtitles as lines with a start and an end in seconds: `.srt` files, and the JSON lists of LongVideoBench."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

_TIME = r"(\d+):(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)"
_RANGE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")


class Line(NamedTuple):
    start_s: float
    end_s: float
    text: str


@lru_cache(maxsize=16)
def read_srt(path: Path) -> tuple[Line, ...]:
    """The lines in file order, without tags. Raises `OSError`, and `ValueError` when no line can be read from a full file."""
    lines: list[Line] = []
    times: tuple[float, float] | None = None
    words: list[str] = []
    text = _decoded(path.read_bytes())
    for row in [*text.splitlines(), ""]:
        found = _RANGE.match(row)
        if times is not None and (found or not row.strip()):
            if found and words and words[-1].isdigit():  # the next line's number, with no blank row before it
                words.pop()
            if said := _plain(" ".join(words)):
                lines.append(Line(*times, said))
            times, words = None, []
        if found:
            times = _seconds(*found.groups()[:3]), _seconds(*found.groups()[3:])
        elif times is not None:
            words.append(row.strip())
    if text.strip() and not lines and not _RANGE.search(text):
        raise ValueError(f"{path.name} is no subtitle file: no row of it has a start and an end time")
    return tuple(lines)


@lru_cache(maxsize=16)
def read_json(path: Path, starts_at_s: float, duration_s: float) -> tuple[Line, ...]:
    """LongVideoBench's two kinds of items, shifted to the clip. Raises `OSError` and `ValueError`.

    As in the official loader, an end of the first kind that is not written as a decimal number is the video's duration.
    """
    items: list[dict[str, Any]] = json.loads(_decoded(path.read_bytes()))
    lines = []
    for number, item in enumerate(items):
        try:
            if "timestamp" in item:
                start, end = item["timestamp"]
                end, text = end if isinstance(end, float) else duration_s, item["text"]
            else:
                start, end, text = _clock(item["start"]), _clock(item["end"]), item["line"]
            lines.append(Line(float(start) - starts_at_s, float(end) - starts_at_s, str(text)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"item {number} of {path.name} has no times and text as in the official files") from error
    return tuple(lines)


def shown_at(lines: Sequence[Line], times_s: Sequence[float]) -> list[Line]:
    """The lines on screen at any of the times, each once, in file order."""
    return [line for line in lines if any(line.start_s <= time < line.end_s for time in times_s)]


def _decoded(data: bytes) -> str:
    """UTF-8, UTF-16 with its mark, or what every byte can be read as."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _plain(text: str) -> str:
    return " ".join(re.sub(r"<[^<>]*>|\{\\[^{}]*\}", "", text).split())


def _clock(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return _seconds(hours, minutes, seconds)


def _seconds(hours: str, minutes: str, seconds: str) -> float:
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds.replace(",", "."))
