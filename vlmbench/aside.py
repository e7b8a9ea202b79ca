"""Results that stand beside the runs, in a JSON file of their own: the conditions they all name, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench import header
from vlmbench.errors import RunError
from vlmbench.files import write_json

if TYPE_CHECKING:
    from vlmbench.session import Session


def conditions(session: Session) -> dict[str, Any]:
    """What was measured on what: model, suite, rounds, device, kernels, versions, source and date."""
    request, identity = session.request, session.backend.identity
    return {
        "model": identity.model,
        "weights_hash": identity.weights_hash,
        "suite": request.suite,
        "suite_version": session.suite.version,
        "sampler": session.sampler,
        "warmup": request.warmup,
        "repeats": request.repeats,
        "max_new_tokens": session.max_new_tokens,
        "threads": int(identity.facts.get("threads", 0)),
        "device": {
            "type": identity.device_type,
            "name": identity.device_name,
            "dtype": identity.dtype,
            "cpu": header.cpu_name(),
            "cores": header.cores(),
        },
        "kernels": {"attention": identity.attention_kernel, "vision": identity.vision_attention_kernel},
        "versions": header.versions(),
        **header.source(),
        "created": header.now(),
    }


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises `RunError` when the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, data)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
