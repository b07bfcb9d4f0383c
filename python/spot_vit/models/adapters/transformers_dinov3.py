"""Hugging Face's DINOv3 ViT, with rotary positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from spot_vit.models.adapters.base import ATTENTIONS, BLOCKS, MODELS, AdapterEntry, names, register
from spot_vit.models.adapters.transformers_base import (
    HostedAttention,
    HostedBlock,
    HostedModel,
    refuse_dropout,
)
from spot_vit.nn.positional import PositionTables


class RotaryPair(PositionTables):
    """Rotary position embeddings as Hugging Face's blocks take them.

    Args:
        cos: [N, D] of the full grid.
        sin: [N, D].
        position: as in `at`; None for the full grid.
    """

    tied = True

    def __init__(self, cos: Tensor, sin: Tensor, position: Tensor | None = None) -> None:
        self.cos, self.sin = cos, sin
        self._at = (cos, sin)
        if position is not None:  # a position of no token rotates by nothing
            place = position.clamp(max=len(cos))
            still = (F.pad(cos, (0, 0, 0, 1), value=1.0), F.pad(sin, (0, 0, 0, 1)))
            self._at = (still[0][place].unsqueeze(1), still[1][place].unsqueeze(1))

    def at(self, position: Tensor, num_prefix: int, num_fused: int) -> RotaryPair:
        """Rows of the tables, gathered at once for all blocks."""
        return RotaryPair(self.cos, self.sin, position)

    def arguments(self, block: int) -> dict[str, Any]:
        """`position_embeddings`: cosine and sine [N, D], or [B, 1, n, D] after a cut."""
        return {"position_embeddings": self._at}


class SpotDINOv3ViTAttention(  # type: ignore[misc]
    HostedAttention, dinov3.DINOv3ViTAttention
):
    """Attention of DINOv3."""

    eager = staticmethod(dinov3.eager_attention_forward)


class SpotDINOv3ViTLayer(HostedBlock, dinov3.DINOv3ViTLayer):  # type: ignore[misc]
    """Block of DINOv3."""


class SpotDINOv3ViTModel(HostedModel, dinov3.DINOv3ViTModel):  # type: ignore[override]
    """A converted `DINOv3ViTModel`."""

    norm_name = "norm"
    answer = "pooler_output"

    def _tables(self, arguments: dict[str, Any]) -> PositionTables:
        return RotaryPair(*arguments["position_embeddings"])

    def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
        return self.embeddings(x), RotaryPair(*self.rope_embeddings(x))

    def _head(self, x: Tensor, mask: Tensor | None, pre_logits: bool = False) -> Tensor:
        return x[:, 0]


_ROTATED = {"forward": names("hidden_states attention_mask position_embeddings kwargs")}

register(
    MODELS,
    AdapterEntry(
        dinov3.DINOv3ViTModel,
        SpotDINOv3ViTModel,
        {"forward": names("pixel_values bool_masked_pos kwargs")},
        names("embeddings rope_embeddings model norm config"),
    ),
)
register(
    BLOCKS,
    AdapterEntry(dinov3.DINOv3ViTLayer, SpotDINOv3ViTLayer, _ROTATED, names("attention mlp")),
)
register(
    ATTENTIONS,
    AdapterEntry(
        dinov3.DINOv3ViTAttention,
        SpotDINOv3ViTAttention,
        _ROTATED,
        names("num_heads head_dim o_proj config dropout"),
        refuse_dropout,
    ),
)
