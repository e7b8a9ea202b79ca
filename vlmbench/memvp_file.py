"""What ``vlmbench fit --method memvp`` writes: trained tensors in a safetensors file, and a header that says what they are of.

The header is JSON under the one metadata key ``vlmbench``. As with other artefacts its digest covers what was trained, on
what and how, but not when or by which versions, and takes the path's place in the hash of a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmbench.artefact import ORIGIN, candidates, fit_line, refuse_weights
from vlmbench.errors import UsageError
from vlmbench.loaded import texts
from vlmbench.memvp_memory import MemoryShape, VisualMemory
from vlmbench.spec import params_of, parse

if TYPE_CHECKING:
    from vlmbench.backend import Identity
    from vlmbench.suite import Suite

SCHEMA = 1
KEY = "vlmbench"
METHOD = "memvp"


@dataclass(frozen=True)
class Trained:
    """The file: every field but `tensors` is one key of its header."""

    shape: MemoryShape
    scale: float
    """s."""
    weight: float
    """λ."""
    model: str
    revision: str | None
    weights_hash: str
    suite: str
    suite_version: str
    data_hash: str
    """Of the suite's code and of every question and answer that was trained on."""
    sampler: str
    frames: int | None
    recipe: Mapping[str, Any]
    """Steps, batch, learning rate, seed and all else that decided the weights."""
    curve: Sequence[Mapping[str, Any]]
    """Loss of training and share of held-out questions answered, step by step."""
    n: int
    """Questions trained on."""
    n_held_out: int
    parameters: int
    """Trained numbers."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    device: Mapping[str, Any] = field(default_factory=dict)
    method: str = METHOD

    @property
    def header(self) -> dict[str, Any]:
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "tensors"}
        fields["shape"] = dataclasses.asdict(self.shape)
        return {"schema": SCHEMA, **fields, "tensors_sha256": _hash(self.tensors)}

    @property
    def digest(self) -> str:
        """Ten hex digits over everything but when, by what and on which machine it was made."""
        content = {key: value for key, value in self.header.items() if key not in ORIGIN}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def memory(self) -> VisualMemory:
        """The module in evaluation mode, with gradients off."""
        with torch.device("meta"):
            made = VisualMemory(self.shape, scale=self.scale, weight=self.weight)
        made.load_state_dict(dict(self.tensors), assign=True)
        return made.eval().requires_grad_(False)

    def begin(self, memory: VisualMemory, path: str) -> None:
        """Put f, p^k and p^v into a memory of these sizes; its codes of frames stay. Raises `UsageError`."""
        for name in ("size", "hidden", "slots"):
            wanted, found = getattr(memory.shape, name), getattr(self.shape, name)
            if wanted != found:
                raise UsageError(
                    f"{METHOD}:start={path} has {name}={found}, and what is to be trained {wanted}; name another."
                )
        own = {name: tensor for name, tensor in self.tensors.items() if name.startswith(("projector.", "p_"))}
        memory.load_state_dict(own, strict=False)

    def write(self, path: Path) -> None:
        """Replace the file atomically. Raises `OSError`."""
        part = path.with_suffix(f".{os.getpid()}.part")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            save_file(tensors, part, metadata={KEY: json.dumps(self.header)})
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def to_text(self, out: Path) -> str:
        """The curve for people, and how to use the file."""
        lines = ["| step | loss | held-out questions answered |", "| ---: | ---: | ---: |"]
        for row in self.curve:
            answered = "—" if row["held_out"] is None else f"{row['held_out']:.3f}"
            lines.append(f"| {row['step']} | {row['loss']:.4f} | {answered} |")
        return "\n".join(
            [
                *lines,
                "",
                f"memvp has {self.parameters:,} trained parameters, from {self.n} train questions of {self.suite} in "
                f"{self.seconds:.0f} s. Written to {out}; use it with `--method memvp:artefact={out}`.",
            ]
        )

    def check_weights(self, path: str, identity: Identity) -> None:
        """Raise `UsageError` when it was trained beside other weights than those that are loaded."""
        refuse_weights(self, path, identity)


def read(path: str) -> Trained:
    """Raises `UsageError` when the file is missing, damaged, of another schema or of another method."""
    line = fit_line(METHOD, path)
    if not Path(path).is_file():
        raise UsageError(f"{METHOD}:artefact={path} does not exist; make it with `{line}`.")
    try:
        header = _header(Path(path))
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{METHOD}:artefact={path} cannot be read ({error}); make it again with `{line}`.") from None
    if header.get("schema") != SCHEMA:
        raise UsageError(f"{METHOD}:artefact={path} is no adapter of schema {SCHEMA}; make one with `{line}`.")
    if header.get("method") != METHOD:
        raise UsageError(
            f"{METHOD}:artefact={path} was fitted for {header.get('method')}; make one for {METHOD} with `{line}`."
        )
    del header["schema"]
    try:
        expected = header.pop("tensors_sha256")
        found = Trained(**{**header, "shape": MemoryShape(**header["shape"]), "tensors": tensors})
        found.memory()
    except (KeyError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"{METHOD}:artefact={path} is damaged ({said}); make it again with `{line}`.") from None
    if _hash(tensors) != expected:
        raise UsageError(f"{METHOD}:artefact={path} is damaged (its tensors are others); make it again with `{line}`.")
    return found


def find(weights_hash: str, suite: Suite) -> tuple[Path | None, dict[Path, str]]:
    """A shipped file, or one in the user's cache, that was trained beside these weights on this suite; and the others.

    Whatever the file's suite names (a length, a type) must be so in `suite`, which may name more. The one that names most
    is taken, and before others one that saw every frame. The others were trained beside these weights on the same suite
    with other parameters: path to how it was named.
    """
    own = texts(params_of(suite))
    fitting: list[tuple[int, bool, Path]] = []
    others: dict[Path, str] = {}
    for path in candidates(f"{METHOD}-*.safetensors"):
        try:
            header = _header(path)
            trained_on = parse(str(header.get("suite")))
        except (OSError, ValueError, SafetensorError, UsageError):
            continue  # somebody's broken file in the cache is no reason to stop
        if header.get("weights_hash") != weights_hash or trained_on.name != suite.name:
            continue
        if trained_on.params.items() <= own.items():
            fitting.append((-len(trained_on.params), header.get("frames") is not None, path))
        else:
            others[path] = str(trained_on)
    best = min(fitting, key=lambda each: each[:2], default=None)
    return (None if best is None else best[2]), others


def _header(path: Path) -> dict[str, Any]:
    """Raises `ValueError` where there is none."""
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(KEY, "null"))
    if not isinstance(header, dict):
        raise ValueError("it has no header of vlmbench")
    return header


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
