"""LV-ViT: divided residuals, and a head that looks at every kept token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spot_vit.models.adapters.base import (
    BLOCKS,
    MODELS,
    AdapterEntry,
    BlockAdapter,
    names,
    refuse_patch_drop,
    register,
)
from spot_vit.models.adapters.vit import SIGNATURES, SpotVisionTransformer
from spot_vit.models.lvvit import LVBlock, LVViT
from spot_vit.nn.attention import AttentionRequest


class SpotLVBlock(BlockAdapter, LVBlock):
    """Pre-norm block with divided residuals."""

    def _attend(self, x: Tensor, request: AttentionRequest, **arguments: Any) -> Tensor:
        y = self.attn(self.norm1(x), request=request, **arguments)
        return x + self.drop_path1(self.ls1(y)) / self.skip_lam

    def _mix(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) / self.skip_lam


class SpotLVViT(SpotVisionTransformer, LVViT):
    """A converted `LVViT`: the auxiliary head's maximum runs over kept tokens."""

    @property
    def _pools_patches(self) -> bool:
        return self.num_classes > 0 and self.global_pool == "token"

    def _head_kept(self, x: Tensor, mask: Tensor, pre_logits: bool = False) -> Tensor:
        return LVViT.forward_head(self, x, pre_logits) if pre_logits else self.logits(x, mask)


register(
    MODELS,
    AdapterEntry(
        LVViT,
        SpotLVViT,
        {**SIGNATURES, "logits": names("x keep")},
        names(
            "patch_embed patch_drop norm_pre blocks norm head aux_head num_prefix_tokens "
            "has_class_token grad_checkpointing"
        ),
        refuse_patch_drop,
    ),
)
register(
    BLOCKS,
    AdapterEntry(
        LVBlock,
        SpotLVBlock,
        {"forward": names("x attn_mask is_causal")},
        names("norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2 skip_lam"),
    ),
)
