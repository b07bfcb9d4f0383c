"""The block loop that all converted models share: decide, cut or mask, run the block.

Model adapters inherit it in front of the timm class and say how their tokens, head and pooling
work. All state of a forward pass is local to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spot_ext
from spot_vit.config.spot import SpotConfig
from spot_vit.models.state import TokenState
from spot_vit.nn.attention import AttentionRequest, Cut, refuse_masks
from spot_vit.nn.decide import gumbel_mask, mask_of, topk_mask
from spot_vit.nn.evidence import EvidenceHistory
from spot_vit.nn.pooling import pool_kept
from spot_vit.nn.positional import PositionTables


@dataclasses.dataclass
class SpotOutput:
    """What `forward(x, aux=True)` returns; P prefix and N patch tokens, K decisions.

    Attributes:
        logits: what `forward(x)` returns.
        tokens: final normalised tokens, prefix first: [B, P+N, C] where training masks, otherwise
            survivors, of which the last n_K are those of `index[-1]`. Soft sparsification's fused
            tokens are left out; EViT's newest stands before the patches.
        masks: K cumulative masks [B, N] over the original grid, exactly 0 or 1; in training with
            straight-through gradients.
        logp: K log-probabilities [B, N_k, 2] of the tokens each decision saw, index 0 = keep; empty
            for decisions that were given, and for methods without predictors.
        index: K ascending [B, n_k] int64 positions on the original grid; empty where training
            masks. EViT's fused tokens compete too: N + k is the one that its cut k made.
    """

    logits: Tensor
    tokens: Tensor
    masks: list[Tensor] = dataclasses.field(default_factory=list)
    logp: list[Tensor] = dataclasses.field(default_factory=list)
    index: list[Tensor] = dataclasses.field(default_factory=list)


# A pytree: DistributedDataParallel with a static graph, export and gathering see its tensors.
torch.export.register_dataclass(SpotOutput, serialized_type_name="spot_vit.SpotOutput")


class _Stage(NamedTuple):
    """One decision of one pass."""

    num_keep: int
    cuts: bool  # whether it keeps fewer than there are
    given: Tensor | None  # [B, num_keep] grid positions to keep instead of deciding
    scores: bool  # whether the predictor runs


class SpotLoop(nn.Module):
    """Mixin: the forward pass of a converted model."""

    spot_config: SpotConfig
    _spot_ratios: tuple[tuple[int, int], ...]  # numerator, denominator per stage
    blocks: Any
    norm: nn.Module
    patch_embed: Any
    num_prefix_tokens: int
    has_class_token: bool
    grad_checkpointing: bool
    global_pool: Any
    fc_norm: Any
    head_drop: Any
    head: Any

    if TYPE_CHECKING:  # what an adapter and its timm class provide

        def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
            """Image [B, 3, H, W] to tokens [B, P+N, C], ready for the first block, and tables."""

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            """Logits from tokens."""

    @property
    def _pools_prefix(self) -> bool:
        """Whether the head pools over prefix tokens together with patches."""
        return getattr(self, "pool_include_prefix", False)

    def _head_kept(self, x: Tensor, mask: Tensor) -> Tensor:
        """Logits from tokens [B, P+N, C], pooled over the prefix and those in `mask` [B, N]."""
        x = pool_kept(
            x,
            mask,
            self.global_pool,
            self.num_prefix_tokens,
            include_prefix=self._pools_prefix,
            attn_pool=getattr(self, "attn_pool", None),
        )
        return self.head(self.head_drop(self.fc_norm(x)))

    @property
    def _pools_patches(self) -> bool:
        """Whether the head needs patch tokens."""
        pool = getattr(self, "global_pool", "") or ""
        return getattr(self, "attn_pool", None) is not None or pool not in ("", "token")

    def _configure(self, config: SpotConfig) -> None:
        """Sets the configuration; ratios as plain ints, which torch.compile can trace."""
        ratios = config.ratios(len(config.at or ()))
        if config.cuts_inside:  # of what reaches the stage
            before = (Fraction(1), *ratios)
            ratios = tuple(now / then for then, now in zip(before, ratios, strict=False))
        self._spot_ratios = tuple((ratio.numerator, ratio.denominator) for ratio in ratios)
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
                the original grid, each stage a subset of the one before (EViT: and its fused
                tokens, see `SpotOutput.index`).

        Returns:
            [B, classes], or `SpotOutput` with `aux=True`.
        """
        refuse_masks(attn_mask, is_causal)
        state = self._run_blocks(x, kept=kept, every_decision=aux)
        if self._pools_patches and state.x.shape[1] == state.front and state.grid:
            raise ValueError(
                f"keep={self.spot_config.keep} leaves none of {state.grid} patch tokens at the "
                "last stage, and this model's head pools over them"
            )
        tokens = self.norm(state.tokens)
        mask = state.pooled()
        logits = self.forward_head(tokens) if mask is None else self._head_kept(tokens, mask)
        if not aux:
            return logits
        return SpotOutput(logits, tokens, state.all_masks(), state.logp, state.index)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Final normalised tokens: all of them where training masks, otherwise survivors."""
        refuse_masks(attn_mask, is_causal)
        return self.norm(self._run_blocks(x).tokens)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Block outputs as timm gives them, on the full grid.

        A token that was dropped keeps the last value it had, so maps stay dense. The final features
        are those of `forward_features`: survivors only, where training does not mask.
        """
        refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        state = self._run_blocks(x, take=take, stop=last + 1 if stop_early else None)
        full = [state.taken[b] for b in sorted(state.taken)]
        if norm:
            full = [self.norm(y) for y in full]
        prefix = [y[:, : self.num_prefix_tokens] for y in full]
        maps = [y[:, self.num_prefix_tokens :] for y in full]
        if output_fmt == "NCHW":
            grid = self._grid(*x.shape[-2:])
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(state.tokens)
            return result
        outputs: list[Any] = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return outputs if intermediates_only else (self.norm(state.tokens), outputs)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return self.patch_embed.dynamic_feat_size((height, width))

    # ---- the loop --------------------------------------------------------------------------------

    def _run_blocks(
        self,
        image: Tensor,
        kept: Sequence[Tensor] | None = None,
        every_decision: bool = False,
        take: Sequence[int] = (),
        stop: int | None = None,
    ) -> TokenState:
        """Runs the blocks.

        `every_decision` runs the predictor even where nothing would be cut; `take` names blocks
        whose output is wanted on the full grid; `stop` is the number of blocks to run.
        """
        config = self.spot_config
        blocks = list(self.blocks)[:stop]
        x, tables = self._tokens(image)
        grid = x.shape[1] - self.num_prefix_tokens
        state = TokenState(x, tables, EvidenceHistory(config), self.num_prefix_tokens, grid)
        state.sparse = any(block.attn.sparse for block in blocks)
        at = [b for b, block in enumerate(blocks) if block.stage is not None]
        stages = self._stages(grid, at, kept, every_decision)
        for b, block in enumerate(blocks):
            stage = stages.get(b)
            if stage is not None and take:
                state.dropped = state.on_grid()
            if stage is not None and not config.cuts_inside:
                self._decide(state, block.relevance, stage)
            self._run_block(state, b, block, stages)
            if b in take:
                state.taken[b] = state.on_grid()
        return state

    def _stages(
        self,
        grid: int,
        at: Sequence[int],
        kept: Sequence[Tensor] | None,
        every_decision: bool,
    ) -> dict[int, _Stage]:
        """What is to be done before (EViT: in) which block."""
        config = self.spot_config
        if kept is not None:
            check_kept(kept, len(at))
        stages, alive = {}, grid
        for k, b in enumerate(at):
            given = None if kept is None else kept[k]
            over, under = self._spot_ratios[k]
            if given is not None:
                num_keep = given.shape[1]
            elif config.cuts_inside:  # the ratio is of what reaches the stage, rounded up
                num_keep = -(-alive * over // under)
            else:
                num_keep = grid * over // under
            # A stage that cuts nothing needs no scores, except where someone wants to see them.
            asked = self.training or every_decision or num_keep != alive
            scores = config.learned and (asked if given is None else config.fuses)
            stages[b] = _Stage(num_keep, num_keep != alive, given, scores)
            alive = num_keep + (config.cuts_inside and config.fuses and num_keep != alive)
        return stages

    def _decide(self, state: TokenState, relevance: nn.Module, stage: _Stage) -> None:
        config = self.spot_config
        masks = self.training and config.learned
        logp = None
        if stage.scores:
            logp = relevance(state.patches, state.history.features(), state.mask)
            if stage.given is None:
                state.logp.append(logp)
        weight = None
        if config.fuses and stage.cuts:
            shape = (state.x.shape[0], state.x.shape[1] - state.front)
            weight = (
                state.x.new_ones(shape) if logp is None else logp[..., 0].exp().to(state.x.dtype)
            )
        if masks:
            state.hide(self._mask(state, logp, stage), weight)
        elif not stage.cuts:
            state.keep_all()
        else:
            state.cut(self._index(state, logp, stage), weight)

    def _mask(self, state: TokenState, logp: Tensor | None, stage: _Stage) -> Tensor:
        """[B, N] of 0 and 1: what training keeps."""
        config = self.spot_config
        if stage.given is None:
            assert logp is not None
            if config.train_decision == "topk":
                return topk_mask(logp, state.mask, stage.num_keep, config.tau)
            return gumbel_mask(logp, state.mask, config.tau)
        eager = not torch.compiler.is_compiling()
        if eager and ((stage.given < 0) | (stage.given >= state.grid)).any():
            raise ValueError(f"kept names a position out of range for {state.grid} patch tokens")
        mask = mask_of(stage.given, state.grid, state.x.dtype)
        if eager and state.mask is not None and (mask > state.mask).any():
            raise ValueError("kept names a token that was not kept by the stage before")
        return mask

    def _index(self, state: TokenState, logp: Tensor | None, stage: _Stage) -> Tensor:
        """[B, num_keep] positions among the patch tokens alive: what stays."""
        if stage.given is not None:
            return state.among_alive(stage.given)
        if logp is None:
            assert self.spot_config.row.by_chance, "nothing scores the tokens"
            shape = (state.x.shape[0], state.x.shape[1] - state.front)
            scores = torch.rand(shape, device=state.x.device)
        else:
            scores = logp[..., 0]
        return spot_ext.select_tokens(scores, stage.num_keep)

    def _run_block(
        self, state: TokenState, b: int, block: nn.Module, stages: dict[int, _Stage]
    ) -> None:
        """Runs one block on `state.x`, and what is asked of it besides."""
        need_stats = self._needs_stats(b, stages)
        cut = None
        stage = stages.get(b)
        if stage is not None and self.spot_config.cuts_inside and stage.cuts:
            index = None if stage.given is None else state.among_alive(stage.given)
            cut = Cut(stage.num_keep, self.spot_config.fuses, index)
        arguments = state.tables.arguments(b)
        moved = state.tables.tied and state.tables is not state.full_tables
        moved = moved or state.columns is not None
        plain = not need_stats and state.mask is None and cut is None and not moved
        if not plain:
            arguments["request"] = AttentionRequest(
                state.front,
                self.has_class_token,
                state.tables,
                state.mask,
                need_stats,
                cut,
                state.columns,
                state.grid,
            )
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            result = checkpoint(block, state.x, use_reentrant=False, **arguments)
        else:
            result = block(state.x, **arguments)
        state.x = result if plain else result.x
        if cut is not None:
            state.was_cut(result.x, result.kept, cut.fuse)
        elif stage is not None and self.spot_config.cuts_inside:
            state.keep_all()
        if need_stats:
            state.history.update(result.stats[:, state.front :], state.count())

    def _needs_stats(self, b: int, stages: dict[int, _Stage]) -> bool:
        """Whether a later decision looks at the statistics of block `b`."""
        config = self.spot_config
        later = [place for place, stage in stages.items() if place > b and stage.scores]
        if not later or not config.uses_statistics:
            return False
        return "moments" in config.evidence or b + 1 in later


def check_kept(kept: Sequence[Tensor], stages: int) -> None:
    """Raises unless `kept` names the tokens of every stage."""
    if len(kept) != stages:
        raise ValueError(f"kept must give {stages} index tensors, one per stage, got {len(kept)}")
    for k, index in enumerate(kept):
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 2:
            raise TypeError(f"kept[{k}] must be an int64 tensor [B, n]")
