"""Adapters: one module per family of timm models, and the table `sparsify` looks classes up in."""

from spot_vit.adapters.base import ATTENTIONS, BLOCKS, MODELS, ClassAdapter
from spot_vit.adapters.vit import SpotAttention, SpotBlock, SpotVisionTransformer

__all__ = [
    "ATTENTIONS",
    "BLOCKS",
    "MODELS",
    "ClassAdapter",
    "SpotAttention",
    "SpotBlock",
    "SpotVisionTransformer",
]
