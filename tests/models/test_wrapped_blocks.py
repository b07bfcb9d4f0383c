"""Blocks in wrappers of others, and hooks on them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.config.methods import METHODS
from support.models import FAMILIES, VARIANTS, build, images
from support.sparsifiner import sparse
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.utils import parametrize, prune


def convert(variant: str = "class token", **config: Any) -> Any:
    given = {"keep": 0.6, "at": [1, 2, 3], **config}
    return spot_vit.sparsify(build(variant, torch.float64), **given)


def gradients(model: Any, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    out = model(x, aux=True)
    (out.logits.square().sum() + sum(mask.mean() for mask in out.masks)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def wrap_blocks(model: Any, kind: CheckpointImpl = CheckpointImpl.NO_REENTRANT) -> None:
    blocks = set(model.blocks)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda block: checkpoint_wrapper(block, checkpoint_impl=kind),
        check_fn=lambda module: module in blocks,
    )


# ---- wrappers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [None, "fuse"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["class token", "EVA-02", "BEiT"])
def test_checkpointed_blocks_train_alike(variant: str, method: str, soft: str | None):
    model = convert(variant, method=method, soft=soft).train()
    x = images(model)
    plain = gradients(model, x)
    wrap_blocks(model)
    assert isinstance(model.blocks[1], CheckpointWrapper)
    for found, expected in zip(gradients(model, x), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_reentrant_checkpointing_is_refused_where_predictors_would_not_learn():
    model = convert().train()
    wrap_blocks(model, CheckpointImpl.REENTRANT)
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing"):
        model(images(model))


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_wrapped_blocks_convert_and_restore(variant: str):
    model = build(variant)
    x = images(model)
    expected = model(x)
    keys = list(model.state_dict())
    wrap_blocks(model)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    if variant != "BEiT":
        spot_vit.sparsify_attention(model, 0.5)
    model(x)
    assert len(spot_vit.attention_maps(model, x)) == 5
    spot_vit.restore(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert isinstance(model.blocks[0], CheckpointWrapper)


@torch.no_grad()
def test_a_model_that_cannot_be_restored_stays_as_it_is():
    model = convert()
    spot_vit.sparsify_attention(model, 0.5)
    x = images(model)
    expected, keys = model(x), list(model.state_dict())
    block = model.blocks[3]
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(TypeError, match=r"blocks\.3 is a Sharded now"):
        spot_vit.restore(model)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == keys


def test_what_wraps_the_model_is_named():
    with pytest.raises(spot_vit.UnsupportedModelError, match="convert the model first"):
        spot_vit.sparsify(torch.compile(build()))
    features = __import__("timm").create_model(
        "vit_tiny_patch16_224", img_size=64, features_only=True, depth=4
    )
    with pytest.raises(spot_vit.UnsupportedModelError, match=r"its \.model"):
        spot_vit.sparsify(features)
    spot_vit.sparsify(features.model, at=[1, 2])
    assert [m.shape[1] for m in features(torch.randn(1, 3, 64, 64))] == [192] * len(
        features(torch.randn(1, 3, 64, 64))
    )


# ---- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["class token", "EVA-02", "BEiT"])
@pytest.mark.parametrize("training", [False, True])
def test_hooks_get_tensors_and_may_change_them(variant: str, method: str, training: bool):
    model = convert(variant, method=method).train(training)
    x = images(model)
    seen: list[Any] = []
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0], output))
        )
        for block in model.blocks
        for module in (block, block.attn, block.mlp)
    ]
    torch.manual_seed(0)
    expected = model(x)
    assert len(seen) == 15
    assert all(isinstance(t, Tensor) and t.dim() == 3 for pair in seen for t in pair)
    for handle in handles:
        handle.remove()
    model.blocks[2].register_forward_hook(lambda module, inputs, output: output * 1.0)
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)
    model.blocks[2].register_forward_hook(lambda module, inputs, output: output.roll(1, -1))
    torch.manual_seed(0)
    changed = model(x)
    assert changed.shape == expected.shape and not torch.allclose(changed, expected)


# ---- layers that are not what they were ----------------------------------------------------------


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Shifted(nn.Linear):
    """A layer of a class of its own, as adapters put in the place of one."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)


def change(layer: nn.Linear, kind: str) -> None:
    if kind == "hook":
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif kind == "parametrised":
        parametrize.register_parametrization(layer, "weight", Doubled())
    elif kind == "pruned":
        torch.manual_seed(0)
        prune.random_unstructured(layer, "weight", 0.5)
    elif kind == "offloaded":  # as accelerate puts a forward method of its own on the instance
        forward = layer.forward
        layer.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    else:
        layer.__class__ = Shifted


CHANGES = ["hook", "parametrised", "pruned", "offloaded", "replaced"]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", ["remap", "fc1", "fc2", "fc3"])
def test_a_predictor_is_what_its_layers_do(name: str, kind: str):
    model = convert()
    predictor = model.blocks[2].relevance
    tokens = torch.randn(2, 7, 48, dtype=torch.float64)
    features = torch.rand(2, 7, predictor.num_features, dtype=torch.float64)
    keep = torch.tensor([[1.0, 0, 1, 1, 0, 1, 1]] * 2, dtype=torch.float64)
    before = predictor(tokens, features, keep)
    torch.testing.assert_close(
        predictor._by_layers(tokens, features, keep), before, rtol=0, atol=1e-12
    )
    calls: list[int] = []
    change(getattr(predictor, name), kind)
    after = predictor(tokens, features, keep)
    assert not torch.allclose(after, before)
    getattr(predictor, name).register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(predictor(tokens, features, keep), after) and calls == [1]


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", ["proj_c_q", "proj_c_k"])
def test_a_connectivity_predictor_is_what_its_layers_do(name: str, kind: str):
    model = sparse()
    predictor = model.blocks[2].attn.connectivity
    q, k = (torch.randn(2, n, 3, 16, dtype=torch.float64) for n in (16, 17))
    before = predictor.coefficients(q, k)
    same = copy.deepcopy(predictor)
    for layer in (same.proj_c_q, same.proj_c_k):
        layer.register_forward_hook(lambda module, inputs, output: output.clone())
    torch.testing.assert_close(same.coefficients(q, k), before, rtol=0, atol=1e-12)
    assert torch.equal(same(q, k), predictor(q, k))
    change(getattr(predictor, name), kind)
    after = predictor.coefficients(q, k)
    assert not torch.allclose(after, before)
    basis = predictor.basis(16)
    top = after.topk(min(predictor.config.coef_topk, after.shape[-1]), dim=-1).values[..., -1:]
    sums = after.masked_fill(after < top, 0) @ basis
    named = predictor(q, k)
    best = sums.topk(named.shape[-1], dim=-1).values[..., -1]
    lowest = sums.gather(-1, named.long()).amin(dim=-1)
    torch.testing.assert_close(lowest, best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["EVA-02", "BEiT"])
@torch.no_grad()
def test_attention_calls_a_projection_that_is_watched(variant: str):
    model = convert(variant)
    x = images(model)
    expected = model(x, aux=True)
    for block in model.blocks:
        if block.attn.qkv is not None:
            block.attn.qkv.register_forward_hook(lambda m, inputs, output: output * 1.0)
    torch.testing.assert_close(model(x, kept=expected.index), expected.logits, rtol=0, atol=1e-10)


# ---- other loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "pool" not in v])
@torch.no_grad()
def test_a_pass_driven_by_hand_is_the_models(variant: str):
    model = convert(variant)
    x = images(model)
    out = model(x, aux=True)
    run = spot_vit.TokenPass(model, x)
    for b in range(5):
        run.block(b)
    torch.testing.assert_close(model.norm(run.tokens), out.tokens, rtol=0, atol=1e-10)
    for found, expected in zip(run.state.index, out.index, strict=True):
        assert torch.equal(found, expected)
    changed = spot_vit.TokenPass(model, x)
    for b in range(5):
        changed.block(b)
        full = changed.on_grid()
        assert full.shape[1] == model.num_prefix_tokens + 16
        changed.set_grid(full)
    assert torch.equal(changed.tokens, run.tokens)


def test_values_from_another_loop_reach_the_tokens_that_are_left():
    model = convert(soft="fuse")
    x = images(model)
    run = spot_vit.TokenPass(model, x)
    run.run(range(3))
    fused = run.state.x[:, 1:3].clone()
    value = torch.randn(3, 17, 48, dtype=torch.float64)
    run.set_grid(value)
    position = run.state.index[-1][..., None].expand(-1, -1, 48)
    assert torch.equal(run.tokens[:, 1:], value[:, 1:].gather(1, position))
    assert torch.equal(run.state.x[:, 1:3], fused)
    with pytest.raises(ValueError, match="tokens of the full grid"):
        run.set_grid(value[:, 1:])
    evit = spot_vit.TokenPass(convert(method="evit"), x)
    evit.run(range(3))
    with pytest.raises(ValueError, match="soft='none'"):
        evit.set_grid(value)


@torch.no_grad()
def test_blocks_that_another_loop_calls_say_that_they_ran_densely():
    model = convert()
    tokens = torch.randn(2, 17, 48, dtype=torch.float64)
    with pytest.warns(UserWarning, match="ran densely"):
        model.blocks(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(model))
        model(images(model), kept=model(images(model), aux=True).index)
        spot_vit.set_keep(model, 1.0)
        model.blocks(tokens)  # nothing would be cut
