"""Hugging Face's SigLIP: the vision model, and the classifier on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.siglip import modeling_siglip as siglip

from spot_vit.models.adapters.base import ATTENTIONS, BLOCKS, MODELS, AdapterEntry, names, register
from spot_vit.models.adapters.transformers_base import (
    HostedAttention,
    HostedBlock,
    HostedModel,
    mean_of_kept,
    refuse_dropout,
)


class SpotSiglipAttention(HostedAttention, siglip.SiglipAttention):
    """Attention of SigLIP."""

    eager = staticmethod(siglip.eager_attention_forward)


class SpotSiglipLayer(HostedBlock, siglip.SiglipEncoderLayer):
    """Block of SigLIP."""


class _Siglip(HostedModel):
    """Mixin: no class token, and heads that pool over patches."""

    norm_name = "post_layernorm"
    has_class_token = False

    @property
    def _pools_patches(self) -> bool:
        return True


class SpotSiglipVisionModel(_Siglip, siglip.SiglipVisionModel):
    """A converted `SiglipVisionModel`: its attention pooling sees the tokens that are kept."""

    answer = "pooler_output"

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        if not self.use_head:
            return mean_of_kept(x, mask, 0)
        return self.head(x) if mask is None else _pool(self.head, x, mask)


class SpotSiglipForImageClassification(_Siglip, siglip.SiglipForImageClassification):
    """A converted `SiglipForImageClassification`: its head reads the mean of the kept tokens."""

    encoder_path = "vision_model"

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        features = mean_of_kept(x, mask, 0)
        return features if pre_logits else self.classifier(features)


def _pool(head: Any, x: Tensor, mask: Tensor) -> Tensor:
    """[B, C] attention pooling of tokens x [B, N, C], those in `mask` [B, N], or all if none is."""
    seen = mask.detach() > 0.5
    seen = seen | ~seen.any(dim=1, keepdim=True)
    probe = head.probe.expand(len(x), -1, -1)
    y, _ = head.attention(probe, x, x, key_padding_mask=~seen, need_weights=False)
    pooled: Tensor = (y + head.mlp(head.layernorm(y)))[:, 0]
    return pooled


def _refuse_head(model: Any) -> str | None:
    """Reason not to convert a model by its pooling, or None."""
    if model.use_head and type(model.head) is not siglip.SiglipMultiheadAttentionPoolingHead:
        return f"its pooling is a {type(model.head).__name__}, which has no masked form yet"
    return None


_EMBEDDED = {"forward": names("pixel_values interpolate_pos_encoding kwargs")}
_LABELLED = {"forward": names("pixel_values labels interpolate_pos_encoding kwargs")}
_HIDDEN = {"forward": names("hidden_states attention_mask kwargs")}

register(
    MODELS,
    AdapterEntry(
        siglip.SiglipVisionModel,
        SpotSiglipVisionModel,
        _EMBEDDED,
        names("embeddings encoder post_layernorm use_head config"),
        _refuse_head,
    ),
)
register(
    MODELS,
    AdapterEntry(
        siglip.SiglipForImageClassification,
        SpotSiglipForImageClassification,
        _LABELLED,
        names("vision_model classifier config"),
    ),
)
register(
    BLOCKS,
    AdapterEntry(siglip.SiglipEncoderLayer, SpotSiglipLayer, _HIDDEN, names("self_attn mlp")),
)
register(
    ATTENTIONS,
    AdapterEntry(
        siglip.SiglipAttention,
        SpotSiglipAttention,
        _HIDDEN,
        names("num_heads head_dim out_proj config dropout"),
        refuse_dropout,
    ),
)
