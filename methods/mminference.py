"""MMInference: heads attend along grids, slashes or windows found per head and prompt (arXiv 2504.16083).

In prefill every head has a pattern: a window with sink (`a_shape`, `tri`), a grid of lines at the distance of frames or rows
(`grid`), or columns and diagonals (`vs`). Stride, phase, columns and diagonals come from the last 64 queries of the prompt
itself. Modalities may have an index each (``boundary=q``) or a pattern for each pair (``boundary=2d``). The cache holds
every key in order, and decoding is dense. ``vlmbench fit`` finds a pattern for each head (``artefact=FILE``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits, Work
from vlmbench.mm_artefact import HeadPatterns, read
from vlmbench.mm_patterns import STRIDES, Head, Intra, Scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from vlmbench.backend import Identity
    from vlmbench.fitting import Fitting
    from vlmbench.layout import Prompt
    from vlmbench.models.base import ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace

Pattern = Literal["grid", "a_shape", "tri", "vs", "dense", "mix", "sf-fixed", "sf-strided", "minference"]
Lines = Literal["h", "v", "s", "hv", "vs", "hvs"]
DID = "mminference"
"""Key of `Trace.scratch`: what each layer counted."""


@dataclass(frozen=True)
class Mminference(Method):
    """One `pattern` for all heads, or with `artefact` the one that each head was fitted.

    Published sizes belong to prompts of 20 240 tokens: shorter ones scale them with their length, longer ones keep them, and
    `budget` multiplies them all. `sink`, `local`, `columns` and `slashes` are tokens as given instead. `stride` is ``frame``,
    ``row``, a number of tokens, or ``auto``: the better of frame and row on the prompt; `phase` is the line's place in it,
    found on the prompt when left out. `text` is the pattern of text rows where a boundary keeps modalities apart. The first
    `dense_layers` are left alone: a careful setting is ``dense_layers=4,budget=2``.

    The baselines of the paper's table 1 are patterns too: ``sf-fixed`` (window and columns at a frame's distance),
    ``sf-strided`` (window and diagonals), ``minference`` (vertical-slash with its default of 1000 and 6096). ``mix`` is the
    fixed workload's: three fifths of the heads grid, a fifth vertical-slash, a fifth A-shape.
    """

    name: ClassVar[str] = "mminference"
    cite: ClassVar[Citation] = Citation(
        "MMInference: Accelerating Pre-filling for Long-Context VLMs via Modality-Aware Permutation Sparse Attention",
        "2504.16083",
        faithful="patterns, last-64-query index, No-, K-, Q- and 2D-boundary, search at equal cost on the attention output, "
        "dense decoding over the whole cache",
        extension="stride by captured mass, of those within 2 % the largest; sizes scaled to prompts below 20 240 tokens; "
        "slashes in whole block diagonals; lines to the last visual token, no dense rest; text queries see pictures through "
        "their columns and pictures see all text under 2D; horizontal lines of the text prefix lie in the sink",
    )
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prefill"}))

    pattern: Pattern = "grid"
    boundary: Literal["none", "k", "q", "2d"] = "none"
    text: Literal["vs", "dense"] = "vs"
    lines: Lines = "hv"
    stride: str = "auto"
    phase: int | None = None
    sink: int | None = None
    local: int | None = None
    columns: int | None = None
    slashes: int | None = None
    dense_layers: int = 0
    budget: float = 1.0
    artefact: str | None = None

    def __post_init__(self) -> None:
        for key, least in (
            ("local", 1),
            ("sink", 0),
            ("columns", 1),
            ("slashes", 1),
            ("phase", 0),
            ("dense_layers", 0),
        ):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UsageError(f"{self.name}:{key} must be at least {least}, not {value}.")
        if not 0 < self.budget < float("inf"):
            raise UsageError(f"{self.name}:budget must be above 0, not {self.budget}.")
        if self.stride not in STRIDES and not (self.stride.isdecimal() and int(self.stride) > 0):
            raise UsageError(
                f"{self.name}:stride must be {', '.join(STRIDES)} or a number of tokens of at least 1, not {self.stride!r}."
            )
        if self.artefact is not None:
            defaults = type(self)()
            typed = [key for key in _OF_A_PATTERN if getattr(self, key) != getattr(defaults, key)]
            if typed:
                raise UsageError(
                    f"{self.name}:artefact={self.artefact} holds a pattern for each head; leave {', '.join(typed)} out, or "
                    f"leave the artefact out."
                )
            self._fitted  # noqa: B018 - a file that cannot be used is refused before a model is loaded

    @cached_property
    def _fitted(self) -> HeadPatterns | None:
        return None if self.artefact is None else read(self.artefact)

    @classmethod
    def examples(cls) -> list[Mminference]:
        return [
            cls(pattern="a_shape", sink=2, local=8),
            cls(pattern="tri", sink=2, local=8),
            cls(pattern="grid", local=4),
            cls(pattern="grid", lines="hvs", stride="7", phase=2, local=3, sink=1),
            cls(pattern="vs", columns=2, slashes=2, boundary="q", text="dense"),
            cls(pattern="grid", local=4, boundary="2d"),
            cls(pattern="sf-strided", dense_layers=1),
        ]

    @classmethod
    def neutral(cls) -> Mminference:
        """Columns at every distance of one: every key behind the window, through windows, lines and joining."""
        return cls(pattern="grid", lines="v", stride="1", phase=0, sink=0, local=1)

    def check(self, adapter: ModelAdapter) -> None:
        if self._fitted is None:
            return
        shapes, layers = adapter.shapes, self._fitted.layers
        found = {len(layer) for layer in layers}
        if len(layers) != shapes.layers or found != {shapes.heads}:
            raise UsageError(
                f"{self.name}:artefact={self.artefact} has {len(layers)} layers of {sorted(found)} heads, and the model "
                f"{shapes.layers} of {shapes.heads}; make one for this model with vlmbench fit."
            )

    def check_weights(self, identity: Identity) -> None:
        if self._fitted is not None:
            self._fitted.check_weights(str(self.artefact), identity)

    def fitted(self) -> dict[str, Any]:
        return {} if self._fitted is None else {"artefact": self._fitted.digest}

    def search(self, fitting: Fitting) -> HeadPatterns:
        """A pattern for every head, at the cost of A-shape with `budget` times its published sizes."""
        from vlmbench.mm_search import search

        return search(fitting, self.budget)

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        if not prompt.layout.n_visual and self._fitted is None:
            trace.inactive("the prompt has no visual tokens")
            return prompt
        return replace(prompt, extras={**prompt.extras, "mm_scene": Scene.of(prompt.layout)})

    def heads(self, scene: Scene, layer: int, count: int) -> Sequence[Head]:
        """What the `count` heads of a layer do on this prompt, sizes in its tokens."""
        factor = self.budget * scene.shrink
        if self._fitted is not None:
            table = self._fitted.layers if scene.runs and scene.vision[1] > scene.vision[0] else self._fitted.text_only
            return [head.scaled(factor) for head in table[layer]]
        if self.pattern == "mix":
            few = round(count / 5)
            sizes: tuple[tuple[Pattern, int], ...] = (("grid", count - 2 * few), ("vs", few), ("a_shape", few))
            kinds = [kind for kind, number in sizes for _ in range(number)]
            alone = {kind: replace(self, pattern=kind)._head(scene).scaled(factor) for kind in set(kinds)}
            return [alone[kind] for kind in kinds]
        return [self._head(scene).scaled(factor)] * count

    def _head(self, scene: Scene) -> Head:
        """The one pattern of all heads; what was given counts in tokens of this prompt."""
        kind: Any = _KIND.get(self.pattern, self.pattern)
        given = {name: getattr(self, name) for name in ("sink", "local", "columns", "slashes")}
        sizes = _PUBLISHED[self.pattern] | {name: value for name, value in given.items() if value is not None}
        exact = {name for name, value in given.items() if value is not None}
        lines, stride, phase = self.lines, self.stride, self.phase
        if self.pattern.startswith("sf-"):  # the window is a frame, and the line is its last token
            lines, stride, phase = ("v" if self.pattern == "sf-fixed" else "s"), "frame", scene.frame - 1
            sizes |= {"local": scene.frame if self.local is None else self.local}
            exact |= {"local"}
        flags = {"horizontal": "h" in lines, "vertical": "v" in lines, "slash": "s" in lines}
        vision = Intra(kind, **sizes, stride=stride, phase=phase, exact=frozenset(exact), **flags)
        return Head(vision, Intra(self.text), self.boundary)

    def plant(self, prompt: Prompt, q: Tensor, k: Tensor) -> None:
        """Give random queries and keys what each head looks for (`bench attention`)."""
        from vlmbench.mm_planted import plant

        plant(self.heads(scene := Scene.of(prompt.layout), 0, q.shape[1]), scene, q, k)

    def rule(self, prompt: Prompt, q: Tensor, k: Tensor) -> Any:
        """Which keys each head's queries see, and how many pairs that is (`bench attention`)."""
        from vlmbench.mm_planted import Seen

        return Seen.of(self.heads(scene := Scene.of(prompt.layout), 0, q.shape[1]), scene, q, k)

    def install(self, patch: Patcher, trace: Trace) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from vlmbench.mm_attention import attention as attend

        def attention(
            module: nn.Module,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None,
            *,
            mm_scene: Scene | None = None,
            scaling: float | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            layer = getattr(module, "layer_idx", 0)
            if mm_scene is None:  # decode, or nothing visual
                return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
            if {q.shape[2], k.shape[2]} != {mm_scene.length}:
                raise ValueError(
                    f"mminference reads the last queries of the whole prompt, so its {mm_scene.length} tokens must be "
                    f"prefilled at once; here are {q.shape[2]} behind {k.shape[2] - q.shape[2]} in the cache"
                )
            if layer < self.dense_layers:
                return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
            heads = self.heads(mm_scene, layer, q.shape[1])
            out, did = attend(q, k, v, heads, mm_scene, scale=scaling)
            _note(trace, mm_scene, layer, q.shape[1] * q.shape[0], did)
            return out.transpose(1, 2).contiguous(), None

        patch.attention(attention)

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        dense = super().work(prompt, shapes, trace)
        did, scene = trace.scratch.get(DID, {}), prompt.extras.get("mm_scene")
        if not did:  # nothing to do, or nothing ran yet
            return dense if scene is None else replace(dense, pairs=self._expected(scene, shapes, dense.pairs))
        # Heads of one layer may differ: rounded up to whole pairs a head.
        pairs = [-(-did[n].tally.pairs // shapes.heads) if n in did else each for n, each in enumerate(dense.pairs)]
        scores = sum(each.tally.scores for each in did.values())
        return replace(dense, pairs=tuple(pairs), own_flops=2 * scores * shapes.head_dim)

    def _expected(self, scene: Scene, shapes: Shapes, dense: tuple[int, ...]) -> tuple[int, ...]:
        """Pairs of each layer by the rule alone."""
        from vlmbench.mm_attention import expected_pairs

        found = list(dense)
        known: dict[Intra, int] = {}
        for layer in range(self.dense_layers, len(dense)):
            heads = [head.vision for head in self.heads(scene, layer, shapes.heads)]
            for intra in set(heads) - known.keys():
                known[intra] = expected_pairs(intra, scene)
            found[layer] = -(-sum(known[intra] for intra in heads) // len(heads))
        return tuple(found)


_KIND = {"sf-fixed": "grid", "sf-strided": "grid", "minference": "vs"}
_PUBLISHED: dict[str, dict[str, int]] = {
    "grid": {"sink": 128, "local": 1024},
    "a_shape": {"sink": 128, "local": 4096},
    "tri": {"sink": 128, "local": 4096},
    "vs": {"columns": 1000, "slashes": 2048},
    "dense": {},
    "mix": {},
    "sf-fixed": {"sink": 1},
    "sf-strided": {"sink": 1},
    "minference": {"columns": 1000, "slashes": 6096},
}
"""Tables 3 and 4 of the paper; MInference's own default for a head without an entry."""
_OF_A_PATTERN = ("pattern", "boundary", "text", "lines", "stride", "phase", "sink", "local", "columns", "slashes")


def _note(trace: Trace, scene: Scene, layer: int, heads: int, did: Any) -> None:
    """Density, recall and strides of a layer into the trace; a prompt on which every pair was computed is inactive."""
    counted = trace.scratch.setdefault(DID, {})
    counted[layer] = did
    dense = heads * scene.length * (scene.length + 1) // 2
    trace.facts.setdefault("density", {})[str(layer)] = round(did.allowed / dense, 4)
    if did.recalls:
        every = [float(share) for group in did.recalls for share in group]
        trace.facts.setdefault("recall", {})[str(layer)] = round(sum(every) / len(every), 4)
    if did.strides:
        known = trace.facts.setdefault("strides", {})
        for stride, count in Counter(map(str, did.strides)).items():
            known[stride] = known.get(stride, 0) + count
    if all(each.allowed == dense for each in counted.values()):
        trace.inactive(
            f"every pattern holds all pairs of {scene.length} tokens; give a smaller budget or smaller sizes"
        )
    else:
        trace.applied, trace.reason = True, ""
