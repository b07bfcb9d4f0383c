"""Tensors without the memory that their shape needs: an error that names them, never a crash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from support.arguments import clone, refilled, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import spot_ext

REFUSED = (RuntimeError, ValueError)
# Saved for a gradient that may not be asked for: then nobody reads them.
UNREAD = {"stats", "remapped", "shared"}


def _calls(op: Op) -> Iterator[tuple[Any, ...]]:
    """Arguments of every kind of sample, all of whose tensors have elements."""
    seen = set()
    for sample in op.samples:
        args = sample.args("cpu", torch.float32)
        kinds = tuple(type(value) for value in args)
        if sample.traced and kinds not in seen and all(t.numel() for t in tensors(args)):
            seen.add(kinds)
            yield args


def _names(op: Op, args: tuple[Any, ...]) -> list[str]:
    """The name of the argument that each tensor is in."""
    schema = op.call.default._schema.arguments
    return [schema[i].name for i, value in enumerate(args) for _ in tensors(value)]


def _refusals(op: Op, call: Any, spoil: Any) -> int:
    count = 0
    for args in _calls(op):
        for number, name in enumerate(_names(op, args)):
            fresh = tensors(clone(args))
            fresh[number] = spoil(fresh[number])
            try:
                call(*refilled(args, fresh))
            except REFUSED as error:
                assert name in str(error), f"{name} is not in: {error}"
                assert "memory" in str(error), error
                count += 1
            else:
                assert name in UNREAD and op.name.endswith("_backward"), f"{name} was read"
    return count


def _freed(value: Tensor) -> Tensor:
    value.untyped_storage().resize_(0)
    return value


def _cut_short(value: Tensor) -> Tensor:
    storage = value.untyped_storage()
    storage.resize_(storage.nbytes() - 1)
    return value


def _offset(value: Tensor) -> Tensor:
    """Whose address is not null, since it starts within the storage."""
    whole = torch.cat([value.new_zeros(3), value.reshape(-1)])
    part = whole[3:].view(value.shape)
    whole.untyped_storage().resize_(0)
    return part


SPOIL = [_freed, _cut_short, _offset]


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_memory_that_is_gone_is_refused_by_name(op: Op, spoil: Any) -> None:
    assert _refusals(op, op.call, spoil) > 0


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.public], ids=lambda op: op.name)
def test_public_functions_refuse_freed_memory(op: Op) -> None:
    assert _refusals(op, op.public, _freed) > 0


def test_a_gradient_whose_saved_tensor_was_freed_is_refused() -> None:
    tokens, weights = torch.rand(2, 6, 3, requires_grad=True), torch.rand(2, 5)
    out = spot_ext.fuse_tokens(tokens, weights, torch.tensor([[0, 3], [4, 2]]))
    weights.untyped_storage().resize_(0)
    with pytest.raises(REFUSED, match=r"weights .* storage has 0"):
        out.sum().backward()


def test_elements_that_are_not_needed_may_be_missing() -> None:
    """The last row of a storage that no view reaches."""
    whole = torch.rand(2, 6, 3)
    first = whole[:1]
    whole.untyped_storage().resize_(6 * 3 * 4)
    index = torch.tensor([[0, 3]])
    out = spot_ext.compact_tokens(first, index)
    assert torch.equal(out, first[:, [0, 1, 4]])


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_tensors_without_memory_that_reach_a_kernel_are_refused(op: Op) -> None:
    """Fake, meta and zero tensors, sent past the dispatcher's own handling of them."""
    args = next(_calls(op))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    mode = FakeTensorMode()
    kinds = {
        "fake": mode.from_tensor,
        "meta": lambda value: value.to("meta"),
        "zero": lambda value: torch._efficientzerotensor(value.shape, dtype=value.dtype),
    }
    for kind, make in kinds.items():
        odd = refilled(args, [make(value) for value in tensors(args)])
        with pytest.raises((*REFUSED, NotImplementedError)):
            op.call.default.redispatch(keys, *odd)
            pytest.fail(f"{kind} tensors were read")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_zero_tensors_are_zeros(op: Op) -> None:
    """As they come: the dispatcher gives them memory."""
    args = next(_calls(op))
    values = tensors(args)
    if not values[0].is_floating_point():
        return
    zero = torch._efficientzerotensor(values[0].shape, dtype=values[0].dtype)
    made = [zero, *values[1:]]
    plain = [torch.zeros_like(values[0]), *values[1:]]
    actual, expected = (tensors(op.call(*refilled(args, v))) for v in (made, plain))
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
