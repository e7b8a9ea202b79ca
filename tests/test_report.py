"""A table says what the records say: who is compared with whom, on which samples, and what is left out."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jsonschema
import pytest

from vlmbench.backend import Identity
from vlmbench.header import make_header
from vlmbench.method import Traits
from vlmbench.record import UNREAD, Frame, Memory, Pass, SampleRecord, Timing
from vlmbench.report import COLUMNS, Rows, rows, to_csv, to_json, to_markdown
from vlmbench.rescore import Rescored, rescore_run
from vlmbench.spec import AnswerSpec, MeasureSpec
from vlmbench.store import ResultStore
from vlmbench.suite import Sample, Score, Suite

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "table.schema.json"
SPEC = AnswerSpec(
    model="tiny-llava-ov",
    revision=None,
    weights_hash="w",
    method="full",
    method_params={},
    suite="colours",
    suite_version="1",
    suite_params={"length": 32, "type": None},
    prompt_style="default",
    frames=None,
    sampler="endpoints",
    fps=None,
    max_pixels=None,
    min_pixels=None,
    decoder="none",
    attention="sdpa",
    dtype="bfloat16",
    device_type="cuda",
    max_new_tokens=4,
    seed=0,
)
MEASURE = MeasureSpec(mode="all", warmup=1, repeats=3, threads=2, device_name="GPU")
BASE = Timing(vision_s=1, prepare_s=0.5, prefill_s=4, decode_s=(0.5, 0.5), other_s=0.5, ttft_s=5.5, e2e_s=7)
ACCURACY: Pass = "accuracy"


def fill(
    store: ResultStore,
    records: Sequence[SampleRecord],
    traits: Traits | None = None,
    stand_in: bool = False,
    **spec: Any,
) -> None:
    """Store one run; `spec` replaces fields of SPEC."""
    answer = dataclasses.replace(SPEC, **spec)
    facts = {"stand_in": True} if stand_in else {}
    names = (answer.model, None, "w", answer.dtype, answer.device_type, "GPU", "sdpa", "flash", "efficient", facts)
    header = make_header(answer, MEASURE, Identity(*names), {}, traits=traits or Traits())
    with store.open(answer, header) as run:
        for each in records:
            run.append(each)


def answered(scores: Sequence[float | str], visual: int = 100, **more: Any) -> list[SampleRecord]:
    """Accuracy records s0, s1, …, each its own cluster: a score, or the status of a sample that has none."""
    found = []
    for number, score in enumerate(scores):
        known: dict[str, Any] = {"status": score} if isinstance(score, str) else {"status": "ok", "score": score}
        known |= {"prediction": f"answer {score}", "tokens": {"prompt": visual + 9, "visual": visual}, **more}
        found.append(SampleRecord(id=f"s{number}", pass_=ACCURACY, cluster=f"v{number}", **known))
    return found


def timed(rounds: Sequence[Timing], baseline: Sequence[Timing], n: int = 8, **more: Any) -> list[SampleRecord]:
    fields: dict[str, Any] = {
        "status": "ok",
        "timing": rounds[0],
        "rounds": list(rounds),
        "baseline_rounds": list(baseline),
    }
    latency: Pass = "latency"
    return [SampleRecord(id=f"s{i}", pass_=latency, cluster=f"v{i}", **fields | more) for i in range(n)]


def scaled(timing: Timing, factor: float) -> Timing:
    values = dataclasses.asdict(timing)
    parts: dict[str, Any] = {
        k: tuple(x / factor for x in v) if k == "decode_s" else v / factor for k, v in values.items()
    }
    return Timing(**parts)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs")


def table(store: ResultStore) -> dict[str, dict[str, Any]]:
    """Rows by method."""
    return {row["method"]: row for row in rows(store.root)}


def test_the_columns_are_those_of_the_contract() -> None:
    speedups = " ".join(
        f"speedup_{span} speedup_{span}_low speedup_{span}_high speedup_{span}_same_kernel"
        for span in ("vision", "prefill", "ttft", "decode", "e2e")
    )
    assert " ".join(COLUMNS) == (
        "model suite method params baseline n n_failed n_paired n_inactive frames n_visual_tokens accuracy accuracy_low "
        "accuracy_high accuracy_delta accuracy_delta_low accuracy_delta_high mcnemar_p detectable_delta agreement "
        "first_token_match first_token_kl greedy_prefix recall video_s preprocess_s vision_s "
        f"prepare_s prefill_s ttft_s decode_s_per_token e2e_s {speedups} amdahl_prefill amdahl_e2e peak_bytes "
        "peak_extra_bytes kv_bytes flops device dtype attention_kernel vision_attention_kernel marks "
        "n_kept_tokens vision_flops vision_dense_flops"
    )


# Accuracy.


def test_a_sample_that_did_not_finish_is_wrong(store: ResultStore) -> None:
    fill(store, answered([1.0, 1.0, 1.0, "oom", "error", "parse_fail"]))
    row = table(store)["full"]
    assert (row["n"], row["n_failed"], row["accuracy"]) == (6, 2, 0.5)
    assert 0 < row["accuracy_low"] < 0.5 < row["accuracy_high"] < 1


def test_a_difference_is_taken_over_what_both_finished(store: ResultStore) -> None:
    fill(store, answered([1.0, 1.0, 0.0, "oom"]))
    fill(store, answered([1.0, 0.0, "timeout", 1.0]), method="turbo")
    row = table(store)["turbo"]
    assert (row["baseline"], row["n"], row["n_paired"]) == ("full", 4, 2)
    assert row["accuracy_delta"] == -0.5
    assert row["agreement"] == 0.5
    assert row["accuracy"] == 0.5
    assert table(store)["full"]["accuracy_delta"] is None


def test_two_unreadable_answers_agree_only_when_their_texts_do(store: ResultStore) -> None:
    fill(store, answered(["parse_fail"] * 2, prediction=None, raw_text="mumble"))
    fill(store, answered(["parse_fail"] * 2, prediction=None, raw_text="mumble"), method="same")
    fill(store, answered(["parse_fail"] * 2, prediction=None, raw_text="grumble"), method="other")
    assert (table(store)["same"]["agreement"], table(store)["other"]["agreement"]) == (1, 0)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"weights_hash": "x"}, {"frames": 8}, {"suite_version": "2"}, {"dtype": "float32"}]
)
def test_only_runs_that_differ_in_nothing_but_the_method_are_compared(
    store: ResultStore, change: dict[str, Any]
) -> None:
    fill(store, answered([1.0]))
    fill(store, answered([1.0]), method="turbo", **change)
    assert table(store)["turbo"]["baseline"] is None
    assert table(store)["turbo"]["accuracy_delta"] is None


def test_runs_on_other_data_under_the_same_names_are_not_compared(store: ResultStore) -> None:
    fill(store, answered([1.0]))
    fill(store, answered([1.0]), method="turbo")
    path = next(each for each in store.root.rglob("header.json") if "turbo" in str(each))
    path.write_text(path.read_text().replace('"suite_hash": ""', '"suite_hash": "other"'))
    assert table(store)["turbo"]["baseline"] is None


def test_without_an_accuracy_pass_there_is_no_accuracy_but_a_count(store: ResultStore) -> None:
    fill(store, timed([BASE], [BASE], n=3))
    row = table(store)["full"]
    assert (row["n"], row["accuracy"], row["e2e_s"]) == (3, None, 7)


def test_a_run_without_records_is_an_empty_row(store: ResultStore) -> None:
    fill(store, [])
    assert table(store)["full"]["n"] == 0
    assert "| 0 |" in to_markdown(rows(store.root))


# Speed.


def test_a_speedup_is_the_median_of_paired_rounds(store: ResultStore) -> None:
    # The machine slows down three times in the second round for both: the pair still says 2.
    rounds = [scaled(BASE, 2), scaled(BASE, 2 / 3), scaled(BASE, 2)]
    fill(store, timed(rounds, [BASE, scaled(BASE, 1 / 3), BASE]), method="turbo")
    row = table(store)["turbo"]
    for span in ("vision", "prefill", "ttft", "decode", "e2e"):
        assert (
            row[f"speedup_{span}"]
            == row[f"speedup_{span}_low"]
            == row[f"speedup_{span}_same_kernel"]
            == pytest.approx(2)
        )
    assert row["decode_s_per_token"] == 0.25
    assert row["baseline"] == "full"


def test_the_same_kernel_has_a_column_of_its_own(store: ResultStore) -> None:
    own = [scaled(BASE, 2)]
    fill(store, timed(own, [BASE], same_kernel_rounds=[scaled(BASE, 0.5)]), method="turbo")
    row = table(store)["turbo"]
    assert (row["speedup_prefill"], row["speedup_prefill_same_kernel"]) == (pytest.approx(2), pytest.approx(4))


def test_a_span_that_took_no_time_has_no_speedup(store: ResultStore) -> None:
    fill(store, timed([dataclasses.replace(BASE, vision_s=0)], [BASE]), method="blind")
    row = table(store)["blind"]
    assert (row["speedup_vision"], row["speedup_prefill"]) == (None, 1)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("n_inactive", "shown"), [(1, True), (2, False)])
def test_no_speedup_is_shown_when_the_method_mostly_did_nothing(
    store: ResultStore, n_inactive: int, shown: bool, joined: bool
) -> None:
    """Nor when one of joined methods did nothing: the row would be the other's alone."""
    records = answered([1.0] * 10)
    for each in records[:n_inactive]:
        each.applied = joined
        each.trace = {"idle": {"pevlm": "one block: equals full attention"}} if joined else None
    fill(store, [*records, *timed([scaled(BASE, 2)], [BASE])], method="turbo")
    row = table(store)["turbo"]
    assert row["n_inactive"] == n_inactive
    assert (row["speedup_e2e"] is not None) == shown
    assert ("inactive>10%" in row["marks"]) != shown


@pytest.mark.parametrize("often", [3, 2])
def test_a_joined_method_of_which_a_part_never_acted_is_named(store: ResultStore, often: int) -> None:
    records = answered([1.0] * 3)
    for each in records[:often]:
        each.trace = {"idle": {"pevlm": "one block: equals full attention"}}
    fill(store, records, method="turbo+pevlm")
    said = "turbo+pevlm: pevlm had nothing to do on any sample (one block: equals full attention); the row is of what is left"
    assert (said in rows(store.root).notes) == (often == 3)
    from vlmbench import layouts

    fill(store, answered([1.0] * 3))
    (laid,) = layouts.tables(store.root, "efficiency")
    assert (said in laid.notes) == (often == 3)


def test_videos_of_several_lengths_have_no_one_budget_and_the_table_says_so(store: ResultStore) -> None:
    def records(share: float) -> list[SampleRecord]:
        found = answered([1.0] * 4)
        for number, each in enumerate(found):
            each.frames, each.tokens = [Frame(0, 0.0)] * (4 + number % 2), {"prompt": 110, "visual": 100}
            each.work = {"flops": int(1000 * share), "attention_flops": 500, "visual_tokens": 100 * share}
        return found

    fill(store, records(1))
    fill(store, records(0.5), method="turbo")
    (said,) = [note for note in rows(store.root).notes if "no one budget" in note]
    assert "its videos have several lengths" in said
    assert "at the budget of turbo; " in said
    fill(store, records(0.5), method="uniform")
    assert not [note for note in rows(store.root).notes if "no one budget" in note]


@pytest.mark.parametrize(
    ("stages", "bound"), [({"prefill"}, 7 / 3), ({"prompt"}, 7 / 2), ({"decode", "vision"}, 7 / 5), (set(), None)]
)
def test_amdahls_bound_is_what_is_left_when_the_touched_spans_vanish(
    store: ResultStore, stages: set[str], bound: float | None
) -> None:
    fill(store, timed([scaled(BASE, 2)], [BASE]), Traits(stages=frozenset(stages)), method="turbo")
    assert table(store)["turbo"]["amdahl_e2e"] == (None if bound is None else pytest.approx(bound))


def test_the_bound_on_prefill_comes_from_attentions_share_of_flops(store: ResultStore) -> None:
    prefill = Traits(stages=frozenset({"prefill"}))
    fill(store, answered([1.0], work={"flops": 100, "attention_flops": 60}))
    fill(store, answered([1.0], work={"flops": 50, "attention_flops": 10}), prefill, method="pevlm")
    fill(store, answered([1.0], work={"flops": 50, "attention_flops": 30}), prefill, method="drops-tokens")
    assert table(store)["pevlm"]["amdahl_prefill"] == pytest.approx(2.5)
    assert table(store)["drops-tokens"]["amdahl_prefill"] is None
    assert table(store)["pevlm"]["flops"] == 50


def test_memory_is_the_largest_peak_and_the_median_cache(store: ResultStore) -> None:
    memory: Pass = "memory"
    fill(store, [SampleRecord(f"s{i}", memory, "v", "ok", memory=Memory(10 * i, i, i)) for i in (1, 2, 9)])
    row = table(store)["full"]
    assert (row["peak_bytes"], row["peak_extra_bytes"], row["kv_bytes"]) == (90, 9, 2)


# Marks.


def test_a_method_below_a_trivial_one_at_no_larger_budget_is_marked(store: ResultStore) -> None:
    right, half, close = [1.0] * 40, [1.0, 0.0] * 20, [1.0, 0.0] * 19 + [1.0, 1.0]
    fill(store, answered(half, visual=100))
    fill(store, answered(half, visual=50), method="turbo")
    fill(store, answered(right, visual=60), method="random")  # at a larger budget
    fill(store, answered(close, visual=50), method="downsample")  # by one answer of 40: inside the error
    assert table(store)["turbo"]["marks"] == []
    fill(store, answered(right, visual=50), method="uniform")
    fill(store, answered(half, visual=0), method="blind")
    marked = {method for method, row in table(store).items() if "below-trivial" in row["marks"]}
    assert marked == {"turbo"}  # not the baseline, nor a reference


def test_marks_tell_the_device_and_the_kind_of_method(store: ResultStore) -> None:
    fill(store, answered([1.0]), Traits(masked=True, trained=True), device_type="cpu")
    assert table(store)["full"]["marks"] == ["cpu", "masked", "trained"]


def test_a_run_that_is_still_open_gives_the_row_that_it_will_give(store: ResultStore) -> None:
    fill(store, answered([1.0, 0.0]), method_params={"layers": (1, 2)})
    (view,) = store.runs()
    with store.open(dataclasses.replace(SPEC, method_params={"layers": (1, 2)}), {**view.header}) as run:
        run.header["spec"]["method_params"] = {"layers": (1, 2)}  # as before its way through JSON
        assert rows([run]) == rows(store.root)


def test_the_stand_in_never_enters_a_table(store: ResultStore) -> None:
    fill(store, answered([1.0]), stand_in=True, model="dummy")
    assert rows(store.root) == []
    assert "No results." in to_markdown(rows(store.root))
    assert len(rows(store.root, include_dummy=True)) == 1


# Formats.


@pytest.fixture
def full_rows(store: ResultStore) -> Rows:
    fill(store, [*answered([1.0] * 9 + [0.0]), *timed([BASE], [BASE])])
    speedy = timed([scaled(BASE, 1.234)], [BASE])
    traits = Traits(stages=frozenset({"prefill"}))
    params = {"r": 8, "mode": "drop", "layers": (1, 2), "late": True, "scale": None}
    fill(store, [*answered([1.0] * 8 + [0.0, "oom"]), *speedy], traits, method="turbo", method_params=params)
    return rows(store.root)


def test_json_has_every_column_and_fits_its_schema(full_rows: Rows) -> None:
    found = json.loads(to_json(full_rows))
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    assert found["rows"] == [dict(row) for row in full_rows]


def test_csv_has_the_same_numbers_unrounded(full_rows: Rows) -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(full_rows))))
    assert tuple(read[0]) == COLUMNS
    for line, row in zip(read, full_rows, strict=True):
        expected = {**row, "marks": " ".join(row["marks"])}
        assert line == {name: "" if value is None else str(value) for name, value in expected.items()}


def test_markdown_is_rounded_with_intervals_and_without_empty_columns(full_rows: Rows) -> None:
    text = to_markdown(full_rows)
    assert "**tiny-llava-ov** on **colours:length=32**" in text
    assert "| `turbo:r=8,mode=drop,layers=1/2,late=on` | 10 (1 failed) | 100 | 0.80 [0.49, 0.94] | -0.11 [" in text
    assert "| 1.23× [1.23, 1.23] |" in text
    assert "| 1.23× [1.23, 1.23] of at most 2.33× |" in text
    assert "KV" not in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_notes_tell_how_the_figures_were_made(full_rows: Rows) -> None:
    text = "\n".join(full_rows.notes)
    for fact in (
        "best dense kernel",
        "attention flash",
        "rounds after 1 of warm-up",
        "frames by endpoints",
        "python 3",
    ):
        assert fact in text
    assert len([note for note in full_rows.notes if note.startswith("GPU")]) == 1  # once, though two runs


def test_notes_tell_what_is_missing(store: ResultStore) -> None:
    fill(store, answered([1.0, 1.0]))
    (view,) = store.runs()
    with pytest.raises(KeyboardInterrupt), store.open(SPEC, view.header) as run:  # noqa: PT012
        run.append(answered([1.0, 1.0, 1.0])[2])
        raise KeyboardInterrupt
    path = view.folder / "samples.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"s0"', b'"s9"'))
    notes = rows(store.root).notes
    assert f"{view.folder.name}: not complete (interrupted)" in notes
    assert f"{view.folder.name}: 1 damaged lines are left out" in notes


def test_a_table_reads_only_what_it_needs_and_says_the_same(store: ResultStore) -> None:
    """Frames are counted and not read, also beside texts and traces that look like them; nothing else is another."""
    work = {"tokens": [9, 9], "pairs": [45, 45], "neurons": [8, 8], "flops": 7, "attention_flops": 3}
    evil = '","frames":[{"index":1}],"size":null,"work":{"tokens":[1],"pairs":[2],"neurons":[3]'
    trace = {"kept": {"a": [[0, 1]], "frames": [[2, 3]]}, "frames": [{"a": 1}], "tokens": [1, 2]}
    shown = [Frame(index, index / 2) for index in range(3)]
    token = {"ids": [1, 2], "logprobs": [-0.1, -2.5], "tail": None}
    more: dict[str, Any] = {"work": work, "trace": trace, "first_token": token, "frames": shown, "size": (4, 6)}
    records = [*answered([1.0, 0.0], raw_text=evil, **more), *timed([BASE], [BASE])]
    fill(store, records)
    (whole,), (skimmed,) = store.runs(), store.runs(skim=True)
    for key, record in whole.records.items():
        other = skimmed.records[key]
        assert len(other.frames) == len(record.frames)
        assert set(other.frames) <= {UNREAD}
        assert other == dataclasses.replace(
            record,
            frames=other.frames,
            work=record.work and {**record.work, "tokens": [], "pairs": [], "neurons": []},
        )
    assert rows([whole]) == rows([skimmed]) == rows(store.root)


# Scoring again.


@dataclass(frozen=True)
class Colours(Suite):
    """Two questions; the scorer reads a word, upper case only once it is `mended`."""

    name: ClassVar[str] = "colours"
    version: ClassVar[str] = "1"
    default_model: ClassVar[str] = "dummy"
    mended: bool = False

    def samples(self, split: Literal["test", "train"] = "test") -> Sequence[Sample]:
        return [Sample(f"s{i}", f"v{i}", (), "Which colour?", "red", "colour") for i in range(3)]

    def materialise(self, sample: Sample) -> None: ...

    def score(self, sample: Sample, text: str) -> Score:
        text = text.lower() if self.mended else text
        return Score(float(text == sample.answer), text if text.islower() else None)


class Mended(Colours):
    version: ClassVar[str] = "2"


def test_scoring_again_changes_what_the_scorer_now_reads_and_a_second_time_nothing(store: ResultStore) -> None:
    records = answered(["parse_fail", 0.0, "oom", 0.0], prediction=None, answer="red", raw_text="RED")
    records[1] = dataclasses.replace(records[1], prediction="blue", raw_text="blue")
    fill(store, records)
    (view,) = store.runs()
    for changed in (1, 0):
        with store.reopen(view) as run:
            assert rescore_run(run, Mended(mended=True)) == Rescored(checked=2, changed=changed, unknown=1)
    (view,) = store.runs()
    assert view.records["s0", "accuracy"].status == "ok"
    assert view.records["s2", "accuracy"].status == "oom"
    assert [each["changed"] for each in view.header["rescored"]] == [1]
    assert table(store)["full"]["accuracy"] == 0.25


def test_scores_of_two_scorers_are_not_compared(store: ResultStore) -> None:
    fill(store, answered([1.0], prediction="red", answer="red", raw_text="red"))
    fill(store, answered([1.0], prediction="red", answer="red", raw_text="red"), method="turbo")
    assert table(store)["turbo"]["baseline"] == "full"
    views: Mapping[str, Any] = {view.header["spec"]["method"]: view for view in store.runs()}
    for method, baseline in (("turbo", None), ("full", "full")):
        with store.reopen(views[method]) as run:
            rescore_run(run, Mended())
        assert table(store)["turbo"]["baseline"] == baseline


def test_a_table_leaves_the_garbage_collector_as_it_found_it(tmp_path: Path) -> None:
    frozen = gc.get_freeze_count()
    fill(ResultStore(tmp_path), answered([1.0]))
    rows(tmp_path)
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, frozen)
