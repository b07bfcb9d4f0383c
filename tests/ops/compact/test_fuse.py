"""fuse_tokens: accuracy, what it reads, numbers at the ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.compact.drawn import index_of, moved, row_cases, rows_of
from support.arguments import to_dtype
from support.comparison import BACKWARD, assert_accurate, assert_gradient, assert_same_bits
from support.data import FLOATING, generator, random, random_index
from support.gradients import gradients
from support.layouts import lay_out

from spot_ext import fuse_tokens, fuse_tokens_reference


@given(
    case=row_cases(),
    dtype=st.sampled_from(FLOATING),
    normalize=st.booleans(),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_fuse_is_as_accurate_as_torch(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype, normalize: bool, sign: float
) -> None:
    case = case | {"row": (math.prod(case["row"]),)}
    tokens = rows_of(case, "tokens", case["num_prefix"] + case["num_tokens"], dtype, random)
    weights = random(f"weights {case['seed']}", (case["batch"], case["num_tokens"]), torch.float64)
    weights = lay_out((sign * (weights.abs() + 0.05)).to(dtype), case["second_layout"])
    args = moved(device, tokens, weights, index_of(case), case["num_prefix"], normalize)
    for value in args[:2]:
        value.requires_grad_()
    out, grads = gradients(fuse_tokens, tuple(args))
    plain, plain_grads = gradients(fuse_tokens_reference, tuple(args))
    exact_args = to_dtype(tuple(args), torch.float64)
    exact, exact_grads = gradients(fuse_tokens_reference, exact_args)
    assert_accurate(out, plain, exact)
    assert_gradient(grads[0], plain_grads[0], exact_grads[0], "tokens")
    # The gradient of a weight is the difference of two terms of this size; one token: zero.
    size = exact.abs().sum(-1).max().item() if exact.numel() else 0.0
    lengths = exact_args[0].detach().abs().sum(-1)
    size = max(size, lengths.max().item() if lengths.numel() else 0.0)
    mass = exact_args[1].detach().abs()
    least = mass[mass > 0].min().item() if normalize and mass.numel() else 1.0
    if normalize and (case["layout"] == "flat" or case["num_tokens"] - case["num_keep"] == 1):
        # The mean of equal tokens is the same for all weights: whatever is not zero is rounding.
        zero = torch.zeros_like(exact_grads[1])
        assert_accurate(grads[1], plain_grads[1], zero, BACKWARD, "weights", 4 * size / least)
    else:
        assert_gradient(grads[1], plain_grads[1], exact_grads[1], "weights", 4 * size / least)


@pytest.mark.parametrize("dtype", FLOATING)
def test_fuse_of_nothing_is_zero(dtype: torch.dtype, device: torch.device) -> None:
    tokens = random("tokens", (3, 7, 5), dtype, device)
    index = random_index("index", 3, 6, 2, device=device)
    everything = random_index("all", 3, 6, 6, "shuffled", device)
    weights = random("weights", (3, 6), dtype, device)
    none = torch.zeros_like(weights)
    opposite = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5, -0.5]], device=device, dtype=dtype)
    some = torch.tensor([[1, 4]], device=device)
    for w, i in ((weights, everything), (none, index), (opposite[:1].expand(3, 6), everything)):
        w = w.clone().requires_grad_()
        x = tokens.clone().requires_grad_()
        out = fuse_tokens(x, w, i)
        assert_same_bits(out, torch.zeros_like(out))
        out.sum().backward()
        assert not x.grad.any() and not w.grad.any()
    assert_same_bits(fuse_tokens(tokens, weights, everything, normalize=False),
                     torch.zeros(3, 5, dtype=dtype, device=device))  # fmt: skip
    assert fuse_tokens(tokens[:1], opposite, some).isfinite().all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_fuse_never_reads_prefix_or_kept_tokens(
    odd: float, normalize: bool, device: torch.device
) -> None:
    tokens = random("tokens", (2, 9, 5), torch.float32, device)
    weights = random("weights", (2, 7), torch.float32, device).abs()
    index = random_index("index", 2, 7, 3, "shuffled", device)
    clean, _ = gradients(lambda *a: fuse_tokens(*a, 2, normalize), (tokens, weights, index))
    tokens[:, :2] = odd
    for image in range(2):
        tokens[image, 2 + index[image]] = odd
        weights[image, index[image]] = odd
    tokens.requires_grad_()
    weights.requires_grad_()
    out, grads = gradients(lambda *a: fuse_tokens(*a, 2, normalize), (tokens, weights, index))
    assert_same_bits(out, clean)
    for grad in grads:
        assert grad.isfinite().all()
    assert not grads[0][:, :2].any()
    for image in range(2):
        assert not grads[0][image, 2 + index[image]].any()
        assert not grads[1][image, index[image]].any()


@pytest.mark.parametrize("weight", [1e-45, 1e-40, 1e-38, 3e37])
def test_fuse_with_weights_at_the_ends_of_the_range(weight: float, device: torch.device) -> None:
    tokens = random("tokens", (2, 9, 5), torch.float32, device)
    index = random_index("index", 2, 8, 4, device=device)
    weights = torch.full((2, 8), weight, device=device)
    expected = fuse_tokens_reference(tokens, weights, index)
    assert expected.isfinite().all()
    torch.testing.assert_close(fuse_tokens(tokens, weights, index), expected, rtol=0.3, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_fuse_hands_odd_values_on(odd: float, dtype: torch.dtype, device: torch.device) -> None:
    tokens = random("tokens", (1, 6, 4), dtype, device)
    weights = torch.rand(1, 5, generator=generator("weights")).to(device, dtype)
    index = torch.tensor([[0, 2]], device=device)
    tokens[0, 4, 1] = odd
    out = fuse_tokens(tokens, weights, index)
    assert out[0, 1].isnan() if math.isnan(odd) else out[0, 1] == odd
    assert out[0, [0, 2, 3]].isfinite().all()
    weights[0, 3] = odd
    actual = fuse_tokens(tokens, weights, index)
    expected = fuse_tokens_reference(tokens, weights, index)
    assert_same_bits(actual.isfinite(), expected.isfinite())
    assert_same_bits(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sixteen_bit_value_is_read_and_rounded_as_torch_does(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Sums of two values are exact in float32, so that the result is one rounding."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    others = patterns[torch.randperm(65536, generator=generator("others"))]
    tokens = torch.stack([patterns, others]).view(dtype)[None].to(device)
    empty = torch.empty((1, 0), dtype=torch.int64, device=device)
    for weight in (1.0, 2.0**-10):  # the second gives subnormal results
        weights = torch.full((1, 2), weight, dtype=dtype, device=device)
        actual = fuse_tokens(tokens, weights, empty, num_prefix=0, normalize=False)
        expected = (tokens[:, 0].float() * weight + tokens[:, 1].float() * weight).to(dtype)
        assert_same_bits(actual.isnan(), expected.isnan())
        same = (actual == expected) | expected.isnan()
        assert same.all(), f"{int((~same).sum())} values differ"


def test_fuse_of_a_softmax_stays_inside_the_tokens(device: torch.device) -> None:
    tokens = random("tokens", (4, 30, 8), torch.float32, device)
    weights = random("weights", (4, 29), torch.float32, device).softmax(-1)
    index = random_index("index", 4, 29, 11, device=device)
    out = fuse_tokens(tokens, weights, index)
    assert (out <= tokens[:, 1:].amax(1)).all() and (out >= tokens[:, 1:].amin(1)).all()
