"""Op tests run on poisoned memory; marks name their slice: `-m compact` are those of compact."""

from __future__ import annotations

import pytest
import torch
from ops.cases import SLICES

_SLICE_OF = {op.name: name for name, ops in SLICES.items() for op in ops}


def pytest_configure(config: pytest.Config) -> None:
    for name in SLICES:
        config.addinivalue_line("markers", f"{name}: tests of that op slice")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what is in the folder of a slice, or has one of its ops as a parameter."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = {item.path.parent.name, *(_SLICE_OF.get(getattr(x, "name", "")) for x in params)}
    for name in names & set(SLICES):
        item.add_marker(name)


@pytest.fixture(autouse=True)
def _poisoned():
    """Uninitialised memory is full of NaN (integers: the largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
