"""Decoded frames kept on disk, so that comparing ten methods decodes a video once.

A clip is found by what the file holds, the decoder and the sampling rule; where the file lies and what it is called do not
matter. It is the very frames, uncompressed (lossy ones would change answers), so the folder is bounded: what was used longest
ago goes first. A cache that cannot be written, or holds something damaged, is a slower run and nothing else. Timed passes never
read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlmbench.errors import UsageError

if TYPE_CHECKING:
    from vlmbench.decode_worker import Decoded, Request

LIMIT_GB = 20.0
"""Default of ``VLMBENCH_FRAME_CACHE_GB``; 0 keeps nothing."""
SHARE = 8
"""A clip above this part of the limit is not kept: it would drive out all others."""
BLOCKS, BLOCK_BYTES = 16, 1 << 16
VERSION = 2
"""Raised when the same request gives other frames than before."""


class Kept(NamedTuple):
    path: Path
    bytes: int
    used_ns: int


class FrameCache:
    """Clips as ``<key>.npy`` files with their times in the last bytes; see `read` and `write`."""

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        """Raises `UsageError` when ``VLMBENCH_FRAME_CACHE_GB`` is no number."""
        self.folder = folder
        self.limit_bytes = _limit() if limit_bytes is None else limit_bytes
        self._bytes: int | None = None
        """What is kept, counted when the first clip is written."""

    def key(self, request: Request) -> str | None:
        """None when nothing is kept, or the file cannot be read (decoding it will say so)."""
        if not self.limit_bytes:
            return None
        try:
            content = content_hash(Path(request.path))
        except OSError:
            return None
        rule = (VERSION, content, request.decoder, request.rule, request.frames, request.fps)
        return hashlib.sha256(repr(rule).encode()).hexdigest()[:32]

    def read(self, key: str) -> Decoded | None:
        """The clip, or None when it is not there or damaged."""
        import numpy as np

        from vlmbench.decode_worker import Decoded

        path = self._path(key)
        try:
            with path.open("rb") as file:
                frames = np.load(file, allow_pickle=False)
                rest = json.loads(file.read())
            if zlib.crc32(frames.data) != rest["crc"]:
                raise ValueError("checksum mismatch")
            os.utime(path)
            return Decoded(frames, rest["indices"], rest["times_s"], rest["fps"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write(self, key: str, clip: Decoded) -> None:
        """Keep the clip, whole or not at all, and drop others until the limit holds."""
        import numpy as np

        if clip.frames.nbytes * SHARE > self.limit_bytes:
            return
        name = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".part-", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                np.save(file, clip.frames, allow_pickle=False)
                rest: dict[str, object] = {
                    "indices": list(clip.indices),
                    "times_s": list(clip.times_s),
                    "fps": clip.fps,
                }
                rest["crc"] = zlib.crc32(np.ascontiguousarray(clip.frames).data)
                file.write(json.dumps(rest).encode())
                written = file.tell()
            os.replace(name, self._path(key))
            self._shrink(written)
        except OSError:  # a full disk, mostly: the run goes on without
            if name is not None:
                with contextlib.suppress(OSError):
                    os.unlink(name)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def _shrink(self, written: int) -> None:
        """Other processes write here too, so what is kept is counted again before anything is dropped."""
        self._bytes = sum(each.bytes for each in self._kept()) if self._bytes is None else self._bytes + written
        if self._bytes <= self.limit_bytes:
            return
        kept = sorted(self._kept(), key=lambda each: each.used_ns)
        self._bytes = sum(each.bytes for each in kept)
        for each in kept:
            if self._bytes <= self.limit_bytes:
                return
            each.path.unlink(missing_ok=True)
            self._bytes -= each.bytes

    def _kept(self) -> list[Kept]:
        found = []
        for path in self.folder.glob("*.npy"):
            with contextlib.suppress(OSError):  # another process dropped it
                stat = path.stat()
                found.append(Kept(path, stat.st_size, stat.st_mtime_ns))
        return found


def content_hash(path: Path) -> str:
    """Of the size and sixteen blocks spread from the first byte to the last. Raises `OSError`.

    All bytes of a film would take longer than decoding some of its frames; containers index every frame at one of their ends.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            file.seek(block * max(0, size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _limit() -> int:
    text = os.environ.get("VLMBENCH_FRAME_CACHE_GB") or str(LIMIT_GB)
    try:
        return int(max(0.0, float(text)) * 1e9)
    except (ValueError, OverflowError):
        raise UsageError(f"VLMBENCH_FRAME_CACHE_GB must be a number of gigabytes, not {text!r}.") from None
