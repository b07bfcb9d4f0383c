"""torchvision's VisionTransformer, converted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.training import checkpoint
from support import foreign
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

SIZES = {
    "image_size": 64, "patch_size": 16, "num_layers": 5, "num_heads": 3, "hidden_dim": 48,
    "mlp_dim": 96, "num_classes": 7,
}  # fmt: skip
STEM = [ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two heads": {"representation_size": 12},
    "convolutions": {"conv_stem_configs": [*STEM, ConvStemConfig(8, 3, 2)]},
}


def build(kind: str = "plain", dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    return foreign.filled(VisionTransformer(**{**SIZES, **KINDS[kind], **extra}), dtype)


def images(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def read(logits: Tensor) -> Tensor:
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_keep_1_is_bit_exact(kind: str):
    foreign.check_bit_exact(build(kind), images(), read)


def test_masked_training_equals_compacted_inference():
    foreign.check_masked_equals_compacted(build(dtype=torch.float64), images(torch.float64), read)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_parameter(kind: str):
    foreign.check_gradients(build(kind), images(batch=8))


def test_object_life(tmp_path: Path):
    foreign.check_object_life(build(), images(), read, tmp_path)


def test_sparse_attention_and_maps():
    foreign.check_sparse_attention(build(), images(), read)


def test_distillation():
    foreign.check_distillation(build(), images())


def test_compiled():
    foreign.check_compiled(build(), images(), read)


def test_budgets():
    foreign.check_budgets(build())


@pytest.mark.parametrize("method", ["spot", "dynamicvit", "evit", "random"])
@torch.no_grad()
def test_methods(method: str):
    model = spot_vit.sparsify(build(), method=method, keep=0.5, at=[1, 3])
    out = model(images(), aux=True)
    assert out.logits.shape == (3, 7) and out.logits.isfinite().all()
    assert [len(out.masks), len(out.index)] == [2, 2]


@torch.no_grad()
def test_the_class_tokens_attention_cuts_inside():
    """EViT's cut, held against its definition."""
    model = build(dtype=torch.float64)
    x = images(torch.float64)
    maps = spot_vit.attention_maps(model, x)
    spot_vit.sparsify(model, method="evit", keep=0.5, at=[2], soft="none")
    out = model(x, aux=True)
    score = maps[2].weights[:, :, 0, 1:].mean(dim=1)
    expected = score.topk(8, dim=1).indices.sort(dim=1).values
    assert torch.equal(out.index[0], expected)


@torch.no_grad()
def test_two_steps_and_dense_maps():
    model = spot_vit.sparsify(build(), keep=0.5, at=[1, 3])
    x = images()
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    features, maps = model.forward_intermediates(x, indices=[0, 4])
    assert features.shape == (3, 1 + 4, 48)
    assert [tuple(m.shape) for m in maps] == [(3, 48, 4, 4)] * 2


def test_groups_know_the_head_and_what_is_not_decayed():
    model = spot_vit.sparsify(build(), at=[1])
    groups = {group["name"]: group["params"] for group in spot_vit.param_groups(model)}
    assert {id(p) for p in groups["head"]} == {id(model.heads.head.weight)}
    still = {id(p) for p in groups["backbone_no_decay"]}
    assert {id(model.class_token), id(model.encoder.pos_embedding)} <= still


def test_checkpoints(tmp_path: Path):
    model = spot_vit.sparsify(build(), keep=0.5, at=[1, 3])
    checkpoint.save_checkpoint(tmp_path / "model.pt", model)
    other = spot_vit.sparsify(build(), keep=0.5, at=[1, 3])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    checkpoint.load_checkpoint(tmp_path / "model.pt", other)
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize(
    ("extra", "words"),
    [({"attention_dropout": 0.1}, "blocks.0.attn: .*attention dropout")],
)
def test_what_does_not_fit_is_refused(extra: dict[str, Any], words: str):
    model = build(**extra)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(spot_vit.UnsupportedModelError, match=words):
        spot_vit.sparsify(model)
    assert [type(module) for module in model.modules()] == classes


def test_subclasses():
    class Mine(VisionTransformer):
        def embed(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    class Other(VisionTransformer):
        def _process_input(self, x: Tensor) -> Tensor:
            return super()._process_input(2 * x)

    model = spot_vit.sparsify(foreign.filled(Mine(**SIZES)), keep=0.5, at=[1])
    with torch.no_grad():
        assert copy.deepcopy(model)(images()).shape == (3, 7)
    assert type(spot_vit.restore(model)) is Mine
    with pytest.raises(spot_vit.UnsupportedModelError, match="overrides _process_input"):
        spot_vit.sparsify(Other(**SIZES))


def test_attention_on_its_own_takes_one_sequence():
    model = spot_vit.sparsify_attention(build(), keep_rate=0.3)
    attention: nn.Module = model.encoder.layers[0].self_attention
    x = torch.randn(2, 17, 48)
    assert attention(x, x, x, need_weights=False)[0].shape == (2, 17, 48)
    with pytest.raises(ValueError, match="one sequence"):
        attention(x, x.clone(), x, need_weights=False)
    with pytest.raises(ValueError, match="attn_mask"):
        attention(x, x, x, need_weights=False, attn_mask=torch.zeros(17, 17))
