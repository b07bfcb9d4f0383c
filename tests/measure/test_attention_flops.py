"""Cost of sparse attention against published figures and against the sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.measure.attention_flops import mhsa_constant, mhsa_flops
from spot_vit.models.sparsifiner import predictors

from tools.docs import attention_flops

IMAGE = (3, 224, 224)
SIZES = {  # depth, width, heads
    "deit_small_patch16_224": (12, 384, 6),
    "lvvit_small": (16, 384, 6),
    "lvvit_medium": (20, 512, 8),
}
PUBLISHED = {  # MMACs of the paper's table, and of its plot for LV-ViT-M
    "deit_small_patch16_224": {
        0.9: 396.8, 0.8: 360.6, 0.7: 324.6, 0.6: 290.3, 0.5: 254.2, 0.4: 218.0, 0.3: 183.6,
        0.2: 147.5, 0.1: 111.4, 0.05: 93.3, 0.01: 78.9,
    },
    "lvvit_small": {0.5: 339.7, 0.25: 221.7, 0.1: 149.5},
    "lvvit_medium": {0.25: 369.0, 0.1: 248.6},
}  # fmt: skip
SLOPES = {"deit_small_patch16_224": 1.80634, "lvvit_small": 2.40845, "lvvit_medium": 4.01408}


def sparse(name: str, keep_rate: float = 0.25, **overrides: Any) -> Any:
    with torch.device("meta"):
        model = timm.create_model(name)
    return spot_vit.sparsify_attention(model, keep_rate, **overrides)


@pytest.mark.parametrize(
    ("name", "dense"), [("deit_small_patch16_224", 357.66), ("lvvit_small", 476.88)]
)
def test_dense_attention_costs_what_is_published(name: str, dense: float):
    with torch.device("meta"):
        model = timm.create_model(name)
    cost = mhsa_flops(model, IMAGE)
    assert round(cost.total / 1e6, 2) == dense and cost.connectivity == 0
    assert cost == mhsa_flops(spot_vit.sparsify_attention(model, 1.0), IMAGE)


@pytest.mark.parametrize("name", SIZES)
def test_slope_and_constant(name: str):
    depth, dim, heads = SIZES[name]
    model = sparse(name)
    constant = mhsa_constant(depth, dim, heads, 197)
    slope = 2 * depth * 196 * dim
    assert round(slope / 1e6, 5) == SLOPES[name]
    gaps = []
    for rate in attention_flops.RATES:
        budget = math.ceil(round(197 * rate, 6))
        cost = mhsa_flops(spot_vit.set_keep(model, attention=rate), IMAGE)
        assert cost.total == constant + slope * budget
        assert cost.products == slope * budget + 2 * depth * 197 * dim
        if rate in PUBLISHED[name]:
            gaps.append(cost.total / 1e6 - PUBLISHED[name][rate])
    # The same slope as published, and a constant of our own.
    assert len(gaps) == len(PUBLISHED[name]) and max(gaps) - min(gaps) < 0.2
    assert min(gaps) > 0 and max(gaps) < 0.02 * constant / 1e6


@pytest.mark.parametrize(
    "overrides", [{"reduce_c": 1}, {"reduce_n": 9}, {"reduce_n": 2}, {"coef_topk": None}]
)
def test_the_formula_follows_the_configuration(overrides: dict[str, Any]):
    model = sparse("deit_small_patch16_224", **overrides)
    constant = mhsa_constant(12, 384, 6, 197, SparsifinerConfig(**overrides))
    assert mhsa_flops(model, IMAGE).total == constant + 2 * 12 * 196 * 384 * 50


def test_a_basis_with_weights_counts_its_own_entries():
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    spot_vit.sparsify_attention(model, coef_topk=4)
    with torch.no_grad():
        for predictor in predictors(model).values():
            predictor.proj_back_n.fill_(0.01)
            predictor.proj_back_n[:50] = -0.03
    count = spot_vit.count_flops(model, IMAGE)
    rest = 197 * 32 * 192 + 196 * 32 * 192 + 2 * 32 * 192 * 32 + 32 * 3 * 32
    assert [layer.connectivity for layer in count.layers[1:-1]] == [rest + 3 * 196 * 4 * 50] * 2
    assert count.connectivity == 2 * (rest + 3 * 196 * 4 * 50)


def test_layers_tell_connectivity_apart():
    model = spot_vit.sparsify(sparse("deit_tiny_patch16_224"), keep=0.5)
    count = spot_vit.count_flops(model, IMAGE)
    dim, heads = 192, 3
    _, *blocks, _ = count.layers
    assert [block.tokens for block in blocks] == [197] * 3 + [99] * 3 + [50] * 3 + [25] * 3
    for b, block in enumerate(blocks):
        n, k = block.tokens, min(50, block.tokens)
        assert block.products == 2 * (n - 1) * k * dim + 2 * n * dim
        assert block.attention == 4 * n * dim**2 + block.products
        # A sparse map has as many entries as are named; a dense one all.
        entries = (n - 1) * (k if k < n else n - 1)
        assert block.statistics == (4 * heads * entries if b < 9 else 0)
        assert (block.connectivity > 0) == (k < n)
        assert block.other == 0
    assert sum(layer.total for layer in count.layers) == count.total
    assert sum(layer.connectivity for layer in count.layers) == count.connectivity > 0
    header, _, *rows, sums = str(count).split("\n")
    assert header.split()[2:] == [
        "attention", "mlp", "predictor", "statistics", "connectivity", "other", "total"
    ]  # fmt: skip
    assert {len(line) for line in (header, *rows, sums)} == {len(header)}
    assert float(sums.split()[-3]) == round(count.connectivity / 1e6, 2)


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "sparsifiner.md").read_text()
    assert attention_flops.table() in page, "run python tools/docs/attention_flops.py"
    for name in SparsifinerConfig.names():
        assert f"`{name}`" in page, name
