"""LV-ViT against a plain restatement of its published parts."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import spot_vit
import timm
import torch
import torch.nn.functional as F
from support.models import SMALL_LVVIT as SMALL
from support.models import build_lvvit as build
from support.published import inference


@pytest.mark.parametrize(("name", "skip_lam"), [("lvvit_tiny", 1.0), ("lvvit_medium", 2.0)])
@torch.no_grad()
def test_inference_is_the_published_one(name: str, skip_lam: float):
    model = build(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = inference(model.state_dict(), x, 3, skip_lam=skip_lam)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    other = inference(model.state_dict(), x, 3, skip_lam=3 - skip_lam)
    assert not torch.allclose(model(x), other, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "gmacs", "parameters", "sizes"),
    [
        ("lvvit_tiny", 2.87, 8.53, (12, 240, 4)),
        ("lvvit_small", 6.55, 26.15, (16, 384, 6)),
        ("lvvit_medium", 12.68, 55.83, (20, 512, 8)),
    ],
)
def test_sizes(name: str, gmacs: float, parameters: float, sizes: tuple[int, int, int]):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(spot_vit.count_flops(model, (3, 224, 224)).total / 1e9, 2) == gmacs
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == sizes
    assert model.blocks[0].attn.qkv.bias is None and model.blocks[0].norm1.eps == 1e-5


def test_training_gives_the_same_logits_and_reaches_every_parameter():
    model = build()
    model.patch_embed.eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    logits = model(x)
    model.blocks.train()
    assert torch.equal(model(x), logits)
    model.train()
    model(x).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@torch.no_grad()
def test_timm_interfaces():
    model = build(dtype=torch.float32)
    x = torch.randn(2, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    tokens = model.forward_features(x)
    assert model.dense_logits(tokens).shape == (2, 16, 7)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, tokens) and [tuple(m.shape) for m in maps] == [(2, 48, 4, 4)] * 3
    model.set_input_size(img_size=(96, 64))
    assert model(torch.randn(2, 3, 96, 64)).shape == (2, 7)
    model.reset_classifier(4)
    assert model(torch.randn(2, 3, 96, 64)).shape == (2, 4)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 96, 64)).shape == (2, 48)
    grey = timm.create_model("lvvit_tiny", in_chans=1, **SMALL).eval()
    assert grey(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    maps = timm.create_model("lvvit_tiny", features_only=True, **SMALL)(x)
    assert [tuple(m.shape) for m in maps] == [(2, 48, 4, 4)] * 3


@torch.no_grad()
def test_any_image_size():
    strict = build(dtype=torch.float32)
    model = build(dtype=torch.float32, dynamic_img_size=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), strict(x))
    assert model(torch.randn(1, 3, 96, 80)).shape == (1, 7)
    with pytest.raises(ValueError, match="not a multiple"):
        model(torch.randn(1, 3, 96, 81))
    padded = build(dtype=torch.float32, dynamic_img_size=True, dynamic_img_pad=True)
    torch.testing.assert_close(padded(x[..., 1:]), model(F.pad(x[..., 1:], (0, 1))))
    with pytest.raises(ValueError, match=r"64.*96"):
        strict(torch.randn(1, 3, 96, 96))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="skip_lambda"):
        timm.create_model("lvvit_tiny", skip_lambda=2)
    with pytest.raises(ValueError, match="global_pool"):
        timm.create_model("lvvit_tiny", global_pool="avg", **SMALL)
    with pytest.raises(ValueError, match="even"):
        timm.create_model("lvvit_tiny", patch_size=15, **SMALL)
    with pytest.raises(ValueError, match="patch_size"):
        build().set_input_size(patch_size=8)
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("lvvit_tiny", pretrained=True)


@pytest.mark.parametrize(
    "imports",
    [
        "import spot_vit, timm",
        "import timm, spot_vit",
        "import spot_vit.models.named, timm",
        # Libraries look whether timm is there without importing it.
        "import spot_vit, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_registered_in_any_order(imports: str):
    code = f"""
import sys
{imports}
print(*timm.list_models("lvvit_*"))
print(*(type(f).__name__ for f in sys.meta_path))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    names, finders = run.stdout.splitlines()
    assert names.split() == ["lvvit_medium", "lvvit_small", "lvvit_tiny"]
    assert "_WhenTimmIsImported" not in finders


def test_importing_spot_vit_imports_neither_torch_nor_timm():
    code = "import sys, spot_vit.cli.main; print({'torch', 'timm'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "set()"
