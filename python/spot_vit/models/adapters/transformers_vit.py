"""Hugging Face's ViT: ViTModel and ViTForImageClassification."""

from __future__ import annotations

from torch import Tensor
from transformers.models.vit import modeling_vit as vit

from spot_vit.models.adapters.base import ATTENTIONS, BLOCKS, MODELS, AdapterEntry, names, register
from spot_vit.models.adapters.transformers_base import (
    HostedAttention,
    HostedBlock,
    HostedModel,
    refuse_dropout,
)


class SpotViTAttention(HostedAttention, vit.ViTAttention):
    """Attention of ViT."""

    eager = staticmethod(vit.eager_attention_forward)


class SpotViTLayer(HostedBlock, vit.ViTLayer):
    """Block of ViT."""


class SpotViTModel(HostedModel, vit.ViTModel):
    """A converted `ViTModel`."""

    norm_name = "layernorm"
    answer = "pooler_output"

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        return x[:, 0] if self.pooler is None or pre_logits else self.pooler(x)


class SpotViTForImageClassification(HostedModel, vit.ViTForImageClassification):
    """A converted `ViTForImageClassification`."""

    encoder_path = "vit"
    norm_name = "layernorm"

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        return x[:, 0] if pre_logits else self.classifier(x[:, 0])


_EMBEDDED = names("pixel_values bool_masked_pos interpolate_pos_encoding attention_mask kwargs")
_LABELLED = names("pixel_values labels interpolate_pos_encoding attention_mask kwargs")
_HIDDEN = names("hidden_states attention_mask kwargs")

register(
    MODELS,
    AdapterEntry(
        vit.ViTModel,
        SpotViTModel,
        {"forward": _EMBEDDED},
        names("embeddings layers layernorm pooler config"),
    ),
)
register(
    MODELS,
    AdapterEntry(
        vit.ViTForImageClassification,
        SpotViTForImageClassification,
        {"forward": _LABELLED},
        names("vit classifier config"),
    ),
)
register(
    BLOCKS,
    AdapterEntry(vit.ViTLayer, SpotViTLayer, {"forward": _HIDDEN}, names("attention mlp")),
)
register(
    ATTENTIONS,
    AdapterEntry(
        vit.ViTAttention,
        SpotViTAttention,
        {"forward": _HIDDEN},
        names("num_attention_heads head_dim o_proj config attention_dropout"),
        refuse_dropout,
    ),
)
