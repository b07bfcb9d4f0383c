"""timm's Beit: BEiT and BEiT v2, with relative position bias."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import beit
from torch import Tensor

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
    register,
)
from spot_vit.models.loop import SpotLoop
from spot_vit.nn.attention import AttentionRequest
from spot_vit.nn.positional import BiasTables, PositionTables


class SpotBeitAttention(AttentionAdapter, beit.Attention):
    """Attention with relative position bias."""

    def _attend(
        self, x: Tensor, request: AttentionRequest, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        qkv = project_qkv(self, x)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        table = None if shared_rel_pos_bias is None else shared_rel_pos_bias[None]
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            table = own if table is None else own + table
        if table is not None:
            table = request.tables.bias(table).to(q.dtype)
        out = self._attention(q, k, v, request, self.scale, table)
        return self.proj_drop(self.proj(out))


class SpotBeitBlock(LayerScaleBlockAdapter, beit.Block):  # type: ignore[misc]
    """Pre-norm block with scales of its own."""


class SpotBeit(SpotLoop, beit.Beit):
    """A converted `Beit`."""

    blocks: Any
    has_class_token = True

    def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return self.pos_drop(x), BiasTables(shared)

    @property
    def _pools_patches(self) -> bool:
        return self.global_pool == "avg"  # any other one reads the class token


_BIASED = names("x shared_rel_pos_bias")

register(
    MODELS,
    AdapterEntry(
        beit.Beit,
        SpotBeit,
        {
            "forward": ("x",),
            "forward_features": ("x",),
            "forward_head": ("x", "pre_logits"),
            "forward_intermediates": names(
                "x indices return_prefix_tokens norm stop_early output_fmt intermediates_only"
            ),
        },
        names(
            "patch_embed cls_token pos_embed pos_drop rel_pos_bias blocks norm fc_norm head_drop "
            "head num_prefix_tokens global_pool grad_checkpointing"
        ),
    ),
)
register(
    BLOCKS,
    AdapterEntry(
        beit.Block,
        SpotBeitBlock,
        {"forward": _BIASED},
        names("norm1 attn gamma_1 drop_path1 norm2 mlp gamma_2 drop_path2"),
    ),
)
register(
    ATTENTIONS,
    AdapterEntry(
        beit.Attention,
        SpotBeitAttention,
        {"forward": _BIASED},
        names(
            "num_heads scale qkv q_bias k_bias v_bias attn_drop relative_position_bias_table "
            "_get_rel_pos_bias proj proj_drop"
        ),
        refuse_dropout,
        "a relative position bias is added to its logits, for which sparse attention has no place",
    ),
)
