"""The part of one block in a sparse pass: decide, attend with a mask or statistics, cut."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import spot_ext
from spot_vit.config.spot import SpotConfig
from spot_vit.models.state import TokenState
from spot_vit.nn.attention import AttentionRequest, Cut
from spot_vit.nn.decide import gumbel_mask, mask_of, topk_mask


class Stage(NamedTuple):
    """One decision of one pass.

    Attributes:
        num_keep: patch tokens it keeps; a scalar tensor where training is compiled, see
            `TokenPass`.
        cuts: whether that is fewer than there are.
        given: [B, num_keep] grid positions to keep instead of deciding, or None.
        scores: whether the predictor runs.
    """

    num_keep: int | Tensor
    cuts: bool
    given: Tensor | None
    scores: bool

    @property
    def number(self) -> int:
        """`num_keep` where tokens go for real."""
        assert not isinstance(self.num_keep, Tensor)
        return self.num_keep


class BlockStep:
    """What a block is asked to do besides its own arithmetic, and the state it leaves.

    A block calls `start`, `decide`, `request` and `finish`, in this order. `before` is never
    changed: a block that is run again, as activation checkpointing does, does the same again. All
    of it happens inside the block's forward method, where its wrappers (FSDP, offloading) have its
    predictor's weights at hand.

    Args:
        before: state of the tokens in front of the block.
        config: of the model.
        block: its index.
        stage: the decision taken at it, or None.
        need_stats: whether a later decision looks at its attention statistics.
        class_token: whether the first token is a class token.
        masks: whether decisions mask tokens (training) instead of removing them.
        noise: scale of the noise of training decisions.
        queries: how many of the first tokens the block need give; None for all.

    Attributes:
        after: the state that the block leaves.
        asked: what was asked of its attention, with the answers; None before it ran.
    """

    def __init__(
        self,
        before: TokenState,
        config: SpotConfig,
        block: int,
        stage: Stage | None,
        need_stats: bool,
        class_token: bool,
        masks: bool,
        noise: float | Tensor,
        queries: int | None = None,
    ) -> None:
        self.before, self.config, self.block, self.stage = before, config, block, stage
        self.need_stats, self.class_token = need_stats, class_token
        self.masks, self.noise, self.queries = masks, noise, queries
        self.after = before
        self.asked: AttentionRequest | None = None

    def start(self, x: Tensor) -> TokenState:
        """A state of its own for this run, of the tokens x [B, P+n, C] that the block was given."""
        state = self.before.copy()
        state.x = x
        return state

    def decide(self, state: TokenState, relevance: nn.Module | None) -> None:
        """The decision in front of the block: masks or removes tokens of `state`."""
        stage, config = self.stage, self.config
        if stage is None or config.cuts_inside:
            return
        logp = None
        if stage.scores:
            assert relevance is not None
            logp = relevance(state.patches, state.history.features(), state.mask)
            if stage.given is None:
                state.logp.append(logp)
        weight = None
        if config.fuses and stage.cuts:
            shape = (state.x.shape[0], state.x.shape[1] - state.front)
            weight = (
                state.x.new_ones(shape) if logp is None else logp[..., 0].exp().to(state.x.dtype)
            )
        if self.masks:
            state.hide(self._mask(state, logp, stage), weight)
        elif not stage.cuts:
            state.keep_all()
        else:
            state.cut(self._index(state, logp, stage), weight)

    def _mask(self, state: TokenState, logp: Tensor | None, stage: Stage) -> Tensor:
        """[B, N] of 0 and 1: what training keeps."""
        config = self.config
        if stage.given is None:
            assert logp is not None
            if config.train_decision == "topk":
                return topk_mask(logp, state.mask, stage.num_keep, config.tau, self.noise)
            return gumbel_mask(logp, state.mask, config.tau, self.noise)
        eager = not torch.compiler.is_compiling()
        if eager and ((stage.given < 0) | (stage.given >= state.grid)).any():
            raise ValueError(f"kept names a position out of range for {state.grid} patch tokens")
        mask = mask_of(stage.given, state.grid, state.x.dtype)
        if eager and state.mask is not None and (mask > state.mask).any():
            raise ValueError("kept names a token that was not kept by the stage before")
        return mask

    def _index(self, state: TokenState, logp: Tensor | None, stage: Stage) -> Tensor:
        """[B, num_keep] positions among the patch tokens alive: what stays."""
        if stage.given is not None:
            return state.among_alive(stage.given)
        if logp is None:
            assert self.config.row.by_chance, "nothing scores the tokens"
            shape = (state.x.shape[0], state.x.shape[1] - state.front)
            scores = torch.rand(shape, device=state.x.device)
        else:
            scores = logp[..., 0]
        return spot_ext.select_tokens(scores, stage.number)

    def request(self, state: TokenState) -> AttentionRequest:
        """What is asked of the block's attention."""
        stage, cut = self.stage, None
        if stage is not None and self.config.cuts_inside and stage.cuts:
            index = None if stage.given is None else state.among_alive(stage.given)
            cut = Cut(stage.number, self.config.fuses, index)
        return AttentionRequest(
            state.front,
            self.class_token,
            state.tables,
            state.mask,
            self.need_stats,
            cut,
            state.columns,
            state.grid,
            state.position,
            self.queries if cut is None else None,
        )

    def plain(self, state: TokenState) -> bool:
        """Whether the rest of the block can run as timm wrote it."""
        stage = self.stage
        cuts = stage is not None and self.config.cuts_inside and stage.cuts
        return state.plain and not self.need_stats and not cuts and self.queries is None

    def finish(self, state: TokenState, request: AttentionRequest, kept: Tensor | None) -> None:
        """Notes what the block did: its statistics, and the positions that its cut kept."""
        stage, cut = self.stage, request.cut
        self.asked = request
        if cut is not None:
            assert kept is not None
            state.was_cut(state.x, kept, cut.fuse)
        elif stage is not None and self.config.cuts_inside:
            state.keep_all()
        state.stats = request.stats if self.need_stats else None
        self.after = state
