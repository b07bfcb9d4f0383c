"""Relevance module, evidence over layers, and decisions."""

from __future__ import annotations

import pytest
import torch
from spot_vit import SpotConfig
from spot_vit.nn.evidence import EvidenceHistory, scale_statistics


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
    state = EvidenceHistory(config)
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
        state = EvidenceHistory(SpotConfig(features=features, scaling="raw"))
        state.update(stats, 7)
        assert torch.equal(state.features(), columns.flatten(2))


def test_moments_keep_digits_when_variances_are_tiny():
    base = torch.full((1, 4, 1, 6), 1000.0)
    state = EvidenceHistory(SpotConfig(features=("moments",), scaling="raw"))
    layers = [base + 0.01 * k for k in range(6)]
    for stats in layers:
        state.update(stats, 4)
    exact = torch.stack(layers).double().var(0, correction=0).flatten(2)
    torch.testing.assert_close(state.features()[..., 6:].double(), exact, rtol=1e-2, atol=0)


def test_history_follows_the_kept_tokens():
    torch.manual_seed(2)
    index = torch.tensor([[0, 3, 5], [1, 2, 6], [4, 5, 6]])
    for config in (SpotConfig(scaling="raw"), SpotConfig(scaling="raw", history=2)):
        state, direct = EvidenceHistory(config), EvidenceHistory(config)
        for stats in _layers(3):
            state.update(stats, 7)
            direct.update(stats.gather(1, index[:, :, None, None].expand(-1, -1, 2, 6)), 3)
        state.decided(index)
        torch.testing.assert_close(state.features(), direct.features())


def test_since_last_forgets_at_a_decision():
    config = SpotConfig(features=("moments",), history="since_last", scaling="raw")
    first, second = _layers(2)
    state, fresh = EvidenceHistory(config), EvidenceHistory(config)
    state.update(first, 7)
    state.decided(None)
    state.update(second, 7)
    fresh.update(second, 7)
    torch.testing.assert_close(state.features(), fresh.features())


def test_detach_stats_stops_gradients():
    stats = torch.rand(1, 3, 1, 6, requires_grad=True)
    for detach in (False, True):
        state = EvidenceHistory(SpotConfig(detach_stats=detach))
        state.update(stats, 3)
        assert state.features().requires_grad is not detach
