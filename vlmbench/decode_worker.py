"""The process that decodes videos: a broken file may hang or crash it, and nothing else.

``python -m vlmbench.decode_worker`` reads length-prefixed pickled requests on stdin and answers each on stdout. It imports
neither torch nor transformers, ignores Ctrl-C, and dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import re
import resource
import signal
import struct
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmbench.sampling import sample_indices

if TYPE_CHECKING:
    import numpy as np

MEMORY_BYTES = 16 * 2**30
"""Address space of the worker: a video that claims a gigantic frame fails instead of taking the machine along."""
LENGTH = struct.Struct("<Q")
AT_A_GLANCE = {"probesize": "32", "analyzeduration": "0"}


class Request(NamedTuple):
    path: str
    decoder: str
    rule: str
    frames: int | None
    fps: float | None


class Decoded(NamedTuple):
    frames: np.ndarray
    """uint8 ``[T, H, W, 3]``, upright."""
    indices: list[int]
    times_s: list[float]
    fps: float


def decode(request: Request) -> Decoded:
    """Decode the frames that the rule picks. Raises whatever the decoder raises."""
    return _decord(request) if request.decoder == "decord" else _pyav(request)


def _decord(request: Request) -> Decoded:
    import decord

    reader = decord.VideoReader(request.path, num_threads=1)
    fps = float(reader.get_avg_fps()) or 1.0
    file = Path(request.path).stat()
    shown_s = _shown_s(request.path, file.st_mtime_ns, file.st_size)
    # An edit list (a trimmed recording) leaves frames out. decord counts those behind it, shows the last one again for them,
    # and starts the clock before zero: 13 frames for the 10 that a player shows.
    if reader.get_frame_timestamp(0)[0] < -0.5 / fps or (shown_s and len(reader) / fps > shown_s + 0.5 / fps):
        return _pyav(request)
    indices = _picked(request, len(reader), fps)
    frames = reader.get_batch(indices).asnumpy()
    times = reader.get_frame_timestamp(indices)[:, 0]
    return Decoded(frames, indices, [float(time) for time in times], fps)


@lru_cache(maxsize=1024)
def _shown_s(path: str, mtime_ns: int, size: int) -> float | None:
    """Seconds of the main video that the header of an MP4 or MOV file says are shown; None for other containers."""
    import av

    # What these headers say needs no looking at frames, which would take as long as opening the file with decord; other
    # containers may not be recognised by so little, and decord has opened them already.
    with contextlib.suppress(OSError, ValueError), av.open(path, options=AT_A_GLANCE) as container:
        stream = _best(container)
        if "mp4" in container.format.name and stream.duration is not None:
            return float(stream.duration * stream.time_base)
    return None


def _pyav(request: Request) -> Decoded:
    import av
    import numpy as np

    with av.open(request.path) as container:
        stream = _best(container)
        fps = float(stream.average_rate or stream.guessed_rate or 1)
        # The frame count in the header may be absent or wrong; packets are counted without decoding them. Those that an
        # edit list leaves out are read, but no frame comes of them.
        total = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
        indices = _picked(request, total, fps)
    found: dict[int, Any] = {}
    times: dict[int, float] = {}
    wanted = set(indices)
    with av.open(request.path) as container:
        stream = _best(container)
        stream.thread_type = "SLICE"  # automatic frame threads can hang when decoding stops early
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                image = frame.to_ndarray(format="rgb24")
                # Display matrices turn counter-clockwise, as np.rot90 does.
                found[index] = np.rot90(image, k=round(frame.rotation / 90) % 4)
                times[index] = float(frame.time if frame.time is not None else index / fps)
                if len(found) == len(wanted):
                    break
    if len(found) < len(wanted):
        raise ValueError(f"only {max(found, default=-1) + 1} of its {total} frames can be decoded")
    return Decoded(np.stack([found[i] for i in indices]), indices, [times[i] for i in indices], fps)


def _best(container: Any) -> Any:
    """The video stream that FFmpeg takes for the main one, as decord does."""
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("it has no video stream")
    return stream


def _picked(request: Request, total: int, fps: float) -> list[int]:
    return sample_indices(request.rule, total, request.frames, video_fps=fps or 1.0, fps=request.fps)


def main() -> None:
    """Serve requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux: be killed when the parent dies, even inside a decoder
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a decoder prints must not get between the answers
    while header := sys.stdin.buffer.read(LENGTH.size):
        request = pickle.loads(sys.stdin.buffer.read(LENGTH.unpack(header)[0]))  # noqa: S301 (our own parent)
        try:
            data = pickle.dumps(tuple(decode(request)), protocol=5)  # plain: this module is `__main__` here
        except Exception as error:  # MemoryError of the copy too
            data = pickle.dumps(reason(request.path, error))
        out.write(LENGTH.pack(len(data)))
        out.write(data)
        out.flush()


def reason(path: str, error: Exception) -> str:
    """The decoder's own words without stack traces, source positions and the folders of `path`."""
    if not Path(path).exists():
        return "the file is missing"
    if Path(path).is_file() and not Path(path).stat().st_size:
        return "the file is empty"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    # Not the user's concern: a time, an errno, and where in the decoder's source it happened. decord repeats the first
    # and the last when the failure was in a thread of its own, and quotes the C++ condition before its sentence.
    first = re.sub(r"^(\[[^\]]*\]\s*|\S+:\d+:\s*)+", "", first)
    first = re.sub(r"^Check failed: (?:.*\(\S+ vs\. \S+\)|\S+\([^)]*\))\s+(ERROR\s+)?(?=\S)", "", first)
    first = first.replace("1094995529", "invalid data")  # FFmpeg's number for it
    return first.replace(path, "the file").strip(" .")[:200]


if __name__ == "__main__":
    main()
