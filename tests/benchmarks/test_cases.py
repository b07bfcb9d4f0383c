"""Cases of the benchmarks: their sides do the same, at the sizes they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import (
    attention_stats,
    compact,
    connectivity,
    packed_linear,
    relevance,
    sparse_attention,
    sparsifiner,
    token_evidence,
)


def test_the_sides_of_a_case_do_the_same() -> None:
    tokens, scores = torch.randn(3, 197, 8), torch.randn(3, 196)
    kept = compact.ours(tokens, scores)
    assert torch.equal(compact.gather(tokens, scores), kept)
    unsorted = compact.indexing(tokens, scores).sort(dim=1).values
    assert torch.equal(unsorted, kept.sort(dim=1).values)
    q, k, v = torch.randn(3, 1, 20, 2, 64)
    ours, stats = attention_stats.attention_stats(q, k, v)
    torch.testing.assert_close(attention_stats.sdpa(q, k, v), ours)
    torch.testing.assert_close(attention_stats.eager(q, k, v), (ours, stats[:, 1:]))
    inputs = attention_stats.Inputs(2, 9, torch.float32, "cpu")
    sent = inputs.grad_out, torch.zeros_like(inputs.grad_stats)
    one = inputs.training(attention_stats.attention_stats, *sent)(0)
    other = inputs.training(attention_stats.sdpa, inputs.grad_out)(0)
    torch.testing.assert_close(one, other)
    scored = relevance.Inputs(2, 9, torch.float32, "cpu")
    for side in (scored.forward, scored.training):
        ours, eager = side(relevance.token_relevance)(0), side(relevance.eager)(0)
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", packed_linear.LAYERS)
def test_sides_of_a_layer_do_the_same(name: str) -> None:
    layer = packed_linear.Layer(name, 5, "cpu")
    for block in (0, 13):
        plain = layer.plain()(block)
        torch.testing.assert_close(layer.ours()(block), plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.fused()(block), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(len(token_evidence.TOKENS)))
def test_sides_of_a_decision_do_the_same(number: int) -> None:
    decision = token_evidence.Decision(2, number, "cpu")
    for step in (0, 1, 6):
        made = decision.ours()(step)
        assert made.shape == (2, token_evidence.TOKENS[number], 6 * 18)
        torch.testing.assert_close(made, decision.defined()(step), rtol=1e-5, atol=1e-6)


def test_sparse_sides_do_the_same() -> None:
    for kept in (None, 40):
        named = connectivity.Inputs(2, 61, kept, torch.float32, "cpu")
        ours, eager = (named.forward(f)(0) for f in (connectivity.ours, connectivity.eager))
        # The sets may differ where a tie, or nearly one, is at the cut.
        assert ours.shape == eager.shape and (ours == eager).float().mean() > 0.9
    predicted = connectivity.Prediction(2, 61, torch.float32, "cpu")
    inside = predicted.inside(0)
    for function in (connectivity.ours, connectivity.eager):
        stored = predicted.stored(function)(0)
        assert stored.shape == inside.shape and (stored == inside).float().mean() > 0.9
    inputs = sparse_attention.Inputs(2, 61, torch.float32, "cpu")
    ours = inputs.forward(sparse_attention.sparse)(0)
    torch.testing.assert_close(inputs.whole()(0), ours)
    masks = inputs.masks()
    torch.testing.assert_close(inputs.forward(sparse_attention.masked, masks)(0), ours)
    blocks = [sparse_attention.block_mask(index, 61) for index in inputs.index]
    assert torch.equal(blocks[0].mask_mod(1, 2, torch.arange(61)[:, None], torch.arange(61)),
                       masks[0][1, 2])  # fmt: skip
    one = inputs.training(sparse_attention.sparse)(0)
    other = inputs.training(sparse_attention.masked, masks)(0)
    torch.testing.assert_close(one, other)
    everything = [torch.arange(61, dtype=torch.int32).expand(2, 6, 60, 61)]
    dense = inputs.forward(sparse_attention.dense)(0)
    torch.testing.assert_close(inputs.forward(sparse_attention.sparse, everything)(0), dense)


def test_whole_models_are_compared_at_the_sizes_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsifiner, "SIZE", 64)
    alone, both, *digits = sparsifiner.cases("cpu")
    for case, share in ((alone, 0.9), (both, 0.55)):
        assert case.at_least == {sparsifiner.DENSE: pytest.approx(1 / share)}
        with torch.no_grad():
            assert case.ours(0).shape == case.others[sparsifiner.DENSE](0).shape == (2, 1000)
    model = both.ours.args[0]  # type: ignore[attr-defined]
    assert model.sparsifiner_config.keep_rate == 0.25 and model.spot_config.keep == 0.7
    assert [case.name.rpartition(" ")[2] for case in digits] == ["8", "8", "32", "32"]
    for case in digits[:2]:
        assert case.at_least == {sparsifiner.DENSE_DIGITS: 1.0}
        with torch.no_grad():
            ours, dense = case.ours(0), case.others[sparsifiner.DENSE_DIGITS](0)
        assert ours.shape == dense.shape and ours.shape[0] == 8 and not torch.equal(ours, dense)
    alone, both = (case.ours.args[0] for case in digits[:2])  # type: ignore[attr-defined]
    assert alone.sparsifiner_config.keep_rate == 0.25 and not hasattr(alone, "spot_config")
    assert both.sparsifiner_config.keep_rate == 0.25 and both.spot_config.keep < 1
