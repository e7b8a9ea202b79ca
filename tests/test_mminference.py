"""MMInference inside the models: boundaries, the cache, its fit and its file, and what prompts it must take or refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmbench import artefact
from vlmbench.engine import generate
from vlmbench.errors import UsageError
from vlmbench.kernels.calls import reference
from vlmbench.layout import Prompt, Span, TokenLayout
from vlmbench.machine import load_backend
from vlmbench.madeup import Shape
from vlmbench.method import Method
from vlmbench.methods.full import Full
from vlmbench.methods.mminference import Mminference
from vlmbench.mm_artefact import read
from vlmbench.mm_attention import attention
from vlmbench.mm_patterns import INTERS, KINDS, USED, Head, Intra, Run, Scene
from vlmbench.mm_planted import plant
from vlmbench.mm_search import GAIN, at_cost, choose, output_recall, search_layer, text_only
from vlmbench.mm_told import note
from vlmbench.reference import SHIPPED
from vlmbench.request import RunRequest
from vlmbench.suite import Caption
from vlmbench.trace import Trace

Cli = Callable[..., Any]
SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "schema" / "mminference.schema.json"
QUESTION = "where is the red circle ?"
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
"""float32 rounding of averages over some hundred values near one."""
DENSE = Intra("dense")


def qkv(n: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(batch, n, heads, 16, generator=generator).transpose(1, 2) for heads in (4, 2, 2))
    return q, k, v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference(q, k, v, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())


@st.composite
def scenes(draw: Any) -> Scene:
    """Runs of text and vision in turns, of any length, beginning with either."""
    sizes, vision = draw(st.lists(st.integers(1, 50), min_size=1, max_size=7)), draw(st.booleans())
    runs, cursor = [], 0
    for size in sizes:
        runs.append(Run(vision, cursor, cursor + size))
        cursor, vision = cursor + size, not vision
    return Scene(tuple(runs), 12, 4)


# Boundaries.


@settings(max_examples=25)
@given(scenes(), st.sampled_from(INTERS), st.sampled_from(KINDS), st.integers(1, 2))
def test_patterns_that_hold_every_pair_are_full_attention_under_every_boundary(
    scene: Scene, inter: Any, kind: Any, batch: int
) -> None:
    """For any interleaving: causality is by the prompt's own order, and pairs of modalities are joined without loss."""
    n = scene.length
    q, k, v = qkv(n, batch)
    whole = Intra(kind, sink=n, local=n, columns=n, slashes=n, stride="1", phase=0)
    for text in (DENSE, Intra("vs", columns=n, slashes=n)):
        out, did = attention(q, k, v, [Head(whole, text, inter)] * 4, scene)
        torch.testing.assert_close(out, causal(q, k, v), **TOLERANCE)
        assert did.allowed == 4 * batch * n * (n + 1) // 2


@settings(max_examples=25)
@given(scenes(), st.sampled_from(INTERS), st.sampled_from(KINDS))
def test_no_key_from_behind_reaches_a_query_and_rows_without_far_keys_are_no_nan(
    scene: Scene, inter: Any, kind: Any
) -> None:
    """Keys and values of the second half may be anything: rows before it keep their values, if the index is kept too."""
    n = scene.length
    q, k, v = qkv(n)
    head = Head(Intra(kind, sink=2, local=5, columns=4, slashes=4, stride="3", phase=1), DENSE, inter)
    out, did = attention(q, k, v, [head] * 4, scene)
    assert not out.isnan().any()
    assert did.allowed <= 4 * n * (n + 1) // 2
    if kind != "vs":
        half = n // 2
        k2, v2 = k.clone(), v.clone()
        k2[:, :, half:] += 1
        v2[:, :, half:] -= 1
        again, _ = attention(q, k2, v2, [head] * 4, scene)
        torch.testing.assert_close(again[:, :, :half], out[:, :, :half], **TOLERANCE)
        assert not torch.equal(again[:, :, half:], out[:, :, half:])


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_modality_every_boundary_is_bitwise_none(kind: Any) -> None:
    scene = Scene((Run(True, 0, 130),), 12, 4)
    intra = Intra(kind, sink=4, local=20, columns=8, slashes=8)
    q, k, v = qkv(130)
    outs = [attention(q, k, v, [Head(intra, intra, inter)] * 4, scene)[0] for inter in INTERS]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_a_modality_is_indexed_by_its_own_last_queries_whichever_comes_first() -> None:
    """Research code took the range of another modality unless text came first. Vision rows do not feel the text queries."""
    for runs in ((Run(False, 0, 20), Run(True, 20, 90), Run(False, 90, 110)), (Run(True, 0, 70), Run(False, 70, 110))):
        scene = Scene(runs, 10, 5)
        q, k, v = qkv(110)
        head = Head(Intra("vs", columns=4, slashes=4), Intra("vs", columns=4, slashes=4), "q")
        vision = torch.cat([torch.arange(run.start, run.stop) for run in runs if run.vision])
        text = torch.cat([torch.arange(run.start, run.stop) for run in runs if not run.vision])
        before, _ = attention(q, k, v, [head] * 4, scene)
        other = q.clone()
        other[:, :, text] = torch.randn(1, 4, len(text), 16, generator=torch.Generator().manual_seed(1))
        after, _ = attention(other, k, v, [head] * 4, scene)
        assert torch.equal(after[:, :, vision], before[:, :, vision])


def test_heads_with_patterns_of_their_own_are_what_each_is_alone() -> None:
    """Heads of one key head too; a head's pattern never reaches its neighbours."""
    scene = Scene((Run(False, 0, 10), Run(True, 10, 106), Run(False, 106, 120)), 12, 4)
    q, k, v = qkv(120, batch=2)
    text = Intra("vs", columns=4, slashes=4)
    heads = [
        Head(Intra("grid", sink=2, local=6), text),
        Head(Intra("vs", columns=9, slashes=7), text, "q"),
        Head(Intra("grid", sink=2, local=6), text),
        Head(Intra("a_shape", sink=2, local=9), text, "2d"),
    ]
    out, did = attention(q, k, v, heads, scene)
    for number, head in enumerate(heads):
        alone, _ = attention(q, k, v, [head] * 4, scene)
        torch.testing.assert_close(out[:, number], alone[:, number], **TOLERANCE)
    assert len(did.strides) == 4  # two grid heads of two prompts
    one, _ = attention(q[1:], k[1:], v[1:], heads, scene)
    torch.testing.assert_close(out[1:], one, **TOLERANCE)


# What a prompt's layout says.


def test_strides_come_from_the_prompts_own_frames() -> None:
    def layout(rows: int, columns: int) -> TokenLayout:
        size = rows * columns
        frames = [Span("video", 5 + i * size, 5 + (i + 1) * size, 0, i, (rows, columns)) for i in range(3)]
        end = 5 + 3 * size
        return TokenLayout(
            (Span("text", 0, 5), *frames, Span("separator", end, end + 1), Span("text", end + 1, end + 9))
        )

    for rows, columns in ((4, 6), (2, 3)):
        scene = Scene.of(layout(rows, columns))
        size = rows * columns
        assert (scene.frame, scene.row, scene.vision) == (size, columns, (5, 5 + 3 * size))
        assert scene.runs == (Run(False, 0, 5), Run(True, 5, 5 + 3 * size), Run(False, 5 + 3 * size, 14 + 3 * size))
        assert scene.strides("auto") == (size, columns)
        head = Mminference(pattern="sf-fixed").heads(scene, 0, 1)[0].vision
        assert (head.stride, head.phase, head.local) == ("frame", size - 1, size)


def test_published_sizes_shrink_below_their_length_and_stay_above_it() -> None:
    def local(n: int, **options: Any) -> int:
        scene = Scene((Run(True, 0, n),), 10, 5)
        return Mminference(pattern="a_shape", **options).heads(scene, 0, 1)[0].vision.local

    assert (local(20_240), local(1_000_000), local(10_120)) == (4096, 4096, 2048)
    assert (local(10_120, budget=2.0), local(500, budget=2.0, local=77)) == (4096, 77)


def answered(adapter: Any, method: Method, clips: list[Any], captions: Any = ()) -> Any:
    with method.attach(adapter) as trace:
        options = {"captions": captions, "max_new_tokens": 2, "stop_at_eos": False}
        done = generate(adapter, method, trace, clips, QUESTION, **options)
    trace.settle()
    return done, trace


def test_the_cache_is_full_attentions_in_length_and_order(adapter: Any, clip: Any) -> None:
    full, _ = answered(adapter, Full(), [clip(12)])
    for method in (Mminference(local=4), Mminference(pattern="vs", boundary="2d", columns=2, slashes=2)):
        done, _ = answered(adapter, method, [clip(12)])
        for number, (ours, theirs) in enumerate(zip(done.cache.layers, full.cache.layers, strict=True)):
            assert ours.keys.shape == theirs.keys.shape
            assert torch.equal(ours.keys[:, :, :-1], theirs.keys[:, :, :-1]) == (number == 0)


def test_dense_layers_are_left_alone(adapter: Any, clip: Any) -> None:
    method = Mminference(pattern="a_shape", sink=1, local=3, dense_layers=2)
    full, _ = answered(adapter, Full(), [clip(12)])
    done, trace = answered(adapter, method, [clip(12)])
    n = done.prompt.length
    assert sorted(trace.facts["density"]) == sorted(trace.facts["recall"]) == ["2", "3"]
    assert torch.equal(done.cache.layers[2].keys[:, :, :n], full.cache.layers[2].keys[:, :, :n])
    work = method.work(done.prompt, adapter.shapes, trace)
    assert work.pairs[:2] == (n * (n + 1) // 2,) * 2
    assert work.pairs[2] < n * n // 4
    heads, shapes = adapter.shapes.heads, adapter.shapes
    scores = 2 * heads * (8 * (n - 8) + 8 * 9 // 2)  # of two layers, eight queries for the recall
    last = (n - 3) % 64  # rows of the last block of windows; a block of r rows computes r - 1 keys too many in each
    corners = 2 * heads * ((n - 3 - last) * 63 + last * (last - 1))
    assert work.own_flops == (2 * scores + 4 * corners) * shapes.head_dim


@pytest.mark.parametrize("boundary", INTERS)
@pytest.mark.parametrize("frames", [1, 8])
def test_one_frame_long_strides_and_captions_are_taken(adapter: Any, clip: Any, boundary: Any, frames: int) -> None:
    captions = (Caption(-1.0, "where"), Caption(1.2, "red circle")) if frames > 1 else ()
    for method in (
        Mminference(stride="100000", local=3, sink=0, boundary=boundary),
        Mminference(pattern="vs", columns=2, slashes=2, boundary=boundary),
    ):
        done, trace = answered(adapter, method, [clip(frames)], captions)
        assert not done.first_logits.isnan().any()
        assert trace.applied or "all pairs" in trace.reason


def test_sizes_that_hold_everything_are_said_to_be_inactive(adapter: Any, clip: Any) -> None:
    done, trace = answered(adapter, Mminference(pattern="a_shape", local=10_000), [clip(4)])
    assert (trace.applied, trace.reason) == (
        False,
        f"every pattern holds all pairs of {done.prompt.length} tokens; give a smaller budget or smaller sizes",
    )
    assert answered(adapter, Mminference(), [])[1].reason == "the prompt has no visual tokens"


def test_a_prompt_in_pieces_is_refused(adapter: Any, clip: Any) -> None:
    method = Mminference(local=4)
    with torch.inference_mode(), method.attach(adapter) as trace:
        inputs = adapter.to_device(adapter.inputs([clip(4)], QUESTION))
        prompt = method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
        half = prompt.length // 2
        part = Prompt(prompt.embeds[:, :half], prompt.positions[..., :half], prompt.layout, half, prompt.extras)
        with pytest.raises(ValueError, match=f"its {prompt.length} tokens must be prefilled at once; here are {half}"):
            adapter.prefill(part, adapter.new_cache(prompt.length))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local": 0}, "local must be at least 1, not 0"),
        ({"sink": -1}, "sink must be at least 0"),
        ({"budget": 0.0}, "budget must be above 0 and at most 1000, not 0.0"),
        ({"budget": 1e308}, "budget must be above 0 and at most 1000, not 1e"),  # whose sizes are no numbers of tokens
        ({"stride": "frames"}, "stride must be auto, frame, row or a number of tokens of at least 1, not 'frames'"),
        ({"stride": "0"}, "stride must be"),
        ({"phase": -1}, "phase must be at least 0"),
        ({"artefact": "/nowhere.json"}, "does not exist; make it with `vlmbench fit"),
        ({"artefact": ""}, "artefact= must name a file that vlmbench fit wrote, or auto, not a folder"),
        ({"artefact": "x.json", "pattern": "vs"}, "leave pattern out"),
        ({"columns": 5}, "pattern=grid,boundary=none does not use columns; leave it out"),
        ({"pattern": "vs", "local": 5, "stride": "row"}, "does not use stride, local; leave them out"),
        ({"pattern": "sf-fixed", "stride": "row"}, "does not use stride"),
        ({"text": "dense"}, "does not use text"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Mminference(**options)


def test_every_parameter_that_is_taken_changes_what_a_head_does() -> None:
    """None has no effect: a name in a result folder would say otherwise."""
    scene = Scene((Run(False, 0, 9), Run(True, 9, 309), Run(False, 309, 320)), 30, 6)
    values: dict[str, Any] = {
        "lines": "v",
        "stride": "7",
        "phase": 2,
        "sink": 3,
        "local": 5,
        "columns": 4,
        "slashes": 4,
    }
    for pattern, names in USED.items():
        given: dict[str, Any] = {"pattern": pattern}
        plain = Mminference(**given).heads(scene, 0, 5)
        for name in names:
            assert Mminference(**given, **{name: values[name]}).heads(scene, 0, 5) != plain, (pattern, name)


def test_layers_that_are_all_left_alone_are_refused(adapter: Any) -> None:
    count = adapter.shapes.layers
    Mminference(dense_layers=count - 1).check(adapter)
    with pytest.raises(UsageError, match=f"dense_layers={count} leaves none of the model's {count} layers to it"):
        Mminference(dense_layers=count).check(adapter)


def test_scores_that_are_written_out_are_said_to_be_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device without the kernel: every score is computed then, and its time is not the pattern's."""
    shape = Shape(12, 16, 4, 2, 32)
    method = Mminference(pattern="a_shape", local=8, sink=2)
    prompt = method.prepare(shape.prompt(), Trace())
    heads = method.heads(scene := prompt.extras["mm_scene"], 0, 4)
    q, k, v = qkv(shape.tokens)
    for dtype, masked in ((torch.float32, False), (torch.float16, True)):
        trace = Trace()
        _, did = attention(q.to(dtype), k.to(dtype), v.to(dtype), heads, scene)
        note(trace, scene, 0, 4, did)
        assert trace.facts.get("masked", False) == masked
        assert did.tally.written == masked


# The search and its file.


def test_a_later_candidate_must_be_better_by_the_margin() -> None:
    recalls = [
        torch.tensor(row) for row in ([0.50, 0.50, 0.9], [0.505, 0.52, 0.9], [0.511, 0.525, 0.95], [0.515, 0.54, 0.1])
    ]
    assert GAIN == 0.01
    assert choose(recalls) == [2, 3, 2]


def test_recall_of_the_output_is_one_for_dense_and_rises_with_the_budget() -> None:
    q, k, v = qkv(160)
    dense = causal(q, k, v)
    scene = Scene((Run(True, 0, 160),), 16, 4)
    recalls = []
    for local in (4, 20, 60, 160):
        out, _ = attention(q, k, v, [Head(Intra("a_shape", sink=1, local=local), DENSE)] * 4, scene)
        recalls.append(output_recall(out, dense))
    assert bool((torch.stack(recalls).diff(dim=0) >= 0).all())
    torch.testing.assert_close(recalls[-1], torch.ones(4, dtype=torch.double), **TOLERANCE)


def test_what_few_rows_say_counts_by_how_much_they_say() -> None:
    """A mean over rows would let a hundred rows that say nothing hide the one that is lost."""
    dense = torch.full((1, 1, 101, 4), 0.01)
    dense[:, :, 100] = 10.0
    lost, quiet = dense.clone(), dense.clone()
    lost[:, :, 100] = 0
    quiet[:, :, :100] = 0
    assert float(output_recall(lost, dense)) < 0.05 < 0.95 < float(output_recall(quiet, dense))


def test_candidates_come_to_the_same_measured_cost() -> None:
    q, k, v = qkv(400)
    scene = Scene((Run(False, 0, 10), Run(True, 10, 390), Run(False, 390, 400)), 38, 19)
    target = 400 * 120.0
    for intra in (Intra("a_shape", local=4096), Intra("grid", stride="frame"), Intra("vs")):
        fit = at_cost(Head(intra, DENSE), target, q, k, v, causal(q, k, v), scene, 0.25)
        assert fit is not None
        assert 0.7 * target < fit.pairs <= target  # windows are whole tokens, slashes whole blocks
        _, did = attention(q, k, v, [fit.head.scaled(scene.shrink)] * 4, scene)
        assert did.tally.computed == 4 * fit.pairs
    assert at_cost(Head(DENSE, DENSE), target, q, k, v, causal(q, k, v), scene, 0.25) is None


def test_the_search_finds_which_head_is_the_planted_grid() -> None:
    """Values matter: the recall is of the output, and a head that looks along lines is best approximated by lines."""
    n, frame = 420, 20
    scene = Scene((Run(True, 0, n - 20), Run(False, n - 20, n)), frame, 5)
    q, k, v = (torch.randn(1, 2, n, 32, generator=torch.Generator().manual_seed(i)) * 0.3 for i in range(3))
    q[:, 0, :, 0] = 6.0
    k[:, 0, :, 0] = 0.0
    k[:, 0, 7 : n - 20 : frame, 0] = 6.0  # head 0: one place of every frame
    i = torch.arange(n) * 0.05
    for dim, turn in ((0, i.cos()), (1, i.sin())):  # head 1: what is near
        q[:, 1, :, dim] = 9 * turn
        k[:, 1, :, dim] = 9 * turn
    found, _ = search_layer(q, k, v, scene, 1.0, 32**-0.5)
    kinds = [head.vision.kind for head in found.heads]
    assert kinds[0] == "grid"
    assert found.heads[0].vision.stride == "frame"
    assert all(fit.pairs <= found.target for fit in found.fits)
    assert float(found.recall[0]) > 0.9
    assert text_only(found.heads[0]).vision.kind == "vs"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlmbench.cli import main

    out = tmp_path_factory.mktemp("fit") / "mm.json"
    args = ["fit", "--model", "mini-llava-ov@random", "--method", "mminference", "--suite", "synthvideo:length=32"]
    assert main([*args, "--frames", "32", "--limit", "1", "--out", str(out)]) == 0
    return out


def changed(path: Path, change: Callable[[Any], None]) -> str:
    data = json.loads(path.read_text())
    change(data)
    other = path.with_name("changed.json")
    other.write_text(json.dumps(data))
    return str(other)


def test_fit_writes_a_pattern_for_every_head_and_the_model_takes_it(fitted: Path, clip: Any) -> None:
    from tests.conftest import load_mini

    data = json.loads(fitted.read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    adapter = load_mini("mini-llava-ov@random")
    shapes = adapter.shapes
    assert [len(layer["heads"]) for layer in data["layers"]] == [shapes.heads] * shapes.layers
    assert sum(row["heads"] for row in data["candidates"]) == shapes.heads * shapes.layers
    assert f"The search took {data['seconds']:.1f} s." in read(str(fitted)).to_text(fitted)
    method = Mminference(artefact=str(fitted))
    method.check(adapter)
    done, trace = answered(adapter, method, [clip(20)])
    assert trace.applied
    assert len(done.token_ids) == 2
    given = method.fitted()
    assert given.pop("artefact") == read(str(fitted)).digest
    assert set(given) >= {"pattern", "boundary", "stride", "local"}  # which hold for no head of a file
    assert set(given.values()) == {None}
    text, said = answered(adapter, method, [])  # the table for text alone
    assert said.facts["density"] or not said.applied
    assert not text.first_logits.isnan().any()


def test_the_digest_is_of_what_was_found(fitted: Path) -> None:
    digest = read(str(fitted)).digest
    assert read(changed(fitted, lambda data: data.update(seconds=9e9))).digest == digest
    assert read(changed(fitted, lambda data: data["layers"][0]["heads"][0].update(inter="k"))).digest != digest


def _head(data: Any) -> Any:
    return data["layers"][0]["heads"][0]["intra"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("layers"), "damaged .it lacks layers"),
        (lambda data: data.update(extra=1), "unknown key extra"),
        (lambda data: data.update(schema=9), "no artefact of schema 1"),
        (lambda data: data.update(method="pevlm"), "was fitted for pevlm"),
        (lambda data: data.update(weights_hash=3), "weights_hash is 3"),
        (lambda data: data["layers"].clear(), "layers is"),
        (lambda data: data["layers"].pop(), "of different shapes"),
        (lambda data: data["layers"][0]["heads"][0].update(inter="x"), "layers 0: inter of a head is 'x'"),
        (lambda data: _head(data).update(vision={"type": "star"}), "is no pattern"),
        (
            lambda data: _head(data).update(vision={"type": "a_shape", "sink": 4, "local": 0}),
            "local of a a_shape head is 0",
        ),
        (
            lambda data: _head(data).update(
                vision={
                    "type": "grid",
                    "sink": 1,
                    "local": 9,
                    "stride": "196",
                    "phase": None,
                    "h": True,
                    "v": True,
                    "s": False,
                }
            ),
            "stride of a grid head is '196'",
        ),
        (lambda data: _head(data).update(vision={"type": "vs", "columns": 9}), "slashes of a vs head is None"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(fitted: Path, change: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Mminference(artefact=changed(fitted, change))


def test_a_file_of_other_weights_or_another_shape_is_refused(fitted: Path, adapter: Any, cli: Cli) -> None:
    done = cli(
        "run", "--model", "dummy", "--suite", "synthvideo:length=32", "--method", f"mminference:artefact={fitted}"
    )
    assert done.code == 2
    assert "was fitted for mini-llava-ov@random with weights" in done.err

    def drop(data: Any) -> None:
        for name in ("layers", "text_only"):
            data[name].pop()

    fewer = changed(fitted, drop)
    with pytest.raises(UsageError, match=r"3 layers of \[4\] heads, and the model 4 of 4"):
        Mminference(artefact=fewer).check(adapter)


def test_auto_is_the_shipped_file_of_the_loaded_weights_or_else_the_users(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, cache = tmp_path / "shipped", tmp_path / "cache" / "artefacts"
    monkeypatch.setattr(artefact, "SHIPPED", shipped)
    monkeypatch.setenv("VLMBENCH_CACHE", str(tmp_path / "cache"))
    for folder in (shipped, cache):
        folder.mkdir(parents=True)
    mine = read(str(fitted))
    identity: Any = SimpleNamespace(model=mine.model, weights_hash=mine.weights_hash)
    method = Mminference(artefact="auto")
    (cache / "mminference-broken.json").write_text("{")
    replace(mine, weights_hash="other").write(shipped / "mminference-other.json")
    with pytest.raises(UsageError, match=r"finds no file for mini-llava-ov@random .* make one with `vlmbench fit"):
        method.check_weights(identity)
    scene = Scene((Run(True, 0, 50),), 10, 5)
    with pytest.raises(UsageError, match="known once weights are loaded"):  # never quietly a grid for all heads
        method.heads(scene, 0, 4)
    mine.write(cache / "mminference-a.json")
    method.check_weights(identity)
    assert method.fitted()["artefact"] == mine.digest
    assert method.heads(scene, 0, 4) == Mminference(artefact=str(fitted)).heads(scene, 0, 4)
    replace(mine, budget=2.0).write(cache / "mminference-b.json")
    with pytest.raises(UsageError, match=r"finds 2 files .* name the one that you mean"):
        method.check_weights(identity)
    replace(mine, budget=3.0).write(shipped / "mminference-c.json")
    method.check_weights(identity)
    assert method.fitted()["artefact"] == replace(mine, budget=3.0).digest


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_is_shipped_for_every_shipped_model_and_used_without_being_named(name: str, clip: Any) -> None:
    """For the very weights that are shipped: after a training it must be fitted again, with the line in the message."""
    backend: Any = load_backend(RunRequest(model=name, device="cpu", offline=True), name)
    method = Mminference(artefact="auto")
    method.check_weights(backend.identity)
    method.check(backend.adapter)
    path = artefact.SHIPPED / f"mminference-{name}.json"
    assert method.fitted()["artefact"] == read(str(path)).digest
    data = json.loads(path.read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    assert data["seconds"] > 0
    assert data["suite"] == "synthvideo:length=384"
    done, trace = answered(backend.adapter, method, [clip(24)])
    assert trace.applied
    assert sorted(trace.facts["density"]) == [str(layer) for layer in range(backend.adapter.shapes.layers)]
    # Strides are those of this prompt's frames and rows, whatever the file was fitted on.
    layout = done.prompt.layout
    assert {int(stride) for stride in trace.facts["strides"]} <= {Scene.of(layout).frame, Scene.of(layout).row}


def test_a_fit_refuses_what_it_would_not_heed() -> None:
    nothing: Any = None
    for method in (Mminference(pattern="vs"), Mminference(dense_layers=1), Mminference(artefact="auto")):
        with pytest.raises(UsageError, match="fit chooses a pattern for every head of every layer; leave"):
            method.search(nothing)


def test_heads_survive_the_file() -> None:
    head = Head(Intra("grid", stride="row", phase=3, slash=True), Intra("vs", columns=5, slashes=7), "2d")
    assert Head.from_json(json.loads(json.dumps(head.to_json()))) == replace(head)


# Timing.


@pytest.mark.parametrize("pattern", ["grid", "vs", "tri", "mix"])
def test_bench_times_it_on_planted_patterns_after_a_check(cli: Cli, pattern: str) -> None:
    options = ("--frames", 12, "--frame-tokens", 16, "--head-dim", 32, "--heads", 5, "--kv-heads", 1, "--rounds", 2)
    called = cli(
        "bench", "attention", "--method", f"mminference:pattern={pattern}", "--check", "--format", "json", *options
    )
    assert called.code == 0, called.err
    (row,) = json.loads(called.out)["rows"]
    assert row["pairs_limit"] > 1
    assert row["check"].startswith("256 rows within")
    assert cli("bench", "attention", "--method", "mminference:boundary=2d", *options).code == 2


def test_planted_lines_are_the_ones_that_are_found() -> None:
    scene = Scene((Run(False, 0, 14), Run(True, 14, 14 + 640), Run(False, 654, 714)), 64, 8)
    q, k, v = (torch.randn(1, h, 714, 64, generator=torch.Generator().manual_seed(h)) for h in (5, 1, 1))
    heads = Mminference(pattern="mix").heads(scene, 0, 5)
    assert [head.vision.kind for head in heads] == ["grid"] * 3 + ["vs", "a_shape"]
    plant(heads, scene, q, k)
    _, did = attention(q, k, v, heads, scene)
    assert did.strides == [64] * 3
    assert all(float(each.min()) > 0.5 for each in did.recalls[:2])


@pytest.mark.parametrize(("pattern", "off"), [("grid", 1e-3), ("tri", 0.0), ("a_shape", 0.0), ("vs", 0.15)])
def test_a_plan_expects_the_pairs_that_the_rule_then_has(pattern: Any, off: float) -> None:
    """A line's phase moves few pairs; whether diagonals lie together or apart moves more."""
    shape = Shape(40, 16, 4, 2, 32)
    method = Mminference(pattern=pattern, dense_layers=1)
    prompt = method.prepare(shape.prompt(), Trace())
    shapes: Any = SimpleNamespace(layers=2, heads=4, intermediate=8, head_dim=32)
    pairs = method.work(prompt, shapes, Trace()).pairs
    assert pairs[0] == shape.tokens * (shape.tokens + 1) // 2
    q, k = (torch.randn(1, heads, shape.tokens, 32, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    method.plant(prompt, q, k)
    assert pairs[1] == pytest.approx(method.rule(prompt, q, k).pairs, rel=off)


@pytest.mark.parametrize("options", [{"pattern": "a_shape"}, {"pattern": "tri"}, {"stride": "frame", "phase": 0}])
def test_flops_are_of_what_was_computed_and_a_plan_says_the_same(options: Any) -> None:
    """Corners of masks are multiplied and are no pairs of the pattern: both are counted, and named apart."""
    shape = Shape(40, 16, 4, 2, 32)
    method = Mminference(local=70, sink=5, **options)
    prompt = method.prepare(shape.prompt(), Trace())
    shapes: Any = SimpleNamespace(layers=1, heads=4, intermediate=8, head_dim=32)
    planned = method.work(prompt, shapes, Trace())
    q, k, v = (torch.randn(1, heads, shape.tokens, 32) for heads in (4, 2, 2))
    scene = prompt.extras["mm_scene"]
    _, did = attention(q, k, v, method.heads(scene, 0, 4), scene)
    note(trace := Trace(), scene, 0, 4, did)
    assert method.work(prompt, shapes, trace) == planned
    assert did.tally.computed > did.allowed == 4 * planned.pairs[0]
    assert planned.own_flops == (4 * (did.tally.computed - did.allowed) + 2 * did.tally.scores) * 32
    _, dry = attention(q, k, v, method.heads(scene, 0, 4), scene, dry=True)
    assert (dry.tally.computed, dry.tally.pairs, dry.allowed) == (did.tally.computed, did.tally.pairs, did.allowed)
