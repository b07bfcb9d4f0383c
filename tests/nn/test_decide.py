"""Decisions: masks in training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spot_vit.nn.decide import gumbel_mask, mask_of, noise_share, topk_mask


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


def test_without_noise_both_keep_the_most_probable():
    logp = torch.randn(5, 40, 2, dtype=torch.float64).log_softmax(-1)
    odds = logp[..., 0] - logp[..., 1]
    best = mask_of(odds.topk(13, dim=1).indices, 40, torch.float64)
    assert torch.equal(topk_mask(logp, None, 13, 1.0, 0.0), best)
    assert torch.equal(topk_mask(logp, best, 13, 0.3, 0.0), best)
    assert torch.equal(gumbel_mask(logp, None, 0.5, 0.0), (odds > 0).double())
    state = torch.get_rng_state()
    topk_mask(logp, None, 13, 1.0, 0.0)
    gumbel_mask(logp, None, 1.0, 0.0)
    assert torch.equal(state, torch.get_rng_state())  # none is drawn


@pytest.mark.parametrize("noise", [0.25, 1.0, 3.0])
def test_the_noise_is_as_large_as_it_says(noise: float):
    """Two tokens whose log-odds differ by 1: the better one stays by the noise's own law."""
    torch.manual_seed(0)
    logp = torch.tensor([[[0.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64).expand(40_000, -1, -1)
    kept = topk_mask(logp, None, 1, 1.0, noise)[:, 0].mean().item()
    u = torch.rand(2, 1_000_000, dtype=torch.float64)
    logistic = noise * (u.log() - (1 - u).log())
    expected = (1 + logistic[0] > logistic[1]).double().mean().item()
    assert kept == pytest.approx(expected, abs=0.01)
    drawn = gumbel_mask(logp, None, 1.0, noise).mean(0)
    expected = torch.sigmoid(torch.tensor([1.0, 0.0], dtype=torch.float64) / noise)
    torch.testing.assert_close(drawn, expected, atol=0.01, rtol=0)


def test_the_scale_may_be_a_tensor():
    logp = torch.randn(3, 9, 2).log_softmax(-1)
    for call in (lambda noise: topk_mask(logp, None, 4, 1.0, noise),
                 lambda noise: gumbel_mask(logp, None, 1.0, noise)):  # fmt: skip
        torch.manual_seed(1)
        mine = call(torch.tensor(0.5))
        torch.manual_seed(1)
        assert torch.equal(mine, call(0.5))


def test_the_share_of_noise_counts_what_better_tokens_had_to_make_room_for():
    odds = torch.tensor([[4.0, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
    logp = torch.stack([odds, torch.zeros(2, 5)], dim=-1)
    kept = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 1, 0, 1]])
    assert noise_share(logp, kept, None).item() == pytest.approx(2 / 4)
    # What was gone already could not be kept.
    alive = torch.tensor([[1.0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    assert noise_share(logp, kept, alive).item() == 0
    assert noise_share(logp, torch.zeros(2, 5), None).item() == 0
    level = torch.zeros(2, 5, 2)  # ties are broken as `topk_mask` breaks them
    assert noise_share(level, topk_mask(level, None, 2, 1.0, 0.0), None).item() == 0


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_topk_mask_is_the_order_and_its_gradient_that_of_a_moving_cut(noise: float, masked: bool):
    """d mask_i / d odds_j = s'_i (1[i = j] - s'_j / Σ s'), s the sigmoid around the cut."""
    torch.manual_seed(2)
    keep, tau, n = 4, 0.7, 11
    logp = torch.randn(3, n, 2, dtype=torch.float64).log_softmax(-1).requires_grad_()
    previous = mask_of(torch.rand(3, n).topk(8).indices, n, torch.float64) if masked else None
    state = torch.get_rng_state()
    mask = topk_mask(logp, previous, keep, tau, noise)
    for count in (torch.tensor(keep), torch.tensor([[keep]])):
        torch.set_rng_state(state)
        assert torch.equal(topk_mask(logp, previous, count, tau, noise), mask)
    torch.set_rng_state(state)
    odds = logp.detach()[..., 0] - logp.detach()[..., 1]
    if noise:
        first, second = (-torch.empty_like(odds).exponential_().log() for _ in range(2))
        odds = odds + noise * (first - second)
    alive = torch.ones_like(odds) if previous is None else previous
    ranked = odds.masked_fill(alive == 0, -torch.inf).sort(dim=1, descending=True)
    assert torch.equal(mask.detach(), mask_of(ranked.indices[:, :keep], n, torch.float64))
    cut = ranked.values[:, keep - 1 : keep + 1].mean(dim=1, keepdim=True)
    s = torch.sigmoid((odds - cut) / tau)
    slope = s * (1 - s) / tau * alive
    weight = torch.randn(3, n, dtype=torch.float64)
    (found,) = torch.autograd.grad((mask * weight).sum(), logp)
    up = weight * slope
    expected = up - slope * up.sum(1, keepdim=True) / slope.sum(1, keepdim=True)
    torch.testing.assert_close(found[..., 0], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[..., 1], -expected, rtol=1e-10, atol=1e-12)


def test_a_tie_is_no_reason_to_keep():
    level = torch.zeros(2, 6, 2, dtype=torch.float64) - torch.tensor(2.0).log()
    assert gumbel_mask(level, None, 1.0, 0.0).sum() == 0
    half = torch.full((2, 6), 0.5, dtype=torch.float64)
    for count in (2, torch.tensor(2)):  # the first of equals stay, in both ways of counting
        mask = topk_mask(level, None, count, 1.0, 0.0)
        assert mask.tolist() == [[1, 1, 0, 0, 0, 0]] * 2
        kept = topk_mask(level, half, count, 1.0, 0.0)
        assert kept.tolist() == [[0.5, 0.5, 0, 0, 0, 0]] * 2


def test_by_default_noise_is_that_of_gumbel_softmax():
    logp = torch.randn(3, 9, 2).log_softmax(-1)
    for call in (lambda *noise: topk_mask(logp, None, 4, 1.0, *noise),
                 lambda *noise: gumbel_mask(logp, None, 1.0, *noise)):  # fmt: skip
        state = torch.get_rng_state()
        mine = call()
        torch.set_rng_state(state)
        assert torch.equal(mine, call(1.0)) and not torch.equal(mine, call(0.0))


def test_the_share_of_noise_is_of_differences_of_log_probabilities():
    # These are 6, 1, -1.9 and 3.5.
    logp = torch.tensor([[[-3.0, -9.0], [-1.0, -2.0], [-2.0, -0.1], [-0.5, -4.0]]])
    assert noise_share(logp, torch.tensor([[1.0, 0, 0, 1]]), None).item() == 0
    assert noise_share(logp, torch.tensor([[1.0, 1, 0, 0]]), None).item() == 0.5
    assert noise_share(logp, torch.tensor([[0.0, 0, 1, 0]]), None).item() == 1
