"""Any generative task of lmms-eval (lmms:TASK): its documents, prompts and scorer, with our engine, meter and store.

Needs the extra ``lmms``. With ``--data-root ROOT`` rows are read from ``ROOT/TASK/*.parquet`` (or `rows`), and videos are
looked for as lmms-eval does below ``HF_HOME``, which is then ROOT; without it, from the hub's cache. Media come before the
text; a task that puts pictures between words is refused, unless `media=first` says that they may be moved there. The score is
the task's first metric, from 0 to 1; where lmms-eval guesses a letter, it guesses the same one every time. Clusters are the
task's own, else its videos.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from vlmbench.errors import UsageError
from vlmbench.lmms_client import LmmsEval
from vlmbench.suite import Media, Sample, Score, Suite
from vlmbench.suites._synth.files import cache_root

MARK = "<image>"
"""Where a task wants a picture in its text; without it, before the text."""


@dataclass(frozen=True)
class Lmms(Suite):
    """`task`: its name in lmms-eval; `rows`: a pattern of parquet files below ``--data-root``; `media`: where they come."""

    name: ClassVar[str] = "lmms"
    version: ClassVar[str] = "1"
    default_model: ClassVar[str] = "Qwen/Qwen2.5-VL-7B-Instruct"
    needs_data: ClassVar[bool] = True
    bare: ClassVar[str] = "task"

    task: str = ""
    rows: str | None = None
    media: Literal["asked", "first"] = "asked"

    _root: Path | None = field(default=None, init=False, repr=False, compare=False)
    _lmms: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.task:
            raise UsageError("lmms needs a task; write lmms:TASK, with its name in lmms-eval.")

    @property
    def default_frames(self) -> int | None:
        return 32

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]  # the task's own
        return int(self._opened["max_new_tokens"] or 16)

    @property
    def data_hash(self) -> str:
        told = [(doc["text"], doc["answer"]) for doc in self._opened["docs"]]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:8]

    def located(self, root: Path | None, *, allow_partial: bool = False, offline: bool = False) -> Self:
        if allow_partial:
            raise UsageError("--allow-partial means nothing for lmms: a task takes all of its documents.")
        suite = dataclasses.replace(self)
        object.__setattr__(suite, "_root", None if root is None else root.resolve())
        object.__setattr__(suite, "_lmms", LmmsEval(offline))
        suite.samples()
        return suite

    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        if split == "train":
            raise UsageError("lmms is for testing alone: it has no train split here; fit on a synth suite.")
        return self._all

    @cached_property
    def _opened(self) -> dict[str, Any]:
        if self._root is not None and not self._root.is_dir():
            raise UsageError(f"--data-root {self._root} is no folder; name the one that holds {self.task}/.")
        if self._lmms is None:
            object.__setattr__(self, "_lmms", LmmsEval())
        root = None if self._root is None else str(self._root)
        try:
            found: dict[str, Any] = self._lmms.ask("open", task=self.task, root=root, rows=self.rows)
        except ValueError as error:
            raise UsageError(
                f"lmms:{self.task} cannot be opened ({error}); name one of generate_until whose data is there."
            ) from error
        return found

    @cached_property
    def _all(self) -> list[Sample]:
        return [self._sample(number, doc) for number, doc in enumerate(self._opened["docs"])]

    def _sample(self, number: int, doc: dict[str, Any]) -> Sample:
        mark = hashlib.sha256(repr((self.task, self._opened["rows"])).encode()).hexdigest()[:10]
        media = tuple(
            Media(each["kind"], Path(each["path"] or cache_root() / "lmms" / mark / f"{number}-{place}.png"))
            for place, each in enumerate(doc["media"])
        )
        videos = "+".join(each.path.name for each in media if each.kind == "video")
        if self.media == "asked" and interleaved(doc["text"]):
            raise UsageError(
                f"lmms:{self.task} is an interleaved task (question {number} has words before a picture), and media come "
                f"before the text here; write lmms:{self.task},media=first to ask it so, or name a task that is not."
            )
        return Sample(
            id=str(number),
            cluster=doc["cluster"] or videos or str(number),
            media=media,
            question=doc["text"].replace(MARK, "").strip(),
            answer=doc["answer"] or "?",
            template=self.task,
            extra={"doc": number},
        )

    def materialise(self, sample: Sample) -> None:
        pictures = [media.path for media in sample.media if media.kind == "image"]
        if any(not path.exists() for path in pictures):
            try:
                self._lmms.ask("media", doc=sample.extra["doc"], paths=[str(path) for path in pictures])
            except ValueError as error:
                raise OSError(f"lmms-eval gives no picture for {sample.id}: {error}") from error

    def score(self, sample: Sample, text: str) -> Score:
        found = self._lmms.ask("score", doc=sample.extra["doc"], text=text)
        return Score(min(1.0, max(0.0, found["value"])), found["prediction"] or None)


def interleaved(text: str) -> bool:
    """Whether words come before a picture."""
    return bool(text.rpartition(MARK)[0].replace(MARK, "").strip())
