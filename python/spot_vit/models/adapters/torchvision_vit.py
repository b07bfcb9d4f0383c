"""torchvision's VisionTransformer: vit_b_16 and its sisters."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from spot_vit.models.adapters.base import (
    ATTENTIONS,
    BLOCKS,
    MODELS,
    AdapterEntry,
    AttentionAdapter,
    BlockAdapter,
    names,
    register,
)
from spot_vit.models.loop import SpotLoop
from spot_vit.nn.attention import AttentionRequest, refuse_masks
from spot_vit.nn.positional import PositionTables


class SpotMultiheadAttention(AttentionAdapter, nn.MultiheadAttention):  # type: ignore[misc]
    """Attention of torch, as torchvision's block calls it: of one sequence, without its maps."""

    def _attend(  # type: ignore[override]
        self,
        x: Tensor,
        request: AttentionRequest,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        refuse_masks(attn_mask)
        if key is not x or value is not x or key_padding_mask is not None or need_weights:
            raise ValueError(
                "attention of a sparse model takes one sequence as query, key and value, no "
                "padding, and gives no maps: see spot_vit.attention_maps"
            )
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        return self.out_proj(self._attention(q, k, v, request, self.head_dim**-0.5)), None


class SpotEncoderBlock(BlockAdapter, EncoderBlock):
    """Pre-norm block."""

    ln_1: nn.Module
    self_attention: nn.Module
    dropout: nn.Module
    ln_2: nn.Module
    mlp: nn.Module

    @property
    def attn(self) -> nn.Module:
        """Its attention, by the name that the loop knows."""
        return self.self_attention

    def _attend(self, x: Tensor, request: AttentionRequest, **arguments: Any) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False, request=request)
        return self.dropout(y) + x

    def _mix(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


class SpotTorchvisionTransformer(SpotLoop, VisionTransformer):
    """A converted `VisionTransformer` of torchvision."""

    class_token: Tensor
    encoder: Any
    heads: Any
    patch_size: int
    has_class_token = True
    num_prefix_tokens = 1
    grad_checkpointing = False  # torchvision has no switch for it
    pretrained_cfg: ClassVar = {"classifier": "heads.head", "num_classes": 1000}  # as published

    @property
    def blocks(self) -> Any:
        """Its blocks, by the name that the loop knows."""
        return self.encoder.layers

    @property
    def norm(self) -> Any:  # type: ignore[override]
        """Its final norm, likewise."""
        return self.encoder.ln

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"class_token", "encoder.pos_embedding"}

    def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
        patches: Tensor = self._process_input(x)  # type: ignore[operator]
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.encoder.dropout(tokens + self.encoder.pos_embedding), PositionTables()

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        heads = self.heads[:-1] if pre_logits else self.heads
        logits: Tensor = heads(x[:, 0])
        return logits

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size, width // self.patch_size


def _refuse_attention(attention: nn.MultiheadAttention) -> str | None:
    """Reason not to convert an attention module, or None."""
    if attention.dropout > 0:
        return "attention dropout has no counterpart in attention with statistics"
    if not attention.batch_first or attention.in_proj_weight is None:
        return "it is no self-attention with the batch first"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    return None


register(
    MODELS,
    AdapterEntry(
        VisionTransformer,
        SpotTorchvisionTransformer,
        {"forward": ("x",), "_process_input": ("x",)},
        names("image_size patch_size class_token encoder heads"),
    ),
)
register(
    BLOCKS,
    AdapterEntry(
        EncoderBlock,
        SpotEncoderBlock,
        {"forward": ("input",)},
        names("ln_1 self_attention dropout ln_2 mlp"),
    ),
)
register(
    ATTENTIONS,
    AdapterEntry(
        nn.MultiheadAttention,
        SpotMultiheadAttention,
        {
            "forward": names(
                "query key value key_padding_mask need_weights attn_mask average_attn_weights "
                "is_causal"
            )
        },
        names("num_heads head_dim in_proj_weight in_proj_bias out_proj dropout batch_first"),
        _refuse_attention,
    ),
)
