"""The convolution that makes patches, as a product by a packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.nn.packed import Product, asks_gradient, product_of, serves, untracked
from spot_vit.nn.watch import tensor_state


class PackedPatches(nn.Conv2d):
    """An `nn.Conv2d` whose windows touch and do not overlap, in inference: the same values.

    Results lie in memory as tokens do, [B, rows, columns, channels], which is what a ViT makes of
    them next.

    Attributes:
        kind: who multiplies, as in `PackedLinear`; "plain" leaves the module as it was.
    """

    kind = "plain"

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out, H // kernel, W // kernel]."""
        weight = self.weight
        here = self.kind != "plain" and weight.is_cpu and input.dim() == 4
        if not (here and serves(input, weight.dtype, asks_gradient(self))):
            return super().forward(input)
        (height, width), (down, across) = input.shape[2:], self.kernel_size
        rows, columns = height // down, width // across
        if not rows * columns:
            return super().forward(input)
        with untracked():
            return self._patches(input, rows, columns)

    def _patches(self, input: Tensor, rows: int, columns: int) -> Tensor:
        down, across = self.kernel_size
        cropped = input[:, :, : rows * down, : columns * across]
        windows = cropped.unflatten(3, (columns, across)).unflatten(2, (rows, down))
        patches = windows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self._product()(patches).transpose(1, 2).unflatten(2, (rows, columns))

    def _product(self) -> Product:
        state = tensor_state(self.weight), tensor_state(self.bias)
        found = self.__dict__.get("_plan")
        if found is None or found[0] != state:
            with torch.no_grad():
                product = product_of(self.kind, self.weight.detach().flatten(1), self.bias)
            found = self.__dict__["_plan"] = state, product
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


def makes_patches(conv: Any) -> bool:
    """Whether a convolution's windows touch and do not overlap."""
    same = tuple(conv.kernel_size) == tuple(conv.stride) and max(conv.kernel_size) > 1
    plain = tuple(conv.padding) == (0, 0) and tuple(conv.dilation) == (1, 1) and conv.groups == 1
    return same and plain
