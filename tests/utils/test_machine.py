"""Facts about the machine: plain data, and cheap to ask for again."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch
from spot_vit.utils import machine


def test_facts_are_plain_data_about_this_process() -> None:
    found = machine.facts()
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert {"processor", "isa", "compiler", "python", "torch", "timm", "spot"} <= set(found)


def test_the_driver_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="1.2.3\n")

    machine._driver.cache_clear()
    monkeypatch.setattr(subprocess, "run", run)
    assert [machine._driver(), machine._driver()] == ["1.2.3", "1.2.3"]
    machine._driver.cache_clear()
    assert len(calls) == 1
