"""Raw ops have no tangents and say so, eager, compiled and under other transforms; never zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from support.arguments import refilled, tensors
from support.comparison import assert_close
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

Call = Callable[..., Any]
Function = Callable[[Tensor], tuple[Tensor, ...]]


def _along(x: Tensor) -> Tensor:
    """A direction that no layer normalisation removes."""
    return x.roll(1, -1) + x.roll(1, 0)


def _dual(function: Function, x: Tensor) -> tuple[Any, ...]:
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(x, _along(x)))
        return tuple(forward_ad.unpack_dual(out).tangent for out in outputs)


def _jvp(function: Function, x: Tensor) -> tuple[Any, ...]:
    return torch.func.jvp(function, (x,), (_along(x),))[1]


def _compiled(function: Call) -> Call:
    return torch.compile(function, backend="aot_eager")


def _compiled_before(function: Function, x: Tensor) -> tuple[Any, ...]:
    """Compiled and called without tangents first."""
    compiled = _compiled(function)
    compiled(x)
    return _dual(compiled, x)


def _no_grad(function: Function, x: Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        return _dual(function, x)


def _many(function: Function, x: Tensor) -> tuple[Any, ...]:
    def along(tangent: Tensor) -> Any:
        return torch.func.jvp(function, (x,), (tangent,))[1]

    return tuple(out[0] for out in torch.vmap(along)(_along(x)[None]))


def _of_many(function: Function, x: Tensor) -> tuple[Any, ...]:
    return tuple(out[0] for out in _jvp(torch.vmap(function), x[None]))


EAGER = {
    "jvp": _jvp,
    "dual numbers": _dual,
    "dual numbers without gradients": _no_grad,
    "vmap of jvp": _many,
    "jvp of vmap": _of_many,
    "jvp of jvp": lambda f, x: _jvp(lambda y: _jvp(f, y), x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](_along(x)),
}
COMPILED = {
    "jvp of compiled": lambda f, x: _jvp(_compiled(f), x),
    "compiled jvp": lambda f, x: _compiled(lambda y: _jvp(f, y))(x),
    "compiled before": _compiled_before,
}


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    """torch leaves a level open where compiling a jvp fails."""
    yield
    while forward_ad._current_level >= 0:
        forward_ad.exit_dual_level()
    eager_transforms.JVP_NESTING = 0


def _cases(all_places: bool = False) -> Any:
    found = []
    for op in OPS.values():
        args = op.samples[0].args("cpu", torch.float64)
        if not any(out.is_floating_point() for out in tensors(op.call(*args))):
            continue  # positions have no tangents
        places = [i for i, value in enumerate(tensors(args)) if value.is_floating_point()]
        for place in places if all_places else places[:1]:
            found.append(pytest.param(op, place, id=f"{op.name}-{place}"))
    return found


def _function(call: Call, args: tuple[Any, ...], place: int) -> tuple[Function, Tensor]:
    """The floating outputs as a function of one tensor among the arguments; and that tensor."""
    values = tensors(args)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors(call(*refilled(args, [*values[:place], x, *values[place + 1 :]])))
        return tuple(out for out in outputs if out.is_floating_point())

    return function, values[place]


def _refuses(op: Op, place: int, how: Call) -> None:
    function, x = _function(op.call, op.samples[0].args("cpu", torch.float64), place)
    words = f"spot::{op.name} does not support forward-mode AD"
    if how is _of_many and isinstance(op.samples[0].args("cpu", torch.float64)[0], list):
        words = f"Batching rule not implemented for spot::{op.name}"  # torch has none for lists
    with pytest.raises(Exception, match=words):
        how(function, x)


@pytest.mark.parametrize(("op", "place"), _cases(all_places=True))
def test_raw_ops_refuse_tangents_of_any_argument(op: Op, place: int) -> None:
    _refuses(op, place, _jvp)
    _refuses(op, place, _dual)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", EAGER.values(), ids=EAGER)
@pytest.mark.parametrize(("op", "place"), _cases())
def test_raw_ops_refuse(op: Op, place: int, how: Call) -> None:
    _refuses(op, place, how)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize(("op", "place"), _cases())
def test_raw_ops_refuse_while_compiling(op: Op, place: int, how: Call) -> None:
    _refuses(op, place, how)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["jvp of compiled", "compiled before"])
@pytest.mark.parametrize(("op", "place"), [c for c in _cases() if c.values[0].public is not None])
def test_functions_compiled_have_the_tangents_of_their_definition(
    op: Op, place: int, how: str
) -> None:
    args = op.samples[0].args("cpu", torch.float64)
    function, x = _function(op.public, args, place)
    defined, _ = _function(op.reference, args, place)
    expected = _dual(defined, x)[:1]
    assert expected[0] is not None and expected[0].any()
    assert_close(COMPILED[how](function, x)[:1], expected)
