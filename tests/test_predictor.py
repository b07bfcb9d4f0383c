"""Relevance module, evidence over layers, and decisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from spot_vit import SpotConfig
from spot_vit.decide import gumbel_mask, mask_of, topk_mask
from spot_vit.moments import History, scale_statistics
from spot_vit.relevance import TokenRelevance


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


def test_scaling_makes_uniform_attention_one_and_zero():
    n = 50
    mean, variance = torch.full((1, n, 2), 1 / n), torch.zeros(1, n, 2)
    stats = torch.stack([mean, mean, mean, variance, mean, variance], dim=-1)
    scaled = scale_statistics(stats, n, "n")
    torch.testing.assert_close(scaled[..., [0, 1, 2, 4]], torch.ones(1, n, 2, 4))
    assert (scaled[..., [3, 5]] == 0).all()
    torch.testing.assert_close(scale_statistics(stats, torch.tensor([n]), "n"), scaled)
    torch.testing.assert_close(scale_statistics(stats, n, "log1p"), scaled.log1p())
    assert scale_statistics(stats, n, "raw") is stats


def _layers(count: int, n: int = 7, heads: int = 2) -> list[torch.Tensor]:
    return [torch.rand(3, n, heads, 6, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("history", ["all", 1, 2, 9])
@pytest.mark.parametrize("heads", ["concat", "mean"])
def test_moments_equal_the_two_pass_definition(history, heads):
    torch.manual_seed(1)
    config = SpotConfig(history=history, heads=heads, scaling="raw")
    layers = _layers(5)
    state = History(config)
    for stats in layers:
        state.update(stats, stats.shape[1])
    seen = torch.stack(layers if history == "all" else layers[-history:])
    if heads == "mean":
        seen = seen.mean(dim=3, keepdim=True)
    expected = torch.cat(
        [
            seen[-1].flatten(2),
            seen.mean(0).flatten(2),
            seen.var(0, correction=0).flatten(2),
        ],
        dim=-1,
    )
    found = state.features()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.shape[-1] == config.num_features(2)


def test_groups_that_are_off_are_absent():
    (stats,) = _layers(1)
    for features, columns in ((["cls"], stats[..., :2]), (["rowcol", "embed"], stats[..., 2:])):
        state = History(SpotConfig(features=features, scaling="raw"))
        state.update(stats, 7)
        assert torch.equal(state.features(), columns.flatten(2))


def test_moments_keep_digits_when_variances_are_tiny():
    base = torch.full((1, 4, 1, 6), 1000.0)
    state = History(SpotConfig(features=("moments",), scaling="raw"))
    layers = [base + 0.01 * k for k in range(6)]
    for stats in layers:
        state.update(stats, 4)
    exact = torch.stack(layers).double().var(0, correction=0).flatten(2)
    torch.testing.assert_close(state.features()[..., 6:].double(), exact, rtol=1e-2, atol=0)


def test_history_follows_the_kept_tokens():
    torch.manual_seed(2)
    index = torch.tensor([[0, 3, 5], [1, 2, 6], [4, 5, 6]])
    for config in (SpotConfig(scaling="raw"), SpotConfig(scaling="raw", history=2)):
        state, direct = History(config), History(config)
        for stats in _layers(3):
            state.update(stats, 7)
            direct.update(stats.gather(1, index[:, :, None, None].expand(-1, -1, 2, 6)), 7)
        state.decided(index)
        torch.testing.assert_close(state.features(), direct.features())


def test_since_last_forgets_at_a_decision():
    config = SpotConfig(features=("moments",), history="since_last", scaling="raw")
    first, second = _layers(2)
    state, fresh = History(config), History(config)
    state.update(first, 7)
    state.decided(None)
    state.update(second, 7)
    fresh.update(second, 7)
    torch.testing.assert_close(state.features(), fresh.features())


def test_detach_stats_stops_gradients():
    stats = torch.rand(1, 3, 1, 6, requires_grad=True)
    for detach in (False, True):
        state = History(SpotConfig(detach_stats=detach))
        state.update(stats, 3)
        assert state.features().requires_grad is not detach


@given(
    n=st.integers(1, 12),
    keep=st.integers(0, 12),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_topk_mask_hits_the_budget_among_survivors(n, keep, seed, dtype):
    keep = min(keep, n)
    torch.manual_seed(seed)
    logp = torch.randn(3, n, 2, dtype=dtype).log_softmax(-1).requires_grad_()
    first = topk_mask(logp, None, n - (n - keep) // 2, 1.0)
    second = topk_mask(logp, first, keep, 1.0)
    for mask, count in ((first, n - (n - keep) // 2), (second, keep)):
        assert ((mask == 0) | (mask == 1)).all()
        assert (mask.sum(1) == count).all()
    assert (second <= first).all()
    (second * torch.randn_like(second)).sum().backward()
    assert logp.grad.isfinite().all()


def test_topk_mask_has_no_gradient_towards_more_tokens():
    """Only the order decides, so raising all scores alike must not seem to help."""
    logp = torch.randn(3, 10, 2, dtype=torch.float64).log_softmax(-1).requires_grad_()
    first = topk_mask(logp, None, 7, 1.0)
    second = topk_mask(logp, first, 4, 1.0)
    ((first + second) * torch.rand_like(first)).sum().backward()
    push = logp.grad[..., 0]
    assert (push.abs().sum(1) > 0.1).all()
    assert push.sum(1).abs().max() < 1e-12


def test_gumbel_mask_draws_with_the_stated_probability():
    torch.manual_seed(0)
    p = torch.tensor([0.05, 0.3, 0.5, 0.9])
    logp = torch.stack([p, 1 - p], -1).log()[None].expand(20_000, -1, -1)
    mask = gumbel_mask(logp, None, 1.0)
    assert ((mask == 0) | (mask == 1)).all()
    torch.testing.assert_close(mask.mean(0), p, atol=0.015, rtol=0)
    previous = (torch.rand_like(mask) > 0.5).float()
    assert (gumbel_mask(logp, previous, 1.0) <= previous).all()


def test_gumbel_mask_has_the_gradient_of_the_soft_draw():
    logp = torch.randn(4, 6, 2, dtype=torch.float64).log_softmax(-1).requires_grad_()
    weight = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(5)
    (found,) = torch.autograd.grad((gumbel_mask(logp, None, 0.7) * weight).sum(), logp)
    torch.manual_seed(5)
    noise = -torch.empty_like(logp).exponential_().log()
    soft = ((logp + noise) / 0.7).softmax(-1)[..., 0]
    (expected,) = torch.autograd.grad((soft * weight).sum(), logp)
    torch.testing.assert_close(found, expected)


def test_mask_of_index():
    index = torch.tensor([[0, 2], [1, 3]])
    expected = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
    assert torch.equal(mask_of(index, 4, torch.float32), expected)


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
