"""Which of many alike cases every run of the tests takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def most_slow(values: Iterable[Any], often: int = 1) -> list[Any]:
    """Parameters of a test: the first `often` in every run, the others with `-m slow`."""
    chosen = list(values)
    return [*chosen[:often], *map(_slow, chosen[often:])]


def _slow(value: Any) -> Any:
    if isinstance(value, type(pytest.param())):
        return pytest.param(*value.values, id=value.id, marks=[*value.marks, pytest.mark.slow])
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
