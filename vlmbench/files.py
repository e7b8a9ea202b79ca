"""JSON files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmbench.errors import UsageError


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace the file atomically: whoever reads sees the old one or the new one, whole. Raises `OSError`."""
    text = json.dumps(data, indent=1, default=str) + "\n"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_json(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """What a resumable study wrote into its ``--out``, or `empty` where nothing is. Raises `UsageError` when it is damaged."""
    if not path.is_file():
        return empty
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete it, or name another --out.") from error
    return data
