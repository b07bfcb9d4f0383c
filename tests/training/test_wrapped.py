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
from spot_vit.training.sparsifiner import (
    ReconstructionObjective,
    SparsifinerObjective,
    learn_connectivity,
)
from spot_vit.utils.modes import unwrap
from support.models import build
from support.slow import most_slow
from support.wrapped import WRAPPERS, wrapped

ROOT = Path(__file__).resolve().parents[2]
TRAINED = [kind for kind in WRAPPERS if kind != "EMA"]  # which is not trained itself


def sparse(spot: bool = True, on: bool = True) -> Any:
    torch.manual_seed(0)
    model = spot_vit.sparsify_attention(build(), 0.4, reduce_n=2, backend="sparse")
    learn_connectivity(model, on)
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


def run_ranks(script: str, folder: Path, *arguments: str) -> list[Any]:
    """What two processes saved, which run the script with rank, store and file."""
    path = [ROOT / "python", ROOT, ROOT / "tests", ROOT / "tests/training"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), folder / "store", folder / f"{rank}.pt",
             *arguments],
            env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_train_connectivity_as_one_does(tmp_path: Path) -> None:
    (gradients, weights), theirs = run_ranks(TWO_RANKS, tmp_path)
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


FINETUNED = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import spot_vit
from support.models import build
from spot_vit.training.sparsifiner import SparsifinerObjective
from test_wrapped import loader, sparse

torch.set_num_threads(1)
rank, store, path, how = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
inside = sparse(spot=False, on=how in ("on", "loop"))
model = DistributedDataParallel(inside)  # nothing is unused
batches = [(images[rank::2], labels[rank::2]) for images, labels in loader(3)]
own = 0.0 if how == "rests" else 0.002
if how == "loop":
    objective = SparsifinerObjective(build(), self_distillation=own)
    groups = spot_vit.param_groups(model, 1e-3, backbone_lr_scale=1.0, freeze_epochs=0,
                                   head="pretrained")
    spot_vit.fit(model, batches, torch.optim.AdamW(groups), objective)
else:
    spot_vit.finetune(model, batches, build(), lr=1e-3, self_distillation=own)
torch.save({name: p.detach() for name, p in inside.named_parameters()}, path)
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("how", most_slow(["rests", "off", "on", "loop"]))
def test_two_processes_finetune_as_one_does_with_nothing_unused(how: str, tmp_path: Path) -> None:
    """Predictors off or on before the wrapping; DDP averages theirs, or finetune does."""
    mine, theirs = run_ranks(FINETUNED, tmp_path, how)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    alone, start = sparse(spot=False), sparse(spot=False)
    # Reconstruction is a sum over images, and the mean over processes half of it.
    own = 0.0 if how == "rests" else 0.001
    spot_vit.finetune(alone, loader(3), build(), lr=1e-3, self_distillation=own)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(mine[name], parameter, rtol=2e-2, atol=3e-4, msg=name)
        moved = not torch.equal(mine[name], start.get_parameter(name))
        assert moved is not (name in ("cls_token", "pos_embed") or (
            how == "rests" and ".connectivity." in name)), name  # fmt: skip


def test_what_a_wrapped_model_cannot_do_is_refused_with_the_cure() -> None:
    images, target = loader(1)[0]
    objective = SparsifinerObjective(build(), self_distillation=0.1)
    with wrapped(sparse(spot=False, on=False), "DDP") as outside:
        with pytest.raises(ValueError, match=r"learn_connectivity: the model is wrapped"):
            learn_connectivity(outside)
        with pytest.raises(ValueError, match=r"learn_connectivity\(model\) before .* wrapped"):
            objective(outside, images, target)
        spot_vit.finetune(outside, loader(1), build(), self_distillation=0.1)
    with (
        wrapped(sparse(spot=False), "DDP") as outside,
        pytest.raises(ValueError, match=r"find_unused_parameters=True.* takes them for unused"),
    ):
        objective(outside, images, target)
