"""One sparse pass through the blocks of a converted model, driven by its own loop or another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spot_ext
from spot_vit.models.state import TokenState
from spot_vit.models.step import BlockStep, Stage
from spot_vit.nn.evidence import EvidenceHistory
from spot_vit.nn.positional import PositionTables
from spot_vit.utils.tracing import known, refuse_symbols


class TokenPass:
    """A sparse pass through the blocks of a converted model.

    For backbones whose blocks run in a loop of their own (detection adapters, for example):

        run = spot_vit.TokenPass(model, images)
        for block in range(len(model.blocks)):
            run.block(block)
            full = run.on_grid()                  # [B, P+N, C], whatever was dropped
            run.set_grid(full + injected)         # and back to the tokens that are left
        tokens = model.norm(run.tokens)

    Args:
        model: a SPOT model, not its wrapper: wrappers around its blocks are called as they are.
        image: images [B, 3, H, W].
        kept: decisions to use instead of the predictor's, as in the model's forward method.
        every_decision: run predictors even where nothing would be cut.
        dense: whether `on_grid(fill="last")` is wanted; it takes one more tensor a stage.
        stop: number of blocks to run, all by default.
        ratios: numerator and denominator per stage, the model's by default.
        prefix_alone: whether prefix tokens are all that is wanted of the last block. A fast model
            (`spot_vit.fast`) computes no others there.

    Attributes:
        step: what the last block was asked and did; None where it ran as timm wrote it.
        state: what is known of the tokens; `state.index`, `state.masks` and `state.logp` are those
            of `SpotOutput`.
    """

    ratios: Sequence[Sequence[int]] | None = None
    prefix_alone = False

    def __init__(
        self,
        model: Any,
        image: Tensor,
        kept: Sequence[Tensor] | None = None,
        every_decision: bool = False,
        dense: bool = True,
        stop: int | None = None,
        ratios: Sequence[Sequence[int]] | None = None,
        prefix_alone: bool = False,
    ) -> None:
        refuse_symbols(image)
        self.model, self.dense = model, dense
        self.ratios, self.prefix_alone = ratios, prefix_alone
        self.step: BlockStep | None = None
        self.blocks: list[Any] = list(model.blocks)[:stop]
        x, tables = model._tokens(image)
        self.shape = model._grid(*image.shape[-2:])
        self._start(x, tables, kept, every_decision)

    def _start(
        self,
        x: Tensor,
        tables: PositionTables,
        kept: Sequence[Tensor] | None,
        every_decision: bool,
    ) -> None:
        """Begins with tokens x [B, P+N, C], ready for the first block."""
        model = self.model
        grid = known(x.shape[1]) - model.num_prefix_tokens
        history = EvidenceHistory(model.spot_config)
        self.state = TokenState(x, tables, tables, history, model.num_prefix_tokens, grid)
        self.state.sparse = any(block.attn.sparse for block in self.blocks)
        self.state.watched = any(block.attn.recorder is not None for block in self.blocks)
        self._stages = self._plan(kept, every_decision)
        self._with_statistics = self._blocks_with_statistics()

    # ---- tokens ----------------------------------------------------------------------------------

    @property
    def tokens(self) -> Tensor:
        """[B, P+n, C] tokens as they are now, fused ones that never compete left out."""
        return self.state.tokens

    def on_grid(self, fill: str = "last", norm: nn.Module | None = None) -> Tensor:
        """[B, P+N, C] tokens of the full grid.

        Args:
            fill: as in the model's `forward_intermediates`.
            norm: applied to every token, such as `model.norm`; zeros of `fill="zero"` stay zeros.
        """
        return self.state.on_grid(fill, self.shape, norm)

    def set_grid(self, full: Tensor) -> None:
        """Takes new values [B, P+N, C] for the tokens that are there; those of others are unused.

        Fused tokens keep theirs.
        """
        state = self.state
        if state.num_rivals:
            raise ValueError(
                f"method {state.history.config.method!r} fuses tokens that compete and have no "
                "place on the grid; set_grid needs soft='none'"
            )
        if full.shape[1] != state.num_prefix + state.grid:
            raise ValueError(
                f"expected [B, {state.num_prefix + state.grid}, C] tokens of the full grid, got "
                f"{list(full.shape)}"
            )
        alive = full
        if state.position is not None:
            alive = spot_ext.compact_tokens(full, state.position, state.num_prefix)
        fused = state.x[:, state.num_prefix : state.front]
        prefix, patches = alive[:, : state.num_prefix], alive[:, state.num_prefix :]
        state.x = torch.cat([prefix, fused, patches], dim=1) if state.num_fused else alive

    # ---- blocks ----------------------------------------------------------------------------------

    def run(self, blocks: Iterable[int] | None = None) -> Tensor:
        """Runs blocks by index, all of them by default, and returns the tokens."""
        for b in range(len(self.blocks)) if blocks is None else blocks:
            self.block(b)
        return self.tokens

    def block(self, b: int) -> Tensor:
        """Runs block `b`, with whatever is decided there, and returns the tokens."""
        state, stage = self.state, self._stages.get(b)
        if stage is not None and self.dense:
            state.note_dropped()
        queries = self._queries(b)
        plain = stage is None and b not in self._with_statistics and state.plain
        self.step = None
        if plain and queries is None:
            state.x = self._call(self.blocks[b], state.x, **state.tables.arguments(b))
            return self.tokens

        def run(x: Tensor) -> tuple[Tensor, BlockStep]:
            step = self._step(state, b, queries)
            return self.blocks[b](x, step=step), step

        x, self.step = self._call(run, state.x)
        self.state = self.step.after
        self.state.x = x
        self.state.remember()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_gradients()
        return self.tokens

    def _queries(self, b: int) -> int | None:
        """How many of the first tokens block `b` need give; None for all."""
        last = self.prefix_alone and b == len(self.blocks) - 1
        return self.model.num_prefix_tokens if last else None

    def _step(self, state: TokenState, b: int, queries: int | None = None) -> BlockStep:
        """What block `b` is asked to do from `state` on."""
        model = self.model
        config, masks = model.spot_config, model.training and model.spot_config.learned
        noise = model._spot_noise if torch.compiler.is_compiling() else config.noise_scale
        stage, need_stats = self._stages.get(b), b in self._with_statistics
        first = model.has_class_token
        return BlockStep(state, config, b, stage, need_stats, first, masks, noise, queries)

    def _call(self, function: Any, x: Tensor, **arguments: Any) -> Any:
        model = self.model
        if model.grad_checkpointing and model.training and not torch.jit.is_scripting():
            return checkpoint(function, x, use_reentrant=False, **arguments)
        return function(x, **arguments)

    def _check_gradients(self) -> None:
        """Raises where a wrapper ran the block without recording what its predictor did."""
        logp = self.state.logp[-1] if self.state.logp else None
        if logp is not None and self.state.x.requires_grad and not logp.requires_grad:
            trained = any(
                p.requires_grad
                for block in self.blocks
                if block.relevance is not None
                for p in block.relevance.parameters()
            )
            if trained:
                raise RuntimeError(
                    "predictors got no gradient: reentrant activation checkpointing does not see "
                    "what a block decides; use use_reentrant=False, or the model's "
                    "set_grad_checkpointing()"
                )

    # ---- plan ------------------------------------------------------------------------------------

    def _plan(self, kept: Sequence[Tensor] | None, every_decision: bool) -> dict[int, Stage]:
        """What is to be done before (EViT: in) which block."""
        model, grid = self.model, self.state.grid
        config = model.spot_config
        ratios = model._spot_ratios if self.ratios is None else self.ratios
        at = [b for b, block in enumerate(self.blocks) if block.stage is not None]
        if kept is not None:
            check_kept(kept, len(at))
        if kept is None and self._masks_any_number():
            share = model._spot_shares * grid
            counts = (share + 1e-9).floor().long()  # as exact fractions round, see `_configure`
            return {b: Stage(counts[k], self.blocks[b].cuts, None, True) for k, b in enumerate(at)}
        stages, alive = {}, grid
        for k, b in enumerate(at):
            given = None if kept is None else kept[k]
            over, under = ratios[k]
            if given is not None:
                num_keep = known(given.shape[1])
            elif config.cuts_inside:  # the ratio is of what reaches the stage, rounded up
                num_keep = -(-alive * over // under)
            else:
                num_keep = grid * over // under
            # A stage that cuts nothing needs no scores, except where someone wants to see them.
            asked = model.training or every_decision or num_keep != alive
            scores = config.learned and (asked if given is None else config.fuses)
            stages[b] = Stage(num_keep, num_keep != alive, given, scores)
            alive = num_keep + (config.cuts_inside and config.fuses and num_keep != alive)
        return stages

    def _masks_any_number(self) -> bool:
        """Whether a compiled graph need not know how many tokens stay: training masks them."""
        masks = self.model.training and self.model.spot_config.learned
        return masks and torch.compiler.is_compiling()

    def _blocks_with_statistics(self) -> set[int]:
        """The blocks whose statistics a later decision looks at."""
        config = self.model.spot_config
        places = [place for place, stage in self._stages.items() if stage.scores]
        if not places or not config.uses_statistics:
            return set()
        if "moments" in config.evidence:
            return set(range(max(places)))
        return {place - 1 for place in places}


def check_kept(kept: Sequence[Tensor], stages: int) -> None:
    """Raises unless `kept` names the tokens of every stage."""
    if len(kept) != stages:
        raise ValueError(f"kept must give {stages} index tensors, one per stage, got {len(kept)}")
    for k, index in enumerate(kept):
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 2:
            raise TypeError(f"kept[{k}] must be an int64 tensor [B, n]")
