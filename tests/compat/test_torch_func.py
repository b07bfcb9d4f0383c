"""torch.func on the ops: gradients by the kernels, every other transform by the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.cases import OPS, each_sample
from ops.cases.base import Op, Sample
from support.arguments import tensors, with_grad
from support.chosen import ops_held, ops_run
from support.comparison import assert_close
from support.gradients import cotangents
from support.slow import most_slow
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_map_only

import spot_ext

Call = Callable[..., Any]
FULL = {  # samples with every argument that has a gradient, or several rows
    "attention_stats": "masked with bias", "sparse_attention": "masked with statistics",
    "compact_tokens": "shuffled", "scatter_tokens": "shuffled", "select_tokens": "(2, 9, 4)",
}  # fmt: skip


def _sample(op: Op) -> Sample:
    return op.sample(FULL[op.name]) if op.name in FULL else op.samples[0]


def _places(op: Op, args: tuple[Any, ...]) -> list[int]:
    return [i for i in op.grads if i < len(args) and isinstance(args[i], Tensor)]


def _of(call: Call, args: tuple[Any, ...], place: int) -> Call:
    """The floating outputs of `call`, as a function of one argument."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors(call(*args[:place], x, *args[place + 1 :]))
        return tuple(out for out in outputs if out.is_floating_point() and out.dim() > 1)

    return function


def _loss(function: Call, number: int = 2) -> Callable[[Tensor], Tensor]:
    """A sum over the first outputs; the others of a raw op have no gradient."""

    def loss(x: Tensor) -> Tensor:
        return torch.stack([(out**2).sum() + out.sum() for out in function(x)[:number]]).sum()

    return loss


def _autograd(loss: Call, x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def _each(kind: str) -> Any:
    """(op, call, place): public functions, raw ops, or both, at each argument with a gradient.

    Of `first`, which is the public functions, all but an op's first argument with `-m slow`.
    """
    found: list[Any] = []
    for op in OPS.values():
        mine: list[Any] = []
        for place in _places(op, _sample(op).args("cpu", torch.float64)):
            if op.public is not None:
                mine.append(pytest.param(op, op.public, place, id=f"{op.name}-{place}"))
            if kind == "both":
                mine.append(pytest.param(op, op.call, place, id=f"raw-{op.name}-{place}"))
        found += most_slow(mine) if kind == "first" else mine
    return pytest.mark.parametrize(("op", "call", "place"), found)


# ---- what the kernels serve ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "sample"), [p for p in each_sample(traced=True) if p.values[0].grads]
)
def test_grad_of_every_sample(op: Op, sample: Sample, device: torch.device) -> None:
    args = sample.args(device, torch.float64)
    for place in _places(op, args):
        loss = _loss(_of(op.call, args, place), 1)
        assert_close(grad(loss)(args[place]), _autograd(loss, args[place]))


@_each("both")
def test_grad_by_the_kernel(op: Op, call: Call, place: int, device: torch.device) -> None:
    args = _sample(op).args(device, torch.float64)
    loss = _loss(_of(call, args, place))
    assert ops_run(lambda: grad(loss)(args[place]))[0] == op.name
    actual = grad(loss)(args[place])
    assert actual.any()
    assert_close(actual, _autograd(loss, args[place]))


@_each("both")
def test_vjp_after_its_block(op: Op, call: Call, place: int, device: torch.device) -> None:
    args = _sample(op).args(device, torch.float64)
    function = _of(call, args, place)
    outputs, pull = vjp(lambda x: function(x)[0], args[place])
    (sent,) = cotangents(outputs)
    leaf = args[place].detach().clone().requires_grad_()
    expected = torch.autograd.grad(function(leaf)[0], leaf, sent)
    assert_close(pull(sent), expected)
    assert_close(torch.func.vjp(lambda x: function(x)[0], args[place])[0], outputs)


@_each("both")
def test_jacrev(op: Op, call: Call, place: int, device: torch.device) -> None:
    args = _sample(op).args(device, torch.float64)
    function = _of(call, args, place)

    def first(x: Tensor) -> Tensor:
        return function(x)[0]

    expected = torch.autograd.functional.jacobian(first, args[place])
    assert_close(jacrev(first, chunk_size=1)(args[place]), expected)
    assert op.name in ops_run(lambda: jacrev(first, chunk_size=1)(args[place]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@_each("public")
def test_jacrev_of_many_rows_at_once(op: Op, call: Call, place: int, device: torch.device) -> None:
    """The backward op has no batching rule, so torch calls it in a loop."""
    args = _sample(op).args(device, torch.float64)
    function = _of(call, args, place)
    expected = torch.autograd.functional.jacobian(function, args[place])
    assert_close(jacrev(function)(args[place]), expected)


@_each("both")
def test_grad_inside_autograd(op: Op, call: Call, place: int, device: torch.device) -> None:
    """A tensor of the surrounding graph gets its gradient as well."""
    args = _sample(op).args(device, torch.float64)
    outer = torch.tensor(1.0, dtype=torch.float64, device=device, requires_grad=True)
    if not op.twice:
        with pytest.raises(RuntimeError, match="differentiable once"):
            inner = grad(lambda x: _loss(_of(call, args, place))(x * outer))(args[place])
            torch.autograd.grad(inner.sum(), outer)
        return
    inner = grad(lambda x: _loss(_of(call, args, place))(x * outer))(args[place])
    (actual,) = torch.autograd.grad(inner.sum(), outer)
    leaf = args[place].detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(
        _loss(_of(call, args, place))(leaf * outer), leaf, create_graph=True
    )
    assert_close(actual, torch.autograd.grad(first.sum(), outer)[0])


@pytest.mark.usefixtures("fresh_compiler")
@_each("public")
def test_compiled_grad(op: Op, call: Call, place: int) -> None:
    args = _sample(op).args("cpu", torch.float64)
    loss, graphs = _loss(_of(call, args, place)), EagerAndRecordGraphs()
    compiled = torch.compile(lambda x: grad(loss)(x), fullgraph=True, backend=graphs)
    assert_close(compiled(args[place]), grad(loss)(args[place]))
    assert ops_held(graphs.graphs[0].graph) == [op.name]


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.public], ids=lambda op: op.name)
def test_functionalize_leaves_the_kernel(op: Op) -> None:
    args = _sample(op).args("cpu", torch.float64)
    assert ops_run(lambda: torch.func.functionalize(op.public)(*args)) == [op.name]


# ---- what the definitions serve, by themselves ---------------------------------------------------


def _stacked(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    stacked = tree_map_only(Tensor, lambda t: torch.stack([t, t.flip(0)]), args)
    return stacked, tuple(0 if tensors(a) else None for a in args)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.public], ids=lambda op: op.name)
def test_vmap_of_every_function(op: Op, device: torch.device) -> None:
    args, places = _stacked(_sample(op).args(device, torch.float64))

    def call(*values: Any) -> tuple[Tensor, ...]:
        return tuple(tensors(op.public(*values)))

    assert ops_run(lambda: vmap(call, in_dims=places)(*args)) == []
    actual = vmap(call, in_dims=places)(*args)
    for item in range(2):
        one = tree_map_only(Tensor, lambda t, i=item: t[i], args)
        assert_close([out[item] for out in actual], call(*one))


@_each("public")
def test_vmap_of_grad(op: Op, call: Call, place: int, device: torch.device) -> None:
    args, places = _stacked(_sample(op).args(device, torch.float64))

    def one(*values: Any) -> Tensor:
        return grad(_loss(_of(call, values, place)))(values[place])

    def loss(*values: Any) -> Tensor:
        return _loss(_of(call, values, place))(values[place])

    assert ops_run(lambda: vmap(one, in_dims=places)(*args)) == []
    actual = vmap(one, in_dims=places)(*args)
    swapped = grad(lambda x: vmap(loss, in_dims=places)(*args[:place], x, *args[place + 1 :]).sum())
    assert actual.any()
    for item in range(2):
        values = tree_map_only(Tensor, lambda t, i=item: t[i], args)
        expected = _autograd(_loss(_of(call, values, place)), values[place])
        assert_close(actual[item], expected)
        assert_close(swapped(args[place])[item], expected)


@_each("public")
def test_forward_mode(op: Op, call: Call, place: int, device: torch.device) -> None:
    args = _sample(op).args(device, torch.float64)
    function, x = _of(call, args, place), args[place]
    (tangent,) = cotangents(x)
    full = torch.autograd.functional.jacobian(function, x)
    expected = [(j.flatten(-x.dim()) @ tangent.flatten()) for j in full]
    assert ops_run(lambda: jvp(function, (x,), (tangent,))) == []
    assert_close(jvp(function, (x,), (tangent,))[1], expected)
    assert_close(jacfwd(function)(x), full)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, tangent))
        found = [forward_ad.unpack_dual(out).tangent for out in dual]
    assert any(tangent is not None for tangent in found)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(torch.zeros_like(theirs) if mine is None else mine, theirs)


@_each("public")
def test_second_derivatives(op: Op, call: Call, place: int, device: torch.device) -> None:
    args = _sample(op).args(device, torch.float64)
    loss, x = _loss(_of(call, args, place)), args[place]

    def squared(x: Tensor) -> Tensor:
        return (grad(loss)(x) ** 2).sum()

    actual = grad(squared)(x)
    leaf = x.detach().clone().requires_grad_()
    with spot_ext.definitions():
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        expected = torch.autograd.grad((first**2).sum(), leaf)[0]
    assert_close(actual, expected)
    full = hessian(loss)(x).reshape(x.numel(), x.numel())
    assert_close(2 * full @ first.detach().flatten(), expected.flatten())


@pytest.mark.usefixtures("fresh_compiler")
@_each("first")
def test_compiled_transforms(op: Op, call: Call, place: int) -> None:
    args = _sample(op).args("cpu", torch.float64)
    loss, x = _loss(_of(call, args, place)), args[place]

    def check(function: Call, value: Tensor) -> None:
        graphs = EagerAndRecordGraphs()
        compiled = torch.compile(lambda x: function(x), fullgraph=True, backend=graphs)
        assert_close(compiled(value), function(value))
        assert [ops_held(graph.graph) for graph in graphs.graphs] == [[]]

    check(vmap(grad(loss)), x[None])
    check(grad(lambda x: (grad(loss)(x) ** 2).sum()), x)
    if op.name != "token_relevance":  # compiled, torch has no jvp of its layer normalisation
        check(lambda x: jvp(loss, (x,), (x,))[1], x)
    plain = torch.compile(loss, backend="aot_eager")
    assert_close(plain(x), loss(x))  # with the kernel; then with tangents
    expected = jvp(loss, (x,), (x,))[1]
    with forward_ad.dual_level():
        dual = plain(forward_ad.make_dual(x.clone(), x.clone()))
        assert_close(forward_ad.unpack_dual(dual).tangent, expected)


GRADGRAD = {  # arguments whose formula is the derivative: not `keep`, whose gradient is a choice
    "attention_stats": (0, 1, 2, 4), "sparse_attention": (0, 1, 2), "compact_tokens": (0, 3),
    "scatter_tokens": (0, 4), "fuse_tokens": (0, 1), "token_relevance": tuple(range(13)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADGRAD)
def test_double_backward_of_definitions(name: str) -> None:
    op = OPS[name]
    assert set(op.grads) - set(GRADGRAD[name]) <= {3, 4}
    args = with_grad(_sample(op).args("cpu", torch.float64), GRADGRAD[name])
    places = [i for i in GRADGRAD[name] if isinstance(args[i], Tensor)]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(args)
        for place, value in zip(places, values, strict=True):
            full[place] = value
        return tuple(tensors(op.public(*full)))

    with spot_ext.definitions():
        assert torch.autograd.gradgradcheck(
            call, [args[i] for i in places], fast_mode=True, atol=1e-6
        )


# ---- the gradient of a training mask -------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention_stats", "sparse_attention"])
def test_the_bounded_gradient_of_keep(name: str, device: torch.device) -> None:
    """It is what the kernel gives, in every transform, though transforms hide who asks for it."""
    op = OPS[name]
    args = _sample(op).args(device, torch.float64)
    place = {"attention_stats": 3, "sparse_attention": 4}[name]
    assert 0 < args[place].mean() < 1, "both kinds of tokens"

    def out(keep: Tensor) -> Tensor:
        return op.public(*args[:place], keep, *args[place + 1 :])[0]

    leaf = args[place].clone().requires_grad_()
    (sent,) = cotangents(out(leaf))
    (expected,) = torch.autograd.grad(out(leaf), leaf, sent)
    assert expected.any()

    def loss(keep: Tensor) -> Tensor:
        return (out(keep) * sent).sum()

    assert_close(grad(loss)(args[place]), expected)
    assert_close(jacfwd(loss)(args[place]), expected)
    assert_close(vmap(grad(loss))(args[place][None])[0], expected)
    per_copy = grad(lambda keep: vmap(loss)(keep).sum())(args[place][None])
    assert_close(per_copy[0], expected)
    with spot_ext.definitions():
        assert_close(grad(loss)(args[place]), expected)
        assert_close(torch.autograd.grad(loss(leaf), leaf)[0], expected)


# ---- what raw ops refuse -------------------------------------------------------------------------


@_each("both")
def test_raw_ops_refuse_forward_mode(op: Op, call: Call, place: int, device: torch.device) -> None:
    args = _sample(op).args(device, torch.float64)
    function, x = _of(op.call, args, place), args[place]
    with pytest.raises(RuntimeError, match=f"spot::{op.name} does not support forward-mode AD"):
        jvp(function, (x,), (torch.ones_like(x),))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=f"spot::{op.name} does not support forward-mode AD"),
    ):
        function(forward_ad.make_dual(x.clone(), torch.ones_like(x)))


def test_forward_over_reverse_of_a_kernel_is_refused() -> None:
    """The gradient was traced by the kernel: its op has no tangents, and says so."""
    args = OPS["fuse_tokens"].samples[0].args("cpu", torch.float64)
    out, pull = vjp(lambda x: spot_ext.fuse_tokens(x, *args[1:]), args[0])
    with pytest.raises(RuntimeError, match="spot::fuse_tokens_backward does not support forward"):
        jvp(pull, (out,), (out,))
