"""What all converted models share: their forward methods, around a sparse pass of the blocks.

Model adapters inherit it in front of the timm class and say how their tokens, head and pooling
work. All state of a forward pass is local to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from spot_vit.config.fields import one_of
from spot_vit.config.spot import SpotConfig
from spot_vit.models.state import FILLS, TokenState
from spot_vit.models.token_pass import TokenPass
from spot_vit.nn.attention import refuse_masks
from spot_vit.nn.pooling import pool_kept
from spot_vit.nn.positional import PositionTables
from spot_vit.utils.modes import blocks_of
from spot_vit.utils.tracing import refuse_symbols


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


class SpotLoop(nn.Module):
    """Mixin: the forward pass of a converted model."""

    spot_config: SpotConfig
    _spot_ratios: tuple[tuple[int, int], ...]  # numerator, denominator per stage
    _spot_shares: Tensor  # the same as float64 [K]
    _spot_noise: Tensor  # float32 scalar
    blocks: Any
    norm: nn.Module
    patch_embed: Any
    num_prefix_tokens: int
    has_class_token: bool
    cuts_inside_blocks = True  # whether its blocks can cut between attention and MLP
    grad_checkpointing: bool
    global_pool: Any
    fc_norm: Any
    head_drop: Any
    head: Any

    if TYPE_CHECKING:  # what an adapter and its timm class provide

        def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
            """Image [B, 3, H, W] to tokens [B, P+N, C], ready for the first block, and tables."""

    @property
    def _pools_prefix(self) -> bool:
        """Whether the head pools over prefix tokens together with patches."""
        return getattr(self, "pool_include_prefix", False)

    def _head_kept(self, x: Tensor, mask: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from tokens [B, P+N, C], pooled over the prefix and those in `mask` [B, N]."""
        x = pool_kept(
            x,
            mask,
            self.global_pool,
            self.num_prefix_tokens,
            include_prefix=self._pools_prefix,
            attn_pool=getattr(self, "attn_pool", None),
        )
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    @property
    def _pools_patches(self) -> bool:
        """Whether the head needs patch tokens."""
        pool = getattr(self, "global_pool", "") or ""
        return getattr(self, "attn_pool", None) is not None or pool not in ("", "token")

    def _configure(self, config: SpotConfig) -> None:
        """Sets the configuration; ratios as plain ints, which torch.compile can trace.

        Compiled training reads them, and the noise, as tensors: one graph serves all values.
        """
        ratios = config.ratios(len(config.at or ()))
        if config.cuts_inside:  # of what reaches the stage
            before = (Fraction(1), *ratios)
            ratios = tuple(now / then for then, now in zip(before, ratios, strict=False))
        self._spot_ratios = tuple((ratio.numerator, ratio.denominator) for ratio in ratios)
        shares = [float(ratio) for ratio in ratios]
        self._spot_shares = torch.tensor(shares, dtype=torch.float64, device="cpu")
        self._spot_noise = torch.tensor(config.noise_scale, device="cpu")
        self.spot_config = config
        for block in blocks_of(self):
            k = block.stage
            highest = ratios[k - 1] if k and not config.cuts_inside else Fraction(1)
            block.cuts = k is not None and ratios[k] < highest

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles the model in place, as `nn.Module.compile`, and for any number of budgets.

        `torch.compile(model)` makes a graph for each budget of inference, and runs eagerly after
        torch's `recompile_limit` of them. Here the budget is an argument, so that a few graphs
        serve them all: one for the first, then those whose counts are symbols. Arguments are those
        of `torch.compile`.
        """
        compiled = torch.compile(self._call_impl, *args, **options)

        def call(*inputs: Any, **arguments: Any) -> Any:
            ratios = None if self.training else [list(ratio) for ratio in self._spot_ratios]
            return compiled(*inputs, **arguments, ratios=ratios)

        self._compiled_call_impl = call  # nn.Module calls it, and leaves it out of copies

    # ---- public ----------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        aux: bool = False,
        kept: Sequence[Tensor] | None = None,
        ratios: Sequence[Sequence[int]] | None = None,
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
            ratios: numerator and denominator per stage, which `compile` gives.

        Returns:
            [B, classes], or `SpotOutput` with `aux=True`.
        """
        refuse_masks(attn_mask, is_causal)
        refuse_symbols(x)
        alone = not aux and self._prefix_alone()
        state = self._final(x, kept, every_decision=aux, ratios=ratios, prefix_alone=alone)
        tokens = self.norm(state.tokens)
        logits = self._head(tokens, state.pooled())
        return self._output(logits, tokens, state) if aux else logits

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        kept: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Final normalised tokens: all of them where training masks, otherwise survivors.

        The tensor knows which of its tokens are kept: `forward_head` of it is what `forward` gives.
        """
        refuse_masks(attn_mask, is_causal)
        state = self._final(x, kept)
        tokens = self.norm(state.tokens)
        mask = state.pooled()
        if mask is not None and self._pools_patches:
            tokens.spot_pooled = mask
        return tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or the pooled features before them, of what `forward_features` returned.

        Args:
            x: [B, P+N, C] final tokens.
            pre_logits: features instead of logits.

        Raises:
            ValueError: the head pools over patches, some of which do not count, and `x` is another
                tensor than `forward_features` returned, so that nothing says which.
        """
        mask = getattr(x, "spot_pooled", None)
        if mask is None and self._pools_patches and self._hides and x.dim() == 3:
            raise ValueError(
                "this head pools over patch tokens, and some of them do not count (training masks "
                "them, or they are fused tokens): give forward_head the very tensor that "
                "forward_features returned, or call the model, with aux=True for tokens and masks"
            )
        return self._head(x, mask, pre_logits)

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        """The timm head, over the patches in `mask` [B, N] where that makes a difference."""
        if mask is None or not self._pools_patches:
            return super().forward_head(x, pre_logits)  # type: ignore[misc]
        return self._head_kept(x, mask, pre_logits)

    def _prefix_alone(self) -> bool:
        """Whether the last block may leave patch tokens out; a fast model says so."""
        return False

    @property
    def _hides(self) -> bool:
        """Whether a pass may end with patch tokens that the head must not pool over."""
        config = self.spot_config
        masks = self.training and config.learned
        if not (masks or (config.cuts_inside and config.fuses)):
            return False
        return any(block.cuts for block in blocks_of(self))

    def _final(
        self,
        x: Tensor,
        kept: Sequence[Tensor] | None,
        every_decision: bool = False,
        ratios: Sequence[Sequence[int]] | None = None,
        prefix_alone: bool = False,
    ) -> TokenState:
        """The state behind the last block; refuses to leave a pooling head without tokens."""
        run = TokenPass(
            self, x, kept, every_decision, dense=False, ratios=ratios, prefix_alone=prefix_alone
        )
        run.run()
        self._refuse_nothing_left(run.state)
        return run.state

    def _refuse_nothing_left(self, state: TokenState) -> None:
        """Raises where the head pools over patches and none is left."""
        if self._pools_patches and state.x.shape[1] == state.front and state.grid:
            raise ValueError(
                f"keep={self.spot_config.keep} leaves none of {state.grid} patch tokens at the "
                "last stage, and this model's head pools over them"
            )

    def _output(self, logits: Tensor, tokens: Tensor, state: TokenState) -> SpotOutput:
        return SpotOutput(logits, tokens, state.all_masks(), state.logp, state.index)

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
        *,
        kept: Sequence[Tensor] | None = None,
        fill: str = "last",
        aux: bool = False,
    ) -> Any:
        """Block outputs as timm gives them, on the full grid, in training as in inference.

        The final features are those of `forward_features`: survivors only, where training does not
        mask. Arguments not named here are timm's.

        Args:
            x: images [B, 3, H, W].
            indices: blocks to take, or how many of the last.
            return_prefix_tokens: give prefix tokens beside each map.
            norm: apply the final norm to all tokens of maps, also to those that stand at dropped
                places; zeros stay zeros. It was trained on the last block's tokens alone.
            stop_early: run no blocks behind the last one taken.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: leave the final features out.
            output_dict: return a dictionary.
            attn_mask: not supported.
            is_causal: not supported.
            kept: decisions to use instead of the predictor's, see `forward`.
            fill: what stands where a token was dropped: "last", the last value it had, which heads
                can make the most of (docs/dense_prediction.md); "nearest", the value of the nearest
                token that is left; "zero".
            aux: return a pair: timm's result, and the `SpotOutput` of the same pass (its logits are
                those of the blocks that ran).
        """
        refuse_masks(attn_mask, is_causal)
        one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        one_of("fill", fill, FILLS)
        take, last = feature_take_indices(len(self.blocks), indices)
        run = TokenPass(
            self,
            x,
            kept,
            every_decision=aux,
            dense=fill == "last",
            stop=last + 1 if stop_early else None,
        )
        full = []
        for b in range(len(run.blocks)):
            run.block(b)
            if b in take:
                full.append(run.on_grid(fill, self.norm if norm else None))
        tokens = self.norm(run.tokens) if aux or not intermediates_only else None
        prefix = [y[:, : self.num_prefix_tokens] for y in full]
        maps = [y[:, self.num_prefix_tokens :] for y in full]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).unflatten(2, run.shape).contiguous() for y in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        result: Any
        if output_dict:
            result = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = tokens
        else:
            result = list(zip(maps, prefix, strict=True)) if with_prefix else maps
            if not intermediates_only:
                result = (tokens, result)
        if not aux:
            return result
        assert tokens is not None
        self._refuse_nothing_left(run.state)
        return result, self._output(self._head(tokens, run.state.pooled()), tokens, run.state)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return self.patch_embed.dynamic_feat_size((height, width))
