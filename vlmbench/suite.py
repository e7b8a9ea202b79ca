"""A suite: samples with media, a prompt, and a deterministic scorer. Suites know nothing of models or methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from vlmbench.errors import UsageError


@dataclass(frozen=True)
class Media:
    """One video or picture file, named but perhaps not yet on disk (`Suite.materialise` puts it there)."""

    kind: Literal["video", "image"]
    path: Path


@dataclass(frozen=True)
class Caption:
    """Text that stands before the first frame shown at or after `time_s`; behind the frames when there is none."""

    time_s: float
    text: str


@dataclass(frozen=True)
class Sample:
    """One question about zero or more media."""

    id: str
    """Unique in the suite, stable across versions of the code."""
    cluster: str
    """Samples that share a video share a cluster; intervals are clustered by it."""
    media: tuple[Media, ...]
    question: str
    answer: str
    """The reference answer in the form the scorer compares with."""
    template: str
    """Questions of one template are alike but for their slots; `prior` answers by template."""
    strata: Mapping[str, str] = field(default_factory=dict)
    """Break-downs, e.g. {"length": "32", "type": "colour"}; `--limit` goes round-robin over them."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    captions: tuple[Caption, ...] = ()
    """Text between the frames of the only medium, a video: subtitles, time stamps. No method drops it with its frames."""


class Score(NamedTuple):
    value: float
    """0 to 1."""
    prediction: str | None
    """The answer read from the text; None when nothing could be read (status `parse_fail`)."""


class Suite(ABC):
    """A frozen dataclass: its fields are its parameters."""

    name: ClassVar[str]
    version: ClassVar[str]
    """Changes whenever a sample, a prompt or the scorer changes."""
    default_model: ClassVar[str]
    default_sampler: ClassVar[str] = "endpoints"
    default_fps: ClassVar[float | None] = None
    """Frames a second at most when the user names no rate."""
    max_new_tokens: ClassVar[int] = 16
    needs_data: ClassVar[bool] = False
    """True when its files must be given (``--data-root``); a suite that makes its own media takes none."""

    @property
    def default_frames(self) -> int | None:
        """Frames a video when the user names none; None means all of them."""
        return None

    @property
    def data_hash(self) -> str:
        """A short hash of what the samples are made of; it goes into the header."""
        return ""

    @property
    def said(self) -> str:
        """The suite in the line that says what is about to run: with what one should know of its questions."""
        return self.name

    @property
    def scored(self) -> bool:
        """False when no question has a reference answer: methods are then only compared with full attention."""
        return True

    def located(self, root: Path | None, *, allow_partial: bool = False, offline: bool = False) -> Self:
        """This suite with its data found and checked, before a model is loaded. Raises `UsageError`."""
        if root is not None or allow_partial:
            raise UsageError(f"--data-root and --allow-partial mean nothing for {self.name}: it makes its own media.")
        return self

    @abstractmethod
    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        """All samples in their canonical order, cheap (nothing is rendered or decoded)."""

    @abstractmethod
    def materialise(self, sample: Sample) -> None:
        """Put the sample's media on disk when they are generated; otherwise check that they are there.

        Raises `OSError` or `FileNotFoundError`, which become a `decode_error` record.
        """

    def asked(self, sample: Sample, times_s: Sequence[float]) -> Sample:
        """The sample as it is put to a model that sees a video's frames at these times (none: pictures, or no frame).

        Its `question` is all of the text that follows the media, its `captions` what stands between the frames.
        """
        return sample

    @abstractmethod
    def score(self, sample: Sample, text: str) -> Score:
        """Deterministic; unparsable is None and 0."""


def limited(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` samples (None: all), round-robin over the strata, so that a small run sees every kind of question.

    A larger limit always contains a smaller one: raising it resumes.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sorted(sample.strata.items())), []).append(sample)
    # Each kind starts elsewhere in the suite: the first of every kind would all be questions on the first few videos.
    turned = [
        group[(start := i * len(group) // len(groups)) :] + group[:start] for i, group in enumerate(groups.values())
    ]
    order = [
        group[depth] for depth in range(max(map(len, turned), default=0)) for group in turned if depth < len(group)
    ]
    return order[:limit]
