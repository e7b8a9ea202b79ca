"""``check contract`` finds every promise that a method breaks, and ``check invariance`` counts the answers that flip."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.conftest import load_mini
from vlmbench.check_contract import Check, check, to_markdown
from vlmbench.check_invariance import Variant, variants
from vlmbench.check_promises import PROMISES, Subject
from vlmbench.method import Citation, Method, Traits, Work
from vlmbench.methods.full import Full
from vlmbench.record import Pass, SampleRecord
from vlmbench.request import RunRequest

Cli = Callable[..., Any]
MODEL = "mini-llava-ov@random"
ACCURACY: Pass = "accuracy"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens show all that eight do: one of prefill, one of decoding."""
    monkeypatch.setattr("vlmbench.check_promises.STEPS", 2)


@dataclass(frozen=True)
class Sound(Method):
    """Scales the visual embeddings of a prompt: it acts, and keeps every promise."""

    name: ClassVar[str] = "sound"
    cite: ClassVar[Citation] = Citation("a test")
    traits: ClassVar[Traits] = Traits(stages=frozenset({"prompt"}))
    scale: float = 0.5

    @classmethod
    def neutral(cls) -> Sound:
        return cls(scale=1.0)

    def prepare(self, prompt: Any, trace: Any) -> Any:
        visual = prompt.layout.indices("video", "image")
        if not len(visual):
            trace.inactive("no picture")
            return prompt
        embeds = prompt.embeds.clone()
        embeds[:, visual] *= self.scale
        return replace(prompt, embeds=embeds)


class Leaves(Sound):
    """Touches the model without the Patcher."""

    def install(self, patch: Any, trace: Any) -> None:
        patch.adapter.layers[0].left_behind = True


class Remembers(Sound):
    """Carries the number of tokens of one sample to the next."""

    def install(self, patch: Any, trace: Any) -> None:
        object.__setattr__(self, "seen", [])

    def prepare(self, prompt: Any, trace: Any) -> Any:
        self.seen.append(prompt.length)  # type: ignore[attr-defined]
        scaled = super().prepare(prompt, trace)
        return replace(scaled, embeds=scaled.embeds * sum(self.seen))  # type: ignore[attr-defined]


class Drifts(Sound):
    """Draws from the global generator."""

    def prepare(self, prompt: Any, trace: Any) -> Any:
        scaled = super().prepare(prompt, trace)
        return replace(scaled, embeds=scaled.embeds * torch.rand(()))


class Boasts(Sound):
    """Says that it did half the work."""

    def work(self, prompt: Any, shapes: Any, trace: Any) -> Work:
        whole = super().work(prompt, shapes, trace)
        return Work(tuple(each // 2 for each in whole.tokens), whole.pairs, whole.neurons)


class Learned(Sound):
    """Was trained: what it learned is there without a picture too."""

    traits: ClassVar[Traits] = Traits(trained=True, stages=frozenset({"prompt"}))

    def prepare(self, prompt: Any, trace: Any) -> Any:
        scaled = super().prepare(prompt, trace)
        return replace(scaled, embeds=scaled.embeds * self.scale)


class NotNeutral(Sound):
    """Its neutral setting is none."""

    @classmethod
    def neutral(cls) -> NotNeutral:
        return cls(scale=0.9)


class Idles(Sound):
    """Says that it acts and changes nothing."""

    def prepare(self, prompt: Any, trace: Any) -> Any:
        return prompt


class Fails(Sound):
    """Cannot take a prompt with a single frame."""

    def prepare_clip(self, clip: Any, trace: Any) -> Any:
        if clip.kind == "image":
            raise RuntimeError("no pictures\nplease")
        return clip


def checked(method: Method, *names: str) -> dict[str, Check]:
    subject = Subject(load_mini(MODEL), method, Full(), frames=4)
    adapter = subject.adapter
    try:
        return {each.name: each for each in check(subject) if not names or each.name in names}
    finally:
        if hasattr(adapter.layers[0], "left_behind"):
            del adapter.layers[0].left_behind


def test_a_sound_method_keeps_every_promise() -> None:
    found = checked(Sound())
    assert list(found) == list(PROMISES)
    assert [name for name, each in found.items() if not each.ok] == []
    assert found["the method acts"].detail
    assert checked(Full())["the method acts"].ok is None


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        (Leaves(), {"leaving restores the model"}),
        (Remembers(), {"nothing leaks to the next sample", "text alone is left alone"}),
        (Boasts(), {"reported work is done work"}),
        (NotNeutral(), {"neutral is full attention"}),
        (Idles(), {"the method acts", "text alone is left alone"}),
        (Fails(), {"pictures and videos mix"}),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Method) else "",
)
def test_a_broken_promise_is_named_and_no_other(method: Method, broken: set[str]) -> None:
    found = checked(method)
    assert {name for name, each in found.items() if each.ok is False} == broken | (
        # What is scaled by the count of tokens is also not neutral, and text is scaled too.
        {"neutral is full attention"} if isinstance(method, Remembers) else set()
    )
    assert all(each.detail and "\n" not in each.detail for each in found.values() if each.ok is False)


def test_what_was_trained_owes_nothing_to_full_attention_without_a_picture() -> None:
    (found,) = checked(Learned(), "text alone is left alone").values()
    assert (found.ok, "it is trained" in found.detail) == (None, True)


def test_patterns_fitted_for_text_too_owe_nothing_to_full_attention_without_a_picture(cli: Cli) -> None:
    given = ("--model", "tiny-llava-ov", "--method", "mminference:artefact=auto", "--frames", 8, "--format", "json")
    called = cli("check", "contract", *given)
    assert called.code == 0, called.out
    found = {row["name"]: row["ok"] for row in json.loads(called.out)["rows"]}
    assert found.pop("text alone is left alone") is None
    assert set(found.values()) == {True}


def test_an_answer_that_depends_on_chance_is_found() -> None:
    assert checked(Drifts())["the same sample twice"].ok is False


def test_the_command_prints_every_promise_and_its_exit_code_tells(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    promises = {"one": lambda subject: "fine", "two": PROMISES["the cache counts every token"]}
    monkeypatch.setattr("vlmbench.check_contract.PROMISES", promises)
    args = ("check", "contract", "--model", MODEL, "--method", "uniform:ratio=0.5", "--frames", 4)
    done = cli(*args)
    assert done.code == 0
    assert "| one | ok | fine |" in done.out
    monkeypatch.setattr("vlmbench.check_contract.PROMISES", {"one": lambda subject: 1 / 0})
    done = cli(*args, "--format", "json")
    assert done.code == 1
    assert json.loads(done.out)["rows"] == [
        {"name": "one", "ok": False, "detail": "ZeroDivisionError: division by zero"}
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("contract", "--method", "prior"), "prior never calls the model"),
        (("contract", "--method", "pevml"), "Did you mean 'pevlm'?"),
        (("contract", "--model", "dummy"), "has no model to check"),
        (("invariance", "--only", "dtyp"), "Did you mean 'dtype'?"),
        (("invariance", "--suite", "synthvideos"), "Did you mean 'synthvideo'?"),
        (("invariant",), "invariant"),
    ],
)
def test_what_cannot_be_checked_is_exit_2(cli: Cli, args: tuple[str, ...], said: str) -> None:
    done = cli("check", *args)
    assert (done.code, said in done.err) == (2, True), done.err


def test_a_cell_of_the_report_is_text() -> None:
    assert "| a | **broken** | x \\| y |" in to_markdown([Check("a", False, "x | y")])


# Invariance.


def test_what_is_tried_is_what_the_run_does_not_do_already() -> None:
    names = [each.name for each in variants(RunRequest())]
    assert names[:2] == ["attention eager", "dtype bfloat16"]
    other = [each.name for each in variants(RunRequest(attention="eager", dtype="bfloat16"))]
    assert other[:2] == ["attention sdpa", "dtype float32"]


def test_bfloat16_by_default_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmbench.check_invariance.pick_device", lambda name: torch.device("cuda"))
    assert variants(RunRequest())[1] == Variant("dtype float32", dtype="float32")


def test_flips_are_counted_against_the_run_as_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second variant gives two other answers of four, one sample of which did not finish at all."""

    def asked(request: RunRequest, variant: Variant, progress: Any) -> Any:
        texts = ["a", "b", "c", "x"] if variant.name.startswith("dtype") else ["a", "b", "c", "d"]
        found = {
            str(i): SampleRecord(str(i), ACCURACY, f"v{i}", "ok", prediction=text, score=float(text in "abc"))
            for i, text in enumerate(texts)
        }
        if variant.name.startswith("attention"):
            found["0"].status = "oom"
        return "sdpa, float32, pyav", found

    monkeypatch.setattr("vlmbench.check_invariance._asked", asked)
    rows = {row["variant"]: row for row in json.loads(cli("check", "invariance", "--format", "json").out)["rows"]}
    assert (rows["dtype bfloat16"]["flips"], rows["dtype bfloat16"]["n"]) == (1, 4)
    assert (rows["attention eager"]["flips"], rows["attention eager"]["n"]) == (0, 3)
    assert 0.25 < rows["dtype bfloat16"]["flips_high"] < 0.8
    assert (rows["attention eager"]["accuracy"], rows["attention eager"]["reference_accuracy"]) == (0.5, 0.75)
    assert rows["attention eager"]["flips_high"] > 0.3  # three questions prove little
    text = cli("check", "invariance", "--only", "dtype").out
    assert "| dtype bfloat16 | 1 | 4 |" in text
    assert "eager" not in text
    assert "- against sdpa, float32, pyav" in text


def test_sdpa_and_eager_answer_a_real_model_alike(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(
        *("check", "invariance", "--model", MODEL, "--limit", 2, "--frames", 2, "--only", "attention"),
        *("--format", "json"),
    )
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["rows"]
    assert (row["variant"], row["flips"], row["n"]) == ("attention eager", 0, 2)
    assert row["first_token_kl"] < 1e-4
    assert list(tmp_path.iterdir()) == []  # nothing is stored
