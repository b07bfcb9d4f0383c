"""Hugging Face's DINOv2, with registers and without: models and classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import (
    modeling_dinov2_with_registers as registers,
)

from spot_vit.models.adapters.base import ATTENTIONS, BLOCKS, MODELS, AdapterEntry, names, register
from spot_vit.models.adapters.transformers_base import (
    HostedAttention,
    HostedBlock,
    HostedModel,
    mean_of_kept,
    refuse_dropout,
)


class SpotDinov2Attention(HostedAttention, dinov2.Dinov2Attention):
    """Attention of DINOv2."""

    eager = staticmethod(dinov2.eager_attention_forward)


class SpotDinov2Layer(HostedBlock, dinov2.Dinov2Layer):
    """Block of DINOv2."""


class SpotRegistersAttention(HostedAttention, registers.Dinov2WithRegistersAttention):
    """Attention of DINOv2 with registers."""

    eager = staticmethod(registers.eager_attention_forward)


class SpotRegistersLayer(HostedBlock, registers.Dinov2WithRegistersLayer):
    """Block of DINOv2 with registers."""


class _Features(HostedModel):
    """Mixin of models without a head, which give the class token."""

    norm_name = "layernorm"
    answer = "pooler_output"

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        return x[:, 0]


class _Classifier(HostedModel):
    """Mixin of models whose head reads the class token beside the mean of all patches."""

    norm_name = "layernorm"
    classifier: Any

    @property
    def _pools_patches(self) -> bool:
        return True

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        mean = mean_of_kept(x, mask, self.num_prefix_tokens)
        features = torch.cat([x[:, 0], mean], dim=1)
        return features if pre_logits else self.classifier(features)


class SpotDinov2Model(_Features, dinov2.Dinov2Model):
    """A converted `Dinov2Model`."""


class SpotDinov2ForImageClassification(_Classifier, dinov2.Dinov2ForImageClassification):
    """A converted `Dinov2ForImageClassification`."""

    encoder_path = "dinov2"


class SpotRegistersModel(_Features, registers.Dinov2WithRegistersModel):
    """A converted `Dinov2WithRegistersModel`."""


class SpotRegistersForImageClassification(
    _Classifier, registers.Dinov2WithRegistersForImageClassification
):
    """A converted `Dinov2WithRegistersForImageClassification`."""

    encoder_path = "dinov2_with_registers"


_EMBEDDED = {"forward": names("pixel_values bool_masked_pos attention_mask kwargs")}
_LABELLED = {"forward": names("pixel_values labels attention_mask kwargs")}
_HIDDEN = {"forward": names("hidden_states attention_mask kwargs")}
_PARTS = names("embeddings encoder layernorm config")
_ATTENTION = names("num_attention_heads head_dim o_proj config attention_dropout")

for _target, _adapter, _inside in (
    (dinov2.Dinov2ForImageClassification, SpotDinov2ForImageClassification, "dinov2"),
    (
        registers.Dinov2WithRegistersForImageClassification,
        SpotRegistersForImageClassification,
        "dinov2_with_registers",
    ),
):
    register(MODELS, AdapterEntry(_target, _adapter, _LABELLED, (_inside, "classifier", "config")))
register(MODELS, AdapterEntry(dinov2.Dinov2Model, SpotDinov2Model, _EMBEDDED, _PARTS))
register(
    MODELS,
    AdapterEntry(registers.Dinov2WithRegistersModel, SpotRegistersModel, _EMBEDDED, _PARTS),
)
register(BLOCKS, AdapterEntry(dinov2.Dinov2Layer, SpotDinov2Layer, _HIDDEN, names("attention mlp")))
register(
    BLOCKS,
    AdapterEntry(
        registers.Dinov2WithRegistersLayer, SpotRegistersLayer, _HIDDEN, names("attention mlp")
    ),
)
register(
    ATTENTIONS,
    AdapterEntry(dinov2.Dinov2Attention, SpotDinov2Attention, _HIDDEN, _ATTENTION, refuse_dropout),
)
register(
    ATTENTIONS,
    AdapterEntry(
        registers.Dinov2WithRegistersAttention,
        SpotRegistersAttention,
        _HIDDEN,
        _ATTENTION,
        refuse_dropout,
    ),
)
