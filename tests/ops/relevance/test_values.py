"""Values of token_relevance: accuracy, the shared half, what they equal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops.relevance.drawn import NAMES, build, leaves
from support.arguments import to_dtype
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, generator
from torch import Tensor, nn

from spot_ext import token_relevance, token_relevance_reference


@pytest.mark.parametrize("dtype", FLOATING)
def test_errors_at_the_size_of_a_model(dtype: torch.dtype, device: torch.device) -> None:
    """By norm, so that luck of single roundings averages out: at most PyTorch's own error."""
    exact = build(2, 196, 96, 96, 36, (66, 33), device=device)
    values = {k: v if v is None else v.to(dtype) for k, v in exact.items()}
    exact = {k: v if v is None else v.double() for k, v in values.items()}
    grad = torch.randn(2, 196, 2, generator=generator("grad"), dtype=torch.float64).to(device)

    def outcome(call: Any, arguments: dict[str, Any]) -> list[Tensor]:
        given = leaves(to_dtype(arguments, next(iter(arguments.values())).dtype))
        logits = call(**given)
        sent = grad.to(logits.dtype)
        return [logits.detach(), *torch.autograd.grad(logits, list(given.values()), sent)]

    def reordered(**given: Any) -> Tensor:
        order = torch.randperm(66, generator=generator("order")).to(device)
        given["fc1_weight"], given["fc1_bias"] = (
            given["fc1_weight"][order],
            given["fc1_bias"][order],
        )
        given["fc2_weight"] = given["fc2_weight"][:, order]
        return token_relevance_reference(**given)

    truth = outcome(token_relevance_reference, exact)
    # In float64 the truth is PyTorch's own: its error shows with the same sums in another order.
    wide = dtype == torch.float64
    plain = outcome(reordered if wide else token_relevance_reference, values)
    actual = outcome(token_relevance, values)
    for name, mine, theirs, right in zip(("logits", *NAMES), actual, plain, truth, strict=True):
        error, allowed = ((x.double() - right).norm().item() for x in (mine, theirs))
        floor = 4 * torch.finfo(mine.dtype).eps * right.norm().item()
        assert mine.dtype == theirs.dtype
        assert error <= 1.5 * allowed + floor, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


def test_the_tail_of_gelu_keeps_its_digits(device: torch.device) -> None:
    """1 + erf(x / sqrt 2) cancels for negative x; the kernels' form does not."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float32, device=device)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    weights = one, zero, one, zero, torch.ones(2, 1, device=device), torch.zeros(2, device=device)
    features = x[None, :, None]
    hidden2 = torch.ops.spot.token_relevance(None, features, *[None] * 5, *weights)[4].flatten()
    expected = x.double() * torch.special.erfc(-x.double() * 0.5**0.5) / 2
    error = ((hidden2.double() - expected) / expected)[x != 0].abs().max().item()
    assert error < 1e-5


def test_the_shared_half_is_a_mean_over_kept_tokens(device: torch.device) -> None:
    values = build(count=12, device=device)
    full = token_relevance(**values)
    keep = values["keep"]
    for image in range(2):
        index = keep[image].bool()
        alone = dict(values)
        alone["tokens"] = values["tokens"][image : image + 1, index]
        alone["features"] = values["features"][image : image + 1, index]
        alone["keep"] = None
        assert_close(token_relevance(**alone)[0], full[image, index])


def test_without_kept_tokens_the_shared_half_is_zero(device: torch.device) -> None:
    values = build(keep="none", device=device)
    some = build(keep="random", device=device)
    values["keep"][1] = some["keep"][1]
    cut = dict(values)
    cut["fc1_weight"] = values["fc1_weight"].clone()
    cut["fc1_weight"][:, 3:6] = 0
    logits = token_relevance(**values)
    assert logits.isfinite().all()
    assert_close(logits[0], token_relevance(**cut)[0])
    assert_close(logits[1:], token_relevance_reference(**values)[1:])


@pytest.mark.parametrize("name", ["tokens", "features", "keep"])
def test_nan_stays_in_its_image(name: str, device: torch.device) -> None:
    values = build(batch=3, count=40, device=device, dtype=torch.float32)
    clean = token_relevance(**values)
    values[name] = values[name].clone()
    values[name][1, 7] = math.nan
    logits = token_relevance(**values)
    for image in (0, 2):
        assert_same_bits(logits[image], clean[image])
    if name == "features":
        others = torch.arange(40, device=device) != 7
        assert logits[1, 7].isnan().all()
        assert_same_bits(logits[1, others], clean[1, others])
    else:
        assert logits[1].isnan().all()


class Predictor(nn.Module):
    """DynamicViT's predictor, restated: no attention statistics, remap as wide as the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 2), nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        x = self.in_conv(x)
        half = x.shape[2] // 2
        local, shared = x[:, :, :half], x[:, :, half:]
        mean = (shared * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True)
        return self.out_conv(torch.cat([local, mean.expand_as(local)], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_predictor_of_dynamicvit(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    predictor = Predictor(384).to(device, dtype)
    assert sum(p.numel() for p in predictor.parameters()) == 241_250
    x = torch.randn(2, 50, 384, dtype=dtype, device=device)
    policy = (torch.rand(2, 50, 1, device=device) < 0.7).to(dtype)
    expected = predictor(x, policy)
    logits = token_relevance(x, None, policy[..., 0], *predictor.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(logits, expected, tolerance)
    sent = torch.randn_like(expected)
    parameters = list(predictor.parameters())
    assert_close(
        torch.autograd.grad(logits, parameters, sent),
        torch.autograd.grad(expected, parameters, sent),
        tolerance,
    )
