"""A model spread over the processes of a run, and its state as one process would have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from spot_vit.runs.processes import Processes
from spot_vit.utils.modes import unwrap
from spot_vit.utils.places import blocks_in

FSDP = "fsdp"


def spread(model: Any, processes: Processes, how: str, static_graph: bool = False) -> nn.Module:
    """The model in DistributedDataParallel, or sharded in place by FSDP2, a block a unit.

    Args:
        model: on its device; of one process it stays as it is under "ddp".
        processes: of the run.
        how: "ddp" or "fsdp".
        static_graph: tell DistributedDataParallel that every step uses the same parameters.
    """
    if how == FSDP:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for block in blocks_in(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if processes.world == 1:
        return model
    devices = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, static_graph=static_graph)


def model_state(model: nn.Module, sharded: bool) -> dict[str, Any]:
    """Weights by their names in the model inside; of a sharded one whole, on the first process."""
    if not sharded:
        return unwrap(model).state_dict()
    return get_model_state_dict(model, options=_whole())


def load_model_state(model: nn.Module, state: dict[str, Any], sharded: bool) -> None:
    """Loads what `model_state` gave."""
    if sharded:
        set_model_state_dict(model, state, options=_whole())
    else:
        unwrap(model).load_state_dict(state)


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool
) -> dict[str, Any]:
    """State of the optimiser; of a sharded model whole, on the first process."""
    if not sharded:
        return optimizer.state_dict()
    return get_optimizer_state_dict(model, optimizer, options=_whole())


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], sharded: bool
) -> None:
    """Loads what `optimizer_state` gave."""
    if sharded:
        set_optimizer_state_dict(model, optimizer, state, options=_whole())
    else:
        optimizer.load_state_dict(state)


def _whole() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)
