"""Text and frames in the order in which they are read: captions between the frames of a video."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmbench.suite import Caption
    from vlmbench.video import Clip


def interleaved(clips: Sequence[Clip], captions: Sequence[Caption], question: str) -> list[Clip | str]:
    """The only clip cut where a caption stands, the text between its pieces, and the question last.

    Two texts never follow each other, since not every chat template parts them: captions without a frame between them are
    joined with a blank, and the question starts a line behind captions that come after the last frame.
    """
    if [clip.kind for clip in clips] != ["video"]:
        kinds = ", ".join(clip.kind for clip in clips) or "none"
        raise ValueError(f"captions stand between the frames of exactly one video; the media here are: {kinds}.")
    (clip,) = clips
    total = len(clip.times_s)
    in_order = sorted(captions, key=lambda caption: caption.time_s)
    parts: list[Clip | str] = []
    start = 0
    for frame, group in groupby(in_order, key=lambda caption: bisect_left(clip.times_s, caption.time_s)):
        text = " ".join(caption.text for caption in group)
        if frame > start:
            parts.append(_piece(clip, start, frame))
        parts.append(text if frame < total else f"{text}\n{question}")
        start = frame
    return parts if start == total else [*parts, _piece(clip, start, total), question]


def in_order(text: str, marks: Sequence[str]) -> bool:
    """Whether all `marks` stand in `text`, one behind the other."""
    cursor = 0
    for mark in marks:
        found = text.find(mark, cursor)
        if found < 0:
            return False
        cursor = found + len(mark)
    return True


def _piece(clip: Clip, start: int, stop: int) -> Clip:
    """Frames ``[start, stop)`` as a clip of its own, at the frame rate at which `clip` shows its source.

    It counts its own frames from 0: processors take the seconds between two frames from the rate, the number of frames and
    the last one's index, and so find the same as in the whole clip, to the last bit.
    """
    return replace(
        clip,
        frames=clip.frames[start:stop],
        indices=tuple(range(stop - start)),
        times_s=clip.times_s[start:stop],
        fps=len(clip.indices) / (clip.indices[-1] + 1) * clip.fps,
    )
