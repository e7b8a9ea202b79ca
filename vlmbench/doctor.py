"""What this machine can do: versions, devices, decoders, attention kernels that really dispatch, weights, disk.

Every check runs what it reports on (it decodes a video, it dispatches a kernel) instead of reading a version and
hoping, and none opens a socket. A check that fails is a row with the reason, never a crash.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmbench.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One fact. `ok` False means that it is missing or does not work; `detail` says which."""

    check: str
    name: str
    ok: bool
    detail: str


def rows(out: Path = Path("runs")) -> list[dict[str, Any]]:
    """All facts, ready for JSON. `out` is the results folder whose disk is looked at."""
    checks: dict[str, Callable[[], Iterator[Row]]] = {
        "version": _versions,
        "device": _devices,
        "decoder": _decoders,
        "attention": _attention,
        "weights": _weights,
        "network": _network,
        "disk": lambda: _disk(out),
    }
    return [asdict(row) for name, check in checks.items() for row in _isolated(name, check)]


def _isolated(check: str, run: Callable[[], Iterator[Row]], name: str = "") -> Iterator[Row]:
    """The rows of one check, and its failure as a last row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from run()
    except Exception as error:
        yield Row(check, name or check, False, _reason(error))


def _reason(error: BaseException) -> str:
    """The first sentence of an error, with its type; our own errors are a sentence already."""
    if isinstance(error, UsageError):
        return str(error)
    text = str(error).strip().split("\n", 1)[0].split(". ", 1)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _versions() -> Iterator[Row]:
    yield Row("version", "python", True, f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    for package in ("torch", "torchvision", "transformers", "triton", "numpy"):
        try:
            yield Row("version", package, True, version(package))
        except PackageNotFoundError:
            yield Row("version", package, False, "not installed")


def _devices() -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    import torch

    yield Row("device", "cpu", True, f"{cores} cores usable, {torch.get_num_threads()} torch threads")
    if not torch.cuda.is_available():
        built = torch.version.cuda or "none"
        yield Row("device", "cuda", False, f"no CUDA device is visible to torch (built for CUDA {built})")
    for index in range(torch.cuda.device_count()):
        what = torch.cuda.get_device_properties(index)
        memory = f"{what.total_memory / 2**30:.1f} GiB"
        yield Row("device", f"cuda:{index}", True, f"{what.name}, capability {what.major}.{what.minor}, {memory}")


def _decoders() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "two.mp4")
        try:
            _render(path)
            unrendered = ""
        except Exception as error:
            unrendered = f"; not tried, rendering a test video failed ({_reason(error)})"
        for name, package, count in (("decord", "decord", _count_decord), ("pyav", "av", _count_av)):
            try:
                module = importlib.import_module(package)
                if unrendered:
                    yield Row("decoder", name, False, f"{module.__version__}{unrendered}")
                    continue
                n = count(path)
                yield Row("decoder", name, n == 2, f"{module.__version__}, decoded {n} of 2 frames")
            except Exception as error:
                yield Row("decoder", name, False, _reason(error))


def _render(path: Path) -> None:
    """Two grey 64×64 frames as MPEG-4, which every build of FFmpeg can write."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for level in (64, 192):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _count_decord(path: Path) -> int:
    import decord

    return len(decord.VideoReader(str(path)).get_batch([0, 1]).asnumpy())


def _count_av(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def _attention() -> Iterator[Row]:
    """Each SDPA backend forced on its own, on every kind of device, in the precision it is used with."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    kinds = [("cpu", torch.float32)] + ([("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])
    for device, dtype in kinds:
        q = torch.ones(1, 2, 16, 64, device=device, dtype=dtype)  # [B, H, N, D]
        for name, backend in SDPBackend.__members__.items():
            if name in ("ERROR", "OVERRIDEABLE"):
                continue
            label = f"{device} {name.lower()}"
            try:
                with torch.no_grad(), sdpa_kernel(backend):
                    scaled_dot_product_attention(q, q, q, is_causal=True).sum().item()
                yield Row("attention", label, True, f"dispatches ({str(dtype).removeprefix('torch.')})")
            except Exception as error:
                yield Row("attention", label, False, _reason(error))
    for name, module in (("flash_attn", "flash_attn"), ("flex_attention", "torch.nn.attention.flex_attention")):
        try:
            importlib.import_module(module)
            yield Row("attention", name, True, "importable")
        except Exception as error:
            yield Row("attention", name, False, _reason(error))


def _weights() -> Iterator[Row]:
    from vlmbench import reference

    for name in reference.SHIPPED:
        yield from _isolated("weights", lambda name=name: _shipped(name), name)  # type: ignore[misc]
    cache = _hub_cache()
    found = [folder for folder in sorted(cache.glob("models--*")) if any(folder.glob("snapshots/*/*.safetensors"))]
    for folder in found:
        yield Row("weights", folder.name.removeprefix("models--").replace("--", "/"), True, f"in {cache}")
    if not found:
        yield Row("weights", "hub cache", False, f"no model in {cache}")


def _shipped(name: str) -> Iterator[Row]:
    from vlmbench import reference

    path = reference.verify(name) / "model.safetensors"
    yield Row("weights", name, True, f"shipped, {path.stat().st_size / 1e6:.1f} MB, SHA-256 as trained")


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _network() -> Iterator[Row]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            yield Row("network", "offline", True, f"{name} is set: nothing is downloaded")
            return
    yield Row("network", "online", True, "HF_HUB_OFFLINE is not set: missing weights and data are downloaded")


def _disk(out: Path) -> Iterator[Row]:
    from vlmbench.suites._synth.files import cache_root

    for name, path in (("hub cache", _hub_cache()), ("videos", cache_root()), ("out", out)):
        there = path.absolute()
        while not there.exists():  # free space is a property of the nearest folder that exists
            there = there.parent
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        yield Row(
            "disk", name, writable, f"{free / 1e9:.0f} GB free at {path}" + ("" if writable else ", not writable")
        )


def to_text(found: list[dict[str, Any]]) -> str:
    """One aligned line per row."""
    width = max(len(row["name"]) for row in found)
    lines = [
        f"{row['check']:<10} {row['name']:<{width}}  {'yes' if row['ok'] else 'no ':<3}  {row['detail']}"
        for row in found
    ]
    return "\n".join(lines)
