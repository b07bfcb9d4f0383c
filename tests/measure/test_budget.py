from __future__ import annotations

import contextlib
import math
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spot_vit
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from spot_vit.config.spot import exact
from spot_vit.measure import budget
from spot_vit.measure.budget import Budget, largest_ratio, solve_keep

from tools.docs import budgets

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}


@given(target=st.floats(0.01, 1.0), steps=st.sampled_from([10, 100, 1000]))
def test_the_largest_ratio_within_the_target(target: float, steps: int):
    calls = []

    def cost(ratio: float) -> float:
        calls.append(ratio)
        return ratio**2 + (0.05 if ratio < 1 else 0)  # scoring is not free

    if target < cost(1 / steps) and target < 1:
        with pytest.raises(ValueError, match="out of reach"):
            largest_ratio(cost, target, steps=steps)
        return
    calls.clear()
    found = largest_ratio(cost, target, steps=steps)
    assert len(calls) <= 3 + math.log2(steps)
    assert cost(found) <= target
    following = round(found * steps) + 1
    assert following >= steps or cost(following / steps) > target
    assert exact(found) * steps == round(found * steps)  # the written decimal is exact


def test_ends_of_the_range():
    def cost(ratio: float) -> float:
        return 1 + 4 * ratio

    assert largest_ratio(cost, 5.0, steps=1000) == 1.0
    assert largest_ratio(cost, 1.004, steps=1000) == 0.001
    assert largest_ratio(cost, 3.0, steps=1000, least=Fraction(1, 3)) == 0.5
    with pytest.raises(ValueError, match=r"2 GMACs .* keep from 0.334 to 1 costs 2.34 to 5 GMACs"):
        largest_ratio(cost, 2, steps=1000, least=Fraction(1, 3), unit="GMACs")
    with pytest.raises(ValueError, match=r"1 ms is out of reach"):
        largest_ratio(cost, 1, steps=1000, unit="ms")


def test_a_target_above_the_dense_cost_is_ratio_1():
    """Scoring costs more than it saves here, so that the dense model is the cheapest."""
    calls = []

    def cost(ratio: float) -> float:
        calls.append(ratio)
        return 5.0 if ratio == 1 else 6.0

    for target in (5.0, 5.01, 1e9):
        assert largest_ratio(cost, target, steps=1000) == 1.0
    assert set(calls) == {1.0}  # nothing else is timed


def test_printed_bounds_can_be_reached():
    costs = {0.1: 1.23456, 1.0: 9.87654}

    def cost(ratio: float) -> float:
        return costs.get(ratio, 5.0)

    with pytest.raises(ValueError, match=r"costs 1.24 to 9.87"):
        largest_ratio(cost, 1.0, steps=10)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "either gmacs or latency_ms"),
        ({"gmacs": 1, "latency_ms": 1}, "either gmacs or latency_ms"),
        ({"gmacs": 1, "batch": 8}, "belong to a budget of latency_ms"),
        ({"gflops": 1}, "no .'gflops'"),
        ({"gmacs": 0}, "gmacs of a budget must be a positive number"),
        ({"gmacs": "1"}, "gmacs of a budget must be a positive number, got '1'"),
        ({"gmacs": True}, "gmacs of a budget must be a positive number, got True"),
        ({"latency_ms": math.inf}, "latency_ms of a budget must be a positive number"),
        ({"latency_ms": np.float32("nan")}, "latency_ms of a budget must be a positive number"),
        ({"latency_ms": 1, "threads": -1}, "threads of a budget must be a positive int"),
        ({"latency_ms": 1, "batch": 1.5}, "batch of a budget must be a positive int, got 1.5"),
        ({"latency_ms": 1, "batch": None}, "batch of a budget must be a positive int, got None"),
        ({"gmacs": 1, "input_size": 224}, r"got 224; say \(3, 224, 224\)"),
        ({"gmacs": 1, "input_size": (224, 224)}, r"must be \(channels, height, width\)"),
    ],
)
def test_malformed_budgets(wrong: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Budget.from_mapping(wrong)


def test_budgets_in_numbers_of_numpy_are_plain_numbers():
    found = Budget(latency_ms=np.float32("0.7"), batch=np.int64(8), threads=np.int32(1))
    assert found == Budget(latency_ms=0.7, batch=8, threads=1)
    assert [type(n) for n in (found.latency_ms, found.batch, found.threads)] == [float, int, int]
    sized = Budget(gmacs=np.float64(2.8), input_size=np.array([3, 64, 96]))
    assert sized == Budget(gmacs=2.8, input_size=(3, 64, 96))
    model = timm.create_model("deit_tiny_patch16_224", **SMALL)
    dense = spot_vit.count_flops(model, (3, 64, 64)).total / 1e9
    spot_vit.sparsify(model)
    half = 0.8 * dense
    assert solve_keep(model, {"gmacs": np.float64(half)}) == solve_keep(model, {"gmacs": half})


def test_deit_small_at_the_papers_cost():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    spot_vit.sparsify(model, keep=0.9)
    found = solve_keep(model, {"gmacs": 2.8})
    assert model.spot_config.keep == 0.9  # left as it was
    spot_vit.set_keep(model, found)
    total = spot_vit.count_flops(model, (3, 224, 224)).total
    assert 2.8e9 * 0.99 < total <= 2.8e9
    spot_vit.set_keep(model, found + 0.001)
    assert spot_vit.count_flops(model, (3, 224, 224)).total >= total


@pytest.mark.parametrize(
    ("name", "at"), [("deit_tiny_patch16_224", [1, 2]), ("vit_tiny_patch16_224", [1, 2, 3])]
)
def test_gmacs_of_any_size(name: str, at: list[int]):
    model = spot_vit.sparsify(timm.create_model(name, **SMALL), at=at)
    dense = spot_vit.count_flops(spot_vit.set_keep(model, 1.0), (3, 64, 64)).total / 1e9
    assert solve_keep(model, {"gmacs": dense}) == 1.0
    with pytest.raises(ValueError, match="out of reach: keep from") as caught:
        solve_keep(model, {"gmacs": dense / 10})
    least = float(str(caught.value).split("keep from ")[1].split(" ")[0])
    spot_vit.set_keep(model, least)
    tokens = spot_vit.count_flops(model, (3, 64, 64)).layers[-1].tokens
    assert tokens == 2  # the class token and one patch


def test_gmacs_of_another_image_size():
    model = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, **SMALL)
    spot_vit.sparsify(model, keep=0.9)
    gmacs = spot_vit.count_flops(model, (3, 64, 64)).total / 1e9
    with pytest.raises(ValueError, match="out of reach"):
        solve_keep(model, {"gmacs": 0.5 * gmacs, "input_size": (3, 96, 96)})
    found = solve_keep(model, {"gmacs": 2 * gmacs, "input_size": [3, 96, 96]})
    spot_vit.set_keep(model, found)
    assert spot_vit.count_flops(model, (3, 96, 96)).total <= 2e9 * gmacs
    assert found < 0.9 <= solve_keep(model, {"gmacs": gmacs})


def test_sparsify_and_set_keep_take_budgets():
    model = timm.create_model("deit_tiny_patch16_224", **SMALL)
    dense = spot_vit.count_flops(model, (3, 64, 64)).total / 1e9
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="out of reach"):
        spot_vit.sparsify(model, keep={"gmacs": 0.01 * dense})
    assert [type(module) for module in model.modules()] == classes  # not half-converted
    assert not hasattr(model, "spot_config") and not hasattr(model.blocks[1], "relevance")

    spot_vit.sparsify(model, keep={"gmacs": 0.9 * dense}, method="dynamicvit")
    config = model.spot_config
    assert spot_vit.count_flops(model, (3, 64, 64)).total <= 0.9e9 * dense
    assert (
        isinstance(config.keep, float) and spot_vit.SpotConfig.from_json(config.to_json()) == config
    )
    spot_vit.set_keep(model, {"gmacs": 0.8 * dense})
    assert model.spot_config.keep < config.keep
    with pytest.raises(ValueError, match="out of reach"):
        spot_vit.set_keep(model, {"gmacs": 0.01 * dense})
    assert model.spot_config.keep < config.keep
    spot_vit.set_keep(model, {"gmacs": 2 * dense})
    assert model.spot_config.keep == 1.0


@pytest.mark.parametrize("method", ["spot", "dynamicvit", "evit", "random"])
def test_every_method_meets_the_budget(method: str):
    with torch.device("meta"):
        model = timm.create_model("spot_lvvit_small", method=method, keep={"gmacs": 5.0})
    total = spot_vit.count_flops(model, (3, 224, 224)).total
    assert 5e9 * 0.99 < total <= 5e9


def test_latency_of_a_real_model():
    """Whatever this machine says, at a size at which pruning may well not pay."""
    model = timm.create_model("deit_tiny_patch16_224", **{**SMALL, "img_size": 96})
    spot_vit.sparsify(model, keep={"latency_ms": 1e9, "batch": 8})
    assert model.spot_config.keep == 1.0
    spot_vit.set_keep(model, 0.7)
    with pytest.raises(ValueError, match=r"1e-06 ms is out of reach: (keep from 0\.3|the dense)"):
        spot_vit.set_keep(model, {"latency_ms": 1e-6})
    assert model.spot_config.keep == 0.7
    (dense,), (half,) = ([sorted(times)[2]] for times in samples_of(model, [1.0, 0.5]))
    for target in (dense, half, (dense + half) / 2):  # measured again, these may be out of reach
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            spot_vit.set_keep(model, {"latency_ms": target, "threads": 1})
            assert 0.31 <= model.spot_config.keep <= 1


def samples_of(model: Any, ratios: list[float], batch: int = 1) -> list[list[float]]:
    def at(ratio: float) -> Any:
        return spot_vit.set_keep(model, ratio)

    size = model.patch_embed.img_size
    return budget.latencies(at, ratios, torch.randn(batch, 3, *size))


def test_latency_is_measured_as_asked(monkeypatch: pytest.MonkeyPatch):
    model = spot_vit.sparsify(timm.create_model("deit_tiny_patch16_224", **SMALL)).train()
    seen = set()
    tried: list[float] = []

    def measured(at: Any, ratios: list[float], images: torch.Tensor) -> list[list[float]]:
        seen.add((tuple(images.shape), torch.get_num_threads()))
        tried.extend(ratios)
        assert [at(ratio).spot_config.keep for ratio in ratios] == list(ratios)
        return [[10 * ratio, 10 * ratio] for ratio in ratios]

    monkeypatch.setattr(budget, "latencies", measured)
    found = solve_keep(model, {"latency_ms": 6.05, "batch": 4, "threads": 1})
    assert seen == {((4, 3, 64, 64), 1)}
    assert torch.get_num_threads() == 2 and model.spot_config.keep == 0.7

    def counts(ratio: float) -> list[int]:
        return [math.floor(16 * exact(ratio) ** k) for k in (1, 2, 3)]

    assert counts(found) == counts(0.605) and counts(found) != counts(found + 0.001)
    sparse = [tuple(counts(ratio)) for ratio in set(tried) - {1.0}]
    assert len(sparse) == len(set(sparse))  # counts that are known are not timed again
    tried.clear()
    assert solve_keep(model, {"latency_ms": 12}) == 1.0 and set(tried) == {1.0}
    with pytest.raises(ValueError, match="meta device"):
        solve_keep(model.to("meta"), {"latency_ms": 6})


def test_ratios_take_turns_in_eval_mode():
    calls = []

    class Model(torch.nn.Module):
        keep = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append((self.keep, self.training, torch.is_grad_enabled()))
            return x @ x

    model = Model().train()

    def at(ratio: float) -> torch.nn.Module:
        model.keep = ratio
        return model

    found = budget.latencies(at, [0.5, 1.0], torch.ones(64, 64))
    passes = budget.ROUNDS + budget.WARMUP
    assert calls == [(0.5, False, False), (1.0, False, False)] * passes
    assert [len(times) for times in found] == [budget.ROUNDS] * 2
    assert all(0 < ms < 1e3 for times in found for ms in times) and model.training


def test_the_page_agrees_with_the_tool():
    page = (Path(__file__).parents[2] / "docs" / "budgets.md").read_text()
    assert budgets.table() in page, "run python tools/docs/budgets.py"
    with torch.device("meta"):
        model = spot_vit.sparsify(timm.create_model("deit_small_patch16_224"))
    assert f"ρ ≈ {solve_keep(model, {'gmacs': 2.8})}." in page
