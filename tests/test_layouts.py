"""A layout shows the figures of the plain table, compares only what is alike, and calls best only what is proved best."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.test_report import BASE, answered, fill, scaled, timed
from vlmbench.laid_out import Table
from vlmbench.laid_text import escape, to_latex
from vlmbench.layouts import NAMES, tables
from vlmbench.method import Traits
from vlmbench.record import Memory, SampleRecord
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "layout.schema.json"
GOOD, FAIR, POOR = [1.0] * 90 + [0.0] * 10, [1.0] * 70 + [0.0] * 30, [1.0] * 40 + [0.0] * 60


def method(store: ResultStore, name: str, scores: Any, factor: float = 1.0, visual: int = 100, **spec: Any) -> None:
    """One run with accuracy and times; `factor` times as fast as full attention."""
    records = [*answered(scores, visual=visual), *timed([scaled(BASE, factor)], [BASE])]
    fill(store, records, method=name, **spec)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how well an interval is known."""
    monkeypatch.setattr("vlmbench.stats.RESAMPLES", 200)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs")


@pytest.fixture
def filled(store: ResultStore) -> ResultStore:
    """Full attention and four methods, two of them at a quarter of the tokens."""
    method(store, "full", GOOD)
    method(store, "pevlm", GOOD, 2.0)
    method(store, "block", FAIR, 3.0)
    method(store, "turbo", FAIR, 4.0, visual=25)
    method(store, "random", POOR, 4.0, visual=25)
    return store


def only(store: ResultStore, layout: str) -> Table:
    (table,) = tables(store.root, layout)
    return table


def lines(table: Table) -> dict[str, Any]:
    return {line.method: line for band in table.bands for line in band.lines}


def bands(table: Table) -> dict[str, list[str]]:
    return {band.title: [line.method for line in band.lines] for band in table.bands}


# What is shown.


def test_bands_are_the_visual_tokens_that_are_left_and_full_attention_stands_above(filled: ResultStore) -> None:
    for layout in ("efficiency", "image-retention", "video-retention"):
        assert bands(only(filled, layout)) == {
            "Full attention, 100 visual tokens (100 %)": ["full"],
            "All 100 visual tokens": ["block", "pevlm"],
            "Retain 25 visual tokens (25 %, ↓ 75 %)": ["random", "turbo"],
        }


def test_trained_methods_have_a_band_of_their_own(filled: ResultStore) -> None:
    fill(filled, answered(GOOD, visual=25), Traits(trained=True), method="memvp")
    found = bands(only(filled, "efficiency"))
    assert found["Retain 25 visual tokens (25 %, ↓ 75 %), training-free"] == ["random", "turbo"]
    assert found["Retain 25 visual tokens (25 %, ↓ 75 %), trained"] == ["memvp"]
    for layout in ("efficiency", "image-retention", "video-retention", "models-as-bands", "scaling"):
        assert all("memvp" not in band or band == ["memvp"] for band in bands(only(filled, layout)).values())


def test_the_average_is_relative_to_full_attention_and_over_all_suites(filled: ResultStore) -> None:
    other: dict[str, Any] = {"suite": "shapes", "suite_version": "7", "frames": 4}
    method(filled, "full", FAIR, **other)
    method(filled, "pevlm", POOR, **other)
    for layout in ("image-retention", "video-retention", "models-as-bands"):
        cells = {name: line.cells for name, line in lines(only(filled, layout)).items()}
        assert cells["pevlm"]["accuracy_share"].value == pytest.approx((90 / 90 + 40 / 70) / 2)
        assert cells["pevlm"]["accuracy:shapes:length=32"].value == 0.4
        assert cells["block"]["accuracy:shapes:length=32"].value is None
        assert cells["block"]["accuracy_share"].value is None  # one suite of two is no average


def test_models_are_bands_and_lengths_are_columns(filled: ResultStore) -> None:
    method(filled, "full", GOOD, visual=400, frames=64)
    method(filled, "pevlm", GOOD, 8.0, visual=400, frames=64)
    table = only(filled, "scaling")
    assert [column.group for column in table.columns[::2]] == ["100 tokens", "400 tokens"]
    keys = [column.key for column in table.columns if column.key.startswith("speedup")]
    assert [lines(table)["pevlm"].cells[key].value for key in keys] == pytest.approx([2, 8])
    assert [lines(table)["turbo"].cells[key].value for key in keys] == [pytest.approx(4), None]


def test_models_are_bands(filled: ResultStore) -> None:
    method(filled, "full", GOOD, model="other", weights_hash="x", visual=50)
    method(filled, "pevlm", FAIR, model="other", weights_hash="x", visual=50)
    assert bands(only(filled, "models-as-bands")) == {
        "other, 50 visual tokens": ["full", "pevlm"],
        "tiny-llava-ov, 100 visual tokens": ["full", "block", "pevlm", "random", "turbo"],
    }


def test_out_of_memory_is_said_and_partial_coverage_too(filled: ResultStore) -> None:
    records = [SampleRecord(f"s{i}", "latency", f"v{i}", "oom") for i in range(8)]
    fill(filled, [*answered(["oom"] * 100), *records], method="star")
    fill(filled, answered([*GOOD[:99], "timeout"]), method="ape")
    table = only(filled, "efficiency")
    shown = {
        name: {column.key: column.shown(line.cells[column.key]) for column in table.columns}
        for name, line in lines(table).items()
    }
    assert (shown["star"]["e2e_s"], shown["star"]["accuracy"]) == ("OOM", "OOM")
    assert (shown["ape"]["e2e_s"], shown["ape"]["accuracy"]) == ("—", "90.0 (99% done)")


def test_what_was_never_asked_did_not_run_out_of_memory(filled: ResultStore) -> None:
    fill(filled, [SampleRecord(f"s{i}", "latency", f"v{i}", "oom") for i in range(8)], method="star")
    (line,) = (each for name, each in lines(only(filled, "video-retention")).items() if name == "star")
    assert line.cells["tokens_per_s"].oom
    assert not line.cells["accuracy:colours:length=32"].oom


# What is called best.


def test_best_is_only_what_beats_the_next_by_more_than_the_error(filled: ResultStore) -> None:
    found = lines(only(filled, "efficiency"))
    assert "accuracy" in found["pevlm"].best
    assert {"speedup_prefill", "speedup_e2e"} <= set(found["block"].best)
    assert "accuracy" in found["turbo"].best  # of its own band
    assert found["turbo"].best == ["accuracy"]  # as fast as random
    assert not found["full"].best


def test_second_is_marked_only_below_a_proved_best(filled: ResultStore) -> None:
    method(filled, "ape", POOR, 2.5)
    found = lines(only(filled, "efficiency"))
    assert "accuracy" in found["block"].second
    assert "speedup_e2e" in found["ape"].second
    method(filled, "star", [*GOOD[:99], 1.0])  # one answer better than pevlm
    found = lines(only(filled, "efficiency"))
    assert not any("accuracy" in line.best + line.second for name, line in found.items() if name in ("star", "pevlm"))


def test_times_of_two_sessions_are_not_ranked(filled: ResultStore) -> None:
    records = timed([scaled(BASE, 9)], [BASE], session="another")
    fill(filled, [*answered(FAIR), *records], method="ape")
    assert not any(
        key.startswith("speedup") for line in lines(only(filled, "efficiency")).values() for key in line.best
    )


def test_counts_have_no_error_and_references_and_masks_no_rank(filled: ResultStore) -> None:
    def memory(peak: int) -> list[SampleRecord]:
        return [SampleRecord("s0", "memory", "v0", "ok", memory=Memory(peak, peak, peak))]

    fill(filled, memory(2**30), method="ape")
    fill(filled, memory(2**31), method="star")
    fill(filled, [*memory(2**10), *answered(GOOD, visual=0)], method="blind")
    fill(filled, [*answered(POOR), *timed([scaled(BASE, 99)], [BASE])], Traits(masked=True), method="mask")
    found = lines(only(filled, "scaling"))
    assert found["ape"].best == ["peak_bytes:colours:length=32"]
    assert not found["mask"].best
    assert not found["blind"].best


# What may be compared.


@pytest.mark.parametrize(
    ("layout", "change", "field"),
    [
        ("efficiency", {"model": "other", "weights_hash": "x"}, "model"),
        ("efficiency", {"frames": 8}, "frames"),
        ("efficiency", {"suite": "shapes"}, "suite"),
        ("image-retention", {"seed": 3}, "seed"),
        ("image-retention", {"frames": 8}, "frames"),
        ("video-retention", {"suite": "shapes", "dtype": "float32"}, "dtype"),
        ("models-as-bands", {"model": "other", "dtype": "float32"}, "dtype"),
        ("scaling", {"suite": "shapes"}, "suite_name"),
    ],
)
def test_a_difference_in_what_is_compared_is_refused_and_named_or_split(
    filled: ResultStore, cli: Cli, layout: str, change: dict[str, Any], field: str
) -> None:
    method(filled, "ape", GOOD, **change)
    done = cli("table", filled.root, "--layout", layout)
    assert (done.code, done.out) == (2, "")
    assert f"The runs differ in {field} (" in done.err
    assert "ape" in done.err
    assert done.err.strip().endswith(f"--split {field}.")
    assert cli("table", filled.root, "--layout", layout, "--split", field).code == 0
    rows = json.loads(cli("table", filled.root, "--layout", layout, "--split", field, "--format", "json").out)["rows"]
    assert len({row["split"] for row in rows}) == 2


def test_another_machine_is_a_difference(filled: ResultStore, cli: Cli) -> None:
    path = next(each for each in filled.root.rglob("header.json") if "turbo" in str(each))
    path.write_text(path.read_text().replace('"name": "GPU"', '"name": "Other"'))
    assert (
        "The runs differ in card (GPU: full, block, pevlm, random; Other: turbo)"
        in cli("table", filled.root, "--layout", "efficiency").err
    )


def test_a_method_twice_on_the_same_work_is_refused(filled: ResultStore, cli: Cli, tmp_path: Path) -> None:
    method(ResultStore(filled.root / "again"), "pevlm", GOOD)
    done = cli("table", filled.root, "--layout", "efficiency")
    assert (done.code, "holds pevlm twice for the same work" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--layout", "efficiency", "--split", "modle"), "Did you mean 'model'?"),
        (("--split", "model"), "--split needs a --layout"),
        (("--format", "latex"), "--format latex needs a --layout; choose one of efficiency"),
        (("--layout", "latency-budget"), "holds no latency-limit-*.json"),
    ],
)
def test_what_cannot_be_laid_out_is_exit_2(filled: ResultStore, cli: Cli, args: Any, said: str) -> None:
    done = cli("table", filled.root, *args)
    assert (done.code, said in done.err) == (2, True)


def test_an_empty_folder_and_a_damaged_header_are_one_sentence(filled: ResultStore, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for layout in NAMES:
        assert cli("table", tmp_path / "empty", "--layout", layout).code == 2
    path = next(filled.root.rglob("header.json"))
    header = json.loads(path.read_text())
    del header["sessions"][0]["versions"]
    path.write_text(json.dumps(header))
    done = cli("table", filled.root, "--layout", "efficiency")
    assert (done.code, "lacks 'versions'" in done.err) == (2, True)


# Formats.


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """What ``run --latency-limit`` writes, with two limits."""

    def row(name: str, frames: int | None, accuracy: float | None) -> dict[str, Any]:
        step = {"frames": 1, "median_s": 0.5, "rounds_s": [[0.5]], "failed": ""}
        low, high = (None, None) if accuracy is None else (accuracy - 0.1, accuracy + 0.1)
        return {
            "method": name, "params": {"sink": 4} if name == "pevlm" else {}, "frames": frames, "seconds": frames,
            "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "n": 9 if frames else 0,
            "n_inactive": 0, "run": None, "ladder": [step],
        }  # fmt: skip

    for limit, frames in ((20, 32), (5, 8)):
        data = {
            "schema": 1, "rows": [row("full", None, None), row("pevlm", frames, 0.5)], "limit_s": limit,
            "span": "video_s + e2e_s", "steps": [1, 2], "model": "m", "weights_hash": "w", "suite": "s",
            "suite_version": "1", "sampler": "endpoints", "warmup": 1, "repeats": 3, "max_new_tokens": 4, "threads": 1,
            "device": {"type": "cpu", "name": "cpu", "dtype": "float32", "cpu": "A CPU", "cores": 1},
            "kernels": {"attention": "sdpa", "vision": "sdpa"}, "versions": {"vlmbench": "1", "torch": "2"},
            "commit": None, "dirty": None, "created": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        (tmp_path / f"latency-limit-{limit}s-0.json").write_text(json.dumps(data))
    return tmp_path


def test_limits_are_bands_in_order(ladder: Path, cli: Cli) -> None:
    (table,) = tables(ladder, "latency-budget")
    assert bands(table) == {"At most 5 s": ["full", "pevlm"], "At most 20 s": ["full", "pevlm"]}
    assert "| `pevlm:sink=4` | 8 | 8 | 50.0 | 9 |" in cli("table", ladder, "--layout", "latency-budget").out
    path = ladder / "latency-limit-5s-0.json"
    path.write_text(path.read_text().replace('"A CPU"', '"Another"'))
    assert "The runs differ in card (A CPU: " in cli("table", ladder, "--layout", "latency-budget").err
    path.write_text(path.read_text().replace('"limit_s"', '"limit"'))
    assert (
        "is not what `run --latency-limit` writes ('limit_s')" in cli("table", ladder, "--layout", "latency-budget").err
    )


@pytest.mark.parametrize("layout", NAMES)
def test_all_formats_hold_the_same_figures(filled: ResultStore, ladder: Path, cli: Cli, layout: str) -> None:
    """Figures parsed back from LaTeX and Markdown are those of the CSV, in the digits that are shown."""
    folder = ladder if layout == "latency-budget" else filled.root
    call = ("table", folder, "--layout", layout, "--format")
    data = json.loads(cli(*call, "json").out)
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    read = list(csv.DictReader(io.StringIO(cli(*call, "csv").out)))
    latex = [line.removesuffix(r" \\").split(" & ") for line in body(cli(*call, "latex").out)]
    markdown = [line.strip("| ").split(" | ") for line in cli(*call, "md").out.splitlines() if line.startswith("| `")]
    assert len(read) == len(latex) == len(markdown) == len(data["rows"])
    for line, row, from_latex, from_markdown in zip(read, data["rows"], latex, markdown, strict=True):
        assert line["method"] == row["method"]
        for number, column in enumerate(data["columns"], start=1):
            value = row[column["key"]]
            assert line[column["key"]] == ("" if value is None else str(value))
            for cell in (from_latex[number], from_markdown[number]):
                text = re.sub(r"\\\w+\{|\}|\*\*|</?u>", "", cell)
                assert (text in ("---", "—")) if value is None else near(text, value * column["scale"])


def body(latex: str) -> list[str]:
    """The lines of methods."""
    inside = latex.split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    return [line for line in inside.strip().splitlines() if not line.startswith((r"\midrule", r"\rowcolor"))]


def near(text: str, value: float) -> bool:
    """`text` is `value` rounded to the digits that it has: at least three, or to a tenth or a hundredth."""
    return float(text) == pytest.approx(value, rel=5.1e-3, abs=0.051 if abs(value) > 1 else 1e-12)


@pytest.mark.parametrize("layout", [name for name in NAMES if name != "latency-budget"])
def test_latex_has_as_many_cells_in_every_line_as_columns(filled: ResultStore, layout: str) -> None:
    table = only(filled, layout)
    text = to_latex([table])
    width = len(table.columns) + 1
    assert f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}" in text
    assert {line.count(" & ") for line in body(text)} == {width - 1}
    above, *_ = text.split(r"\toprule")[1].strip().splitlines()
    spans = [int(each) for each in re.findall(r"\\multicolumn\{(\d+)\}", above)]
    assert sum(spans) + above.count(" & ") + 1 - len(spans) == width
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert re.findall(r"[^\x00-\x7f]", text) == []  # every sign that is not ASCII has a command


EVIL = '\\input{/etc/passwd} 50% & $x$ #1 ~^_ <script> | {} \x1b[0m é × ð € ° ² − µ " → ≥ \u202e\N{CJK UNIFIED IDEOGRAPH-5B57}'
"""Text as a model, a file name or a header may hold it."""


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles_and_nothing_is_wider_than_the_line(filled: ResultStore, ladder: Path, tmp_path: Path) -> None:
    """All layouts in one document, with methods of many parameters, texts that would be commands, and marked figures."""
    many = {f"parameter{i}": "a value" if i % 2 else i for i in range(20)}
    method(filled, "ape", POOR, 2.5, method_params=many)
    method(filled, "star", POOR, 2.5, method_params={"mode": EVIL.replace('"', "")})
    found = [table for name in NAMES for table in tables(ladder if name == "latency-budget" else filled.root, name)]
    assert any(line.best for table in found for band in table.bands for line in band.lines)
    assert any(line.second for table in found for band in table.bands for line in band.lines)
    for table in found:
        table.title, table.notes = f"{table.title} {EVIL}", [*table.notes, EVIL]
        table.bands[-1].title = EVIL
    packages = r"\usepackage{booktabs,multirow,graphicx}\usepackage[table]{xcolor}"
    text = f"\\documentclass{{article}}{packages}\n\\begin{{document}}\n{to_latex(found)}\n\\end{{document}}\n"
    (tmp_path / "tables.tex").write_text(text)
    command = ["pdflatex", "-no-shell-escape", "-halt-on-error", "-interaction=nonstopmode", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout
    assert "root:" not in done.stdout
    if not shutil.which("pdftotext"):
        return
    subprocess.run(["pdftotext", "-layout", "tables.pdf"], cwd=tmp_path, check=True)
    printed = (tmp_path / "tables.txt").read_text()
    for part in (r"\input{/etc/passwd} 50% & $x$ #1", "[U+5B57]", "in full:", "parameter19=", "90.0"):
        assert part in printed


def test_a_header_that_nobody_typed_is_printed_as_it_is(filled: ResultStore) -> None:
    method(filled, "ape", FAIR, 4.0, method_params={"mode": 'a"b'})
    assert "ape:mode=a''b" in to_latex([only(filled, "efficiency")])


def test_a_line_of_latex_is_named_by_what_tells_it_from_others(filled: ResultStore) -> None:
    method(filled, "uniform", FAIR, 4.0, visual=25, method_params={"ratio": 0.25, "tokens": None})
    method(filled, "uniform", FAIR, 4.0, visual=50, method_params={"ratio": 0.5, "tokens": None})
    method(filled, "ape", FAIR, 4.0, method_params={"sink": 4, "block": 8})
    text = to_latex([only(filled, "efficiency")])
    assert {"ape", "uniform:ratio=0.25", "uniform:ratio=0.5"} <= {line.split(" & ")[0] for line in body(text)}
    assert r"in full: ape:block=8,\allowbreak sink=4." in text or r"in full: ape:sink=4,\allowbreak block=8." in text


def test_what_is_best_is_bold_and_second_underlined(filled: ResultStore, cli: Cli) -> None:
    method(filled, "ape", POOR, 2.5)
    call = ("table", filled.root, "--layout", "efficiency", "--format")
    assert r"\textbf{90.0}" in cli(*call, "latex").out
    assert r"\underline{70.0}" in cli(*call, "latex").out
    assert "| **90.0** |" in cli(*call, "md").out
    assert "| <u>70.0</u> |" in cli(*call, "md").out


def test_text_is_data_in_latex() -> None:
    assert escape("字é€") == "[U+5B57]é[U+20AC]"
    assert escape("\\input{x}_%\n\x1b[0m") == r"\textbackslash{}input\{x\}\_\%[0m"


def test_the_footnote_is_made_from_the_headers(filled: ResultStore) -> None:
    text = "\n".join(only(filled, "efficiency").notes)
    facts = ("GPU (cuda", "bfloat16", "attention flash", "batch 1", "frames by endpoints", "pixel budget")
    for fact in (*facts, "1 rounds after 1 of warm-up", "100 questions", "vlmbench "):
        assert fact in text


def test_the_plain_table_is_as_it_was(filled: ResultStore, cli: Cli) -> None:
    from vlmbench import report

    assert cli("table", filled.root).out == report.to_markdown(report.rows(filled.root)).rstrip("\n") + "\n"
