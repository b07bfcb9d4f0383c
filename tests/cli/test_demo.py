"""`spot demo` and `spot bench` look at their options before the first step."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from spot_vit.cli import demo
from spot_vit.cli.main import main
from spot_vit.nn import attention_backend

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(demo, "importlib", SimpleNamespace(import_module=refuse))
    monkeypatch.setattr(attention_backend, "measure_table", refuse)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command with a wrong option ends with."""
    assert main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spot {words[0]}: ")
    return line


@pytest.mark.parametrize("name", ["", "compare", "budgets", "dense"])
@pytest.mark.parametrize(
    ("option", "value", "limits"),
    [
        ("--threads", "0", "1 to 1024"),
        ("--threads", "-2", "1 to 1024"),
        ("--seeds", "0", "1 to 1000"),
        ("--seed", "-1", "0 to 2147483647"),
    ],
)
def test_numbers_out_of_range(
    name: str,
    option: str,
    value: str,
    limits: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if option == "--seeds" and not name:
        return
    words = ["demo", *filter(None, [name]), option, value, "--output", str(tmp_path / "out")]
    assert refused(capsys, *words).endswith(f"{option}: expected {limits}, got {value}")
    assert os.listdir(tmp_path) == []


def test_all_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "demo", "compare", "--threads", "0", "--seeds", "-3")
    assert "--seeds: expected 1 to 1000, got -3; --threads: expected" in line


def test_folders_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert f"{file} is a file" in refused(capsys, "demo", "--output", str(file))
    assert f"{file} is a file" in refused(capsys, "demo", "--output", str(file / "below"))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "Read-only file system" in refused(capsys, "demo", "--output", str(tmp_path))


def test_ctrl_c_is_one_line_and_130(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "importlib", SimpleNamespace(import_module=interrupt))
    assert main(["demo", "--output", str(tmp_path)]) == 130
    assert f"interrupted; finished phases are in {tmp_path}" in capsys.readouterr().err


def test_bench_checks_its_options_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = ["bench", "crossover"]
    assert "--threads: expected 1 to 1024, got 0" in refused(capsys, *bench, "--threads", "0")
    output = ["--output", str(tmp_path)]
    assert f"{tmp_path} cannot be the output file" in refused(capsys, *bench, *output)
    output = ["--output", str(tmp_path / "x.json")]
    assert "no column of [3] tokens" in refused(capsys, *bench, *output, "--tokens", "3")


def test_a_wrong_option_is_told_before_torch_is_imported() -> None:
    code = "import sys; from spot_vit.cli.main import main; print(main(sys.argv[1:]))"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--threads", "0"],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2", "False"]
