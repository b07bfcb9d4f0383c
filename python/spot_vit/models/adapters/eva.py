"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from spot_vit.models.adapters.base import (
    ATTENTIONS,
    BLOCKS,
    MODELS,
    AdapterEntry,
    AttentionAdapter,
    LayerScaleBlockAdapter,
    names,
    project_qkv,
    refuse_dropout,
    refuse_model,
    register,
)
from spot_vit.models.loop import SpotLoop
from spot_vit.nn.attention import AttentionRequest, refuse_masks
from spot_vit.nn.positional import PositionTables, RopeTables


class RotaryAttentionAdapter(AttentionAdapter):
    """Mixin of attention adapters: rotary embeddings, and requests."""

    num_kv_groups = 1

    if TYPE_CHECKING:  # what an adapter and its timm class provide
        q_norm: nn.Module
        k_norm: nn.Module
        norm: nn.Module
        gate: nn.Module | None
        proj: nn.Module
        proj_drop: nn.Module
        scale: float
        rotate_half: bool

        def _project(self, x: Tensor) -> Sequence[Tensor]:
            """Q [B, N, H, D], and k and v, of H / num_kv_groups heads."""

    def _attend(
        self,
        x: Tensor,
        request: AttentionRequest,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        refuse_masks(attn_mask, is_causal)
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (
                _rotate(t, rope, request.num_prefix, self.rotate_half).type_as(v) for t in (q, k)
            )
        if self.num_kv_groups > 1:
            k, v = (t.repeat_interleave(self.num_kv_groups, dim=2) for t in (k, v))
        out = self._attention(q, k, v, request, self.scale)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class SpotEvaAttention(RotaryAttentionAdapter, EvaAttention):  # type: ignore[misc]
    """Attention with rotary embeddings and no bias of the keys."""

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return [project(x).unflatten(2, (self.num_heads, -1)) for project in projections]
        qkv = project_qkv(self, x, self.qkv_bias_separate)
        return qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)


class SpotAttentionRope(RotaryAttentionAdapter, AttentionRope):  # type: ignore[misc]
    """Attention with rotary embeddings and heads of keys and values in groups.

    Statistics are those of the queries' heads.
    """

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        if self.qkv is None:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return [project(x).unflatten(2, (-1, self.head_dim)) for project in projections]
        return self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)


def _rotate(t: Tensor, rope: Tensor, num_prefix: int, half: bool) -> Tensor:
    """Rotates the patches of t [B, N, H, D]; `rope` broadcasts against [B, H, N, D]."""
    t = t.transpose(1, 2)
    patches = apply_rot_embed_cat(t[:, :, num_prefix:], rope, half=half)
    return torch.cat([t[:, :, :num_prefix], patches], dim=2).transpose(1, 2)


class SpotEvaBlock(LayerScaleBlockAdapter, EvaBlock):  # type: ignore[misc]
    """Pre-norm block with scales of its own."""


class SpotEva(SpotLoop, Eva):  # type: ignore[misc]
    """A converted `Eva`."""

    blocks: Any

    @property
    def has_class_token(self) -> bool:  # type: ignore[override]
        """Whether the first prefix token is a class token."""
        return self.cls_token is not None

    def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
        x, rope = self._pos_embed(self.patch_embed(x))
        tables = (
            PositionTables()
            if rope is None
            else RopeTables(rope, getattr(self, "rope_mixed", False))
        )
        return self.norm_pre(x), tables

    @property
    def _pools_prefix(self) -> bool:
        return self.attn_pool is not None  # as `Eva.pool` has it


_MASKED = names("x attn_mask is_causal")
_ROTATED = names("x rope attn_mask is_causal")
_ATTENTION = names(
    "num_heads head_dim scale qkv q_proj k_proj v_proj q_norm k_norm attn_drop norm gate proj "
    "proj_drop rotate_half num_prefix_tokens"
)

register(
    MODELS,
    AdapterEntry(
        Eva,
        SpotEva,
        {
            "forward": _MASKED,
            "forward_features": _MASKED,
            "forward_head": ("x", "pre_logits"),
            "pool": ("x", "pool_type"),
            "_pos_embed": ("x",),
            "forward_intermediates": names(
                "x indices return_prefix_tokens norm stop_early output_fmt intermediates_only "
                "attn_mask is_causal"
            ),
        },
        names(
            "patch_embed patch_drop norm_pre blocks norm attn_pool fc_norm head_drop head "
            "num_prefix_tokens cls_token global_pool grad_checkpointing rope"
        ),
        refuse_model,
    ),
)
register(
    BLOCKS,
    AdapterEntry(
        EvaBlock,
        SpotEvaBlock,
        {"forward": _ROTATED},
        names("norm1 attn gamma_1 drop_path1 norm2 mlp gamma_2 drop_path2"),
    ),
)
register(
    ATTENTIONS,
    AdapterEntry(
        EvaAttention,
        SpotEvaAttention,
        {"forward": _ROTATED},
        (*_ATTENTION, *names("q_bias k_bias v_bias qkv_bias_separate")),
        refuse_dropout,
    ),
)
register(
    ATTENTIONS,
    AdapterEntry(
        AttentionRope,
        SpotAttentionRope,
        {"forward": _ROTATED},
        (*_ATTENTION, "num_kv_groups"),
        refuse_dropout,
    ),
)
