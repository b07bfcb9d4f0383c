"""Gradients of both attention ops: by differences, of each statistic, of the mask."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from ops.attention.drawn import (
    DENSE,
    SPARSE,
    Attention,
    by_attention,
    by_options,
    case_of,
    op_values,
)
from ops.cases import OPS
from support.arguments import to_dtype
from support.attention import NAMES, with_leaves
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, random
from support.slow import most_slow
from torch import Tensor
from torch.autograd import gradcheck

from spot_ext.sparse_attention import named_keys

_EDGES = {
    DENSE: [  # panels of 16 columns, of 8 channels
        case_of(count=15, dim=3, batch=1, bias="one"),
        case_of(count=15, dim=9, masked=True, class_token=False),
        case_of(count=16, dim=5, masked=True),
        case_of(count=16, dim=7, num_prefix=0, masked=True, bias="each", batch=1),
        case_of(count=16, dim=2, num_prefix=16, bias="one", masked=True),
        case_of(count=17, dim=9, num_prefix=2, masked=True, bias="one"),
        case_of(count=17, dim=17, num_prefix=1, class_token=False),
        case_of(count=17, dim=3, num_prefix=16, masked=True, batch=3),
        case_of(count=33, dim=7, num_prefix=0, bias="each", batch=1),
        case_of(count=33, dim=13, num_prefix=2, masked=True, scale=0.9),
        case_of(count=65, dim=1, masked=True, bias="one", heads=1, scale=-0.7),
        case_of(count=65, dim=19, num_prefix=2, class_token=False, masked=True, heads=1),
        case_of(count=66, dim=6, num_prefix=1, heads=1, batch=1),
    ],
    SPARSE: [
        *(case_of(count=9, named=named, dim=3, batch=1, heads=1, order=order, masked=masked)
          for named, order, masked in ((1, "ascending", False), (4, "shuffled", True),
                                       (9, "ascending", True), (5, "padded", True),
                                       (0, "padded", False))),
        case_of(count=12, named=5, dim=5, num_prefix=0, batch=1, order="padded", masked=True),
        case_of(count=12, named=7, dim=2, num_prefix=3, class_token=False, masked=True),
        case_of(count=17, named=4, dim=9, batch=1, scale=-0.7),
        case_of(count=33, named=17, dim=4, heads=1, batch=1, masked=True, num_prefix=2),
        case_of(count=20, named=16, dim=17, heads=1, masked=True, order="shuffled"),
        case_of(count=1, named=1, dim=3), case_of(count=3, named=2, num_prefix=3),
    ],
}  # fmt: skip


def _edge(attention: Attention, case: dict[str, Any]) -> Any:
    own = ("named", "dim") if attention is SPARSE else ("dim", "num_prefix", "masked")
    words = attention.name, *(case[x] for x in ("count", *own))
    return pytest.param(attention, case, id="-".join(map(str, words)))


def _of_size_one(stats: Tensor, count: int) -> Tensor:
    """Scaled as features are, so that no tolerance swallows the gradients of the variances."""
    n = max(count, 1)
    return stats * torch.tensor([n, n, n, n * n, n, n * n], device=stats.device)


def test_enough_shapes_are_checked() -> None:
    assert all(len(edges) >= 12 for edges in _EDGES.values())


@pytest.mark.parametrize("need_stats", most_slow([True, False]))
@pytest.mark.parametrize(
    ("attention", "case"), [_edge(a, case) for a, edges in _EDGES.items() for case in edges]
)
def test_gradcheck_at_edges(
    attention: Attention, case: dict[str, Any], need_stats: bool, device: torch.device
) -> None:
    values = attention.build(case, torch.float64, device)
    names = [name for name in ("q", "k", "v", "bias") if values.get(name) is not None]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        filled = values | dict(zip(names, leaves, strict=True))
        out, stats = attention.function(**filled, need_stats=need_stats)
        if not need_stats:
            return (out,)
        return out, _of_size_one(stats, case["count"] - case["num_prefix"])

    leaves = [values[name].clone().requires_grad_() for name in names]
    whole = sum(leaf.numel() for leaf in leaves) < 400
    assert gradcheck(function, leaves, check_undefined_grad=False, fast_mode=not whole)


@by_attention
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("column", range(6), ids=NAMES)
def test_the_gradient_of_each_statistic_alone(
    column: int, masked: bool, dtype: torch.dtype, attention: Attention, device: torch.device
) -> None:
    """Together, those of the means hide those of the variances, which are smaller by 1/n."""
    case = case_of(count=71, masked=masked, num_prefix=2, bias="each", named=20)
    values = attention.build(case, dtype, device)
    weight = random("weight", (2, 71, 2), torch.float64, device)
    names = ("q", "k", "bias") if attention is DENSE else ("q", "k")
    results = []
    for function, arguments in (
        (attention.function, values),
        (attention.reference, to_dtype(values, torch.float64)),
    ):
        call, leaves = with_leaves(arguments, *names)
        stats = _of_size_one(function(**call, need_stats=True)[1], 69)[..., column]
        results.append(torch.autograd.grad((stats * weight.to(stats.dtype)).sum(), leaves))
    for name, actual, exact in zip(names, *results, strict=True):
        error = ((actual.double() - exact).norm() / exact.norm()).item()
        limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
        assert exact.norm() > 0.1 and error < limit, f"{name}: relative error {error:.1e}"


@by_attention
def test_without_statistics_out_and_gradients_are_the_same(
    attention: Attention, device: torch.device
) -> None:
    results = []
    for need in (True, False):
        values = attention.build(case_of(masked=True), torch.float64, device)
        call, leaves = with_leaves(values, "q", "k", "v", "keep")
        out, stats = attention.function(**call, need_stats=need)
        assert (stats.numel() > 0) == need and stats.dtype == torch.float64
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    assert_close(results[0], results[1], 1e-14)


@pytest.mark.parametrize(
    ("attention", "output", "name"),
    [
        *((DENSE, 0, name) for name in ("q", "k", "v", "keep", "bias")),
        *((DENSE, 1, name) for name in ("q", "k", "bias")),
        *((SPARSE, 0, name) for name in ("q", "k", "v", "keep")),
        *((SPARSE, 1, name) for name in ("q", "k")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_there_are_no_second_derivatives(
    attention: Attention, output: int, name: str, device: torch.device
) -> None:
    values = attention.build(case_of(masked=True, bias="one"), torch.float64, device)
    call, (leaf,) = with_leaves(values, name)
    loss = attention(call)[output].square().sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert first.any()
    words = f"{attention.name} is differentiable once.*{attention.name}_reference"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(first.sum(), leaf)


@by_attention
def test_the_backward_op_gives_what_is_asked_for(
    attention: Attention, device: torch.device
) -> None:
    backward = OPS[f"{attention.name}_backward"].call
    values = op_values(f"{attention.name}_backward", torch.float32, device)
    everything = backward(*values.values())
    assert all(grad.any() and grad.dtype == torch.float32 for grad in everything)
    flags = [name for name in values if name.endswith("_grad")]
    for asked in itertools.product((False, True), repeat=len(flags)):
        grads = backward(*(values | dict(zip(flags, asked, strict=True))).values())
        for grad, whole, wanted in zip(grads, everything, (True,) * 3 + asked, strict=True):
            if wanted:
                assert_close(grad, whole, 1e-6)
            else:
                assert grad.numel() == 0
    # Without grad_stats the statistics are not read: a forward pass without them left none.
    empty = {"grad_stats": None, "stats": values["stats"].new_empty(0)}
    expected = backward(*(values | {"grad_stats": None}).values())
    for grad, other in zip(backward(*(values | empty).values()), expected, strict=True):
        assert_same_bits(grad, other)


# ---- the mask ------------------------------------------------------------------------------------


def _mask_gradient(values: dict[str, Any], cotangent: Tensor) -> Tensor:
    """sum over named i, j with i != j and heads of p'_ij cotangent_i (v_j - out_i)."""
    q, k, v, grad = (x.double().transpose(1, 2) for x in (*(values[n] for n in "qkv"), cotangent))
    prefix, count = values["num_prefix"], q.shape[2]
    scale = q.shape[3] ** -0.5 if values["scale"] is None else values["scale"]
    logits = scale * (q @ k.mT)
    if values.get("bias") is not None:
        logits = logits + values["bias"].double()
    dropped = torch.nn.functional.pad(values["keep"].double(), (prefix, 0), value=1.0) == 0
    others = ~torch.eye(count, dtype=torch.bool, device=q.device)
    named = torch.ones_like(others)
    if "index" in values:
        named = named_keys(values["index"], count)
    seen = named & ~(dropped[:, None, None] & others)
    lse = logits.masked_fill(~seen, -math.inf).logsumexp(-1, keepdim=True)
    p = torch.where(seen, torch.exp(logits - lse), 0.0)
    soft = torch.where(seen, p, 1 / (1 + torch.exp(lse - logits))) * (named & others)
    pull = grad @ v.mT - (grad * (p @ v)).sum(-1, keepdim=True)  # [B, H, N, N]
    return (soft * pull).sum((1, 2))[:, prefix:]


@by_options(
    [{"bias": bias} for bias in (None, "one", "each")],
    [{"order": order} for order in ("ascending", "padded")],
)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("num_prefix", "count"), [(0, 64), (1, 70), (2, 131)])
def test_the_mask_gradient_is_the_stated_one(
    num_prefix: int,
    count: int,
    dtype: torch.dtype,
    attention: Attention,
    own: dict[str, Any],
    device: torch.device,
) -> None:
    case = case_of(count=count, named=count // 3, num_prefix=num_prefix, masked=True, heads=3,
                   dim=20, scale=0.5, **own)  # fmt: skip
    values = attention.build(case, dtype, device)
    cotangent = random("cotangent", (2, count, 3, 20), dtype, device)
    truth = _mask_gradient(values, cotangent)
    call, (keep,) = with_leaves(values, "keep")
    (grad,) = torch.autograd.grad(attention.function(**call)[0], keep, cotangent)
    assert grad.dtype == dtype
    error = (grad.double() - truth).abs().max().item() / truth.abs().max().item()
    limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3}.get(dtype, 1.5e-2)
    assert error < limit, f"relative error {error:.1e}"
    kept = values["keep"] == 1
    assert truth[kept].abs().mean() > 1e-2 and truth[~kept].abs().mean() > 1e-2


@by_attention
def test_the_mask_gradient_is_bounded(attention: Attention, device: torch.device) -> None:
    """Where the exact derivative of a dropped key is beyond any float."""
    values = attention.build(case_of(count=20, named=8, masked=True), torch.float32, device)
    for spread in (1.0, 1e2, 1e4):
        changed = values | {name: values[name] * spread for name in "qk"}
        call, (keep,) = with_leaves(changed, "keep")
        (grad,) = torch.autograd.grad(attention.function(**call)[0].sum(), keep)
        bound = 20 * 2 * 8 * 2 * values["v"].abs().max().item()  # rows, heads, channels, |v - out|
        assert grad.isfinite().all() and grad.any() and grad.abs().max().item() <= bound


@by_attention
def test_statistics_treat_the_mask_as_a_constant(
    attention: Attention, device: torch.device
) -> None:
    values = attention.build(case_of(masked=True), torch.float64, device)
    call, leaves = with_leaves(values, "q", "keep")
    stats = attention(call)[1]
    q_grad, keep_grad = torch.autograd.grad(stats.sum(), leaves, allow_unused=True)
    assert q_grad.any() and (keep_grad is None or not keep_grad.any())


@by_attention
def test_the_mask_gradient_leaves_the_others_alone(
    attention: Attention, device: torch.device
) -> None:
    """Asking for the gradient of the mask changes neither values nor other gradients."""
    results = []
    for names in (("q", "k", "v"), ("q", "k", "v", "keep")):
        values = attention.build(case_of(masked=True), torch.float64, device)
        call, leaves = with_leaves(values, *names)
        out, stats = attention(call)
        grads = torch.autograd.grad(out.sin().sum() + stats.square().sum(), leaves)
        results.append([out.detach(), stats.detach(), *grads[:3]])
    assert_close(results[0], results[1], 1e-14)


@by_attention
@pytest.mark.parametrize("kind", FLOATING)
def test_the_mask_may_have_another_dtype(
    kind: torch.dtype, attention: Attention, device: torch.device
) -> None:
    values = attention.build(case_of(masked=True), torch.float32, device)
    keep = values["keep"].to(kind).requires_grad_()
    out, stats = attention(values | {"keep": keep})
    expected = attention(values)
    assert_same_bits(out, expected[0])
    assert_same_bits(stats, expected[1])
    out.sum().backward()
    assert keep.grad.dtype == kind and keep.grad.any()
