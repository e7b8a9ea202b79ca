"""``vlmbench data prepare``: a suite's official archives, joined and unpacked where the suite looks for its files.

Every name in every archive is read before the first byte is written: one that leaves the folder, a link or a device, a missing
part and too small a disk are found then. Files appear whole or not at all, so that whatever is there with the right size was
unpacked earlier: stopping loses one file. Parts of a split archive are read as one file and never joined on disk.
"""

from __future__ import annotations

import bisect
import errno
import io
import itertools
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import ascii_lowercase
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from vlmbench.errors import RunError, UsageError

if TYPE_CHECKING:
    from vlmbench.progress import Progress
    from vlmbench.suite import Suite

BLOCK = 1 << 20
SPARE_BYTES = 1 << 28
"""Left free on the disk beside what is unpacked."""
PARTS = ".part.*"


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]
    archive: str


@dataclass(frozen=True)
class Prepared:
    unpacked: int
    there: int
    """Files that an earlier call, or somebody else, had put there with the right size."""
    folder: Path

    def __str__(self) -> str:
        return f"{self.unpacked} files unpacked into {self.folder}, {self.there} were there already."


def prepare(suite: Suite, root: Path, archives: Path | None, progress: Progress) -> Prepared:
    """Unpack what the suite's archives hold into ``root/<suite>``. Raises `UsageError` before it starts, then `RunError`."""
    patterns: Sequence[str] = getattr(suite, "archives", ())
    if not patterns:
        raise UsageError(f"{suite.name} comes in no archives: there is nothing to prepare.")
    folder = root / suite.name
    source = archives or folder
    found = {pattern: sorted(source.glob(pattern)) for pattern in patterns}
    if not any(found.values()):
        how = suite.fetch(root) if hasattr(suite, "fetch") else "fetch them"
        raise UsageError(
            f"{source} holds no archive of {suite.name} ({', '.join(patterns)}); {how}, or name --archives."
        )
    with ExitStack() as opened:
        members: list[Member] = []
        for pattern, paths in found.items():
            for each in [paths] if pattern.endswith(PARTS) and paths else [[path] for path in paths]:
                members += _members(each, opened)
        targets = {member.name: _target(folder, member) for member in members}
        left = [member for member in members if not _is_there(targets[member.name], member.size)]
        _check_room(folder, sum(member.size for member in left))
        progress.start(len(left), f"prepare · {suite.name}")
        for member in left:
            progress.stage(member.name)
            _unpack(member, targets[member.name])
            progress.advance()
        progress.finish()
    return Prepared(len(left), len(members) - len(left), folder)


def _members(paths: Sequence[Path], opened: ExitStack) -> Iterator[Member]:
    """The files of one archive, which may be in several parts. Raises `UsageError`."""
    name = paths[0].name
    if ".part." in name:
        _check_parts(paths)
    try:
        if paths[0].suffix == ".zip":
            yield from _of_zip(opened.enter_context(zipfile.ZipFile(paths[0])), name)
            return
        stream: Any = opened.enter_context(io.BufferedReader(cast(Any, Joined(paths)), BLOCK))
        yield from _of_tar(opened.enter_context(tarfile.open(fileobj=stream, mode="r:")), stream, name)  # noqa: SIM115
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UsageError(f"{paths[0]} is damaged or not complete ({error}); fetch it again.") from error
    except OSError as error:
        raise UsageError(f"{paths[0]} cannot be read ({error.strerror or error}); fetch it again.") from error


def _of_zip(archive: zipfile.ZipFile, name: str) -> Iterator[Member]:
    for info in archive.infolist():
        if (info.external_attr >> 16) & 0o170000 == 0o120000:
            raise UsageError(f"{name} holds the link {info.filename!r}: that is no official archive; fetch it again.")
        if not info.is_dir():
            yield Member(info.filename, info.file_size, lambda info=info: archive.open(info), name)  # type: ignore[misc]


def _of_tar(archive: tarfile.TarFile, stream: IO[bytes], name: str) -> Iterator[Member]:
    for info in archive:
        if info.isdir():
            continue
        if not info.isfile():
            raise UsageError(
                f"{name} holds {info.name!r}, a link or device: that is no official archive; fetch it again."
            )
        yield Member(info.name, info.size, lambda info=info: _some(archive.extractfile(info)), name)  # type: ignore[misc]
    # tarfile takes the end of its input for the end of the archive, wherever that is.
    if not _ends(stream):
        raise tarfile.ReadError("it ends in the middle; a part may be missing")


def _ends(stream: IO[bytes]) -> bool:
    """Whether the two empty blocks that end an archive are there."""
    whole = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, whole - 2 * tarfile.BLOCKSIZE))
    return not any(stream.read())


def _some(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # noqa: S101  # it is a file
    return stream


def _check_parts(paths: Sequence[Path]) -> None:
    """Parts are called aa, ab, … az, ba: one that is missing in between is named."""
    names = ("".join(pair) for pair in itertools.product(ascii_lowercase, repeat=2))
    for path, expected in zip(paths, names, strict=False):
        if path.suffix != f".{expected}":
            raise UsageError(f"{path.with_suffix(f'.{expected}')} is missing; fetch that part into {path.parent}.")


def _target(folder: Path, member: Member) -> Path:
    """Where the file goes. Raises `UsageError` for a name that leaves the folder."""
    name = PurePosixPath(member.name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or not name.parts or ":" in name.parts[0]:
        raise UsageError(f"{member.archive} holds {member.name!r}, which leaves the folder; nothing was unpacked.")
    target = folder.joinpath(*name.parts)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{target.parent} is a link that leaves {folder}; nothing was unpacked.")
    return target


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_room(folder: Path, needed: int) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed and needed + SPARE_BYTES > free:
        raise UsageError(
            f"{folder} needs {(needed + SPARE_BYTES) / 1e6:,.0f} MB, {SPARE_BYTES / 1e6:,.0f} of them to spare, and its disk "
            f"has {free / 1e6:,.0f} MB free; make room, or name another --data-root and leave the archives where they are "
            f"(--archives)."
        )


def _unpack(member: Member, target: Path) -> None:
    """Write the file whole or not at all. Raises `RunError`."""
    kept = "what was unpacked is kept"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as out, member.open() as stream:
                shutil.copyfileobj(stream, out, BLOCK)
                written = out.tell()
            if written != member.size:
                raise zipfile.BadZipFile(f"{written} of {member.size} bytes")
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise RunError(
            f"{member.archive} is damaged at {member.name} ({error}): {kept}; fetch it again, and the same command goes on."
        ) from error
    except OSError as error:
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise RunError(
            f"{target} cannot be written ({error.strerror or error}): {kept}; {remedy}, and the same command goes on."
        ) from error


class Joined(io.RawIOBase):
    """Several files as one that can be read and sought in."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._ends = list(itertools.accumulate(path.stat().st_size for path in paths))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._ends[-1]}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        if self._at >= self._ends[-1]:
            return 0
        number = bisect.bisect_right(self._ends, self._at)
        file = self._files[number]
        file.seek(self._at - (self._ends[number - 1] if number else 0))
        part = file.read(min(len(buffer), self._ends[number] - self._at))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
