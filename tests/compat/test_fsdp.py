"""FSDP2 (`fully_shard`) and FSDP1 with every block a unit, on two gloo processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.ranks import KINDS, LEARNED, assert_as_alone, together
from support.sharded import fsdp

CHECKPOINTS = ("none", "model", "wrapper")
FULL = [("FSDP2", LEARNED, "full", checkpoint) for checkpoint in CHECKPOINTS]
FLAT = [("FSDP1", LEARNED, "full", checkpoint) for checkpoint in ("none", "wrapper")]
HALF = [("FSDP2", list(KINDS), "bf16", checkpoint) for checkpoint in ("none", "model")]


@pytest.fixture(scope="module")
def results() -> Any:
    return together(fsdp, [*FULL, *FLAT, *HALF])


@pytest.mark.parametrize("run", [*FULL, *FLAT], ids=lambda run: f"{run[0]} {run[3]}")
def test_sharded_training_is_that_of_one_process(results: Any, run: tuple[str, ...]):
    assert_as_alone(results[f"{run[0]} {run[2]} {run[3]}"])


@pytest.mark.parametrize("run", HALF, ids=lambda run: f"{run[0]} {run[3]}")
def test_sharded_training_in_bfloat16(results: Any, run: tuple[str, ...]):
    for kind, one in results[f"{run[0]} {run[2]} {run[3]}"].items():
        assert all(map(math.isfinite, one["losses"])) and one["gradients"], kind
        assert all(value.isfinite().all() for value in one["gradients"].values()), kind
        assert kind == "random" or one["losses"][2] < one["losses"][0], kind
