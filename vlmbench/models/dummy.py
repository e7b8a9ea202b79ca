"""A stand-in that answers without a model: for tests of store, faults and reports, never in a table of results.

Everything it returns, times included, is a hash of (seed, sample, method): two runs agree to the last digit, and its
times say nothing about any method.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmbench.backend import Backend, Identity, Outcome
from vlmbench.errors import UsageError
from vlmbench.record import Memory, Pass, Timing

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.suite import Sample
    from vlmbench.video import Clip

WRONG = ("red", "blue", "left", "seven", "A", "B")
WEIGHT_BYTES = 50_000_000


@dataclass(frozen=True)
class DummyBackend(Backend):
    """``dummy[:delay_s=0.0,accuracy=0.7,fail=0.0,oom=0.0,seed=0]``; shares are of samples, 0 to 1."""

    name: ClassVar[str] = "dummy"
    needs_media: ClassVar[bool] = False  # type: ignore[misc]  # never of one instance here

    delay_s: float = 0.0
    """Real seconds that each answer takes, so that a test can interrupt it."""
    accuracy: float = 0.7
    fail: float = 0.0
    """Share of samples that end with status `error`."""
    oom: float = 0.0
    """Share of samples that end with status `oom`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("accuracy", "fail", "oom"):
            if not 0 <= getattr(self, key) <= 1:
                raise UsageError(f"dummy:{key} is a share from 0 to 1, not {getattr(self, key)}.")
        if self.delay_s < 0:
            raise UsageError(f"dummy:delay_s is a time of 0 or more seconds, not {self.delay_s}.")

    @property
    def identity(self) -> Identity:
        answers = f"accuracy={self.accuracy},fail={self.fail},oom={self.oom},seed={self.seed}"
        return Identity(
            model=self.name,
            revision=None,
            weights_hash=hashlib.sha256(answers.encode()).hexdigest()[:16],
            dtype="float32",
            device_type="cpu",
            device_name="none (stand-in)",
            attention="dummy",
            attention_kernel="dummy",
            vision_attention_kernel="dummy",
            facts={"stand_in": True, "answers": answers},
        )

    def best_dense_kernel(self) -> str:
        return "dummy"

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
        """The prompt and the clips are ignored, and so is `kernel`: full attention is equally fast with every one."""
        time.sleep(self.delay_s)
        if self._chance("oom", sample.id, method.name) < self.oom:
            return Outcome(status="oom", error="out of memory (made up by dummy:oom)")
        if self._chance("fail", sample.id, method.name) < self.fail:
            return Outcome(status="error", error="failure (made up by dummy:fail)")
        outcome = Outcome(
            tokens={"prompt": 320, "visual": 256},
            work={"flops": 1_000_000_000, "attention_flops": 400_000_000},
        )
        match pass_:
            case "accuracy":
                right = self._chance("right", sample.id, method.name) < self.accuracy
                outcome.raw_text = sample.answer if right else self._wrong(sample, method.name)
                outcome.output_ids = list(outcome.raw_text.encode()[:max_new_tokens])
            case "latency":
                outcome.timing = self._timing(sample.id, method.name, max_new_tokens)
            case "memory":
                outcome.memory = self._memory(sample.id, method.name)
        return outcome

    def _chance(self, *parts: str) -> float:
        """A number in [0, 1) that depends on the seed and `parts` alone."""
        digest = hashlib.sha256("\0".join((str(self.seed), *parts)).encode()).digest()
        return int.from_bytes(digest[:6]) / 2**48

    def _wrong(self, sample: Sample, method: str) -> str:
        """Wrong, but of the right kind, so that a scorer of letters reads a letter."""
        letter = len(sample.answer) == 1
        alike = [word for word in WRONG if word.lower() != sample.answer.lower() and (len(word) == 1) == letter]
        return alike[int(self._chance("wrong", sample.id, method) * len(alike))]

    def _memory(self, sample: str, method: str) -> Memory:
        extra = 1_000_000 + int(100_000 * self._chance("memory", sample, method))
        peak = WEIGHT_BYTES + extra
        return Memory(peak, extra, extra // 2, extra // 2, 2 * peak, {"vision": peak - 1, "prefill": peak})

    def _timing(self, sample: str, method: str, tokens: int) -> Timing:
        scale = (1.0 if method == "full" else 0.5) * (0.9 + 0.2 * self._chance("time", sample, method))
        before = {"preprocess_s": 0.002, "transfer_s": 0.001}
        until_first = {"vision_s": 0.010, "prepare_s": 0.001, "prefill_s": 0.040 * scale}
        decode = (0.005 * scale,) * max(tokens - 1, 0)
        other = 0.001
        return Timing(
            **before,
            **until_first,
            decode_s=decode,
            other_s=other,
            ttft_s=sum(until_first.values()),
            e2e_s=sum(before.values()) + sum(until_first.values()) + sum(decode) + other,
        )
