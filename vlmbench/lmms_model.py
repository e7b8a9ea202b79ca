"""Our models and methods inside lmms-eval: ``lmms_eval --model vlmbench --model_args pretrained=…,method=pevlm,sink=2``.

The entry point in ``lmms_eval.models`` leads to `manifest`. Method and parameters stand in ``model_args``, since lmms-eval's
response cache is keyed by that text alone. Only lmms-eval imports this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger

from vlmbench.errors import UsageError
from vlmbench.machine import load_backend
from vlmbench.registry import methods as method_registry
from vlmbench.request import RunRequest
from vlmbench.spec import Spec, build
from vlmbench.suite import Sample
from vlmbench.suites.folder import kind_of
from vlmbench.suites.lmms import MARK, interleaved
from vlmbench.video import SAMPLERS, Clip, DecodeError, Decoder

MAX_NEW_TOKENS = 16
"""When a task names none."""


def manifest() -> ModelManifest:
    return ModelManifest(model_id="vlmbench", simple_class_path=f"{__name__}.VlmbenchModel")


class VlmbenchModel(lmms):
    """One sample at a time, greedily. A sample that fails is an empty answer and a warning."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        method: str = "full",
        frames: int = 32,
        sampler: str = "endpoints",
        fps: float | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **given: Any,
    ) -> None:
        """`given`: fields of `RunRequest` (dtype, attention, max_pixels, …); whatever it does not have is the method's.

        Raises `UsageError` for what cannot be.
        """
        super().__init__()
        if not pretrained:
            raise UsageError("--model_args needs pretrained=MODEL, a hub id, a folder, or a name that vlmbench lists.")
        if str(batch_size) != "1":
            raise UsageError(f"vlmbench answers one sample at a time: --batch_size must be 1, not {batch_size}.")
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}.")
        known = {field.name for field in dataclasses.fields(RunRequest)} - {"methods", "suite", "limit"}
        options = {key: value for key, value in given.items() if key in known}
        params = {key: str(value) for key, value in given.items() if key not in known}
        self._frames, self._sampler, self._fps = int(frames), sampler, fps
        spec = Spec(method, params)
        self._method = build(method_registry.load(method), spec, "Method")
        if not self._method.traits.uses_model:
            raise UsageError(f"{method} never calls the model: there is nothing to do for it in lmms-eval.")
        request = RunRequest(model=pretrained, frames=self._frames, fps=fps, sampler=sampler, device=device, **options)
        self._backend = load_backend(request, pretrained)
        self._backend.check(self._method)
        self._method.check_weights(self._backend.identity)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        found = []
        with self._backend.attach(self._method), Decoder() as decoder:
            for context, options, doc_to_visual, doc_id, task, split in (request.args for request in requests):
                visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
                visuals = visuals if isinstance(visuals, list) else [visuals]
                answer = self._answer(f"{task}/{doc_id}", context, visuals, options, decoder)
                self.cache_hook.add_partial("generate_until", (context, options), answer.text)
                found.append(answer)
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("vlmbench answers tasks of one round only")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vlmbench generates answers: tasks that compare log-likelihoods cannot be run")

    def _answer(
        self, id_: str, context: str, visuals: Sequence[Any], options: dict[str, Any], decoder: Decoder
    ) -> GenerationResult:
        try:
            clips = [self._clip(visual, decoder) for visual in visuals]
        except DecodeError as error:
            logger.warning(f"{id_}: {error}")
            return GenerationResult(text="")
        if interleaved(context):
            logger.warning(f"{id_}: its pictures stand between words, and are put before them here")
        question = context.replace(MARK, "").strip()
        outcome = self._backend.answer(
            self._method,
            Sample(id=id_, cluster=id_, media=(), question=question, answer="", template=id_.partition("/")[0]),
            question,
            clips,
            pass_="accuracy",
            max_new_tokens=int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
        )
        if outcome.status != "ok":
            logger.warning(f"{id_}: {outcome.status}: {outcome.error}")
        text = outcome.raw_text
        stops = options.get("until") or ()
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        counts = TokenCounts(input_tokens=outcome.tokens.get("prompt"), output_tokens=len(outcome.output_ids))
        return GenerationResult(text=text, token_counts=counts)

    def _clip(self, visual: Any, decoder: Decoder) -> Clip:
        """Of a file's name, or of a picture."""
        if isinstance(visual, str):
            path = Path(visual)
            kind = kind_of(path) or "video"
            return decoder.read(path, kind=kind, frames=self._frames, rule=self._sampler, fps=self._fps)
        frame = np.asarray(visual.convert("RGB"))
        return Clip(frame[None].copy(), (0,), (0.0,), 1.0, "image", Path("picture"))
