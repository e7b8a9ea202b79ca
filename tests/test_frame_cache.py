"""Cached frames are the decoded ones, found by content and rule; the next video is ready before it is asked for."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmbench.ahead import Ahead
from vlmbench.decode_worker import Request
from vlmbench.errors import UsageError
from vlmbench.frame_cache import FrameCache, content_hash
from vlmbench.store import ResultStore
from vlmbench.suites._synth.encode import encode_mp4
from vlmbench.video import Clip, DecodeError, Decoder

NOISE = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
CLIP_BYTES = 4 * 64 * 64 * 3


@pytest.fixture(scope="module")
def data() -> bytes:
    return encode_mp4(NOISE)


@pytest.fixture
def video(tmp_path: Path, data: bytes) -> Path:
    (path := tmp_path / "a.mp4").write_bytes(data)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a worker was asked for."""
    found: list[str] = []
    real = Decoder._ask

    def ask(self: Decoder, request: Request) -> Any:
        found.append(Path(request.path).name)
        return real(self, request)

    monkeypatch.setattr(Decoder, "_ask", ask)
    return found


@pytest.fixture
def decoder(tmp_path: Path) -> Iterator[Decoder]:
    with Decoder(cache=FrameCache(tmp_path / "frames", 10**7)) as made:
        yield made


def read(decoder: Decoder, path: Path, frames: int | None = 4, rule: str = "endpoints", **options: Any) -> Clip:
    return decoder.read(path, kind="video", frames=frames, rule=rule, **options)


def same(one: Clip, other: Clip) -> bool:
    told = [(clip.indices, clip.times_s, clip.fps, clip.kind) for clip in (one, other)]
    return told[0] == told[1] and np.array_equal(one.frames, other.frames)


def test_the_second_read_is_the_first_and_asks_no_decoder(decoder: Decoder, video: Path, asked: list[str]) -> None:
    first = read(decoder, video)
    again = read(decoder, video)
    assert same(first, again)
    assert again.frames.flags.writeable
    moved = video.rename(video.with_name("moved.mp4"))
    assert same(first, read(decoder, moved))
    assert read(decoder, moved).path == moved
    assert asked == ["a.mp4"]


def test_whatever_changes_the_frames_changes_the_key(decoder: Decoder, video: Path, asked: list[str]) -> None:
    read(decoder, video)
    for options in ({"frames": 5}, {"rule": "midpoints"}, {"fps": 0.5}, {"frames": None}):
        read(decoder, video, **options)
    other = bytearray(video.read_bytes())
    other[-3] ^= 1
    video.write_bytes(other)
    read(decoder, video)
    read(decoder, video, fresh=True)  # timed passes decode
    assert len(asked) == 7


def test_the_content_hash_sees_every_end_of_a_large_file(tmp_path: Path) -> None:
    size = 5_000_000
    (path := tmp_path / "large").write_bytes(bytes(size))
    seen = {content_hash(path)}
    for at in (0, 70_000, size // 15, size - 1):
        changed = bytearray(size)
        changed[at if at in (0, size - 1) else at - at % 65536] = 1
        path.write_bytes(changed)
        seen.add(content_hash(path))
    path.write_bytes(bytes(size + 1))
    seen.add(content_hash(path))
    assert len(seen) >= 4
    (tmp_path / "empty").write_bytes(b"")
    assert content_hash(tmp_path / "empty")


def test_a_bad_file_is_decoded_again_each_time_and_says_the_same(
    decoder: Decoder, video: Path, asked: list[str]
) -> None:
    video.write_bytes(b"no video")
    said = set()
    for path in (video, video, video.with_name("missing.mp4")):
        with pytest.raises(DecodeError) as raised:
            read(decoder, path)
        said.add(str(raised.value))
    assert len(said) == 2
    assert len(asked) == 3


def test_a_damaged_or_unwritable_cache_is_no_fault(
    decoder: Decoder, video: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(decoder, video)
    (kept,) = (tmp_path / "frames").iterdir()
    whole = kept.read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for damaged in (whole[:100], whole[:-5], b"", b"x" * 500, flipped):
        kept.write_bytes(damaged)
        assert same(first, read(decoder, video))
    assert len(asked) == 6
    kept.unlink()

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    assert same(first, read(decoder, video))
    assert not list((tmp_path / "frames").iterdir())


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, data: bytes) -> None:
    limit = 8 * CLIP_BYTES + 5000
    paths = []
    for number in range(10):
        paths.append(tmp_path / f"{number}.mp4")
        paths[-1].write_bytes(data + bytes(number))
    with Decoder(cache=FrameCache(tmp_path / "frames", limit)) as decoder:
        for number, path in enumerate(paths):
            read(decoder, path)
            read(decoder, paths[0])
            kept = sorted((tmp_path / "frames").iterdir(), key=lambda each: each.stat().st_mtime_ns)
            for age, each in enumerate(kept):  # clocks of some file systems are coarse
                os.utime(each, ns=(age + 100 * number, age + 100 * number))
        assert sum(each.stat().st_size for each in (tmp_path / "frames").iterdir()) <= limit
        cache = decoder.cache
        assert cache is not None
        keys = [cache.key(Request(str(path), decoder.name, "endpoints", 4, None)) for path in paths]
        there = [(tmp_path / "frames" / f"{key}.npy").exists() for key in keys]
    assert there[0]
    assert there[9]
    assert not there[1]


def test_a_limit_of_nothing_keeps_nothing_and_a_wrong_one_is_said(
    tmp_path: Path, video: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMBENCH_FRAME_CACHE_GB", "0")
    with Decoder(cache=FrameCache(tmp_path / "frames")) as decoder:
        assert same(read(decoder, video), read(decoder, video))
    assert len(asked) == 2
    assert not (tmp_path / "frames").exists()
    monkeypatch.setenv("VLMBENCH_FRAME_CACHE_GB", "much")
    with pytest.raises(UsageError, match="must be a number of gigabytes, not 'much'"):
        FrameCache(tmp_path / "frames")


# Decoding ahead.


def test_items_are_made_ready_in_order_and_never_more_than_the_queue_holds() -> None:
    begun: list[int] = []
    allowed = threading.Semaphore(0)

    def ready(item: int) -> int:
        allowed.acquire()
        begun.append(item)
        return item * item

    ahead = Ahead(ready, range(6), depth=2)
    for item in range(6):
        assert len(begun) <= item + 2
        allowed.release()
        assert ahead.take(item) == item * item
        assert begun == sorted(begun)
    with pytest.raises(LookupError):
        ahead.take(6)
    ahead.close()
    assert begun == list(range(6))


def test_a_fault_belongs_to_its_item_and_closing_begins_nothing_more() -> None:
    begun: list[int] = []

    def ready(item: int) -> int:
        begun.append(item)
        return 1 // item

    ahead = Ahead(ready, [1, 0, 2, 3, 4, 5, 6], depth=2)
    assert ahead.take(1) == 1
    with pytest.raises(ZeroDivisionError):
        ahead.take(0)
    assert ahead.take(3) == 0  # 2 was passed over
    ahead.close()
    assert 6 not in begun


def test_a_decoder_that_is_stopped_lets_go_of_a_file_that_hangs(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "hangs.mp4")
    decoder = Decoder(timeout_s=600)
    ahead = Ahead(lambda each: read(decoder, each), [path, path])
    with open(path, "wb"):  # the worker reads: it is inside the decoder
        decoder.stop()
        with pytest.raises(DecodeError):
            ahead.take(path)
        ahead.close()
    with pytest.raises(DecodeError, match="the run is ending"):
        read(decoder, path)
    decoder.close()


def test_a_run_decodes_each_video_once_for_all_methods_and_answers_the_same(
    cli: Callable[..., Any], tmp_path: Path, data: bytes, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(data + bytes(number))
    (folder / "bad.mp4").write_bytes(data[:200])
    monkeypatch.setenv("VLMBENCH_CACHE", str(tmp_path / "cache"))
    args = [
        "run",
        "--suite",
        f"folder:{folder}",
        "--model",
        "mini-qwen2-vl@random",
        "--frames",
        4,
        "--mode",
        "accuracy",
    ]
    args += ["--max-new-tokens", 2, "--method", "uniform:ratio=0.5"]
    found = {}
    for limit in ("1", "0"):
        monkeypatch.setenv("VLMBENCH_FRAME_CACHE_GB", limit)
        assert cli(*args, "--out", tmp_path / limit).code == 0
        found[limit] = {
            (view.header["spec"]["method"], record.id): (record.status, record.output_ids, record.frames, record.error)
            for view in ResultStore(tmp_path / limit).runs()
            for record in view.records.of("accuracy").values()
        }
        assert len(found[limit]) == 8
    assert found["0"] == found["1"]
    good = [name for name in asked if name != "bad.mp4"]
    assert good[:3] == ["0.mp4", "1.mp4", "2.mp4"]
    assert len(good) == 3 + 6
    assert (
        json.dumps(sorted(path.suffix for path in (tmp_path / "cache" / "frames").iterdir()))
        == '[".npy", ".npy", ".npy"]'
    )
