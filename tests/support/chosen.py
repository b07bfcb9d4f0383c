"""Which ops of `spot` a call runs, or a graph holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "spot":
            self.ops.append(func._schema.name.removeprefix("spot::"))
        return func(*args, **(kwargs or {}))


def ops_run(call: Callable[..., Any], *args: Any) -> list[str]:
    """Names of the ops of `spot` that `call(*args)` runs, in order."""
    with _Recorder() as recorder:
        call(*args)
    return recorder.ops


def ops_held(graph: torch.fx.Graph) -> list[str]:
    """Names of the ops of `spot` in a graph, in order."""
    return [
        str(node.target).split(".")[1]
        for node in graph.nodes
        if node.op == "call_function" and str(node.target).startswith("spot.")
    ]
