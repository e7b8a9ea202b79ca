"""What others wrote is data: answers and names with code in them are shown in every output format and acted upon in none."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_report import BASE, answered, fill, scaled, timed
from vlmbench import plain
from vlmbench.laid_text import escape
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
EVIL = (
    "<script>alert(1)</script>",
    r"\input{/etc/passwd}",
    "=cmd('calc')",
    "\x1b[31mred\x07\x9b2J",
    "a | b ` c ](http://x) ![](http://x/y.png)",
    "$\\write18{id}$ %\n& #",
)


@pytest.fixture(params=EVIL, ids=["html", "latex", "formula", "escape", "markdown", "mathematics"])
def evil(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, evil: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results in which everything that can hold a text holds this one."""
    monkeypatch.setattr("vlmbench.stats.RESAMPLES", 100)
    store = ResultStore(tmp_path / "runs")
    said: dict[str, Any] = {"prediction": evil, "raw_text": evil, "answer": evil, "template": evil, "error": evil}
    names: dict[str, Any] = {"model": evil, "suite_params": {"folder": evil, "length": 32}, "prompt_style": evil}
    for method, params, factor in (("full", {}, 1.0), ("turbo", {"mode": evil}, 2.0), (evil, {}, 3.0)):
        records = [*answered([1.0] * 8, **said), *timed([scaled(BASE, factor)], [BASE])]
        fill(store, records, method=method, method_params=params, **names)
    for path in store.root.rglob("header.json"):
        header = json.loads(path.read_text())
        for where in (header, *header["sessions"]):
            where["device"] = {**where["device"], "name": evil, "cpu": evil}
            where["driver"], where["kernels"] = evil, {"attention": evil, "vision": evil}
            where["versions"] = {**where["versions"], "torch": evil}
        path.write_text(json.dumps(header))
    return store.root


def outputs(cli: Cli, folder: Path, *formats: str) -> list[str]:
    """Everything that the table command prints in these formats."""
    found = []
    for layout in (None, "efficiency", "video-retention", "models-as-bands", "scaling"):
        for each in formats:
            if layout or each != "latex":
                done = cli("table", folder, "--format", each, *(("--layout", layout) if layout else ()))
                assert done.code == 0, done.err
                found.append(done.out)
    return found


def runs(folder: Path) -> tuple[Path, Path]:
    first, second, *_ = sorted(path.parent for path in folder.rglob("header.json"))
    return first, second


def no_control(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_markdown_shows_it_and_begins_nothing_with_it(cli: Cli, folder: Path) -> None:
    texts = outputs(cli, folder, "md")
    texts += [cli("gate", folder, "--min-speedup", "turbo=1").out]
    texts += [cli(command, *runs(folder)).out for command in ("compare", "explain")]
    for text in texts:
        assert no_control(text)
        outside = re.sub(r"`[^`\n]*`", "", text)  # code is shown as it is
        # `<u>` is ours: Markdown has no underline.
        assert not re.search(r"<(?!/?u>)[A-Za-z/!]", outside)
        assert not re.search(r"(?<!\\)\]\(", outside)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        tables = {len(re.findall(r"(?<!\\)\|", line)) for line in rows}
        assert len(tables) == 1, rows


def test_csv_computes_nothing_and_keeps_numbers(cli: Cli, folder: Path) -> None:
    for text in outputs(cli, folder, "csv"):
        for row in csv.DictReader(io.StringIO(text)):
            for name, value in row.items():
                number = re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", value or "")
                assert number or not value.startswith(plain.FORMULA_STARTS), (name, value)


def test_latex_runs_no_command_of_it(cli: Cli, folder: Path) -> None:
    ours = {
        *(
            "usepackage",
            "begin",
            "end",
            "centering",
            "small",
            "caption",
            "toprule",
            "midrule",
            "bottomrule",
            "cmidrule",
        ),
        *(
            "multirow",
            "multicolumn",
            "rowcolor",
            "textbf",
            "underline",
            "par",
            "smallskip",
            "footnotesize",
            "linewidth",
        ),
        *("times", "cdot", "downarrow", "leq", "pm", "dots"),
        *("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"),
        *(
            "sbox",
            "ifdim",
            "wd",
            "resizebox",
            "usebox",
            "else",
            "fi",
            "setlength",
            "tabcolsep",
            "raggedright",
            "allowbreak",
        ),
        *("rightarrow", "geq", "mu", "textminus", "texttwosuperior", "textdegree"),
    }
    for text in outputs(cli, folder, "latex"):
        assert no_control(text)
        assert set(re.findall(r"\\([A-Za-z]+)", text)) <= ours
        assert "%" not in re.sub(r"\\%", "", text.split("\n", 1)[1])  # a comment would hide the rest of a line


def test_json_gives_back_what_was_stored(cli: Cli, folder: Path, evil: str) -> None:
    for text in [*outputs(cli, folder, "json"), cli("explain", *runs(folder), "--format", "json").out]:
        assert text.isascii()
        assert no_control(text)
        json.loads(text)
    rows = json.loads(cli("table", folder, "--format", "json").out)["rows"]
    assert {row["model"] for row in rows} == {evil}
    assert evil in {row["method"] for row in rows}


def test_pictures_draw_it(cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("plot", folder, "--out", tmp_path / "plots", "--format", "svg", "--kind", "pareto", "--kind", "stages")
    assert done.code == 0, done.err
    for path in (tmp_path / "plots").iterdir():
        tree = ElementTree.parse(path)  # noqa: S314 (our own file)
        assert not [each for each in tree.iter() if str(each.tag).endswith(("script", "image", "foreignObject"))]


def test_errors_hold_no_escape_code(cli: Cli, tmp_path: Path, evil: str) -> None:
    for args in (("table", tmp_path / evil.replace("/", "_")), ("run", "--method", evil), ("compare", evil, evil)):
        done = cli(*args)
        assert done.code == 2
        assert no_control(done.err)


@given(st.text())
def test_no_text_escapes_its_place(text: str) -> None:
    assert plain.printable(text).isprintable()
    assert "<" not in plain.note(text)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[\]]", plain.cell(text))
    assert plain.code(text).count("`") == 2
    value = plain.spreadsheet(text)
    assert isinstance(value, str)
    assert not value.startswith(plain.FORMULA_STARTS)
    assert value.removeprefix("'") == text.removeprefix("'")


@given(st.text())
def test_latex_has_no_special_character_of_a_text(text: str) -> None:
    left = re.sub(r"\\[&%$#_{}]|\\text[a-z]+\{\}|\\dots\{\}|\$\\[a-z]+\$", "", escape(text))
    assert not re.search(r"[\\&%$#_{}~^]", left)


def test_weights_are_never_unpickled_and_code_of_a_model_never_run() -> None:
    """By the source: there is one place that loads a model, and what `torch.load` reads holds tensors only."""
    root = Path(__file__).resolve().parents[1]
    sources = [
        path for folder in ("vlmbench", "methods", "suites", "kernels") for path in (root / folder).rglob("*.py")
    ]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, path
        assert "yaml.load(" not in text, path
    loading = (root / "vlmbench" / "models" / "loading.py").read_text(encoding="utf-8")
    assert '"trust_remote_code": False' in loading
    assert "use_safetensors=True" in loading
