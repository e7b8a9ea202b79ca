"""The one grammar of names with parameters, and the two specifications of a run.

A spec is ``name[:key=value[,key=value…]]``: the first ``:`` splits, values may be quoted, lists use ``/``, and ``+`` joins
whole method specs. `AnswerSpec` holds everything that can change an answer, and its hash names the result folder;
`MeasureSpec` holds how something was measured, and is only recorded.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vlmbench.composed import Composed
from vlmbench.errors import UsageError

T = TypeVar("T")

LATER: Mapping[str, bool] = {"later": True}
"""``field(default=None, metadata=LATER)``: a parameter that came after runs were stored. While it is None it is in no hash,
so those runs stay the ones that it leaves as they are."""


@dataclass(frozen=True)
class Spec:
    """A parsed ``name:key=value,…``; values are still text."""

    name: str
    params: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.params:
            return self.name
        return f"{self.name}:{','.join(f'{key}={_quote(value)}' for key, value in self.params.items())}"


def parse(text: str, bare: str | None = None) -> Spec:
    """Parse one spec. Raises `UsageError` on an empty name, a part without ``=``, or a key given twice.

    The first part may be without ``=`` where `bare` names the key that it is the value of: ``folder:PATH``.
    """
    name, _, rest = text.strip().partition(":")
    if not name:
        raise UsageError(f"{text!r} has no name; write name or name:key=value,key=value.")
    params: dict[str, str] = {}
    for number, part in enumerate(filter(str.strip, _split(rest, ","))):
        if bare and number == 0 and ("=" not in part or part.strip()[0] in "'\""):
            params[bare] = _unquote(part.strip())
            continue
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{part!r} in {text!r} is not key=value; write name:key=value,key=value.")
        if key in params:
            raise UsageError(f"{key!r} is given twice in {text!r}; give it once.")
        params[key] = _unquote(value.strip())
    return Spec(name, params)


def joined(method: str, params: str) -> str:
    """The spec that names a stored method again: `params` are its ``key=value,…``.

    Methods joined with ``+`` are stored under their names (``turbo+pevlm``), each key under its method's (``turbo.r=8``).
    """
    if "+" not in method:
        return f"{method}:{params}" if params else method
    own: dict[str, dict[str, str]] = {name: {} for name in method.split("+")}
    for key, value in parse(f"m:{params}").params.items():
        name, _, short = key.rpartition(".")
        own[name][short] = value
    return "+".join(str(Spec(name, each)) for name, each in own.items())


def parse_chain(text: str) -> tuple[Spec, ...]:
    """Parse method specs joined by ``+``, in the order in which they apply. Raises `UsageError` when one of them is missing."""
    parts = _split(text, "+")
    if len(parts) > 1 and not all(map(str.strip, parts)):
        raise UsageError(f"{text!r} lacks a method beside a +; write name+name.")
    return tuple(map(parse, parts))


def slug(text: str) -> str:
    """A folder name for a spec: lower-case letters, digits, ``.``, ``_``, ``-`` and ``=`` survive, all else becomes ``-``."""
    return re.sub(r"[^a-z0-9._=-]+", "-", text.lower()).strip("-.") or "unnamed"


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` when something known is near, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def build(cls: type[T], spec: Spec, what: str) -> T:
    """Make the dataclass `cls` from the text parameters of `spec`, each converted by its field's type.

    Raises `UsageError` for an unknown key (with the nearest one), a value of the wrong type, and whatever range the
    class itself checks in ``__post_init__``.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, text in spec.params.items():
        if key not in fields:
            keys = ", ".join(fields) or "none"
            bare = getattr(cls, "bare", None)  # what may stand alone behind the colon, a path mostly
            quotes = f" Put the {bare} in quotes where it holds a comma." if bare else ""
            raise UsageError(
                f"{what} {spec.name!r} has no key {key!r} (its keys: {keys}).{nearest(key, fields)}{quotes}"
            )
        values[key] = _convert(text, hints[key], f"{spec.name}:{key}")
    return cls(**values)


def params_of(instance: Any) -> dict[str, Any]:
    """Every parameter of a method or suite as resolved, defaults included (but see `LATER`), ready for JSON.

    Of methods joined with ``+`` each one's under its name: ``turbo.r``.
    """
    if isinstance(instance, Composed):
        return {f"{part.name}.{key}": value for part in instance.parts for key, value in params_of(part).items()}
    found = {f: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}
    return {f.name: value for f, value in found.items() if value is not None or not f.metadata.get("later")}


@dataclass(frozen=True)
class AnswerSpec:
    """Everything that can change an answer, and nothing else."""

    model: str
    revision: str | None
    """Hub revision; None for local, shipped and random weights."""
    weights_hash: str
    method: str
    method_params: Mapping[str, Any]
    """Resolved, defaults included."""
    suite: str
    suite_version: str
    suite_params: Mapping[str, Any]
    prompt_style: str
    frames: int | None
    """Frames asked for; None means the suite's own number."""
    sampler: str
    fps: float | None
    max_pixels: int | None
    min_pixels: int | None
    decoder: str
    attention: str
    dtype: str
    device_type: str
    max_new_tokens: int
    seed: int

    @property
    def hash(self) -> str:
        """Ten hex digits over the canonical JSON of all fields."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """``suite/model/method-hash`` below the results directory."""
        suite = slug(str(Spec(self.suite, {k: str(v) for k, v in self.suite_params.items() if v is not None})))
        return f"{suite}/{slug(self.model)}/{slug(self.method)}-{self.hash}"


@dataclass(frozen=True)
class MeasureSpec:
    """How something was measured: recorded beside the results, never hashed."""

    mode: str
    warmup: int
    repeats: int
    threads: int
    device_name: str


def _split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside quotes."""
    parts, quote, current = [], "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == separator:
            parts.append(current)
            current = ""
            continue
        current += char
    if quote:
        raise UsageError(f"{text!r} has an opening quote {quote} that is never closed.")
    return [*parts, current]


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def _quote(text: str) -> str:
    return f'"{text}"' if any(char in text for char in ",+") else text


def _convert(text: str, hint: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        if text not in options:
            raise UsageError(f"{where} must be one of {', '.join(options)}, not {text!r}.{nearest(text, options)}")
        return text
    if typing.get_origin(hint) is tuple:
        return tuple(_convert(part, options[0], where) for part in text.split("/") if part)
    plain = [option for option in options if option is not type(None)]
    if len(plain) == 1 and len(options) == 2:  # Optional[X]
        return None if text.lower() == "none" else _convert(text, plain[0], where)
    if hint is bool:
        if text.lower() not in ("true", "false", "on", "off", "1", "0"):
            raise UsageError(f"{where} must be on or off, not {text!r}.")
        return text.lower() in ("true", "on", "1")
    if hint in (int, float):
        try:
            value = hint(text)
            if hint is int and abs(value) >= 2**63:  # a tensor cannot hold it, and says so in its own words
                raise UsageError(f"{where} must lie between -2**63 and 2**63, not {text!r}.")
            if math.isfinite(value):  # a NaN passes every check of a range, and infinity times 0 is one
                return value
        except (ValueError, OverflowError):
            pass
        raise UsageError(f"{where} must be {'a whole' if hint is int else 'a finite'} number, not {text!r}.")
    return text
