"""Values of attention_stats that are particular to it: kept tokens, spans, the bias."""

from __future__ import annotations

import math

import pytest
import torch
from ops.attention.drawn import DENSE, case_of
from ops.attention_stats.drawn import mask, qkv
from support.arguments import tensors
from support.attention import with_leaves
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, random, random_index
from support.gradients import gradients

from spot_ext import attention_stats, attention_stats_reference


@pytest.mark.parametrize("first", range(0, 66, 11))
def test_every_number_of_kept_tokens(first: int, device: torch.device) -> None:
    """Images of one batch keep different numbers, all, one and none among them."""
    values = DENSE.build(case_of(batch=3, count=67, masked=True, bias="one"), torch.float32, device)
    for kept in range(first, first + 11):
        for image, number in enumerate((kept, 66 - kept, min(kept, 1))):
            chosen = random_index(f"kept {kept} {image}", 1, 66, number, "shuffled", device)
            values["keep"][image] = 0
            values["keep"][image, chosen[0]] = 1
        assert values["keep"].sum(1).tolist() == [kept, 66 - kept, min(kept, 1)]
        DENSE.assert_as_accurate_as_torch(values)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [None, "one"])
def test_a_scale_of_zero_is_uniform_attention(
    scale: float, masked: bool, bias: str | None, device: torch.device
) -> None:
    for dtype in FLOATING:
        case = case_of(scale=scale, masked=masked, bias=bias)
        DENSE.assert_as_accurate_as_torch(DENSE.build(case, dtype, device))


def test_gradients_beside_a_hidden_logit_far_above_the_others(device: torch.device) -> None:
    """exp(logit - lse) of the hidden column overflows; it is no part of the result."""
    q, k, v = torch.tensor([[0.0, 10, 1], [0, 0, 100], [1, 2, 3]], device=device).view(
        3, 1, 3, 1, 1
    )
    keep = torch.tensor([[1.0, 0.0]], device=device)
    for function in (attention_stats, attention_stats_reference):
        call, leaves = with_leaves({"q": q, "k": k, "v": v, "keep": keep, "scale": 1.0}, "k", "v")
        out, stats = function(**call)
        grads = torch.autograd.grad(out.sum() + stats.sum(), leaves)
        torch.testing.assert_close(grads[0].flatten(), torch.tensor([-5.0, 5, 0], device=device))
        assert grads[1].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("kept", [None, 0, 1, 5, 150, 398])
def test_few_heads_with_many_queries(
    kept: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    """The CPU cuts the queries of few heads into spans and combines their column sums."""
    case = case_of(batch=1, count=400, num_prefix=2, dim=16, bias="one", masked=kept is not None)
    values = DENSE.build(case, dtype, device)
    if kept is not None:
        chosen = random_index("spans", 1, 398, kept, "shuffled", device)
        values["keep"] = torch.zeros_like(values["keep"]).scatter(1, chosen, 1)
    DENSE.assert_as_accurate_as_torch(values)


def test_defaults(device: torch.device) -> None:
    q, k, v = qkv(2, 6, 2, 8, device=device)
    default = attention_stats(q, k, v)
    explicit = attention_stats(q, k, v, scale=8**-0.5, num_prefix=1, class_token=True)
    for one, other in zip(default, explicit, strict=True):
        assert_same_bits(one, other)
    no_prefix = attention_stats(q, k, v, num_prefix=0)[1]  # then there is no class token
    assert not no_prefix[..., :2].any() and no_prefix[..., 2].all()


def test_out_is_scaled_dot_product_attention(device: torch.device) -> None:
    q, k, v = qkv(2, 30, 3, 16, device=device)
    bias = random("bias", (1, 3, 30, 30), torch.float64, device)
    out, stats = attention_stats(q, k, v, bias=bias, need_stats=False)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias
    )
    assert_close(out, expected.transpose(1, 2), 1e-12)
    assert stats.numel() == 0 and stats.dtype == torch.float64


def test_a_table_without_gradients_in_inference_mode(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 9, 2, 8, device=device))
    with torch.inference_mode():
        outputs = tensors(attention_stats(q, k, v, mask(2, 8, device=device).requires_grad_()))
    assert not any(value.requires_grad for value in outputs)


# ---- the mask ------------------------------------------------------------------------------------


def test_keeping_all_equals_no_mask(device: torch.device) -> None:
    q, k, v = qkv(2, 9, 2, 8, device=device)
    masked = attention_stats(q, k, v, torch.ones(2, 8, device=device, dtype=torch.float64))
    assert_close(masked, attention_stats(q, k, v), 1e-12)


def test_keeping_none_leaves_prefix_and_self(device: torch.device) -> None:
    q, k, v = qkv(2, 9, 2, 8, device=device)
    out, stats = attention_stats(q, k, v, torch.zeros(2, 8, device=device, dtype=torch.float64))
    assert not stats.any()
    assert_close(out[:, 0], v[:, 0])
    alone = [torch.stack([x[:, 0], x[:, 5]], dim=1) for x in (q, k, v)]
    assert_close(out[:, 5], attention_stats(*alone)[0][:, 1])


# ---- the bias ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_permuting_patches_permutes_gradients_too(masked: bool, device: torch.device) -> None:
    """In float32, over several vectors of columns, with bias."""
    case = case_of(count=77, num_prefix=2, masked=masked, bias="each", dim=20)
    order = random_index("order 77", 1, 75, 75, "shuffled", device)[0]
    rows = torch.cat([torch.arange(2, device=device), order + 2])
    inverse = rows.argsort()
    weight = random("weight", (2, 77, 2, 26), torch.float32, device)
    results = []
    for to, back in ((torch.arange(77, device=device), torch.arange(77, device=device)),
                     (rows, inverse)):  # fmt: skip
        values = DENSE.build(case, torch.float32, device)
        for name in "qkv":
            values[name] = values[name][:, to]
        values["bias"] = values["bias"][:, :, to][:, :, :, to]
        if masked:
            values["keep"] = values["keep"][:, to[2:] - 2]
        values, leaves = with_leaves(values, "q", "k", "v", "bias", "keep")
        both = torch.cat(attention_stats(**values), dim=-1)
        grads = torch.autograd.grad((both * weight[:, to]).sum(), leaves)
        moved = [both[:, back], *(grad[:, back] for grad in grads[:3])]
        moved.append(grads[3][:, :, back][:, :, :, back])
        results.append(moved + [grad[:, back[2:] - 2] for grad in grads[4:]])
    assert_close(results[1], results[0], 2e-5)
    assert all(value.any() for value in results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_constant_added_to_a_row_of_logits_changes_nothing(
    masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """So the gradient of `bias` sums to zero in every row."""
    values = DENSE.build(case_of(count=41, masked=masked, bias="each"), dtype, device)
    constant = random("constant", (2, 2, 41, 1), dtype, device) * 8
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    results = []
    for bias in (values["bias"], values["bias"] + constant):
        call, leaves = with_leaves(values | {"bias": bias}, "q", "k", "v", "keep", "bias")
        outputs, grads = gradients(lambda *_, c=call: attention_stats(**c), tuple(leaves))
        assert grads[-1].abs().max() > 1e-2
        assert grads[-1].sum(-1).abs().max() < tolerance
        results.append([*outputs, *grads])
    assert_close(results[1], results[0], tolerance)


@pytest.mark.parametrize("batch", [1, 3])
def test_bias_is_broadcast_and_differentiable(batch: int, device: torch.device) -> None:
    q, k, v = qkv(3, 9, 2, 8, device=device)
    keep = mask(3, 8, device=device)
    bias = random("bias", (batch, 2, 9, 9), torch.float64, device).requires_grad_()
    args = (q, k, v, keep, bias)
    actual, (grad,) = gradients(attention_stats, args)
    expected, (truth,) = gradients(attention_stats_reference, args)
    assert_close(actual, expected)
    assert grad.shape == bias.shape
    assert_close(grad, truth)
    whole = bias.detach().expand(3, 2, 9, 9)  # stride 0 in the batch
    assert_close(attention_stats(q, k, v, keep, whole), actual, 1e-13)


def test_bias_of_minus_infinity_hides_a_column(device: torch.device) -> None:
    q, k, v = qkv(2, 9, 2, 8, device=device)
    bias = torch.zeros(1, 2, 9, 9, dtype=torch.float64, device=device)
    bias[..., 5] = -math.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, stats = attention_stats(*leaves, bias=bias)
    assert out.isfinite().all() and stats.isfinite().all()
    rows = [i for i in range(9) if i != 5]
    fewer = [x[:, rows] for x in leaves]
    assert_close(out[:, rows], attention_stats(*fewer)[0], 1e-12)
    grads = torch.autograd.grad(out.sum() + stats.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][:, 5].any() and not grads[2][:, 5].any()
