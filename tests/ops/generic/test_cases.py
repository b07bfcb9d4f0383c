"""Every op has cases, and they have all their parts."""

from __future__ import annotations

import pytest
import torch
from ops.cases import OPS, defined_ops
from ops.cases.base import Op
from support.arguments import tensors
from support.comparison import assert_same_bits
from torch.utils.flop_counter import flop_registry


def _has(op: Op, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"spot::{op.name}", key)


def test_every_op_is_in_the_table() -> None:
    assert set(OPS) == defined_ops()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_has_all_its_parts(op: Op) -> None:
    assert len(op.samples) >= 15 and len({sample.name for sample in op.samples}) == len(op.samples)
    assert sum(sample.traced for sample in op.samples) >= 8
    assert len(op.errors) >= 12 and len({bad.name for bad in op.errors}) == len(op.errors)
    assert callable(op.reference)
    assert _has(op, "Meta"), "no fake"
    assert op.call in flop_registry, "no FLOP formula"
    assert _has(op, "CPU"), "no CPU kernel"
    integer_only = op.name in ("select_tokens", "connectivity", "predict_connectivity")
    assert integer_only or _has(op, "Autograd"), "no autograd formula"
    assert op.grads or op.once_only or integer_only


def test_the_table_builds_the_same_arguments_every_time() -> None:
    assert set(OPS) == defined_ops()
    for op in OPS.values():
        for sample in op.samples:
            one, other = (sample.args("cpu", torch.bfloat16) for _ in range(2))
            for mine, theirs in zip(tensors(one), tensors(other), strict=True):
                assert_same_bits(mine, theirs)
                assert mine.stride() == theirs.stride()
            integer = (torch.int64, torch.int32)
            assert all(
                value.is_floating_point() or value.dtype in integer for value in tensors(one)
            )


def test_memory_is_poisoned() -> None:
    assert torch.empty(1000).isnan().all()
    assert (torch.empty(1000, dtype=torch.int64) == 2**63 - 1).all()
