"""Drawn legal calls: sizes that such code gets wrong, and samples of drawn cases."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from ops.cases.base import Sample

names = st.integers(0, 1 << 30).map(str)
batches = st.sampled_from([2, 1, 3, 0])
prefixes = st.sampled_from([1, 0, 2, 5])
# Around what vectors and tiles hold.
counts = st.one_of(st.integers(0, 9), st.sampled_from([12, 15, 16, 17, 24, 25, 31, 32, 33, 64, 65]))
widths = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 65]))
masks = st.sampled_from(["", "random", "random", "all", "none"])
scales = st.sampled_from([None, None, 0.37, -1.5, 0.0, 3.0])
orders = st.sampled_from(["ascending", "shuffled"])


def drawn(cases: Any, make: str = "args") -> Any:
    """Samples of a strategy of cases, whose method `make` builds the arguments."""
    return cases.map(lambda case: Sample(case.name, getattr(case, make)))
