"""Subclasses of timm's classes that add and change nothing, as research code has them."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

SIZES: dict[str, Any] = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}


class MaskedAutoencoder(VisionTransformer):
    """MAE style: an `__init__` of its own, a decoder, a loop of its own in pretraining."""

    def __init__(self, mask_ratio: float = 0.75, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.mask_ratio = mask_ratio
        self.decoder_embed = nn.Linear(self.embed_dim, 16)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1, 16))

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"decoder_pos_embed"}

    def forward_encoder(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_loss(self, x: Tensor) -> Tensor:
        return (
            (self.decoder_embed(self.forward_encoder(x)) + self.decoder_pos_embed).square().mean()
        )


class OwnAttention(Attention):
    """Attention with a number of its own."""

    temperature = 2.0


class OwnBlock(Block):
    """A block with a method of its own."""

    def describe(self) -> str:
        return f"{self.attn.num_heads} heads"


class OwnEva(Eva):
    """Its head has another name too."""

    def classifier(self) -> nn.Module:
        return self.head


class OwnBeit(Beit):
    pass


class OwnNaFlex(NaFlexVit):
    pass


def small(own: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small model of an own class, with weights large enough that every part matters."""
    torch.manual_seed(0)
    if own == "MAE":
        model: nn.Module = MaskedAutoencoder(img_size=64, **SIZES)
    elif own == "blocks and attention":
        model = MaskedAutoencoder(img_size=64, block_fn=OwnBlock, attn_layer=OwnAttention, **SIZES)
    elif own == "Eva":
        model = OwnEva(img_size=64, use_rot_pos_emb=True, **SIZES)
    elif own == "BEiT":
        model = OwnBeit(img_size=64, use_rel_pos_bias=True, **SIZES)
    else:
        sizes = {name: size for name, size in SIZES.items() if name != "num_classes"}
        model = OwnNaFlex(NaFlexVitCfg(**sizes, pos_embed_grid_size=(4, 4)), num_classes=7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    return model.to(dtype).eval()
