"""One stored run by the folder that somebody names."""

from __future__ import annotations

from pathlib import Path

from vlmbench.errors import UsageError
from vlmbench.loaded import Loaded
from vlmbench.store import ResultStore, RunView


def one_run(folder: Path) -> Loaded:
    """The run at or below `folder`, or the only one whose folder begins with that name. Raises `UsageError`."""
    if not folder.exists() and folder.parent.is_dir():
        begun = sorted(each for each in folder.parent.iterdir() if each.name.startswith(folder.name) and each.is_dir())
        views = [view for each in begun for view in ResultStore(each).runs()]
    else:
        views = ResultStore(folder).runs()
    if not views:
        raise UsageError(f"{folder} holds no results; name a folder that `vlmbench run --out` wrote.")
    if len(views) > 1:
        raise UsageError(f"{folder} holds {len(views)} runs ({_named(views)}); name one of them.")
    found = Loaded(views[0])
    missing = [name for name in ("spec", "status", "sessions", "device", "kernels") if name not in found.header]
    if missing:
        raise UsageError(f"{views[0].folder} has a header without {', '.join(missing)}; run it again with --fresh.")
    return found


def _named(views: list[RunView]) -> str:
    return ", ".join(str(view.folder) for view in views[:3]) + (", …" if len(views) > 3 else "")
