"""What the published suites have in common: where rows and media come from, what is checked before a model is loaded.

Rows are read from files below ``--data-root``, or through `datasets` from the hub at the commit named by `revision`. Counts
are those of the official files, and every medium must be there, unless `partial` says that part of them will do; `partial`
is a parameter, so that such a run is never taken for a whole one.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import shlex
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from vlmbench.errors import UsageError
from vlmbench.suite import Media, Sample, Suite
from vlmbench.suites._official import data, subtitles
from vlmbench.suites._official.data import Row, Table
from vlmbench.suites._official.subtitles import Line
from vlmbench.suites._synth.files import cache_root

Style = Literal["official", "lmms-eval", "vlmevalkit"]
"""Whose words ask the question: the benchmark's own, or one of the two harnesses'."""
DIRECTLY = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class OfficialSuite(Suite):
    """`prompt`: whose wording. `revision`: a commit of the data set on the hub, when its rows are not on disk."""

    needs_data: ClassVar[bool] = True
    default_model: ClassVar[str] = "Qwen/Qwen2.5-VL-7B-Instruct"

    hub: ClassVar[tuple[str, ...]]
    """Names on the hub: the present one, then older ones."""
    media_on_hub: ClassVar[bool] = True
    """False where the hub's rows have no media beside them: videos come in archives."""
    archives: ClassVar[tuple[str, ...]] = ()
    """Glob patterns of the archives that media come in; parts of one archive match one pattern ending in ``.part.*``."""
    size: ClassVar[str]
    """What there is to fetch, for people: by the hub's listings and the papers."""
    wanted: ClassVar[str | None] = None
    """Glob pattern of the hub's files that are needed; None: all of them."""
    n_rows: ClassVar[int]
    """Rows of the official file."""
    lmms_task: ClassVar[str]
    """The task of lmms-eval that scores the same rows."""
    id_field: ClassVar[str] = "question_id"
    layouts: ClassVar[Mapping[str, str]]
    """Layout -> glob pattern of its annotation files, in ``ROOT/<suite>`` or in ROOT itself."""

    prompt: Style = "official"
    revision: str | None = None
    partial: bool = False

    _root: Path | None = field(default=None, init=False, repr=False, compare=False)
    _offline: bool = field(default=False, init=False, repr=False, compare=False)

    # -- what a suite says of itself ------------------------------------------------------------------------------------

    @property
    def _expected_rows(self) -> int:
        return self.n_rows

    @abstractmethod
    def _local(self, folder: Path, layout: str, files: Sequence[Path]) -> Table:
        """Read one of the `layouts`, with the field names of the hub's rows."""

    @abstractmethod
    def _hub(self, revision: str) -> Table:
        """Read the rows from the hub."""

    @abstractmethod
    def _samples(self, table: Table) -> Iterable[Sample]:
        """One sample a row, in the file's order. Raises `UsageError` for a row that is not as it should be."""

    def fetch(self, root: Path) -> str:
        """How the data comes to `root`: the size and the commands."""
        unpacked = (
            ""
            if self.media_on_hub
            else f" and then `vlmbench data prepare --suite {self.name} --data-root {shlex.quote(str(root))}`"
        )
        only = "" if self.wanted is None else f" --include '{self.wanted}'"
        return (
            f"fetch it ({self.size}) with `hf download {self.hub[0]} --repo-type dataset{only} --local-dir "
            f"{shlex.quote(str(root / self.name))}`{unpacked}"
        )

    def rows_by_id(self) -> dict[str, Row]:
        """Sample id -> the row as the hub has it, which lmms-eval's scorers take."""
        return {str(row.get(self.id_field, f"row-{row.get('number')}")): row for row in self._table.rows}

    def seconds_stated(self, sample: Sample) -> tuple[float, float] | None:
        """Least and most seconds that the data set says the sample's video has; None when it says nothing."""
        return None

    def subtitle_files(self) -> tuple[list[Path], int]:
        """(files that are there, how many there should be), whether or not `subtitles` are asked for."""
        return [], 0

    @staticmethod
    def read_subtitles(path: Path) -> Sequence[Line]:
        """The lines of one of `subtitle_files`. Raises `OSError` and `ValueError`."""
        return subtitles.read_srt(path)

    # -- the suite ------------------------------------------------------------------------------------------------------

    def located(self, root: Path | None, *, allow_partial: bool = False, offline: bool = False) -> Self:
        suite = self.at(root, allow_partial=allow_partial, offline=offline)
        suite.samples()
        return suite

    def at(self, root: Path | None, *, allow_partial: bool = False, offline: bool = False) -> Self:
        """This suite with its folder named and nothing read yet."""
        suite = dataclasses.replace(self, partial=self.partial or allow_partial)
        object.__setattr__(suite, "_root", root)
        object.__setattr__(suite, "_offline", offline)
        return suite

    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        if split == "train":
            raise UsageError(f"{self.name} is for testing alone: it has no train split here; fit on a synth suite.")
        return self._all

    @cached_property
    def _table(self) -> Table:
        root = self._root
        if self.revision is not None and not self._offline:
            folder = root / self.name if root is not None and (root / self.name).is_dir() else root
            return dataclasses.replace(self._hub(self.revision), folder=folder)
        if root is None:
            wanted = ", ".join(dict.fromkeys(self.layouts.values()))
            rows = (
                "" if self._offline or not self.media_on_hub else f", or a commit of it as {self.name}:revision=COMMIT"
            )
            raise UsageError(
                f"{self.name} needs --data-root, a folder with {self.name}/ in it ({wanted}){rows}; {self.fetch(Path('DATA'))}."
            )
        folder, layout, files = data.find(root, self.name, self.layouts, self.fetch(root))
        with _official(str(files[0])):
            table = self._local(folder, layout, files)
            if not isinstance(table.rows, list) or not all(isinstance(row, Mapping) for row in table.rows):
                raise TypeError("no list of rows")
            return table

    @cached_property
    def _all(self) -> list[Sample]:
        table = self._table
        if not table.rows:
            raise UsageError(f"{table.origin} holds no row; fetch it again.")
        if len(table.rows) != self._expected_rows and not self.partial:
            raise UsageError(
                f"{table.origin} holds {len(table.rows)} rows where {self.name} has {self._expected_rows}; fetch the present "
                f"version, or run what is there with --allow-partial."
            )
        samples = self.read(table)
        if len({sample.id for sample in samples}) < len(samples):
            raise UsageError(f"{table.origin} holds a question twice; fetch it again.")
        return samples if table.picture is not None else self._with_media(samples, table)

    def read(self, table: Table) -> list[Sample]:
        """The table's samples. Raises `UsageError` for a row that is not as it should be."""
        with _official(table.origin):
            return list(self._samples(table))

    def _with_media(self, samples: list[Sample], table: Table) -> list[Sample]:
        """The samples whose files are there: all of them, unless `partial`."""
        paths = list(dict.fromkeys(media.path for sample in samples for media in sample.media))
        missing = {path for path in paths if not path.exists()}
        found = [sample for sample in samples if all(media.path not in missing for media in sample.media)]
        if missing and (not self.partial or not found):
            first = next(path for path in paths if path in missing)
            remedy = "put them there"
            if len(missing) == len(paths):
                root = self._root or Path()
                remedy = (
                    "unpack its archives there with `vlmbench data prepare "
                    f"--suite {self.name} --data-root {shlex.quote(str(root))}`"
                )
            partial = "" if not found else ", or run what is there with --allow-partial"
            raise UsageError(
                f"{len(missing)} of {len(paths)} files of {self.name} are missing in {first.parent} (the first: "
                f"{first.name}); {remedy}{partial}."
            )
        return found

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples():
            media = [media.path.name for media in sample.media if self._table.picture is None]
            told = {key: value for key, value in sample.extra.items() if not isinstance(value, Path)}
            fields = (sample.id, sample.cluster, sample.question, sample.answer, sorted(told.items()), media)
            digest.update(repr(fields).encode())
        return digest.hexdigest()[:8]

    @property
    def data_hash(self) -> str:
        return self._digest

    def materialise(self, sample: Sample) -> None:
        for media in sample.media:
            if media.path.exists():
                continue
            if self._table.picture is None:
                raise FileNotFoundError(errno.ENOENT, "the file is missing", str(media.path))
            encoded = self._table.picture(sample.extra["picture"])
            if not encoded:
                raise OSError(f"row {sample.extra['picture']} of {self._table.origin} has no picture")
            _write(media.path, encoded)

    def _picture(self, table: Table, name: str) -> tuple[Media]:
        """A picture inside the rows, which `materialise` writes to the cache; rows of other files get other names."""
        mark = hashlib.sha256(table.mark.encode()).hexdigest()[:10]
        return (Media("image", cache_root() / self.name / mark / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.picture"),)


@contextmanager
def _official(origin: str) -> Iterator[None]:
    """A value of another kind than in the official file is a sentence, wherever the reading stumbles over it."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{origin} is not as the official file ({what[:200]}); fetch it again.") from error


def short_answer(question: str) -> str:
    """The wording that both harnesses and LLaVA share for questions with free answers."""
    return f"{question}\n{SHORT}"


def picked(row: Mapping[str, Any], what: str, known: Sequence[str], origin: str) -> str:
    """The row's `what`, which must be one of `known`. Raises `UsageError`."""
    value = str(row[what])
    if value not in known:
        raise UsageError(f"{origin} has the {what} {value!r}, not one of {', '.join(known)}; fetch it again.")
    return value


def _write(path: Path, encoded: bytes) -> None:
    """Whole or not at all. Raises `OSError` with the folder's name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(encoded)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path.parent)) from error
