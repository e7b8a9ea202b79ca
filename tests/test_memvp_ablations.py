"""What MemVP rests on: each change does what it says, rows are of held-out train questions, and the map tells where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from vlmbench import artefact
from vlmbench.engine import TorchBackend
from vlmbench.errors import UsageError
from vlmbench.machine import load_backend
from vlmbench.memvp_ablated import ENTRIES, Ablated, Reordered, Unseen
from vlmbench.memvp_ablations import main
from vlmbench.memvp_data import Material
from vlmbench.memvp_file import Trained
from vlmbench.memvp_learner import MemoryLearner
from vlmbench.memvp_map import firing, place_of, quarter, unpacked
from vlmbench.memvp_memory import MemoryShape, VisualMemory, lay_out
from vlmbench.memvp_text import to_markdown
from vlmbench.memvp_times import made_up
from vlmbench.methods.memvp import Memvp
from vlmbench.request import RunRequest
from vlmbench.suites.synthimage import SynthImage
from vlmbench.suites.synthvideo import SynthVideo

MODEL = "mini-qwen2.5-vl@random"
app = typer.Typer()
app.command()(main)


class Measured(NamedTuple):
    out: Path
    rows: list[dict[str, Any]]

    def of(self, part: str, kind: str = "") -> list[dict[str, Any]]:
        return [row for row in self.rows if row["part"] == part and row.get("kind", "") == kind]


def measure(folder: Path, *more: str) -> Measured:
    args = ["--model", MODEL, "--steps", "1", "--batch", "2", "--slots", "20", "--limit", "45"]
    where = ["--runs", str(folder / "runs"), "--out", str(folder)]
    assert CliRunner().invoke(app, [*args, *where, *more], catch_exceptions=False).exit_code == 0
    return Measured(folder, json.loads((folder / "memvp.json").read_text())["rows"])


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    found = load_backend(RunRequest(model=MODEL, device="cpu"), MODEL)
    assert isinstance(found, TorchBackend)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, backend: TorchBackend) -> Iterator[Measured]:
    """Everything once, on random weights with a file of random numbers beside them."""
    folder = tmp_path_factory.mktemp("ablations")
    memory = Memvp(slots=20).new_memory(backend.adapter).requires_grad_(False)
    memory.p_v.normal_(generator=torch.Generator().manual_seed(0))
    file = Trained(
        shape=memory.shape, scale=0.5, weight=0.01, model=MODEL, revision=None, suite="synthimage", suite_version="1",
        weights_hash=backend.identity.weights_hash, data_hash="0", sampler="endpoints", frames=None, recipe={"steps": 1},
        curve=[], n=1, n_held_out=0, parameters=memory.count, tensors=dict(memory.state_dict()),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(artefact, "SHIPPED", folder / "shipped")
        (folder / "shipped").mkdir()
        file.write(folder / "shipped" / "memvp-mini.safetensors")
        yield measure(folder)


def test_every_setting_is_asked_the_same_held_out_questions(measured: Measured) -> None:
    trained, changed = measured.of("ablations", "trained"), measured.of("ablations", "changed")
    assert [row["what"] for row in trained[:4]] == list(ENTRIES)
    assert {row["what"] for row in trained[4:]} == {
        "λ = 0.001 for 0.01", "λ = 0.1 for 0.01", "s = 0.01 for 0.1", "s = 1 for 0.1", "1 slots for 20", "4 slots for 20",
        "40 slots for 20",
    }  # fmt: skip
    assert changed[0]["what"] == "as trained"
    assert {"another picture", "no picture", "s × 0"} < {row["what"] for row in changed}
    assert {row["n"] for row in (*trained, *changed)} == {3}  # one picture of fifteen, three questions
    for rows in (trained, changed):
        assert rows[0]["delta"] is None
        assert all(row["delta"] == pytest.approx(row["accuracy"] - rows[0]["accuracy"]) for row in rows[1:])


def test_what_was_trained_is_not_trained_again(measured: Measured) -> None:
    states = {path: path.stat().st_mtime_ns for path in (measured.out / "runs").glob("*.training")}
    assert len(states) == len(measured.of("ablations", "trained"))
    again = measure(measured.out, "--part", "trained")
    assert again.rows == measured.rows  # the rows of the other parts stay
    assert {path: path.stat().st_mtime_ns for path in states} == states


def test_the_report_and_the_picture_are_made_of_the_rows(measured: Measured) -> None:
    data = json.loads((measured.out / "memvp.json").read_text())
    assert (measured.out / "memvp.md").read_text() == to_markdown(data)
    (row,) = measured.of("slots")
    with Image.open(measured.out / row["picture"]) as picture:
        assert picture.format == "PNG"
    assert all(sum(unpacked(text)) == pytest.approx(1, abs=1e-3) for text in row["groups"].values())
    assert (row["slots"], row["visual"], row["place_chance"]) == (20, 4, 0.25)
    assert 0 < row["visual_share"] < 1
    assert 0 <= row["place_share"] <= 1


# What each change is.


def made(form: str) -> Ablated:
    memory = Ablated(MemoryShape(4, 6, 8), scale=0.1, weight=0.5, form=ENTRIES[form]).start(0).double().eval()
    with torch.no_grad():
        memory.p_v.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    return memory


def test_what_is_seen_is_in_keys_in_values_or_in_both() -> None:
    like = torch.zeros(1, 4, dtype=torch.float64)
    one, other = (lay_out([(torch.full((5, 4), value).double(), None)], 8, 1, like) for value in (1.0, 2.0))
    moves = {}
    for form in ENTRIES:
        memory = made(form)
        first, second = memory([one]), memory([other])
        moves[form] = (not torch.equal(first.keys, second.keys), not torch.equal(first.values, second.values))
    assert moves == {
        "as published": (True, True),
        "seen in keys only": (True, False),
        "seen in values only": (False, True),
        "no positions": (True, True),
    }
    bare = made("no positions")([one])
    assert torch.equal(0.1 * bare.keys, bare.values)
    assert not bare.keys[:, 5:].any()  # slots that see nothing are nothing
    plain = VisualMemory(MemoryShape(4, 6, 8), scale=0.1, weight=0.5)
    plain.load_state_dict(made("as published").state_dict())
    published, ours = plain.double().eval()([one]), made("as published")([one])
    assert torch.equal(published.keys, ours.keys)
    assert torch.equal(published.values, ours.values)


def test_frames_in_another_order_are_other_slots_and_no_picture_is_none(backend: TorchBackend) -> None:
    adapter = backend.adapter
    one = made_up(adapter, 8, 6, 2, 2)
    layout = one.questions[0].prompt.layout
    halves = [replace(layout.spans[1], stop=7, frame=0), replace(layout.spans[1], start=7, frame=1)]
    prompt = replace(one.questions[0].prompt, layout=type(layout)((layout.spans[0], *halves, layout.spans[2])))
    questions = [each._replace(prompt=prompt) for each in one.questions]
    material = Material(questions, (), one.pictures, "")
    memory = VisualMemory(MemoryShape(64, 64, 6, units=2), scale=0.1).start(0)
    plain = MemoryLearner(adapter, material, memory).slots_of(questions[0])
    same, back = (
        Reordered(adapter, material, memory, order).slots_of(questions[0]).features
        for order in (torch.arange, lambda n: torch.arange(n).flip(0))
    )
    assert torch.equal(same, plain.features)
    assert torch.equal(back[:8], plain.features[:8].reshape(2, 4, -1).flip(0).flatten(0, 1))
    assert Unseen(adapter, material, memory, other=False).slots_of(questions[0]).n_visual == 0
    theirs = MemoryLearner(adapter, material, memory).slots_of(questions[1])
    assert torch.equal(Unseen(adapter, material, memory, other=True).slots_of(questions[0]).features, theirs.features)


# The map.


def test_firing_is_a_share_of_every_slot(backend: TorchBackend) -> None:
    """Without values nothing is added, and a slot with all of the value has all of the share."""
    adapter = backend.adapter
    material = made_up(adapter, 8, 6, 2, 3)
    memory = VisualMemory(MemoryShape(64, 64, 12), scale=0.1, weight=0.0).start(0)
    with torch.no_grad():
        memory.p_v[3] = 1.0
    found = firing(MemoryLearner(adapter, material, memory), material.questions)
    torch.testing.assert_close(found, torch.eye(12)[[3, 3, 3]])


def test_the_thing_asked_for_is_where_the_answer_says() -> None:
    samples = SynthImage().samples()[:60]
    found = [(sample, place_of(sample)) for sample in samples]
    assert all(place == sample.answer for sample, place in found if sample.strata["type"] == "place")
    assert all(place is None for sample, place in found if sample.strata["type"] == "count")
    assert {place for _, place in found if place} == {"topleft", "topright", "bottomleft", "bottomright"}
    assert place_of(SynthVideo(length=8).samples()[0]) is None


def test_quarters_part_a_grid() -> None:
    parts = [quarter(place, (4, 4)).reshape(4, 4) for place in ("topleft", "topright", "bottomleft", "bottomright")]
    assert torch.stack(parts).sum(0).tolist() == [[1] * 4] * 4
    assert parts[1].nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--part", "train"), "--part must be of trained, changed, slots, not 'train'. Did you mean"),
        (("--steps", "0"), "--steps must be above 0, not 0"),
        (("--limit", "6"), "leaves fewer than ten pictures or videos"),
        (("--model", "dummy"), "dummy is a stand-in"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        measure(tmp_path, *args)


def test_a_map_needs_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "SHIPPED", tmp_path)
    with pytest.raises(UsageError, match=f"there is no file for {MODEL} on synthimage"):
        measure(tmp_path, "--part", "slots")
