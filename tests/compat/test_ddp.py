"""DistributedDataParallel on two gloo processes, told of no unused parameters."""

from __future__ import annotations

from typing import Any

import pytest
from support.ranks import LEARNED, assert_as_alone, together
from support.sharded import data_parallel


@pytest.fixture(scope="module")
def results() -> Any:
    return together(data_parallel, LEARNED)


@pytest.mark.parametrize("graph", ["dynamic", "static"])
@pytest.mark.parametrize("checkpoint", ["none", "model", "wrapper"])
def test_two_processes_train_as_one(results: Any, checkpoint: str, graph: str):
    assert_as_alone(results[f"{graph} {checkpoint}"])
