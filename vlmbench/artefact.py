"""What `vlmbench fit` writes and a method's ``artefact=`` reads: parameters chosen for one model, and what they rest on.

One JSON file of schema 1. Its digest covers everything that was chosen and measured, but not when or by which versions:
it is part of a run's hash in place of the file's path, so that a file may be moved and not be changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmbench.errors import UsageError
from vlmbench.files import write_json

if TYPE_CHECKING:
    from vlmbench.backend import Identity

SCHEMA = 1
ORIGIN = ("seconds", "versions", "commit", "dirty", "device")
"""Of the machine and the moment, not of the result: left out of the digest."""


SHIPPED = Path(__file__).parent / "reference" / "artefacts"


class Fitted(Protocol):
    """What `Method.search` returns: `Artefact`, or a file of a method's own with trained weights."""

    def write(self, path: Path) -> None:
        """Replace the file atomically. Raises `OSError`."""

    def to_text(self, out: Path) -> str:
        """What was found, for people, and how to use the file `out`."""


@dataclass(frozen=True)
class Artefact:
    """The content of the file; every field is one key of it."""

    method: str
    parameters: Mapping[str, Any]
    """All of the method's, the chosen ones among them."""
    chosen: Sequence[str]
    """Keys of `parameters` that fitting chose; the others were given."""
    model: str
    revision: str | None
    weights_hash: str
    suite: str
    suite_version: str
    data_hash: str
    sampler: str
    frames: int | None
    """Frames a video that were asked for; None for all of them."""
    units: int
    """Temporal units of the first video's prompt."""
    tokens: int
    """Tokens of that prompt."""
    n: int
    """Train questions that full attention answered."""
    n_videos: int
    max_loss: float
    full: Mapping[str, Any]
    """Full attention's own accuracy on the same questions."""
    grid: Sequence[Mapping[str, Any]]
    """Every setting that was measured, in order of cost; the last is the chosen one."""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    device: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Ten hex digits over everything but `ORIGIN`."""
        content = {key: value for key, value in dataclasses.asdict(self).items() if key not in ORIGIN}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def write(self, path: Path) -> None:
        """Raises `OSError`."""
        write_json(path, {"schema": SCHEMA, **dataclasses.asdict(self)})

    def check_weights(self, path: str, identity: Identity) -> None:
        """Raise `UsageError` when it was fitted for other weights than those that are loaded."""
        refuse_weights(self, path, identity)

    def to_text(self, out: Path) -> str:
        """The measured grid for people, and how to use what was chosen."""
        lines = [
            f"| {' | '.join(self.chosen)} | pairs of full | same answer | accuracy | against full |",
            "| ---: |" + " ---: |" * (len(self.chosen) + 3),
        ]
        for row in self.grid:
            cells = [str(row[key]) for key in self.chosen] + [f"{row['pairs_relative']:.3f}"]
            forms = {"agreement": ".2f", "accuracy": ".2f", "accuracy_delta": "+z.2f"}
            cells += [f"{row[k]:{f}} [{row[f'{k}_low']:{f}}, {row[f'{k}_high']:{f}}]" for k, f in forms.items()]
            lines.append(f"| {' | '.join(cells)} |")
        picked = ",".join(f"{key}={self.parameters[key]}" for key in self.chosen)
        return "\n".join(
            [
                *lines,
                "",
                f"{self.method}:{picked} is the cheapest with a loss of agreement of at most {self.max_loss:g} on "
                f"{self.n} train questions about {self.n_videos} videos ({self.suite}, {self.units} temporal units; full "
                f"attention: {self.full['accuracy']:.2f}). It was chosen by its point estimate, so expect a little less on "
                f"test questions. Written to {out}; use it with `--method {self.method}:artefact={out}`.",
            ]
        )


class _Bound(Protocol):
    """A file that is of one model."""

    @property
    def method(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def suite(self) -> str: ...


def refuse_weights(found: _Bound, path: str, identity: Identity) -> None:
    """Raise `UsageError` when it was fitted for other weights than those that are loaded."""
    if found.weights_hash != identity.weights_hash:
        line = fit_line(found.method, path, model=identity.model, suite=found.suite)
        raise UsageError(
            f"{path} was fitted for {found.model} with weights {found.weights_hash[:10]}, not for {identity.model} with "
            f"weights {identity.weights_hash[:10]}; make one for it with `{line}`."
        )


def cache_folder() -> Path:
    """Where a user's own files are found without ``artefact=``."""
    from vlmbench.suites._synth.files import cache_root

    return cache_root() / "artefacts"


def candidates(pattern: str) -> list[Path]:
    """Files that may fit a model when none is named: those that are shipped, then those in the user's cache."""
    return [path for folder in (SHIPPED, cache_folder()) for path in sorted(folder.glob(pattern))]


def read(path: str, method: str) -> Artefact:
    """Raises `UsageError` when the file is missing, damaged, of another schema or of another method."""
    line = fit_line(method, path)
    try:
        data = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{method}:artefact={path} does not exist; make it with `{line}`.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{method}:artefact={path} cannot be read ({error}); make it again with `{line}`.") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UsageError(f"{method}:artefact={path} is no artefact of schema {SCHEMA}; make one with `{line}`.")
    if wrong := _wrong(data):
        raise UsageError(f"{method}:artefact={path} is damaged ({wrong}); make it again with `{line}`.")
    del data["schema"]
    found = Artefact(**data)
    if found.method != method:
        raise UsageError(f"{method}:artefact={path} was fitted for {found.method}; make one with `{line}`.")
    return found


def fit_line(method: str, path: str, model: str = "MODEL", suite: str = "SUITE") -> str:
    """The command that makes the file; a word in capitals is for the user to fill in."""
    return f"vlmbench fit --model {model} --method {method} --suite {suite} --out {path}"


_KINDS = {
    **dict.fromkeys(("method", "model", "weights_hash", "suite", "suite_version", "data_hash", "sampler"), str),
    **dict.fromkeys(("parameters", "full", "versions", "device"), dict),
    **dict.fromkeys(("chosen", "grid"), list),
    **dict.fromkeys(("units", "tokens", "n", "n_videos"), int),
}


def _wrong(data: Mapping[str, Any]) -> str:
    """What is wrong with the keys, or an empty string."""
    known = {each.name for each in dataclasses.fields(Artefact)} | {"schema"}
    if lacking := sorted(known - data.keys()):
        return f"it lacks {lacking[0]}"
    if unknown := sorted(data.keys() - known):
        return f"it has an unknown key {unknown[0]}"
    for key, kind in _KINDS.items():
        if not isinstance(data[key], kind):
            return f"{key} is {data[key]!r}"
    if strange := [key for key in data["chosen"] if key not in data["parameters"]]:
        return f"{strange[0]} was chosen but is no parameter"
    return ""
