"""Attention maps of whole models, against timm's own unfused attention and against the outputs."""

from __future__ import annotations

from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.config.methods import METHODS
from support.models import FAMILIES, build, images
from support.sparsifiner import sparse
from torch import Tensor

VARIANTS = ["class token", "registers, LayerScale", *FAMILIES]


def convert(variant: str = "class token", **config: Any) -> Any:
    given = {"keep": 0.6, "at": [1, 2, 3], **config}
    return spot_vit.sparsify(build(variant, torch.float64), **given)


def hooked(model: Any, x: Tensor) -> list[Tensor]:
    """What timm's unfused attention gives to its dropout: the map itself."""
    found: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, inputs, out: found.append(inputs[0]))
    model(x)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_maps_of_a_dense_model_are_timms(variant: str):
    model = build(variant, torch.float64)
    x = images(model)
    found = spot_vit.attention_maps(model, x)
    expected = hooked(model, x)
    assert len(found) == len(expected) == 5
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one.weights, wanted, rtol=0, atol=1e-10)
        assert torch.equal(one.position, torch.arange(16).expand(3, -1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("soft", [None, "fuse"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["class token", "EVA-02", "BEiT"])
@torch.no_grad()
def test_maps_times_values_are_the_output(
    variant: str, method: str, soft: str | None, training: bool
):
    """The output of each attention's projection follows from its map and its own values."""
    model = convert(variant, method=method, soft=soft).train(training)
    x = images(model)
    calls: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.attn.proj.register_forward_hook(lambda m, inputs, out: None)
        block.attn.register_forward_hook(lambda m, inputs, out: calls.append((inputs[0], out)))
    torch.manual_seed(0)
    maps = spot_vit.attention_maps(model, x)
    assert len(maps) == len(calls) == 5
    alive = 16
    for block, one, (given, out) in zip(model.blocks, maps, calls, strict=True):
        v = values_of(block.attn, given)
        mixed = torch.einsum("bhij,bjhd->bihd", one.weights, v).flatten(2)
        expected = block.attn.proj(block.attn.norm(mixed) if hasattr(block.attn, "norm") else mixed)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        assert one.weights.shape[-1] == given.shape[1]
        front = given.shape[1] - one.position.shape[1]
        assert front >= model.num_prefix_tokens
        assert training or one.position.shape[1] <= alive + 3
        alive = one.position.shape[1]


def values_of(attention: Any, x: Tensor) -> Tensor:
    if attention.qkv is None:
        return attention.v_proj(x).unflatten(2, (attention.num_heads, -1))
    bias = getattr(attention, "v_bias", None)
    v = attention.qkv(x).chunk(3, dim=-1)[2]
    return (v if bias is None else v + bias).unflatten(2, (attention.num_heads, -1))


@torch.no_grad()
def test_positions_are_those_of_the_tokens_that_attend():
    model = convert()
    x = images(model)
    out = model(x, aux=True)
    maps = spot_vit.attention_maps(model, x)
    for one, index in zip(maps[1:4], out.index, strict=True):
        assert torch.equal(one.position, index)
    evit = convert(method="evit")
    maps = spot_vit.attention_maps(evit, x)
    assert maps[1].position.shape == (3, 16)  # it cuts behind its attention
    assert maps[2].position.shape == (3, 11) and (maps[2].position[:, 0] == 16).all()


@pytest.mark.parametrize("spot", [False, True])
@torch.no_grad()
def test_maps_of_sparse_attention_have_named_entries_alone(spot: bool):
    model = sparse()
    if spot:
        spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    x = images(model)
    expected = model(x)
    maps = spot_vit.attention_maps(model, x)
    assert torch.equal(model(x), expected)
    for one in maps:
        rows = one.weights[:, :, 1:]
        torch.testing.assert_close(one.weights.sum(dim=-1), torch.ones_like(one.weights[..., 0]))
        assert ((rows > 0).sum(dim=-1) <= 7).all()  # of 17, at .4
        assert (one.weights[:, :, 0] > 0).all()  # the class token sees all


def test_operands_of_biased_attention_are_refused():
    model = build("BEiT")
    with (
        spot_vit.record_operands(model),
        pytest.raises(ValueError, match="adds a bias to its logits"),
    ):
        model(images(model))
