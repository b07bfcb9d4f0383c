"""timm's VisionTransformer: ViT, DeiT, DeiT-III, DINOv2 with registers, CLIP, SigLIP, ViTamin."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor

from spot_vit.models.adapters.base import (
    ATTENTIONS,
    BLOCKS,
    MODELS,
    AdapterEntry,
    AttentionAdapter,
    BlockAdapter,
    names,
    refuse_dropout,
    refuse_model,
    register,
)
from spot_vit.models.loop import SpotLoop
from spot_vit.nn.attention import AttentionRequest, refuse_masks
from spot_vit.nn.positional import PositionTables


class SpotAttention(AttentionAdapter, Attention):
    """Attention of timm's ViT."""

    def _attend(
        self,
        x: Tensor,
        request: AttentionRequest,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        refuse_masks(attn_mask, is_causal)
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        shape = (x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).reshape(shape).unbind(2)
        out = self._attention(self.q_norm(q), self.k_norm(k), v, request, self.scale)
        out = self.norm(out)
        if gate is not None:
            out = out * gate
        return self.proj_drop(self.proj(out))


class SpotBlock(BlockAdapter, Block):
    """Pre-norm block."""

    def _attend(self, x: Tensor, request: AttentionRequest, **arguments: Any) -> Tensor:
        y = self.attn(self.norm1(x), request=request, **arguments)
        return x + self.drop_path1(self.ls1(y))

    def _mix(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SpotResPostBlock(BlockAdapter, ResPostBlock):
    """Block with norms at the end of its branches."""

    def _attend(self, x: Tensor, request: AttentionRequest, **arguments: Any) -> Tensor:
        y = self.attn(x, request=request, **arguments)
        return x + self.drop_path1(self.norm1(y))

    def _mix(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class SpotVisionTransformer(SpotLoop, VisionTransformer):
    """A converted `VisionTransformer`."""

    blocks: Any

    def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x)), PositionTables()


class SpotVisionTransformerDistilled(SpotVisionTransformer, VisionTransformerDistilled):
    """A converted `VisionTransformerDistilled`: its heads read the two prefix tokens."""

    @property
    def _pools_patches(self) -> bool:
        return False


_MASKED = names("x attn_mask is_causal")
SIGNATURES = {
    "forward": _MASKED,
    "forward_features": _MASKED,
    "forward_head": ("x", "pre_logits"),
    "pool": ("x", "pool_type"),
    "forward_intermediates": names(
        "x indices return_prefix_tokens norm stop_early output_fmt intermediates_only "
        "output_dict attn_mask is_causal"
    ),
}
_PARTS = names(
    "patch_embed patch_drop norm_pre blocks norm attn_pool fc_norm head_drop head "
    "num_prefix_tokens has_class_token pool_include_prefix global_pool grad_checkpointing"
)

register(
    MODELS, AdapterEntry(VisionTransformer, SpotVisionTransformer, SIGNATURES, _PARTS, refuse_model)
)
register(
    MODELS,
    AdapterEntry(
        VisionTransformerDistilled,
        SpotVisionTransformerDistilled,
        SIGNATURES,
        (*_PARTS, "head_dist"),
        refuse_model,
    ),
)
register(
    BLOCKS,
    AdapterEntry(
        Block,
        SpotBlock,
        {"forward": _MASKED},
        names("norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2"),
    ),
)
register(
    BLOCKS,
    AdapterEntry(
        ResPostBlock,
        SpotResPostBlock,
        {"forward": _MASKED},
        names("norm1 attn drop_path1 norm2 mlp drop_path2"),
    ),
)
register(
    ATTENTIONS,
    AdapterEntry(
        Attention,
        SpotAttention,
        {"forward": _MASKED},
        names("num_heads head_dim scale qkv q_norm k_norm attn_drop norm gate proj proj_drop"),
        refuse_dropout,
    ),
)
