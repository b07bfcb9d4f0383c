"""The benchmark runner: contention, ratios, bars and exit codes, with a clock of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compact, run, timing
from benchmarks.timing import Case, Clock


def test_contention_is_what_others_take_beyond_our_idle_cpus() -> None:
    def reason(own: float, busy: float, threads: int, cpus: int) -> str | None:
        return timing.contention(Clock(wall=1.0, own=own, busy=busy), threads, cpus)

    assert reason(own=2.0, busy=2.05, threads=2, cpus=2) is None
    assert "other processes used 0.50 CPUs" in str(reason(own=1.5, busy=2.0, threads=2, cpus=2))
    assert reason(own=1.0, busy=1.5, threads=1, cpus=2) is None
    assert "(0.60 allowed)" in str(reason(own=1.0, busy=1.9, threads=1, cpus=2))
    assert reason(own=2.0, busy=20.0, threads=2, cpus=64) is None
    assert "only 0.60 CPU seconds" in str(reason(own=0.6, busy=0.6, threads=1, cpus=2))


def test_summary_has_median_and_spread() -> None:
    found = timing.summary([i / 1000 for i in range(11)])
    assert found == {"median_ms": 5.0, "p10_ms": 1.0, "p90_ms": 9.0, "rounds": 11}


def spin(seconds: float) -> Any:
    def side(_: int) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return side


def measured(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> dict[str, Any]:
    monkeypatch.setattr(timing, "wait_for_quiet", lambda patience: 0.0)
    monkeypatch.setattr(timing, "contention", lambda *_: reason)
    case = Case("spin", spin(1e-4), {"slow": spin(3e-4), "same": spin(1e-4)}, {"slow": 2.0})
    return timing.measure(case, "cpu", seconds=0.05)


def test_sides_alternate_and_bars_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, None)
    slow, same = result["rows"]
    assert slow["ratio"] > 1 and slow["at_least"] == 2.0 and slow["held"] is (slow["ratio"] >= 2)
    assert same["at_least"] is None and same["held"] is None
    rounds = {times["rounds"] for times in result["times"].values()}
    assert len(rounds) == 1 and rounds.pop() >= 10
    assert all(times["cpu_median_ms"] > 0 for times in result["times"].values())


def test_a_contended_machine_gives_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, "others")
    assert all(row["ratio"] is None and row["held"] is None for row in result["rows"])
    results = {"ops": {"spin": {"cases": [result]}}}
    assert run.status(results) == 3
    assert "contended" in run.table(results) and "not stated" in run.table(results)


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
        assert run.tests_of(name), f"no test file is named test_{name}.py"


def test_red_tests_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "tests_pass", lambda op, device: False)
    output = tmp_path / "out.json"
    assert run.main(["compact", "--output", str(output)]) == 1
    assert "tests are red" in capsys.readouterr().err and not output.exists()


def test_skipping_the_tests_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compact, "cases", lambda device: iter([Case("one", spin(1e-5), {})]))
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
