"""From a request to something that answers: device, dtype, attention kernel, and the loaded model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench.backend import Backend, Identity
from vlmbench.errors import UsageError
from vlmbench.request import DTYPES
from vlmbench.spec import build, parse

if TYPE_CHECKING:
    import torch

    from vlmbench.models.base import ModelAdapter
    from vlmbench.request import RunRequest


def load_backend(request: RunRequest, model: str) -> Backend:
    """The backend for `model`. Raises `UsageError` when it or what it needs is not here."""
    if model.split(":", 1)[0] == "dummy":
        from vlmbench.models.dummy import DummyBackend

        return build(DummyBackend, parse(model), "Model")
    if request.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported, which is below
    import torch
    from transformers.utils import logging

    from vlmbench.engine import TorchBackend
    from vlmbench.models.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if request.threads:
        torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    device = pick_device(request.device)
    dtype = pick_dtype(request.dtype, device)
    attention = _attention(request.attention, device)
    loaded = load(
        model,
        dtype=dtype,
        device=str(device),
        attention=attention,
        revision=request.revision,
        seed=request.seed,
        offline=request.offline,
        max_pixels=request.max_pixels,
        min_pixels=request.min_pixels,
    )
    text, vision = kernels(loaded.adapter)
    identity = Identity(
        model=model,
        revision=loaded.revision,
        weights_hash=loaded.weights_hash,
        dtype=str(dtype).removeprefix("torch."),
        device_type=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        attention=attention,
        attention_kernel=text,
        vision_attention_kernel=vision,
        facts=_facts(loaded.adapter, device),
    )
    return TorchBackend(loaded.adapter, identity)


def kernels(adapter: ModelAdapter) -> tuple[str, str]:
    """Which kernel dispatches for (language-model prefill, vision tower), asked of torch with the model's own shapes."""
    shapes = adapter.shapes
    text, vision = adapter.attention_names()
    heads = adapter.vision_config.num_attention_heads if hasattr(adapter.vision_config, "num_attention_heads") else None
    heads = heads or adapter.vision_config.num_heads
    return (
        _kernel(text, adapter, shapes.heads, shapes.kv_heads, shapes.head_dim, causal=True),
        _kernel(vision, adapter, heads, heads, shapes.vision_hidden // heads, causal=False),
    )


def _kernel(name: str, adapter: ModelAdapter, heads: int, kv_heads: int, head_dim: int, *, causal: bool) -> str:
    if name != "sdpa":
        return name
    import torch
    from torch.nn.attention import SDPBackend

    q = torch.empty(1, heads, 128, head_dim, device=adapter.device, dtype=adapter.dtype)
    kv = torch.empty(1, kv_heads, 128, head_dim, device=adapter.device, dtype=adapter.dtype)
    with torch.inference_mode():
        choice = torch._fused_sdp_choice(q, kv, kv, is_causal=causal, enable_gqa=heads != kv_heads)
    return f"sdpa/{SDPBackend(choice).name.lower()}"


def pick_device(name: str | None) -> torch.device:
    """The named device; by default CUDA where there is one. Raises `UsageError`."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, not {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, not {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name} is not here ({torch.cuda.device_count()} CUDA devices); use --device cpu.")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # clocks and allocator counters read the current device
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; by default bfloat16 on CUDA and float32 elsewhere. Raises `UsageError`."""
    import torch

    if name is not None and name not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, not {name!r}.")
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def _attention(name: str, device: torch.device) -> str:
    if name in ("sdpa", "eager"):
        return name
    import importlib.util

    installed = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if name == "best":
        return "flash_attention_2" if installed else "sdpa"
    if not installed:
        raise UsageError("--attention flash needs a CUDA device and the package flash-attn; use --attention best.")
    return "flash_attention_2"


def _facts(adapter: ModelAdapter, device: torch.device) -> dict[str, Any]:
    import dataclasses

    import torch

    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "shapes": dataclasses.asdict(adapter.shapes)}
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(device))}
        driver = Path("/proc/driver/nvidia/version")
        facts["driver"] = driver.read_text().split("\n", 1)[0] if driver.exists() else None
    return facts
