"""FSDP2 (`fully_shard`) and FSDP1 with every block a unit, on two gloo processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.ranks import KINDS, LEARNED, assert_as_alone, together
from support.sharded import fsdp
from support.slow import most_slow

CHECKPOINTS = ("none", "model", "wrapper")
FULL = [("FSDP2", LEARNED, "full", checkpoint) for checkpoint in CHECKPOINTS]
FULL[1:1] = [("FSDP1", LEARNED, "full", checkpoint) for checkpoint in ("none", "wrapper")]
HALF = [("FSDP2", list(KINDS), "bf16", checkpoint) for checkpoint in ("none", "model")]


def _runs(runs: list[Any], often: int) -> Any:
    chosen = most_slow(map(pytest.param, runs), often)
    return pytest.mark.parametrize("run", chosen, ids=lambda run: f"{run[0]} {run[3]}")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Any:
    """Of the runs that were chosen, all of them in one pair of processes."""
    tests = [item for item in request.session.items if item.path == request.path]
    return together(fsdp, [test.callspec.params["run"] for test in tests])  # type: ignore[attr-defined]


@_runs(FULL, 2)
def test_sharded_training_is_that_of_one_process(results: Any, run: tuple[str, ...]):
    assert_as_alone(results[f"{run[0]} {run[2]} {run[3]}"])


@_runs(HALF, 1)
def test_sharded_training_in_bfloat16(results: Any, run: tuple[str, ...]):
    for kind, one in results[f"{run[0]} {run[2]} {run[3]}"].items():
        assert all(map(math.isfinite, one["losses"])) and one["gradients"], kind
        assert all(value.isfinite().all() for value in one["gradients"].values()), kind
        assert kind == "random" or one["losses"][2] < one["losses"][0], kind
