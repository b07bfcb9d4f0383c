"""A sparse pass inside a loop over blocks that is not ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spot_vit.models.state import TokenState
from spot_vit.models.step import BlockStep
from spot_vit.models.token_pass import TokenPass
from spot_vit.utils.modes import blocks_of


class HostedPass(TokenPass):
    """A sparse pass whose loop is the model's own: each block asks what is its part, and reports.

    Args:
        model: the converted model.
        kept: as in `TokenPass`.
        every_decision: as in `TokenPass`.
        ratios: as in `TokenPass`.
    """

    def __init__(
        self,
        model: Any,
        kept: Sequence[Tensor] | None,
        every_decision: bool,
        ratios: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.model, self.dense = model, False
        self.ratios = ratios
        self.blocks = list(model.blocks)
        self._wanted = kept, every_decision
        self._place = {block: b for b, block in enumerate(blocks_of(model))}
        self._differentiates = torch.is_grad_enabled()
        self._before: dict[int, TokenState] = {}  # of blocks that checkpointing may run again
        self._left: set[int] = set()

    def enter(self, block: Any, x: Tensor, arguments: dict[str, Any]) -> BlockStep:
        """What a block is asked to do with the tokens x that its loop gives it.

        Args:
            block: a block of the model.
            x: [B, P+n, C].
            arguments: keyword arguments of its forward method, which may hold position tables.
        """
        b = self._place[block]
        if b == 0 and not self._left:
            self._start(x, self.model._tables(arguments), *self._wanted)
        before = self._before.get(b, self.state)
        if getattr(block, "gradient_checkpointing", False) and block.training:
            if self._differentiates and not torch.is_grad_enabled():
                raise RuntimeError(
                    "reentrant activation checkpointing does not see what a block decides: use "
                    "gradient_checkpointing_enable({'use_reentrant': False})"
                )
            self._before[b] = before
        state = before.copy()
        state.x = x
        state.remember()
        return self._step(state, b)

    def leave(self, step: BlockStep) -> Tensor:
        """Notes what a block did; the tokens for the next, after the last one for the head."""
        if step.block not in self._left:  # not where checkpointing runs it again
            self._left.add(step.block)
            self.state = step.after
        return step.after.tokens if step.block == len(self.blocks) - 1 else step.after.x
