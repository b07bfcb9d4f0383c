"""The recipe of the embedded data, from beginning to end: minutes, as a user would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import command


@pytest.mark.slow
def test_digits_are_learned_and_most_patches_are_not_needed(tmp_path: Path) -> None:
    process = command(
        "train", "digits", "--output", str(tmp_path), "--experiment", "run", OMP_NUM_THREADS="2"
    )
    output = process.communicate(timeout=3000)
    assert process.returncode == 0, output
    found = json.loads((tmp_path / "run/summary.json").read_text())["results"]
    dense, sparse = found["dense"], found["finetune"]
    assert dense["top1"] >= 0.95 and sparse["top1"] >= dense["top1"] - 0.01
    assert sparse["gmacs"] <= 0.6 * dense["gmacs"]
