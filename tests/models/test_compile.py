"""torch.compile and torch.export of converted models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import spot_vit
import timm
import torch
from support.models import build, images
from support.slow import most_slow
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

MODELS = ["class token", "EVA-02", "LV-ViT"]


def make(which: str, **config: Any) -> Any:
    torch._dynamo.reset()
    if which == "LV-ViT":
        model: Any = timm.create_model(
            "lvvit_tiny", img_size=64, embed_dim=48, depth=5, num_heads=3, num_classes=7
        ).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    else:
        model = build(which)
    return spot_vit.sparsify(model, **{"keep": 0.6, "at": [1, 2], **config})


@pytest.mark.parametrize("which", most_slow(MODELS))
def test_inference_compiles_in_one_graph(which: str):
    model = make(which)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decision", ["gumbel", "topk"])
@pytest.mark.parametrize("which", most_slow(MODELS))
def test_training_compiles_in_one_graph(which: str, decision: str):
    model = make(which, train_decision=decision).train()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        out = compiled(images(model, seed=seed), aux=True)
        (out.logits.sum() + sum(mask.sum() for mask in out.masks)).backward()
    assert backend.frame_count == 1
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("which", most_slow(MODELS))
@torch.no_grad()
def test_three_budgets_compile_three_times(which: str):
    model = make(which)
    x = images(model)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for keep in (0.3, 0.5, 0.7, 0.5, 0.3, 0.7, 0.3):
        spot_vit.set_keep(model, keep)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert backend.frame_count <= 3


BUDGETS = [0.3, 0.35, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0]  # torch gives up after 8


@pytest.mark.parametrize(
    ("which", "method"),
    most_slow([("class token", "spot"), ("class token", "evit"), ("LV-ViT", "dynamicvit")]),
)
@torch.no_grad()
def test_any_number_of_budgets_compiles_a_few_graphs(which: str, method: str):
    """Of 16 patches: first a graph of numbers, then of symbols, and those for 1 and for all."""
    model = make(which, method=method)
    eager = copy.deepcopy(model)
    x = images(model)
    backend = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=backend)
    for keep in BUDGETS:
        spot_vit.set_keep(model, keep)
        spot_vit.set_keep(eager, keep)
        torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-4)
    assert backend.frame_count <= 4
    graphs = backend.frame_count
    for keep in (0.33, 0.57, 0.81):
        spot_vit.set_keep(model, keep)
        model(x)
    assert backend.frame_count == graphs
    assert copy.deepcopy(model)(x).shape == eager(x).shape


@pytest.mark.parametrize("soft", [None, "fuse"])
@pytest.mark.parametrize("decision", ["gumbel", "topk"])
def test_training_at_any_budget_and_noise_is_one_graph(decision: str, soft: str | None):
    model = make("class token", train_decision=decision, soft=soft).train()
    x = images(model)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    noise = spot_vit.NoiseSchedule(len(BUDGETS))
    for keep in BUDGETS[:-1]:
        spot_vit.set_keep(model, keep)
        with noise(model):
            out = compiled(x, aux=True)
        (out.logits.sum() + sum(mask.sum() for mask in out.masks)).backward()
        if decision == "topk":
            counts = [16 * r.numerator // r.denominator for r in model.spot_config.ratios(2)]
            assert [mask.sum(dim=1).tolist() for mask in out.masks] == [[n] * 3 for n in counts]
    assert backend.frame_count == 1


@torch.no_grad()
def test_other_batch_sizes_compile_nothing():
    model = make("class token")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    compiled(images(model, 2))
    graphs = backend.frame_count
    for batch in (5, 3, 7):
        x = images(model, batch)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert backend.frame_count == graphs


@pytest.mark.parametrize("which", MODELS)
def test_export_with_a_dynamic_batch(which: str):
    model = make(which, at=[1, 2, 3])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(model),), dynamic_shapes=({0: batch},))
    x = images(model, 9, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
