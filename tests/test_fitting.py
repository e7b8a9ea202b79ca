"""``vlmbench fit`` picks the cheapest setting within the limit, and its file is used, checked and part of the hash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vlmbench.artefact import Artefact, read
from vlmbench.errors import UsageError
from vlmbench.fitting import Answered, Fitting, _spread
from vlmbench.methods.pevlm import Pevlm
from vlmbench.store import ResultStore

Cli = Callable[..., Any]
SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "artefact.schema.json"
MODEL, SUITE = "mini-llava-ov@random", "synthvideo:length=32"
FIT = ("fit", "--model", MODEL, "--method", "pevlm", "--suite", SUITE)


@pytest.fixture
def agreeing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings by name as they are tried; each agrees with full on as many questions as its block has units."""
    tried: list[str] = []

    def answers(self: Fitting, method: Any, name: str) -> dict[str, Answered]:
        tried.append(name)
        same = len(self.samples) if method.name == "full" else method.block
        return {s.id: Answered("yes" if i < same else "no", float(i < same)) for i, s in enumerate(self.samples)}

    monkeypatch.setattr(Fitting, "_answers", answers)
    return tried


@pytest.fixture
def fitted(cli: Cli, tmp_path: Path, agreeing: list[str]) -> Path:
    out = tmp_path / "pevlm.json"
    assert cli(*FIT, "--limit", 10, "--max-loss", 0.3, "--out", out).code == 0
    return out


def changed(path: Path, **values: Any) -> Path:
    other = path.with_name("changed.json")
    data = json.loads(path.read_text()) | values
    other.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return other


def test_the_cheapest_setting_within_the_limit_is_chosen_and_the_grid_kept(
    cli: Cli, tmp_path: Path, agreeing: list[str]
) -> None:
    out = tmp_path / "a.json"
    done = cli(*FIT, "--limit", 10, "--max-loss", 0.3, "--out", out)
    data = json.loads(out.read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    grid = data["grid"]
    assert [row["pairs_relative"] for row in grid] == sorted(row["pairs_relative"] for row in grid)
    assert all(row["loss"] > 0.3 for row in grid[:-1])
    assert grid[-1]["loss"] == pytest.approx(0.2)  # a block of eight units
    assert {key: grid[-1][key] for key in ("sink", "block")} == {"sink": 0, "block": 8}
    assert (data["parameters"]["sink"], data["parameters"]["block"]) == (0, 8)
    assert agreeing == ["full", *(f"pevlm:sink={row['sink']},block={row['block']}" for row in grid)]
    assert (data["model"], data["suite"], data["n"], data["n_videos"], data["units"]) == (MODEL, SUITE, 10, 4, 32)
    assert grid[-1]["agreement_low"] < 0.8 < grid[-1]["agreement_high"]
    assert "use it with `--method pevlm:artefact=" in done.out
    assert "pevlm:sink=0,block=4: same answer as full 0.400" in done.err


def test_pairs_are_those_of_the_plan_over_full_attentions(fitted: Path) -> None:
    data = json.loads(fitted.read_text())
    length, per = data["tokens"], (data["tokens"] - data["tokens"] % 32) // 32
    for row in data["grid"]:
        blocks = (32 - row["sink"]) // row["block"]
        least = (row["block"] * per * 0.5) ** 2 / 2 * blocks / (length**2 / 2)
        assert least < row["pairs_relative"] < 1


def test_the_train_split_is_asked_and_a_real_model_answers(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    args = ("fit", "--model", "tiny-llava-ov", "--method", "pevlm:remainder=head", "--suite", SUITE, "--frames", 16)
    done = cli(*args, "--limit", 4, "--steps", 2, "--max-loss", 0.99, "--out", out)
    assert done.code == 0
    data = json.loads(out.read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    assert (data["frames"], data["units"], data["n"], data["n_videos"]) == (16, 16, 4, 2)
    assert data["parameters"]["remainder"] == "head"
    assert not list(tmp_path.glob("*.part"))


def test_nothing_within_the_limit_is_exit_1_with_the_nearest_and_no_file(
    cli: Cli, tmp_path: Path, agreeing: list[str]
) -> None:
    done = cli(*FIT, "--limit", 30, "--out", tmp_path / "a.json")
    assert done.code == 1
    assert "None of " in done.err
    assert "block=16 with" in done.err  # the largest block that leaves two of them
    assert "raise --max-loss" in done.err
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--method", "uniform"), "uniform has nothing to fit; methods that have: "),
        (("--method", "pevlm:unit=token"), "pevlm is fitted in frames"),
        (("--suite", "synthvideo"), "name it as in synthvideo:length=32"),
        (("--suite", "synthvideo", "--frames", "16"), "name it as in synthvideo:length=32"),
        (("--max-loss", "1"), "--max-loss must be at least 0 and below 1, not 1"),
        (("--steps", "0"), "--steps must be at least 1, not 0"),
        (("--out", "/nowhere/a.json"), "--out must be a file in a folder that is there, not '/nowhere/a.json'"),
        (("--model", "dummy"), "fit needs a model"),
    ],
)
def test_what_cannot_be_fitted_is_exit_2_in_a_sentence(cli: Cli, tmp_path: Path, args: Any, said: str) -> None:
    done = cli(*FIT, "--out", tmp_path / "a.json", "--limit", 2, *args)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_fewer_steps_still_reach_from_the_cheapest_to_the_dearest() -> None:
    settings: Any = [(i / 10, None) for i in range(10)]
    assert _spread(settings, None) == settings
    assert [cost for cost, _ in _spread(settings, 4)] == [0.0, 0.3, 0.6, 0.9]
    assert [cost for cost, _ in _spread(settings, 1)] == [0.0]


# The file in use.


def test_an_artefact_gives_sink_and_block_and_what_is_typed_wins(fitted: Path) -> None:
    found = Pevlm(artefact=str(fitted))
    assert (found.sink, found.block) == (0, 8)
    assert (Pevlm(artefact=str(fitted), sink=3).sink, Pevlm(artefact=str(fitted), sink=3).block) == (3, 8)
    assert Pevlm(artefact=str(fitted), block=2).block == 2
    assert (Pevlm().sink, Pevlm().block) == (None, 8)


def test_the_hash_of_a_run_is_of_the_artefacts_content_and_not_of_its_path(
    cli: Cli, fitted: Path, tmp_path: Path
) -> None:
    def folder(path: Path) -> str:
        args = ("--model", MODEL, "--suite", SUITE, "--limit", 1, "--mode", "accuracy", "--no-baseline")
        out = tmp_path / f"runs{len(list(tmp_path.iterdir()))}"
        assert cli("run", *args, "--method", f"pevlm:artefact={path}", "--out", out).code == 0
        (view,) = ResultStore(out).runs()
        params = view.header["spec"]["method_params"]
        assert (params["sink"], params["block"]) == (0, 8)
        assert params["artefact"] == read(str(path), "pevlm").digest
        return view.folder.name

    moved = Path(shutil.copy(fitted, tmp_path / "moved.json"))
    first = folder(fitted)
    assert folder(moved) == first
    assert folder(changed(fitted, seconds=1e9, versions={})) == first
    assert folder(changed(fitted, max_loss=0.25)) != first


def test_an_artefact_of_other_weights_is_refused_with_the_line_that_makes_one(cli: Cli, fitted: Path) -> None:
    done = cli("run", "--model", "dummy", "--suite", SUITE, "--method", f"pevlm:artefact={fitted}")
    assert done.code == 2
    assert f"{fitted} was fitted for {MODEL} with weights" in done.err
    assert f"`vlmbench fit --model dummy --method pevlm --suite {SUITE} --out {fitted}`" in done.err


def test_a_missing_artefact_is_exit_2_with_the_line_that_makes_one(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    done = cli("run", "--model", "dummy", "--suite", SUITE, "--method", f"pevlm:artefact={path}")
    assert done.code == 2
    assert f"{path} does not exist" in done.err
    assert f"vlmbench fit --model MODEL --method pevlm --suite SUITE --out {path}" in done.err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"schema": 2}, "is no artefact of schema 1"),
        ({"method": "memvp"}, "was fitted for memvp"),
        ({"weights_hash": ...}, "it lacks weights_hash"),
        ({"odd": 1}, "it has an unknown key odd"),
        ({"grid": {}}, "grid is {}"),
        ({"chosen": ["sink", "block", "r"]}, "r was chosen but is no parameter"),
        ({"parameters": {"sink": 1, "block": 0}}, "pevlm:block must be at least 1, not 0"),
        ({"parameters": {"sink": 1, "block": "8"}}, "block is '8'"),
    ],
)
def test_an_artefact_is_validated_on_reading(fitted: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        Pevlm(artefact=str(changed(fitted, **values)))
    assert said in str(error.value)


def test_what_is_no_json_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (b"", b"[1]", b"\xff\xfe", b"{"):
        path.write_bytes(text)
        with pytest.raises(UsageError, match=r"cannot be read|is no artefact"):
            Pevlm(artefact=str(path))


def test_an_artefact_of_other_positions_is_refused(fitted: Path) -> None:
    with pytest.raises(UsageError, match="was fitted with positions=sequential, not reused"):
        Pevlm(artefact=str(fitted), positions="reused")


def test_writing_and_reading_give_the_same(fitted: Path, tmp_path: Path) -> None:
    found = read(str(fitted), "pevlm")
    assert isinstance(found, Artefact)
    found.write(tmp_path / "again.json")
    assert read(str(tmp_path / "again.json"), "pevlm") == found
