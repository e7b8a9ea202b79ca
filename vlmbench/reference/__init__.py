"""The tiny reference models that ship with their weights: where they are and whether they are whole. No torch here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vlmbench.errors import UsageError

_HERE = Path(__file__).parent
NAMES = ("tiny-llava-ov", "tiny-qwen2.5-vl")

SHIPPED: dict[str, Path] = {name: _HERE / name for name in NAMES if (_HERE / name / "model.safetensors").is_file()}
"""Name to checkpoint folder, of the models that are there."""


def expected_hash(name: str) -> str:
    """SHA-256 of the weights as trained, in hexadecimal, from `training.json`."""
    return read_log(_folder(name))["weights_sha256"]


def verify(name: str, folder: Path | None = None) -> Path:
    """The model's folder (or `folder`, a copy of it) once its weights are found whole; `UsageError` otherwise."""
    folder = folder or _folder(name)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UsageError(f"{path} is not there; restore it with `git checkout` or train it again.")
    expected, found = read_log(folder)["weights_sha256"], hash_of(path)
    if found != expected:
        raise UsageError(
            f"{path} is damaged: SHA-256 {found[:12]}… over {path.stat().st_size} bytes where training.json says "
            f"{expected[:12]}…; restore it with `git checkout`."
        )
    return folder


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_log(folder: Path) -> dict:
    """`training.json`: seed, recipe, curves, versions, hash."""
    path = folder / "training.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); restore it with `git checkout`.") from None


def _folder(name: str) -> Path:
    if name not in SHIPPED:
        raise UsageError(f"{name!r} is not a shipped reference model; there are: {', '.join(SHIPPED) or 'none'}.")
    return SHIPPED[name]
