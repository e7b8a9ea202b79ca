"""One ``vlmbench run``: what is missing in the store is computed, pass by pass, sample by sample, and appended at once.

Accuracy keeps a method attached and walks the samples. Latency turns that round: for each video, rounds in which all
methods and the dense baseline take turns in rotating order, so that a drifting machine hits them alike.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from vlmbench.backend import Outcome
from vlmbench.errors import RunError, UsageError
from vlmbench.header import SESSION, make_header
from vlmbench.machine import load_backend
from vlmbench.record import Frame, Pass, SampleRecord, Status, Timing
from vlmbench.registry import methods as method_registry
from vlmbench.registry import suites as suite_registry
from vlmbench.request import RunRequest
from vlmbench.spec import AnswerSpec, MeasureSpec, build, params_of, parse, parse_chain
from vlmbench.store import ResultStore, Run
from vlmbench.suite import Sample, Suite, limited
from vlmbench.video import SAMPLERS, DecodeError, Decoder, DecodeTimeout, default_decoder

if TYPE_CHECKING:
    from vlmbench.method import Method
    from vlmbench.progress import Progress
    from vlmbench.video import Clip

DECODE_TIMEOUT_S = 60.0


@dataclass
class Entry:
    """One method of this command with its open run."""

    method: Method
    run: Run
    asked: bool = True
    """False for the baseline that only comes along."""


def run(request: RunRequest, progress: Progress) -> int:
    """Do what is asked, print the table, and return the exit code. Raises `UsageError` and `RunError`."""
    session = Session(request, progress)
    with session:
        return session.work()


class Session:
    """Everything that is loaded once for one command."""

    def __init__(self, request: RunRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self._open = ExitStack()
        self.suite = make_suite(request.suite)
        self.sampler = request.sampler or self.suite.default_sampler
        if self.sampler not in SAMPLERS:
            raise UsageError(f"--sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}.")
        chosen = make_methods(request.methods)
        asked = {key for key, _ in chosen}
        if request.baseline and "full" not in asked:
            chosen = [*make_methods(("full",)), *chosen]
        self.backend = load_backend(request, request.model or self.suite.default_model)
        for _, method in chosen:
            self.backend.check(method)
            method.fit(self.suite)
        self.frames = request.frames or self.suite.default_frames
        self.decoder_name = default_decoder()
        self.max_new_tokens = request.max_new_tokens or self.suite.max_new_tokens
        self.samples = limited(self.suite.samples("test"), request.limit)
        if not self.samples:
            raise UsageError(f"Suite {request.suite!r} has no samples.")
        self._chosen = [(method, key in asked) for key, method in chosen]
        self._last: tuple[str, tuple[Clip, ...], float] | None = None

    def __enter__(self) -> Session:
        store = ResultStore(self.request.out)
        try:
            self.decoder = self._open.enter_context(Decoder(self.decoder_name, timeout_s=DECODE_TIMEOUT_S))
            self.entries = []
            for method, asked in self._chosen:
                answer = self._answer_spec(method)
                header = self._header(answer, method)
                opened = self._open.enter_context(store.open(answer, header, fresh=self.request.fresh))
                if opened.repaired:
                    self.progress.note(opened.repaired)
                self.entries.append(Entry(method, opened, asked))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.__exit__(*exception)  # type: ignore[arg-type]

    def work(self) -> int:
        identity = self.backend.identity
        self.progress.note(
            f"{identity.model} on {identity.device_name} ({identity.dtype}, {identity.attention_kernel}), "
            f"{self.suite.name}: {len(self.samples)} questions, {self.frames or 'all'} frames ({self.sampler}, "
            f"{self.decoder_name}), results in {self.request.out}"
        )
        if "accuracy" in self.request.passes:
            for entry in self.entries:
                self._accuracy(entry)
        if "latency" in self.request.passes:
            self._latency()
        if "memory" in self.request.passes:
            for entry in self.entries:
                self._memory(entry)
        return self._conclude()

    # -- passes -------------------------------------------------------------------------------------------------------

    def _accuracy(self, entry: Entry) -> None:
        done = entry.run.done("accuracy")
        missing = [sample for sample in self.samples if sample.id not in done]
        if not missing:
            return
        with self.backend.attach(entry.method):
            for sample in self._each(missing, f"accuracy · {entry.method.name}"):
                entry.run.append(self._scored(entry.method, sample))

    def _scored(self, method: Method, sample: Sample) -> SampleRecord:
        record = self._blank(sample, "accuracy")
        clips = self._clips(sample, record)
        if clips is None:
            return record
        self.progress.stage("answer")
        outcome = self._ask(method, sample, clips, "accuracy")
        record = _filled(record, outcome)
        record.output_ids, record.raw_text = outcome.output_ids, outcome.raw_text
        record.first_token, record.work, record.trace = outcome.first_token, outcome.work, outcome.trace
        if outcome.status == "ok":
            score = self.suite.score(sample, outcome.raw_text)
            record.score, record.prediction = score.value, score.prediction
            record.status = "ok" if score.prediction is not None else "parse_fail"
        return record

    def _latency(self) -> None:
        entries = [entry for entry in self.entries if entry.method.traits.uses_model]
        timed = self._timed()
        full = next((e.method for e in entries if e.method.name == "full"), make_methods(("full",))[0][1])
        missing = [s for s in timed if any(s.id not in entry.run.done("latency") for entry in entries)]
        if not missing:
            return
        best = self.backend.best_dense_kernel()
        same = self.backend.identity.attention
        runners: dict[str, tuple[Method, str | None]] = {"best": (full, best)}
        if same != best:
            runners["same"] = (full, same)
        runners |= {str(i): (entry.method, None) for i, entry in enumerate(entries) if entry.method.name != "full"}
        names = list(runners)
        for sample in self._each(missing, "latency"):
            blank = self._blank(sample, "latency")
            clips = self._clips(sample, blank, timed=True)
            rounds: dict[str, list[Timing]] = {name: [] for name in names}
            failed: dict[str, Outcome] = {}
            for turn in range(self.request.warmup + self.request.repeats if clips is not None else 0):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    if name in failed or clips is None:
                        continue
                    method, kernel = runners[name]
                    self.progress.stage(f"{method.name}, round {turn + 1}")
                    with self.backend.attach(method):
                        outcome = self._ask(method, sample, clips, "latency", kernel)
                    if outcome.status != "ok" or outcome.timing is None:
                        failed[name] = outcome
                    elif turn >= self.request.warmup:
                        video_s = blank.timing.video_s if blank.timing else 0.0
                        rounds[name].append(
                            replace(outcome.timing, video_s=video_s, e2e_s=outcome.timing.e2e_s + video_s)
                        )
            for i, entry in enumerate(entries):
                if sample.id in entry.run.done("latency"):
                    continue
                own = str(i) if entry.method.name != "full" else ("same" if same != best else "best")
                record = replace(blank, timing=None)
                if own in failed:
                    record = _filled(record, failed[own])
                elif rounds[own]:
                    record.rounds, record.timing = rounds[own], median_timing(rounds[own])
                    record.baseline_rounds = rounds["best"]
                    record.same_kernel_rounds = rounds.get("same", [])
                entry.run.append(record)

    def _memory(self, entry: Entry) -> None:
        if not entry.method.traits.uses_model:
            return
        done = entry.run.done("memory")
        missing = [sample for sample in self._timed() if sample.id not in done]
        if not missing:
            return
        with self.backend.attach(entry.method):
            for sample in self._each(missing, f"memory · {entry.method.name}"):
                record = self._blank(sample, "memory")
                clips = self._clips(sample, record)
                if clips is not None:
                    outcome = self._ask(entry.method, sample, clips, "memory")
                    record = _filled(record, outcome)
                    record.memory = outcome.memory
                entry.run.append(record)

    def _conclude(self) -> int:
        from vlmbench import report

        runs = [entry.run for entry in self.entries]
        for each in runs:
            each.finish("done")
        rows = report.rows(runs)
        self.progress.finish()
        if rows:
            print(report.to_markdown(rows))
        failed = sum(
            record.status not in ("ok", "parse_fail") for entry in self.entries for record in entry.run.records.values()
        )
        for entry in self.entries:
            self._refuse_if_idle(entry)
        return 1 if failed and self.request.strict else 0

    def _refuse_if_idle(self, entry: Entry) -> None:
        """A method that had nothing to do on every sample was compared with itself: that is an error, not a result."""
        records = [r for r in entry.run.records.of("accuracy").values() if r.status in ("ok", "parse_fail")]
        if records and not any(record.applied for record in records):
            raise RunError(
                f"{entry.method.name} had nothing to do on any of {len(records)} samples ({records[-1].reason}); "
                f"choose other parameters or a suite that it can act on."
            )

    # -- one sample -----------------------------------------------------------------------------------------------------

    def _each(self, samples: Sequence[Sample], what: str) -> Iterator[Sample]:
        self.progress.start(len(samples), what)
        for sample in samples:
            yield sample
            self.progress.advance()

    def _timed(self) -> list[Sample]:
        """The first question of each video, as many videos as are to be timed."""
        first: dict[str, Sample] = {}
        for sample in self.samples:
            first.setdefault(sample.cluster, sample)
        return list(first.values())[: self.request.timed]

    def _blank(self, sample: Sample, pass_: Pass) -> SampleRecord:
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

    def _clips(self, sample: Sample, record: SampleRecord, *, timed: bool = False) -> tuple[Clip, ...] | None:
        """Render, decode and note the frames; None when that failed, and the record then says why."""
        if not self.backend.needs_media:
            return ()
        try:
            self.progress.stage("render")
            self.suite.materialise(sample)
            self.progress.stage("decode video")
            clips, seconds = self._decode(sample, fresh=timed)
        except DecodeTimeout as error:
            _fail(record, "timeout", error)
            return None
        except (DecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RunError(
                    f"The disk that holds {error.filename or 'the video cache'} is full: everything finished is kept; "
                    f"free some space, and the same command goes on."
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

    def _decode(self, sample: Sample, *, fresh: bool) -> tuple[tuple[Clip, ...], float]:
        """Decoded media and the seconds it took. Questions on one video that follow each other share one decoding."""
        key = repr(sample.media)
        if self._last is None or self._last[0] != key or fresh:
            begin = time.perf_counter()
            clips = tuple(
                self.decoder.read(
                    media.path, kind=media.kind, frames=self.frames, rule=self.sampler, fps=self.request.fps
                )
                for media in sample.media
            )
            self._last = (key, clips, time.perf_counter() - begin)
        return self._last[1], self._last[2]

    def _ask(
        self, method: Method, sample: Sample, clips: Sequence[Clip], pass_: Pass, kernel: str | None = None
    ) -> Outcome:
        try:
            return self.backend.answer(
                method,
                sample,
                self.suite.prompt(sample),
                clips,
                pass_=pass_,
                max_new_tokens=self.max_new_tokens,
                kernel=kernel,
            )
        except (RunError, UsageError):
            raise
        except Exception as error:
            if self.request.debug:
                raise
            return Outcome(status="error", error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")

    # -- what is written about the run ------------------------------------------------------------------------------------

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
            fps=request.fps,
            max_pixels=request.max_pixels,
            min_pixels=request.min_pixels,
            decoder=self.decoder_name if self.backend.needs_media else "none",
            attention=identity.attention,
            dtype=identity.dtype,
            device_type=identity.device_type,
            max_new_tokens=self.max_new_tokens,
            seed=request.seed,
        )

    def _header(self, answer: AnswerSpec, method: Method) -> dict[str, object]:
        request = self.request
        measure = MeasureSpec(
            mode=request.mode,
            warmup=request.warmup,
            repeats=request.repeats,
            threads=int(self.backend.identity.facts.get("threads", 0)),
            device_name=self.backend.identity.device_name,
        )
        given = {
            name: str(value) if name in ("out", "data_root") else value
            for name, value in vars(request).items()
            if value is not None
        }
        return make_header(
            answer,
            measure,
            self.backend.identity,
            given,
            traits=method.traits,
            frame_rule=f"{self.sampler}, {self.frames or 'all'} frames",
        )


def make_suite(text: str) -> Suite:
    """The suite of a spec. Raises `UsageError`."""
    spec = parse(text)
    return build(suite_registry.load(spec.name), spec, "Suite")


def make_methods(texts: Sequence[str]) -> list[tuple[str, Method]]:
    """(spec as resolved, method) of every spec, each once. Raises `UsageError`."""
    found: dict[str, Method] = {}
    for text in texts:
        chain = parse_chain(text)
        if len(chain) > 1:
            raise UsageError(f"{text!r} joins methods with +, which is not possible yet; give one --method for each.")
        method = build(method_registry.load(chain[0].name), chain[0], "Method")
        found.setdefault(repr(method) if method.name != "full" else "full", method)
    return list(found.items())


def median_timing(rounds: Sequence[Timing]) -> Timing:
    """Field by field, step by step: the median over the rounds."""
    scalars = {
        name: median(getattr(each, name) for each in rounds)
        for name in Timing.__dataclass_fields__
        if name != "decode_s"
    }
    steps = zip(*(each.decode_s for each in rounds), strict=True)
    return Timing(decode_s=tuple(median(step) for step in steps), **scalars)


def _fail(record: SampleRecord, status: Status, error: BaseException) -> None:
    record.status, record.error = status, " ".join(str(error).split())[:500] or type(error).__name__


def _filled(record: SampleRecord, outcome: Outcome) -> SampleRecord:
    """The record with what every pass notes of an outcome."""
    return replace(
        record,
        status=outcome.status,
        error=outcome.error,
        applied=outcome.applied,
        reason=outcome.reason,
        tokens=outcome.tokens,
        timing=None,
    )
