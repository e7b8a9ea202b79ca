"""The file of a trained MemVP: what is read and what is refused, which one is found, and the shipped ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmbench import artefact, memvp_file
from vlmbench.backend import Identity
from vlmbench.errors import UsageError
from vlmbench.memvp_file import Trained
from vlmbench.memvp_memory import MemoryShape, VisualMemory
from vlmbench.memvp_prompt import shape_for
from vlmbench.methods.memvp import Memvp
from vlmbench.models.loading import load
from vlmbench.suites.synthimage import SynthImage
from vlmbench.suites.synthvideo import SynthVideo


@pytest.fixture(scope="module")
def mini() -> Any:
    return load("mini-llava-ov@random", dtype=torch.float32, device="cpu", attention="sdpa").adapter


def trained(adapter: Any, vision: int = 0, units: int = 1, **values: Any) -> Trained:
    """A file whose numbers are all drawn, the zeros of the start too."""
    shape = replace(shape_for(adapter, 20, vision=vision), units=units)
    memory = VisualMemory(shape, scale=0.5).start(0)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in memory.named_parameters()}
    header: dict[str, Any] = {
        "shape": shape, "scale": 0.5, "weight": 0.01, "model": "m", "revision": None, "weights_hash": "a" * 64,
        "suite": "synthimage:type=place", "suite_version": "1", "data_hash": "0", "sampler": "endpoints", "frames": None,
        "recipe": {"steps": 3}, "curve": [{"step": 3, "loss": 1.0, "held_out": None}], "n": 3, "n_held_out": 0,
        "parameters": memory.count, "tensors": tensors,
    }  # fmt: skip
    return Trained(**{**header, **values})


def written(adapter: Any, folder: Path, **options: Any) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    trained(adapter, **options).write(path)
    return str(path)


def test_writing_and_reading_give_the_same(mini: Any, tmp_path: Path) -> None:
    before = trained(mini, vision=3, units=5)
    before.write(tmp_path / "a.safetensors")
    after = memvp_file.read(str(tmp_path / "a.safetensors"))
    assert after.digest == before.digest
    assert after.header == json.loads(json.dumps(before.header))
    assert {k: v.tolist() for k, v in after.tensors.items()} == {k: v.tolist() for k, v in before.tensors.items()}
    assert not list(tmp_path.glob("*.part"))
    assert replace(after, seconds=99.0, versions={}, commit="c").digest == before.digest
    assert replace(after, recipe={"steps": 4}).digest != before.digest
    changed = {**after.tensors, "p_k": after.tensors["p_k"] + 1}
    assert replace(after, tensors=changed).digest != before.digest


def test_scale_may_be_typed_and_slots_are_the_files(mini: Any, tmp_path: Path) -> None:
    path = written(mini, tmp_path)
    assert Memvp(artefact=path).fitted()["scale"] == 0.5
    assert Memvp(artefact=path, scale=0.0).fitted()["scale"] == 0.0
    assert Memvp(artefact=path).fitted()["slots"] == Memvp(artefact=path, slots=20).fitted()["slots"] == 20
    wrong: list[dict[str, Any]] = [{"slots": 7}, {"vision": 7}]
    for options in wrong:
        with pytest.raises(UsageError, match=f"was fitted with {next(iter(options))}="):
            Memvp(artefact=path, **options)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "does not exist; make it with `vlmbench fit --model MODEL --method memvp"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read"),
        (lambda path: path.write_text('{"schema": 1}'), "cannot be read"),
        (lambda path: save_file(load_file(path), path), "it has no header of vlmbench"),
        (lambda path: again(path, schema=2), "is no adapter of schema 1"),
        (lambda path: again(path, method="turbo"), "was fitted for turbo; make one for memvp"),
        (lambda path: again(path, shape={"size": 64, "hidden": 64, "slots": 21}), "is damaged"),
        (lambda path: again(path, odd=1), "is damaged"),
        (lambda path: again(path, tensors_sha256="0"), "its tensors are others"),
    ],
)
def test_a_spoilt_file_is_refused_in_a_sentence(
    mini: Any, tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    path = Path(written(mini, tmp_path))
    spoil(path)
    with pytest.raises(UsageError) as error:
        Memvp(artefact=str(path))
    assert said in str(error.value)
    assert "vlmbench fit" in str(error.value)
    assert "\n" not in str(error.value)


def again(path: Path, **values: Any) -> None:
    """The file with another header around the same tensors."""
    header = memvp_file._header(path) | values
    save_file(load_file(path), path, metadata={"vlmbench": json.dumps(header)})


def test_a_model_of_another_shape_is_refused(adapter: Any, mini: Any, tmp_path: Path) -> None:
    memory = VisualMemory(MemoryShape(48, 48, 20), scale=0.5).start(0)
    found = replace(trained(mini), shape=memory.shape, tensors=dict(memory.state_dict()))
    found.write(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="is for a model with hidden=48, and this one has 64; make one"):
        Memvp(artefact=str(tmp_path / "a.safetensors")).check(adapter)


HASH = "a" * 64


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: Any) -> Callable[..., Path]:
    """``shipped("b", suite="synthvideo:length=32")`` puts a file of that name where files are found."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(artefact, "SHIPPED", folder)

    def put(name: str, **values: Any) -> Path:
        trained(mini, **values).write(folder / f"memvp-{name}.safetensors")
        return folder / f"memvp-{name}.safetensors"

    return put


def test_a_file_is_found_by_what_its_suite_names(shipped: Callable[..., Path]) -> None:
    every = shipped("a", suite="synthvideo:length=32")
    one_type = shipped("b", suite="synthvideo:type=first,length=32")
    longer = shipped("c", suite="synthvideo:length=128")
    for suite, expected in (
        (SynthVideo(length=32), every),
        (SynthVideo(length=32, type="last"), every),  # it was trained on all types
        (SynthVideo(length=32, type="first"), one_type),
        (SynthVideo(length=128, cuts=3), longer),
    ):
        assert memvp_file.find(HASH, suite)[0] == expected
    for nowhere in (SynthVideo(), SynthVideo(length=384)):
        path, others = memvp_file.find(HASH, nowhere)
        assert path is None
        assert others[longer] == "synthvideo:length=128"
    assert memvp_file.find("b" * 64, SynthVideo(length=32)) == (None, {})
    assert memvp_file.find(HASH, SynthImage()) == (None, {})


def test_of_two_files_the_one_that_saw_every_frame_is_taken(shipped: Callable[..., Path]) -> None:
    shipped("a", suite="synthvideo:length=32", frames=8)
    every = shipped("b", suite="synthvideo:length=32")
    assert memvp_file.find(HASH, SynthVideo(length=32))[0] == every


def test_without_the_file_of_a_length_the_sentence_names_that_of_another(shipped: Callable[..., Path]) -> None:
    path = shipped("a", suite="synthvideo:length=32")
    method = Memvp()
    method.check_weights(Identity("tiny", None, HASH, "float32", "cpu", "cpu", "sdpa", "sdpa", "sdpa"))
    with pytest.raises(UsageError) as error:
        method.fit(SynthVideo(length=128))
    assert f"no file for tiny on synthvideo:length=128 (artefact={path} is for synthvideo:length=32); " in str(
        error.value
    )
    assert "`vlmbench fit --model tiny --method memvp --suite synthvideo:length=128 --out " in str(error.value)


def test_other_frames_than_those_of_training_are_said(mini: Any, tmp_path: Path) -> None:
    method = Memvp(artefact=written(mini, tmp_path, units=4, frames=8))
    assert method.unlike(8, "endpoints") == ""
    assert "was trained on 8 frames (endpoints) of a video, and this run shows all frames" in method.unlike(
        None, "endpoints"
    )
    assert "this run shows 8 frames (interior)" in method.unlike(8, "interior")
    assert Memvp(artefact=written(mini, tmp_path)).unlike(3, "interior") == ""  # of pictures: there is no frame
    assert Memvp(artefact="untrained").unlike(3, "interior") == ""


def test_a_training_begins_with_a_file_of_pictures(mini: Any, tmp_path: Path) -> None:
    path = written(mini, tmp_path)
    before = memvp_file.read(path).tensors
    frames = [(torch.zeros(4, 64), None)] * 3
    memory = Memvp(start=path, slots=20).new_memory(mini, frames)
    assert memory.shape.units == 3
    for name, tensor in memory.state_dict().items():
        if name.startswith("unit_"):
            assert not torch.equal(tensor, torch.zeros_like(tensor)) or name == "unit_v"
        else:
            assert torch.equal(tensor, before[name])
    with pytest.raises(UsageError, match="has slots=20, and what is to be trained 8; name another"):
        Memvp(start=path, slots=8).new_memory(mini)
    with pytest.raises(UsageError, match="is where a training begins; a run reads artefact="):
        Memvp(start=path).fit(SynthImage())
    with pytest.raises(UsageError, match="does not exist"):
        Memvp(start=str(tmp_path / "none"))


@pytest.mark.parametrize("path", sorted(artefact.SHIPPED.glob("memvp-*.safetensors")), ids=lambda path: path.stem)
def test_a_shipped_file_is_of_a_shipped_model(path: Path) -> None:
    """Whole, small, trained beside the weights that are there, better on questions held out than before, and named by all."""
    found = memvp_file.read(str(path))
    assert found.weights_hash == load(found.model, dtype=torch.float32, device="cpu", attention="sdpa").weights_hash
    assert path.name == f"memvp-{found.model}-{found.suite.partition(':')[0]}.safetensors"
    assert path.stat().st_size < 10**6
    assert found.recipe["step"] == found.recipe["steps"] == found.curve[-1]["step"]
    assert found.curve[-1]["held_out"] > found.curve[0]["held_out"]
    for key in ("seed", "lr", "batch"):
        assert key in found.recipe


def test_parameters_that_mean_nothing_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"slots": 0}, {"vision": -1}, {"scale": math.nan}, {"scale": math.inf}]
    for options in wrong:
        with pytest.raises(UsageError, match="memvp:"):
            Memvp(**options)
    assert math.isclose(Memvp(artefact="untrained")._scale, 0.1)
