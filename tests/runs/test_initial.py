"""Weights to start from: other sizes, other classes, other conversions, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spot_vit
import timm
import torch
from safetensors.torch import save_file
from spot_vit.runs.initial import initial_state
from spot_vit.utils.errors import UserError

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 8}


def model_of(name: str = "deit_tiny_patch16_224", **changes: Any) -> Any:
    return timm.create_model(name, **{**SMALL, "img_size": 32, "num_classes": 5, **changes})


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"init_values": 1e-2}),
    ],
)
def test_positions_of_another_size_are_resampled_as_timm_does(
    name: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    large = model_of(name, img_size=64, num_classes=0, **extra)
    torch.nn.init.normal_(large.pos_embed)
    path = tmp_path / "dense.safetensors"
    save_file(large.state_dict(), path)
    model = spot_vit.sparsify(model_of(name, **extra))
    before = model.head.weight.clone()
    state = initial_state(model, path)
    model.load_state_dict(state, strict=False)
    expected = timm.create_model(
        name, **{**SMALL, **extra}, img_size=32, num_classes=0, pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 0},
    )  # fmt: skip
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model.head.weight, before)


def test_a_converted_model_starts_another_with_other_classes(tmp_path: Path) -> None:
    first = spot_vit.sparsify(model_of(num_classes=7))
    spot_vit.save(tmp_path / "x.safetensors", first)
    second = spot_vit.sparsify(model_of())
    head = second.head.weight.clone()
    second.load_state_dict(initial_state(second, tmp_path / "x.safetensors"), strict=False)
    for name, value in second.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, first.state_dict()[name]), name
    assert torch.equal(second.head.weight, head)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"initial_checkpoint: there is no file nowhere\.pth"):
        initial_state(model_of(), "nowhere.pth")
    path = tmp_path / "x.pth"
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"initial_checkpoint: .*x\.pth was not read"):
        initial_state(model_of(), path)
    torch.save(model_of(embed_dim=96).state_dict(), path)
    with pytest.raises(UserError, match=r"x\.pth does not fit: .*is \(.*, the model has \("):
        initial_state(model_of(), path)
    torch.save(spot_vit.sparsify(model_of()).state_dict(), path)
    with pytest.raises(UserError, match=r"convert the model first"):
        initial_state(model_of(), path)
