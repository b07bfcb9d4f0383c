"""Switches are put back, and op tests run with theirs."""

from __future__ import annotations

import pytest
import torch
from support.data import generator
from support.switches import isa, isa_control, threads


def test_switches_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
    control = isa_control()
    name = control.isa()
    with pytest.raises(KeyError), isa("baseline"):
        assert control.isa() == "baseline"
        raise KeyError
    assert control.isa() == name
    assert generator("a").initial_seed() != generator("b").initial_seed()


def test_op_tests_run_on_poisoned_memory(request: pytest.FixtureRequest) -> None:
    """The switch of ops/conftest.py reaches memory that the ops allocate; here it is off."""
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1000).isnan().all()
        assert (torch.empty(1000, dtype=torch.int64) == 2**63 - 1).all()
    finally:
        torch.use_deterministic_algorithms(False)
