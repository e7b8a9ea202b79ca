"""Which frames of a video are looked at: four rules are in use elsewhere, and they give different scores."""

from __future__ import annotations

from collections.abc import Callable


def _endpoints(total: int, n: int) -> list[int]:
    # Rounded down from the float product, so that the frames are those of numpy.linspace(0, total - 1, n, dtype=int).
    step = (total - 1) / max(1, n - 1)
    return [*(int(i * step) for i in range(n - 1)), total - 1] if n > 1 else [0]


def _interior(total: int, n: int) -> list[int]:
    return [min(total - 1, int((i + 1) * total / (n + 1))) for i in range(n)]


def _midpoints(total: int, n: int) -> list[int]:
    return [int((i + 0.5) * total / n) for i in range(n)]


def _stride(total: int, n: int) -> list[int]:
    return [i * (total // n) for i in range(n)]


SAMPLERS: dict[str, Callable[[int, int], list[int]]] = {
    "endpoints": _endpoints,  # lmms-eval: linspace with both ends
    "interior": _interior,  # VLMEvalKit: i · N / (n + 1)
    "midpoints": _midpoints,  # MLVU: middles of n equal segments
    "stride": _stride,  # LongVideoBench: every int(N / n)-th from the start
    "fps": _stride,  # one frame every 1 / fps seconds; the positions come from `sample_indices`
}


def sample_indices(
    rule: str, total: int, n: int | None, *, video_fps: float = 1.0, fps: float | None = None
) -> list[int]:
    """Sorted frame indices of a video of `total` frames, without repeats.

    `n` is how many at most; None means all. `fps` lowers it to what that rate gives over the video's duration; under the
    rule ``fps`` the frames stand exactly 1 / fps seconds apart instead of being spread. Raises `ValueError` when there is
    no frame, or the rule ``fps`` has no rate.
    """
    if total < 1:
        raise ValueError("the video has no frames")
    if rule == "fps":
        if fps is None:
            raise ValueError("the sampler fps needs a rate; give --fps")
        step = max(1.0, video_fps / fps)
        found = [int(i * step) for i in range(int((total - 1) / step) + 1)]
        return found[:n] if n is not None else found
    wanted = total if n is None else min(n, total)
    if fps is not None:
        wanted = min(wanted, max(1, int(total / video_fps * fps)))
    return sorted(set(SAMPLERS[rule](total, wanted)))
