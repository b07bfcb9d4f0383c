"""What each of two processes does in the tests of FSDP and DDP; importable by both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from spot_vit.utils.modes import unwrap
from support.ranks import batch, converted, gradients, loss_of
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel


def checkpoint_blocks(model: Any) -> None:
    """Puts every block in PyTorch's wrapper for activation checkpointing."""
    blocks = set(model.blocks)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: m in blocks
    )


def fsdp(rank: int, runs: list[tuple[str, list[str], str, str]]) -> dict[str, Any]:
    """Gradients of the first step and losses of three; runs are (API, kinds, precision, wrapping).

    The API is "FSDP2" (`fully_shard`) or "FSDP1", with every block a unit.
    """
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for run in runs:
        api, kinds, precision, checkpoint = run
        policy = MixedPrecisionPolicy()
        if precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        wrap = partial(_shard, mesh=mesh, policy=policy) if api == "FSDP2" else _shard_flat
        results[" ".join((api, precision, checkpoint))] = _train(
            rank, kinds, checkpoint, wrap, precision
        )
    return results


def _shard(model: Any, mesh: Any, policy: MixedPrecisionPolicy) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _shard_flat(model: Any) -> Any:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(unwrap(block)) for block in model.blocks}),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def data_parallel(rank: int, kinds: list[str]) -> dict[str, Any]:
    """The same with DDP, which is told of no unused parameters, by graph and wrapping."""
    return {
        f"{'static' if static else 'dynamic'} {checkpoint}": _train(
            rank, kinds, checkpoint, partial(DistributedDataParallel, static_graph=static)
        )
        for static in (False, True)
        for checkpoint in ("none", "model", "wrapper")
    }


def _train(
    rank: int,
    kinds: list[str],
    checkpoint: str,
    wrap: Callable[[Any], Any],
    precision: str = "full",
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in kinds:
        model = converted(kind)
        if precision == "bf16":
            model.float()
        if checkpoint == "model":
            model.set_grad_checkpointing()
        elif checkpoint == "wrapper":
            checkpoint_blocks(model)
        trained: nn.Module = wrap(model)
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 1e-3)
        x = batch(rank).to(next(iter(trained.parameters())).dtype)
        losses: list[float] = []
        first: dict[str, Tensor] = {}
        for step in range(3):
            loss = loss_of(trained, x, kind)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                first = _gradients(trained)
            optimizer.step()
            losses.append(loss.item())
        own = {_own_name(name): value for name, value in first.items()}
        results[kind] = {"gradients": own, "losses": losses}
    return results


def _gradients(model: Any) -> dict[str, Tensor]:
    if not isinstance(model, FullyShardedDataParallel):
        return gradients(model)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return gradients(model)


def _own_name(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")
