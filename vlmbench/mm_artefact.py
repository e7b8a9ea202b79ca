"""What ``vlmbench fit --method mminference`` writes: a pattern for every query head of one model, as JSON of schema 1.

Sizes are as published, for prompts of `mm_patterns.REFERENCE` tokens; strides are ``frame``, ``row`` or ``auto`` and never
numbers, since another video's frames have another number of tokens. The digest covers everything but when and by what it was
made, and takes the path's place in a run's hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmbench.artefact import ORIGIN, cache_folder, candidates, fit_line, refuse_weights
from vlmbench.errors import UsageError
from vlmbench.files import write_json
from vlmbench.mm_patterns import Head
from vlmbench.spec import slug

if TYPE_CHECKING:
    from vlmbench.backend import Identity

SCHEMA = 1
METHOD = "mminference"
AUTO = "auto"
"""``artefact=auto``: the file for the loaded weights, shipped or in the user's cache."""
Table = tuple[tuple[Head, ...], ...]
"""Layer -> query head -> what it does."""


@dataclass(frozen=True)
class HeadPatterns:
    """The content of the file."""

    layers: Table
    text_only: Table
    """For prompts without a picture, where grids have nothing to hold on to."""
    model: str
    revision: str | None
    weights_hash: str
    suite: str
    suite_version: str
    data_hash: str
    sampler: str
    frames: int | None
    units: int
    tokens: int
    budget: float
    """Of the search: every candidate costs what A-shape with this much of its published sizes costs."""
    pairs_relative: float
    """That cost, measured, over full attention's."""
    candidates: Sequence[Mapping[str, Any]]
    """Each with its mean cost, its mean recall on the attention output, and how many heads took it."""
    recall: Sequence[float]
    """Of each layer: mean recall of its heads' choices on the attention output, 1 for full attention."""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    device: Mapping[str, Any] = field(default_factory=dict)
    method: str = METHOD

    def to_json(self) -> dict[str, Any]:
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name in ("layers", "text_only"):
            fields[name] = [{"heads": [head.to_json() for head in layer]} for layer in fields[name]]
        return {"schema": SCHEMA, **fields}

    @property
    def digest(self) -> str:
        """Ten hex digits over everything but when, by what and on which machine it was made."""
        content = {key: value for key, value in self.to_json().items() if key not in ORIGIN}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def write(self, path: Path) -> None:
        """Raises `OSError`."""
        write_json(path, self.to_json())

    def check_weights(self, path: str, identity: Identity) -> None:
        """Raise `UsageError` when it was fitted for other weights than those that are loaded."""
        refuse_weights(self, path, identity)

    def to_text(self, out: Path) -> str:
        """What the search measured, and how to use the file."""
        kinds = Counter(head.vision.kind for layer in self.layers for head in layer)
        chosen = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines = ["| pattern | pairs of full | recall of the output | heads |", "| --- | ---: | ---: | ---: |"]
        for row in self.candidates:
            lines.append(f"| {row['name']} | {row['pairs_relative']:.3f} | {row['recall']:.3f} | {row['heads']} |")
        return "\n".join(
            [
                *lines,
                "",
                f"{chosen} heads, at {self.pairs_relative:.3f} of full attention's pairs on a prompt of {self.tokens} tokens "
                f"({self.suite}); mean recall {sum(self.recall) / len(self.recall):.3f}. The search took {self.seconds:.1f} s. "
                f"Written to {out}; use it with `--method {METHOD}:artefact={out}`.",
            ]
        )


def read(path: str) -> HeadPatterns:
    """Raises `UsageError` when the file is missing, damaged, of another schema or of another method."""
    line, where = fit_line(METHOD, path), f"{METHOD}:artefact={path}"
    if Path(path).is_dir():  # an empty name too
        raise UsageError(f"{where} must name a file that vlmbench fit wrote, or {AUTO}, not a folder.")
    try:
        data = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{where} does not exist; make it with `{line}`.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{where} cannot be read ({error}); make it again with `{line}`.") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UsageError(f"{where} is no artefact of schema {SCHEMA}; make one with `{line}`.")
    if data.get("method") != METHOD:
        raise UsageError(f"{where} was fitted for {data.get('method')}; make one with `{line}`.")
    try:
        return _parsed(data)
    except ValueError as error:
        raise UsageError(f"{where} is damaged ({error}); make it again with `{line}`.") from None


def find(identity: Identity) -> tuple[HeadPatterns, Path]:
    """The shipped file for the loaded weights, or else the one in the user's cache.

    Raises `UsageError` when there is none, or when several in one folder fit and say different things.
    """
    found: dict[Path, dict[str, tuple[HeadPatterns, Path]]] = {}
    for path in candidates(f"{METHOD}-*.json"):
        try:
            each = read(str(path))
        except UsageError:
            continue  # somebody's broken file in the cache is no reason to stop
        if each.weights_hash == identity.weights_hash:
            found.setdefault(path.parent, {}).setdefault(each.digest, (each, path))
    if not found:
        out = cache_folder() / f"{METHOD}-{slug(identity.model)}.json"
        raise UsageError(
            f"{METHOD}:artefact={AUTO} finds no file for {identity.model} with weights {identity.weights_hash[:10]}; make one "
            f"with `{fit_line(METHOD, str(out), model=identity.model)}`."
        )
    first = next(iter(found.values()))
    if len(first) > 1:
        raise UsageError(
            f"{METHOD}:artefact={AUTO} finds {len(first)} files for {identity.model}: "
            f"{', '.join(str(path) for _, path in first.values())}; name the one that you mean."
        )
    return next(iter(first.values()))


_STRINGS = ("model", "weights_hash", "suite", "suite_version", "data_hash", "sampler")


def _parsed(data: Mapping[str, Any]) -> HeadPatterns:
    """Raises `ValueError` with what is wrong."""
    known = {each.name for each in dataclasses.fields(HeadPatterns)}
    if lacking := sorted(known - data.keys()):
        raise ValueError(f"it lacks {lacking[0]}")
    if unknown := sorted(data.keys() - known - {"schema"}):
        raise ValueError(f"it has an unknown key {unknown[0]}")
    for key in _STRINGS:
        if not isinstance(data[key], str):
            raise ValueError(f"{key} is {data[key]!r}")
    tables = {name: _table(data[name], name) for name in ("layers", "text_only")}
    if [len(layer) for layer in tables["layers"]] != [len(layer) for layer in tables["text_only"]]:
        raise ValueError("layers and text_only are of different shapes")
    return HeadPatterns(**{**{key: data[key] for key in known}, **tables})


def _table(data: Any, name: str) -> Table:
    if not isinstance(data, list) or not data:
        raise ValueError(f"{name} is {data!r}")
    found = []
    for number, layer in enumerate(data):
        heads = layer.get("heads") if isinstance(layer, dict) else None
        if not isinstance(heads, list) or not heads:
            raise ValueError(f"{name} {number} has no heads")
        try:
            found.append(tuple(Head.from_json(head) for head in heads))
        except ValueError as error:
            raise ValueError(f"{name} {number}: {error}") from None
    return tuple(found)
