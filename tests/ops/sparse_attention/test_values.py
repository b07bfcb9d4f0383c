"""sparse_attention for every number of keys, and what it must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.attention.drawn import SPARSE, case_of
from ops.cases.sparse_attention import sparse_reference
from support.arguments import to_dtype
from support.attention import with_leaves
from support.comparison import assert_accurate, assert_close, assert_gradient, assert_same_bits
from support.data import FLOATING, generator, random
from support.gradients import cotangents, gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spot_ext import attention_stats, connectivity, sparse_attention
from spot_ext.sparse_attention import named_keys


@pytest.mark.parametrize("order", ["ascending", "padded"])
@pytest.mark.parametrize("first", range(0, 70, 10))
def test_every_number_of_keys(first: int, order: str, device: torch.device) -> None:
    for named in range(first, first + 10):
        case = case_of(
            count=80, named=named, masked=named % 3 == 0, order=order, dim=12, seed=named
        )
        SPARSE.assert_as_accurate_as_torch(
            SPARSE.build(case, torch.float32, device), named % 2 == 0
        )


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("named", [1, 100, 300])
def test_few_heads_with_many_queries(named: int, dtype: torch.dtype, device: torch.device) -> None:
    """More rows and entries than a kernel takes at once."""
    case = case_of(batch=1, count=600, heads=1, dim=20, named=named, num_prefix=2, masked=True)
    SPARSE.assert_as_accurate_as_torch(SPARSE.build(case, dtype, device))


def test_defaults(device: torch.device) -> None:
    values = SPARSE.build(case_of(), torch.float64, device)
    args = [values[name] for name in ("q", "k", "v", "index")]
    default = sparse_attention(*args)
    explicit = sparse_attention(*args, None, scale=8**-0.5, num_prefix=1, class_token=True,
                                need_stats=False)  # fmt: skip
    for one, other in zip(default, explicit, strict=True):
        assert_same_bits(one, other)
    assert default[1].numel() == 0
    stats = sparse_attention(*args, need_stats=True)[1]
    none = sparse_attention(*args, class_token=False, need_stats=True)[1]
    assert stats[:, 1:, :, :2].any() and not none[..., :2].any()
    assert_same_bits(none[..., 2:], stats[..., 2:])


def test_lse_is_that_of_the_keys_seen(device: torch.device) -> None:
    values = SPARSE.build(case_of(masked=True, order="padded", count=30), torch.float64, device)
    args = [values[x] for x in ("q", "k", "v", "index", "keep", "scale", "num_prefix")]
    args[0].requires_grad_()
    out, _, lse = torch.ops.spot.sparse_attention(*args)
    assert out.requires_grad and not lse.requires_grad
    expected = sparse_reference(*args)[2]
    assert torch.equal(lse == -math.inf, expected == -math.inf) and (lse == -math.inf).any()
    assert_close(lse, expected)


def test_flops_grow_with_the_keys_named(device: torch.device) -> None:
    """METHOD B5: two products of (n-1) k D multiply-accumulates, and a dense row for the class."""

    def count(named: int, call: Callable[..., Any] = sparse_attention) -> int:
        values = SPARSE.build(
            case_of(count=197, named=named, heads=6, dim=64, batch=1), torch.float32, device
        )
        with FlopCounterMode(display=False) as counter:
            call(**values)
        return counter.get_total_flops()

    assert count(50) == 2 * 2 * (196 * 50 + 197) * 384
    assert count(100) - count(50) == 2 * 2 * 196 * 50 * 384


# ---- what it must agree with ---------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, index: Tensor, **options: Any) -> Tensor:
    """Torch's attention with the boolean map of `index` as its mask."""
    allowed = named_keys(index, q.shape[1])
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(*heads_first, attn_mask=allowed, **options).transpose(1, 2)


def predicted(count: int, share: float, device: Any, batch: int = 2, heads: int = 3) -> Tensor:
    """An index as connectivity gives it: the best of a random low-rank map."""
    coefficients = random(f"c {count}", (batch, heads, count - 1, 16), torch.float32, device)
    basis = random(f"b {count}", (16, count), torch.float32, device).abs()
    return connectivity(coefficients.softmax(-1), basis, math.ceil(share * count), coef_topk=8)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("count", "share"), [(50, 0.25), (197, 0.25), (197, 0.9), (65, 0.05)])
def test_it_is_masked_scaled_dot_product_attention(
    count: int, share: float, scale: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Output and gradients, as views of a fused projection, by the error rule."""
    index = predicted(count, share, device)
    packed = random(f"qkv {count}", (2, count, 3, 3, 64), dtype, device)

    def run(function: Any, packed: Tensor) -> tuple[Tensor, Tensor]:
        leaf = packed.detach().requires_grad_()
        out = function(*leaf.unbind(2), index, scale=scale)
        out = out[0] if isinstance(out, tuple) else out
        (grad,) = torch.autograd.grad(out, leaf, cotangents((out.detach(),)))
        return out.detach(), grad

    actual, grad = run(sparse_attention, packed)
    plain, plain_grad = run(sdpa, packed)
    exact, exact_grad = run(sdpa, packed.double())
    if dtype == torch.float64:
        plain, plain_grad = exact, exact_grad
    assert_accurate(actual, plain, exact, what="out")
    for place, name in enumerate("qkv"):
        parts = (x[:, :, place].contiguous() for x in (grad, plain_grad, exact_grad))
        assert_gradient(*parts, what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
@pytest.mark.parametrize(("count", "num_prefix"), [(41, 1), (70, 0), (33, 5)])
def test_naming_all_keys_is_dense_attention(
    count: int, num_prefix: int, order: str, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """attention_stats with the same arguments: output, statistics and every gradient."""
    case = case_of(count=count, named=count, num_prefix=num_prefix, masked=masked, order=order,
                   dim=20, class_token=num_prefix > 0)  # fmt: skip
    results = []
    for function in (sparse_attention, attention_stats):
        for kind in (dtype, torch.float64):
            values, leaves = with_leaves(
                to_dtype(SPARSE.build(case, dtype, device), kind), "q", "k", "v", "keep"
            )
            if function is attention_stats:
                values.pop("index")
            outputs, grads = gradients(lambda *_, f=function, a=values: f(**a, need_stats=True),
                                       tuple(leaves))  # fmt: skip
            results.append([*outputs, *grads])
    actual, _, plain, exact = results
    names = ["out", "stats", "q", "k", "v", "keep"]
    for name, mine, theirs, truth in zip(names, actual, plain, exact, strict=False):
        if name == "stats":
            assert_close(mine, theirs, 1e-11 if dtype == torch.float64 else 1e-5)
        elif name == "out":
            assert_accurate(mine, theirs, truth, what=name)
        else:
            assert_gradient(mine, theirs, truth, name, scale=1.0)
    assert_close(results[1], exact, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_the_order_of_keys_changes_nothing_beyond_rounding(
    masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    values = SPARSE.build(case_of(count=70, named=23, masked=masked, dim=20), dtype, device)
    results = []
    for turn in range(3):
        index = values["index"]
        if turn:
            order = torch.rand(index.shape, generator=generator(f"{turn}")).argsort(-1)
            index = index.gather(-1, order.to(device))
        results.append(SPARSE.everything(values | {"index": index}))
    for other in results[1:]:
        assert_close(other, results[0], 1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_changes_nothing(masked: bool, device: torch.device) -> None:
    """-1 behind a row is the same as a shorter row."""
    for dtype in FLOATING:
        values = SPARSE.build(case_of(count=30, named=7, masked=masked), dtype, device)
        padded = torch.nn.functional.pad(values["index"], (0, 11), value=-1)
        results = []
        for index in (values["index"], padded):
            results.append(SPARSE.everything(values | {"index": index}))
        assert_close(results[1], results[0], 8 * torch.finfo(dtype).eps)


def test_keys_of_no_weight_may_as_well_be_missing(device: torch.device) -> None:
    """Sets that differ only by keys whose probability is 0 give the same result and gradients."""
    values = SPARSE.build(case_of(count=60, named=30, num_prefix=0, dim=16), torch.float32, device)
    # Tokens from 40 on point away from every query: their logits are lower by 1000.
    values["q"][..., 0], values["k"][..., 0] = 1.0, 0.0
    values["k"][:, 40:, :, 0] = -4000.0
    values["index"][..., 0] = 0  # so that some key has weight
    values["index"][..., 1:] = values["index"][..., 1:].clamp(min=1)
    index = values["index"].clone()
    for row in index.flatten(0, 2):
        distinct = sorted(set(row.tolist()))
        row[: len(distinct)] = torch.tensor(distinct, dtype=torch.int32, device=device)
        row[len(distinct) :] = -1
    fewer = index.masked_fill(index >= 40, -1)  # ascending: they are the last
    assert ((index >= 0).sum(-1) > (fewer >= 0).sum(-1)).double().mean() > 0.9
    results = []
    for named in (index, fewer):
        results.append(SPARSE.everything(values | {"index": named}, "q", "k", "v"))
    assert_close(results[0], results[1], 1e-6)
    assert not results[0][4][:, 40:].any(), "values of no weight get no gradient"
