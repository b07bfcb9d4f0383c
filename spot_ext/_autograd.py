"""The autograd kernel of an op: what `torch.library.register_autograd` makes, for torch.func too.

torch's own kernel applies an autograd.Function, which asks the dispatcher for transforms again and
finds none. This one is recorded at one level of transforms, as ATen's kernels are, and calls the op
for the levels below.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset as _BELOW
from torch._C import _any_requires_grad
from torch._C import _are_functorch_transforms_active as _transforms
from torch._C import _AutoDispatchBelowAutograd as _below_autograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def kernel(
    op: torch._ops.OpOverload, formula: Callable[..., Any], setup: Callable[..., None] | None
) -> Callable[..., Any]:
    """The kernel of `op`, called with the set of dispatch keys and the arguments given.

    `setup(ctx, inputs, output)` saves what `formula(ctx, *grads)` needs; `inputs` and
    `ctx.needs_input_grad` have a place for every argument, omitted ones included. In the latter,
    and in what `formula` returns, a list of tensors has a place for each of them.
    """
    defaults = tuple(argument.default_value for argument in op._schema.arguments)
    lists = tuple(
        place
        for place, argument in enumerate(op._schema.arguments)
        if str(argument.type) == "List[Tensor]"
    )

    def forward(ctx: Any, *given: Any) -> Any:
        *flat, lengths, keys = given
        args = _gathered(flat, lengths)
        with _levels_below() if _transforms() else nullcontext(), _below_autograd():
            output = op.redispatch(keys & _BELOW, *args)
        if setup is not None:
            setup(ctx, tuple(args), output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *formula(ctx, *grads), None, None

    name = f"GeneratedBackwardFor_{op._namespace}_{op._opname}_{op._overloadname}"
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (_SingleLevelFunction,), methods)

    def call(keys: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, _spread(args, lists)[0])
        if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            with _below_autograd():
                return op.redispatch(keys & _BELOW, *args)
        flat, lengths = _spread(args + defaults[len(args) :], lists)
        if _transforms():
            with enable_single_level_autograd_function():
                return function.apply(*flat, lengths, keys)
        return function.apply(*flat, lengths, keys)

    return call


def _spread(args: tuple[Any, ...], lists: tuple[int, ...]) -> tuple[tuple[Any, ...], Any]:
    """Arguments with those at `lists` laid open, where autograd sees tensors; and their lengths."""
    if not lists:
        return args, {}
    flat = [item for i, value in enumerate(args) for item in (value if i in lists else (value,))]
    return tuple(flat), {i: len(args[i]) for i in lists}


def _gathered(flat: list[Any], lengths: dict[int, int]) -> list[Any]:
    """The arguments again."""
    if not lengths:
        return flat
    args: list[Any] = []
    at = 0
    while at < len(flat) or len(args) in lengths:
        length = lengths.get(len(args))
        args.append(flat[at] if length is None else flat[at : at + length])
        at += 1 if length is None else length
    return args


@contextmanager
def _levels_below() -> Any:
    """Gradients of the levels below, which an autograd.Function switches off in its forward."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _refuse_tangents(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    """Refuses forward-mode AD, which would give zero tangents without a word."""
    for value in args:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{op._schema.name} does not support forward-mode AD; the functions of spot_ext "
                "do, by their definitions. For derivatives of a gradient enter "
                "`with spot_ext.definitions():` before the forward pass"
            )
