"""Frames of a video or picture, decoded in a worker process with a time limit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import selectors
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from vlmbench.decode_worker import LENGTH, Decoded, Request, reason
from vlmbench.errors import UsageError
from vlmbench.sampling import SAMPLERS, sample_indices

if TYPE_CHECKING:
    import numpy as np

    from vlmbench.frame_cache import FrameCache

__all__ = ["SAMPLERS", "Clip", "DecodeError", "DecodeTimeout", "Decoder", "default_decoder", "sample_indices"]

DECODERS = ("decord", "pyav")


class DecodeError(Exception):
    """The file gives no frames; the message is one sentence with its name."""


class DecodeTimeout(DecodeError):
    """The decoder did not finish in time."""


@dataclass(frozen=True)
class Clip:
    """Decoded frames of one medium."""

    frames: np.ndarray
    """uint8 ``[T, H, W, 3]``, RGB, upright."""
    indices: tuple[int, ...]
    """Of the frames in the source."""
    times_s: tuple[float, ...]
    fps: float
    """Frames a second of the source, not of the sample."""
    kind: Literal["video", "image"]
    path: Path


def default_decoder() -> str:
    """decord where it is installed (it has wheels for Linux on x86-64), else PyAV."""
    return "decord" if importlib.util.find_spec("decord") else "pyav"


class Decoder:
    """One worker process, started when first needed and again after a time-out. A context manager; one thread at a time."""

    def __init__(self, name: str | None = None, timeout_s: float = 60.0, cache: FrameCache | None = None) -> None:
        """`cache` is where decoded videos are looked for first. Raises `UsageError` for an unknown decoder."""
        self.name = name or default_decoder()
        if self.name not in DECODERS:
            raise UsageError(f"The decoder must be one of {', '.join(DECODERS)}, not {self.name!r}.")
        self.timeout_s = timeout_s
        self.cache = cache
        self._ended = False
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def read(
        self,
        path: Path,
        *,
        kind: Literal["video", "image"],
        frames: int | None,
        rule: str,
        fps: float | None = None,
        fresh: bool = False,
    ) -> Clip:
        """At most `frames` frames (None: all) picked by `rule`; `fresh`: decoded now, whatever the cache holds.

        Raises `DecodeError` and `DecodeTimeout`.
        """
        if kind == "image":
            return _picture(path)
        request = Request(str(path), self.name, rule, frames, fps)
        cache = None if fresh else self.cache
        key = cache.key(request) if cache else None
        found = cache.read(key) if cache and key else None
        if found is None:
            answer = self._ask(request)
            if isinstance(answer, str):
                raise DecodeError(f"{path.name} cannot be decoded with {self.name}: {answer}.")
            found = answer
            if cache and key:
                cache.write(key, found)
        return Clip(found.frames, tuple(found.indices), tuple(found.times_s), found.fps, "video", path)

    def stop(self) -> None:
        """From another thread: whoever is decoding gets a `DecodeError` now, and so does every later call."""
        self._ended = True
        if (worker := self._worker) is not None:
            worker.kill()

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._worker = None

    def _ask(self, request: Request) -> Decoded | str:
        if self._ended:
            raise DecodeError(f"{Path(request.path).name} was not decoded: the run is ending.")
        worker = self._started()
        data = pickle.dumps(request)
        deadline = time.monotonic() + self.timeout_s
        try:
            worker.stdin.write(LENGTH.pack(len(data)) + data)  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            size = LENGTH.unpack(self._receive(LENGTH.size, deadline, request))[0]
            answer = pickle.loads(self._receive(size, deadline, request))  # noqa: S301 (our own worker)
            return answer if isinstance(answer, str) else Decoded(*answer)
        except (BrokenPipeError, EOFError):
            self.close()
            raise DecodeError(f"{Path(request.path).name} crashed the decoder {self.name}.") from None
        except BaseException:
            self.close()  # what is still in the pipe would be taken for the next video's answer
            raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            self._worker = (
                _spawner()
                .submit(
                    subprocess.Popen,
                    [sys.executable, "-m", "vlmbench.decode_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # decoders write about every damaged macroblock
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # Ctrl-C is for the command, which then ends the worker
                )
                .result()
            )
        return self._worker

    def _receive(self, size: int, deadline: float, request: Request) -> bytes:
        pipe = self._worker.stdout.fileno()  # type: ignore[union-attr]
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    name = Path(request.path).name
                    raise DecodeTimeout(f"{name} was not decoded within {self.timeout_s:g} s with {self.name}.")
                part = os.read(pipe, min(size, 1 << 20))
                if not part:
                    raise EOFError
                parts.append(part)
                size -= len(part)
        return b"".join(parts)


@lru_cache(maxsize=1)
def _spawner() -> ThreadPoolExecutor:
    """A thread that lives as long as this process and starts its workers.

    To a worker that is to die with its parent, Linux takes the thread that started it for the parent: one started by a
    pass's own thread would be killed when the pass ends, in the middle of the next pass's first video.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="vlmbench-spawn")


def _picture(path: Path) -> Clip:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit greys, which Pillow would clip to white
                upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
            frame = np.asarray(upright.convert("RGB"))
    except Exception as error:  # Pillow has many words for a damaged file, SyntaxError among them
        raise DecodeError(f"{path.name} cannot be read as a picture: {reason(str(path), error)}.") from error
    return Clip(frame[None].copy(), (0,), (0.0,), 1.0, "image", path)
