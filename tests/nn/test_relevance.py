"""The token relevance module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spot_vit.nn.relevance import TokenRelevance


def _as_written(module: TokenRelevance, tokens, features, keep):
    """The module in the order of the paper's description: concatenate, then one MLP."""
    z = F.gelu(module.remap(module.norm(tokens)))
    half = module.d_remap // 2
    local, shared = z[..., :half], z[..., half:]
    alive = keep.sum(dim=1).clamp(min=1)
    mean = (shared * keep[..., None]).sum(dim=1) / alive[:, None]
    u = torch.cat([local, mean[:, None].expand_as(local), features], dim=-1)
    hidden = F.gelu(module.fc2(F.gelu(module.fc1(u))))
    return module.fc3(hidden).log_softmax(dim=-1)


@pytest.mark.parametrize("features", [0, 12])
def test_relevance_equals_its_description(features: int):
    torch.manual_seed(0)
    module = TokenRelevance(24, features, 16).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, a = torch.randn(3, 9, 24).double(), torch.randn(3, 9, features).double()
    keep = (torch.rand(3, 9) > 0.4).double()
    keep[1] = 0  # the mean of nothing is 0
    for mask in (keep, torch.ones_like(keep)):
        expected = _as_written(module, x, a, mask)
        torch.testing.assert_close(module(x, a if features else None, mask), expected)
    expected = _as_written(module, x, a, torch.ones_like(keep))
    torch.testing.assert_close(module(x, a if features else None, None), expected)


def test_parameter_counts_of_the_published_sizes():
    def count(dim: int, features: int) -> int:
        return sum(p.numel() for p in TokenRelevance(dim, features, dim).parameters())

    assert count(384, 0) == 241_250  # DynamicViT's predictor
    assert count(384, 108) == 300_515  # + statistics and moments of 6 heads
    assert count(192, 54) == 75_509


def test_relevance_without_embeddings():
    module = TokenRelevance(24, 18, 0)
    assert module.norm is None and module.remap is None
    logp = module(torch.randn(2, 5, 24), torch.randn(2, 5, 18), None)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, 5))


def test_relevance_is_the_predictor_of_dynamicvit_without_evidence():
    torch.manual_seed(0)
    module = TokenRelevance(384, 0, 384)
    assert set(module.state_dict()) == {
        f"{layer}.{kind}"
        for layer in ("norm", "remap", "fc1", "fc2", "fc3")
        for kind in ("weight", "bias")
    }
    x, policy = torch.randn(2, 30, 384), (torch.rand(2, 30) < 0.7).float()
    expected = _as_written(module, x, x[..., :0], policy)
    torch.testing.assert_close(module(x, None, policy), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d_remap", [16, 0])
def test_relevance_under_autocast(d_remap: int):
    torch.manual_seed(0)
    module = TokenRelevance(24, 12, d_remap)
    x, a = torch.randn(2, 9, 24, requires_grad=True), torch.randn(2, 9, 12)
    keep = torch.ones(2, 9, requires_grad=True)
    plain = module(x, a, keep)
    for tokens in (x, x.bfloat16()):  # as a layer before leaves them
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            logp = module(tokens, a, keep)
        assert logp.dtype == torch.float32
        torch.testing.assert_close(logp, plain, rtol=0, atol=2e-2)
    logp.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())
