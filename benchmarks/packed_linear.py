"""Cases of `packed_linear`: the layers of a ViT-S block beside torch's, and what Inductor calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from spot_vit.utils.timing import Case, Side
from torch import Tensor

from spot_ext import pack_linear, packed_linear

PLAIN, FUSED = "F.linear and the rest", "mkldnn._linear_pointwise, packed"
BLOCKS = 12  # each with weights of its own, as in a model: more than second-level cache holds
ROWS = (1, 17, 68, 96, 138, 197, 544, 1576)
LAYERS = {  # in, out, activation, whether a residual follows
    "qkv": (384, 1152, "none", False),
    "proj": (384, 384, "none", True),
    "fc1": (384, 1536, "gelu", False),
    "fc2": (1536, 384, "none", True),
}


class Layer:
    """A layer of every block, with its input."""

    def __init__(self, name: str, rows: int, device: str) -> None:
        self.inputs, self.outputs, self.activation, self.adds = LAYERS[name]
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=draw, device=device)

        self.x = normal(1, rows, self.inputs)
        self.residual = normal(1, rows, self.outputs) if self.adds else None
        self.bias = normal(self.outputs)
        self.weights = [
            normal(self.outputs, self.inputs, scale=self.inputs**-0.5) for _ in range(BLOCKS)
        ]

    def ours(self) -> Side:
        """`packed_linear`."""
        packed = [pack_linear(weight) for weight in self.weights]
        rest = self.outputs, self.bias, self.residual, self.activation
        return lambda i: packed_linear(self.x, packed[i % BLOCKS], *rest)

    def plain(self) -> Side:
        """What a model runs in eager mode."""

        def side(i: int) -> Tensor:
            made = F.linear(self.x, self.weights[i % BLOCKS], self.bias)
            if self.activation == "gelu":
                made = F.gelu(made)
            return made if self.residual is None else made + self.residual

        return side

    def fused(self) -> Side:
        """As Inductor calls it when a model is frozen: the weight reordered, the rest attached."""
        ops, rows = torch.ops.mkldnn, self.x.shape[1]
        weights = [ops._reorder_linear_weight(weight, rows) for weight in self.weights]
        call = ops._linear_pointwise
        if self.residual is not None:
            return lambda i: call.binary(
                self.x, self.residual, weights[i % BLOCKS], self.bias, "add"
            )
        return lambda i: call(
            self.x, weights[i % BLOCKS], self.bias, self.activation, [],
            "none" if self.activation == "gelu" else "",
        )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """Where rows are few, torch's calls wait; where they are many, all do the same products."""
    if device != "cpu":
        return
    for name, (inputs, outputs, *_) in LAYERS.items():
        for rows in ROWS:
            layer = Layer(name, rows, device)
            bars = {PLAIN: 1.0, FUSED: 1.0 if rows < 500 else 0.95}
            moved = 4 * (inputs * outputs + rows * (inputs + outputs))
            others = {PLAIN: layer.plain(), FUSED: layer.fused()}
            yield Case(f"{name} [{rows},{inputs}] -> {outputs}", layer.ours(), others, bars, moved)
