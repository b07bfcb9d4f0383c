"""Calling a converted model in two steps, as timm's distillation task does."""

from __future__ import annotations

from typing import Any

import pytest
import spot_vit
import torch
from support.models import VARIANTS, build, build_lvvit, images

NO_CLASS_TOKEN = [
    "max, no class token",
    "map pooling (SigLIP)",
    "norms after the branches",
    "ViTamin",
    *(variant for variant in VARIANTS if "NaFlex" in variant),
    "grouped queries",
]
EVERY = [*VARIANTS, "LV-ViT"]
CASES = [(variant, "spot") for variant in EVERY]
CASES += [(variant, "evit") for variant in EVERY if variant not in NO_CLASS_TOKEN]


def convert(variant: str, **config: Any) -> Any:
    dense = build_lvvit(depth=5) if variant == "LV-ViT" else build(variant, torch.float64)
    return spot_vit.sparsify(dense, **{"keep": 0.5, "at": [1, 2, 3], **config})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("variant", "method"), CASES)
@torch.no_grad()
def test_two_steps_are_one(variant: str, method: str, training: bool):
    model = convert(variant, method=method).train(training)
    for module in model.modules():  # running statistics and dropped paths would differ
        if isinstance(module, torch.nn.BatchNorm2d) or "Drop" in type(module).__name__:
            module.eval()
    x = images(model)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), expected)
    before = model.forward_head(features, pre_logits=True)
    if variant not in ("LV-ViT", "distilled"):
        assert torch.equal(model.head(before), expected)


@pytest.mark.parametrize("variant", NO_CLASS_TOKEN)
def test_a_method_that_needs_a_class_token_says_so(variant: str):
    with pytest.raises(ValueError, match="has no class token"):
        convert(variant, method="evit")


@pytest.mark.parametrize("method", ["spot", "evit"])
def test_another_tensor_is_refused_where_a_mask_is_needed(method: str):
    model = convert("avg", method=method)
    model.train(method == "spot")
    features = model.forward_features(images(model))
    with pytest.raises(ValueError, match="the very tensor that forward_features returned"):
        model.forward_head(features + 0)
    model.eval()
    spot_vit.set_keep(model, 1.0)
    model.forward_head(model.forward_features(images(model)) + 0)  # all tokens count


@pytest.mark.parametrize("variant", ["avg", "map pooling (SigLIP)"])
def test_two_steps_are_one_where_they_are_compiled_together(variant: str):
    torch._dynamo.reset()
    model = convert(variant, train_decision="topk", noise=0.0).train()
    x = images(model)

    def two_steps(x: torch.Tensor) -> torch.Tensor:
        return model.forward_head(model.forward_features(x))

    compiled = torch.compile(two_steps, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_naflex_keeps_the_arguments_of_its_head():
    model = convert("NaFlex, avg")
    features = model.forward_features(images(model))
    assert model.forward_head(features, pre_logits=True, patch_valid=None).shape == (3, 48)
    with pytest.raises(TypeError, match="patch_valid is not supported"):
        model.forward_head(features, patch_valid=torch.ones(3, 16, dtype=torch.bool))


def test_timm_distills_features_of_a_pooled_student():
    task = pytest.importorskip("timm.task")
    student = convert("avg", train_decision="topk", noise=0.0).float()
    teacher = build("avg")
    torch.manual_seed(0)
    distill = task.FeatureDistillationTask(student, teacher, verbose=False).train()
    x = images(student)
    result = distill(x, torch.tensor([1, 2, 3]))
    expected = student(x)
    torch.testing.assert_close(result["output"], expected)
    result["loss"].backward()
