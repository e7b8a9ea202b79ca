"""`docs/add-a-method.md` does what it says: its code, as it stands there, is a method of the checkout and of a package."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vlmbench.methods
from tests.test_docs import blocks, ours
from vlmbench import registry
from vlmbench.models.loading import families
from vlmbench.report import rows

Cli = Callable[..., Any]
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "add-a-method.md").read_text("utf-8")
[CODE] = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
[PROJECT] = re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line)[1:] for line in blocks(PAGE) if ours(line)]
OWN = ("mypackage", "vlmbench.methods.novelty")


@pytest.fixture
def looked_up_again() -> Iterator[None]:
    """Names are found once a process: whoever adds one has to start anew, and so does whoever comes after."""
    for others in (registry.suites, families):
        assert others.names()  # found before the place of the methods changes
    registry.methods.__dict__.pop("_loaders", None)
    yield
    registry.methods.__dict__.pop("_loaders", None)
    for name in [name for name in sys.modules if name.startswith(OWN)]:
        del sys.modules[name]


@pytest.fixture
def in_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_up_again: None) -> None:
    """The checkout's methods and the page's one, which is nowhere else named."""
    folder = tmp_path / "methods"
    folder.mkdir()
    [own, *_] = vlmbench.methods.__path__
    for path in Path(own).glob("*.py"):
        (folder / path.name).symlink_to(path)
    (folder / "novelty.py").write_text(CODE)
    monkeypatch.setattr(vlmbench.methods, "__path__", [str(folder)])
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))


@pytest.fixture
def in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_up_again: None) -> None:
    """A package as `pip install` leaves it: its folder, and its entry points beside it."""
    project = tomllib.loads(PROJECT)["project"]
    package, info = tmp_path / project["name"], tmp_path / f"{project['name']}-{project['version']}.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "novelty.py").write_text(CODE)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n{name} = {value}\n"
        for group, each in project["entry-points"].items()
        for name, value in each.items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(tmp_path)


def test_a_file_is_listed_keeps_the_contract_and_stands_in_a_table(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_the_tree: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in COMMANDS:
        done = cli(*args, *(["--limit", "2"] if args[0] == "run" else []))
        assert done.code == 0, (args, done.err)
        if args[0] == "list":
            assert "  novelty " in done.out
            assert CODE.split("\n", 1)[0].strip('"') in done.out
        if args[0] == "check":
            assert "**broken**" not in done.out
            assert done.out.count("| ok |") >= 9
        if args[0] == "run":
            assert "`novelty:ratio=0.25`" in done.out
    full, own = rows(tmp_path / "runs" / "novelty")
    assert (full["method"], own["method"], own["n_kept_tokens"]) == ("full", "novelty", full["n_visual_tokens"] / 4)


def test_a_package_with_an_entry_point_is_listed_and_runs(cli: Cli, tmp_path: Path, in_a_package: None) -> None:
    assert re.search(r"^  novelty +from mypackage\.novelty:Novelty$", cli("list", "methods").out, flags=re.MULTILINE)
    args = ("--suite", "synthvideo:length=32", "--limit", 1, "--mode", "accuracy", "--out", tmp_path / "runs")
    done = cli("run", "--method", "novelty:tokens=4", *args)
    assert done.code == 0, done.err
    assert [row["method"] for row in rows(tmp_path / "runs")] == ["full", "novelty"]
