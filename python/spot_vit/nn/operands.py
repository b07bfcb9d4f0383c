"""Operands of attention maps, q and k, as a forward pass may note them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """What a block's attention map is made of: softmax(scale * q k^T), without masks.

    Attributes:
        q: [B, N, H, D] after qk norm and rotary embedding, before `scale`.
        k: [B, N, H, D] likewise, repeated where heads share keys.
        scale: of the logits.
        num_prefix: P, leading tokens whose queries are dense.
    """

    q: Tensor
    k: Tensor
    scale: float
    num_prefix: int


class Recorder:
    """Notes the operands of one block in a dictionary; a block that is run again overwrites."""

    def __init__(self, block: int, num_prefix: int, operands: dict[int, Operands]) -> None:
        self.block, self.num_prefix, self.operands = block, num_prefix, operands

    def __call__(self, q: Tensor, k: Tensor, num_prefix: int, scale: float) -> None:
        """Notes what the block's attention calls it with."""
        self.operands[self.block] = Operands(q, k, scale, num_prefix)
