"""Two processes that train together, and what they must agree with: one that has both batches."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import spot_vit
import torch
from support.models import build, images
from torch import Tensor, distributed, multiprocessing

KINDS = ("spot", "dynamicvit", "evit", "random", "sparsifiner", "both")
"""What a model may be converted to: the methods, sparse attention, and both together."""

LEARNED = [kind for kind in KINDS if kind != "random"]  # which draws other tokens on each rank


def converted(kind: str, **config: Any) -> Any:
    """A small model of a kind, whose training draws nothing where its method allows."""
    model = build(dtype=torch.float64)
    if kind in ("sparsifiner", "both"):
        spot_vit.sparsify_attention(model, 0.5)
    if kind != "sparsifiner":
        method = "spot" if kind == "both" else kind
        given = {"keep": 0.6, "at": [1, 2, 3], "train_decision": "topk", "noise": 0.0, **config}
        spot_vit.sparsify(model, method=method, **given)
    return model.train()


def loss_of(model: Any, x: Tensor, kind: str) -> Tensor:
    """A loss that every trained parameter has a part in; of `model`, wrapped or not."""
    if kind == "sparsifiner":
        return model(x).square().mean()
    out = model(x, aux=True)
    return out.logits.float().square().mean() + out.tokens.float().square().mean()


def batch(rank: int | None = None) -> Tensor:
    """Images of one rank, or of both."""
    x = torch.cat([images(build(dtype=torch.float64), 2, seed=seed) for seed in (0, 1)])
    return x if rank is None else x[2 * rank : 2 * rank + 2]


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by name, sharded ones put together."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None and parameter.requires_grad:  # FSDP1 gives zeros to the others
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return found


@cache
def alone(kind: str) -> dict[str, Tensor]:
    """Gradients of one process that has the batches of both."""
    model = converted(kind)
    loss_of(model, batch(), kind).backward()
    return gradients(model)


def assert_as_alone(found: dict[str, Any]) -> None:
    """Gradients of two processes, by kind, are those of one; and they make the loss smaller."""
    for kind, one in found.items():
        expected = alone(kind)
        assert set(one["gradients"]) == set(expected), kind
        for name, value in expected.items():
            difference = (one["gradients"][name] - value).abs().max().item()
            assert difference <= 1e-9 * max(value.abs().max().item(), 1e-3), (kind, name)
        assert one["losses"][2] < one["losses"][0], kind


def together(worker: Callable[..., Any], *arguments: Any) -> Any:
    """Runs `worker(rank, *arguments)` in two processes, and gives what rank 0 returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results"
        multiprocessing.spawn(_rank, (port, worker, arguments, path), 2)
        return torch.load(path, weights_only=True)


def _rank(
    rank: int, port: int, worker: Callable[..., Any], arguments: tuple[Any, ...], path: Path
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        found = worker(rank, *arguments)
        if rank == 0:
            torch.save(found, path)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
