"""Position tables of attention, rotary or added to the logits, and how they follow a cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PositionTables:
    """Position tables of the tokens of one pass; this class is for models without any."""

    tied = False  # whether attention depends on positions

    def at(self, position: Tensor, num_prefix: int, num_fused: int) -> PositionTables:
        """Tables after a cut; asked of the tables of the full grid.

        Args:
            position: [B, n] grid positions of the patch tokens; N and above are tokens of none.
            num_prefix: the model's own prefix tokens.
            num_fused: tokens between these and the patches, which have no position either.
        """
        return self

    def arguments(self, block: int) -> dict[str, Any]:
        """Keyword arguments of a block's forward method."""
        return {}

    def bias(self, table: Tensor) -> Tensor:
        """The part [1|B, H, n, n] of a full bias [1, H, P+N, P+N]; zero without a position."""
        return table


class RopeTables(PositionTables):
    """Rotary position embeddings.

    Args:
        rope: sine and cosine of the full grid: [N, 2D] for all blocks, or [L, H, N, 2D].
        mixed: whether there is a table for each block.
        position: as in `at`; None for the full grid.
    """

    tied = True

    def __init__(
        self, rope: Tensor | Sequence[Tensor], mixed: bool, position: Tensor | None = None
    ) -> None:
        self.rope, self.mixed, self.position = rope, mixed, position
        self._shared = None if mixed or position is None else _rows(rope, position).unsqueeze(1)

    def at(self, position: Tensor, num_prefix: int, num_fused: int) -> RopeTables:
        """Rows of the tables, gathered at once where all blocks share them."""
        return RopeTables(self.rope, self.mixed, position)

    def arguments(self, block: int) -> dict[str, Any]:
        """`rope`: [N, 2D] or [B, 1, n, 2D]; [H, N, 2D] or [B, H, n, 2D] with tables per block."""
        if self._shared is not None:
            return {"rope": self._shared}
        if not self.mixed:
            return {"rope": self.rope}
        table = self.rope[block]
        if self.position is not None:
            table = _rows(table, self.position).transpose(0, 1)
        return {"rope": table}


def _rows(table: Any, position: Tensor) -> Tensor:
    """Rows of a rotary table [..., N, 2D] at `position` [B, n]: [..., B, n, 2D]."""
    half, grid = table.shape[-1] // 2, table.shape[-2]
    nowhere = torch.cat([table.new_zeros(half), table.new_ones(half)])  # rotates by nothing
    padded = torch.cat([table, nowhere.expand(*table.shape[:-2], 1, -1)], dim=-2)
    return padded[..., position.clamp(max=grid), :]


class BiasTables(PositionTables):
    """Relative position bias: a table for pairs of tokens of the full grid.

    Args:
        shared: [H, P+N, P+N] bias that all blocks share, or None.
        rows: [B, n] rows of the tokens in such a table, P+N and above for tokens of no position;
            None for all.
    """

    tied = True

    def __init__(self, shared: Tensor | None, rows: Tensor | None = None) -> None:
        self.shared, self.rows = shared, rows

    def at(self, position: Tensor, num_prefix: int, num_fused: int) -> BiasTables:
        """Tables with the rows of all tokens, the prefix included."""
        batch, nowhere = position.shape[0], torch.iinfo(torch.int64).max
        prefix = torch.arange(num_prefix, device=position.device).expand(batch, -1)
        fused = prefix.new_full((batch, num_fused), nowhere)
        return BiasTables(self.shared, torch.cat([prefix, fused, position + num_prefix], dim=1))

    def arguments(self, block: int) -> dict[str, Any]:
        """`shared_rel_pos_bias`: the bias of the full grid that all blocks share."""
        return {"shared_rel_pos_bias": self.shared}

    def bias(self, table: Tensor) -> Tensor:
        """Gathers rows and columns; costs n² per image and head."""
        if self.rows is None:
            return table
        rows = self.rows.clamp(max=table.shape[-1])
        padded = F.pad(table[0], (0, 1, 0, 1))
        return padded[:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)
