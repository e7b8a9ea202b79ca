"""Results on disk: ``DIR/<suite>/<model>/<method>-<hash>/{header.json, samples.jsonl}``, appended to and resumed.

One line a record, written by one ``os.write`` on an ``O_APPEND`` descriptor, so that a killed process loses at most the
line it was writing; fsync at most once a second and at the end, so that a power cut loses at most a second. A torn last
line is cut off on open. A damaged line elsewhere is left where it is, skipped and reported, and its sample runs again.
Of two records with one key the later wins: a sample is retried or scored again without rewriting the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from vlmbench.errors import RunError, UsageError
from vlmbench.header import now, read_header, resumed, write_header
from vlmbench.lock import Lock
from vlmbench.record import Pass, SampleRecord, Status, peek
from vlmbench.spec import AnswerSpec

RunStatus = Literal["started", "done", "failed", "interrupted"]
FSYNC_EVERY_S = 1.0


class Records(Mapping[tuple[str, Pass], SampleRecord]):
    """Records of one file by (id, pass), each parsed when it is first asked for."""

    def __init__(self, path: Path, skim: bool = False) -> None:
        """Read and verify every line of `path`; a missing file is an empty one. For `skim` see `SampleRecord.from_line`."""
        self._path, self._skim = path, skim
        self._found: dict[tuple[str, Pass], bytes | SampleRecord] = {}
        self._status: dict[tuple[str, Pass], Status] = {}
        self.damaged: list[int] = []
        """Numbers (from 1) of whole lines that fail their checksum."""
        *lines, torn = (path.read_bytes() if path.exists() else b"").split(b"\n")
        self.torn_bytes = len(torn)
        self.whole_bytes = sum(map(len, lines)) + len(lines)
        for number, line in enumerate(lines, start=1):
            try:
                key = peek(line)
            except ValueError:
                self.damaged.append(number)
                continue
            self._found[key.id, key.pass_] = line
            self._status[key.id, key.pass_] = key.status

    def __getitem__(self, key: tuple[str, Pass]) -> SampleRecord:
        found = self._found[key]
        if isinstance(found, bytes):
            try:
                found = self._found[key] = SampleRecord.from_line(found, skim=self._skim)
            except ValueError as error:
                name, pass_ = key
                raise UsageError(
                    f"{self._path}: the {pass_} record of {name} cannot be used ({error}); delete its line and run again."
                ) from error
        return found

    def __iter__(self) -> Iterator[tuple[str, Pass]]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def of(self, pass_: Pass) -> dict[str, SampleRecord]:
        """id -> record of one pass."""
        return {
            key[0]: self[key] if isinstance(found, bytes) else found
            for key, found in self._found.items()
            if key[1] == pass_
        }

    def add(self, record: SampleRecord) -> None:
        self._found[record.id, record.pass_] = record
        self._status[record.id, record.pass_] = record.status

    def done(self, pass_: Pass, retry_errors: bool = False) -> set[str]:
        """Ids that need no further run: every status but, on request, `error`.

        `oom`, `decode_error` and `timeout` would only come back with the same settings; `error` may be the machine's.
        """
        return {
            id_
            for (id_, each), status in self._status.items()
            if each == pass_ and not (retry_errors and status == "error")
        }


class RunView:
    """A stored run, to read. A line that another process is writing at this moment is not seen."""

    def __init__(self, folder: Path, skim: bool = False) -> None:
        """For `skim` see `SampleRecord.from_line`."""
        self.folder = folder
        self.header = read_header(folder)
        self._skim = skim

    @cached_property
    def records(self) -> Records:
        return Records(self.folder / "samples.jsonl", self._skim)


class Run:
    """A stored run, to write: the only writer of its folder while it is open. Made by `ResultStore.open`."""

    def __init__(self, folder: Path, header: Mapping[str, Any] | None, fresh: bool = False) -> None:
        """`header` None opens an existing run for maintenance: no session is added and the status stays.

        Raises `UsageError` when another process writes here, the folder cannot be written, or another version made it.
        """
        self.folder = folder
        self._samples = folder / "samples.jsonl"
        self._fd = -1
        self._lock = Lock(folder)
        try:
            if fresh:
                self._samples.unlink(missing_ok=True)
                (folder / "header.json").unlink(missing_ok=True)
            self._before: RunStatus | None = None
            """Status of an earlier session, which stands as long as this one writes nothing."""
            if (folder / "header.json").exists():
                self._before = read_header(folder)["status"]
            self.records = Records(self._samples)
            self.repaired = self._repair()
            """What was found damaged and put right on open, in a sentence; empty when nothing was."""
            self.header = read_header(folder) if header is None else resumed(folder, header)
            self.session = str(self.header["session"])
            self._status: RunStatus | None = self.header["status"] if header is None else None
            if header is not None:
                self.save_header()
            self._fd = os.open(self._samples, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._end = os.fstat(self._fd).st_size
            self._synced = time.monotonic()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise UsageError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from error
            raise

    def done(self, pass_: Pass, retry_errors: bool = False) -> set[str]:
        """Ids that need no further run in this pass, see `Records.done`."""
        return self.records.done(pass_, retry_errors)

    def append(self, record: SampleRecord) -> None:
        """Write one record. Raises `RunError` when the disk refuses; the file then ends with its last whole line."""
        if not record.session:
            record = dataclasses.replace(record, session=self.session)
        line = record.to_line().encode()
        try:
            written = os.write(self._fd, line)
            if written != len(line):  # a disk that fills up takes what it can and only then complains
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._synced >= FSYNC_EVERY_S:
                self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):  # the next open cuts it off instead
                os.ftruncate(self._fd, self._end)
            raise RunError(
                f"{self.folder} cannot be written ({error.strerror}): everything finished is kept, and the same "
                "command resumes there once the disk takes data again."
            ) from error
        self._end += len(line)
        self._before = None
        self.records.add(record)

    def finish(self, status: RunStatus) -> None:
        """Set the status. Leaving the ``with`` block does it too: done, interrupted (Ctrl-C, SIGTERM) or failed."""
        self._status = status
        self.header["status"] = self.header["sessions"][-1]["status"] = status
        self.header["sessions"][-1]["ended"] = now()
        try:
            self._sync()
            self.save_header()
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written ({error.strerror}): the samples are kept; the same command resumes."
            ) from error

    def save_header(self) -> None:
        """Replace ``header.json`` atomically. Raises `OSError`."""
        self.header["updated"] = now()
        write_header(self.folder, self.header)

    def close(self) -> None:
        """Give the lock back. The status stays as it is; a run that was never finished stays `started`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release()

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def _repair(self) -> str:
        said = []
        if self.records.torn_bytes:
            os.truncate(self._samples, self.records.whole_bytes)
            said.append(f"the last line was torn and its {self.records.torn_bytes} bytes are cut off")
        if damaged := self.records.damaged:
            shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
            said.append(f"{len(damaged)} damaged line(s) ({shown}) are skipped")
        return f"{self._samples}: {' and '.join(said)}; their samples run again." if said else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if self._status is None:
                if kind is None:
                    self.finish("done")
                else:
                    with contextlib.suppress(RunError):  # the first failure is the one to hear about
                        self.finish(self._before or ("failed" if issubclass(kind, Exception) else "interrupted"))
        finally:
            self.close()


class ResultStore:
    """All runs below one directory."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def open(self, answer: AnswerSpec, header: Mapping[str, Any], fresh: bool = False) -> Run:
        """Start the run of `answer`, or resume it where it is stored; `header` comes from `header.make_header`.

        `fresh` drops what is stored of this run first. Raises `UsageError`, see `Run`.
        """
        return Run(self.root / answer.folder, header, fresh)

    def reopen(self, view: RunView) -> Run:
        """Open a stored run for maintenance, such as scoring again: its status and sessions stay as they are."""
        return Run(view.folder, None)

    def runs(self, skim: bool = False) -> list[RunView]:
        """Every run at or below the directory, sorted by folder. Raises `UsageError` when there is none.

        For `skim` see `SampleRecord.from_line`; what is read so is for tables and never written back.
        """
        folders = sorted(path.parent for path in self.root.rglob("header.json"))
        if not folders:
            raise UsageError(f"{self.root} holds no results; name a folder that `vlmbench run --out` wrote.")
        return [RunView(folder, skim) for folder in folders]
