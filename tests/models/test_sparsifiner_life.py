"""The life of a model with sparse attention: refusals, copies, training, compilers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.models.recording import record_operands
from spot_vit.models.sparsifiner import dense_attention, predictors
from support.models import VARIANTS, build, images
from support.slow import most_slow
from support.sparsifiner import (
    BIASED,
    EVERY,
    FAMILIES,
    make,
    picture,
    sparse,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.mark.parametrize("variant", BIASED)
def test_a_bias_is_refused(variant: str):
    model = make(variant)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(
        spot_vit.UnsupportedModelError, match=r"beit.Attention.*timm.*bias is added"
    ):
        spot_vit.sparsify_attention(model)
    assert [type(m) for m in model.modules()] == classes
    spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    with pytest.raises(spot_vit.UnsupportedModelError, match=r"blocks.0.attn.*bias is added"):
        spot_vit.sparsify_attention(model)


def test_others_are_refused_with_class_and_version():
    with pytest.raises(spot_vit.UnsupportedModelError, match=r"SwinTransformer \(timm "):
        spot_vit.sparsify_attention(timm.create_model("swin_tiny_patch4_window7_224"))
    with pytest.raises(spot_vit.UnsupportedModelError, match="attention dropout"):
        spot_vit.sparsify_attention(make(attn_drop_rate=0.1))
    with pytest.raises(spot_vit.UnsupportedModelError, match="patch_drop_rate"):
        spot_vit.sparsify_attention(make(patch_drop_rate=0.1))
    model = sparse()
    with pytest.raises(TypeError, match="sparse already"):
        spot_vit.sparsify_attention(model)
    with pytest.raises(TypeError, match=r"no \['keep'\]"):
        spot_vit.sparsify_attention(make(), keep=0.5)
    with pytest.raises(TypeError, match="expected a SPOT model"):
        spot_vit.set_keep(model, 0.5)
    with pytest.raises(TypeError, match="attention of this model is not sparse"):
        spot_vit.set_keep(spot_vit.sparsify(make()), attention=0.5)
    with pytest.raises(TypeError, match="expected a SPOT model"):
        spot_vit.restore(make())
    with pytest.raises(ValueError, match="reduce_n=18 leaves none of 17 tokens"):
        spot_vit.sparsify_attention(make(), reduce_n=18)
    with pytest.raises(ValueError, match="reduce_c=17 leaves none of 16 channels"):
        spot_vit.sparsify_attention(make(), reduce_c=17)
    with pytest.raises(ValueError, match="attn_mask is not supported"):
        model(picture(model), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal is not supported"):
        model(picture(model), is_causal=True)


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_object_life(variant: str):
    model = spot_vit.sparsify(sparse(variant), keep=0.6, at=[1, 2, 3])
    x = picture(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert other.sparsifiner_config == model.sparsifiner_config
    ema = ModelEmaV3(model, decay=0.9)
    ema.update(model)
    assert torch.equal(ema.module(x), expected)
    calls = []
    modules = [model.blocks[0].attn, model.blocks[0].attn.connectivity]
    handles = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in modules]
    model(x)
    for handle in handles:
        handle.remove()
    assert calls == modules[::-1]


@pytest.mark.parametrize("spot", [False, True])
def test_checkpointing_changes_no_gradient(spot: bool):
    grads = []
    for checkpointing in (False, True):
        model = sparse()
        if spot:
            spot_vit.sparsify(model, keep=0.6, at=[1, 2], train_decision="topk")
        model.train().set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model(picture(model)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@torch.no_grad()
def test_feature_extractors_and_reset_classifier():
    name, arguments = VARIANTS["EVA-02"]
    extractor = timm.create_model(name, features_only=True, **arguments).eval()
    x = torch.randn(2, 3, 56, 56)
    dense = extractor(x)
    spot_vit.sparsify_attention(extractor.model, 0.3)
    maps = extractor(x)
    assert [m.shape for m in maps] == [m.shape for m in dense]
    assert not torch.equal(maps[-1], dense[-1])
    model = sparse("LV-ViT")
    model.reset_classifier(4)
    assert model(picture(model)).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_and_autocast(dtype: torch.dtype):
    model = sparse(keep_rate=0.5, dtype=torch.float32)
    x = picture(model)
    expected = model(x)
    spread = expected.std()
    with torch.autocast("cpu", dtype):
        out = model(x)
    assert (out.float() - expected).abs().max() < spread
    half = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert half.dtype == dtype and (half.float() - expected).abs().max() < spread


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_dense_attention_switches_sparsity_off(variant: str):
    model = make(variant, torch.float32)
    x = picture(model)
    expected = model(x)
    spot_vit.sparsify_attention(model, 0.3)
    different = model(x)
    with dense_attention(model) as same:
        assert same is model and torch.equal(model(x), expected)
        with dense_attention(model):
            pass
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), different) and not torch.equal(different, expected)
    with pytest.raises(ZeroDivisionError), dense_attention(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), different)


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_operands_are_what_timm_attends_with(
    variant: str, convert: bool, monkeypatch: pytest.MonkeyPatch
):
    model = make(variant)  # a teacher needs no conversion
    x = picture(model)
    calls, original = [], nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *args: Any, **arguments: Any) -> Tensor:
        calls.append((q, k, arguments.get("scale") or q.shape[-1] ** -0.5))
        return original(q, k, *args, **arguments)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    expected = model(x)
    monkeypatch.undo()
    if convert:
        spot_vit.sparsify_attention(model, 0.3)
    classes = [type(m) for m in model.modules()]
    with record_operands(model) as operands, dense_attention(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert [type(m) for m in model.modules()] == classes
    assert sorted(operands) == list(range(len(model.blocks)))
    for (q, k, scale), found in zip(calls, operands.values(), strict=False):
        torch.testing.assert_close(found.q.transpose(1, 2), q, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.k.transpose(1, 2), k, rtol=0, atol=1e-10)
        assert found.scale == pytest.approx(scale)
        assert found.num_prefix == model.num_prefix_tokens


def test_operands_carry_gradients_and_follow_a_second_run():
    model = sparse().train()
    model.set_grad_checkpointing(True)
    with record_operands(model) as operands, dense_attention(model):
        out = model(picture(model))
        q, k, _, prefix = operands[2]
        spot_vit.learn_connectivity(model)
        approx = model.blocks[2].attn.connectivity.approx(q.detach()[:, prefix:], k.detach())
        (approx.square().sum() + out.sum()).backward()
    assert approx.shape == (3, 3, 16, 17)
    assert all(p.grad is not None for p in model.blocks[2].attn.connectivity.parameters())
    assert all(p.grad is None for p in model.blocks[1].attn.connectivity.parameters())
    model.zero_grad()
    with record_operands(model) as operands, dense_attention(model):
        model.set_grad_checkpointing(False)
        model(picture(model))
    operands[2].q.sum().backward()
    assert model.blocks[2].attn.qkv.weight.grad.abs().sum() > 0
    with torch.no_grad(), record_operands(model) as operands:
        model(picture(model))
    assert not operands[2].q.requires_grad


def test_predictors_train_at_their_own_rate():
    model = spot_vit.sparsify(sparse(), at=[1, 2])
    assert not any(p.requires_grad for one in predictors(model).values() for p in one.parameters())
    spot_vit.learn_connectivity(model)
    groups = {group["name"]: group for group in spot_vit.param_groups(model, lr=1e-3)}
    own = {id(p) for predictor in predictors(model).values() for p in predictor.parameters()}
    backbone = {id(p) for name in groups if "backbone" in name for p in groups[name]["params"]}
    predictor = {id(p) for name in groups if "predictor" in name for p in groups[name]["params"]}
    assert own <= predictor and not own & backbone


@pytest.mark.parametrize("backend", most_slow(["auto", "dense"]))
@pytest.mark.parametrize("variant", most_slow(["class token", "EVA-02", "LV-ViT"]))
@torch.no_grad()
def test_inference_compiles_in_one_graph(variant: str, backend: str):
    torch._dynamo.reset()
    model = sparse(variant, dtype=torch.float32, backend=backend)
    x = picture(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rate in (0.3, 0.5, 1.0, 0.5, 0.3, 1.0):
        spot_vit.set_keep(model, attention=rate)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3
    spot_vit.sparsify(spot_vit.set_keep(model, attention=0.3), keep=0.6, at=[1, 2])
    torch._dynamo.reset()
    inductor = variant == "class token"  # minutes for all
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if inductor else "aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", most_slow(["class token", "EVA-02", "LV-ViT"]))
def test_training_compiles_in_one_graph(variant: str):
    torch._dynamo.reset()
    model = sparse(variant, dtype=torch.float32)
    spot_vit.sparsify(model, keep=0.6, at=[1, 2]).train()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        out = compiled(picture(model, seed=seed), aux=True)
        (out.logits.sum() + sum(mask.sum() for mask in out.masks)).backward()
    assert backend.frame_count == 1
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".connectivity." in name), name


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("variant", ["class token", "EVA-02", "LV-ViT"])
def test_export_with_a_dynamic_batch(variant: str, spot: bool):
    model = sparse(variant, dtype=torch.float32)
    if spot:
        spot_vit.sparsify(model, keep=0.6, at=[1, 2, 3])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (picture(model),), dynamic_shapes=({0: batch},))
    x = picture(model, 9, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
@torch.no_grad()
def test_other_image_sizes_compile():
    torch._dynamo.reset()
    model = make(dtype=torch.float32, dynamic_img_size=True)
    spot_vit.sparsify_attention(model, 0.3)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for side in (64, 96):
        x = torch.randn(2, 3, side, side)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("size", [(64, 128), (128, 64), (32, 128)])
@torch.no_grad()
def test_the_image_says_how_patches_stand(size: tuple[int, int], spot: bool):
    model = build("class token", torch.float64, dynamic_img_size=True)
    spot_vit.sparsify_attention(model, 0.4)
    if spot:
        spot_vit.sparsify(model, keep=0.6, at=[1, 2])
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    found = model(x)
    grid = (size[0] // 16, size[1] // 16)
    for predictor in predictors(model).values():
        assert predictor.shown_grid == grid
        down, _ = predictor.weights(grid[0] * grid[1])
        image = predictor.proj_n[1:].mT.unflatten(1, (4, 4))[None]
        wide = torch.nn.functional.interpolate(image, size=grid, mode="bilinear")
        factor = grid[0] * grid[1] / 16
        torch.testing.assert_close(factor * down[1:], wide[0].flatten(1).mT, rtol=0, atol=1e-12)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), found)
    square = images(model)
    assert torch.equal(again(square), model(square))
    spot_vit.restore(model)
    assert not model.patch_embed._forward_pre_hooks
