"""What each of two processes does in the tests of accelerate; importable by both."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from spot_vit.models.loop import SpotOutput
from support.ranks import batch, converted, gradients, loss_of
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset


def prepared(rank: int, kinds: list[str]) -> dict[str, Any]:
    """Gradients of the first step, losses of three and what was gathered, by kind."""
    # The process group is there already; accelerate looks for what a launcher says.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    results = {}
    for kind in kinds:
        model: Any = converted(kind)
        optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
        loader: Any = DataLoader(TensorDataset(batch()), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses: list[float] = []
        first: dict[str, Any] = {}
        for step in range(3):
            for (x,) in loader:
                loss = loss_of(model, x, kind)
                optimizer.zero_grad()
                accelerator.backward(loss)
                if step == 0:
                    first = gradients(model)
                optimizer.step()
                losses.append(loss.item())
        names = {name.removeprefix("module."): value for name, value in first.items()}
        results[kind] = {"gradients": names, "losses": losses, **_gathered(accelerator, model, x)}
    return results


@torch.no_grad()
def _gathered(accelerator: Accelerator, model: Any, x: torch.Tensor) -> dict[str, Any]:
    model.eval()
    own = model(x) if not hasattr(model.module, "spot_config") else model(x, aux=True)
    if not isinstance(own, SpotOutput):
        return {"gathered": [accelerator.gather(own)]}
    everything = tree_map(accelerator.gather, own)
    assert isinstance(everything, SpotOutput)
    return {"gathered": [everything.logits, *everything.masks]}
