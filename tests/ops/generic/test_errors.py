"""Wrong arguments are refused by functions, ops and fakes alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.cases import OPS, each_error
from ops.cases.base import Bad, Op
from support.arguments import tensors
from support.data import FLOATING
from support.switches import cuda_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only


def _skip_values(bad: Bad, device: torch.device) -> bool:
    """Values are read on the CPU only; elsewhere that would need a synchronisation."""
    return bad.values and cuda_kernels(device)


@pytest.mark.parametrize(("op", "bad"), [p for p in each_error() if p.values[0].public is not None])
def test_public_functions_refuse(op: Op, bad: Bad, device: torch.device) -> None:
    if _skip_values(bad, device):
        op.public(*bad.args(device))
        return
    with pytest.raises(bad.raises) as caught:
        op.public(*bad.args(device))
    assert type(caught.value) is bad.raises
    for word in bad.words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(("op", "bad"), each_error())
def test_ops_refuse(op: Op, bad: Bad, device: torch.device) -> None:
    if bad.op_accepts or _skip_values(bad, device):
        try:
            op.call(*bad.args(device))
        except (RuntimeError, ValueError, TypeError):
            return
        return
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        op.call(*bad.args(device))
    if bad.layouts:
        return
    words = bad.words if bad.op_words is None else bad.op_words
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    ("op", "bad"),
    [
        p
        for p in each_error()
        if not any((p.values[1].values, p.values[1].op_accepts, p.values[1].layouts))
    ],
)
def test_fakes_refuse(op: Op, bad: Bad) -> None:
    args = bad.args("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, args)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            op.call(*fakes)
    if any(value.device.type == "meta" for value in tensors(args)):
        return  # torch refuses to mix devices before the fake can
    # Fakes share the checks of the public functions; op_words are for what the schema refuses.
    for word in bad.words if bad.op_words is None else ():
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def _changed(value: Any) -> Iterator[Any]:
    """What might stand in place of an argument, most of it wrong."""
    if isinstance(value, Tensor):
        kinds = *FLOATING, torch.int32, torch.int64, torch.bool, torch.complex64
        yield from (value.to(kind) for kind in kinds if kind != value.dtype)
        yield value[..., None]
        yield value.sum(0)
        for dim, size in enumerate(value.shape):
            yield from (value.narrow(dim, 0, count) for count in {0, 1, size - 1})
            yield torch.cat([value, value.narrow(dim, 0, 1)], dim)
        yield None
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from {-1, 0, value - 1, value + 1} - {value}
    elif isinstance(value, list):
        yield value[:-1]
        yield [*value, *value[-1:]]
        for i, item in enumerate(value):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in _changed(item))
    elif value is None:
        yield from (True, 0.5, 2, torch.ones(2, 3), torch.ones(2, 2, 6, 6))


def _refusal(op: Op, args: tuple[Any, ...]) -> str | None:
    try:
        op.call(*args)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_fakes_refuse_what_ops_refuse(op: Op) -> None:
    """And nothing else: each argument of some samples changed in many ways, one at a time."""
    seen, refused, accepted = set(), 0, 0
    for sample in op.samples:
        args = sample.args("cpu", torch.float32)
        kinds = tuple(type(value) for value in args)
        if not sample.traced or kinds in seen or not all(t.numel() for t in tensors(args)):
            continue
        seen.add(kinds)
        for place, value in enumerate(args):
            for other in _changed(value):
                changed = (*args[:place], other, *args[place + 1 :])
                real = _refusal(op, changed)
                if real is not None and re.search(r"[\w\]]\[\d+, \d|0 or 1", real):
                    continue  # values, which fakes do not have
                with FakeTensorMode() as mode:
                    fake = _refusal(op, tree_map_only(Tensor, mode.from_tensor, changed))
                words = f"{sample.name}, argument {place}: op said {real}, fake said {fake}"
                assert (real is None) == (fake is None), words
                refused, accepted = refused + (real is not None), accepted + (real is None)
    assert refused > 5 and accepted > 0
