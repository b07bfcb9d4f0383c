"""Sides that take turns, and a machine that is busy."""

from __future__ import annotations

from typing import Any

import pytest
from spot_vit.bench import timed as module
from spot_vit.bench.timed import CALLS, timed
from spot_vit.utils import timing


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What is said of each measurement in turn: busy, or None."""
    said: list[str | None] = []
    monkeypatch.setattr(module, "contention", lambda *args: said.pop(0))
    monkeypatch.setattr(timing, "wait_for_quiet", lambda patience: max(patience - 1, 0))
    return said


def side(calls: list[str], name: str) -> Any:
    return lambda i: calls.append(name)


def test_a_quiet_machine_is_measured_once(reasons: list[str | None]) -> None:
    reasons.append(None)
    calls: list[str] = []
    sides = {name: side(calls, name) for name in "ab"}
    found = timed(sides, "cpu", seconds=0, patience=5, name="test")
    assert found.contended is None and found.attempts == 1
    assert all(len(found.times[name].wall) >= CALLS for name in "ab")
    assert calls[:4] == ["a", "b", "a", "b"] and calls[4:6] == ["a", "a"]  # then in longer turns


def test_a_busy_machine_is_measured_again_while_patience_lasts(reasons: list[str | None]) -> None:
    reasons += ["busy", "busy", None]
    found = timed({"a": side([], "a")}, "cpu", seconds=0, patience=9, name="test")
    assert found.contended is None and found.attempts == 3
    reasons += ["busy", "busier"]
    found = timed({"a": side([], "a")}, "cpu", seconds=0, patience=2, name="test")
    assert found.contended == "busier" and found.attempts == 2
