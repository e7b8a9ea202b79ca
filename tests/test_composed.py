"""Methods joined with ``+``: exactly what each does alone where the other does nothing, and refused where they collide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vlmbench.cache import lengths
from vlmbench.composed import Composed, join, neutral_of, parts_of
from vlmbench.errors import UsageError
from vlmbench.floors import Key
from vlmbench.gate import _is
from vlmbench.layout import Prompt
from vlmbench.loaded import typed
from vlmbench.method import Method
from vlmbench.patch import Patcher, fingerprint
from vlmbench.report import rows
from vlmbench.session import make_methods
from vlmbench.spec import joined, params_of, parse_chain
from vlmbench.tables import to_markdown
from vlmbench.trace import Trace

TOKENS = (5, 6, 7)
ROUNDING = 1e-5
"""float32 rounding of a four-layer model at values of a few units."""


class Run(NamedTuple):
    logits: Tensor
    prompt: Prompt
    cache: Any
    trace: Trace
    method: Method


def one(spec: str) -> Method:
    (method,) = make_methods([spec])
    return method


@torch.inference_mode()
def run(adapter: Any, method: Method | str, clips: list[Any]) -> Run:
    """Logits of prefill and of a few forced tokens."""
    method = one(method) if isinstance(method, str) else method
    method.check(adapter)
    with method.attach(adapter) as trace:
        trace.reset("sample")
        inputs = adapter.inputs([method.prepare_clip(clip, trace) for clip in clips], "where is the red circle ?")
        prompt = method.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
        cache = adapter.new_cache(len(TOKENS))
        logits = [adapter.prefill(prompt, cache)]
        for step, token in enumerate(TOKENS):
            logits.append(adapter.decode(torch.tensor([[token]]), prompt.next_position + step, cache))
    return Run(torch.cat(logits), prompt, cache, trace, method)


# Where one part does nothing, the other is as it is alone.


@pytest.mark.parametrize(
    ("both", "alone"),
    [
        ("turbo:r=0+pevlm:sink=0,block=1", "pevlm:sink=0,block=1"),
        ("pevlm:sink=0,block=1+turbo:r=0", "pevlm:sink=0,block=1"),
        ("turbo:r=0+corematching", "corematching"),
        ("turbo:r=4,min_tokens=0,mode=drop+corematching:beta=1,min_keep=1000000", "turbo:r=4,min_tokens=0,mode=drop"),
        ("pevlm:sink=0,block=1+corematching:beta=1,min_keep=1000000", "pevlm:sink=0,block=1"),
        ("downsample:ratio=1+uniform:ratio=0.5", "uniform:ratio=0.5"),
        ("uniform:ratio=1+mminference:pattern=grid,local=4", "mminference:pattern=grid,local=4"),
        ("offload+pevlm:sink=0,block=1", "pevlm:sink=0,block=1"),
    ],
)
def test_a_neutral_part_changes_nothing_to_the_last_bit(adapter: Any, clip: Any, both: str, alone: str) -> None:
    ours, theirs = run(adapter, both, [clip(6)]), run(adapter, alone, [clip(6)])
    assert torch.equal(ours.logits, theirs.logits)
    assert lengths(ours.cache) == lengths(theirs.cache)
    shapes = adapter.shapes
    works = [each.method.work(each.prompt, shapes, each.trace) for each in (ours, theirs)]
    assert works[0].tokens == works[1].tokens
    assert works[0].pairs == works[1].pairs


def test_full_adds_nothing() -> None:
    for spec in ("pevlm:sink=2+full", "full+pevlm:sink=2", "full+pevlm:sink=2+full"):
        assert make_methods([spec]) == make_methods(["pevlm:sink=2"])
    assert one("full+full") == one("full")


# What the parts do together.


def test_turbo_shortens_and_pevlm_plans_what_is_left(adapter: Any, clip: Any) -> None:
    """The same as shortening a prompt by hand and giving it to PEVLM."""
    turbo, pevlm = "turbo:r=4,min_tokens=0,mode=drop", "pevlm:sink=0,block=1"
    ours, short = run(adapter, f"{turbo}+{pevlm}", [clip(6)]), run(adapter, turbo, [clip(6)])
    method = one(pevlm)
    with torch.inference_mode(), method.attach(adapter) as trace:
        trace.reset("sample")
        prompt = method.prepare(short.prompt, trace)
        logits = adapter.prefill(prompt, adapter.new_cache(0))
    assert torch.equal(ours.logits[:1], logits)
    assert ours.trace.kept["prompt"] == short.trace.kept["prompt"]
    assert ours.trace.facts["plan"] == trace.facts["plan"]
    work = ours.method.work(ours.prompt, adapter.shapes, ours.trace)
    assert work.vision == short.method.work(short.prompt, adapter.shapes, short.trace).vision
    assert work.pairs == method.work(prompt, adapter.shapes, trace).pairs
    assert set(work.tokens) == {ours.prompt.length}


@pytest.mark.parametrize("early", ["pruned", "kept"])
@pytest.mark.parametrize(
    "prefill", ["pevlm:sink=0,block=1", "block:block=2", "mminference:pattern=a_shape,sink=2,local=8"]
)
def test_layers_behind_the_removal_attend_by_the_same_rule_over_what_is_left(
    adapter: Any, clip: Any, prefill: str, early: str
) -> None:
    """Against one pass over the whole prompt in which those layers may not look at the tokens that left."""
    clips = [clip(12)]
    ours = run(adapter, f"{prefill}+corematching:beta=1,early_kv={early}", clips)
    keep = ours.trace.kept["layer 2"]
    assert len(keep) < ours.prompt.length
    first = one(prefill)
    with torch.inference_mode(), Patcher(adapter) as patch:
        trace = Trace(sample_id="sample")
        inputs = adapter.inputs(clips, "where is the red circle ?")
        prompt = first.prepare(adapter.splice(inputs, adapter.encode_vision(inputs)), trace)
        first.install(patch, trace)
        less = prompt.select(torch.tensor(keep))

        def cut(module: Any, args: Any, kwargs: Any) -> Any:
            if args[0].shape[1] == 1:  # a generated token sees all that the layer holds
                return args, {**kwargs, "attention_mask": None}
            hidden = args[0][:, keep] if args[0].shape[1] == prompt.length else args[0]
            cos, sin = kwargs["position_embeddings"]
            rotations = (cos[..., keep, :], sin[..., keep, :])
            here = {"position_embeddings": rotations, "vlmbench_layout": less.layout, "attention_mask": None}
            return (hidden, *args[1:]), {**kwargs, **here, **less.extras}

        for layer in adapter.layers[2:]:
            patch.pre(layer, cut)
        cache = adapter.new_cache(len(TOKENS))
        want = [adapter.prefill(prompt, cache)]
        for held in cache.layers[:2] if early == "pruned" else ():
            held.keep(torch.tensor(keep))
        for step, token in enumerate(TOKENS):
            want.append(adapter.decode(torch.tensor([[token]]), prompt.next_position + step, cache))
    torch.testing.assert_close(ours.logits, torch.cat(want), rtol=0, atol=ROUNDING)
    n, k = ours.prompt.length, len(keep)
    held = k if early == "pruned" else n
    assert lengths(ours.cache)[1] == [held + len(TOKENS)] * 2 + [k + len(TOKENS)] * 2
    work = ours.method.work(ours.prompt, adapter.shapes, ours.trace)
    assert work.tokens == (n, n, k, k)
    assert work.pairs[2] < work.pairs[1]
    if "block_plan" in ours.prompt.extras:
        assert work.pairs[2:] == (less.extras["block_plan"].pairs,) * 2


def test_a_plan_over_fewer_tokens_allows_what_it_allowed_of_them() -> None:
    from vlmbench.kernels.block_attention import make_plan

    plan = make_plan([(3, 6), (6, 9), (9, 12), (12, 15)], 20, sink=1, block=1)
    assert plan is not None
    keep = [0, 2, 4, 7, 12, 13, 16, 19]
    less = plan.selected(None, keep)
    assert torch.equal(less.allow, plan.allow[keep][:, keep])
    assert less.blocks == ((3, 4), (4, 6))  # of the block 9–12 nothing is left
    assert less.pairs == int(less.allow.sum())


def test_core_neurons_of_int8_weights_are_kept_as_int8(adapter: Any, clip: Any) -> None:
    """One byte a weight in the copies too, and what decoding computes is the FFN of the whole int8 matrices, masked."""
    ours = run(adapter, "int8+corematching:part=neurons,beta=0.5", [clip(6)])
    again = run(adapter, "corematching:part=neurons,beta=0.5+int8", [clip(6)])
    assert torch.equal(ours.logits, again.logits)  # weights come first, whatever the order
    shapes = adapter.shapes
    k = shapes.intermediate // 2
    one_layer = 3 * shapes.hidden * k + 4 * (2 * k + shapes.hidden)
    assert ours.trace.facts["core_neurons"]["copied_bytes"] == shapes.layers * one_layer
    whole, alone = (run(adapter, spec, [clip(6)]) for spec in ("int8+corematching:part=neurons,beta=1", "int8"))
    torch.testing.assert_close(whole.logits, alone.logits, rtol=0, atol=ROUNDING)
    assert not torch.allclose(ours.logits[1:], alone.logits[1:], rtol=0, atol=100 * ROUNDING)


def test_two_that_shorten_count_what_is_kept_in_the_whole_prompt(adapter: Any, clip: Any) -> None:
    ours = run(adapter, "uniform:ratio=0.5+random:ratio=0.5", [clip(6)])
    whole = run(adapter, "full", [clip(6)])
    keep = ours.trace.kept["prompt"]
    assert len(keep) == ours.prompt.length
    assert torch.equal(ours.prompt.embeds, whole.prompt.embeds[:, keep])


# When there is nothing to do.


def test_inactive_when_all_parts_are_and_else_it_says_which(adapter: Any, clip: Any) -> None:
    some = run(adapter, "turbo:r=0+uniform:ratio=0.5", [clip(6)]).trace
    assert (some.applied, some.reason) == (True, "")
    assert some.to_json()["idle"] == {"turbo": "r is 0"}
    none = run(adapter, "pevlm+uniform:ratio=0.5", []).trace
    assert not none.applied
    assert none.reason == "pevlm: the prompt has no frames; uniform: the prompt has no visual tokens"
    none.reset("next")
    assert none.applied
    assert none.parts["pevlm"].sample_id == "next"
    assert "idle" not in none.to_json()


def test_a_part_that_changes_its_mind_is_heard() -> None:
    trace = Trace()
    part, other = trace.part("a"), trace.part("b")
    for each in (part, other):
        each.inactive("nothing")
    assert not trace.applied
    part.applied, part.reason = True, ""
    assert trace.applied
    assert trace.part("a") is part
    part.facts["x"] = 1
    assert trace.facts == {"x": 1}


def test_traits_and_neutral_settings_are_those_of_the_parts() -> None:
    method = one("turbo:mode=drop+pevlm")
    assert method.name == "turbo+pevlm"
    assert method.traits.stages == {"vision", "prompt", "prefill"}
    assert method.traits.prefix_reusable
    assert not one("turbo+corematching").traits.prefix_reusable
    assert neutral_of(method) == one("turbo:r=0,mode=drop+pevlm:sink=0,block=1000000")
    assert neutral_of(one("pevlm+int8")) is None
    assert parts_of(method)[0].name == "turbo"
    assert join(parts_of(method)) == method


def test_a_pattern_that_holds_every_pair_of_fewer_tokens_too_did_nothing(adapter: Any, clip: Any) -> None:
    pattern = "mminference:pattern=grid,lines=v,stride=1,phase=0,sink=0,local=1"
    trace = run(adapter, f"{pattern}+corematching:beta=1", [clip(12)]).trace
    assert len(trace.kept["layer 2"]) < trace.kept["layer 2"][-1] + 1  # tokens did leave
    assert set(trace.idle) == {"mminference"}


# Faults.


def test_a_fault_in_the_second_part_leaves_nothing_attached(adapter: Any, clip: Any, monkeypatch: Any) -> None:
    method = one("int8+turbo:r=4,min_tokens=0+pevlm:sink=0,block=1")
    run(adapter, "full", [clip(4)])
    before = fingerprint(adapter.model)

    def broken(*_: Any) -> None:
        raise KeyError("install")

    monkeypatch.setattr(type(parts_of(method)[2]), "install", broken)
    with pytest.raises(KeyError, match="install"), method.attach(adapter):
        pass
    assert fingerprint(adapter.model) == before
    assert "encode_vision" not in vars(adapter)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "pevlm+mminference",
            "pevlm+mminference: pevlm and mminference as given both take the attention of the language",
        ),
        (
            "turbo:text_step=0.07+star",
            "turbo+star: turbo and star as given both take the attention of the language model",
        ),
        (
            "turbo:text_step=0.07+corematching",
            "turbo and corematching as given both take which tokens a layer's cache holds",
        ),
        ("ape+corematching", "ape and corematching as given both take which tokens a layer's cache holds"),
        ("pevlm+corematching:spearman=on", "pevlm and corematching as given both take the attention"),
        ("int8+corematching:offload=on", "int8 and corematching as given both take the weights of the language model"),
        ("int8+offload", "int8 and offload as given both take the weights"),
        (
            "memvp+corematching",
            "memvp takes the visual tokens, of which it leaves none in the prompt, and corematching acts",
        ),
        (
            "uniform+blind",
            "blind takes the visual tokens, of which it leaves none in the prompt, and uniform acts on nothing",
        ),
        (
            "prior+uniform",
            "prior+uniform: prior never calls the model, so no method can be joined with it; run it alone.",
        ),
        ("uniform+uniform:ratio=0.5", "uniform+uniform: uniform is there twice; give it once."),
        (
            "pevlm+random+turbo:mode=drop",
            "turbo drops tokens by their places in whole frames, which random has cut by then; write turbo before random.",
        ),
        ("uniform+nothing", "No method is called 'nothing'"),
        ("pevlm+", "'pevlm+' lacks a method beside a +; write name+name."),
        ("pevlm++int8", "'pevlm++int8' lacks a method beside a +"),
    ],
)
def test_pairs_that_cannot_be_are_refused_in_a_sentence(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_methods([spec])
    assert says in str(refused.value)


def test_those_that_the_paper_pairs_suggest_are_taken() -> None:
    for spec in (
        *("turbo+pevlm", "turbo+corematching", "turbo+mminference", "ape+corematching:part=neurons", "memvp+int8"),
        *(
            f"{each}+corematching"
            for each in ("pevlm", "mminference", "star", "block", "uniform", "random", "downsample")
        ),
        *(f"{each}+int8" for each in ("turbo", "pevlm", "mminference", "corematching", "uniform", "blind", "ape")),
        *("downsample+turbo+pevlm+corematching+int8", "downsample+turbo:mode=drop+uniform", "uniform+turbo"),
        "pevlm+turbo:mode=drop",
    ):
        assert isinstance(one(spec), Composed)


def test_every_part_checks_the_model(adapter: Any) -> None:
    with pytest.raises(UsageError, match="select_layer=9"):
        one("uniform+corematching:select_layer=9").check(adapter)


# Names, hashes, tables.


def test_the_stored_name_and_parameters_spell_the_spec_again() -> None:
    method = one("turbo:r=8,mode=drop,schedule=3/2+pevlm:sink=4+int8")
    params = params_of(method)
    assert method.name == "turbo+pevlm+int8"
    assert (params["turbo.r"], params["pevlm.sink"], params["turbo.schedule"]) == (8, 4, (3, 2))
    spelled = joined(method.name, typed(params))
    assert one(spelled) == method
    assert spelled.startswith("turbo:r=8,")
    assert spelled.endswith("+int8")
    assert joined("pevlm", "sink=4") == "pevlm:sink=4"
    assert joined("full", "") == "full"
    assert joined("turbo+pevlm", "pevlm.sink=4") == "turbo+pevlm:sink=4"


def test_parameters_of_that_name_are_a_methods_own() -> None:
    @dataclass(frozen=True)
    class Halves(Method):
        parts: int = 2

    assert params_of(Halves()) == {"parts": 2}


def test_parts_in_another_order_are_another_method() -> None:
    first, second = (one(spec) for spec in ("uniform+random", "random+uniform"))
    assert first != second
    assert make_methods(["uniform+random", "uniform+random:ratio=0.25"]) == [first]


def test_runs_tables_and_gates_know_it(cli: Any, tmp_path: Any) -> None:
    """Two questions on the stand-in: stored under its own folder, shown as one would type it, named by a gate."""
    spec = "uniform:ratio=0.5+random:ratio=0.5"
    done = cli(
        "run", "--model", "dummy", "--method", spec, "--suite", "synthvideo:length=32", "--limit", 4, "--out", tmp_path
    )
    assert done.code == 0, done.err
    assert len(list(tmp_path.glob("*/dummy/uniform-random-*"))) == 1
    found = rows(tmp_path, include_dummy=True)
    (row,) = (row for row in found if row["method"] != "full")
    assert (row["method"], row["n"], row["marks"]) == ("uniform+random", 4, ["cpu"])
    assert row["params"] == "uniform.ratio=0.5,random.ratio=0.5,random.seed=0"
    assert "`uniform:ratio=0.5+random:ratio=0.5,seed=0`" in to_markdown(found)
    key = Key("dummy", "synthvideo", row["method"], row["params"], "")
    for named, is_it in (
        (spec, True),
        ("uniform+random", True),
        ("uniform+random:ratio=0.3", False),
        ("uniform", False),
    ):
        assert _is(parse_chain(named), key.method_spec) is is_it
    again = cli(
        "run", "--model", "dummy", "--method", spec, "--suite", "synthvideo:length=32", "--limit", 4, "--out", tmp_path
    )
    assert again.code == 0
    assert len(list(tmp_path.glob("*/dummy/*"))) == 2


def test_the_users_own_check_takes_it(adapter: Any, monkeypatch: Any) -> None:
    """`vlmbench check contract`: every promise holds or does not apply."""
    from vlmbench.check_contract import check
    from vlmbench.check_promises import Subject

    monkeypatch.setattr("vlmbench.check_promises.STEPS", 2)
    for spec in ("turbo:r=4,min_tokens=0,mode=drop+pevlm:sink=0,block=1", "int8+corematching"):
        found = {each.name: each for each in check(Subject(adapter, one(spec), one("full"), 6))}
        del found["the model's own generate"]  # which is the family's, and no method's
        assert all(each.ok is not False for each in found.values()), found
        assert (found["text alone is left alone"].ok is None) == spec.startswith("int8")
        assert (found["neutral is full attention"].ok is None) == spec.startswith("int8")


def test_plan_and_bench_work_with_it_or_say_why_not() -> None:
    from vlmbench.bench import bench
    from vlmbench.madeup import shapes
    from vlmbench.plan import plan

    (shape,) = shapes(tokens=None, frames=6, frame_tokens=16, preset="mini-llava-ov")
    method = one("turbo:r=4,min_tokens=0,mode=drop+pevlm:sink=0,block=1")
    ours = plan("mini-llava-ov", method, shape, "h200", torch.float32, 4)
    assert {row["method"] for row in ours} == {"turbo+pevlm"}
    dense = plan("mini-llava-ov", one("full"), shape, "h200", torch.float32, 4)
    assert all(mine["flops"] < full["flops"] for mine, full in zip(ours[:2], dense[:2], strict=True))
    with pytest.raises(UsageError, match="int8 keeps weights in another form or place, which plan does not count"):
        plan("mini-llava-ov", one("int8"), shape, "h200", torch.float32, 4)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "rounds": 2, "check": False}
    with pytest.raises(UsageError, match="bench attention takes one method at a time"):
        bench("attention", "uniform+pevlm", shape, **options)
    row = bench("prefill", "pevlm:sink=0,block=1+corematching", shape, **options)
    assert row["method"] == "pevlm+corematching"
    assert row["ratio"] > 0
