"""The benchmark runner: contention, ratios, bars and exit codes, with a clock of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from spot_vit.utils.timing import Case

from benchmarks import compact, run


def test_exit_status_follows_the_bars() -> None:
    def status(*held: bool | None) -> int:
        rows = [{"at_least": 2.0, "held": each} for each in held]
        return run.status({"ops": {"op": {"cases": [{"rows": rows}]}}})

    assert status(True, True) == 0
    assert status(True, None) == 3
    assert status(False, None) == 1


def test_benchmarks_are_found_and_have_tests() -> None:
    assert set(run.names()) >= {"compact", "sparse_attention", "predictor", "sparsifiner"}
    assert not set(run.names()) & {"run", "timing", "__init__"}
    for name in run.names():
        where, _ = run.tests_of(name)
        assert where and all((run.ROOT / path).exists() for path in where[:1]), name


def test_red_tests_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "tests_pass", lambda op, device: False)
    output = tmp_path / "out.json"
    assert run.main(["compact", "--output", str(output)]) == 1
    assert "tests are red" in capsys.readouterr().err and not output.exists()


def test_skipping_the_tests_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compact, "cases", lambda device: iter([Case("one", lambda _: None, {})]))
    output = tmp_path / "out.json"
    threads = torch.get_num_threads()
    arguments = ["compact", "--skip-tests", "--threads", "1", "--seconds", "0", "--patience", "0"]
    assert run.main([*arguments, "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    written = json.loads(output.read_text())
    assert written["ops"]["compact"]["tested"] is False
    assert written["machine"]["threads"] == 1 and written["machine"]["torch"] == torch.__version__
    assert str(Path.home()) not in output.read_text()


@pytest.mark.parametrize("arguments", [["nonsense"], ["--device", "cuda"]])
def test_refuses_what_it_cannot_time(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        run.main(arguments)
    assert refused.value.code == 2
