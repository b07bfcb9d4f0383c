"""What each of two processes does in the tests of `TrainStep`; importable by both."""

from __future__ import annotations

import math
from typing import Any

import torch
from spot_vit.training.step import NonFiniteStep, TrainStep
from support.ranks import batch, converted
from support.sharded import _shard, _shard_flat
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

RUNS = [
    ("DDP", "norm", 0.05),
    ("DDP", "agc", 0.01),
    ("DDP static", "norm", 0.05),
    ("DDP unused", "value", 1e-3),
    ("FSDP2", "norm", 0.05),
    ("FSDP2", "value", 1e-3),
    ("FSDP1", "norm", 0.05),
]
"""Wrapper, and how gradients are clipped."""


def objective(model: Any, x: Tensor, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that every parameter has a part in, and a term that differs from image to image."""
    out = model(x, aux=True)
    size = out.logits.square().mean()
    return size + out.tokens.square().mean(), {"size": size.detach()}


def run(
    model: Any, batches: list[Any], clip: str = "norm", clip_grad: float = math.inf, **options: Any
) -> list[dict[str, float]]:
    """What three steps of SGD with momentum return."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9
    )
    step = TrainStep(model, optimizer, objective, clip_mode=clip, clip_grad=clip_grad, **options)
    return [step(batches) for _ in range(3)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by their names in the model inside, whole."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return _named(model)
    return _named(model)


def _named(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
        found[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return found


def spread(model: Any, how: str) -> Any:
    """The model in a wrapper for two processes."""
    if how == "FSDP2":
        return _shard(model, init_device_mesh("cpu", (2,)), MixedPrecisionPolicy())
    if how == "FSDP1":
        return _shard_flat(model.float())
    return DistributedDataParallel(
        model, static_graph="static" in how, find_unused_parameters="unused" in how
    )


def both(rank: int) -> dict[str, Any]:
    """All that is asked of two processes."""
    return {"steps": _steps(rank), "trouble": _trouble(rank)}


def _steps(rank: int) -> dict[str, Any]:
    """Values and weights of three steps with two batches each, by run."""
    found = {}
    for how, clip, clip_grad in RUNS:
        model = spread(converted("spot"), how)
        x = batch(rank).to(next(iter(model.parameters())).dtype)
        values = run(model, [(x[:1], None), (x[1:], None)], clip, clip_grad)
        found[f"{how} {clip}"] = values, weights(model)
    return found


def _trouble(rank: int) -> dict[str, Any]:
    """What the first process does where the second one alone has a loss or gradient too large."""
    found: dict[str, Any] = {}
    for how in ("DDP", "FSDP2"):
        model = spread(converted("spot").float(), how)
        start = weights(model)
        bad = rank == 1

        def endless(model: Any, x: Tensor, target: Any, bad: bool = bad) -> Any:
            loss, terms = objective(model, x, target)
            return loss + (math.inf if bad else 0.0), terms  # its gradient is finite

        def steep(model: Any, x: Tensor, target: Any, bad: bool = bad) -> Any:
            loss, terms = objective(model, x, target)
            # Only scaled by 2^15 is this gradient too large for float32.
            return loss + ((loss - loss.detach()) * 1e36 if bad else 0.0), terms

        x = batch(rank).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        try:
            TrainStep(model, optimizer, endless)([(x, None)])
        except NonFiniteStep as error:
            found[f"{how} endless"] = error.values
        step = TrainStep(
            model,
            optimizer,
            steep,
            amp_dtype=torch.float16,
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**15),
        )
        step([(x, None)])
        assert step.scaler is not None
        unmoved = all(torch.equal(value, start[name]) for name, value in weights(model).items())
        found[f"{how} steep"] = step.skipped, step.scaler.get_scale(), unmoved
        step.objective = objective
        found[f"{how} after"] = step([(x, None)])["gradient_norm"], step.skipped
    distributed.barrier()
    return found
