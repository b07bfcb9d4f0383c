"""Every op under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import OPS, each_sample
from ops.cases.base import Op, Sample
from ops.generic.calls import dtype_name
from support.arguments import tensors, with_grad
from support.comparison import assert_close, assert_same_bits
from support.gradients import cotangents
from torch import Tensor


def _cast_by_hand(op: Op, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """What autocast should do to float32 arguments: row ops keep them, arithmetic is cast."""
    places = {
        "fuse_tokens": (0, 1),
        "attention_stats": (0, 1, 2),
        "token_relevance": (0, 1, *range(3, 13)),
        "connectivity": (0, 1),
        "predict_connectivity": tuple(range(8)),
        "sparse_attention": (0, 1, 2),
        "packed_linear": (0, 1, 3, 4),
        "token_evidence": (),  # float32 statistics of any attention
    }
    assert op.name in places or op.exact or op.name.endswith("_backward")
    return tuple(
        a.to(dtype) if i in places.get(op.name, ()) and isinstance(a, Tensor) else a
        for i, a in enumerate(args)
    )


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize(("op", "sample"), each_sample(traced=True))
def test_autocast_to_the_ambient_dtype(
    op: Op, sample: Sample, ambient: torch.dtype, device: torch.device
) -> None:
    args = with_grad(sample.args(device, torch.float32), op.grads)
    with torch.amp.autocast(device.type, dtype=ambient):
        outputs = tensors(op.call(*args))
    expected = tensors(op.call(*_cast_by_hand(op, args, ambient)))
    for mine, theirs in zip(outputs, expected, strict=True):
        assert_same_bits(mine, theirs)
    wanted = [value for value in tensors(args) if value.requires_grad]
    used = [out for out in outputs if out.requires_grad]
    if used:
        sent = cotangents(used)
        mine = torch.autograd.grad(used, wanted, sent, allow_unused=True)
        used = [out for out in expected if out.requires_grad]
        theirs = torch.autograd.grad(used, wanted, sent, allow_unused=True)
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == torch.float32
                assert_same_bits(one, other)


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast_leaves_float64_alone(ambient: torch.dtype, device: torch.device) -> None:
    for op in OPS.values():
        args = op.samples[1].args(device, torch.float64)
        with torch.amp.autocast(device.type, dtype=ambient):
            outputs = tensors(op.call(*args))
        for mine, theirs in zip(outputs, tensors(op.call(*args)), strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_autocast_in_a_compiled_function(op: Op, device: torch.device) -> None:
    args = op.samples[1].args(device, torch.float32)

    def function(*values: Any) -> Any:
        with torch.amp.autocast(device.type, dtype=torch.float16):
            return op.call(*values)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(tensors(compiled(*args)), tensors(function(*args)), strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs, 1e-3)
