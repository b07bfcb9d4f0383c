"""Counted costs against published figures and against the sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import spot_vit
import timm
import torch

IMAGE = (3, 224, 224)


def meta(name: str, **arguments: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("deit_tiny_patch16_224", "1.254"),
        ("deit_small_patch16_224", "4.599"),
        ("deit_base_patch16_224", "17.56"),
        ("lvvit_tiny", "2.87"),
        ("lvvit_small", "6.55"),
        ("lvvit_medium", "12.68"),
    ],
)
def test_dense_models_cost_what_is_published(name: str, gmacs: str):
    count = spot_vit.count_flops(meta(name), IMAGE)
    digits = len(gmacs.split(".")[1])
    assert f"{count.total / 1e9:.{digits}f}" == gmacs
    assert count.predictor == count.statistics == 0


@pytest.mark.parametrize(
    ("name", "method", "keep", "printed"),
    [
        ("deit_small_patch16_224", "dynamicvit", 0.7, 2.9),
        ("deit_base_patch16_224", "dynamicvit", 0.7, 11.4),
        ("deit_256", "dynamicvit", 0.7, 1.3),
        ("lvvit_small", "dynamicvit", 0.7, 4.6),
        ("lvvit_small", "dynamicvit", 0.5, 3.7),
        ("lvvit_medium", "dynamicvit", 0.7, 8.5),
        ("deit_small_patch16_224", "evit", 0.9, 4.0),
        ("deit_small_patch16_224", "evit", 0.8, 3.5),
        ("deit_small_patch16_224", "evit", 0.7, 3.0),
        ("deit_small_patch16_224", "evit", 0.6, 2.6),
        ("deit_small_patch16_224", "evit", 0.5, 2.3),
    ],
)
def test_sparse_models_cost_what_is_published(name: str, method: str, keep: float, printed: float):
    sizes = {}
    if name == "deit_256":
        name, sizes = "deit_small_patch16_224", {"embed_dim": 256, "num_heads": 4}
    model = spot_vit.sparsify(meta(name, **sizes), method=method, keep=keep)
    count = spot_vit.count_flops(model, IMAGE)
    assert (count.predictor > 0) == (method == "dynamicvit")
    assert (count.statistics > 0) == (method == "evit")  # read off the kernel's, with the rest
    gmacs = (count.total - count.statistics) / 1e9
    # DynamicViT's table truncates, EViT's rounds.
    digits = math.floor(gmacs * 10) / 10 if method == "dynamicvit" else round(gmacs, 1)
    assert digits == printed


def test_layers_of_an_evit_cut_inside_the_block():
    count = spot_vit.count_flops(
        spot_vit.sparsify(meta("deit_tiny_patch16_224"), method="evit", keep=0.5), IMAGE
    )
    block, following = count.layers[4:6]
    assert (block.name, block.tokens, following.tokens) == ("blocks.3", 197, 1 + 98 + 1)
    assert block.attention == 4 * 197 * 192**2 + 2 * 197**2 * 192
    assert block.mlp == 8 * 100 * 192**2
    assert block.other == 98 * 192  # the fused token


def test_layers_of_a_spot_model():
    model = spot_vit.sparsify(meta("deit_tiny_patch16_224"), keep=0.5)
    count = spot_vit.count_flops(model, IMAGE)
    dim, heads, classes = 192, 3, 1000
    tokens = [197] * 3 + [99] * 3 + [50] * 3 + [25] * 3
    scored = {3: 196, 6: 98, 9: 49}
    names = [layer.name for layer in count.layers]
    assert names == ["stem", *(f"blocks.{b}" for b in range(12)), "head"]
    stem, *blocks, head = count.layers
    assert (stem.tokens, stem.other, stem.total) == (0, 196 * 768 * dim, 196 * 768 * dim)
    assert (head.tokens, head.other, head.total) == (25, dim * classes, dim * classes)
    assert [block.tokens for block in blocks] == tokens
    for b, (block, n) in enumerate(zip(blocks, tokens, strict=True)):
        assert block.attention == 4 * n * dim**2 + 2 * n**2 * dim
        assert block.mlp == 8 * n * dim**2
        assert block.statistics == (4 * heads * (n - 1) ** 2 if b < 9 else 0)
        assert (block.predictor > scored[b] * dim**2) if b in scored else block.predictor == 0
        assert block.other == 0
    assert sum(layer.total for layer in count.layers) == count.total
    assert sum(layer.predictor for layer in count.layers) == count.predictor
    assert sum(layer.statistics for layer in count.layers) == count.statistics


def test_a_predictor_before_the_first_block_is_not_the_stem():
    model = meta("deit_tiny_patch16_224")
    spot_vit.sparsify(model, at=[0, 4], keep=0.5, features=["embed"])
    stem, first, *_ = spot_vit.count_flops(model, IMAGE).layers
    assert stem.total == 196 * 768 * 192
    assert first.predictor > 0 and first.tokens == 99


def test_table():
    model = spot_vit.sparsify(meta("deit_tiny_patch16_224"), keep=0.5)
    count = spot_vit.count_flops(model, IMAGE)
    header, rule, *rows, sums = str(count).split("\n")
    parts = ["attention", "mlp", "predictor", "statistics", "other", "total"]
    assert header.split() == ["layer", "tokens", *parts]
    assert {len(line) for line in (header, rule, *rows, sums)} == {len(rule)}
    assert len(rows) == 14 and rows[3].split()[:2] == ["blocks.2", "197"]
    assert sums.split()[-1] == f"{count.total / 1e6:.2f}"
    assert float(sums.split()[-4]) == round(count.predictor / 1e6, 2)


def test_other_models_are_one_row_or_have_no_tokens():
    resnet = spot_vit.count_flops(meta("resnet18"), IMAGE)
    (whole,) = resnet.layers
    assert whole.total == resnet.total and round(resnet.total / 1e9, 2) == 1.81
    efficient = spot_vit.count_flops(meta("efficientnet_b0"), IMAGE)
    assert {layer.tokens for layer in efficient.layers} == {0}
    assert sum(layer.total for layer in efficient.layers) == efficient.total


def test_counting_leaves_the_model_alone():
    model = timm.create_model("lvvit_tiny", embed_dim=48, depth=3, num_heads=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spot_vit.count_flops(model, IMAGE)
    assert model.training and not model.blocks[0]._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (224, r"must be \(channels, height, width\), got 224; say \(3, 224, 224\)"),
        ((224, 224), r"got \(224, 224\)"),
        ((1, 3, 224, 224), r"got \(1, 3, 224, 224\)"),
        ((3, 224.0, 224), "224.0"),
        ((3, 0, 224), r"\(3, 0, 224\)"),
        ("224", "'224'"),
    ],
)
def test_the_size_of_an_image_is_checked(size: Any, words: str):
    with pytest.raises(ValueError, match=words):
        spot_vit.count_flops(meta("vit_tiny_patch16_224"), size)


def test_the_size_of_an_image_may_be_of_numpy():
    model = meta("vit_tiny_patch16_224")
    expected = spot_vit.count_flops(model, IMAGE).total
    for size in (np.array(IMAGE), [3, np.int64(224), 224], torch.Size(IMAGE)):
        assert spot_vit.count_flops(model, size).total == expected
