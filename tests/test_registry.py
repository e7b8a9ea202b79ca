"""A plug-in is found by its file or entry point, imported only when asked for; a wrong name gets the nearest one."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmbench import registry
from vlmbench.errors import UsageError
from vlmbench.registry import Registry
from vlmbench.spec import build, parse

PLUGIN = '"""Keeps every token.\n\nMore."""\n\n\nclass Keep:\n    name = "keep"\n'
numbers = itertools.count()


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder scanned in place of ``methods/``, importable under a name of its own."""
    folder = tmp_path / f"things{next(numbers)}"
    folder.mkdir()
    (folder / "keep.py").write_text(PLUGIN)
    (folder / "_helper.py").write_text("raise RuntimeError('never imported')\n")
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for module in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[module]


def entry(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = importlib.metadata.EntryPoint(name, value, "irrelevant")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


def test_a_file_is_a_plugin_and_listing_does_not_import_it(things: Path) -> None:
    known = Registry("thing", things.name)
    (things / "broken.py").write_text('"""Cannot be imported."""\nraise RuntimeError\n')
    assert known.names() == ["broken", "keep"]
    assert known.summary("keep") == "Keeps every token."
    assert known.summary("broken") == "Cannot be imported."
    assert not any(name.startswith(things.name) for name in sys.modules)
    assert known.load("keep").name == "keep"


def test_an_unknown_name_gets_the_nearest_one_and_the_list(things: Path) -> None:
    with pytest.raises(UsageError, match=r"No thing is called 'kep' \(known: keep\). Did you mean 'keep'\?"):
        Registry("thing", things.name).load("kep")


def test_a_file_without_its_class_says_so(things: Path) -> None:
    (things / "empty.py").write_text("")
    with pytest.raises(UsageError, match=r"empty.py has no class with name = 'empty'"):
        Registry("thing", things.name).load("empty")


def test_a_package_from_outside_adds_a_plugin(things: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch, "theirs", "decimal:Decimal")
    known = Registry("thing", things.name)
    assert known.names() == ["keep", "theirs"]
    assert known.load("theirs").__name__ == "Decimal"
    assert "decimal:Decimal" in known.summary("theirs")


def test_two_plugins_of_one_name_are_refused(things: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch, "keep", "decimal:Decimal")
    with pytest.raises(UsageError, match=r"'keep' is defined twice: decimal:Decimal and .*keep.py; rename one"):
        Registry("thing", things.name).names()


@pytest.mark.parametrize("known", [registry.methods, registry.suites], ids=lambda known: known.kind)
def test_every_shipped_plugin_loads_and_says_what_it_is(known: Registry) -> None:
    for name in known.names():
        assert known.load(name).name == name
        assert known.summary(name), f"{name} has no docstring"


def test_the_example_method_of_the_guide_works(things: Path) -> None:
    guide = Path(__file__).parent.parent.joinpath("CONTRIBUTING.md").read_text()
    block = guide.partition("```python\n")[2].partition("```")[0]
    (things / "every.py").write_text(textwrap.dedent("   " + block.lstrip()))
    every = Registry("thing", things.name).load("every")

    import torch

    from vlmbench.layout import Prompt, Span, TokenLayout
    from vlmbench.trace import Trace

    layout = TokenLayout((Span("text", 0, 2), Span("video", 2, 8), Span("text", 8, 9)))
    prompt = Prompt(torch.randn(1, 9, 4), torch.arange(9).expand(1, 1, 9), layout, 9)
    trace = Trace()
    assert build(every, parse("every:step=3"), "method").prepare(prompt, trace).length == 5
    assert trace.kept["prompt"] == [0, 1, 2, 5, 8]
    assert every.neutral().prepare(prompt, Trace()).length == 9
    with pytest.raises(UsageError, match="every:step must be 1 or more, not 0"):
        every(step=0)
