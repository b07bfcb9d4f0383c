"""The methods beside SPOT's own: DynamicViT, EViT, random selection, and fused tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.config.methods import METHODS
from support.models import VARIANTS, build, images
from support.slow import most_slow
from torch import Tensor, nn

LEARNED = ("spot", "dynamicvit")
POOLED = [name for name in VARIANTS if name != "no pooling"]  # which returns all tokens
CLASS_TOKEN = [
    name for name, (_, arguments) in VARIANTS.items()
    if name in ("class token", "registers, LayerScale", "EVA-02", "DINOv3, registers", "BEiT",
                "rotary tables per block", "distilled")
]  # fmt: skip


def convert(variant: str = "class token", **config: Any) -> Any:
    return spot_vit.sparsify(build(variant, torch.float64), at=[1, 2, 3], **config)


@torch.no_grad()
@pytest.mark.parametrize("variant", POOLED)
@pytest.mark.parametrize("method", LEARNED)
def test_fused_tokens_masked_equal_compacted(variant: str, method: str):
    model = convert(variant, method=method, keep=0.6, soft="fuse")
    x = images(model)
    out = model(x, aux=True)
    assert out.tokens.shape[1] == model.num_prefix_tokens + out.index[-1].shape[1]
    torch.testing.assert_close(model(x, kept=out.index), out.logits, rtol=0, atol=1e-10)
    plain = spot_vit.restore(model)
    hard = spot_vit.sparsify(plain, at=[1, 2, 3], method=method, keep=0.6)
    assert not torch.allclose(hard(x, kept=out.index), out.logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", POOLED)
@pytest.mark.parametrize("method", LEARNED)
def test_fused_tokens_in_training_equal_compacted(variant: str, method: str):
    model = convert(variant, method=method, keep=0.6, soft="fuse")
    x = images(model)
    out = model(x, aux=True)
    model.train()
    masked = model(x, kept=out.index, aux=True)
    torch.testing.assert_close(masked.logits, out.logits, rtol=0, atol=1e-10)
    assert masked.tokens.shape[1] == model.num_prefix_tokens + masked.masks[0].shape[1]


def test_fused_token_is_the_weighted_mean_of_what_goes():
    model = convert(method="dynamicvit", keep=0.5, soft="fuse")
    x = images(model)
    seen: list[Tensor] = []
    model.blocks[1].norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.blocks[0].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        out = model(x, aux=True)
    before, after = seen[0], seen[1]
    gone = 1 - out.masks[0]
    weight = out.logp[0][..., 0].exp() * gone
    mean = (before[:, 1:] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(after[:, 1], mean)
    torch.testing.assert_close(after[:, 0], before[:, 0])


def test_fused_tokens_train_every_parameter():
    model = convert(method="spot", keep=0.6, soft="fuse").train()
    out = model(images(model, 8), aux=True)
    (out.logits.square().mean() + sum((m.mean() - 0.3) ** 2 for m in out.masks)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype):
    model = spot_vit.sparsify(build("EVA-02"), method=method, keep=0.6, at=[1, 2], soft="fuse")
    model = model.to(dtype)
    x = images(model)
    assert model(x).isfinite().all()
    model.train()(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class PlainEViT:
    """EViT on timm's VisionTransformer, stated without any of our operators."""

    def __init__(self, model: Any, keep: float, at: list[int], fuse: bool) -> None:
        self.model, self.keep, self.at, self.fuse = model, keep, at, fuse

    def __call__(self, image: Tensor) -> Tensor:
        model: Any = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
        for b, block in enumerate(model.blocks):
            attn, y = block.attn, block.norm1(x)
            batch, n, _ = y.shape
            qkv = attn.qkv(y).reshape(batch, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            p = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)
            x = x + attn.proj((p @ v).transpose(1, 2).flatten(2))
            if b in self.at:
                score = p[:, :, 0, 1:].mean(dim=1)
                order = score.argsort(dim=1, descending=True)
                keep = math.ceil(self.keep * (n - 1))
                stay = x[:, 1:].gather(1, order[:, :keep, None].expand(-1, -1, x.shape[2]))
                parts = [x[:, :1], stay]
                if self.fuse:
                    rest = order[:, keep:]
                    tokens = x[:, 1:].gather(1, rest[..., None].expand(-1, -1, x.shape[2]))
                    parts.append((tokens * score.gather(1, rest)[..., None]).sum(1, keepdim=True))
                x = torch.cat(parts, dim=1)
            x = x + block.mlp(block.norm2(x))
        return model.forward_head(model.norm(x))


@pytest.mark.parametrize("soft", [None, "none"])
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_evit_is_evit(keep: float, soft: str | None):
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected = PlainEViT(build(dtype=torch.float64), keep, [1, 2, 3], soft is None)(x)
    model = convert(method="evit", keep=keep, soft=soft)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=1e-10)

    def gradients(loss: Tensor, of: nn.Module) -> list[Tensor]:
        loss.square().sum().backward()
        return [p.grad for p in of.parameters()]

    plain = build(dtype=torch.float64).train()
    reference = gradients(PlainEViT(plain, keep, [1, 2, 3], soft is None)(x), plain)
    for found, other in zip(gradients(model(x), model), reference, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-7, atol=1e-9)


def test_evit_counts_as_published():
    """At 196 patches: ⌈.7·196⌉ = 138, then ⌈.7·139⌉ = 98 of 138 + 1, then ⌈.7·99⌉ = 70."""
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224", num_classes=2)
    spot_vit.sparsify(model, method="evit", keep=0.7)
    stages = spot_vit.TokenPass(model, torch.empty(1, 3, 224, 224, device="meta"))._stages
    assert [stage.num_keep for stage in stages.values()] == [138, 98, 70]


@torch.no_grad()
@pytest.mark.parametrize("variant", CLASS_TOKEN)
@pytest.mark.parametrize("soft", [None, "none"])
def test_evit_everywhere(variant: str, soft: str | None):
    model = convert(variant, method="evit", keep=0.6, soft=soft)
    x = images(model)
    out = model(x, aux=True)
    assert torch.equal(model(x), out.logits)
    torch.testing.assert_close(model(x, kept=out.index), out.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.train()(x), out.logits, rtol=0, atol=1e-12)
    model.eval()
    grid = out.masks[0].shape[1]
    for mask, index in zip(out.masks, out.index, strict=True):
        real = (index < grid).sum(dim=1)
        assert torch.equal(mask.sum(dim=1).long(), real)
    final, maps = model.forward_intermediates(x, output_fmt="NLC")
    assert torch.equal(final, out.tokens)
    assert {m.shape[1] for m in maps} == {grid}
    spot_vit.set_keep(model, 1.0)
    dense = build(variant, torch.float64)
    assert torch.equal(model(x), dense(x))


@torch.no_grad()
def test_evit_pools_over_patches_alone():
    """With average pooling the fused token is left out."""
    name, arguments = VARIANTS["avg"]
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **arguments, class_token=True).double().eval()
    spot_vit.sparsify(model, method="evit", keep=0.5, at=[2])
    x = images(model)
    out = model(x, aux=True)
    assert out.tokens.shape[1] == 1 + 1 + 8
    patches = out.tokens[:, -8:]
    expected = model.head(model.fc_norm(patches.mean(dim=1)))
    torch.testing.assert_close(out.logits, expected)


def test_random_selection():
    model = convert(method="random", keep=0.5)
    assert not [name for name, _ in model.named_parameters() if "relevance" in name]
    x = images(model, 4)
    torch.manual_seed(0)
    first = model(x, aux=True)
    second = model(x, aux=True)
    assert [index.shape[1] for index in first.index] == [8, 4, 2]
    assert not torch.equal(first.index[0], second.index[0])
    torch.manual_seed(0)
    assert torch.equal(model(x), first.logits)
    model.train()
    out = model(x, aux=True)
    assert [index.shape[1] for index in out.index] == [8, 4, 2]
    out.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    counts = torch.stack([model(x, aux=True).masks[0] for _ in range(300)]).mean(dim=(0, 1))
    assert ((counts - 0.5).abs() < 0.1).all()  # every patch has its chance


def test_dynamicvit_has_dynamicvits_predictor():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    spot_vit.sparsify(model, method="dynamicvit")
    predictors = [block.relevance for block in model.blocks if block.relevance is not None]
    sizes = [sum(p.numel() for p in predictor.parameters()) for predictor in predictors]
    assert sizes == [241_250] * 3
    assert [block.stage for block in model.blocks] == [
        None, None, None, 0, None, None, 1, None, None, 2, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("method", most_slow(METHODS, 3))
@pytest.mark.parametrize("variant", most_slow(["class token", "EVA-02"]))
def test_methods_compile_and_checkpoint(variant: str, method: str):
    torch._dynamo.reset()
    model = spot_vit.sparsify(build(variant), method=method, keep=0.6, at=[1, 2], soft="fuse")
    x = images(model)
    with torch.no_grad():
        kept = model(x, aux=True).index
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, kept=kept), model(x, kept=kept))
    model.train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        model(x).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_refused():
    model = build("max, no class token")
    with pytest.raises(ValueError, match="has no class token"):
        spot_vit.sparsify(model, method="evit")
    assert type(model) is timm.models.VisionTransformer
    with pytest.raises(ValueError, match="features are SPOT's"):
        spot_vit.sparsify(build(), method="evit", features=["cls"])
    with pytest.raises(ValueError, match="soft must be"):
        spot_vit.sparsify(build(), soft="merge")
    with pytest.raises(ValueError, match="method must be"):
        spot_vit.sparsify(build(), method="tome")


def test_naflex_refuses_patches():
    model = convert("NaFlex, avg", keep=0.5)
    with pytest.raises(TypeError, match="got dict"):
        model({"patches": torch.randn(1, 4, 768)})
    with pytest.raises(TypeError, match=r"got a tensor of shape \[1, 4, 768\]"):
        model(torch.randn(1, 4, 768))
