"""What gets installed: `vlmbench` and nothing else at the top level, with every sub-package behind the links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("methods", "kernels", "suites")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist and the wheel made from it, out of a copy of the checkout: a second or two."""
    work = tmp_path_factory.mktemp("build")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results", "docs")
    shutil.copytree(ROOT, work / "copy", symlinks=True, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work), str(work / "copy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return work


def wheel_names(folder: Path) -> list[str]:
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_links_are_relative_and_kept() -> None:
    for name in LINKS:
        assert os.readlink(ROOT / "vlmbench" / name) == f"../{name}"


def test_no_folder_shadows_the_hugging_face_package_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_the_wheel_holds_one_top_level_name(built: Path) -> None:
    tops = {name.split("/")[0] for name in wheel_names(built)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlmbench"}
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        [listed] = [name for name in wheel.namelist() if name.endswith("top_level.txt")]
        assert wheel.read(listed).split() == [b"vlmbench"]


def test_the_wheel_and_the_sdist_hold_every_module_and_the_weights(built: Path) -> None:
    kinds = ("*.py", "*.safetensors", "*.json")
    tree = built / "copy"
    folders = [tree / "vlmbench", *(tree / name for name in LINKS)]
    expected = {
        f"vlmbench/{path.relative_to(tree / 'vlmbench' if folder.name == 'vlmbench' else tree)}"
        for folder in folders
        for kind in kinds
        for path in folder.rglob(kind)
    }
    assert "vlmbench/suites/_synth/__init__.py" in expected
    assert expected <= set(wheel_names(built))
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        assert expected <= {name.partition("/")[2] for name in sdist.getnames()}


def test_the_wheel_holds_no_build_leftovers(built: Path) -> None:
    assert not [name for name in wheel_names(built) if "__pycache__" in name or "vlmbench/vlmbench" in name]


def test_the_import_names_are_those_of_the_house(tmp_path: Path) -> None:
    """From outside the checkout nothing generic is importable, not even with an editable installation."""
    code = (
        "import importlib.util as u, vlmbench.suites._synth, vlmbench.registry as r\n"
        f"assert all(u.find_spec('vlmbench.' + name) for name in {LINKS})\n"
        "assert not any(u.find_spec(name) for name in ('methods', 'suites', '_synth', 'tests'))\n"
        "assert 'torch' not in __import__('sys').modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_constraints_pin_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", pin) for pin in pins)
    assert not [pin for pin in pins if re.match(r"torch==2\.13\.", pin)]
    assert {"torch", "transformers", "pytest", "ruff"} <= {pin.partition("==")[0] for pin in pins}
