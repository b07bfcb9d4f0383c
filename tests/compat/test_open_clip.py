"""open_clip: a vision tower of timm is converted where it stands, as `visual.trunk`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from support.foreign import filled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

model_of = pytest.importorskip("open_clip.model")

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}


def build(dtype: torch.dtype = torch.float32) -> Any:
    vision = {
        "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear",
        "timm_model_pretrained": False, "image_size": 160,
    }  # fmt: skip
    return filled(model_of.CustomTextCLIP(24, vision_cfg=vision, text_cfg=TEXT), dtype)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def test_the_trunk_converts_inside_the_model(tmp_path: Path):
    model = build()
    x = images()
    text = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    expected, words = model.encode_image(x), model.encode_text(text)
    spot_vit.sparsify(model.visual.trunk, keep=1.0, at=[1, 2, 4])
    assert torch.equal(model.encode_image(x), expected)
    spot_vit.set_keep(model.visual.trunk, 0.5)
    sparse = model.encode_image(x)
    assert not torch.allclose(sparse, expected)
    assert torch.equal(model.encode_text(text), words)
    torch.save(model, tmp_path / "clip.pt")
    loaded = torch.load(tmp_path / "clip.pt", weights_only=False)
    assert torch.equal(loaded.encode_image(x), sparse)
    spot_vit.restore(model.visual.trunk)
    assert type(model.visual.trunk) is VisionTransformer
    assert torch.equal(model.encode_image(x), expected)


def test_training_reaches_the_trunk():
    model = build(torch.float64)
    trunk = spot_vit.sparsify(model.visual.trunk, keep=0.5, at=[1, 3])
    x = images(torch.float64)
    with torch.no_grad():
        index = trunk(x, aux=True).index
        expected = model.encode_image(x)
        masked = model.visual.head(trunk.train()(x, kept=index))
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-10)
    model.encode_image(x).square().mean().backward()
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, name


def test_towers_of_its_own_are_refused():
    own = model_of.CLIP(24, vision_cfg={
        "layers": 2, "width": 48, "head_width": 16, "patch_size": 16, "image_size": 160,
    }, text_cfg=TEXT)  # fmt: skip
    for part in (own, own.visual, build().visual):
        with pytest.raises(spot_vit.UnsupportedModelError, match="no adapter for this class"):
            spot_vit.sparsify(part)
