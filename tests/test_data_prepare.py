"""Archives are unpacked to where the suite looks; what could do harm is refused first, and stopping loses one file."""

from __future__ import annotations

import errno
import io
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vlmbench import data_prepare
from vlmbench.data_prepare import Joined

Cli = Callable[..., Any]
VIDEOS = {f"data/{name}.mp4": random.Random(name).randbytes(5000 + len(name)) for name in ("a", "bb", "ccc")}
SUBTITLES = {"subtitle/a.srt": b"1\n"}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("data")
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(files: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def in_parts(folder: Path, data: bytes, names: str = "aa ab ac") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(data) // 3)
    for number, name in enumerate(names.split()):
        (folder / f"videos.tar.part.{name}").write_bytes(data[number * size :][:size])


def prepared(cli: Cli, root: Path, suite: str = "videomme", *args: object) -> Any:
    return cli("data", "prepare", "--suite", suite, "--data-root", root, *args)


def held(folder: Path) -> dict[str, bytes]:
    """Unpacked files, and whatever else was left behind."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".zip", ".tar"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if ".part." not in path.name}


def test_zips_are_unpacked_once_and_kept(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "videomme"
    first, *rest = VIDEOS.items()
    zipped(folder / "videos_chunked_01.zip", dict([first]))
    zipped(folder / "videos_chunked_02.zip", dict(rest))
    zipped(folder / "subtitle.zip", SUBTITLES)
    done = prepared(cli, tmp_path)
    assert (done.code, done.out.strip()) == (0, f"4 files unpacked into {folder}, 0 were there already.")
    assert held(folder) == VIDEOS | SUBTITLES
    assert len(list(folder.glob("*.zip"))) == 3
    (folder / "data" / "a.mp4").write_bytes(b"another size")
    assert prepared(cli, tmp_path).out.startswith("1 files unpacked")
    assert held(folder) == VIDEOS | SUBTITLES


def test_parts_are_read_as_one_archive_from_wherever_they_are(cli: Cli, tmp_path: Path) -> None:
    files = {f"videos/{number}.mp4": random.Random(number).randbytes(number * 700) for number in range(6)}
    in_parts(tmp_path / "fetched", tarred(files))
    (tmp_path / "fetched" / "subtitles.tar").write_bytes(tarred({"subtitles/a.json": b"[]"}))
    done = prepared(cli, tmp_path, "longvideobench", "--archives", tmp_path / "fetched")
    assert done.code == 0, done.err
    assert held(tmp_path / "longvideobench") == files | {"subtitles/a.json": b"[]"}


def test_joined_files_read_like_the_whole(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(1000)
    paths = []
    for number, (start, stop) in enumerate(((0, 300), (300, 300), (300, 999), (999, 1000))):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(data[start:stop])
    with io.BufferedReader(cast(Any, Joined(paths)), 64) as joined:
        assert joined.read() == data
        for start in (0, 299, 300, 998, 999, 1000, 2000):
            joined.seek(start)
            assert joined.read(50) == data[start:][:50]
        assert joined.seek(-5, os.SEEK_END) == 995


@pytest.mark.parametrize("name", ["../out.mp4", "/tmp/out.mp4", "data/../../out.mp4", "..\\out.mp4", "C:/out.mp4"])  # noqa: S108
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leaves_the_folder_is_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path, kind: str, name: str
) -> None:
    files = VIDEOS | {name: b"evil"}
    suite = "videomme" if kind == "zip" else "longvideobench"
    if kind == "zip":
        zipped(tmp_path / suite / "videos_chunked_01.zip", files)
    else:
        in_parts(tmp_path / suite, tarred(files))
    done = prepared(cli, tmp_path, suite)
    assert (done.code, "leaves the folder; nothing was unpacked" in done.err) == (2, True)
    assert held(tmp_path / suite) == {}
    assert not list(tmp_path.parent.glob("out.mp4"))


def test_links_and_devices_are_refused(cli: Cli, tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
            info = tarfile.TarInfo("videos/a.mp4")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        in_parts(tmp_path / "longvideobench", out.getvalue())
        done = prepared(cli, tmp_path, "longvideobench")
        assert (done.code, "a link or device" in done.err) == (2, True)
    link = zipfile.ZipInfo("data/a.mp4")
    link.external_attr = 0o120777 << 16
    (tmp_path / "videomme").mkdir()
    with zipfile.ZipFile(tmp_path / "videomme" / "videos_chunked_01.zip", "w") as zip_:
        zip_.writestr(link, "/etc/passwd")
    done = prepared(cli, tmp_path)
    assert (done.code, "holds the link" in done.err) == (2, True)


def test_a_folder_that_is_itself_a_link_to_elsewhere_is_not_followed(cli: Cli, tmp_path: Path) -> None:
    zipped(tmp_path / "videomme" / "videos_chunked_01.zip", VIDEOS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "videomme" / "data").symlink_to(tmp_path / "elsewhere")
    done = prepared(cli, tmp_path)
    assert (done.code, "is a link that leaves" in done.err) == (2, True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_is_missing_or_damaged_is_named(cli: Cli, tmp_path: Path) -> None:
    done = prepared(cli, tmp_path)
    assert (done.code, "`hf download lmms-eval/Video-MME" in done.err) == (2, True)
    assert prepared(cli, tmp_path, "synthvideo").code == 2
    folder = tmp_path / "longvideobench"
    in_parts(folder, tarred(VIDEOS), "aa ac ad")
    done = prepared(cli, tmp_path, "longvideobench")
    assert (done.code, "videos.tar.part.ab is missing" in done.err) == (2, True)
    for path in folder.iterdir():
        path.unlink()
    in_parts(folder, tarred(VIDEOS))
    (folder / "videos.tar.part.ac").unlink()
    done = prepared(cli, tmp_path, "longvideobench")
    assert (done.code, "is damaged or not complete" in done.err) == (2, True), done.err
    (tmp_path / "videomme").mkdir()
    (tmp_path / "videomme" / "subtitle.zip").write_bytes(b"<html>")
    done = prepared(cli, tmp_path)
    assert (done.code, "subtitle.zip is damaged or not complete" in done.err) == (2, True)


def test_a_damaged_file_inside_is_named_and_the_rest_is_kept(cli: Cli, tmp_path: Path) -> None:
    path = zipped(tmp_path / "videomme" / "videos_chunked_01.zip", VIDEOS)
    data = path.read_bytes()
    at = data.index(VIDEOS["data/bb.mp4"])
    path.write_bytes(data[:at] + b"!" + data[at + 1 :])
    done = prepared(cli, tmp_path)
    assert (done.code, "is damaged at data/bb.mp4" in done.err) == (1, True)
    assert held(tmp_path / "videomme") == {"data/a.mp4": VIDEOS["data/a.mp4"]}
    path.write_bytes(data)
    assert prepared(cli, tmp_path).out.startswith("2 files unpacked")


def test_too_small_a_disk_is_said_first_and_a_full_one_loses_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped(tmp_path / "videomme" / "videos_chunked_01.zip", VIDEOS)
    with monkeypatch.context() as patch:
        patch.setattr(data_prepare.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        done = prepared(cli, tmp_path)
        assert done.code == 2
        assert "needs 268 MB, 268 of them to spare, and its disk has 0 MB free; make room" in done.err
    with monkeypatch.context() as patch:
        copied: list[str] = []

        def full(stream: Any, out: Any, block: int) -> None:
            if copied:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            copied.append("one")
            out.write(stream.read())

        patch.setattr(data_prepare.shutil, "copyfileobj", full)
        done = prepared(cli, tmp_path)
        assert (done.code, "what was unpacked is kept; make room" in done.err) == (1, True)
    assert len(held(tmp_path / "videomme")) == 1
    assert prepared(cli, tmp_path).out.startswith("2 files unpacked")
    assert held(tmp_path / "videomme") == VIDEOS
