"""MemVP: pictures as memory of the feed-forward blocks instead of tokens of the prompt; trained (arXiv 2405.05615).

The prompt is text alone. What the vision tower sees becomes entries of every feed-forward block, K_i = λ f(z_i) + p^k_i and
V_i = λ f(z_i) + p^v_i, without a gate and shared by all layers, and stays for the whole answer. The language model is
frozen; f, p^k and p^v are trained by ``vlmbench fit --method memvp``, and without such a file the method means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbench.artefact import cache_folder, fit_line
from vlmbench.errors import UsageError
from vlmbench.method import Citation, Method, Traits, Work, one_token
from vlmbench.spec import LATER, Spec, params_of, parse, slug

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from vlmbench.backend import Identity
    from vlmbench.fitting import Fitting
    from vlmbench.layout import Prompt
    from vlmbench.memvp_file import Trained
    from vlmbench.memvp_memory import Memory, Unit, VisualMemory
    from vlmbench.models.base import ModelAdapter, Shapes
    from vlmbench.patch import Patcher
    from vlmbench.suite import Suite
    from vlmbench.trace import Trace

UNTRAINED = "untrained"
"""``artefact=untrained``: the published first weights, for times and tests; the answers mean nothing."""
ASKED = "asked"
"""In the recipe of a file that was trained on a suite of files, which may be asked in several wordings: all its parameters."""
SLOTS = "memvp_slots"
"""Among a prompt's extras: what its pictures put into which slot."""


@dataclass(frozen=True)
class Memvp(Method):
    """`artefact` is a file of ``vlmbench fit``; by default the shipped one, or the user's own, for this model and suite.

    `scale` is s, `slots` E, the rows of p; both are the file's unless it is being fitted (0.1 and 320 as published), where
    `vision` is the width of adapters beside every MLP of the vision tower (12 as published; 0, the default, leaves the tower
    as it is, so that its features are computed once for the whole training). `start` is a file of pictures whose f, p^k and
    p^v a training begins with, as for videos. With a file, another `scale` may be typed.
    """

    name: ClassVar[str] = "memvp"
    cite: ClassVar[Citation] = Citation(
        "Memory-Space Visual Prompting for Efficient Vision-Language Fine-Tuning",
        "2405.05615",
        faithful="ungated entries with SiLU in every FFN, shared by the layers; λ, s, p^k, p^v, extra slots; recipe",
        extension="features from the aligned model's projector (f: d to 128 to d); adapters in the tower only with vision=12; "
        "pooling above 256 a frame, s · 256/n above 256 in all, a code for each frame or picture, mask of padded slots; "
        "videos begun with f and p of pictures (start=); a line break that a template writes behind a picture stays",
    )
    traits: ClassVar[Traits] = Traits(
        trained=True, stages=frozenset({"prompt", "prefill", "decode"}), takes=frozenset({"ffn", "visual"})
    )

    artefact: str | None = None
    scale: float | None = None
    slots: int | None = None
    vision: int | None = None
    start: str | None = field(default=None, metadata=LATER)
    _held: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The file in use and its path, known once model and suite are."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"memvp:slots must be at least 1, not {self.slots}.")
        if self.vision is not None and self.vision < 0:
            raise UsageError(f"memvp:vision must be at least 0, not {self.vision}.")
        if self.scale is not None and not math.isfinite(self.scale):
            raise UsageError(f"memvp:scale must be a finite number, not {self.scale}.")
        if self.artefact not in (None, UNTRAINED):
            self._use(str(self.artefact))
        if self.start is not None:
            from vlmbench.memvp_file import read

            self._held["start"] = read(self.start)

    @classmethod
    def examples(cls) -> list[Memvp]:
        return [
            cls(artefact=UNTRAINED),
            cls(artefact=UNTRAINED, scale=0.5, slots=5),  # fewer slots than a frame has features
            cls(artefact=UNTRAINED, vision=4),
        ]

    # -- which weights ----------------------------------------------------------------------------------------------------

    def check(self, adapter: ModelAdapter) -> None:
        found = self._trained
        if found is None:
            return
        shapes, theirs = adapter.shapes, found.shape
        wanted = {"hidden": theirs.hidden}
        if theirs.vision_blocks:
            wanted |= {"vision_hidden": theirs.vision_hidden, "vision_layers": theirs.vision_blocks}
        for key, value in wanted.items():
            if getattr(shapes, key) != value:
                raise UsageError(
                    f"memvp:artefact={self._held['path']} is for a model with {key}={value}, and this one has "
                    f"{getattr(shapes, key)}; make one for it with `{fit_line(self.name, self._held['path'])}`."
                )

    def check_weights(self, identity: Identity) -> None:
        if self._trained is not None:
            self._trained.check_weights(self._held["path"], identity)
        self._held["model"], self._held["weights_hash"] = identity.model, identity.weights_hash

    def fit(self, suite: Suite) -> None:
        """Without ``artefact=``: find the file for the loaded weights and this suite. Raises `UsageError`."""
        if self.start is not None:
            raise UsageError(f"memvp:start={self.start} is where a training begins; a run reads artefact=.")
        self._held["suite"] = suite
        if self.artefact is not None or self._trained is not None:
            return
        from vlmbench.loaded import texts
        from vlmbench.memvp_file import find

        path, others = find(self._held["weights_hash"], suite)
        if path is None:
            named = str(Spec(suite.name, texts(params_of(suite))))
            raise UsageError(self._unfitted(self._held["model"], named, others, needs_data=suite.needs_data))
        self._use(str(path))

    def unlike(self, frames: int | None, sampler: str) -> str:
        found = self._trained
        if found is not None and (otherwise := self._asked_otherwise(found)):
            return otherwise
        if found is None or found.shape.units == 1 or (found.frames, found.sampler) == (frames, sampler):
            return ""
        theirs, own = (
            f"{n or 'all'} frames ({rule})" for n, rule in ((found.frames, found.sampler), (frames, sampler))
        )
        return f"{self._held['path']} was trained on {theirs} of a video, and this run shows {own}: its codes of frames differ."

    def _asked_otherwise(self, found: Trained) -> str:
        """A sentence when the file learned from questions with other parameters of the suite than the run's."""
        suite: Suite | None = self._held.get("suite")
        if suite is None or parse(found.suite).name != suite.name:
            return ""
        theirs, own = found.recipe.get(ASKED, {}), params_of(suite)
        other = [key for key in own if theirs.get(key, own[key]) != own[key]]
        said, now = (", ".join(f"{key}={each[key]}" for key in other) for each in (theirs, own))
        return f"{self._held['path']} was trained with {said}, and this run asks with {now}." if other else ""

    def fitted(self) -> dict[str, Any]:
        if (found := self._trained) is None:
            return {}
        shape = found.shape
        return {"artefact": found.digest, "scale": self._scale, "slots": shape.slots, "vision": shape.vision_width}

    @property
    def _trained(self) -> Trained | None:
        return self._held.get("file")

    def _use(self, path: str) -> None:
        from vlmbench.memvp_file import read

        found = read(path)
        for key, value in (("slots", found.shape.slots), ("vision", found.shape.vision_width)):
            if getattr(self, key) not in (None, value):
                raise UsageError(
                    f"memvp:artefact={path} was fitted with {key}={value}, not {getattr(self, key)}; leave {key} out."
                )
        self._held["file"], self._held["path"] = found, path

    def _unfitted(
        self,
        model: str = "MODEL",
        suite: str = "SUITE",
        others: Mapping[Path, str] | None = None,
        *,
        needs_data: bool = False,
    ) -> str:
        out = cache_folder() / f"memvp-{slug(model)}-{slug(suite)}.safetensors"
        line = fit_line(self.name, str(out), model, suite) + (" --data-root DATA" if needs_data else "")
        near = "".join(f" (artefact={path} is for {named})" for path, named in list((others or {}).items())[:1])
        return f"memvp is trained, and there is no file for {model} on {suite}{near}; make one with `{line}`."

    def new_memory(self, adapter: ModelAdapter, units: Sequence[Unit] = (), seed: int = 0) -> VisualMemory:
        """First weights for this model, with codes for as many frames as `units` has; in float32, on its device."""
        from vlmbench.memvp_memory import VisualMemory
        from vlmbench.memvp_prompt import shape_for

        shape = shape_for(adapter, self._n_slots, units, self.vision or 0)
        made = VisualMemory(shape, scale=self._scale).start(seed)
        if (before := self.started) is not None:
            before.begin(made, str(self.start))
        return made.to(adapter.device)

    @property
    def started(self) -> Trained | None:
        """What training begins with, beside random numbers."""
        return self._held.get("start")

    @property
    def _n_slots(self) -> int:
        from vlmbench.memvp_memory import SLOTS

        return self._trained.shape.slots if self._trained is not None else self.slots or SLOTS

    @property
    def _scale(self) -> float:
        from vlmbench.memvp_memory import SCALE

        if self.scale is not None:
            return self.scale
        return SCALE if self._trained is None else self._trained.scale

    def memory(self, adapter: ModelAdapter) -> VisualMemory:
        """The weights in use, on the model's device, without gradients."""
        if self._trained is None:
            return self.new_memory(adapter).eval().requires_grad_(False)
        memory = self._trained.memory().to(adapter.device)
        memory.scale = self._scale
        return memory

    def _require_weights(self) -> None:
        if self.artefact is None and self._trained is None:
            raise UsageError(self._unfitted())

    # -- what it does to a model ------------------------------------------------------------------------------------------

    def install(self, patch: Patcher, trace: Trace) -> None:
        from vlmbench.memvp_prompt import add_memory

        self._require_weights()
        memory = self.memory(patch.adapter)
        held: Memory | None = None

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            """A new prompt: nothing of the sample before may be read. Decoding keeps what prefill made."""
            nonlocal held
            if "vlmbench_layout" not in kwargs:
                return None
            slots = kwargs.pop(SLOTS, None)
            held = None if slots is None else memory([slots] * len(kwargs["inputs_embeds"])).to(patch.adapter.dtype)
            return args, kwargs

        patch.pre(patch.adapter.text, begin)
        add_memory(patch, memory, lambda: held)

    def prepare(self, prompt: Prompt, trace: Trace) -> Prompt:
        from vlmbench.memvp_memory import lay_out
        from vlmbench.memvp_prompt import text_alone, text_tokens, units_of

        self._require_weights()
        units = units_of(prompt)
        most = 1 if self._trained is None else self._trained.shape.units
        slots = lay_out(units, self._n_slots, most, prompt.embeds)
        trace.facts["memory"] = {"slots": len(slots.row), "visual": slots.n_visual}
        if units:
            trace.kept["prompt"] = text_tokens(prompt).tolist()
        else:
            trace.inactive("the prompt has no picture: the memory is what was learned, whatever is asked")
        text = text_alone(prompt)
        return replace(text, extras={**text.extras, SLOTS: slots})

    def work(self, prompt: Prompt, shapes: Shapes, trace: Trace) -> Work:
        """Attention and blocks over the text; beside them every layer's memory, and once a sample the projector."""
        from vlmbench.memvp_memory import flops

        n = len(prompt.extras[SLOTS].row)
        own = flops(n, shapes.hidden, shapes.hidden, tokens=prompt.length * shapes.layers)
        return replace(super().work(prompt, shapes, trace), own_flops=own)

    def decode_work(self, prompt: Prompt, shapes: Shapes, trace: Trace, step: int, size: int) -> Work:
        """Text keys, every neuron, and the memory: made once a sample, read and multiplied for each token in every layer.

        All layers share one, so that it need be read but once a token; as with weights, this is the least.
        """
        from vlmbench.memvp_memory import flops

        n = len(prompt.extras[SLOTS].row)
        own = flops(n, shapes.hidden, shapes.hidden, tokens=shapes.layers) - flops(n, shapes.hidden, shapes.hidden, 0)
        held = 2 * n * shapes.hidden * size
        return replace(one_token(prompt.length + step + 1, shapes), own_flops=own, own_bytes=held, own_read=held)

    def search(self, fitting: Fitting) -> Trained:
        """Train on the suite's train split; goes on where an earlier command was stopped. Raises `UsageError`."""
        from vlmbench.memvp_fit import fit

        if self.artefact is not None:
            raise UsageError(
                f"memvp:artefact={self.artefact} is what a run reads, and training begins anew; leave artefact out."
            )
        suite = fitting.session.suite
        if not suite.needs_data:
            return fit(self, fitting)
        fitting.session.progress.note(f"{suite.said}: {len(fitting.samples)} train questions")
        found = fit(self, fitting)
        return replace(found, recipe={**found.recipe, ASKED: params_of(suite)})
