"""One stored run by the folder that somebody names."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from vlmbench.errors import UsageError
from vlmbench.loaded import Loaded
from vlmbench.spec import slug
from vlmbench.store import ResultStore, RunView


def one_run(folder: Path) -> Loaded:
    """The run at or below `folder`, or the only one whose folder begins with that name. Raises `UsageError`.

    ``OUT/METHOD`` is enough where the results folder OUT has one run of that method.
    """
    roots = [folder] if folder.exists() else _begun(folder) or _begun(folder.with_name(slug(folder.name)))
    views = [view for each in roots for view in ResultStore(each).runs()]
    if not views:
        raise UsageError(f"{folder} holds no results; name a folder that `vlmbench run --out` wrote.")
    if len(views) > 1:
        raise UsageError(f"{folder} holds {len(views)} runs ({_named(views)}); name one of them.")
    found = Loaded(views[0])
    missing = [name for name in ("spec", "status", "sessions", "device", "kernels") if name not in found.header]
    if missing:
        raise UsageError(f"{views[0].folder} has a header without {', '.join(missing)}; run it again with --fresh.")
    return found


def _begun(folder: Path) -> list[Path]:
    """Folders with results whose names begin with `folder`'s: beside it, else of a model, else of a whole results folder."""
    for below in ("", "*/", "*/*/"):
        named = folder.parent.glob(f"{below}{escape(folder.name)}*")
        if found := sorted(each for each in named if any(each.rglob("header.json"))):
            return found
    return []


def _named(views: list[RunView]) -> str:
    return ", ".join(str(view.folder) for view in views[:3]) + (", …" if len(views) > 3 else "")
