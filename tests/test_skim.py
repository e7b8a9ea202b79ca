"""The fast reader reads what the plain one reads, however a line is spelt, and refuses what it refuses."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbench import fidelity
from vlmbench.record import UNREAD, Frame, SampleRecord
from vlmbench.skim import StoredToken, read_arrays

EVIL = '","first_token":{"ids":[1],"logprobs":[0],"tail":0},"work":{"tokens":[1],"frames":[{"index":1}]\\"\u2028é'
numbers = st.one_of(st.integers(-9, 9), st.floats(-60, 0, allow_nan=False))
tokens = st.lists(st.tuples(st.integers(0, 200_000), numbers), max_size=5).flatmap(
    lambda pairs: (st.none() | numbers).map(
        lambda tail: {"ids": [id_ for id_, _ in pairs], "logprobs": [logprob for _, logprob in pairs], "tail": tail}
    )
)
works = st.lists(st.integers(0, 9), max_size=3).map(lambda each: dict.fromkeys(("tokens", "pairs", "neurons"), each))
texts = st.text(max_size=8) | st.just(EVIL)
hidden = st.dictionaries(
    st.sampled_from(["frames", "work", "first_token", "size"]), st.none() | tokens | works, max_size=3
)
records = st.builds(
    SampleRecord,
    id=texts,
    pass_=st.just("accuracy"),
    cluster=texts,
    status=st.just("ok"),
    strata=st.dictionaries(st.sampled_from(["first_token", "work", "frames", "type"]), texts),
    raw_text=texts,
    first_token=st.none() | tokens,
    work=st.none() | works.map(lambda lists: {**lists, "flops": 7.5}),
    trace=st.none() | hidden,
    frames=st.lists(st.builds(Frame, st.integers(0, 99), st.floats(0, 9, allow_nan=False)), max_size=3),
    error=texts,
)


def spelt(record: SampleRecord, **style: Any) -> bytes:
    """The line as another writer of JSON might have spelt it, with the checksum right."""
    data = json.loads(record.to_line())
    del data["crc"]
    return signed(json.dumps(data, **style).encode()[:-1] + b',"crc":')


def signed(line: bytes) -> bytes:
    body = line.rpartition(b',"crc":')[0]
    return b'%b,"crc":%d}' % (body, zlib.crc32(body))


def same(fast: SampleRecord, plain: SampleRecord) -> bool:
    assert len(fast.frames) == len(plain.frames)
    assert set(fast.frames) <= {UNREAD} or fast.frames == plain.frames
    unread: dict[str, Any] = {"tokens": [], "pairs": [], "neurons": []}
    works = [each and {**each, **unread} for each in (fast.work, plain.work)]
    assert works[0] == works[1]
    return dataclasses.replace(fast, frames=plain.frames, work=plain.work) == plain


@settings(max_examples=40)
@given(records)
def test_a_skimmed_line_is_the_plain_one_but_for_frames_and_work(record: SampleRecord) -> None:
    line = record.to_line().encode().rstrip()
    fast, plain = SampleRecord.from_line(line, skim=True), SampleRecord.from_line(line)
    assert same(fast, plain)
    if "first_token" not in record.strata:  # a line that is not as expected is left to the plain reader
        assert isinstance(fast.first_token, StoredToken) == (record.first_token is not None)


@settings(max_examples=40)
@given(records, st.booleans(), st.sampled_from([None, (",", ": "), (", ", ":")]))
def test_other_spellings_of_json_are_read_too(record: SampleRecord, ascii_only: bool, separators: Any) -> None:
    line = spelt(record, ensure_ascii=ascii_only, separators=separators)
    assert same(SampleRecord.from_line(line, skim=True), SampleRecord.from_line(record.to_line()))


@settings(max_examples=40)
@given(st.lists(tokens, min_size=1, max_size=4))
def test_numbers_that_are_read_at_once_are_those_of_json_to_the_last_digit(stored: list[dict[str, Any]]) -> None:
    fast = [lazy(each) for each in stored]
    read_arrays(fast)
    for own, each in zip(fast, stored, strict=True):
        assert own.arrays is not None
        assert [list(array) for array in own.arrays] == [each["ids"], list(map(float, each["logprobs"]))]
        assert (own, own.likeliest, own.tail) == (each, each["ids"][:1], each["tail"])


def lazy(token: dict[str, Any]) -> StoredToken:
    ids, logprobs = (json.dumps(token[name], separators=(",", ":"))[1:-1].encode() for name in ("ids", "logprobs"))
    return StoredToken(ids, logprobs, json.dumps(token["tail"]).encode())


def test_divergences_are_the_same_to_the_last_digit_from_lists_and_from_lines() -> None:
    n = fidelity.MANY + 3
    ps = [{"ids": [i, i + 1, 7], "logprobs": [-0.1, -2.5, -3.25 - i / 7], "tail": -4.5} for i in range(10, 10 + n)]
    qs = [{"ids": [i + 1, 7, 3], "logprobs": [-0.5, -1.5, -3.0], "tail": None} for i in range(10, 10 + n)]
    plain = fidelity.divergences(ps, qs)
    for own, other in ((ps, [lazy(q) for q in qs]), ([lazy(p) for p in ps], [lazy(q) for q in qs])):
        assert fidelity.divergences(own, other) == plain
    assert [fidelity.kl(lazy(p), lazy(q)) for p, q in zip(ps, qs, strict=True)] == pytest.approx(plain, abs=1e-12)
    mixed: list[dict[str, Any]] = [
        {"ids": [1], "logprobs": [0.0], "tail": None},
        *ps[1:],
    ]  # of several lengths: one by one
    assert fidelity.divergences([lazy(p) for p in mixed], qs) == fidelity.divergences(mixed, qs)


LINE = SampleRecord(
    "s", "accuracy", "v", "ok", first_token={"ids": [1, 2], "logprobs": [-0.5, -1.25], "tail": -3.0},
    work={"tokens": [1], "pairs": [2], "neurons": [3], "flops": 5}, frames=[Frame(0, 0.5)],
).to_line().encode().rstrip()  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"-1.25", b"NaN"),
        (b"-1.25", b"-Infinity"),
        (b'"tail":-3.0', b'"tail":NaN'),
        (b'"tokens":[1]', b'"tokens":[NaN]'),
        (b'"time_s":0.5', b'"time_s":Infinity'),
        (b'"score":0.0', b'"score":NaN'),
        (b'"score":0.0', b'"score":"1"'),
        (b'"score":0.0', b'"scroe":0.0'),
        (b'"frames":[{"index":0,"time_s":0.5}],', b""),
        (b'"timing":null,', b""),
        (b'"cluster":"v",', b""),
        (b'"applied":true', b'"applied":true,"later":1'),
        (b'"size":null', b'"size":'),
    ],
)
def test_what_the_plain_reader_refuses_the_fast_one_refuses(old: bytes, new: bytes) -> None:
    assert LINE.count(old) == 1
    line = signed(LINE.replace(old, new))
    for skim in (False, True):
        with pytest.raises(ValueError, match=r"."):
            SampleRecord.from_line(line, skim=skim)


@pytest.mark.parametrize("bad", [b"-0.5,,-1.25", b"-0.5,null", b'-0.5,"x"', b"-0.5,-1.25,"])
def test_what_is_no_number_is_refused_when_it_is_read(bad: bytes) -> None:
    token = StoredToken(b"1,2", bad, b"-3.0")
    with pytest.raises(ValueError, match="not a number"):
        read_arrays([token])


def test_a_field_that_an_older_line_lacks_has_its_default() -> None:
    line = signed(LINE.replace(b'"attempts":1,', b""))
    fast, plain = SampleRecord.from_line(line, skim=True), SampleRecord.from_line(line)
    assert same(fast, plain)
    assert fast.first_token == {"ids": [1, 2], "logprobs": [-0.5, -1.25], "tail": -3.0}
