"""Drawn calls of an op: legal ones, and the same broken in one place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from ops.cases import OPS
from ops.cases.base import Op
from support.arguments import with_grad
from support.data import FLOATING
from support.layouts import lay_out
from torch import Tensor
from torch.utils._pytree import tree_map_only

_LAYOUTS = (None, None, None, "swapped", "reversed", "stepped", "offset", "padded")


class Call(NamedTuple):
    """A legal call. `grads` are the argument places that ask for a gradient."""

    op: Op
    args: tuple[Any, ...]
    dtype: torch.dtype
    threads: int
    grads: tuple[int, ...]
    kind: str  # of the incoming gradients

    def __repr__(self) -> str:
        return f"{self.op.name}{told(self.args)} with {self.threads} threads"


def told(value: Any) -> str:
    """Arguments in a line: tensors by dtype, shape and strides, and by values if they are few."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(told, value))})"
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return repr(value)
    few = f" {value.tolist()}" if value.numel() <= 12 and value.device.type == "cpu" else ""
    grad = " grad" if value.requires_grad else ""
    return f"{str(value.dtype)[6:]}{list(value.shape)}{list(value.stride())}{grad}{few}"


def strided(value: Tensor, layout: str | None) -> Tensor:
    """The same values with other strides, vectors too."""
    if layout is None:
        return value
    return lay_out(value[None], layout)[0] if value.dim() == 1 else lay_out(value, layout)


def _plant(value: Any, number: float, at: int) -> Any:
    """`value` with one element `number`; of a list of tensors one of them."""
    if isinstance(value, list):
        place = at % len(value)
        return [*value[:place], _plant(value[place], number, at), *value[place + 1 :]]
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point() or not value.numel() or value.dtype.itemsize == 1:
        return value
    value = value.clone(memory_format=torch.contiguous_format)
    value.view(-1)[at % value.numel()] = number
    return value


@st.composite
def calls(draw: Any, name: str) -> Call:
    """Legal calls, of any strides; some hold a number whose effect the contract states."""
    op = OPS[name]
    sample = draw(op.drawn)
    dtype = draw(st.sampled_from(op.drawn_dtypes))
    args = list(sample.args("cpu", dtype))
    planted = bool(op.odd) and draw(st.integers(0, 5)) == 0
    if planted:
        place, at = draw(st.sampled_from(sorted(op.odd))), draw(st.integers(0, 999))
        args[place] = _plant(args[place], draw(st.sampled_from(op.odd[place])), at)
    chosen = tree_map_only(
        Tensor, lambda value: strided(value, draw(st.sampled_from(_LAYOUTS))), tuple(args)
    )
    grads: tuple[int, ...] = ()
    if op.grads and not planted and dtype in FLOATING:
        grads = tuple(draw(st.sets(st.sampled_from(op.grads))))
    kind = draw(st.sampled_from(["random", "expanded", "transposed", "partial"]))
    threads = draw(st.sampled_from([1, 2, 4]))
    return Call(op, with_grad(chosen, grads), dtype, threads, grads, kind)
