"""Videos with many scene cuts: another background as often as asked, and nothing else, to the question and the stored run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbench.errors import UsageError
from vlmbench.spec import build, params_of, parse
from vlmbench.suite import limited
from vlmbench.suites._synth.cuts import with_cuts
from vlmbench.suites._synth.render import render
from vlmbench.suites._synth.scene import make_scene
from vlmbench.suites.synthvideo import SynthVideo


@given(st.integers(0, 2**32), st.integers(1, 60), st.data())
def test_the_cuts_are_so_many_and_fewer_are_some_of_more(seed: int, n_frames: int, data: st.DataObject) -> None:
    scene = make_scene(seed, n_frames)
    few, many = sorted(data.draw(st.tuples(*[st.integers(0, n_frames - 1)] * 2)))
    made = with_cuts(scene, many)
    assert len(set(made.cuts)) == many
    assert list(made.cuts) == sorted(made.cuts)
    assert all(0 < cut < n_frames for cut in made.cuts)
    assert set(with_cuts(scene, few).cuts) <= set(made.cuts)
    assert replace(made, cuts=scene.cuts) == scene  # nothing that happens is changed


def test_the_picture_is_the_same_up_to_the_first_cut_and_another_behind_every_one() -> None:
    scene = replace(with_cuts(make_scene(3, 24), 4), events=())
    plain, cut = render(replace(scene, cuts=())), render(scene)
    assert np.array_equal(cut[: scene.cuts[0]], plain[: scene.cuts[0]])
    assert all(not np.array_equal(cut[frame], plain[frame]) for frame in range(scene.cuts[0], 24))


def test_no_cut_and_many_are_asked_the_same_in_the_same_order_of_other_files() -> None:
    plain, none, many = (SynthVideo(length=32, cuts=cuts).samples() for cuts in (None, 0, 8))
    for samples in (plain, none, many):
        assert len({sample.id for sample in samples}) == len(samples)
    for a, b, c in zip(*(limited(each, 66) for each in (plain, none, many)), strict=True):
        assert (a.question, a.answer, a.strata, a.extra) == (b.question, b.answer, b.strata, b.extra)
        assert (b.question, b.answer, b.strata, b.extra) == (c.question, c.answer, c.strata, c.extra)
        assert (
            len({a.id, b.id, c.id}) == len({a.media, b.media, c.media}) == len({a.cluster, b.cluster, c.cluster}) == 3
        )


def test_runs_from_before_the_parameter_stay_what_they_are() -> None:
    """A parameter that is None is in no hash, so no stored run is made a stranger by it; one that is given is."""
    assert params_of(SynthVideo(length=32)) == {"length": 32, "type": None, "depth": None}
    assert params_of(SynthVideo(length=32, cuts=0))["cuts"] == 0
    assert SynthVideo(length=32).data_hash == SynthVideo().data_hash != SynthVideo(length=32, cuts=0).data_hash


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("synthvideo:cuts=8", "cuts needs a length; write synthvideo:length=128,cuts=8"),
        ("synthvideo:length=32,cuts=32", "cuts must be from 0 to 31 in 32 frames, not 32."),
        ("synthvideo:length=32,cuts=-1", "not -1."),
        ("synthvideo:length=32,cuts=many", "cuts must be a whole number, not 'many'"),
    ],
)
def test_a_number_of_cuts_that_does_not_fit_is_a_sentence(spec: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(SynthVideo, parse(spec), "Suite")
    assert said in str(raised.value)


def test_a_scene_takes_no_more_cuts_than_it_has_frames_to_cut_at() -> None:
    with pytest.raises(ValueError, match="5 cuts do not fit into 5 frames"):
        with_cuts(make_scene(0, 5), 5)
