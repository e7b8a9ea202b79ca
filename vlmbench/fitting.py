"""``vlmbench fit``: choose a method's parameters for one model and one length, on questions of the suite's train split.

What is chosen, and among which settings, is the method's own affair (`Method.search`); here is what any search needs: a
prompt to count its cost on, full attention's answers, and how often a setting gives the same ones. Nothing is stored
before the end, so that a command that was stopped leaves no half of an artefact; a method that trains goes on from
``OUT.training``.

synthvideo's train split is the seeds 0 to 199, which the shipped tiny models were themselves trained on: fitted there, they
answer questions that they have seen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmbench import header, stats
from vlmbench.artefact import SHIPPED, Artefact, cache_folder
from vlmbench.errors import RunError, UsageError
from vlmbench.method import Method
from vlmbench.registry import methods as method_registry
from vlmbench.session import Session, make_methods, make_suite
from vlmbench.spec import Spec, params_of

if TYPE_CHECKING:
    from vlmbench.layout import Prompt
    from vlmbench.models.base import ModelAdapter
    from vlmbench.progress import Progress
    from vlmbench.request import RunRequest
    from vlmbench.suite import Sample


class Answered(NamedTuple):
    said: str
    score: float


QUESTIONS = 60
"""Of the train split, for a search; training takes them all."""


def fit(
    request: RunRequest,
    out: Path,
    *,
    max_loss: float,
    steps: int | None,
    progress: Progress,
    batch: int | None = None,
    lr: float | None = None,
) -> int:
    """Fit the request's only method and write the artefact. Raises `UsageError` and `RunError`.

    `batch` and `lr` are of methods that train (`Traits.trained`).
    """
    (method,) = make_methods(request.methods)
    if type(method).search is Method.search:
        able = [name for name in method_registry.names() if method_registry.load(name).search is not Method.search]
        raise UsageError(f"{method.name} has nothing to fit; methods that have: {', '.join(able)}.")
    if not 0 <= max_loss < 1:
        raise UsageError(f"--max-loss must be at least 0 and below 1, not {max_loss:g}.")
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}.")
    if not method.traits.trained:
        if batch is not None or lr is not None:
            raise UsageError(f"--batch and --lr are of training, and {method.name} is only searched; leave them out.")
        request = replace(request, limit=QUESTIONS if request.limit is None else request.limit)
    if batch is not None and batch < 1:
        raise UsageError(f"--batch must be at least 1, not {batch}.")
    if lr is not None and not lr > 0:
        raise UsageError(f"--lr must be above 0, not {lr:g}.")
    if (folder := out.absolute().parent) in (cache_folder().absolute(), SHIPPED):
        folder.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out must be a file in a folder that is there, not {str(out)!r}.")
    _one_length(request)
    # What is yet to be trained has no file, and the session would refuse it.
    asked = replace(request, methods=()) if method.traits.trained else request
    with Session(asked, progress, split="train", stored=False) as session:
        fitting = Fitting(session, method, max_loss, steps, out=out, batch=batch, lr=lr)
        artefact = method.search(fitting)
    progress.finish()
    try:
        artefact.write(out)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error
    fitting.state.unlink(missing_ok=True)
    print(artefact.to_text(out))
    return 0


def _one_length(request: RunRequest) -> None:
    """Refuse videos of several lengths: the first questions are all of one, and what is chosen for it is not for others."""
    suite = make_suite(request.suite)
    if request.data_root is not None:
        suite = suite.located(request.data_root, allow_partial=request.allow_partial, offline=request.offline)
    lengths = dict.fromkeys(sample.strata.get("length", "") for sample in suite.samples("train"))
    if len(lengths) > 1:
        known = list(lengths)
        raise UsageError(
            f"{request.suite} holds videos of {', '.join(known)} frames, and fit is for one length; name it as in "
            f"{suite.name}:length={known[0]}."
        )


class Fitting:
    """What a search has at hand: train questions, full attention's answers to them, and a limit on the loss."""

    def __init__(
        self,
        session: Session,
        method: Method,
        max_loss: float,
        steps: int | None,
        *,
        out: Path,
        batch: int | None = None,
        lr: float | None = None,
    ) -> None:
        self.session, self.method, self.max_loss, self.steps = session, method, max_loss, steps
        self.out, self.batch, self.lr = out, batch, lr
        # The first so many: the questions on one video follow each other, so few videos are rendered and decoded.
        suite_order = session.suite.samples("train")
        self.samples: list[Sample] = list(suite_order[: session.request.limit])
        self._begun_s = time.monotonic()
        self._prompt: Prompt | None = None

    @property
    def state(self) -> Path:
        """Where training goes on from; gone when it is over."""
        return self.out.with_name(f"{self.out.name}.training")

    @property
    def adapter(self) -> ModelAdapter:
        """The loaded model. Raises `UsageError` when there is none."""
        from vlmbench.engine import TorchBackend

        backend = self.session.backend
        if not isinstance(backend, TorchBackend):
            raise UsageError(f"{backend.identity.model} is a stand-in without a prompt; fit needs a model.")
        return backend.adapter

    def prompt(self) -> Prompt:
        """The first question's prompt with its positions and layout, but without visual features."""
        from vlmbench.models.base import Features

        adapter, sample = self.adapter, self.samples[0]
        if self._prompt is None:
            record = self.session.blank(sample, "accuracy")
            clips = self.session.clips(sample, record)
            if clips is None:
                raise RunError(f"The first train video cannot be used: {record.error}")
            asked = self.session.asked(sample, clips)
            inputs = adapter.inputs(clips, asked.question, asked.captions)
            self._prompt = adapter.splice(adapter.to_device(inputs), Features())
        return self._prompt

    def cheapest(self, settings: Sequence[tuple[float, Method]], chosen: Sequence[str]) -> Artefact:
        """The first of (cost, setting), in order of cost, that keeps within the limit; dearer ones are not tried.

        The cost is relative to full attention's. Raises `RunError` when none does.
        """
        if not settings:
            raise RunError(
                f"No setting of {self.method.name} has anything to do on {self._length}; fit a longer video."
            )
        settings = _spread(settings, self.steps)
        progress = self.session.progress
        progress.start((1 + len(settings)) * len(self.samples), f"fit · {self.method.name}")
        full = self._answers(make_methods(("full",))[0], "full")
        if not full:
            raise RunError("Full attention answered none of the train questions; see them with `vlmbench run --debug`.")
        rows: list[dict[str, Any]] = []
        for cost, setting in settings:
            parameters = {key: params_of(setting)[key] for key in chosen}
            name = str(Spec(self.method.name, {key: str(value) for key, value in parameters.items()}))
            rows.append({**parameters, "pairs_relative": cost, **self._against(full, self._answers(setting, name))})
            progress.note(f"{name}: {_sentence(rows[-1])}")
            if rows[-1]["loss"] <= self.max_loss + 1e-9:
                return self._artefact(setting, chosen, full, rows)
        best = min(rows, key=lambda row: row["loss"])
        raise RunError(
            f"None of {len(rows)} settings of {self.method.name} keeps the loss of agreement within {self.max_loss:g} on "
            f"{len(full)} questions; the nearest is {', '.join(f'{key}={best[key]}' for key in chosen)} with "
            f"{best['loss']:.3f}: raise --max-loss."
        )

    @property
    def _length(self) -> str:
        return f"a prompt of {len(self.prompt().layout.units)} temporal units"

    def _answers(self, method: Method, name: str) -> dict[str, Answered]:
        """What it said to every question that it finished."""
        session, found = self.session, {}
        with session.backend.attach(method):
            for sample in self.samples:
                session.progress.stage(name)
                clips = session.clips(sample, session.blank(sample, "accuracy"))
                outcome = None if clips is None else session.ask(method, sample, clips, "accuracy")
                if outcome is not None and outcome.status == "ok":
                    score = session.suite.score(sample, outcome.raw_text)
                    said = outcome.raw_text if score.prediction is None else score.prediction
                    found[sample.id] = Answered(said, score.value)
                session.progress.advance()
        return found

    def _against(self, full: Mapping[str, Answered], own: Mapping[str, Answered]) -> dict[str, Any]:
        """Agreement and accuracy over the questions that full attention finished; one that failed agrees with nothing."""
        clusters = self._clusters(full)
        mine = [own.get(id_, Answered("", 0.0)) for id_ in full]
        same = [float(id_ in own and own[id_].said == full[id_].said) for id_ in full]
        scores = [each.score for each in mine]
        agreement = stats.accuracy_interval(same, clusters)
        delta = stats.paired_delta(scores, [each.score for each in full.values()], clusters)
        return {
            "n": len(full),
            "n_failed": len(full) - len(own.keys() & full.keys()),
            "loss": 1 - sum(same) / len(same),
            **_named("agreement", agreement),
            **_named("accuracy", stats.accuracy_interval(scores, clusters)),
            **_named("accuracy_delta", delta),
        }

    def _clusters(self, ids: Mapping[str, Any]) -> list[str]:
        by_id = {sample.id: sample.cluster for sample in self.samples}
        return [by_id[id_] for id_ in ids]

    def _artefact(
        self, setting: Method, chosen: Sequence[str], full: Mapping[str, Answered], rows: list[dict[str, Any]]
    ) -> Artefact:
        session = self.session
        identity, clusters = session.backend.identity, self._clusters(full)
        parameters = {key: value for key, value in params_of(setting).items() if key != "artefact"}
        return Artefact(
            method=setting.name,
            parameters=parameters,
            chosen=list(chosen),
            model=identity.model,
            revision=identity.revision,
            weights_hash=identity.weights_hash,
            suite=session.request.suite,
            suite_version=session.suite.version,
            data_hash=session.suite.data_hash,
            sampler=session.sampler,
            frames=session.frames,
            units=len(self.prompt().layout.units),
            tokens=self.prompt().length,
            n=len(full),
            n_videos=len(set(clusters)),
            max_loss=self.max_loss,
            full=_named("accuracy", stats.accuracy_interval([each.score for each in full.values()], clusters)),
            grid=rows,
            seconds=round(time.monotonic() - self._begun_s, 1),
            versions=header.versions(),
            **header.source(),
            device={"type": identity.device_type, "name": identity.device_name, "dtype": identity.dtype},
        )


def _spread(settings: Sequence[tuple[float, Method]], steps: int | None) -> Sequence[tuple[float, Method]]:
    """At most `steps` of them, from the cheapest to the dearest."""
    if steps is None or steps >= len(settings):
        return settings
    last = len(settings) - 1
    return [settings[round(i * last / max(1, steps - 1))] for i in range(steps)]


def _sentence(row: Mapping[str, Any]) -> str:
    return (
        f"same answer as full {row['agreement']:.3f} [{row['agreement_low']:.3f}, {row['agreement_high']:.3f}], "
        f"{row['pairs_relative']:.3f} of its pairs"
    )


def _named(name: str, estimate: stats.Estimate | None) -> dict[str, Any]:
    return (
        {} if estimate is None else {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    )
