"""Adapters: one module per family of timm models, and the table `sparsify` looks classes up in."""

from spot_vit.adapters import beit, eva, lvvit, naflex, vit
from spot_vit.adapters.base import ATTENTIONS, BLOCKS, MODELS, UNSUPPORTED, ClassAdapter

__all__ = [
    "ATTENTIONS",
    "BLOCKS",
    "MODELS",
    "UNSUPPORTED",
    "ClassAdapter",
    "beit",
    "eva",
    "lvvit",
    "naflex",
    "vit",
]
