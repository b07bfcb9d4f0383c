"""Files that are either complete or not there, whoever writes them and however it ends."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write, save_json, save_torch

ROOT = Path(__file__).resolve().parents[2]


def test_json_is_written_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    save_json(path, {"top1": 0.5, "kept": [1, 2]})
    assert json.loads(path.read_text()) == {"top1": 0.5, "kept": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        save_json(path, {"top1": math.nan})
    assert json.loads(path.read_text())["top1"] == 0.5
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


WRITER = """
import itertools, sys
from spot_vit.utils.files import atomic_write
path, who = sys.argv[1:]
for turn in itertools.count():
    with atomic_write(path) as temporary:
        temporary.write_text(f"{who} {turn} " * 20_000 + "end")
    print(turn, flush=True)
"""


@contextmanager
def writers(path: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that write one file again and again until they are killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python") + ":" + str(ROOT)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(who)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in range(count)
    ]
    try:
        for one in running:
            assert one.stdout is not None and one.stdout.readline() == "0\n"
        yield running
    finally:
        for one in running:
            one.kill()
            one.wait()


def whole(path: Path) -> bool:
    words = path.read_text().split()
    return words[-1] == "end" and len(words) == 40_001 and len(set(words[:-1:2])) == 1


def test_many_writers_and_readers_of_one_name_never_meet(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    with writers(path, 4) as running:
        stop = time.monotonic() + 2
        reads = 0
        while time.monotonic() < stop:
            assert whole(path)
            reads += 1
        assert reads > 20 and all(one.poll() is None for one in running)


def test_kill_9_leaves_a_whole_file_and_the_next_writer_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    for _ in range(3):
        with writers(path, 2) as running:
            while len(os.listdir(tmp_path)) < 2:  # until one of them is at it
                pass
            for one in running:
                os.kill(one.pid, signal.SIGKILL)
        assert whole(path)
    with writers(path, 1) as (one,):
        one.send_signal(signal.SIGSTOP)
        left = [file for file in tmp_path.iterdir() if file != path]
        if left:  # stopped in the middle: alive, so its file stays
            save_json(path, {"a": 1})
            assert left[0].exists()
    save_json(path, {"a": 1})
    assert os.listdir(tmp_path) == [path.name]


def test_only_files_of_dead_writers_of_this_name_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    dead = tmp_path / ".a.json.1-0123abcd.tmp"
    others = [tmp_path / name for name in (".a.json.tmp", ".b.json.1-0123abcd.tmp", ".a.json.swp")]
    for file in (dead, *others):
        file.write_text("x")
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            assert second != first and first.exists()
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and not dead.exists()
    assert all(file.exists() for file in others)


def test_a_temporary_that_a_neighbour_takes_for_dead_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between making a file and locking it."""
    lock, seen = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not seen:
            seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.unlink(seen[0])
        lock(descriptor, how)

    monkeypatch.setattr("spot_vit.utils.files.fcntl.flock", late)
    with atomic_write(tmp_path / "file") as temporary:
        assert temporary.exists() and str(temporary) != seen[0]
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond this: as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    save_json(path, {"old": 1})
    with small_files(4096), pytest.raises(UserError) as caught:
        save_json(path, {"new": "x" * 100_000})
    words = str(caught.value)
    assert words.startswith(f"{path} cannot be written: File too large; write elsewhere")
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == [path.name]


def test_torch_save_without_room_is_one_line_too(tmp_path: Path) -> None:
    path = tmp_path / "resume.pt"
    with (
        small_files(4096),
        pytest.raises(UserError, match=r"resume\.pt cannot be written: File too large; write"),
    ):
        save_torch(path, {"x": torch.rand(100_000)})
    assert os.listdir(tmp_path) == []
    content = {"x": torch.rand(100_000), "step": 3}
    save_torch(path, content)
    read = torch.load(path)
    assert read["step"] == 3 and torch.equal(read["x"], content["x"])
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_torch(path, {"x": lambda: 0})
    assert torch.load(path)["step"] == 3


def test_paths_that_cannot_be_written_are_named_with_the_cure(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    for path, words in (
        (file / "below.json", "a part of the path is a file: name a folder"),
        (file / "far" / "below.json", "a part of the path is a file: name a folder"),
        (tmp_path, "it is a folder: name a file"),
        (tmp_path / ("x" * 300), "choose a shorter name"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            save_json(path, {})
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_errors_of_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "a" / "file") as temporary:
        temporary.write_bytes(Path("/usr/lib").read_bytes())
    with pytest.raises(io.UnsupportedOperation), atomic_write(tmp_path / "a" / "file"):
        raise io.UnsupportedOperation("seek")


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "file.json", tmp_path / "link.json"
    link.symlink_to(target)
    save_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
