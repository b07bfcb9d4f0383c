"""Where the time goes: every part of a pass is in it once, with its multiply-accumulates."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from spot_vit.bench import layers as module
from spot_vit.bench.layers import layer_times
from spot_vit.measure.flops import count_flops
from spot_vit.models.fast import fast
from spot_vit.models.fast_plan import BlockPlan
from spot_vit.utils.errors import UserError
from support.exported import small
from support.models import build

IMAGES = torch.randn(2, 3, 64, 64)


def names(parts: list[dict[str, Any]]) -> list[str]:
    return [f"{part['layer']} {part['part']}".strip() for part in parts]


def test_parts_of_a_pass_in_order() -> None:
    found = layer_times({"dense": build(depth=2), "sparse": small("both")}, IMAGES)
    block = "blocks.0 attention", "blocks.0 mlp", "blocks.1 attention", "blocks.1 mlp"
    assert names(found["dense"]) == ["stem", *block, "head"]
    assert names(found["sparse"]) == [
        "stem", "blocks.0 attention", "blocks.0 mlp",
        "blocks.1 decision", "blocks.1 attention", "blocks.1 mlp",
        "blocks.2 decision", "blocks.2 attention", "blocks.2 mlp", "head",
    ]  # fmt: skip
    for parts in found.values():
        assert sum(part["share"] for part in parts) == pytest.approx(1)
        assert all(part["ms"] > 0 for part in parts)
        one = parts[1]
        assert one["gmacs_per_s"] == pytest.approx(2 * one["gmacs"] / one["ms"] * 1e3)


@pytest.mark.parametrize("kind", ["dense", "spot", "dynamicvit", "evit", "both", "fuse"])
@pytest.mark.parametrize("quick", [False, True], ids=["eager", "fast"])
def test_no_part_is_lost(kind: str, quick: bool) -> None:
    """All multiply-accumulates are there, and the model gives what it gave before and after."""
    model = small(kind)
    if quick:
        fast(model)
    with torch.inference_mode():
        before = model(IMAGES)
        parts = layer_times({"model": model}, IMAGES)["model"]
        assert torch.equal(model(IMAGES), before)
    total = count_flops(model, (3, 64, 64)).total
    assert sum(part["gmacs"] for part in parts) == pytest.approx(total / 1e9)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.blocks.modules())


@pytest.mark.parametrize("variant", ["EVA-02", "BEiT", "norms after the branches"])
def test_other_blocks(variant: str) -> None:
    model = build(variant, depth=2)
    size = model.patch_embed.img_size
    found = layer_times({"model": model}, torch.randn(1, 3, *size))["model"]
    assert names(found)[1:-1] == [f"blocks.{b} {p}" for b in (0, 1) for p in ("attention", "mlp")]


def test_hooks_leave_a_fast_model_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks follow their plans while they are watched, and the last computes no patch tokens."""
    model = fast(small("spot"))
    seen: list[tuple[int, ...]] = []
    mix = BlockPlan.mix

    def noted(plan: BlockPlan, x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return mix(plan, x)

    monkeypatch.setattr(BlockPlan, "mix", noted)
    with torch.inference_mode():
        layer_times({"model": model}, IMAGES)
    depth = len(model.blocks)
    assert len(seen) % depth == 0 and len(seen) >= 2 * depth
    assert {shape[1] for shape in seen[depth - 1 :: depth]} == {1}  # the class token


def test_time_is_that_of_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only a slow MLP moves."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    model = build(depth=2)

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now[0] += 0.25
            return x

    model.blocks[1].mlp = Slow()
    watch = module._Watch(model)
    with watch:
        model(IMAGES)
    assert {part: sum(s) for part, s in watch.seconds.items() if sum(s)} == {
        ("blocks.1", "mlp"): 0.25
    }


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="a ResNet has no blocks to tell apart"):
        layer_times({"model": timm.create_model("resnet18")}, IMAGES)
