"""What the user asked of ``vlmbench run``, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmbench.errors import UsageError
from vlmbench.spec import nearest

MODES = ("accuracy", "latency", "memory", "all")
ATTENTION = ("sdpa", "eager", "flash", "best")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunRequest:
    """One field for each option of ``vlmbench run``; None leaves the choice to the suite, the model or the machine."""

    methods: tuple[str, ...] = ()
    model: str | None = None
    suite: str = "synthvideo"
    limit: int | None = None
    frames: int | None = None
    fps: float | None = None
    sampler: str | None = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    mode: str = "all"
    attention: str = "sdpa"
    max_new_tokens: int | None = None
    warmup: int = 1
    repeats: int = 3
    timed: int = 8
    """Videos measured in latency and memory passes: time depends on the video, not on the question."""
    latency_limit: float | None = None
    """Seconds from the video file to the last token of the answer: see `latency_limit.py`."""
    questions_per_video: int | None = None
    """Questions that follow each other on one video, timed with and without reuse: see `questions_per_video.py`."""
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    seed: int = 0
    out: Path = Path("runs")
    data_root: Path | None = None
    allow_partial: bool = False
    offline: bool = False
    fresh: bool = False
    baseline: bool = True
    trivial: bool = False
    """Also ask the trivial methods at every method's own budget, which is known once it has run: see `rivals.py`."""
    strict: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value outside its range."""
        for option in ("limit", "frames", "max_pixels", "min_pixels", "max_new_tokens", "repeats", "timed", "threads"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UsageError(f"--{option.replace('_', '-')} must be at least 1, not {value}.")
        for option in ("warmup", "seed"):
            if getattr(self, option) < 0:
                raise UsageError(f"--{option} must be at least 0, not {getattr(self, option)}.")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise UsageError(f"--fps must be above 0 and at most 1000, not {self.fps}.")
        if self.sampler == "fps" and self.fps is None:
            raise UsageError("--sampler fps needs a rate; give --fps.")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UsageError(
                f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}; make it smaller."
            )
        if self.latency_limit is not None:
            if not 0 < self.latency_limit < float("inf"):
                raise UsageError(f"--latency-limit must be above 0 seconds, not {self.latency_limit:g}.")
            if self.mode != "all":
                raise UsageError(f"--latency-limit times and scores by itself; leave --mode {self.mode} out.")
            if self.fps is not None or self.sampler == "fps":
                raise UsageError("--latency-limit chooses the number of frames; leave --fps out.")
        if self.questions_per_video is not None:
            if self.questions_per_video < 2:
                raise UsageError(f"--questions-per-video must be at least 2, not {self.questions_per_video}.")
            if self.latency_limit is not None:
                raise UsageError("--questions-per-video and --latency-limit are two measurements; give one of them.")
            if self.mode in ("accuracy", "memory"):
                raise UsageError(f"--questions-per-video measures time alone; leave --mode {self.mode} out.")
        if self.trivial:
            if not self.baseline:
                raise UsageError("--trivial takes budgets as shares of full attention's; leave --no-baseline out.")
            if self.latency_limit or self.questions_per_video or "accuracy" not in self.passes:
                raise UsageError(
                    "--trivial compares accuracy at equal budget; give --mode accuracy or all alone with it."
                )
        _one_of("mode", self.mode, MODES)
        _one_of("attention", self.attention, ATTENTION)
        if self.dtype is not None:
            _one_of("dtype", self.dtype, DTYPES)

    @property
    def passes(self) -> tuple[str, ...]:
        return MODES[:3] if self.mode == "all" else (self.mode,)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"--{option} must be one of {', '.join(known)}, not {value!r}.{nearest(value, known)}")
