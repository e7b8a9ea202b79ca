"""Frames are the ones asked for, upright and the same with every decoder; a bad file costs one sentence, never the run."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmbench.errors import UsageError
from vlmbench.suites._synth.encode import encode_mp4
from vlmbench.video import DECODERS, SAMPLERS, DecodeError, Decoder, DecodeTimeout, sample_indices

INSTALLED = tuple(name for name in DECODERS if importlib.util.find_spec({"pyav": "av"}.get(name, name)))
SPREADING = tuple(rule for rule in SAMPLERS if rule != "fps")
GONE_S = 20
"""Until then a killed process is gone even on a machine that is busy with other things; it takes milliseconds."""

totals, counts = st.integers(1, 3000), st.integers(1, 400)


# Which frames.


@given(
    st.sampled_from(list(SAMPLERS)), totals, st.none() | counts, st.floats(0.1, 120), st.none() | st.floats(1e-3, 1000)
)
def test_indices_rise_and_lie_within_the_video(
    rule: str, total: int, n: int | None, video_fps: float, fps: float | None
) -> None:
    found = sample_indices(rule, total, n, video_fps=video_fps, fps=fps or (1.0 if rule == "fps" else None))
    assert found
    assert all(a < b for a, b in itertools.pairwise(found))
    assert found[0] >= 0
    assert found[-1] < total
    assert n is None or len(found) <= n


@given(st.sampled_from(SPREADING), totals, counts)
def test_a_rule_gives_as_many_frames_as_are_asked_for_or_all(rule: str, total: int, n: int) -> None:
    found = sample_indices(rule, total, n)
    assert len(found) == min(n, total)
    assert n < total or found == list(range(total)) == sample_indices(rule, total, None)


@given(totals, counts)
def test_endpoints_are_numpys_linspace_as_lmms_eval_calls_it(total: int, n: int) -> None:
    found = sample_indices("endpoints", total, n)
    assert found == np.linspace(0, total - 1, min(n, total), dtype=int).tolist()
    assert n == 1 or {0, total - 1} <= set(found)


@given(totals, counts)
def test_interior_leaves_both_ends_out_and_divides_the_rest_evenly(total: int, n: int) -> None:
    found = sample_indices("interior", total, n)
    if n < total:
        assert found == [(i + 1) * total // (n + 1) for i in range(n)]
        assert found[0] > 0
    if 2 * (n + 1) <= total:  # below that, rounding down reaches the last frame
        assert found[-1] < total - 1


@given(totals, counts)
def test_midpoints_are_the_frame_under_the_middle_of_each_equal_segment(total: int, n: int) -> None:
    n = min(n, total)
    for i, index in enumerate(sample_indices("midpoints", total, n)):
        assert 2 * n * index <= (2 * i + 1) * total < 2 * n * (index + 1)


@given(totals, counts)
def test_stride_starts_at_the_first_frame_and_keeps_one_step(total: int, n: int) -> None:
    n = min(n, total)
    assert sample_indices("stride", total, n) == list(range(0, total // n * n, total // n))


@given(totals, st.floats(1, 120), st.floats(0.01, 200))
def test_the_rule_fps_takes_the_frame_on_screen_at_every_tick(total: int, video_fps: float, fps: float) -> None:
    found = sample_indices("fps", total, None, video_fps=video_fps, fps=fps)
    step = max(1.0, video_fps / fps)
    slack = 1e-6 * (1 + total)  # rounding of i · step, far below a frame
    for i, index in enumerate(found):
        assert index - slack <= i * step < index + 1 + slack
    assert len(found) * step >= total - 1 - slack  # up to the end
    assert sample_indices("fps", total, 3, video_fps=video_fps, fps=fps) == found[:3]


def test_a_rate_lowers_the_count_of_a_spreading_rule() -> None:
    # 300 frames at 30 a second are ten seconds.
    assert len(sample_indices("endpoints", 300, 64, video_fps=30, fps=2)) == 20
    assert len(sample_indices("endpoints", 300, 8, video_fps=30, fps=2)) == 8
    assert sample_indices("midpoints", 300, 64, video_fps=30, fps=0.01) == [150]


@pytest.mark.parametrize("rule", SAMPLERS)
def test_one_frame_is_the_only_frame(rule: str) -> None:
    assert sample_indices(rule, 1, 5, fps=1.0) == [0]
    with pytest.raises(ValueError, match="no frames"):
        sample_indices(rule, 0, 5, fps=1.0)


def test_the_rules_differ_as_their_sources_do() -> None:
    assert sample_indices("endpoints", 100, 4) == [0, 33, 66, 99]
    assert sample_indices("interior", 100, 4) == [20, 40, 60, 80]
    assert sample_indices("midpoints", 100, 4) == [12, 37, 62, 87]
    assert sample_indices("stride", 103, 4) == [0, 25, 50, 75]
    assert sample_indices("fps", 103, 4, video_fps=30, fps=1) == [0, 30, 60, 90]
    with pytest.raises(ValueError, match="give --fps"):
        sample_indices("fps", 103, 4)


# Decoded frames.

SIDE = 64
BITS = 6
SIGHT_S = 60.0


def numbered(n: int) -> np.ndarray:
    """[n, SIDE, SIDE, 3]: frame i shows i in binary, one white or black stripe a bit."""
    on = (np.arange(n)[:, None] >> np.arange(BITS)) & 1
    stripes = np.repeat(on * 255, SIDE // BITS + 1, axis=1)[:, :SIDE].astype(np.uint8)
    return np.broadcast_to(stripes[:, None, :, None], (n, SIDE, SIDE, 3)).copy()


def number(frame: np.ndarray) -> int:
    """What `numbered` wrote, read from the middle of each stripe."""
    width = SIDE // BITS + 1
    return sum(1 << bit for bit in range(BITS) if frame[:, min(bit * width + 3, SIDE - 2), :].mean() > 128)


def mp4(frames: np.ndarray, path: Path, **options: str) -> bytes:
    """Written with the index in front of the pictures, as for the web, so that a cut file still opens."""
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=2, options={"threads": "1", "preset": "veryfast", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def decoders() -> Iterator[dict[str, Decoder]]:
    """One of each, alive for all tests that do no harm to it."""
    found = {name: Decoder(name, timeout_s=SIGHT_S) for name in INSTALLED}
    yield found
    for decoder in found.values():
        decoder.close()


@pytest.fixture(params=INSTALLED)
def decoder(request: pytest.FixtureRequest, decoders: dict[str, Decoder]) -> Decoder:
    return decoders[request.param]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "good.mp4"
    path.write_bytes(encode_mp4(numbered(12)))
    return path


def works(decoder: Decoder, video: Path) -> bool:
    return len(decoder.read(video, kind="video", frames=3, rule="endpoints").frames) == 3


@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("rule", SAMPLERS)
def test_an_index_means_the_frame_of_that_number(decoder: Decoder, tmp_path: Path, rule: Any, b_frames: str) -> None:
    mp4(numbered(50), path := tmp_path / "numbered.mp4", bf=b_frames, g="17")
    clip = decoder.read(path, kind="video", frames=9, rule=rule, fps=0.25 if rule == "fps" else None)
    assert [number(frame) for frame in clip.frames] == list(clip.indices)
    assert list(clip.indices) == sample_indices(rule, 50, 9, video_fps=2.0, fps=0.25 if rule == "fps" else None)
    # Two frames a second; containers count time in ticks, here of 1/16384 s.
    assert clip.times_s == pytest.approx([index / 2 for index in clip.indices], abs=1e-3)
    assert (clip.fps, clip.kind, clip.path) == (2.0, "video", path)


def test_all_frames_come_when_no_number_is_named(decoder: Decoder, video: Path) -> None:
    clip = decoder.read(video, kind="video", frames=None, rule="endpoints")
    assert clip.frames.shape == (12, SIDE, SIDE, 3)
    assert clip.frames.dtype == np.uint8
    assert [number(frame) for frame in clip.frames] == list(range(12))


def test_decoders_agree_on_rendered_videos(decoders: dict[str, Decoder], tmp_path: Path) -> None:
    from vlmbench.suites._synth.render import render
    from vlmbench.suites._synth.scene import make_scene

    if len(decoders) < 2:
        pytest.skip("only one decoder is installed")
    for seed, length in ((1, 32), (2, 7), (3, 1)):
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(encode_mp4(render(make_scene(seed, length))))
        one, other = (
            each.read(path, kind="video", frames=8, rule="midpoints") for each in (decoders["decord"], decoders["pyav"])
        )
        assert one.indices == other.indices
        assert one.times_s == pytest.approx(other.times_s, abs=1e-3)
        # H.264 decoding is exact by its standard; the conversion to RGB may round differently, by one level.
        assert np.abs(one.frames.astype(int) - other.frames.astype(int)).max() <= 1


def turned(data: bytes, degrees: int) -> bytes:
    """An mp4 whose display matrix asks for a clockwise turn: nine big-endian numbers in the track header."""

    def matrix(degrees: int) -> bytes:
        cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
        one = 1 << 16
        return struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)

    at = data.index(matrix(0), data.index(b"tkhd"))
    return data[:at] + matrix(degrees) + data[at + 36 :]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_recording_with_the_phone_held_sideways_is_upright(decoder: Decoder, tmp_path: Path, degrees: int) -> None:
    # decord itself stumbles over turned videos that are less than 64 pixels wide; nobody records those.
    picture = np.zeros((66, 100, 3), np.uint8)
    picture[:33, :50], picture[:33, 50:] = (220, 40, 40), (40, 200, 60)
    picture[33:, :50], picture[33:, 50:] = (50, 80, 220), (230, 230, 230)
    path = tmp_path / "turned.mp4"
    path.write_bytes(turned(encode_mp4(np.stack([picture] * 4)), degrees))
    frame = decoder.read(path, kind="video", frames=1, rule="endpoints").frames[0]
    expected = np.rot90(picture, k=-degrees // 90)
    assert frame.shape == expected.shape
    # The compression moves flat colours by a few levels and blurs the borders; a wrong turn differs by over 100.
    assert np.abs(frame.astype(int) - expected.astype(int)).mean() < 8


def lying(data: bytes, factor: float) -> bytes:
    """An mp4 whose headers (movie, track, media, edit list) claim another duration than its frames have."""
    out = bytearray(data)
    for box, offset in ((b"mvhd", 16), (b"tkhd", 20), (b"mdhd", 16), (b"elst", 8)):
        at = data.index(box) + 4 + offset
        struct.pack_into(">I", out, at, int(struct.unpack_from(">I", data, at)[0] * factor))
    return bytes(out)


def test_frames_are_counted_and_not_taken_from_a_header_that_lies(
    decoder: Decoder, video: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lies.mp4"
    for factor in (1.5, 10, 1000):
        path.write_bytes(lying(video.read_bytes(), factor))
        clip = decoder.read(path, kind="video", frames=4, rule="endpoints")
        assert clip.indices == (0, 3, 7, 11)
        assert [number(frame) for frame in clip.frames] == [0, 3, 7, 11]
    # A header that cuts the video short leaves out what an edit list may leave out.
    path.write_bytes(lying(video.read_bytes(), 0.5))
    clip = decoder.read(path, kind="video", frames=None, rule="endpoints")
    assert [number(frame) for frame in clip.frames] == list(clip.indices) == list(range(6))
    path.write_bytes(lying(video.read_bytes(), 0))
    with pytest.raises(DecodeError, match=r"^lies\.mp4 cannot be decoded"):
        decoder.read(path, kind="video", frames=4, rule="endpoints")


def trimmed(data: bytes, first: int, end: int) -> bytes:
    """An mp4 of two frames a second whose edit list shows frames `first` to `end` - 1, as a phone's trimming leaves it."""
    out = bytearray(data)
    ticks_at = {box: data.index(box) + 4 + 12 for box in (b"mvhd", b"mdhd")}
    movie, media = (struct.unpack_from(">I", data, at)[0] for at in ticks_at.values())
    at = data.index(b"elst") + 4 + 8
    (begins,) = struct.unpack_from(">i", data, at + 4)  # of the first frame: with B-frames not zero
    struct.pack_into(">Ii", out, at, (end - first) * movie // 2, begins + first * media // 2)
    return bytes(out)


@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize(("first", "end"), [(0, 40), (0, 39), (0, 20), (15, 40), (15, 20), (20, 30)])
def test_a_trimmed_recording_gives_what_a_player_shows(
    decoder: Decoder, tmp_path: Path, first: int, end: int, b_frames: str
) -> None:
    """decord alone would repeat the last frame for those behind the edit, and count time from before it."""
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(trimmed(mp4(numbered(40), path, bf=b_frames, g="10"), first, end))
    clip = decoder.read(path, kind="video", frames=None, rule="endpoints")
    assert [number(frame) for frame in clip.frames] == list(range(first, end))
    assert clip.indices == tuple(range(end - first))
    assert clip.times_s == pytest.approx([index / 2 for index in clip.indices], abs=1e-3)


# Bad files.


def broken_files(folder: Path) -> list[Path]:
    """One file of every kind of damage."""
    import av

    whole = mp4(numbered(40), folder / "whole.mp4")
    end = encode_mp4(numbered(40))  # its index is at the end
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"this is not a video\n" * 50,
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "zeros.mp4": bytes(5000),
        **{f"cut{i}.mp4": whole[: int(len(whole) * part)] for i, part in enumerate((0.001, 0.05, 0.3, 0.6, 0.999))},
        **{f"tail{i}.mp4": end[: int(len(end) * part)] for i, part in enumerate((0.05, 0.5, 0.95))},
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    with av.open(str(folder / "audio.mp4"), "w") as container:
        track: Any = container.add_stream("aac", rate=16000)
        for i in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 1024 * i
            container.mux(track.encode(frame))
        container.mux(track.encode())
    with av.open(str(folder / "none.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=2)
        stream.height = stream.width = SIDE
        container.start_encoding()
    (folder / "folder.mp4").mkdir()
    names = [*contents, "audio.mp4", "none.mp4", "folder.mp4", "missing.mp4"]
    return [folder / name for name in names]


def assert_a_sentence(message: str, path: Path) -> None:
    """For a person: names the file, tells neither folders nor where in somebody's source it happened."""
    assert message.startswith(path.name)
    assert message.endswith(".")
    assert "\n" not in message
    assert not any(word in message for word in ("/", "Errno", ".cc:", "Traceback", "vs. 0", "[")), message


def test_a_bad_file_is_one_sentence_with_its_name_and_the_next_file_is_read(
    decoder: Decoder, video: Path, tmp_path: Path
) -> None:
    assert works(decoder, video)
    worker = decoder._worker
    for path in broken_files(tmp_path):
        with pytest.raises(DecodeError) as raised:
            decoder.read(path, kind="video", frames=8, rule="endpoints")
        assert type(raised.value) is DecodeError
        assert_a_sentence(str(raised.value), path)
        assert works(decoder, video)
    assert decoder._worker is worker  # nothing above was bad enough to end it


def test_the_reasons_are_told_apart(decoder: Decoder, tmp_path: Path) -> None:
    said = {}
    for path in broken_files(tmp_path):
        with pytest.raises(DecodeError) as raised:
            decoder.read(path, kind="video", frames=8, rule="endpoints")
        said[path.stem] = str(raised.value)
    assert "the file is missing" in said["missing"]
    assert "the file is empty" in said["empty"]
    assert "video stream" in said["audio"]


def test_asking_for_the_rule_fps_without_a_rate_names_the_option(decoder: Decoder, video: Path) -> None:
    with pytest.raises(DecodeError, match="give --fps"):
        decoder.read(video, kind="video", frames=8, rule="fps")


def test_an_unknown_decoder_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="decord, pyav, not 'opencv'"):
        Decoder("opencv")


# The worker.


@pytest.fixture(params=INSTALLED)
def fragile(request: pytest.FixtureRequest, video: Path) -> Iterator[Decoder]:
    """A decoder of its own with a worker that has started."""
    with Decoder(request.param, timeout_s=SIGHT_S) as decoder:
        assert works(decoder, video)
        yield decoder


def pid_of(decoder: Decoder) -> int:
    assert decoder._worker
    return decoder._worker.pid


def running(pid: int) -> bool:
    """A zombie counts as gone: nobody may be there to reap an orphan in a container."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + GONE_S
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(pid)


def opened(fifo: Path) -> int:
    """The writing end of a named pipe, as soon as a worker has opened the other."""
    deadline = time.monotonic() + GONE_S
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_a_file_that_hangs_the_decoder_times_out_and_the_next_is_read(
    fragile: Decoder, video: Path, tmp_path: Path
) -> None:
    os.mkfifo(path := tmp_path / "hangs.mp4")
    hung = pid_of(fragile)
    fragile.timeout_s = 0.2  # opening a pipe that nobody writes to never ends
    with pytest.raises(DecodeTimeout, match=r"^hangs\.mp4 was not decoded within 0\.2 s with \w+\.$"):
        fragile.read(path, kind="video", frames=8, rule="endpoints")
    assert not running(hung)
    fragile.timeout_s = SIGHT_S
    assert works(fragile, video)


def test_a_worker_that_dies_between_two_files_is_replaced(fragile: Decoder, video: Path) -> None:
    os.kill(pid := pid_of(fragile), signal.SIGKILL)
    assert fragile._worker
    fragile._worker.wait()
    assert works(fragile, video)
    assert pid_of(fragile) != pid


def test_a_worker_that_dies_over_a_file_is_that_files_error(fragile: Decoder, video: Path, tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "deadly.mp4")

    def kill_once_it_reads() -> None:
        end = opened(path)
        os.kill(pid_of(fragile), signal.SIGKILL)
        os.close(end)

    killer = threading.Thread(target=kill_once_it_reads, daemon=True)
    killer.start()
    with pytest.raises(DecodeError, match=r"^deadly\.mp4 crashed the decoder \w+\.$"):
        fragile.read(path, kind="video", frames=8, rule="endpoints")
    killer.join()
    assert works(fragile, video)


PARENT = """
    import sys
    from pathlib import Path
    from vlmbench.video import Decoder
    decoder = Decoder({name!r})
    decoder.read(Path({video!r}), kind="video", frames=2, rule="endpoints")
    print(decoder._worker.pid, flush=True)
    {then}
"""
THEN = {
    "idle": "sys.stdin.read()",
    "decoding": "decoder.read(Path({fifo!r}), kind='video', frames=2, rule='endpoints')",
}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only an idle worker notices")
@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("name", INSTALLED)
def test_the_worker_ends_with_its_parent_even_inside_a_decoder(
    video: Path, tmp_path: Path, name: str, then: str
) -> None:
    os.mkfifo(fifo := tmp_path / "hangs.mp4")
    script = textwrap.dedent(PARENT).format(name=name, video=str(video), then=THEN[then].format(fifo=str(fifo)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        held = opened(fifo) if then == "decoding" else None  # else the worker would see the end of a file
        assert running(worker)
        parent.kill()
        parent.wait()
        assert gone(worker)
        if held is not None:
            os.close(held)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_outlives_the_thread_that_first_asked_it(video: Path) -> None:
    """Each pass decodes in a thread of its own, and the kernel takes a thread for a parent."""
    with Decoder(timeout_s=SIGHT_S) as decoder:
        asking = threading.Thread(target=works, args=(decoder, video))
        asking.start()
        thread = Path(f"/proc/self/task/{asking.native_id}")
        asking.join()
        pid = pid_of(decoder)
        deadline = time.monotonic() + GONE_S
        while thread.exists() and time.monotonic() < deadline:  # it ends in Python a little earlier
            time.sleep(0.01)
        assert works(decoder, video)
        assert pid_of(decoder) == pid


def test_closing_ends_the_worker_and_a_later_read_starts_another(fragile: Decoder, video: Path) -> None:
    pid = pid_of(fragile)
    fragile.close()
    assert not running(pid)
    assert works(fragile, video)


def test_the_worker_imports_neither_torch_nor_transformers(video: Path) -> None:
    code = f"""if True:
        import sys
        import vlmbench.decode_worker as worker
        found = [name for name in ("numpy", "av", "decord", "PIL") if name in sys.modules]
        for name in {INSTALLED}:
            worker.decode(worker.Request({str(video)!r}, name, "endpoints", 3, None))
        worker.main()  # there is nothing to read, so it ends
        found += [name for name in ("torch", "torchvision", "transformers", "pandas") if name in sys.modules]
        sys.exit(f"imported {{found}}" if found else 0)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")


def bytes_of(pid: int, what: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what))) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_video_that_asks_for_more_memory_than_the_worker_may_have_is_that_files_error(
    fragile: Decoder, video: Path, tmp_path: Path
) -> None:
    import resource

    from vlmbench.decode_worker import MEMORY_BYTES

    pid = pid_of(fragile)
    ours = resource.getrlimit(resource.RLIMIT_AS)[1]
    cap = MEMORY_BYTES if ours == resource.RLIM_INFINITY else min(ours, MEMORY_BYTES)
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (cap, cap)
    flat = np.zeros((16, 1024, 1024, 3), np.uint8)
    mp4(flat, path := tmp_path / "gigantic.mp4", preset="ultrafast")
    # Sixteen gigabytes in small: with half of what the frames alone need, no decoder can give them.
    left = bytes_of(pid, "VmSize") + flat.nbytes // 2
    resource.prlimit(pid, resource.RLIMIT_AS, (left, left))
    with pytest.raises(DecodeError) as raised:
        fragile.read(path, kind="video", frames=None, rule="endpoints")
    assert type(raised.value) is DecodeError  # not the time-out
    assert_a_sentence(str(raised.value), path)
    assert works(fragile, video)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_five_hundred_videos_leave_no_memory_behind(decoder: Decoder, tmp_path: Path) -> None:
    (path := tmp_path / "large.mp4").write_bytes(encode_mp4(numbered(8).repeat(2, 1).repeat(2, 2)))

    def read() -> None:
        assert decoder.read(path, kind="video", frames=None, rule="endpoints").frames.nbytes > 3.9e5

    for _ in range(20):  # libraries, buffers and the allocator's pools
        read()
    before = bytes_of(pid_of(decoder), "VmRSS")
    for _ in range(500):
        read()
    # Frames that stayed behind would be 195 MB and decoders some 500; what was measured is a few megabytes.
    assert bytes_of(pid_of(decoder), "VmRSS") - before < 50e6


# Pictures.

CORNERS = np.zeros((24, 40, 3), np.uint8)
CORNERS[:12, :20], CORNERS[:12, 20:], CORNERS[12:, :20] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}
"""EXIF orientation -> what a viewer does to the stored pixels."""


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_is_shown_as_its_camera_was_held(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(CORNERS).save(path := tmp_path / f"picture.{suffix}", exif=exif, quality=95)
    clip = Decoder().read(path, kind="image", frames=8, rule="endpoints")
    expected = ORIENTATIONS[orientation](CORNERS)
    assert clip.frames.shape == (1, *expected.shape)
    # PNG is exact; JPEG blurs colour at the borders (of two pixels), and a wrong orientation differs by over 50.
    assert np.abs(clip.frames[0].astype(int) - expected.astype(int)).mean() <= (0 if suffix == "png" else 12)
    assert (clip.indices, clip.times_s, clip.kind) == ((0,), (0.0,), "image")


GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY.astype(np.uint16) * 256 + 77),
        Image.fromarray(np.stack([GREY] * 3 + [np.full_like(GREY, 255)], -1)),
        Image.fromarray(GREY).convert("P"),
    ],
    ids=["grey", "grey-16-bit", "with-alpha", "palette"],
)
def test_every_kind_of_pixel_becomes_eight_bit_rgb(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(path := tmp_path / "picture.png")
    frame = Decoder().read(path, kind="image", frames=None, rule="endpoints").frames[0]
    assert frame.dtype == np.uint8
    assert (frame == GREY[..., None]).all()


def test_a_picture_starts_no_worker_and_its_pixels_may_be_written(tmp_path: Path) -> None:
    Image.fromarray(CORNERS).save(path := tmp_path / "picture.png")
    with Decoder() as decoder:
        decoder.read(path, kind="image", frames=None, rule="endpoints").frames[:] = 0
        assert decoder._worker is None


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    Image.fromarray(CORNERS).save(path := tmp_path_factory.mktemp("pictures") / "picture.png")
    return path


HEADER_BYTES = 33
"""Signature, size and pixel format of a PNG: left alone, so that no damaged size asks for gigabytes."""


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(0, 255), st.floats(0, 1))
@example(0, 0, 0.0)
@example(4, 0x7E, 1.0)  # a damaged chunk name, a SyntaxError in Pillow's words
def test_a_damaged_picture_is_one_sentence_or_a_picture(png: Path, at: int, value: int, kept: float) -> None:
    data = bytearray(png.read_bytes())
    data[HEADER_BYTES + at % (len(data) - HEADER_BYTES)] = value
    path = png.with_name("damaged.png")
    path.write_bytes(data[: round(kept * len(data))])
    try:
        clip = Decoder().read(path, kind="image", frames=None, rule="endpoints")
    except DecodeError as error:
        assert_a_sentence(str(error).replace("[", ""), path)  # Pillow quotes bytes in brackets
    else:
        assert clip.frames.shape == (1, *CORNERS.shape)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.png", b"no picture", "cannot identify"),
        ("empty.png", b"", "the file is empty"),
        ("missing.png", None, "the file is missing"),
    ],
)
def test_what_is_no_picture_is_one_sentence_with_its_name(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DecodeError, match=said) as raised:
        Decoder().read(tmp_path / name, kind="image", frames=None, rule="endpoints")
    assert_a_sentence(str(raised.value), tmp_path / name)
