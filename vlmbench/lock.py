"""One writer per folder: an exclusive lock that a dead process does not hold."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

from vlmbench.errors import UsageError


class Lock:
    """An exclusive ``flock`` on ``FOLDER/lock``; the system drops it when the process dies, however it dies."""

    _held: ClassVar[WeakSet[Lock]] = WeakSet()

    def __init__(self, folder: Path) -> None:
        self._fd = -1
        path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(f"{path} cannot be locked ({error.strerror}); put --out on a local disk.") from error
            raise UsageError(
                f"{folder} is being written by process {holder}; wait until it has ended, or choose another --out."
            ) from None
        with contextlib.suppress(OSError):  # a full disk must not keep anybody from reopening; the number is a courtesy
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd
        self._held.add(self)

    def release(self) -> None:
        """Closing drops the lock, unless a forked child still has the descriptor: hence `_close_in_child`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._held.discard(self)

    @classmethod
    def _close_in_child(cls) -> None:
        # A decoding worker that outlives a killed parent would otherwise hold the parent's lock.
        for lock in list(cls._held):
            lock.release()


os.register_at_fork(after_in_child=Lock._close_in_child)
