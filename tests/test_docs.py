"""Every command in the documentation is run, with what takes long replaced; every link, target and module in it is there."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.test_report import BASE, answered, fill, scaled, timed
from vlmbench.cli import app
from vlmbench.store import ResultStore

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "results").rglob("README.md")),
]
IDS = [str(path.relative_to(ROOT)) for path in TEXTS]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SLOW = {
    "vlmbench.runner.run": 0,
    "vlmbench.fitting.fit": 0,
    "vlmbench.bench.bench": {},
    "vlmbench.bench.to_text": "",
    "vlmbench.plan.plan": [],
    "vlmbench.plan.to_text": "",
    "vlmbench.doctor.rows": [],
    "vlmbench.doctor.to_text": "",
    "vlmbench.check_contract.run": [],
    "vlmbench.check_invariance.check": [],
}
"""What would load a model, and what it returns instead; everything before it, options and specs included, is real."""
SPECS = {"--method": "methods", "--suite": "suites"}
MADE = re.compile("every|novelty")
"""Methods that a text shows how to make."""


def blocks(text: str) -> list[str]:
    """Lines of fenced blocks, joined where they go on, without comments."""
    fenced = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(fenced)).splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


def inline(text: str) -> list[str]:
    """Code in running text, a line break in it being a blank."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", prose)]


def ours(line: str) -> bool:
    return line.startswith("vlmbench ")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with results, in which nothing slow is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmbench.stats.RESAMPLES", 100)
    for name, value in SLOW.items():
        monkeypatch.setattr(name, lambda *_, value=value, **__: value)
    store = ResultStore(tmp_path / "stored")
    for method, factor in (("full", 1.0), ("pevlm", 1.5), ("uniform", 2.0)):
        fill(store, [*answered([1.0] * 40), *timed([scaled(BASE, factor)], [BASE])], method=method)
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "answers.jsonl").write_text('{"id": "synthvideo-32-0000-0-first", "text": "red"}\n')
    return tmp_path


def provide(workplace: Path, args: list[str]) -> None:
    """Results at every folder that the command names."""
    runs = sorted(path.parent for path in (workplace / "stored").rglob("header.json"))
    places = [arg for arg in args[1:] if arg == "runs" or arg.startswith("runs/")] if args[0] != "run" else []
    for number, place in enumerate(places):
        path = workplace / place
        inside = path.parent.name != "runs" and place != "runs"  # a run by OUT/METHOD: only OUT is put there
        path = path.parent if inside else path
        path.parent.mkdir(parents=True, exist_ok=True)
        if inside and not path.exists():
            path.symlink_to(workplace / "stored")
        elif not path.exists():
            path.symlink_to(runs[number] if args[0] in ("compare", "explain") else workplace / "stored")


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_every_command_runs(path: Path, workplace: Path, cli: Callable[..., Any]) -> None:
    for line in filter(ours, blocks(path.read_text(encoding="utf-8"))):
        args = shlex.split(line)[1:]
        provide(workplace, args)
        done = cli(*args)
        # A gate may fail on made-up results, and answers for one question are too few; neither is a wrong command.
        wanted = (0, 1, 3) if args[0] == "gate" else (0,)
        assert done.code in wanted or "lacks" in done.err, (line, done.err)


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_every_command_in_running_text_is_one(path: Path) -> None:
    for line in filter(ours, inline(path.read_text(encoding="utf-8"))):
        name, *args = shlex.split(line)[1:]
        if name.startswith("-"):
            continue
        for each in name.split("|"):
            assert each in COMMANDS, line
            known = {
                option for parameter in COMMANDS[each].params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            assert {arg.partition("=")[0] for arg in args if arg.startswith("--")} <= known, line


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_methods_suites_and_layouts_are_spelt_right(path: Path) -> None:
    from vlmbench.errors import UsageError
    from vlmbench.session import make_methods, make_suite

    text = path.read_text(encoding="utf-8")
    for line in [each for each in (*blocks(text), *inline(text)) if ours(each)]:
        args = shlex.split(line)
        for option, value in itertools.pairwise(args):
            if option not in SPECS or re.search(r"(^|=)[A-Z]+\b", value) or MADE.search(value) or "artefact" in value:
                continue  # a placeholder, the method that the text itself makes, a file that is not there
            try:
                make_methods([value]) if SPECS[option] == "methods" else make_suite(value)
            except UsageError as error:
                raise AssertionError(f"{line}: {error}") from error


@pytest.mark.parametrize("path", TEXTS, ids=IDS)
def test_targets_modules_and_links_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in (*blocks(text), *inline(text)):
        if made := re.match(r"make ([a-z-]+)", line):
            assert made[1] in targets, line
        if module := re.search(r"python -m (vlmbench[\w.]*)", line):
            assert importlib.util.find_spec(module[1]), line
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link


def test_the_documentation_names_every_layout_and_kind_of_picture() -> None:
    from vlmbench.layouts import NAMES

    text = (ROOT / "docs" / "reading-a-table.md").read_text()
    assert all(f"`{name}`" in text for name in NAMES)


def test_every_column_for_people_is_explained() -> None:
    """A heading of the printed table stands in the page that says how to read it."""
    from vlmbench.tables import _READABLE, MARKS

    text = (ROOT / "docs" / "reading-a-table.md").read_text()
    plain = {"method", "device", "dtype", "attention", "frames", "peak, GiB", "KV, MiB"}
    times = {name for name, _ in _READABLE if name.endswith((" ×", ", s"))}
    for name, _ in _READABLE:
        assert name in plain | times or f"`{name}`" in text, name
    assert all(f"`{mark}`" in text for mark in MARKS)


def test_every_published_schema_is_json() -> None:
    for path in (ROOT / "docs" / "schema").glob("*.json"):
        assert json.loads(path.read_text())["$schema"]
