"""The measurement of wait policies: turns, pairs, and neighbours that end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import wait_policy


def test_policies_take_turns_and_are_compared_within_a_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, str]] = []

    def there(policy: dict[str, str], seconds: float, threads: int) -> dict[str, float]:
        round_, turn = divmod(len(calls), 4)
        calls.append(policy)
        return {"x": [10.0, 20.0, 40.0, 50.0][turn] * (1 + 9 * round_)}

    monkeypatch.setattr(wait_policy, "time_there", there)
    output = tmp_path / "out.json"
    options = ["--rounds", "2", "--busy", "0", "--policy", "passive", "--output", str(output)]
    assert wait_policy.main(options) == 0
    assert calls == [{}, {"OMP_WAIT_POLICY": "PASSIVE"}] * 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| default | 55.0 (1.00 x) | 220.0 (4.00 x) |"
    assert lines[-1] == "| passive | 110.0 (2.00 x) | 275.0 (5.00 x) |"
    written = json.loads(output.read_text())
    assert written["figures"]["busy"]["passive"] == [{"x": 50.0}, {"x": 500.0}]


def test_a_process_has_the_policy_and_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> Any:
        seen.update(options["env"])
        return subprocess.CompletedProcess(command, 0, 'noise\n{"x": 1.5}\n', "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert wait_policy.time_there({"GOMP_SPINCOUNT": "7"}, 1.0, 3) == {"x": 1.5}
    assert seen["GOMP_SPINCOUNT"] == "7" and seen["OMP_NUM_THREADS"] == "3"
    assert "OMP_WAIT_POLICY" not in seen


def test_neighbours_end_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(RuntimeError), wait_policy.neighbours(2):
        assert [one.poll() for one in started] == [None, None]
        raise RuntimeError
    assert [one.poll() for one in started] == [-9, -9]
