"""Accelerate: training in two processes, gathering, and weights that are kept elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import AlignDevicesHook  # noqa: E402
from spot_vit.nn.predictor import Predictor, predictors_in  # noqa: E402
from support.accelerated import prepared  # noqa: E402
from support.models import images  # noqa: E402
from support.ranks import KINDS, LEARNED, assert_as_alone, converted, together  # noqa: E402
from torch import nn  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results() -> Any:
    return together(prepared, LEARNED)


@pytest.mark.slow
def test_prepared_models_train_as_one_process_does(results: Any):
    assert_as_alone(results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNED)
def test_outputs_of_all_processes_are_gathered(results: Any, kind: str):
    """`SpotOutput` is a pytree, so that `tree_map(accelerator.gather, out)` gives one of all."""
    gathered = results[kind]["gathered"]
    assert gathered[0].shape == (4, 7)
    assert len(gathered) == (1 if kind == "sparsifiner" else 4)
    assert not torch.equal(gathered[0][:2], gathered[0][2:])


# ---- offloading ----------------------------------------------------------------------------------


def to_memory(model: Any, folder: Path) -> None:
    """Every layer, and every parameter that a module reads itself, from a state dict."""
    accelerate.cpu_offload(model, execution_device=CPU)


def to_files(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def blocks_as_one(model: Any, folder: Path) -> None:
    """Weights of a block come and go together."""
    names = [type(model.blocks[0]).__name__]
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=names)


def blocks_in_files(model: Any, folder: Path) -> None:
    rest = [name for name, _ in model.named_children() if name != "blocks"]
    device_map = dict.fromkeys([*rest, "cls_token", "pos_embed"], "cpu")
    device_map |= {f"blocks.{b}": "disk" for b in range(len(model.blocks))}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


def predictors_in_files(model: Any, folder: Path) -> None:
    """Hooks around predictors alone."""
    for name, predictor in predictors_in(model, Predictor).items():
        accelerate.disk_offload(predictor, str(folder / name), CPU)


WAYS = [to_memory, to_files, blocks_as_one, blocks_in_files, predictors_in_files]


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # parameters, not modules
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_offloaded_models_give_the_same(kind: str, way: Any, tmp_path: Path):
    model: Any = converted(kind).eval()
    x = images(model)
    torch.manual_seed(1)
    expected = model(x)
    way(model, tmp_path)
    away = [name for name, p in model.named_parameters() if p.is_meta]
    learned = any(".relevance." in name or ".connectivity." in name for name in away)
    assert learned == (kind not in ("evit", "random"))
    torch.manual_seed(1)
    assert (model(x) - expected).abs().max() < 1e-12
    assert [name for name, p in model.named_parameters() if p.is_meta] == away


@torch.no_grad()
def test_hooks_on_some_layers_of_a_predictor():
    """A layer whose weights are not there is called, and the others with it."""
    model: Any = converted("spot").eval()
    x = images(model)
    expected = model(x)
    layer: nn.Module = model.blocks[2].relevance.fc2
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    hook = AlignDevicesHook(execution_device=CPU, offload=True, weights_map=weights)
    accelerate.hooks.add_hook_to_module(layer, hook)
    assert layer.weight.is_meta
    assert (model(x) - expected).abs().max() < 1e-12


# ---- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spot", "evit", "both"])
def test_mixed_precision(kind: str):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model: Any = converted(kind).float()
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    x = images(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        logits = model(x)
        assert logits.dtype == torch.float32
        loss = logits.square().mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    inside = accelerator.unwrap_model(model)
    assert inside is not None and type(inside).__name__ == "SpotVisionTransformer"
