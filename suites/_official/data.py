"""Finding and reading a suite's files below ``--data-root``, or its rows on the hub; every fault is one sentence.

Pictures inside parquet files are read one row group at a time: VQAv2's validation split alone is several gigabytes.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmbench.errors import UsageError

Row = Mapping[str, Any]
PICTURE = "image"
"""The column that holds a picture in every parquet file here: ``{"bytes", "path"}``."""


@dataclass(frozen=True)
class Table:
    """Rows without their pictures, which `picture` reads one by one."""

    rows: Sequence[Row]
    origin: str
    """What the rows were read from, for messages."""
    folder: Path | None = None
    """Where files that the rows name are looked for."""
    picture: Callable[[int], bytes | None] | None = None
    """Row number -> the encoded picture; None when pictures are files."""
    has_picture: Sequence[bool] = ()
    """By row; empty when pictures are files."""
    mark: str = ""
    """Differs between files whose pictures may differ."""

    def require(self, *names: str) -> Table:
        """This table. Raises `UsageError` when a row has not all of these fields."""
        for number, row in enumerate(self.rows):
            missing = [name for name in names if name not in row]
            if missing:
                raise UsageError(
                    f"{self.origin} is not the official file: row {number} has no {' and no '.join(missing)} "
                    f"(it has {', '.join(row)}); fetch it again."
                )
        return self


def find(root: Path, name: str, layouts: Mapping[str, str], remedy: str) -> tuple[Path, str, list[Path]]:
    """(folder, layout, files) of the first layout whose pattern matches, in ``root/name`` or `root` itself.

    `layouts` maps a name to a glob pattern; `remedy` says how the files can be had. Raises `UsageError`.
    """
    if not root.is_dir():
        raise UsageError(f"--data-root {root} is no folder; name the one that holds {name}/.")
    for folder in (root / name, root):
        for layout, pattern in layouts.items():
            if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return folder, layout, files
    expected = ", ".join(dict.fromkeys(layouts.values()))
    raise UsageError(f"{root / name} holds none of {name}'s files ({expected}); {remedy}, or name another --data-root.")


def read_json(path: Path) -> Any:
    """Raises `UsageError` with the file's name."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({_line(error)}); fetch it again.") from error


def read_parquet(paths: Sequence[Path], folder: Path) -> Table:
    """Rows of all shards in order. Raises `UsageError` with the file's name."""
    import pyarrow.parquet as pq

    rows: list[Row] = []
    has: list[bool] = []
    groups: list[tuple[int, Path, int]] = []  # first row, file, row group
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            plain = [name for name in names if name != PICTURE]
            for group in range(file.num_row_groups):
                groups.append((len(rows), path, group))
                rows.extend(file.read_row_group(group, columns=plain).to_pylist())
                if PICTURE in names:
                    has.extend(_present(file, group))
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            raise UsageError(f"{path} cannot be read as parquet ({_line(error)}); fetch it again.") from error
    origin = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} parquet files)"
    sizes = [(path.name, path.stat().st_size) for path in paths]
    return Table(rows, origin, folder, _Pictures(groups) if has else None, has, mark=repr(sizes))


def from_hub(names: Sequence[str], revision: str, config: str | None, split: str) -> Table:
    """Rows at one commit of the first of `names` (a data set that moved has two) that can be read. Raises `UsageError`."""
    if not re.fullmatch(r"[0-9a-f]{1,40}", revision):
        raise UsageError(
            f"revision must be a commit of {names[0]}, not {revision!r}: a branch or tag can change; copy it from its history."
        )
    try:
        import datasets
    except ImportError:
        raise UsageError("Reading from the hub needs the package datasets; install it, or give --data-root.") from None
    faults = []
    for name in names:
        try:
            found = datasets.load_dataset(name, config, split=split, revision=revision)
        except Exception as error:  # whatever the hub, the network or a gate says
            faults.append(f"{name}: {_line(error)}")
            continue
        origin = f"{name}@{revision}"
        if PICTURE not in found.column_names:
            return Table(found.to_list(), origin)
        return _with_pictures(found.cast_column(PICTURE, datasets.Image(decode=False)), origin)
    gated = any(word in " ".join(faults).lower() for word in _CLOSED)
    login = f"accept the conditions of {names[0]} on the hub and log in with `hf auth login`, or " if gated else ""
    raise UsageError(f"The hub gives no rows at revision {revision!r} ({'; '.join(faults)}); {login}give --data-root.")


_CLOSED = ("gated", "authenticated", "401", "403", "unauthorized", "forbidden")
"""Words of the hub for a data set that wants to know who is asking."""


def _with_pictures(found: Any, origin: str) -> Table:
    """A data set of the hub whose pictures are not decoded."""
    rows = found.remove_columns(PICTURE).to_list()
    has = found.data.column(PICTURE).is_valid().to_pylist()
    return Table(rows, origin, None, lambda row: (found[row][PICTURE] or {}).get("bytes"), has, mark=origin)


def home(folder: Path, names: Sequence[str]) -> Path:
    """Where a suite's media folders are: beside its rows, or, as on the hub, one level above them."""
    return next((each for each in (folder, folder.parent) if any((each / name).is_dir() for name in names)), folder)


def by_stem(folder: Path, folders: Iterable[str]) -> dict[str, Path]:
    """Files of the first of the sub-folders that exists and is not empty, by name without suffix."""
    there = (sorted((folder / name).iterdir()) for name in folders if (folder / name).is_dir())
    return next(filter(None, ({path.stem: path for path in paths if path.is_file()} for paths in there)), {})


class _Pictures:
    """The picture column of parquet files; the row group read last stays in memory, since rows are asked for in order."""

    def __init__(self, groups: Sequence[tuple[int, Path, int]]) -> None:
        self._groups = groups
        self._last: tuple[int, list[Any]] = (-1, [])

    def __call__(self, row: int) -> bytes | None:
        import pyarrow.parquet as pq

        number = bisect_right(self._groups, row, key=lambda group: group[0]) - 1
        first, path, group = self._groups[number]
        if self._last[0] != number:
            table = pq.ParquetFile(path).read_row_group(group, columns=[PICTURE])
            self._last = (number, table.column(PICTURE).to_pylist())
        value = self._last[1][row - first]
        return value["bytes"] if value else None


def _present(file: Any, group: int) -> list[bool]:
    """By row of a group: whether it has a picture. Only the paths beside the bytes are read, which say so too."""
    column = file.read_row_group(group, columns=[f"{PICTURE}.path"]).column(PICTURE)
    return list(column.is_valid().to_pylist())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
