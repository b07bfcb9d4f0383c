"""Parameter groups: the rate of every parameter, by every scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import spot_vit
import timm
import torch
from spot_vit.training.fit import cosine_schedule, fit
from spot_vit.training.param_groups import param_groups
from support.models import SMALL, build, build_lvvit
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch import nn

PEAK = {"predictor": 1e-3, "head": 1e-3, "backbone": 1e-5}


def model(**extra: Any) -> Any:
    return spot_vit.sparsify(build(**extra), keep=0.7, at=[1, 2])


def rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in groups}


def by_parameter(net: nn.Module, groups: list[dict[str, Any]], key: str = "lr") -> dict[str, float]:
    of = {id(p): group[key] for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in net.named_parameters() if id(p) in of}


def cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def test_every_scheduler_gives_every_group_its_rate_by_hand() -> None:
    """The backbone's rate is lr * backbone_lr_scale, scaled once."""
    steps = 10

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups(model(), freeze_epochs=0))

    by_timm, by_torch, by_us = optimizer(), optimizer(), optimizer()
    timms = CosineLRScheduler(by_timm, t_initial=steps)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(by_torch, T_max=steps)
    ours = cosine_schedule(by_us, steps)
    for step in range(1, steps):
        timms.step(step)
        for optim, schedule in ((by_torch, torchs), (by_us, ours)):
            optim.step()
            schedule.step()
        for optim in (by_timm, by_torch, by_us):
            for group in optim.param_groups:
                peak = PEAK[group["name"].removesuffix("_no_decay")]
                assert group["lr"] == pytest.approx(peak * cosine(step, steps), rel=1e-9)


def test_a_timm_scheduler_that_warms_up_reaches_the_peak() -> None:
    optimizer = torch.optim.AdamW(param_groups(model(), lr=2e-3, backbone_lr_scale=0.5))
    scheduler = StepLRScheduler(
        optimizer, decay_t=3, decay_rate=0.1, warmup_t=2, warmup_lr_init=0.0
    )
    found = []
    for epoch in range(6):
        scheduler.step(epoch)
        found.append(rates(optimizer.param_groups))
    for name, peak in (("predictor", 2e-3), ("head", 2e-3), ("backbone", 1e-3)):
        expected = [0, peak / 2, peak, peak, peak, peak / 10]
        assert [rate[name] for rate in found] == pytest.approx(expected)


def test_fit_moves_every_parameter_at_its_rate() -> None:
    """Adam's first step is as long as the rate."""
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = param_groups(net, lr=1e-3, backbone_lr_scale=0.1, weight_decay=0.0, freeze_epochs=0)
    optimizer = torch.optim.AdamW(groups, eps=1e-16)
    fit(net, [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))], optimizer)
    moved = {n: (p - before[n]).abs().max().item() for n, p in net.named_parameters()}
    for name, rate in (
        ("blocks.1.relevance.fc1.weight", 1e-3),
        ("head.weight", 1e-3),
        ("blocks.0.mlp.fc1.weight", 1e-4),
    ):
        assert moved[name] == pytest.approx(rate, rel=0.02), name
    assert moved["cls_token"] == moved["pos_embed"] == 0


@pytest.mark.parametrize("variant", ["class token", "EVA-02", "BEiT", "NaFlex, avg"])
def test_layer_decay_is_timms_for_the_backbone_and_spares_what_is_new(variant: str) -> None:
    dense, net = build(variant), model(variant=variant)
    theirs = by_parameter(dense, param_groups_layer_decay(dense, layer_decay=0.75), "lr_scale")
    groups = param_groups(
        net, 1e-3, backbone_lr_scale=0.1, freeze_epochs=0, frozen=(), layer_decay=0.75
    )
    ours = by_parameter(net, groups)
    assert set(theirs) < set(ours)
    for name, rate in ours.items():
        new = ".relevance." in name or name.startswith("head.")
        scale = 1.0 if new else 0.1 * theirs[name]
        assert rate == pytest.approx(1e-3 * scale), name
    assert len({round(rate, 12) for rate in ours.values()}) > len(net.blocks)
    flat = by_parameter(net, param_groups(net, backbone_lr_scale=0.1, frozen=(), layer_decay=1.0))
    assert {round(rate, 12) for rate in flat.values()} == {1e-3, 1e-4}


def test_a_new_head_has_the_rate_of_predictors_from_the_first_step_on() -> None:
    for net, names in (
        (model(), {"head.weight", "head.bias"}),
        (model(variant="distilled"), {f"{m}.{p}" for m in ("head", "head_dist") for p in
                                      ("weight", "bias")}),
        (spot_vit.sparsify(build_lvvit(depth=5), at=[1, 2]),
         {f"{m}.{p}" for m in ("head", "aux_head") for p in ("weight", "bias")}),
    ):  # fmt: skip
        groups = {group["name"]: group for group in param_groups(net)}
        own = {
            name
            for name, p in net.named_parameters()
            if any(p is q for g in ("head", "head_no_decay") for q in groups[g]["params"])
        }
        assert own == names
        assert groups["head"]["lr"] == 1e-3 and groups["head"]["freeze_epochs"] == 0
        assert groups["head"]["weight_decay"] == 0.05
        assert groups["head_no_decay"]["weight_decay"] == 0
        assert groups["backbone"]["freeze_epochs"] == 5


def test_a_head_of_as_many_classes_as_the_weights_have_is_part_of_the_backbone() -> None:
    arguments = {**SMALL, "num_classes": 1000}
    net: Any = timm.create_model("vit_tiny_patch16_224", **arguments)
    assert "head" not in rates(param_groups(net))
    assert by_parameter(net, param_groups(net))["head.weight"] == pytest.approx(1e-5)
    assert by_parameter(net, param_groups(net, head="new"))["head.weight"] == 1e-3
    net.reset_classifier(3)
    assert by_parameter(net, param_groups(net))["head.weight"] == 1e-3
    assert by_parameter(net, param_groups(net, head="pretrained"))["head.weight"] == 1e-5
    headless = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0})
    assert set(rates(param_groups(headless))) == {"backbone", "backbone_no_decay"}


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="head must be one of"):
        param_groups(model(), head="old")
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\]"):
            param_groups(model(), layer_decay=wrong)
