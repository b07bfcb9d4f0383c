"""Calls that are broken in one or two places, most of them refused, none of them a crash."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from ops.generic.fuzzed import calls, told
from support.data import FLOATING
from torch import Tensor

_KINDS = (*FLOATING, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool,
          torch.complex64, torch.complex32, torch.float8_e4m3fn)  # fmt: skip
_ANYTHING = (None, True, 0, -1, 2.5, math.nan, "1", b"1", 1j, [], [1.0], {}, object, torch.float32)
# A legal size between a million and 2^46 could be allocated, and would take minutes or all memory.
_INTS = (-1, 0, 1, 7, 1000, 2**47, 2**62, 2**63 - 1, 2**63, 2**70, -(2**31), -(2**63), -(2**70))
_FLOATS = (0.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e308, 1e-320, 2**70)
_WORDS = ("", "none", "relu", "gelu\0", "GELU", "log1p ", "x" * 10_000, "ĝ")


class Broken(NamedTuple):
    """Arguments, and what was done to legal ones."""

    name: str
    args: tuple[Any, ...]
    how: str
    public: bool  # whether the public function is called

    def __repr__(self) -> str:
        return f"{self.name}{told(self.args)}, {self.how}"


def _quantized(value: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(value.detach().float(), 0.1, 0, torch.qint8)


def _nested(value: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([value.detach()])


_LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.detach().to_sparse(),
    "CSR": lambda x: x.detach().to_sparse_csr(),
    "MKL-DNN": lambda x: x.detach().float().to_mkldnn(),
    "quantised": _quantized,
    "nested": _nested,
    "on meta": lambda x: x.detach().to("meta"),
    "negated lazily": lambda x: torch._neg_view(x.detach()),
    "conjugated lazily": lambda x: x.detach().to(torch.complex64).conj(),
    "an array": lambda x: x.detach().float().numpy(),
    "a list": lambda x: x.tolist(),
    "a parameter": lambda x: torch.nn.Parameter(x.detach(), requires_grad=False),
}

_SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "one more dimension": lambda x: x[..., None],
    "one more in front": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "a sum": lambda x: x.sum(0),
    "a number": lambda x: torch.ones((), dtype=x.dtype),
    "transposed": lambda x: x.transpose(0, -1),
    "no images": lambda x: x[:0],
    "nothing": lambda x: x.new_empty(0),
    "twice": lambda x: torch.cat([x, x]),
    "wider": lambda x: torch.cat([x, x[..., :1]], -1),
    "huge": lambda x: x[:1].expand(2**33, *x.shape[1:]),
    "huge at the end": lambda x: x[..., :1].expand(*x.shape[:-1], 2**33),
}


@st.composite
def _changed_tensor(draw: Any, value: Tensor, others: int) -> tuple[Any, str]:
    what = draw(st.sampled_from(["shape", "size", "value", "layout", "dtype", "anything"]))
    if what == "size" and value.dim():
        dim = draw(st.integers(0, value.dim() - 1))
        count = draw(st.integers(0, value.shape[dim]))
        if draw(st.booleans()):
            return value.narrow(dim, 0, count), f"{count} of dimension {dim}"
        return torch.cat([value, value.narrow(dim, 0, count)], dim), f"{count} more in {dim}"
    if what == "value" and value.numel():
        numbers = (0.5, 2.0, math.nan) if value.is_floating_point() else _INTS
        if value.is_complex() or value.dtype.itemsize == 1:
            numbers = (1,)
        limit = 2 ** (8 * value.dtype.itemsize - 1)
        number = draw(st.sampled_from([x for x in numbers if not abs(x) >= limit]))
        if value.dtype in (torch.uint16, torch.uint32, torch.uint64):
            number = 1
        changed = value.detach().clone(memory_format=torch.contiguous_format)
        changed.view(-1)[draw(st.integers(0, value.numel() - 1))] = number
        return changed, f"with {number}"
    if what == "dtype":
        kind = draw(st.sampled_from(_KINDS))
        return value.detach().to(kind), f"of {kind}"
    if what == "anything":
        other = draw(st.sampled_from(_ANYTHING))
        return other, f"{other!r}"
    table = _LAYOUTS if what == "layout" else _SHAPES
    # One tensor alone may be legal at any size, and then takes as long.
    label = draw(st.sampled_from([n for n in table if others > 1 or not n.startswith("huge")]))
    try:
        return table[label](value), label
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return None, f"None, not {label}"


@st.composite
def _changed(draw: Any, value: Any, others: int) -> tuple[Any, str]:
    """What stands in place of an argument, and what it is."""
    if isinstance(value, Tensor):
        return draw(_changed_tensor(value, others))
    if isinstance(value, list) and draw(st.integers(0, 3)):
        if not value or draw(st.integers(0, 3)) == 0:
            longer = draw(st.booleans())
            return [*value, *value[-1:]] if longer else value[
                :-1
            ], "longer" if longer else "shorter"
        at = draw(st.integers(0, len(value) - 1))
        other, how = draw(_changed(value[at], others))
        return [*value[:at], other, *value[at + 1 :]], f"[{at}] {how}"
    if value is None and draw(st.booleans()):
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
        kind = draw(st.sampled_from(_KINDS))
        return torch.ones(shape).to(kind), f"{kind} of {shape}"
    like: tuple[Any, ...] = _ANYTHING
    if isinstance(value, bool):
        like = (not value, 0, 1, 2)
    elif isinstance(value, int):
        like = (value - 1, value + 1, float(value), np.int64(value), torch.tensor(value), *_INTS)
    elif isinstance(value, float):
        like = (*_FLOATS, np.float32(value), torch.tensor(value))
    elif isinstance(value, str):
        like = _WORDS
    other = draw(st.sampled_from(like if draw(st.integers(0, 3)) else _ANYTHING))
    return other, told(other)[:60]


@st.composite
def broken_calls(draw: Any, name: str) -> Broken:
    """A legal call, changed in one or two places, or with an argument too many or too few."""
    call = draw(calls(name))
    args, hows = list(call.args), []
    for place in draw(st.sets(st.integers(-1, len(args) - 1), min_size=1, max_size=2)):
        if place < 0:
            fewer = draw(st.booleans())
            args = args[: draw(st.integers(0, len(args)))] if fewer else [*args, 1]
            hows.append("too few" if fewer else "one too many")
        elif place < len(args):
            others = sum(isinstance(x, Tensor | list) for x in args)
            args[place], how = draw(_changed(args[place], others))
            hows.append(f"argument {place}: {how}")
    # As the tests have it, the public function drops what is too many.
    fits = len(args) <= len(call.args)
    public = call.op.public is not None and fits and draw(st.booleans())
    return Broken(name, tuple(args), "; ".join(hows), public)
