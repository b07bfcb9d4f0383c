"""Both attention ops against their definition, written once more as loops, at every size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.attention.drawn import ORDERS, Attention, by_attention, case_of, cases
from support.arguments import to_dtype
from support.attention import HEAD_DIMS, with_leaves
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, random
from torch import Tensor


def stats_by_hand(p: list[list[float]], alive: list[int], class_token: bool) -> Tensor:
    """Statistics [len(alive), 6] of the patch tokens `alive` of one map."""
    stats = torch.zeros(len(alive), 6, dtype=torch.float64)
    for place, t in enumerate(alive):
        row, column = [p[t][j] for j in alive], [p[i][t] for i in alive]
        row_mean, col_mean = sum(row) / len(alive), sum(column) / len(alive)
        stats[place] = torch.tensor([
            p[0][t] if class_token else 0.0,
            p[t][0] if class_token else 0.0,
            row_mean,
            sum((x - row_mean) ** 2 for x in row) / len(alive),
            col_mean,
            sum((x - col_mean) ** 2 for x in column) / len(alive),
        ], dtype=torch.float64)  # fmt: skip
    return stats


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None = None,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    cotangent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`out`, `stats` and the gradient of `keep` for the gradient of `out`, key by key."""
    batch, count, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    out, stats = torch.zeros_like(v), v.new_zeros(batch, count, heads, 6)
    keep_grad = None if keep is None or cotangent is None else torch.zeros_like(keep)
    patches = range(num_prefix, count)
    for b in range(batch):
        kept = [True] * num_prefix
        kept += [True] * len(patches) if keep is None else [x == 1 for x in keep[b].tolist()]
        for h in range(heads):
            logit = [[float(q[b, i, h] @ k[b, j, h]) * scale for j in range(count)]
                     for i in range(count)]  # fmt: skip
            if bias is not None:
                slab = bias[b if bias.shape[0] > 1 else 0, h].tolist()
                logit = [[x + y for x, y in zip(*rows, strict=True)]
                         for rows in zip(logit, slab, strict=True)]  # fmt: skip
            p = [[0.0] * count for _ in range(count)]
            for i in range(count):
                named = list(range(count))
                if index is not None and i >= num_prefix:
                    named = [j for j in index[b, h, i - num_prefix].tolist() if j != -1]
                seen = [j for j in named if kept[j] or j == i]
                lse = -math.inf
                if seen:
                    top = max(logit[i][j] for j in seen)
                    lse = top + math.log(sum(math.exp(logit[i][j] - top) for j in seen))
                for j in seen:
                    p[i][j] = math.exp(logit[i][j] - lse)
                    out[b, i, h] += p[i][j] * v[b, j, h]
                if keep_grad is None:
                    continue
                for j in named:
                    if j == i or j < num_prefix:  # a token's own row does not depend on its mask
                        continue
                    weight = p[i][j]
                    if not kept[j]:
                        weight = 1 / (1 + math.exp(min(lse - logit[i][j], 700.0)))
                    pull = float(cotangent[b, i, h] @ (v[b, j, h] - out[b, i, h]))
                    keep_grad[b, j - num_prefix] += weight * pull
            alive = [t for t in patches if kept[t]]
            stats[b, alive, h] = stats_by_hand(p, alive, class_token).to(q.dtype)
    return out, stats, keep_grad


@by_attention
@given(cases())
def test_values_and_mask_gradient_by_hand(
    attention: Attention, device: torch.device, case: dict[str, Any]
) -> None:
    values = attention.build(case, torch.float64, "cpu")
    cotangent = random(f"cotangent {case['seed']}", values["q"].shape, torch.float64)
    out, stats, keep_grad = by_hand(**values, cotangent=cotangent)
    moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
    for function in (attention.reference, attention.function):
        arguments, leaves = with_leaves(moved, "keep")
        actual = function(**arguments, need_stats=True)
        assert_close([value.cpu() for value in actual], (out, stats), 1e-11, function.__name__)
        if leaves and actual[0].requires_grad:
            (grad,) = torch.autograd.grad(actual[0], leaves, cotangent.to(device))
            assert_close(grad.cpu(), keep_grad, 1e-11, f"{function.__name__} keep gradient")


@by_attention
@given(cases(), st.sampled_from(FLOATING), st.booleans())
def test_values_and_gradients_are_as_accurate_as_torch(
    attention: Attention,
    device: torch.device,
    case: dict[str, Any],
    dtype: torch.dtype,
    without_stats: bool,
) -> None:
    if case["spread"] == 0.0:
        case = case | {"spread": 0.5}
    if case["layout"] == "flat":  # equal keys leave rounding noise where the gradient of q is zero
        case = case | {"layout": "padded"}
    values = attention.build(case, dtype, device)
    attention.assert_as_accurate_as_torch(values)
    if without_stats:
        attention.assert_as_accurate_as_torch(values, need_stats=False)


@by_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(
    dim: int, dtype: torch.dtype, attention: Attention, device: torch.device
) -> None:
    for turn, count in enumerate((1, 2, 5, 16, 17, 50, 99)):
        case = case_of(
            count=count, dim=dim, masked=(turn + dim) % 2 == 0, batch=1 + turn % 2, seed=turn,
            bias=(None, "one", "each")[(turn + dim) % 3],
            named=max(count * 2 // 3, 1), order=ORDERS[turn % 3],
        )  # fmt: skip
        attention.assert_as_accurate_as_torch(attention.build(case, dtype, device))


@by_attention
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", range(1, 71, 10))
def test_every_number_of_tokens(
    first: int, masked: bool, attention: Attention, device: torch.device
) -> None:
    for count in range(first, first + 10):
        for batch in (1, 2):
            case = case_of(count=count, masked=masked, num_prefix=min(count, count % 3), dim=12,
                           named=-(-count // 4), batch=batch)  # fmt: skip
            attention.assert_as_accurate_as_torch(attention.build(case, torch.float32, device))


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
@by_attention
def test_mixed_dtypes_meet_under_autocast(
    attention: Attention, ambient: torch.dtype, device: torch.device
) -> None:
    """q and k normalised in float32 beside a 16-bit v, as qk_norm gives them under autocast."""
    values = attention.build(case_of(masked=True), torch.float32, device)
    values["keep"].requires_grad_()
    cast = values | {name: values[name].to(ambient) for name in "qkv"}
    mixed = values | {"v": cast["v"]}
    with torch.amp.autocast(device.type, dtype=ambient):
        out, stats = attention(mixed)
    expected = attention(cast)
    assert out.dtype == ambient and stats.dtype == torch.float32
    assert_same_bits(out, expected[0])
    assert_same_bits(stats, expected[1])
    out.float().sum().backward()
    assert values["keep"].grad.dtype == torch.float32 and values["keep"].grad.any()
    with pytest.raises(TypeError, match="v must be float32"):
        attention(mixed)


@by_attention
@pytest.mark.parametrize("dtype", FLOATING)
def test_large_logits_stay_finite(
    dtype: torch.dtype, attention: Attention, device: torch.device
) -> None:
    for count in (12, 30):
        case = case_of(count=count, dim=16, masked=True, order="padded")
        values = attention.build(case, dtype, device)
        values |= {name: values[name] * 100 for name in "qk"}
        out, stats, *grads = attention.everything(values)
        assert all(value.isfinite().all() for value in (out, stats, *grads))
        assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (stats >= 0).all() and (stats[..., [0, 1, 2, 4]] <= 1 + 1e-6).all()
        exact = attention.reference(**to_dtype(values, torch.float64), need_stats=True)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-2}.get(dtype, 3e-2)
        assert_close(out.double(), exact[0], tolerance)
        assert_close(stats.double(), exact[1], min(tolerance, 1e-2))
