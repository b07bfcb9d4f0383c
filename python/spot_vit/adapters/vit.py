"""timm's VisionTransformer: ViT, DeiT, DeiT-III, DINOv2 with registers, CLIP and SigLIP towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import spot_ext
from spot_vit.adapters.base import ATTENTIONS, BLOCKS, MODELS, ClassAdapter, register
from spot_vit.loop import SpotLoop, refuse_masks


class SpotAttention(Attention):
    """Attention that can hide dropped tokens and return SPOT's statistics."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        keep: Tensor | None = None,
        want: bool = False,
        num_prefix: int = 1,
        class_token: bool = True,
    ) -> Any:
        """Output [B, N, C]; with `want` also the statistics [B, N, H, 6]."""
        if keep is None and not want:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        shape = (x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).reshape(shape).unbind(2)
        out, stats = spot_ext.attention_stats(
            self.q_norm(q),
            self.k_norm(k),
            v,
            keep,
            scale=self.scale,
            num_prefix=num_prefix,
            class_token=class_token,
            need_stats=want,
        )
        out = self.norm(out.flatten(2))
        if gate is not None:
            out = out * gate
        out = self.proj_drop(self.proj(out))
        return (out, stats) if want else out


class SpotBlock(Block):
    """Pre-norm block; `relevance` decides on the tokens that enter it, where it is not None."""

    relevance: nn.Module | None

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        want: bool = False,
        **asked: Any,
    ) -> Any:
        """Tokens [B, N, C]; with `want` also the statistics of its attention [B, N, H, 6]."""
        if not asked and not want:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        result = self.attn(self.norm1(x), want=want, **asked)
        y, stats = result if want else (result, None)
        x = x + self.drop_path1(self.ls1(y))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return (x, stats) if want else x


class SpotVisionTransformer(SpotLoop, VisionTransformer):
    """A converted `VisionTransformer`."""

    blocks: Any

    def _tokens(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x))

    def _head_kept(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.head_drop(self.fc_norm(self._pool_kept(x, mask))))

    def _pool_kept(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pools as `VisionTransformer.pool` does, over the tokens in `mask` [B, N] only."""
        if self.attn_pool is None and self.global_pool in ("", "token"):
            return self.pool(x)
        if self.pool_include_prefix:
            prefix = mask.new_ones(mask.shape[0], self.num_prefix_tokens)
            mask = torch.cat([prefix, mask], dim=1)
        else:
            x = x[:, self.num_prefix_tokens :]
        seen = mask.detach() > 0.5
        seen = seen | ~seen.any(dim=1, keepdim=True)  # nothing kept: pool over everything
        if self.attn_pool is not None:
            return self.attn_pool(x, attn_mask=seen[:, None, None])
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = mask.to(wide)
        mean = (x * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)
        if self.global_pool == "avg":
            return mean.to(x.dtype)
        largest = x.masked_fill(~seen[..., None], float("-inf")).amax(dim=1)
        if self.global_pool == "max":
            return largest
        return 0.5 * (largest + mean.to(x.dtype))  # avgmax

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
        are those of `forward_features`: survivors only, in eval.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        refuse_masks(attn_mask, is_causal)
        height, width = x.shape[-2:]
        take, last = feature_take_indices(len(self.blocks), indices)
        run = self._run(x, take=take, stop=last + 1 if stop_early else None)
        full = [run.taken[b] for b in sorted(run.taken)]
        if norm:
            full = [self.norm(y) for y in full]
        prefix = [y[:, : self.num_prefix_tokens] for y in full]
        maps = [y[:, self.num_prefix_tokens :] for y in full]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(run.x)
            return result
        outputs: Sequence[Any] = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return outputs if intermediates_only else (self.norm(run.x), outputs)


def _refuse_model(model: Any) -> str | None:
    if not isinstance(model.patch_drop, nn.Identity):
        return "patch_drop_rate is not 0: random dropping and SPOT would fight over the same tokens"
    pool = model.attn_pool
    if pool is not None and type(pool) is not AttentionPoolLatent:
        return (
            f"its pooling {type(pool).__name__} mixes tokens in a way that has no masked form yet"
        )
    if pool is not None and pool.pos_embed is not None:
        return "its attention pooling adds a position embedding tied to the full grid"
    return None


def _refuse_attention(attention: Any) -> str | None:
    if attention.attn_drop.p > 0:
        return "attention dropout (attn_drop > 0) has no counterpart in attention with statistics"
    return None


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_MASKED = _names("x attn_mask is_causal")

register(
    MODELS,
    ClassAdapter(
        VisionTransformer,
        SpotVisionTransformer,
        {
            "forward": _MASKED,
            "forward_features": _MASKED,
            "forward_head": ("x", "pre_logits"),
            "pool": ("x", "pool_type"),
            "forward_intermediates": _names(
                "x indices return_prefix_tokens norm stop_early output_fmt intermediates_only "
                "output_dict attn_mask is_causal"
            ),
        },
        _names(
            "patch_embed patch_drop norm_pre blocks norm attn_pool fc_norm head_drop head "
            "num_prefix_tokens has_class_token pool_include_prefix global_pool grad_checkpointing"
        ),
        _refuse_model,
    ),
)
register(
    BLOCKS,
    ClassAdapter(
        Block,
        SpotBlock,
        {"forward": _MASKED},
        _names("norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2"),
    ),
)
register(
    ATTENTIONS,
    ClassAdapter(
        Attention,
        SpotAttention,
        {"forward": _MASKED},
        _names("num_heads head_dim scale qkv q_norm k_norm attn_drop norm gate proj proj_drop"),
        _refuse_attention,
    ),
)
