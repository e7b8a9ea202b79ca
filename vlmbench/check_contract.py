"""`vlmbench check contract`: what every method promises on every model, tried on the user's own weights.

The same promises that the shared tests hold small random models to, on one prompt of noise: whether a method works here
is known in a minute, before a night is spent on answers. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vlmbench.check_promises import PROMISES, Broken, Skipped, Subject
from vlmbench.engine import TorchBackend
from vlmbench.errors import UsageError
from vlmbench.machine import load_backend
from vlmbench.plain import cell
from vlmbench.request import RunRequest
from vlmbench.session import make_methods, make_suite


class Check(NamedTuple):
    """One promise and what became of it."""

    name: str
    ok: bool | None
    """None: it does not apply."""
    detail: str


def check(subject: Subject) -> Iterator[Check]:
    """Every promise in turn; a fault in one ends that one alone."""
    for name, promise in PROMISES.items():
        try:
            yield Check(name, True, promise(subject) or "")
        except Skipped as reason:
            yield Check(name, None, str(reason))
        except Broken as broken:
            yield Check(name, False, str(broken))
        except Exception as error:
            yield Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def run(request: RunRequest, frames: int) -> list[Check]:
    """Load what is asked for and try every promise. Raises `UsageError`."""
    if len(request.methods) != 1:
        raise UsageError(f"check contract takes one --method, not {len(request.methods)}.")
    (method,), (full,) = make_methods(request.methods), make_methods(("full",))
    if not method.traits.uses_model:
        raise UsageError(f"{method.name} never calls the model; name a method that does.")
    suite = make_suite(request.suite)
    backend = load_backend(request, request.model or suite.default_model)
    if not isinstance(backend, TorchBackend):
        raise UsageError("The stand-in dummy has no model to check; name a real one with --model.")
    method.check(backend.adapter)
    method.check_weights(backend.identity)
    method.fit(suite)
    return list(check(Subject(backend.adapter, method, full, frames)))


def to_markdown(checks: Sequence[Check]) -> str:
    marks = {True: "ok", False: "**broken**", None: "does not apply"}
    lines = ["| promise | | |", "| --- | --- | --- |"]
    lines += [f"| {each.name} | {marks[each.ok]} | {cell(each.detail)} |" for each in checks]
    return "\n".join(lines) + "\n"
