"""From a model's name to a loaded adapter: shipped, preset with random weights, local folder, or hub id."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor

from vlmbench.errors import UsageError
from vlmbench.models.base import ModelAdapter
from vlmbench.models.catalogue import PRESETS, split_preset, suggestion
from vlmbench.registry import Registry
from vlmbench.spec import nearest

families = Registry(
    "model family",
    "vlmbench.models",
    exclude=frozenset({"base", "catalogue", "dummy", "llava_base", "loading", "preset_families", "presets", "written"}),
)


class Loaded(NamedTuple):
    adapter: ModelAdapter
    revision: str | None
    weights_hash: str


def load(
    name: str,
    *,
    dtype: torch.dtype,
    device: str,
    attention: str,
    revision: str | None = None,
    seed: int = 0,
    offline: bool = False,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
) -> Loaded:
    """Load a model in evaluation mode.

    Raises `UsageError`: unknown name, missing files, a family that is not supported, a pixel budget on a family whose
    tower has one input size.
    """
    preset = split_preset(name)
    if preset is not None:
        loaded = _random(name, *preset, dtype=dtype, device=device, seed=seed)
    else:
        loaded = _pretrained(name, dtype=dtype, device=device, revision=revision, offline=offline)
    loaded.adapter.model.set_attn_implementation(attention)
    _set_pixels(loaded.adapter, max_pixels, min_pixels)
    return loaded


def _random(name: str, preset: str, spec: Any, *, dtype: torch.dtype, device: str, seed: int) -> Loaded:
    from vlmbench.models.presets import build

    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise UsageError(f"No preset is called {preset!r} (known: {known}).{nearest(preset, PRESETS)}")
    unknown = set(spec.params) - {"layers"}
    layers = spec.params.get("layers")
    if unknown or (layers is not None and not layers.isdigit()) or layers == "0":
        raise UsageError(f"{name!r} must be {preset}@random or {preset}@random:layers=n with n at least 1.")
    model, processor = build(preset, layers=int(layers) if layers else None, seed=seed, dtype=dtype, device=device)
    digest = hashlib.sha256(f"{name} seed={seed}".encode()).hexdigest()
    return Loaded(family_of(model.config.model_type)(model, processor), None, digest)


def _pretrained(name: str, *, dtype: torch.dtype, device: str, revision: str | None, offline: bool) -> Loaded:
    from vlmbench.reference import SHIPPED, verify

    source = name
    if name in SHIPPED:
        verify(name)
        source = str(SHIPPED[name])
    folder = Path(source)
    local = folder.is_dir()
    if local and revision is not None:
        raise UsageError(f"--revision {revision} means nothing for {name}, which lies on this disk; leave it out.")
    if not local and ("/" not in name or name.startswith((".", "/"))):
        raise UsageError(f"No model is called {name!r}, and no folder has that path.{suggestion(name)}")
    options: dict[str, Any] = {"trust_remote_code": False, "revision": None if local else revision}
    offline = offline or local or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE")
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=offline, **options)
        family = family_of(config.model_type)
        processor = AutoProcessor.from_pretrained(source, local_files_only=offline, **options)
        model, report = family.model_class(config).from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=offline,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if local:
            raise UsageError(f"Folder {source} does not load as a checkpoint: {_first_line(error)}") from error
        raise UsageError(
            f"Model {name!r} is not on this machine and cannot be fetched ({_first_line(error)}); give a local folder "
            f"with its safetensors, processor and tokenizer files, or fill the hub cache on a machine with network access."
        ) from error
    if lacking := sorted(report["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise UsageError(
            f"{name} lacks the weights of {len(lacking)} tensors ({lacking[0]}, …); fetch the checkpoint again."
        )
    commit = getattr(config, "_commit_hash", None)
    digest = folder_hash(folder) if local else hashlib.sha256(f"{name}@{commit}".encode()).hexdigest()
    return Loaded(family(model.to(device), processor), commit, digest)


def family_of(model_type: str) -> type[ModelAdapter]:
    """The adapter class for a ``config.model_type``."""
    known: dict[str, type[ModelAdapter]] = {}
    for name in families.names():
        family = families.load(name)
        known |= dict.fromkeys(family.model_types, family)
    if model_type not in known:
        raise UsageError(f"Models of type {model_type!r} are not supported (supported: {', '.join(sorted(known))}).")
    return known[model_type]


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a checkpoint folder's weights and of what prepares their input."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja") and path.name != "training.json":
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _set_pixels(adapter: ModelAdapter, max_pixels: int | None, min_pixels: int | None) -> None:
    if max_pixels is None and min_pixels is None:
        return
    if adapter.fixed_resolution:
        raise UsageError(
            f"--max-pixels and --min-pixels have no effect on {adapter.config.model_type}: its tower has one input size; "
            f"leave them out."
        )
    for part in (adapter.processor.image_processor, adapter.processor.video_processor):
        size = dict(part.size)
        low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        if low > high:
            raise UsageError(f"--min-pixels {low} is above --max-pixels {high}; make it smaller.")
        part.size = {"shortest_edge": low, "longest_edge": high}


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300].rstrip(".")
