"""The block loop that all converted models share: decide, cut or mask, run the block.

Model adapters (spot_vit.adapters) inherit it in front of the timm class and say how their tokens,
head and pooling work. All state of a forward pass is local to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spot_ext
from spot_vit.config import SpotConfig
from spot_vit.decide import gumbel_mask, mask_of, topk_mask
from spot_vit.moments import History


@dataclasses.dataclass
class SpotOutput:
    """What `forward(x, aux=True)` returns; P prefix and N patch tokens, K decisions.

    Attributes:
        logits: what `forward(x)` returns.
        tokens: final normalised tokens, prefix first: [B, P+N, C] in training, survivors in eval.
        masks: K cumulative masks [B, N] over the original grid, exactly 0 or 1; in training with
            straight-through gradients.
        logp: K log-probabilities [B, N_k, 2] of the tokens each decision saw, index 0 = keep; empty
            for decisions that were given.
        index: in eval K ascending [B, n_k] int64 positions on the original grid; empty in training.
    """

    logits: Tensor
    tokens: Tensor
    masks: list[Tensor] = dataclasses.field(default_factory=list)
    logp: list[Tensor] = dataclasses.field(default_factory=list)
    index: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Pass:
    """State of one forward pass."""

    x: Tensor  # [B, P + alive, C]
    grid: int  # N, patch tokens of the full grid
    history: History
    mask: Tensor | None = None  # [B, N] in training, after the first decision
    position: Tensor | None = None  # [B, alive] original positions in eval, after the first cut
    dropped: Tensor | None = None  # [B, P + N, C] last values on the full grid, when wanted
    masks: list[Tensor] = dataclasses.field(default_factory=list)
    logp: list[Tensor] = dataclasses.field(default_factory=list)
    index: list[Tensor] = dataclasses.field(default_factory=list)
    taken: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class SpotLoop(nn.Module):
    """Mixin: the forward pass of a converted model."""

    spot_config: SpotConfig
    _spot_ratios: tuple[tuple[int, int], ...]  # numerator, denominator per stage
    blocks: Any
    norm: nn.Module
    num_prefix_tokens: int
    has_class_token: bool
    grad_checkpointing: bool

    if TYPE_CHECKING:  # what an adapter and its timm class provide

        def _tokens(self, x: Tensor) -> Tensor:
            """Image [B, 3, H, W] to tokens [B, P+N, C], ready for the first block."""

        def _head_kept(self, x: Tensor, mask: Tensor) -> Tensor:
            """Logits from all tokens [B, P+N, C], pooled over the prefix and those in `mask`."""

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            """Logits from tokens."""

    def _configure(self, config: SpotConfig) -> None:
        """Sets the configuration; ratios as plain ints, which torch.compile can trace."""
        self._spot_ratios = tuple(
            (ratio.numerator, ratio.denominator) for ratio in config.ratios(len(config.at or ()))
        )
        self.spot_config = config

    # ---- public ----------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        aux: bool = False,
        kept: Sequence[Tensor] | None = None,
    ) -> Any:
        """Logits, as the timm model returns them.

        Args:
            x: images [B, 3, H, W].
            attn_mask: not supported; a sparse model builds its own masks.
            is_causal: not supported.
            aux: return a `SpotOutput` with decisions and final tokens as well.
            kept: decisions to use instead of the predictor's: per stage [B, n_k] int64 positions on
                the original grid, each stage a subset of the one before.

        Returns:
            [B, classes], or `SpotOutput` with `aux=True`.
        """
        refuse_masks(attn_mask, is_causal)
        run = self._run(x, kept=kept, every_decision=aux)
        tokens = self.norm(run.x)
        logits = (
            self.forward_head(tokens) if run.mask is None else self._head_kept(tokens, run.mask)
        )
        if not aux:
            return logits
        return SpotOutput(logits, tokens, run.masks, run.logp, run.index)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Final normalised tokens: all of them in training, survivors in eval."""
        refuse_masks(attn_mask, is_causal)
        return self.norm(self._run(x).x)

    # ---- the loop --------------------------------------------------------------------------------

    def _run(
        self,
        image: Tensor,
        kept: Sequence[Tensor] | None = None,
        every_decision: bool = False,
        take: Sequence[int] = (),
        stop: int | None = None,
    ) -> _Pass:
        """Runs the blocks.

        `every_decision` runs the predictor even where nothing would be cut; `take` names blocks
        whose output is wanted on the full grid; `stop` is the number of blocks to run.
        """
        config = self.spot_config
        x = self._tokens(image)
        run = _Pass(x, x.shape[1] - self.num_prefix_tokens, History(config))
        blocks = list(self.blocks)[:stop]
        places = [b for b, block in enumerate(blocks) if block.relevance is not None]
        budgets = [run.grid * over // under for over, under in self._spot_ratios]
        _check_kept(kept, places, run)
        if kept is not None:
            deciding = []
        elif self.training or every_decision:
            deciding = places
        else:  # a stage that cuts nothing needs no scores
            before = [run.grid, *budgets]
            deciding = [b for k, b in enumerate(places) if budgets[k] != before[k]]
        for b, block in enumerate(blocks):
            if b in places:
                stage = places.index(b)
                if take and not self.training:
                    run.dropped = self._on_grid(run)
                if kept is not None:
                    self._apply_given(run, kept[stage])
                elif b in deciding:
                    self._decide(run, block.relevance, budgets[stage])
            stats = self._run_block(run, block, want=self._wants_stats(b, deciding))
            if stats is not None:
                run.history.update(stats, self._alive(run))
            if b in take:
                run.taken[b] = self._on_grid(run)
        return run

    def _wants_stats(self, b: int, deciding: Sequence[int]) -> bool:
        """Whether a later decision looks at the statistics of block `b`."""
        config = self.spot_config
        later = [place for place in deciding if place > b]
        if not later or not config.uses_statistics:
            return False
        return "moments" in config.features or b + 1 in later

    def _alive(self, run: _Pass) -> Tensor | int:
        if run.mask is not None:
            mask = run.mask.detach()
            return mask.sum(dim=1, dtype=torch.promote_types(mask.dtype, torch.float32))
        return run.x.shape[1] - self.num_prefix_tokens

    def _run_block(self, run: _Pass, block: nn.Module, want: bool) -> Tensor | None:
        """Runs one block on `run.x`; returns its statistics [B, alive, H, 6] when wanted."""
        asked: dict[str, Any] = {}
        if want or run.mask is not None:
            asked = {
                "keep": run.mask,
                "want": want,
                "num_prefix": self.num_prefix_tokens,
                "class_token": self.has_class_token,
            }
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            result = checkpoint(block, run.x, use_reentrant=False, **asked)
        else:
            result = block(run.x, **asked)
        if not want:
            run.x = result
            return None
        run.x, stats = result
        return stats[:, self.num_prefix_tokens :]

    def _decide(self, run: _Pass, relevance: nn.Module, budget: int) -> None:
        logp = relevance(run.x[:, self.num_prefix_tokens :], run.history.features(), run.mask)
        run.logp.append(logp)
        if self.training:
            config = self.spot_config
            if config.train_decision == "topk":
                mask = topk_mask(logp, run.mask, budget, config.tau)
            else:
                mask = gumbel_mask(logp, run.mask, config.tau)
            self._mask(run, mask)
        else:
            self._cut(run, spot_ext.select_tokens(logp[..., 0], budget), budget)

    def _apply_given(self, run: _Pass, index: Tensor) -> None:
        """A given decision: `index` [B, n] on the original grid."""
        if self.training:
            mask = mask_of(index, run.grid, run.x.dtype)
            eager = not torch.compiler.is_compiling()
            if eager and run.mask is not None and (mask > run.mask).any():
                raise ValueError("kept names a token that was not kept by the stage before")
            self._mask(run, mask)
            return
        if run.position is not None:  # original positions -> positions among survivors
            order = torch.full((index.shape[0], run.grid), -1, device=index.device)
            alive = torch.arange(run.position.shape[1], device=index.device)
            order = order.scatter(1, run.position, alive.expand_as(run.position))
            index = order.gather(1, index)
        self._cut(run, index, index.shape[1])

    def _mask(self, run: _Pass, mask: Tensor) -> None:
        run.mask = mask
        run.masks.append(mask)
        run.history.decided(None)

    def _cut(self, run: _Pass, index: Tensor, budget: int) -> None:
        """Keeps the survivors named in `index` [B, n], positions among those still alive."""
        if budget == run.x.shape[1] - self.num_prefix_tokens:
            run.history.decided(None)
        else:
            run.x = spot_ext.compact_tokens(run.x, index, self.num_prefix_tokens)
            run.history.decided(index)
            run.position = index if run.position is None else run.position.gather(1, index)
        position = run.position
        if position is None:
            position = torch.arange(run.grid, device=run.x.device).expand(run.x.shape[0], -1)
        run.index.append(position)
        run.masks.append(mask_of(position, run.grid, run.x.dtype))

    def _on_grid(self, run: _Pass) -> Tensor:
        """All tokens [B, P+N, C]; dropped ones with the last value they had."""
        if run.position is None:
            return run.x
        return spot_ext.scatter_tokens(
            run.x, run.position, run.grid, self.num_prefix_tokens, run.dropped
        )


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raises for the arguments of timm's forward methods that a sparse model cannot honour."""
    if attn_mask is not None:
        raise ValueError("attn_mask is not supported by a SPOT model: it builds its own masks")
    if is_causal:
        raise ValueError("is_causal is not supported by a SPOT model: tokens are unordered")


def _check_kept(kept: Sequence[Tensor] | None, places: Sequence[int], run: _Pass) -> None:
    if kept is None:
        return
    if len(kept) != len(places):
        raise ValueError(
            f"kept must give {len(places)} index tensors, one per stage, got {len(kept)}"
        )
    for stage, index in enumerate(kept):
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 2:
            raise TypeError(f"kept[{stage}] must be an int64 tensor [B, n]")
