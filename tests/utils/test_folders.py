"""Output folders: made, checked, and refused in one line."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from spot_vit.utils.errors import UserError
from spot_vit.utils.folders import prepare, prepare_file


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "new" / "deep", needed_bytes=1000)
    assert folder == tmp_path / "new" / "deep" and os.listdir(folder) == []
    (folder / "kept").write_text("x")
    assert prepare(str(folder)) == folder and os.listdir(folder) == ["kept"]
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert prepare(link) == link


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    file, loose = tmp_path / "file", tmp_path / "loose"
    file.write_text("x")
    loose.symlink_to(tmp_path / "nowhere")
    for path, culprit in ((file, file), (file / "a" / "b", file), (loose / "a", loose)):
        with pytest.raises(UserError, match=f"{culprit} is a file; name another"):
            prepare(path)
    assert file.read_text() == "x" and sorted(os.listdir(tmp_path)) == ["file", "loose"]


def test_too_little_space_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out has too little space: 1000000000\.00 GB are needed"):
        prepare(tmp_path / "out", needed_bytes=10**18)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_takes_no_file_is_refused(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path)
    words = f"{tmp_path} cannot be written: {os.strerror(number)}; "
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(UserError, match="/proc/none/out cannot be written"):
        prepare("/proc/none/out", needed_bytes=1000)


def test_a_file_to_write_is_checked_through_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    assert prepare_file(path) == path and os.listdir(tmp_path / "new") == []
    path.write_text("old")
    assert prepare_file(str(path)) == path and path.read_text() == "old"
    with pytest.raises(UserError, match="new cannot be the output file: it is a folder"):
        prepare_file(tmp_path / "new")
    with pytest.raises(UserError, match=r"out\.json is a file; name another"):
        prepare_file(path / "deeper.json")
