"""What all tests share: no network, no GPU unless asked for, repeatable hypothesis, and the command line in process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Videos that tests render are gone with them, and never the user's own.
_media = tempfile.TemporaryDirectory(prefix="vlmbench-tests-")
os.environ["VLMBENCH_CACHE"] = _media.name

import pytest
from hypothesis import settings

settings.register_profile("vlmbench", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("vlmbench")


class Called(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """``cli("run", "--limit", 3)`` in this process: exit code, stdout, stderr."""
    from vlmbench.cli import main

    def call(*args: object) -> Called:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Called(code, *capsys.readouterr())

    return call


MINI = (
    "mini-llava-ov@random",
    "mini-qwen2-vl@random",
    "mini-qwen2.5-vl@random",
    "mini-llava-1.5@random",
    "mini-llava-next-video@random",
)


@cache
def load_mini(name: str) -> Any:
    import torch

    from vlmbench.models.loading import load

    return load(name, dtype=torch.float32, device="cpu", attention="sdpa").adapter


@pytest.fixture(params=MINI)
def adapter(request: pytest.FixtureRequest) -> Any:
    """A four-layer random model of every supported family, built once a process."""
    return load_mini(request.param)


def for_generate(inputs: dict[str, Any]) -> dict[str, Any]:
    """An adapter's inputs as the stock model takes them: LLaVA-1.5 knows pictures alone."""
    import torch

    if "media" not in inputs:
        return inputs
    stock = dict(inputs)
    images, videos = iter(stock.pop("pixel_values", ())), iter(stock.pop("pixel_values_videos", ()))
    parts = [next(images)[None] if kind == "image" else next(videos) for kind, _ in stock.pop("media")]
    return {**stock, "pixel_values": torch.cat(parts)}


@pytest.fixture
def clip() -> Callable[..., Any]:
    """``clip(6)`` is a six-frame clip of noise, the same for the same arguments."""
    import numpy as np

    from vlmbench.video import Clip

    def make(frames: int, kind: Literal["video", "image"] = "video", side: int = 64) -> Clip:
        noise = np.random.default_rng(frames).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
        times = tuple(i / 2 for i in range(frames))
        return Clip(frames=noise, indices=tuple(range(frames)), times_s=times, fps=2.0, kind=kind, path=Path("noise"))

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
