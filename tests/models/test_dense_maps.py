"""Maps on the full grid, for dense heads: alike in training and inference, for the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.models.state import nearest_alive
from support.models import build, images
from torch import Tensor

VARIANTS = ["class token", "registers, LayerScale", "EVA-02", "BEiT", "NaFlex, rotary"]
METHODS = ["spot", "dynamicvit"]


def convert(variant: str = "class token", **config: Any) -> Any:
    given = {"keep": 0.6, "at": [1, 2, 3], **config}
    return spot_vit.sparsify(build(variant, torch.float64), **given)


def maps_of(model: Any, x: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
    options = {"output_fmt": "NLC", "intermediates_only": True, "aux": True, **options}
    return model.forward_intermediates(x, **options)


@pytest.mark.parametrize("fill", ["last", "nearest", "zero"])
@pytest.mark.parametrize("soft", [None, "fuse"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_training_and_inference_give_the_same_maps(variant: str, soft: str | None, fill: str):
    model = convert(variant, soft=soft)
    x = images(model)
    expected, out = maps_of(model, x, fill=fill)
    kept = out.index
    given, _ = maps_of(model, x, fill=fill, kept=kept)
    masked, trained = maps_of(model.train(), x, fill=fill, kept=kept)
    assert len(expected) == 5
    for other in (given, masked):
        for found, wanted in zip(other, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    for found, wanted in zip(trained.masks, out.masks, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_what_stands_at_dropped_places(method: str):
    model = convert(method=method)
    x = images(model)
    last, out = maps_of(model, x)
    zero, again = maps_of(model, x, fill="zero")
    nearest, _ = maps_of(model, x, fill="nearest")
    assert torch.equal(out.logits, model(x)) and torch.equal(again.logits, out.logits)
    alive = out.masks[2] > 0.5
    for b, (one, other, third) in enumerate(zip(last, zero, nearest, strict=True)):
        gone = ~(out.masks[min(b, 3) - 1] > 0.5) if b else torch.zeros_like(alive)
        assert (other[gone] == 0).all() and torch.equal(one[~gone], other[~gone])
        assert torch.equal(third[~gone], one[~gone])
        if b:  # a token dropped in front of block b has the value that block b - 1 gave it
            fresh = gone & (last[b - 1] == one).all(dim=-1)
            assert torch.equal(fresh, gone)
    place = nearest_alive(alive, (4, 4))
    rows = place[..., None].expand(-1, -1, 48)
    assert torch.equal(nearest[4], last[4].gather(1, rows))


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_norm_is_applied_to_what_stands_there(method: str, mode: str):
    """And zeros stay zeros."""
    model = convert(method=method)
    with torch.no_grad():
        model.norm.bias.copy_(torch.randn(48))
    x = images(model)
    kept = maps_of(model, x)[1].index
    model.train(mode == "training")
    for fill in ("last", "nearest", "zero"):
        plain, out = maps_of(model, x, fill=fill, kept=kept)
        normed, _ = maps_of(model, x, fill=fill, kept=kept, norm=True)
        for b, (one, other) in enumerate(zip(plain, normed, strict=True)):
            expected = model.norm(one)
            if fill == "zero" and b:
                expected[out.masks[min(b, 3) - 1] < 0.5] = 0
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-12)


def test_nearest_by_hand():
    alive = torch.tensor([[True, False, False, False, False, True], [False] * 5 + [True]])
    place = nearest_alive(alive, (2, 3))
    assert place.tolist() == [[0, 0, 5, 0, 5, 5], [5] * 6]


def test_maps_carry_gradients_of_dropped_tokens():
    model = convert(train_decision="topk").train()
    x = images(model).requires_grad_()
    maps, _ = maps_of(model, x)
    maps[-1].square().sum().backward()
    assert (x.grad.abs().flatten(1).sum(dim=1) > 0).all()
    assert all(p.grad is not None for p in model.blocks[3].relevance.parameters())


def test_a_head_without_tokens_is_refused_here_too():
    model = spot_vit.sparsify(build("avg", dynamic_img_size=True), keep=0.4, at=[1, 2, 3])
    with pytest.raises(ValueError, match="leaves none of 4 patch tokens"):
        model.forward_intermediates(torch.randn(2, 3, 32, 32), aux=True)


def test_unknown_fill_is_named():
    model = convert()
    with pytest.raises(ValueError, match="fill must be one of"):
        model.forward_intermediates(images(model), fill="mean")
