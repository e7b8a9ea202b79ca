"""Where generated media live, and putting them there once."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmbench.suites._synth.scene import Scene


def cache_root() -> Path:
    """``$VLMBENCH_CACHE``, else ``vlmbench`` in the user's cache folder."""
    if named := os.environ.get("VLMBENCH_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmbench"


@cache
def source_hash(*more: str) -> str:
    """Eight digits over the code that makes pixels: media of another generator never pass for this one's.

    `more` names further files here that a suite's samples are made by.
    """
    digest = hashlib.sha256()
    for name in ("scene", "render", "encode", *more):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:8]


def media_path(suite: str, version: str, *parts: str) -> Path:
    """The file of one medium of one version of a suite."""
    return cache_root().joinpath(suite, f"v{version}-{source_hash()}", *parts)


def ensure(scene: Scene, path: Path) -> None:
    """Render and encode the scene unless its file is there. Raises `OSError` with the file's name."""
    if path.exists() and path.stat().st_size:
        return
    from vlmbench.suites._synth.encode import write_mp4, write_png
    from vlmbench.suites._synth.render import render

    frames = render(scene)
    try:
        if scene.kind == "image":
            write_png(frames[0], path)
        else:
            write_mp4(frames, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path.parent)) from error
