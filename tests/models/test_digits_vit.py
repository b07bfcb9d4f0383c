"""The demonstrations' ViT by name: timm builds, changes and reads it like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import spot_vit
import timm
import torch
from spot_vit.demos.setup import Recipe, build_dense


def test_it_is_timms_like_any_other() -> None:
    assert "digits_vit" in timm.list_models("digits*")
    model: Any = timm.create_model("digits_vit").eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (1, 64, 64) and config["mean"] == (0.0,)
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 10)
    other: Any = timm.create_model("digits_vit", num_classes=4, in_chans=3, img_size=96, depth=2)
    assert other(torch.rand(2, 3, 96, 96)).shape == (2, 4)
    features = timm.create_model("digits_vit", features_only=True, out_indices=(0, 5))
    assert [tuple(map_.shape) for map_ in features(torch.rand(1, 1, 64, 64))] == [(1, 96, 8, 8)] * 2


def test_it_is_the_demonstrations_dense_model() -> None:
    torch.manual_seed(0)
    named = timm.create_model("digits_vit").state_dict()
    torch.manual_seed(0)
    built = build_dense(Recipe()).state_dict()
    assert named.keys() == built.keys()
    assert all(torch.equal(named[name], value) for name, value in built.items())
    assert named["patch_embed.proj.6.weight"].shape == (96, 48, 3, 3)


def test_weights_of_one_size_load_into_another(tmp_path: Path) -> None:
    model, file = timm.create_model("digits_vit", depth=2), tmp_path / "x.safetensors"
    spot_vit.save_checkpoint(file, model)
    overlay = {"file": str(file)}
    larger: Any = timm.create_model(
        "digits_vit",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        depth=2,
        img_size=96,
        in_chans=3,
        num_classes=4,
    )
    assert larger.pos_embed.shape == (1, 145, 96)
    assert torch.equal(larger.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    stem = larger.patch_embed.proj[0].weight  # the weights of grey images, spread over colours
    torch.testing.assert_close(stem.sum(1, keepdim=True), model.patch_embed.proj[0].weight)
