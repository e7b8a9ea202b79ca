"""Everything that one ``vlmbench run`` loads once: suite, model, methods, open runs; and what is common to all passes."""

from __future__ import annotations

import errno
import hashlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmbench.ahead import Ahead
from vlmbench.backend import Backend, Outcome
from vlmbench.composed import join, parts_of
from vlmbench.errors import RunError, UsageError
from vlmbench.frame_cache import FrameCache
from vlmbench.header import SESSION, make_header, read_header
from vlmbench.machine import load_backend
from vlmbench.record import Frame, Pass, SampleRecord, Status, Timing
from vlmbench.registry import methods as method_registry
from vlmbench.registry import suites as suite_registry
from vlmbench.request import RunRequest
from vlmbench.spec import AnswerSpec, MeasureSpec, build, params_of, parse, parse_chain
from vlmbench.store import ResultStore, Run
from vlmbench.suite import Sample, Suite, limited
from vlmbench.suites._synth.files import cache_root
from vlmbench.video import SAMPLERS, DecodeError, Decoder, DecodeTimeout, default_decoder

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.progress import Progress
    from vlmbench.video import Clip

DECODE_TIMEOUT_S = 60.0
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
"""Faults of the place where videos are cached, not of a video."""


@dataclass
class Entry:
    """One method of this command with its open run."""

    method: Method
    run: Run
    asked: bool = True
    """By the user, and not by ``--trivial``."""


class Session:
    """A context manager: entering opens every run for writing, leaving closes them with the right status."""

    def __init__(
        self,
        request: RunRequest,
        progress: Progress,
        *,
        split: Literal["test", "train"] = "test",
        backend: Backend | None = None,
        stored: bool = True,
    ) -> None:
        """`backend` is one that is loaded already; with `stored` false no run is opened and nothing is written."""
        self.request, self.progress = request, progress
        self._open = ExitStack()
        self._stored = stored
        self.suite = make_suite(request.suite).located(
            request.data_root, allow_partial=request.allow_partial, offline=request.offline
        )
        self.sampler = request.sampler or self.suite.default_sampler
        if self.sampler not in SAMPLERS:
            raise UsageError(f"--sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}.")
        chosen = make_methods(request.methods)
        if request.baseline and all(method.name != "full" for method in chosen):
            chosen = [*make_methods(("full",)), *chosen]
        self.backend = backend or load_backend(request, request.model or self.suite.default_model)
        for method in chosen:
            self._check(method)
        self.frames = request.frames or self.suite.default_frames
        self.fps = request.fps or self.suite.default_fps
        self.decoder_name = default_decoder()
        self.max_new_tokens = request.max_new_tokens or self.suite.max_new_tokens
        self.samples = limited(self.suite.samples(split), request.limit)
        if not self.samples:
            raise UsageError(f"Suite {request.suite!r} has no samples.")
        self.methods = chosen
        self._last: tuple[str, tuple[Clip, ...], float] | None = None
        self._ahead: Ahead[Sample, tuple[tuple[Clip, ...], float]] | None = None

    def __enter__(self) -> Session:
        try:
            # Generated videos are small, and rendering them would take the model's own cores.
            cache = FrameCache(cache_root() / "frames") if self.suite.needs_data else None
            self.decoder = self._open.enter_context(Decoder(self.decoder_name, DECODE_TIMEOUT_S, cache))
            self._open.callback(self._stop_ahead)
            self.entries: list[Entry] = []
            for said in filter(None, (method.unlike(self.frames, self.sampler) for method in self.methods)):
                self.progress.note(said)
            for method in self.methods if self._stored else ():
                self._enter(method)
        except BaseException as error:
            self._open.__exit__(type(error), error, error.__traceback__)  # runs opened so far have not ended well
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.__exit__(*exception)  # type: ignore[arg-type]

    def add(self, specs: Sequence[str]) -> list[Entry]:
        """Open runs of more methods, which later passes take too. Raises `UsageError` as the session itself does."""
        there = {repr(method) for method in self.methods}
        methods = [method for method in make_methods(specs) if repr(method) not in there]
        for method in methods:
            self._check(method)
            self.methods.append(method)
        return [self._enter(method, asked=False) for method in methods]

    def _check(self, method: Method) -> None:
        self.backend.check(method)
        method.check_weights(self.backend.identity)
        method.fit(self.suite)

    def _enter(self, method: Method, *, asked: bool = True) -> Entry:
        store, answer = ResultStore(self.request.out), self._answer_spec(method)
        header = self._header(answer, method)
        for changed in filter(None, (_other_code(store, answer, header), _other_data(store, answer, header))):
            self.progress.note(changed)
        opened = self._open.enter_context(store.open(answer, header, fresh=self.request.fresh))
        if opened.repaired:
            self.progress.note(opened.repaired)
        self.entries.append(Entry(method, opened, asked))
        return self.entries[-1]

    def describe(self) -> str:
        """What is about to run, as resolved, in a line."""
        identity = self.backend.identity
        return (
            f"{identity.model} on {identity.device_name} ({identity.dtype}, {identity.attention_kernel}), "
            f"{self.suite.said}: {len(self.samples)} questions, {self.frames or 'all'} frames ({self.sampler}, "
            f"{self.decoder_name}), results in {self.request.out}"
        )

    def folder(self, method: Method) -> Path:
        """Where this method's run is stored."""
        return self.request.out / self._answer_spec(method).folder

    def each(self, samples: Sequence[Sample], what: str, *, ahead: bool = False) -> Iterator[Sample]:
        """The samples, one by one; `ahead`: the next two are decoded meanwhile, for passes that measure no time."""
        self.progress.start(len(samples), what)
        if ahead and self.suite.needs_data and self.backend.needs_media:
            self._ahead = Ahead(self._ready, samples)
        for sample in samples:
            yield sample
            self.progress.advance()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _ready(self, sample: Sample) -> tuple[tuple[Clip, ...], float]:
        self.suite.materialise(sample)
        return self._decode(sample, self.frames, fresh=False)

    def _stop_ahead(self) -> None:
        """When a pass is left in the middle its thread may be inside the decoder."""
        if self._ahead is not None:
            self.decoder.stop()
            self._ahead.close()

    def timed_samples(self) -> list[Sample]:
        """The first question of each video, as many videos as are to be timed, going round the lengths there are."""
        first: dict[str, Sample] = {}
        for sample in self.samples:
            first.setdefault(sample.cluster, sample)
        by_length: dict[str, list[Sample]] = {}
        for sample in first.values():
            by_length.setdefault(sample.strata.get("length", ""), []).append(sample)
        rounds = zip_longest(*by_length.values())
        return [sample for each in rounds for sample in each if sample is not None][: self.request.timed]

    def blank(self, sample: Sample, pass_: Pass) -> SampleRecord:
        return SampleRecord(
            id=sample.id,
            pass_=pass_,
            cluster=sample.cluster,
            status="ok",
            template=sample.template,
            strata=dict(sample.strata),
            answer=sample.answer,
            session=SESSION,
        )

    def clips(
        self, sample: Sample, record: SampleRecord, *, timed: bool = False, frames: int | None = None
    ) -> tuple[Clip, ...] | None:
        """Render, decode and note the frames; None when that failed, and the record then says why.

        `frames` is how many at most, when that is another number than the run's.
        """
        if not self.backend.needs_media:
            return ()
        try:
            if self._ahead is not None:
                self.progress.stage("decode video")
                clips, seconds = self._ahead.take(sample)
            else:
                self.progress.stage("render")
                self.suite.materialise(sample)
                self.progress.stage("decode video")
                clips, seconds = self._decode(sample, frames or self.frames, fresh=timed)
        except DecodeTimeout as error:
            _fail(record, "timeout", error)
            return None
        except (DecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
                raise RunError(
                    f"{error.filename or 'The video cache'} cannot be written ({error.strerror}): everything finished is "
                    f"kept; make room or name another folder in VLMBENCH_CACHE, and the same command goes on."
                ) from error
            _fail(record, "decode_error", error)
            return None
        if timed:
            record.timing = Timing(video_s=seconds)
        record.frames = [
            Frame(index, round(time, 6))
            for clip in clips
            for index, time in zip(clip.indices, clip.times_s, strict=True)
        ]
        record.size = (clips[0].frames.shape[1], clips[0].frames.shape[2]) if clips else None
        return clips

    def _decode(self, sample: Sample, frames: int | None, *, fresh: bool) -> tuple[tuple[Clip, ...], float]:
        """Decoded media and the seconds it took. Questions on one video that follow each other share one decoding."""
        key = repr((sample.media, frames))
        if self._last is None or self._last[0] != key or fresh:
            begin = time.perf_counter()
            clips = tuple(
                self.decoder.read(
                    media.path, kind=media.kind, frames=frames, rule=self.sampler, fps=self.fps, fresh=fresh
                )
                for media in sample.media
            )
            self._last = (key, clips, time.perf_counter() - begin)
        return self._last[1], self._last[2]

    def asked(self, sample: Sample, clips: Sequence[Clip]) -> Sample:
        """The sample as it is put to a model that sees these clips."""
        return self.suite.asked(sample, [time for clip in clips if clip.kind == "video" for time in clip.times_s])

    def ask(
        self, method: Method, sample: Sample, clips: Sequence[Clip], pass_: Pass, kernel: str | None = None
    ) -> Outcome:
        with self._faults() as failed:
            asked = self.asked(sample, clips)
            return self.backend.answer(
                method,
                asked,
                asked.question,
                clips,
                pass_=pass_,
                max_new_tokens=self.max_new_tokens,
                kernel=kernel,
            )
        return failed[0]

    def ask_together(
        self, method: Method, samples: Sequence[Sample], clips: Sequence[Clip], kernel: str | None = None
    ) -> list[Outcome]:
        """Several questions on the same media in a latency pass, the next ones behind the first one's prefix."""
        with self._faults() as failed:
            asked = [self.asked(sample, clips) for sample in samples]
            return self.backend.answer_together(
                method,
                asked,
                [sample.question for sample in asked],
                clips,
                max_new_tokens=self.max_new_tokens,
                kernel=kernel,
            )
        return failed

    @contextmanager
    def _faults(self) -> Iterator[list[Outcome]]:
        """A fault of one sample becomes its outcome, put on the list that is handed out."""
        failed: list[Outcome] = []
        try:
            yield failed
        except (RunError, UsageError):
            raise
        except Exception as error:
            if self.request.debug:
                raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            failed.append(Outcome(status="error", error=said))

    def _answer_spec(self, method: Method) -> AnswerSpec:
        request, identity = self.request, self.backend.identity
        return AnswerSpec(
            model=identity.model,
            revision=identity.revision,
            weights_hash=identity.weights_hash,
            method=method.name,
            method_params=params_of(method) | method.fitted(),
            suite=self.suite.name,
            suite_version=self.suite.version,
            suite_params=params_of(self.suite),
            prompt_style="suite",
            frames=self.frames,
            sampler=self.sampler,
            fps=self.fps,
            max_pixels=request.max_pixels,
            min_pixels=request.min_pixels,
            decoder=self.decoder_name if self.backend.needs_media else "none",
            attention=identity.attention,
            dtype=identity.dtype,
            device_type=identity.device_type,
            max_new_tokens=self.max_new_tokens,
            seed=request.seed,
        )

    def _header(self, answer: AnswerSpec, method: Method) -> dict[str, Any]:
        request = self.request
        measure = MeasureSpec(
            mode=request.mode,
            warmup=request.warmup,
            repeats=request.repeats,
            threads=int(self.backend.identity.facts.get("threads", 0)),
            device_name=self.backend.identity.device_name,
        )
        given = {
            field.name: str(value) if isinstance(value, Path) else value
            for field in fields(request)
            if (value := getattr(request, field.name)) != field.default
        }
        sources = [inspect.getsourcefile(type(part)) for part in parts_of(method)]
        code = b"".join(Path(source).read_bytes() for source in sources if source)
        digest = hashlib.sha256(code).hexdigest()[:10] if code else ""
        header = make_header(
            answer,
            measure,
            self.backend.identity,
            given,
            traits=method.traits,
            suite_hash=self.suite.data_hash,
            frame_rule=f"{self.sampler}, {self.frames or 'all'} frames" + (f", {self.fps:g} fps" if self.fps else ""),
        )
        return {**header, "method_hash": digest, **({} if self.suite.scored else {"scored": False})}


def _other_code(store: ResultStore, answer: AnswerSpec, header: Mapping[str, Any]) -> str:
    """A line when what is stored was made by another version of the method's file; it still counts as the same run."""
    folder = store.root / answer.folder
    if not (folder / "header.json").exists():
        return ""
    if read_header(folder).get("method_hash") in (None, header["method_hash"]):
        return ""
    return f"{folder}: its records were made before {answer.method}'s code changed; --fresh starts again."


def _other_data(store: ResultStore, answer: AnswerSpec, header: Mapping[str, Any]) -> str:
    """A line when what is stored was asked on other files or questions under the same names."""
    folder = store.root / answer.folder
    if not (folder / "header.json").exists() or not header["suite_hash"]:
        return ""
    if read_header(folder).get("suite_hash") in (None, "", header["suite_hash"]):
        return ""
    return f"{folder}: its records were made before the data of {answer.suite} changed; --fresh starts again."


def make_suite(text: str) -> Suite:
    """The suite of a spec. Raises `UsageError`."""
    name = text.strip().partition(":")[0]
    bare = getattr(suite_registry.load(name), "bare", None) if name in suite_registry.names() else None
    spec = parse(text, bare)
    return build(suite_registry.load(spec.name), spec, "Suite")


def make_methods(texts: Sequence[str]) -> list[Method]:
    """The method of every spec; two specs that resolve to the same are one method. Raises `UsageError`."""
    found: dict[str, Method] = {}
    for text in texts:
        method = join([build(method_registry.load(spec.name), spec, "Method") for spec in parse_chain(text)])
        found.setdefault(repr(method), method)
    return list(found.values())


def _fail(record: SampleRecord, status: Status, error: BaseException) -> None:
    record.status, record.error = status, " ".join(str(error).split())[:500] or type(error).__name__
