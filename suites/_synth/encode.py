"""Frames to files: H.264 in mp4, and PNG. The same frames give the same bytes, and a file is either whole or absent."""

from __future__ import annotations

import io
import os
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

FPS = 2.0
"""Frames a second written into the container; events count frames, not seconds."""
CRF = 18


def encode_mp4(frames: np.ndarray, fps: float = FPS) -> bytes:
    """The bytes of an mp4 with these frames, uint8 [T, H, W, 3] with even H and W.

    One thread and the bitexact flags make the bytes a function of the frames (and of the x264 version).
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "bitexact"}) as container:
        # No B-frames: presentation order is decoding order, so an index means the same to every decoder.
        options = {"crf": str(CRF), "preset": "veryfast", "threads": "1", "bf": "0", "flags": "+bitexact"}
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def compressed(frames: np.ndarray) -> np.ndarray:
    """What a decoder gives back after `encode_mp4`, uint8 [T, H, W, 3]: for training on what testing will show."""
    import av

    with av.open(io.BytesIO(encode_mp4(frames)), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_mp4(frames: np.ndarray, path: Path, fps: float = FPS) -> None:
    """Write `encode_mp4` to `path`, atomically."""
    _write(encode_mp4(frames, fps), path)


def write_png(frame: np.ndarray, path: Path) -> None:
    """Write one frame, uint8 [H, W, 3], to `path`, atomically."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    _write(buffer.getvalue(), path)


def _write(data: bytes, path: Path) -> None:
    """Under a temporary name first, so that neither a crash nor a second process at work shows half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
