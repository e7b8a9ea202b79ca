"""What is written about a run and about each sample: typed, with the unit in the field name, ready for JSON lines."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, NamedTuple, cast

from vlmbench.skim import skimmed

SCHEMA = 1

Pass = Literal["accuracy", "latency", "memory"]
Status = Literal["ok", "parse_fail", "oom", "decode_error", "timeout", "error"]
FINISHED: tuple[Status, ...] = ("ok", "parse_fail")
"""Statuses of samples that ran to the end; `parse_fail` ran to the end and is wrong."""


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one sample. Spans are contiguous; what is left over is `other_s`."""

    video_s: float = 0.0
    """Decoding the video on the host (or reading it from the frame cache)."""
    preprocess_s: float = 0.0
    """Resizing, normalising, tokenising: the processor."""
    transfer_s: float = 0.0
    """Inputs to the device."""
    vision_s: float = 0.0
    prepare_s: float = 0.0
    """Splicing features into the prompt, and the method's own work between vision and prefill."""
    prefill_s: float = 0.0
    """From the prepared prompt to the first token id on the host."""
    decode_s: tuple[float, ...] = ()
    """One entry per token after the first."""
    other_s: float = 0.0
    ttft_s: float = 0.0
    """From inputs on the device to the first token id on the host."""
    e2e_s: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes. On CUDA from the allocator, on CPU from live tensor storages."""

    peak_bytes: int = 0
    """Weights included."""
    peak_extra_bytes: int = 0
    """Above what was live before the sample."""
    kv_bytes: int = 0
    """Keys and values in use when the answer is done."""
    kv_reserved_bytes: int = 0
    process_peak_bytes: int = 0
    """High-water mark of the process (never falls)."""
    stages: dict[str, int] = field(default_factory=dict)
    """Stage name -> peak bytes in that stage."""


@dataclass(frozen=True)
class Frame:
    index: int
    """Index in the container's decoding order."""
    time_s: float


UNREAD = Frame(-1, -1.0)
"""Stands for a frame that was counted and not read."""


@dataclass
class SampleRecord:
    """One line of ``samples.jsonl``, keyed by (id, pass)."""

    id: str
    pass_: Pass
    cluster: str
    status: Status
    template: str = ""
    """The question's template; `prior` and the break-down by type use it."""
    strata: dict[str, str] = field(default_factory=dict)
    """For example {"length": "32", "type": "colour"}."""
    prediction: str | None = None
    answer: str = ""
    raw_text: str = ""
    output_ids: list[int] = field(default_factory=list)
    first_token: Mapping[str, Any] | None = None
    """{"ids": [64], "logprobs": [64], "tail": logprob of all the rest}."""
    score: float = 0.0
    timing: Timing | None = None
    rounds: list[Timing] = field(default_factory=list)
    """Latency pass: every round; `timing` holds their medians."""
    baseline_rounds: list[Timing] = field(default_factory=list)
    """Latency pass: full attention with the best dense kernel, interleaved with `rounds` one to one."""
    same_kernel_rounds: list[Timing] = field(default_factory=list)
    """Latency pass: full attention with the method's own kernel, when that is not the best one."""
    memory: Memory | None = None
    work: dict[str, Any] | None = None
    trace: dict[str, Any] | None = None
    applied: bool = True
    reason: str = ""
    frames: list[Frame] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """(height, width) of the decoded frames in pixels."""
    tokens: dict[str, int] = field(default_factory=dict)
    """{"prompt": …, "visual": …} after the method's `prepare`."""
    attempts: int = 1
    session: str = ""
    """Names the process that wrote it; latency rounds pair only inside one session."""
    error: str = ""

    def to_line(self) -> str:
        """One JSON line; its last member ``crc`` is the CRC-32 of all bytes before ``,"crc":``."""
        data = _plain(dataclasses.asdict(self))
        head = {"schema": SCHEMA, "id": data.pop("id"), "pass": data.pop("pass_"), "status": data.pop("status")}
        body = json.dumps({**head, **data}, separators=(",", ":"), allow_nan=False)[:-1]
        return f'{body},"crc":{zlib.crc32(body.encode())}}}\n'

    @classmethod
    def from_line(cls, line: str | bytes, *, skim: bool = False) -> SampleRecord:
        """Parse one line. Raises `ValueError` when it is torn, its checksum fails, another version wrote it, or it holds NaN.

        With `skim`, which is for tables over many thousand lines that were verified before, frames are counted and not
        read (each is `UNREAD`), the lists that `work` has for each layer are left empty, and the first token is a
        `StoredToken`: that takes a third of the time.
        """
        line = line.encode() if isinstance(line, str) else line
        token, n_frames = None, 0
        if skim:
            line, token, n_frames = skimmed(line)
        else:
            peek(line)
        data = _DECODER.decode(line.decode())
        del data["crc"], data["schema"]
        if token is not None:
            data["first_token"] = token
        if type(data.get("score", 0.0)) not in (int, float):
            raise ValueError(f"its score is {data['score']!r}, not a number")
        try:
            data["pass_"] = data.pop("pass")
            data["timing"] = _timing(data["timing"]) if data["timing"] else None
            for name in ("rounds", "baseline_rounds", "same_kernel_rounds"):
                data[name] = [_timing(each) for each in data[name]]
            data["memory"] = Memory(**data["memory"]) if data["memory"] else None
            data["frames"] = [UNREAD] * n_frames if n_frames else [Frame(**each) for each in data["frames"]]
            data["size"] = tuple(data["size"]) if data["size"] else None
            return cls(*_IN_ORDER(data)) if len(data) == len(_FIELDS) else cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"record written by another version of vlmbench ({error})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is not a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_FIELDS = tuple(each.name for each in dataclasses.fields(SampleRecord))
_IN_ORDER = itemgetter(*_FIELDS)
"""Values in order are taken in a tenth of the time of names that JSON made."""


class Key(NamedTuple):
    """What the store needs to know of a line before anybody reads the rest of it."""

    id: str
    pass_: Pass
    status: Status


_HEAD = re.compile(rb'\{"schema":(\d+),"id":("(?:[^"\\]|\\.)*"),"pass":"(\w+)","status":"(\w+)",')


def peek(line: bytes) -> Key:
    """Verify a line's checksum and read its key without parsing the rest, which is what makes a large store open fast.

    Raises `ValueError` when the line is torn, damaged, or of another schema.
    """
    body, comma, crc = line.rpartition(b',"crc":')
    if not comma or crc.rstrip() != b"%d}" % zlib.crc32(body):
        raise ValueError("checksum mismatch")
    head = _HEAD.match(body)
    if not head or int(head[1]) != SCHEMA:
        raise ValueError("record written by another version of vlmbench")
    id_ = json.loads(head[2]) if b"\\" in head[2] else head[2][1:-1].decode()
    return Key(id_, cast(Pass, head[3].decode()), cast(Status, head[4].decode()))


def _timing(data: dict[str, Any]) -> Timing:
    return Timing(**{**data, "decode_s": tuple(data["decode_s"])})


def _plain(value: Any) -> Any:
    """Floats keep seven significant digits: below that is noise, and lines stay short. NaN becomes null, as in JSON."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
