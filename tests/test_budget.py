"""Budgets: what a method spends, which trivial methods spend as much, and what a table says about those it lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Called
from tests.test_report import answered, fill
from vlmbench.budget import TRIVIAL, Spent, matched, rivals, spent
from vlmbench.engine import TorchBackend
from vlmbench.report import rows
from vlmbench.session import make_methods
from vlmbench.store import ResultStore

FULL = Spent(tokens=100.0, flops=1000.0, attention_flops=400.0, text=9.0)


def counted(visual: float, kept: float, flops: float, attention: float = 400.0) -> dict[str, Any]:
    """Tokens of the prompt, and the work on them, as a record holds them."""
    work = {"flops": flops, "attention_flops": attention, "visual_tokens": kept, "kv_bytes": 8}
    return {"work": work, "tokens": {"prompt": visual + 9, "visual": visual}, "frames": []}


def asked(adapter: Any, clip: Callable[..., Any], spec: str) -> Any:
    """The record of one question about sixteen frames, as far as a budget is concerned."""
    from tests.test_engine import SAMPLE
    from vlmbench.backend import Identity
    from vlmbench.record import SampleRecord

    backend = TorchBackend(adapter, Identity("mini", None, "w", "float32", "cpu", "cpu", "sdpa", "sdpa", "sdpa", {}))
    (method,) = make_methods([spec])
    with backend.attach(method):
        outcome = backend.answer(method, SAMPLE, "what ?", [clip(16)], pass_="accuracy", max_new_tokens=2)
    return SampleRecord("s", "accuracy", "v", "ok", work=outcome.work, tokens=outcome.tokens)


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_a_match_by_flops_is_exact(adapter: Any, clip: Callable[..., Any], tokens: int) -> None:
    """What `uniform` spends at so many tokens is matched by so many tokens, though the formula knows no shapes."""
    full, own = (spent([asked(adapter, clip, spec)]) for spec in ("full", f"uniform:tokens={tokens}"))
    assert full is not None
    assert own is not None
    assert own.tokens == tokens
    assert matched(own, full) == tokens
    assert matched(own._replace(tokens=full.tokens), full) in (
        tokens,
        tokens + 1,
    )  # by FLOPs alone; the head is rounded away
    assert matched(full, full) == full.tokens


def test_tokens_are_counted_where_they_are(adapter: Any, clip: Callable[..., Any]) -> None:
    """CoreMatching drops them after its second layer: the prompt has them all, the layers behind do not, nor the cache."""
    full, core = (asked(adapter, clip, spec) for spec in ("full", "corematching:rho=0.05,part=tokens"))
    assert core.tokens["visual"] == full.tokens["visual"] == full.work["visual_tokens"]
    layers = core.work["tokens"]
    text = core.tokens["prompt"] - core.tokens["visual"]
    assert core.work["visual_tokens"] == pytest.approx(sum(n - text for n in layers) / len(layers))
    assert (core.work["visual_tokens"] < full.work["visual_tokens"]) == (min(layers) < layers[0])
    assert core.work["kv_bytes"] <= full.work["kv_bytes"]


def test_a_match_never_spends_more() -> None:
    for flops in range(0, 1001, 10):
        own = Spent(100.0, float(flops), 0.0, 9.0)
        tokens = matched(own, FULL)
        now, then = 9.0 + tokens, 109.0
        needed = 400 * now * (now + 1) / (then * (then + 1)) + 600 * now / then
        assert 0 <= tokens <= 100
        assert needed <= flops * 1.001 or tokens == 0


def test_rivals_stay_within_the_budget_and_take_whole_pairs_of_frames() -> None:
    found = rivals(37, FULL, 32)
    assert found == {"uniform:tokens=37": 37.0, "random:tokens=37": 37.0, "downsample:ratio=0.3125": 31.25}
    assert list(rivals(3, FULL, 32)) == ["uniform:tokens=3", "random:tokens=3"]  # not a pair of frames
    assert list(rivals(37, FULL, None)) == ["uniform:tokens=37", "random:tokens=37"]
    assert rivals(0, FULL, 32) == rivals(100, FULL, 32) == {}


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "runs")


HALF, RIGHT = [1.0, 0.0] * 20, [1.0] * 40


def test_only_an_equal_budget_is_held_against_a_method(store: ResultStore) -> None:
    """PEVLM keeps every token and saves FLOPs, CoreMatching drops some on the way: neither meets a rival that spends more."""
    fill(store, answered(HALF, **counted(100, 100, 1000)))
    fill(store, answered(HALF, **counted(100, 100, 500)), method="pevlm")
    fill(store, answered(HALF, **counted(100, 60, 700)), method="corematching")
    fill(store, answered(RIGHT, **counted(80, 80, 760)), method="uniform")
    marks = {row["method"]: row["marks"] for row in rows(store.root)}
    assert not any("below-trivial" in each for each in marks.values())
    fill(store, answered(RIGHT, **counted(50, 50, 450)), method="random")
    assert {row["method"] for row in rows(store.root) if "below-trivial" in row["marks"]} == {"pevlm", "corematching"}


def test_a_table_says_what_to_type_until_the_rivals_are_there(store: ResultStore) -> None:
    fill(store, answered(HALF, **counted(100, 100, 1000)), frames=32)
    fill(store, answered(HALF, **counted(50, 50, 450)), frames=32, method="turbo")
    wanted = ["uniform:tokens=50", "random:tokens=50", "downsample:ratio=0.5"]
    while wanted:
        (said,) = [note for note in rows(store.root).notes if "at the budget of turbo" in note]
        assert "the same command with --trivial adds them" in said
        assert said.endswith(" ".join(f"--method {spec}" for spec in wanted))
        method = wanted.pop(0).partition(":")[0]
        fill(store, answered(HALF, **counted(50, 50, 445)), frames=32, method=method)
    assert not [note for note in rows(store.root).notes if "at the budget of" in note]


def test_a_rival_that_could_keep_no_more_is_not_asked_for_again(store: ResultStore) -> None:
    """A Qwen-VL makes four units of seven frames and three of six: three quarters of the tokens, not six sevenths."""
    fill(store, answered(HALF, **counted(100, 100, 1000)), frames=7)
    for method in ("turbo", "uniform", "random"):
        fill(store, answered(HALF, **counted(90, 90, 890)), frames=7, method=method)
    for ratio, asked_for in ((0.571429, True), (0.857143, False)):
        params = {"ratio": ratio, "axis": "frames"}
        fill(store, answered(HALF, **counted(75, 75, 740)), frames=7, method="downsample", method_params=params)
        notes = [note for note in rows(store.root).notes if note.endswith("--method downsample:ratio=0.857143")]
        assert bool(notes) == asked_for, ratio


def test_trivial_on_pictures_takes_no_fewer_frames_and_an_idle_rival_is_no_error(
    cli: Callable[..., Called], tmp_path: Path
) -> None:
    from PIL import Image

    for name in ("a", "b", "c", "d"):
        Image.effect_noise((112, 112), 60).convert("RGB").save(tmp_path / f"{name}.png")
    one, four = tmp_path / "one.jsonl", tmp_path / "four.jsonl"
    one.write_text('{"media": "a.png", "question": "what ?"}')
    four.write_text('{"media": ["a.png", "b.png", "c.png", "d.png"], "question": "what ?"}')
    run = ("run", "--model", "tiny-qwen2.5-vl", "--method", "turbo:r=4,mode=drop", "--max-new-tokens", 1, "--trivial")
    for questions, more in ((one, set()), (four, {"downsample"})):
        suite, out = f"folder:{tmp_path},questions={questions}", tmp_path / questions.stem
        found = cli(*run, "--mode", "accuracy", "--suite", suite, "--out", out)
        assert found.code == 0, found.err
        assert "--trivial adds them" not in found.out
        assert {row["method"] for row in rows(out)} == {"full", "turbo", "uniform", "random"} | more


def test_the_row_holds_every_equivalent(store: ResultStore) -> None:
    work = {**counted(100, 60, 700)["work"], "vision_flops": 5, "vision_dense_flops": 10}
    fill(store, answered(HALF, work=work))
    (row,) = rows(store.root)
    found = {name: row[name] for name in ("n_visual_tokens", "n_kept_tokens", "flops", "kv_bytes", "vision_flops")}
    assert found == {"n_visual_tokens": 100, "n_kept_tokens": 60, "flops": 700, "kv_bytes": 8, "vision_flops": 5}


def test_trivial_asks_the_rivals_at_the_budget_that_a_method_turned_out_to_have(
    cli: Callable[..., Called], tmp_path: Path
) -> None:
    run = ("run", "--model", "tiny-qwen2.5-vl", "--suite", "synthvideo:length=8", "--limit", 2, "--max-new-tokens", 1)
    found = cli(*run, "--method", "turbo:mode=drop", "--trivial", "--mode", "accuracy", "--out", tmp_path)
    assert found.code == 0
    table = rows(tmp_path)
    assert {row["method"] for row in table} == {"full", "turbo", "uniform", "random", "downsample"}
    (turbo,) = [row for row in table if row["method"] == "turbo"]
    for rival in table:
        if rival["method"] in TRIVIAL:
            assert 0.9 * turbo["n_kept_tokens"] <= rival["n_kept_tokens"] <= turbo["n_kept_tokens"]
    assert "--trivial adds them" not in found.out
    again = cli(*run, "--method", "turbo:mode=drop", "--trivial", "--mode", "accuracy", "--out", tmp_path)
    assert again.code == 0
    assert [row["method"] for row in rows(tmp_path)] == [row["method"] for row in table]
    for more, said in (
        (("--no-baseline",), "leave --no-baseline out"),
        (("--mode", "latency"), "give --mode accuracy"),
    ):
        refused = cli(*run, "--trivial", *more, "--out", tmp_path)
        assert refused.code == 2
        assert said in refused.err
