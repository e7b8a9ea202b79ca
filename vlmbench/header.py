"""What ``header.json`` says about a run: what was asked for, and the machine, versions and source it ran on.

The store adds `status`, `created`, `updated` and `sessions`, one entry for each process that wrote to the run: a run
that was resumed after an update of torch says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench.errors import UsageError
from vlmbench.files import write_json
from vlmbench.record import SCHEMA

if TYPE_CHECKING:
    from vlmbench.backend import Identity
    from vlmbench.method import Traits
    from vlmbench.spec import AnswerSpec, MeasureSpec

SESSION = secrets.token_hex(4)
"""Names this process; latency rounds are comparable only inside one."""

PACKAGES = (
    "torch", "torchvision", "transformers", "triton", "accelerate", "safetensors", "peft", "flash-attn", "bitsandbytes",
    "datasets", "decord", "av", "pillow", "numpy", "scipy", "lmms-eval",
)  # fmt: skip


def make_header(
    answer: AnswerSpec,
    measure: MeasureSpec,
    identity: Identity,
    given: Mapping[str, Any],
    *,
    traits: Traits | None = None,
    suite_hash: str = "",
    frame_rule: str = "",
) -> dict[str, Any]:
    """Everything but status and times, ready for JSON. No heavy package is imported.

    `given` holds the parameters as typed, so that a default can be told from a choice; `suite_hash` covers the suite's
    data; `frame_rule` says in words how frames were picked (default: the sampler's name).
    """
    facts = dict(identity.facts)
    return {
        "schema": SCHEMA,
        "hash": answer.hash,
        "spec": dataclasses.asdict(answer),
        "given": dict(given),
        "traits": None if traits is None else _listed(traits),
        "suite_hash": suite_hash,
        "frame_rule": frame_rule or answer.sampler,
        "seed": answer.seed,
        "session": SESSION,
        "measure": dataclasses.asdict(measure),
        "device": {
            "type": identity.device_type,
            "name": identity.device_name,
            "dtype": identity.dtype,
            "cpu": cpu_name(),
            "cores": cores(),
            "platform": platform.platform(),
        },
        "driver": facts.pop("driver", None),
        "kernels": {"attention": identity.attention_kernel, "vision": identity.vision_attention_kernel},
        "versions": versions(),
        **source(),
        "facts": facts,
    }


def _listed(traits: Traits) -> dict[str, Any]:
    """Sets as sorted lists."""
    found = dataclasses.asdict(traits)
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in found.items()}


SESSION_FIELDS = ("given", "measure", "device", "driver", "kernels", "versions", "commit", "dirty", "facts")
"""What may differ between two processes that write to one run."""


def resumed(folder: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """The header to write: `new`, but with the birthday and the sessions of what is stored."""
    old = read_header(folder) if (folder / "header.json").exists() else {}
    session = {
        "id": new.get("session", SESSION),
        "started": now(),
        "ended": None,
        "status": "started",
        **{name: new[name] for name in SESSION_FIELDS if name in new},
    }
    kept: dict[str, Any] = {name: old[name] for name in ("created", "rescored") if name in old}
    sessions = [*old.get("sessions", []), session]
    base = {"schema": SCHEMA, "created": now(), "updated": now(), "status": "started", "session": session["id"]}
    return {**base, **new, **kept, "sessions": sessions}


def read_header(folder: Path) -> dict[str, Any]:
    """Raises `UsageError` when it is missing, damaged or of another schema."""
    path = folder / "header.json"
    try:
        header = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete it and start the run again.") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise UsageError(f"{path} was written by another version of vlmbench; use that version, or another --out.")
    if not isinstance(header.get("spec"), dict):
        raise UsageError(f"{path} does not say what was run (spec); delete its folder and start the run again.")
    return header


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Replace it atomically: whoever reads sees the old one or the new one, whole. Raises `OSError`."""
    write_json(folder / "header.json", header)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Installed versions of what can change a result, read from package metadata."""
    from vlmbench import __version__

    found = {"vlmbench": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source() -> dict[str, Any]:
    """``{"commit", "dirty"}`` of the running source; both None when it is no git checkout of its own."""
    folder = Path(__file__).resolve().parents[1]
    top = _git(folder, "rev-parse", "--show-toplevel")
    # site-packages inside somebody's checkout is not our source.
    commit = _git(folder, "rev-parse", "HEAD") if top and Path(top).resolve() == folder else None
    if not commit:
        return {"commit": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--", "vlmbench", "methods", "kernels", "suites")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def source_name() -> str | None:
    """The commit of the running source in short, ``-dirty`` behind it when it has changes; None when it is no checkout."""
    found = source()
    return found["commit"] and found["commit"][:12] + ("-dirty" if found["dirty"] else "")


def measured_on() -> dict[str, Any]:
    """What stands before rows that are no run's: source, versions and processor."""
    return {**source(), "versions": versions(), "machine": {"cpu": cpu_name(), "cores": cores()}}


def said(data: Mapping[str, Any]) -> str:
    """What `measured_on` said, in words; nothing about what is not there."""
    found, machine = data.get("versions") or {}, data.get("machine")
    words = [f"{machine['cores']} cores of {machine['cpu']}"] if machine else []
    words += [f"{name} {found[name]}" for name in ("python", "torch", "triton", "transformers") if name in found]
    words += [f"commit {data['commit'][:12]}{'-dirty' if data.get('dirty') else ''}"] if data.get("commit") else []
    return ", ".join(words)


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603  # fixed arguments
            ["git", "-C", str(folder), *args],  # noqa: S607  # whichever git the user has
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
