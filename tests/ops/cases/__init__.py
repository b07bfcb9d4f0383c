"""What the op tests know of each op: a plain PyTorch reference, samples, error inputs, FLOPs.

Each op slice has a file here, whose `OPS` is found by itself. An op without cases, or with a gap in
them, fails the tests.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from ops.cases.base import Op

_FILES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
SLICES: dict[str, tuple[Op, ...]] = {
    file.__name__.rpartition(".")[2]: file.OPS for file in _FILES if hasattr(file, "OPS")
}
OPS: dict[str, Op] = {op.name: op for ops in SLICES.values() for op in ops}


def each_sample(traced: bool = False) -> list[Any]:
    """All (op, sample) pairs as pytest parameters."""
    return [
        pytest.param(op, sample, id=f"{op.name}-{sample.name}".replace(" ", "_"))
        for op in OPS.values()
        for sample in op.samples
        if sample.traced or not traced
    ]


def each_error() -> list[Any]:
    """All (op, error input) pairs as pytest parameters."""
    return [
        pytest.param(op, bad, id=f"{op.name}-{bad.name}".replace(" ", "_"))
        for op in OPS.values()
        for bad in op.errors
    ]


def defined_ops() -> set[str]:
    """Names of the ops that the loaded libraries define."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in names if name.startswith("spot::")}
