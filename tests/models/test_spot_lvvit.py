"""LV-ViT made sparse, and SPOT models by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.models.named import NAMED
from support.models import build_lvvit as build
from support.published import inference, random_state
from torch import Tensor, nn

METHODS = [("spot", None), ("spot", "fuse"), ("dynamicvit", None), ("evit", None), ("evit", "none")]
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 7}


def convert(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    return spot_vit.sparsify(build(dtype=dtype, depth=5), at=[1, 2, 3], **config)


def images(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def masking(model: nn.Module) -> Any:
    """Training mode but for the stem, whose BatchNorm would see other statistics."""
    model.train()
    model.patch_embed.eval()
    return model


@pytest.mark.parametrize("method", ["spot", "dynamicvit", "evit"])
@torch.no_grad()
def test_keep_1_is_bit_exact(method: str):
    model = build(depth=5)
    x = images()
    expected, features = model(x), model.forward_features(x)
    keys = list(model.state_dict())
    spot_vit.sparsify(model, keep=1.0, method=method)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.forward_features(x), features)
    torch.testing.assert_close(model(x, aux=True).logits, expected, rtol=0, atol=1e-10)
    spot_vit.restore(model)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == keys
    assert type(model.blocks[0]) is spot_vit.models.lvvit.LVBlock


@pytest.mark.parametrize(("method", "soft"), METHODS)
@torch.no_grad()
def test_masked_training_equals_compacted_inference(method: str, soft: str | None):
    model = convert(method=method, soft=soft, keep=0.6)
    x = images()
    out = model(x, aux=True)
    torch.testing.assert_close(model(x, kept=out.index), out.logits, rtol=0, atol=1e-10)
    masked = masking(model)(x, kept=out.index, aux=True)
    torch.testing.assert_close(masked.logits, out.logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_60_wide_heads_of_the_tiny_model():
    model = build("lvvit_tiny", embed_dim=240, num_heads=4, depth=3)
    x = images()
    expected = model(x)
    spot_vit.sparsify(model, keep=1.0, at=[1, 2])
    torch.testing.assert_close(model(x, aux=True).logits, expected, rtol=0, atol=1e-10)
    spot_vit.set_keep(model, 0.5)
    out = model(x, aux=True)
    masked = masking(model)(x, kept=out.index)
    torch.testing.assert_close(masked, out.logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_auxiliary_head_sees_kept_patches_only():
    model = convert(keep=0.5)
    x = images()
    out = model(x, aux=True)
    assert out.tokens.shape[1] == 1 + 2
    dense = model.dense_logits(out.tokens).amax(dim=1)
    assert torch.equal(out.logits, model.head(out.tokens[:, 0]) + 0.5 * dense)

    masked = masking(model)(x, kept=out.index, aux=True)
    kept = masked.tokens[:, 1:].gather(1, out.index[-1][..., None].expand(-1, -1, 48))
    dense = model.aux_head(kept).amax(dim=1)
    torch.testing.assert_close(masked.logits, model.head(masked.tokens[:, 0]) + 0.5 * dense)
    over_all = model.logits(masked.tokens)
    assert not torch.allclose(masked.logits, over_all, atol=1e-3)
    nothing = masked.tokens.new_zeros(3, 16)
    assert torch.equal(model.logits(masked.tokens, nothing), over_all)


@torch.no_grad()
def test_dynamicvit_computes_what_was_published():
    state = random_state("lvvit", stages=3)
    model = timm.create_model("lvvit_small", **{**SMALL, "depth": 4}).double().eval()
    spot_vit.sparsify(model, method="dynamicvit", keep=0.7)
    spot_vit.convert_checkpoint({"model": state}, "dynamicvit", model)
    x = images()
    expected = inference(state, x, 3, skip_lam=2, at=(1, 2, 3), keep=(11, 7, 5))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("decision", ["gumbel", "topk"])
def test_training_reaches_every_parameter(decision: str):
    model = convert(keep=0.6, train_decision=decision).train()
    out = model(images(8), aux=True)
    (out.logits.square().mean() + sum((m.mean() - 0.3) ** 2 for m in out.masks)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_object_life_and_dense_maps():
    model = convert(torch.float32, keep=0.6)
    x = images(dtype=torch.float32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    final, maps = model.forward_intermediates(x)
    assert final.shape[1] == 1 + 3 and [tuple(m.shape) for m in maps] == [(3, 48, 4, 4)] * 5
    model.reset_classifier(4)
    assert model(x).shape == (3, 4)
    model.set_input_size(img_size=96)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 4)


def test_compile_and_export():
    torch._dynamo.reset()
    model = convert(torch.float32, keep=0.6)
    x = images(dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        y = torch.randn(5, 3, 64, 64)
        torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMED if name.startswith("spot_")])
def test_named_models(name: str):
    with torch.device("meta"):
        model = timm.create_model(name, keep=0.5, method="dynamicvit", num_classes=10)
        dense = timm.create_model(NAMED[name])
    depth = len(dense.blocks)
    assert model.spot_config.at == (depth // 4, depth // 2, 3 * depth // 4)
    assert (model.spot_config.keep, model.spot_config.method) == (0.5, "dynamicvit")
    assert model.num_classes == 10 and model.embed_dim == dense.embed_dim
    cfg, other = model.pretrained_cfg, dense.pretrained_cfg
    assert cfg["architecture"] == name and not (cfg.get("url") or cfg.get("hf_hub_id"))
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "first_conv"):
        assert cfg[key] == other[key], key


@pytest.mark.parametrize("name", ["spot_deit_tiny_patch16_224", "spot_lvvit_tiny"])
@torch.no_grad()
def test_named_models_as_feature_extractors(name: str):
    features = timm.create_model(name, keep=0.5, features_only=True, **SMALL).eval()
    assert isinstance(features.model, spot_vit.models.loop.SpotLoop)
    maps = features(images(dtype=torch.float32))
    assert [tuple(m.shape) for m in maps] == [(3, 48, 4, 4)] * 3


def test_named_models_refuse():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for spot_lvvit_tiny"):
        timm.create_model("spot_lvvit_tiny", pretrained=True)
    with pytest.raises(TypeError, match="keep_ratio"):
        timm.create_model("spot_deit_tiny_patch16_224", keep_ratio=0.5)
    with pytest.raises(ValueError, match="keep must be in"):
        timm.create_model("spot_lvvit_tiny", keep=2.0, **SMALL)
