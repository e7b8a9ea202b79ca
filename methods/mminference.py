"""MMInference: heads attend along grids, slashes or windows found per head and prompt (arXiv 2504.16083).

In prefill every head has a pattern: a window with sink (`a_shape`, `tri`), a grid of lines at the distance of frames or rows
(`grid`), or columns and diagonals (`vs`). Stride, phase, columns and diagonals come from the last 64 queries of the prompt
itself. Modalities may have an index each (``boundary=q``) or a pattern for each pair (``boundary=2d``). The cache holds
every key in order, and decoding is dense. ``vlmbench fit`` finds a pattern for each head (``artefact=FILE``); without a file
all heads have the one `pattern`, which is not what the paper measures. On CUDA with Triton all heads of
a layer are one launch. What has no kernel (another device, heads wider than 128) is written out, after a warning: answers are
the same but for rounding, and the row carries the mark ``masked``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits, Work
from vlmbench.mm_artefact import AUTO, HeadPatterns, find, read
from vlmbench.mm_patterns import KIND_OF, OF_A_PATTERN, PUBLISHED, STRIDES, USED, Head, Intra, Pattern, Scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from vlmbench.backend import Identity
    from vlmbench.fitting import Fitting
    from vlmbench.layout import Prompt
    from vlmbench.models.base import ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.trace import Trace

Lines = Literal["h", "v", "s", "hv", "vs", "hvs"]
MOST = 1000  # times the published sizes: four million tokens of window


@dataclass(frozen=True)
class Mminference(Method):
    """One `pattern` for all heads, or with `artefact` the one that each head was fitted (``auto``: shipped, or in the cache).

    Published sizes belong to prompts of 20 240 tokens: shorter ones scale them with their length, longer ones keep them, and
    `budget` multiplies them all. `sink`, `local`, `columns` and `slashes` are tokens as given instead, but the columns and
    diagonals that are always kept (30 and 100, scaled) stay. `stride` is ``frame``, ``row``, a number of tokens, or
    ``auto``: the better of frame and row on the prompt; `phase` is the line's place in it, found on the prompt when left
    out. `text` is the pattern of text rows where a boundary keeps modalities apart. The first `dense_layers` are left alone:
    a careful setting is ``dense_layers=4,budget=2``. A parameter that the pattern does not use is refused.

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
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prefill"}), takes=frozenset({"attention"}))

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
    _held: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The file in use and its path; under ``artefact=auto`` known once the weights are."""

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
        if not 0 < self.budget <= MOST:
            raise UsageError(f"{self.name}:budget must be above 0 and at most {MOST}, not {self.budget}.")
        if self.stride not in STRIDES and not (self.stride.isdecimal() and int(self.stride) > 0):
            raise UsageError(
                f"{self.name}:stride must be {', '.join(STRIDES)} or a number of tokens of at least 1, not {self.stride!r}."
            )
        given = self.given()
        if self.artefact is None:
            used = {"pattern", "boundary", *USED[self.pattern], *(("text",) if self.boundary in ("q", "2d") else ())}
            if unused := [key for key in given if key not in used]:
                raise UsageError(
                    f"{self.name}:pattern={self.pattern},boundary={self.boundary} does not use {', '.join(unused)}; leave "
                    f"{'it' if len(unused) == 1 else 'them'} out, or choose another pattern or boundary."
                )
            return
        if given:
            raise UsageError(
                f"{self.name}:artefact={self.artefact} holds a pattern for each head; leave {', '.join(given)} out, or "
                f"leave the artefact out."
            )
        if self.artefact != AUTO:  # a file that cannot be used is refused before a model is loaded
            self._held["file"], self._held["path"] = read(self.artefact), self.artefact

    def given(self) -> list[str]:
        """Parameters of a pattern that are not their defaults."""
        defaults = {each.name: each.default for each in fields(self)}
        return [key for key in OF_A_PATTERN if getattr(self, key) != defaults[key]]

    @property
    def _fitted(self) -> HeadPatterns | None:
        return self._held.get("file")

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
        if self.dense_layers >= adapter.shapes.layers:
            raise UsageError(
                f"{self.name}:dense_layers={self.dense_layers} leaves none of the model's {adapter.shapes.layers} layers to "
                f"it; give fewer."
            )
        if self._fitted is None:
            return
        shapes, layers = adapter.shapes, self._fitted.layers
        found = {len(layer) for layer in layers}
        if len(layers) != shapes.layers or found != {shapes.heads}:
            raise UsageError(
                f"{self.name}:artefact={self._held['path']} has {len(layers)} layers of {sorted(found)} heads, and the model "
                f"{shapes.layers} of {shapes.heads}; make one for this model with vlmbench fit."
            )

    def check_weights(self, identity: Identity) -> None:
        if self.artefact == AUTO:
            self._held["file"], self._held["path"] = find(identity)
        elif self._fitted is not None:
            self._fitted.check_weights(str(self.artefact), identity)

    def fitted(self) -> dict[str, Any]:
        """The digest; what holds for all heads without an artefact has no value then."""
        if self._fitted is None:
            return {}
        return {**dict.fromkeys(OF_A_PATTERN), "artefact": self._fitted.digest}

    def search(self, fitting: Fitting) -> HeadPatterns:
        """A pattern for every head, at the cost of A-shape with `budget` times its published sizes.

        Raises `UsageError` when something else was given: it would have no effect.
        """
        from vlmbench.mm_search import search

        given = [*self.given(), *(key for key in ("dense_layers", "artefact") if getattr(self, key))]
        if given:
            raise UsageError(f"fit chooses a pattern for every head of every layer; leave {', '.join(given)} out.")
        return search(fitting, self.budget)

    @property
    def on_text(self) -> bool:
        """What was fitted has patterns of its own for text alone, as MInference has."""
        return self._fitted is not None

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        if not prompt.layout.n_visual and not self.on_text:
            trace.inactive("the prompt has no visual tokens")
            return prompt
        return replace(prompt, extras={**prompt.extras, "mm_scene": Scene.of(prompt.layout)})

    def heads(self, scene: Scene, layer: int, count: int) -> Sequence[Head]:
        """What the `count` heads of a layer do on this prompt, sizes in its tokens."""
        factor = self.budget * scene.shrink
        if self.artefact is not None and self._fitted is None:
            raise UsageError(
                f"{self.name}:artefact={self.artefact} is known once weights are loaded; name the file here."
            )
        if self._fitted is not None:
            table = self._fitted.layers if scene.runs and scene.vision[1] > scene.vision[0] else self._fitted.text_only
            return [head.scaled(factor) for head in table[layer]]
        if self.pattern == "mix":
            few = round(count / 5)
            sizes: tuple[tuple[Pattern, int], ...] = (("grid", count - 2 * few), ("vs", few), ("a_shape", few))
            kinds = [kind for kind, number in sizes for _ in range(number)]
            alone = {kind: self._head(scene, kind).scaled(factor) for kind in set(kinds)}
            return [alone[kind] for kind in kinds]
        return [self._head(scene, self.pattern).scaled(factor)] * count

    def _head(self, scene: Scene, pattern: Pattern) -> Head:
        """Every head of one pattern; what was given counts in tokens of this prompt."""
        kind: Any = KIND_OF.get(pattern, pattern)
        given = {name: getattr(self, name) for name in ("sink", "local", "columns", "slashes")}
        sizes = PUBLISHED[pattern] | {name: value for name, value in given.items() if value is not None}
        exact = {name for name, value in given.items() if value is not None}
        lines, stride, phase = self.lines, self.stride, self.phase
        if pattern.startswith("sf-"):  # the window is a frame, and the line is its last token
            lines, stride, phase = ("v" if pattern == "sf-fixed" else "s"), "frame", scene.frame - 1
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
        from vlmbench.mm_told import note

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
            out, did = attend(q, k, v, heads, mm_scene, scale=scaling, settle=False)
            note(trace, mm_scene, layer, q.shape[1] * q.shape[0], did)
            return out.transpose(1, 2).contiguous(), None

        patch.attention(attention)

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        from vlmbench.mm_told import DID

        dense = super().work(prompt, shapes, trace)
        trace.settle()
        did, scene = trace.scratch.get(DID, {}), prompt.extras.get("mm_scene")
        if not did:  # nothing to do, or nothing ran yet
            return dense if scene is None else self._expected(scene, shapes, dense)
        # Heads of one layer may differ: rounded up to whole pairs a head.
        pairs = [-(-did[n].allowed // shapes.heads) if n in did else each for n, each in enumerate(dense.pairs)]
        scores, extra = (sum(counts) for counts in zip(*((e.tally.scores, e.extra) for e in did.values()), strict=True))
        return replace(dense, pairs=tuple(pairs), own_flops=_own_flops(scores, extra, shapes))

    def _expected(self, scene: Scene, shapes: Shapes, dense: Work) -> Work:
        """By the rule alone; boundaries are counted as if there were none."""
        from vlmbench.mm_told import Expected, expected

        pairs, scores, extra = list(dense.pairs), 0, 0
        known: dict[Intra, Expected] = {}
        for layer in range(self.dense_layers, len(pairs)):
            heads = [head.vision for head in self.heads(scene, layer, shapes.heads)]
            for intra in set(heads) - known.keys():
                known[intra] = expected(intra, scene)
            pairs[layer] = -(-sum(known[intra].pairs for intra in heads) // len(heads))
            scores += sum(known[intra].scores for intra in heads)
            extra += sum(known[intra].extra for intra in heads)
        return replace(dense, pairs=tuple(pairs), own_flops=_own_flops(scores, extra, shapes))


def _own_flops(scores: int, extra: int, shapes: Shapes) -> int:
    """Of scores that only chose, and of pairs that were computed in the corners of masks and did not count."""
    return (2 * scores + 4 * extra) * shapes.head_dim
