"""LoRA adapters of PEFT, in the backbone and in predictors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.models.sparsifiner import predictors
from spot_vit.training.sparsifiner import ReconstructionObjective
from support.models import images
from support.ranks import KINDS, LEARNED, converted
from torch import Tensor

peft = pytest.importorskip("peft")

PREDICTORS = {"spot": ["relevance"], "dynamicvit": ["relevance"], "both": ["relevance"]}
TARGETS = {"all": "all-linear", "fc": ["fc1", "fc2"], "qkv": ["qkv"]}


def adapted(kind: str, targets: str, **config: Any) -> Any:
    """A converted model with adapters that change what it computes."""
    torch.manual_seed(3)
    config = {"target_modules": TARGETS[targets], "r": 4, "init_lora_weights": False, **config}
    return peft.get_peft_model(converted(kind), peft.LoraConfig(**config))


def gradients(model: Any, x: Tensor) -> dict[str, Tensor | None]:
    """Of everything that asks for one, by name."""
    model.train()(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", LEARNED)
@torch.no_grad()
def test_merging_changes_nothing(kind: str, targets: str):
    model = adapted(kind, targets).eval()
    x = images(model)
    before = model(x)
    assert (before - converted(kind).eval()(x)).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert (merged(x) - before).abs().max() < 1e-12
    assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_learns(kind: str, targets: str):
    """But those of connectivity predictors, whose index has no gradient."""
    model = adapted(kind, targets)
    found = gradients(model, images(model))
    learning = {name: grad for name, grad in found.items() if ".connectivity." not in name}
    assert all(grad is not None and grad.any() for grad in learning.values())
    assert all(grad is None for name, grad in found.items() if name not in learning)
    if targets != "qkv" and kind in PREDICTORS:
        assert any(".relevance.fc1.lora_A" in name for name in learning)


@pytest.mark.parametrize("kind", ["sparsifiner", "both"])
def test_adapters_of_connectivity_predictors_learn_where_these_do(kind: str):
    model = adapted(kind, "all")
    loss, _ = ReconstructionObjective()(model, images(model), None)
    loss.backward()
    adapters = {
        name: p.grad
        for name, p in model.named_parameters()
        if ".connectivity." in name and "lora" in name
    }
    assert len(adapters) == 4 * len(predictors(model))
    assert all(grad is not None and grad.any() for grad in adapters.values())


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictors_train_whole_beside_adapters_of_the_backbone(kind: str, tmp_path: Path):
    model = adapted(kind, "qkv", modules_to_save=PREDICTORS[kind])
    x = images(model)
    found = gradients(model, x)
    whole = [name for name in found if ".relevance.modules_to_save." in name]
    assert len(whole) == len(list(converted(kind).blocks[1].relevance.parameters())) * 3
    assert all(grad is not None for grad in found.values())
    assert all(found[name].any() for name in whole if name.endswith("weight"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:
                parameter -= 0.1 * found[name]
        expected = model.eval()(x)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(converted(kind), tmp_path).eval()
        assert torch.equal(again(x), expected)
        assert (model.merge_and_unload()(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", LEARNED)
@torch.no_grad()
def test_adapters_are_read_back(kind: str, tmp_path: Path):
    model = adapted(kind, "all").eval()
    x = images(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(converted(kind), tmp_path).eval()
    assert torch.equal(again(x), model(x))
    with model.disable_adapter():
        assert (model(x) - converted(kind).eval()(x)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_what_asks_for_the_model_finds_it_inside(kind: str):
    dense = converted(kind)
    model = adapted(kind, "qkv", modules_to_save=PREDICTORS.get(kind))
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total / 2
    size = (3, 64, 64)
    assert spot_vit.count_flops(model, size).total > spot_vit.count_flops(dense, size).total
    grouped = [p for group in spot_vit.param_groups(model) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    change = {"attention": 0.3} if kind == "sparsifiner" else {"tokens": 0.5}
    before = spot_vit.count_flops(model, size).total
    assert spot_vit.count_flops(spot_vit.set_keep(model, **change), size).total < before
