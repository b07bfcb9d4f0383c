"""Every op in torch's autograd: subsets, second derivatives, saved tensors, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import OPS
from ops.cases.base import Op
from ops.generic.calls import DIFFERENTIABLE
from support.arguments import tensors, with_grad
from support.comparison import assert_close, assert_same_bits
from support.gradients import gradients
from torch import Tensor
from torch.utils._pytree import tree_map_only


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_a_gradient_for_any_subset_of_the_arguments(op: Op, device: torch.device) -> None:
    sample = next(s for s in op.samples if s.traced and s.args("cpu", torch.float64)[0].numel())
    names = {"compact_tokens": "shuffled", "scatter_tokens": "shuffled",
             "attention_stats": "masked with bias",
             "sparse_attention": "masked with statistics"}  # fmt: skip
    if op.name in names:
        sample = op.sample(names[op.name])
    args = sample.args(device, torch.float64)
    everything = with_grad(args, op.grads)
    _, all_grads = gradients(op.call, everything)
    by_place = dict(
        zip((i for i, a in enumerate(everything) if isinstance(a, Tensor) and a.requires_grad),
            all_grads, strict=True)
    )  # fmt: skip
    assert set(by_place) == set(op.grads)
    for place in op.grads:
        out, (grad,) = gradients(op.call, with_grad(args, (place,)))
        assert grad is not None and by_place[place] is not None
        assert_close(grad, by_place[place], what=f"gradient of argument {place} alone")
    out = op.call(*args)
    assert not any(value.requires_grad for value in tensors(out))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_is_not_differentiable_says_so(op: Op, device: torch.device) -> None:
    args = op.sample(op.samples[0].name).args(device, torch.float32)
    floating = tuple(
        i for i, a in enumerate(args) if any(v.is_floating_point() for v in tensors(a))
    )
    outputs = tensors(op.call(*with_grad(args, floating)))
    if op.grads:
        assert outputs[0].requires_grad and outputs[0].grad_fn is not None
        assert not any(out.requires_grad for out in outputs[2:]), "lse is not differentiable"
    elif op.once_only:
        with pytest.raises(RuntimeError, match=op.once_only):
            outputs[0].sum().backward()
    else:
        assert not any(out.requires_grad for out in outputs)


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if op.twice], ids=lambda op: op.name)
def test_second_derivatives(op: Op, device: torch.device) -> None:
    args = with_grad(op.samples[1].args(device, torch.float64), op.grads)
    leaves = [value for value in tensors(args) if value.requires_grad]

    def second(call: Any) -> list[Tensor]:
        out = call(*args)
        first = torch.autograd.grad((out**3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))

    assert_close(second(op.call), second(op.reference), what="second derivative")


@pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.grads and op.once_only], ids=lambda op: op.name
)
def test_second_derivatives_that_do_not_exist_raise(op: Op, device: torch.device) -> None:
    args = with_grad(op.samples[0].args(device, torch.float64), op.grads)
    leaves = [value for value in tensors(args) if value.requires_grad]
    result = tensors(op.call(*args))[0]
    first = torch.autograd.grad((result**2).sum(), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=op.once_only):
        torch.autograd.grad(sum(g.sum() for g in first if g is not None), leaves)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_changing_a_saved_tensor_before_backward_is_noticed(op: Op) -> None:
    args = with_grad(op.samples[1].args("cpu", torch.float64), op.grads)
    index = [v for v in tensors(args) if v.dtype == torch.int64]
    saved = index[0] if index else args[1]
    leaves = [value for value in tensors(args) if value.requires_grad]
    out = tensors(op.call(*args))[0]
    with torch.no_grad():
        saved.copy_(saved.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_checkpointing_and_saved_tensor_hooks(op: Op, device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    args = with_grad(op.samples[0].args(device, torch.float64), op.grads)
    _, expected = gradients(op.call, args)
    _, again = gradients(lambda *a: checkpoint(op.call, *a, use_reentrant=False), args)
    with torch.autograd.graph.save_on_cpu():
        _, hooked = gradients(op.call, args)
    for mine in (again, hooked):
        for one, other in zip(mine, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_vmap_equals_a_loop(op: Op, device: torch.device) -> None:
    args = op.samples[1].args(device, torch.float64)
    stacked = tree_map_only(Tensor, lambda v: torch.stack([v, v.flip(0), v]), args)
    places = tuple(0 if tensors(a) else None for a in args)
    # torch has no loop for ops that take lists of tensors; their functions have definitions.
    call = op.public if op.public and any(isinstance(a, list) for a in args) else op.call
    actual = tensors(torch.vmap(call, in_dims=places)(*stacked))
    for item in range(3):
        expected = op.call(*tree_map_only(Tensor, lambda v, i=item: v[i], stacked))
        assert_close([out[item] for out in actual], tensors(expected))
