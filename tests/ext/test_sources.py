"""Sources of the libraries: who may include what, and where CUDA's shims are named."""

from __future__ import annotations

import os.path
import re
from pathlib import Path

import pytest
from support.package import CUDA_SHIMS, ROOT

CSRC = ROOT / "csrc"
HEADER = "| file of `csrc` | may include | what it is |"


def _sources() -> list[Path]:
    found = [p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(found) > 10
    return found


def _includes(path: Path) -> list[str]:
    """What a file includes besides the standard library; files of ours from csrc on."""
    text = path.read_text()
    ours = re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE)
    others = re.findall(r"^\s*#\s*include\s*<([^>]+[./][^>]+)>", text, re.MULTILINE)
    folder = path.relative_to(CSRC).parent
    return [os.path.normpath(folder / name) for name in ours] + others


def _table() -> dict[tuple[str, ...], list[str]]:
    """Rows of the table in docs/design.md: patterns of files to patterns of what they include."""
    lines = (ROOT / "docs/design.md").read_text().partition(HEADER)[2].splitlines()[2:]
    rows = [line.split("|")[1:3] for line in lines[: lines.index("")]]
    assert len(rows) > 10
    return {tuple(re.findall("`(.+?)`", file)): re.findall("`(.+?)`", may) for file, may in rows}


def _fits(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), name) is not None


def _row_of(path: Path) -> tuple[str, ...]:
    """The row that names a file, or else the one row whose pattern fits."""
    name = path.relative_to(CSRC).as_posix()
    named = [row for row in _table() if name in row]
    (row,) = named or [row for row in _table() if any(_fits(name, part) for part in row)]
    return row


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_includes(path: Path) -> None:
    """The table of docs/design.md allows every include of a file."""
    row = _row_of(path)
    for include in _includes(path):
        assert any(_fits(include, part) for part in _table()[row]), (
            f"{path.name} includes {include}; the row of {', '.join(row)} does not say so"
        )


def test_the_table_says_no_more_than_there_is() -> None:
    used: dict[tuple[str, ...], set[str]] = {row: set() for row in _table()}
    files = {path: _row_of(path) for path in _sources()}
    for path, row in files.items():
        used[row].update(_includes(path))
    names = [path.relative_to(CSRC).as_posix() for path in files]
    for row, allowed in _table().items():
        assert row in files.values(), f"no file is in the row of {row}"
        for part in row:
            assert any(_fits(name, part) for name in names), part
        for part in allowed:
            assert any(_fits(include, part) for include in used[row]), f"{row}: {part}"


def test_cuda_shims_are_named_in_one_file() -> None:
    for path in _sources():
        named = {shim for shim in CUDA_SHIMS if shim in path.read_text()}
        assert not named or path.name == "device.h", f"{path.name}: {named}"
