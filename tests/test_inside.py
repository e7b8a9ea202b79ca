"""What is said about the inside of a model is what its tensors hold, and the report shows the numbers that were measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmbench.layout import Span, TokenLayout
from vlmbench.models.base import ModelAdapter
from vlmbench.patch import fingerprint
from vlmbench.record import FINISHED
from vlmbench.reference import inside, inside_probes, probes
from vlmbench.reference.inside_plots import PICTURES
from vlmbench.suites._synth.scene import Event, make_scene
from vlmbench.suites.synthvideo import SynthVideo
from vlmbench.video import Clip

MakeClip = Callable[..., Clip]
QUESTION = "where is the red circle ?"


def causal(n: int) -> torch.Tensor:
    """Uniform attention of two layers and three heads: ``[2, 3, n, n]``."""
    rows = torch.ones(n, n).tril()
    return (rows / rows.sum(-1, keepdim=True)).expand(2, 3, -1, -1)


def event(start: int, frames: int) -> Event:
    return Event(start, frames, "red", "circle", "topleft", "small", None, 16, 16, 8)


# -- one prefill -------------------------------------------------------------------------------------------------------


def test_a_look_holds_every_layer_and_leaves_no_trace(adapter: ModelAdapter, clip: MakeClip) -> None:
    probes.look(adapter, clip(4), QUESTION)  # some families install permanent capturing hooks in their first forward
    before = fingerprint(adapter.model)
    found = probes.look(adapter, clip(4), QUESTION)
    assert fingerprint(adapter.model) == before
    shapes, n = adapter.shapes, found.layout.length
    assert found.attention.shape == (shapes.layers, shapes.heads, n, n)
    assert found.neurons.shape == (shapes.layers, n, shapes.intermediate)
    torch.testing.assert_close(found.attention.sum(-1), torch.ones(shapes.layers, shapes.heads, n))
    assert not found.attention.triu(1).any(), "a token saw a later one"


def test_span_classes_are_a_partition_of_the_prompt(adapter: ModelAdapter, clip: MakeClip) -> None:
    layout = probes.look(adapter, clip(6), QUESTION).layout
    classes = probes.span_classes(layout, {1})
    assert tuple(classes) == probes.CLASSES
    assert torch.cat(list(classes.values())).sort().values.tolist() == list(range(layout.length))
    assert len(classes["needle"]) + len(classes["other frames"]) == layout.n_visual
    unit = layout.units[1]
    assert set(classes["needle"].tolist()) <= set(range(unit.start, unit.stop))
    assert set(probes.question_tokens(layout).tolist()) <= set(classes["text"].tolist())
    assert probes.question_tokens(layout)[-1] == layout.length - 1


def test_the_shares_of_a_head_sum_to_one(adapter: ModelAdapter, clip: MakeClip) -> None:
    found = probes.look(adapter, clip(6), QUESTION)
    shares = probes.answer_shares(found.attention, probes.span_classes(found.layout, {0, 2}))
    torch.testing.assert_close(sum(shares.values()), torch.ones(adapter.shapes.layers, adapter.shapes.heads))


def test_attention_planted_on_the_needle_is_found_there() -> None:
    frames = tuple(Span("video", 3 + 2 * i, 5 + 2 * i, 0, i) for i in range(4))
    layout = TokenLayout((Span("text", 0, 3), *frames, Span("separator", 11, 12, 0), Span("text", 12, 15)))
    classes = probes.span_classes(layout, {2})
    attention = torch.zeros(1, 2, 15, 15)
    attention[0, 0, -1, [7, 8]] = 0.5
    attention[0, 1, -1, [0, 11]] = 0.5
    shares = {name: share[0].tolist() for name, share in probes.answer_shares(attention, classes).items()}
    assert shares == {
        "sink": [0, 0.5],
        "needle": [1, 0],
        "other frames": [0, 0],
        "separators": [0, 0.5],
        "text": [0, 0],
    }


# -- which tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 32])
def test_the_events_that_a_question_is_about_hold_its_answer(length: int) -> None:
    samples = [each for each in SynthVideo(length=length).samples() if each.strata["type"] in probes.PROBED]
    assert {each.strata["type"] for each in samples} == set(probes.PROBED)
    for sample in samples:
        kind = sample.strata["type"]
        scene = make_scene(sample.extra["seed"], length)
        found = probes.events_of(sample, scene)
        assert len(found) == (2 if kind in ("before", "after") else 1)
        told = found[-1 if kind == "after" else 0]
        attribute = kind if kind in ("shape", "place", "motion") else "colour"
        assert getattr(told, attribute) == sample.answer


def test_questions_about_all_events_have_no_needle() -> None:
    sample = next(each for each in SynthVideo(length=32).samples() if each.strata["type"] == "count")
    with pytest.raises(ValueError, match="'count' is not about one or two events"):
        probes.events_of(sample, make_scene(sample.extra["seed"], 32))


def test_a_unit_of_two_frames_shows_what_either_shows(clip: MakeClip) -> None:
    assert probes.needle_units([event(3, 2)], clip(8), n_units=8) == {3, 4}
    assert probes.needle_units([event(3, 2)], clip(8), n_units=4) == {1, 2}
    assert probes.needle_units([event(6, 1), event(0, 1)], clip(7), n_units=4) == {0, 3}


@pytest.mark.parametrize("needle", [{0}, {3, 4, 5}, {0, 1, 2, 3, 4, 5, 6}])
def test_other_units_are_as_many_and_show_nothing_of_the_needle(needle: set[int]) -> None:
    found = probes.other_units(needle, 10)
    assert not found & needle
    assert len(found) == min(len(needle), 10 - len(needle))


# -- concentration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 21, 33, 100])
def test_under_uniform_attention_the_top_5_percent_hold_5_percent(n: int) -> None:
    torch.testing.assert_close(probes.top_share(causal(n), torch.arange(n)), torch.full((2, 3), 0.05))


def test_under_one_hot_attention_the_top_5_percent_hold_everything() -> None:
    attention = torch.zeros(2, 3, 40, 40)
    attention[..., 0] = 1
    torch.testing.assert_close(probes.top_share(attention, torch.arange(40)), torch.ones(2, 3))


def test_queries_with_few_keys_are_left_out() -> None:
    attention = causal(40).clone()
    attention[:, :, :19] = 7.0
    torch.testing.assert_close(probes.top_share(attention, torch.arange(40)), torch.full((2, 3), 0.05))
    assert probes.top_share(attention, torch.arange(19)).isnan().all()


# -- neurons -----------------------------------------------------------------------------------------------------------


def test_a_set_of_tokens_shares_all_core_neurons_with_itself() -> None:
    core = probes.core_neurons(torch.randn(3, 7, 200))
    assert core.sum(-1).tolist() == [20, 20, 20]
    assert probes.overlap(core, core).tolist() == [1, 1, 1]
    assert probes.overlap(core, ~core).tolist() == [0, 0, 0]


def test_the_core_of_one_token_is_its_largest_neurons_whatever_their_sign() -> None:
    token = torch.tensor([[[0.1, -9, 3, 0, 2, 0.2, -0.3, 1, 0.5, 0.4]]])
    assert probes.core_neurons(token, top=0.2).nonzero()[:, 1].tolist() == [1, 2]


def test_a_neuron_that_most_tokens_use_beats_a_large_one_that_one_token_uses() -> None:
    neurons = torch.zeros(1, 3, 10)
    neurons[0, :, 4] = 1
    neurons[0, 1, 7] = 100
    assert probes.core_neurons(neurons, top=0.1).nonzero()[:, 1].tolist() == [4]


def test_random_activations_share_about_what_chance_predicts() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (probes.core_neurons(torch.randn(400, 5, 128, generator=generator)) for _ in range(2))
    # 400 pairs of 13 of 128 neurons: the standard error of the mean is below 0.003.
    assert float(probes.overlap(a, b).mean()) == pytest.approx(probes.chance_overlap(128), abs=0.01)


def test_the_chance_of_sharing_is_the_mean_over_all_pairs_of_sets() -> None:
    # Two of four neurons each: the same pair 1/6 of the time, one in common 4/6 (IoU 1/3), none 1/6.
    assert probes.chance_overlap(4, top=0.5) == pytest.approx(1 / 6 + 4 / 6 / 3)


def test_a_difference_that_every_video_shows_is_beyond_the_error() -> None:
    a = [torch.tensor([0.5, 0.3 + 0.01 * i]) for i in range(6)]
    b = [torch.tensor([0.5, 0.2]) for _ in range(6)]
    same, more = inside_probes.differences(a, b, [str(i) for i in range(6)])
    assert same == {"value": 0, "low": 0, "high": 0}
    assert more["low"] is not None
    assert 0 < more["low"] < more["value"] == pytest.approx(0.125)  # type: ignore[operator]
    assert inside_probes.differences(a, b, ["one"] * 6)[1]["low"] is None


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report about two small random models on short videos."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "LENGTHS", (8, 12))
        patch.setattr(inside, "DEPTHS", (0.0, 1.0))
        patch.setattr(inside_probes, "PROBE_FRAMES", 8)
        models = ["mini-llava-ov@random", "mini-qwen2.5-vl@random"]
        inside.main(runs=folder / "runs", out=folder / "out", model=models, limit=3, from_=None)
    return folder


def test_the_markdown_shows_the_numbers_of_the_json(written: Path) -> None:
    data = json.loads((written / "out" / "reference.json").read_text())
    text = (written / "out" / "reference.md").read_text()
    assert list(data["models"]) == ["mini-llava-ov@random", "mini-qwen2.5-vl@random"]
    for name, found in data["models"].items():
        assert f"| `{name}` | {found['parameters']:,} |" in text
        for row in (*found["types"], *found["needle"]):
            assert f"{row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in text
        for layer, row in enumerate(found["probes"]["shares"]["needle"]):
            assert any(
                line.startswith(f"| {layer} |") and f"| {sum(row) / len(row):.2f} |" in line
                for line in text.split("\n")
            )
        assert f"By chance: {found['probes']['overlap_chance']:.3f}." in text
    assert "nan" not in text.lower().split()
    assert all(f"]({path})" in text for path in (f"reference/{name}.png" for name in PICTURES))


def test_the_probes_of_a_model_add_up(written: Path) -> None:
    for found in json.loads((written / "out" / "reference.json").read_text())["models"].values():
        measured = found["probes"]
        shares = torch.tensor(list(measured["shares"].values()))  # [classes, L, H]
        torch.testing.assert_close(shares.sum(0), torch.ones(found["layers"], found["heads"]), atol=1e-4, rtol=0)
        assert measured["n"] == 3
        for values in (*measured["top"].values(), *measured["overlap"].values()):
            assert len(values) == found["layers"]


def test_pictures_are_there_and_small(written: Path) -> None:
    for name in PICTURES:
        path = written / "out" / "reference" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 100_000


def test_drawing_again_from_the_json_gives_the_same_text(written: Path, tmp_path: Path) -> None:
    inside.main(from_=written / "out" / "reference.json", out=tmp_path)
    assert (tmp_path / "reference.md").read_text() == (written / "out" / "reference.md").read_text()
    assert not (tmp_path / "reference.json").exists()


def test_a_second_measurement_answers_no_question_again(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmbench.engine import TorchBackend
    from vlmbench.progress import Progress

    asked: list[Any] = []
    monkeypatch.setattr(TorchBackend, "answer", lambda *args, **kwargs: asked.append(args))
    with Progress() as progress:
        records = inside._answered("mini-llava-ov@random", "synthvideo:length=8", written / "runs", 3, progress, [])
    assert not asked
    assert [each.status in FINISHED for each in records] == [True] * 3
