"""What the runner needs from whatever answers questions: a real model (`engine.TorchBackend`) or the stand-in `dummy`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmbench.record import Memory, Pass, Status, Timing

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.suite import Sample
    from vlmbench.video import Clip


@dataclass(frozen=True)
class Identity:
    """What answered: goes into the header, and what can change an answer goes into the hash."""

    model: str
    revision: str | None
    weights_hash: str
    dtype: str
    device_type: str
    device_name: str
    attention: str
    """The implementation asked for (sdpa, eager, …)."""
    attention_kernel: str
    """The kernel that dispatches in the language model."""
    vision_attention_kernel: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else worth a line in the header: shapes, driver, threads."""


@dataclass
class Outcome:
    """What one sample gave in one pass. Only the fields of that pass are filled."""

    status: Status = "ok"
    """`ok`, `oom` or `error`; the runner turns `ok` into `parse_fail` after scoring."""
    raw_text: str = ""
    output_ids: list[int] = field(default_factory=list)
    first_token: dict[str, Any] | None = None
    timing: Timing | None = None
    memory: Memory | None = None
    work: dict[str, Any] | None = None
    trace: dict[str, Any] | None = None
    applied: bool = True
    reason: str = ""
    tokens: dict[str, int] = field(default_factory=dict)
    error: str = ""


class Backend(ABC):
    """Answers one sample at a time."""

    needs_media: bool = True
    """False when no video needs to be decoded for it."""

    @property
    @abstractmethod
    def identity(self) -> Identity: ...

    def check(self, method: Method) -> None:
        """Raise `UsageError` when this model cannot take the method."""

    def attach(self, method: Method) -> AbstractContextManager[None]:
        """Install the method; leaving restores the model bit for bit."""
        return nullcontext()

    @abstractmethod
    def answer(
        self,
        method: Method,
        sample: Sample,
        prompt: str,
        clips: Sequence[Clip],
        *,
        pass_: Pass,
        max_new_tokens: int,
        kernel: str | None = None,
    ) -> Outcome:
        """Run one sample with an attached method.

        A latency pass ignores EOS and fills `timing` (all but `video_s`); a memory pass fills `memory`; an accuracy pass
        fills the answer. `kernel` names another attention implementation for this call (the best dense one).
        """

    def answer_together(
        self,
        method: Method,
        samples: Sequence[Sample],
        prompts: Sequence[str],
        clips: Sequence[Clip],
        *,
        max_new_tokens: int,
        kernel: str | None = None,
    ) -> list[Outcome]:
        """A latency pass of several questions on the same media, with an attached method that may reuse its prefix.

        The first prompt is prefilled whole; of the next ones, only what stands behind the last visual token. A run that
        failed is one outcome alone. The default reuses nothing.
        """
        options: dict[str, Any] = {"pass_": "latency", "max_new_tokens": max_new_tokens, "kernel": kernel}
        return [
            self.answer(method, sample, prompt, clips, **options)
            for sample, prompt in zip(samples, prompts, strict=True)
        ]

    def best_dense_kernel(self) -> str:
        """The attention implementation that is fastest for full attention here."""
        return self.identity.attention
