"""Training and counting through the wrappers that people put around a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spot_vit
import torch
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.training.sparsifiner import ReconstructionObjective
from spot_vit.utils.modes import unwrap
from support.models import build
from support.wrapped import WRAPPERS, wrapped

ROOT = Path(__file__).resolve().parents[2]
TRAINED = [kind for kind in WRAPPERS if kind != "EMA"]  # which is not trained itself


def sparse(spot: bool = True) -> Any:
    torch.manual_seed(0)
    model = spot_vit.sparsify_attention(build(), 0.4, reduce_n=2, backend="sparse")
    return spot_vit.sparsify(model, keep=0.6, at=[1, 2], train_decision="topk") if spot else model


def loader(steps: int = 2) -> Any:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 64, 64), torch.randint(7, (4,))) for _ in range(steps)]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_counts_and_groups_are_those_of_the_model_inside(kind: str) -> None:
    model = sparse()
    expected = spot_vit.count_flops(model, (3, 64, 64))
    shapes = {g["name"]: len(g["params"]) for g in spot_vit.param_groups(model)}
    with wrapped(model, kind) as outside:
        assert spot_vit.count_flops(outside, (3, 64, 64)) == expected
        groups = spot_vit.param_groups(outside)
        assert {g["name"]: len(g["params"]) for g in groups} == shapes
        spot_vit.set_keep(outside, 0.5)
        assert unwrap(outside).spot_config.keep == 0.5
    frozen = {id(model.cls_token), id(model.pos_embed)}
    assert not any(id(p) in frozen for g in groups for p in g["params"])


@pytest.mark.parametrize("kind", TRAINED)
def test_a_wrapped_model_trains_as_the_bare_one(kind: str, fresh_compiler: None) -> None:
    bare, inside, teacher = sparse(), sparse(), build()
    for model in (bare, inside):
        with wrapped(model, kind if model is inside else "none") as outside:
            torch.manual_seed(2)
            spot_vit.train_connectivity(outside, loader(), lr=1e-2)
            with wrapped(teacher, "compiled") as frozen:
                spot_vit.finetune(outside, loader(), frozen, lr=1e-3)
    for (name, mine), theirs in zip(inside.named_parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    start = sparse()
    moved = [
        not torch.equal(a, b) for a, b in zip(bare.parameters(), start.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2


def test_tokens_of_a_wrapped_model_without_removal_are_seen() -> None:
    bare, inside = sparse(spot=False), sparse(spot=False)
    bare_loss = spot_vit.finetune(bare, loader(), build(), lr=1e-3)["mse"]
    with wrapped(inside, "DDP") as outside:
        assert spot_vit.finetune(outside, loader(), build(), lr=1e-3)["mse"] == bare_loss > 0


TWO_RANKS = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import spot_vit
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.training.sparsifiner import ReconstructionObjective, _average_gradients
from test_wrapped import loader, sparse

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
model = DistributedDataParallel(sparse(), find_unused_parameters=True)
batches = [(images[rank::2], labels[rank::2]) for images, labels in loader()]
own = predictor_parameters(model.module)
loss, _ = ReconstructionObjective()(model, *batches[0])
loss.backward()
_average_gradients(model, list(own.values()))
gradients = {name: p.grad.clone() for name, p in own.items() if p.grad is not None}
spot_vit.train_connectivity(model, batches, lr=1e-2)
torch.save([gradients, {name: p.detach() for name, p in own.items()}], sys.argv[3])
distributed.destroy_process_group()
"""


def test_two_processes_train_connectivity_as_one_does(tmp_path: Path) -> None:
    path = [ROOT / "python", ROOT, ROOT / "tests", ROOT / "tests/training"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                TWO_RANKS,
                str(rank),
                str(tmp_path / "store"),
                str(tmp_path / f"{rank}.pt"),
            ],
            env=environment,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    (gradients, weights), theirs = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    for mine, other in zip((gradients, weights), theirs, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    model = sparse()
    loss, _ = ReconstructionObjective()(model, *loader()[0])
    loss.backward()
    own = predictor_parameters(model, ConnectivityPredictor)
    assert set(own) == set(gradients)
    for name, parameter in own.items():  # the loss is a sum over images
        torch.testing.assert_close(2 * gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
        assert not torch.equal(weights[name], parameter), name
