"""Small models of every family, with weights large enough that every part matters."""

from __future__ import annotations

from typing import Any

import timm
import torch
from spot_vit.models.lvvit import LVViT
from torch import Tensor, nn

FAMILIES = ["distilled", "EVA-02", "BEiT", "NaFlex, rotary"]  # one model of each class
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 7}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "avg": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}),
    "max, no class token": (
        "vit_tiny_patch16_224",
        {**SMALL, "global_pool": "max", "class_token": False},
    ),
    "avgmax with prefix": (
        "vit_tiny_patch16_224",
        {**SMALL, "global_pool": "avgmax", "pool_include_prefix": True},
    ),
    "registers, LayerScale": (
        "vit_small_patch14_reg4_dinov2",
        {**SMALL, "img_size": 56},
    ),
    "map pooling (SigLIP)": ("vit_base_patch16_siglip_224", SMALL),
    "qk norm": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}),
    "no pooling": ("vit_tiny_patch16_224", {**SMALL, "global_pool": ""}),
    "pre norm (CLIP)": ("vit_base_patch16_clip_224", SMALL),
    "DeiT-III": ("deit3_small_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "norms after the branches": ("vit_base_patch16_rpn_224", SMALL),
    "ViTamin": ("vitamin_small_224", {"depth": 5, "num_classes": 7, "img_size": 64}),
    "EVA-02": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 56}),
    "EVA-02 base, scaled attention": (
        "eva02_base_patch14_224",
        {**SMALL, "img_size": 56, "embed_dim": 48},
    ),
    "DINOv3, registers": ("vit_small_patch16_dinov3", SMALL),
    "rotary tables per block": ("vit_small_patch16_rope_mixed_224", {**SMALL, "num_heads": 3}),
    "Perception Encoder, map": ("vit_pe_core_tiny_patch16_384", SMALL),
    "BEiT": ("beit_base_patch16_224", SMALL),
    "BEiT, shared bias, class token": (
        "beitv2_base_patch16_224",
        {
            **SMALL,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "global_pool": "token",
        },
    ),
    "NaFlex, avg": ("naflexvit_base_patch16_gap", SMALL),
    "NaFlex, map": ("naflexvit_base_patch16_siglip", SMALL),
    "NaFlex, rotary": ("naflexvit_base_patch16_gap", {**SMALL, "rope_type": "axial"}),
    "NaFlex, rotary tables per block": (
        "naflexvit_base_patch16_gap",
        {**SMALL, "rope_type": "mixed"},
    ),
    "NaFlex, multimodal rotary": (
        "naflexvit_base_patch16_gap",
        {**SMALL, "rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
    ),
    "grouped queries": (
        "naflexvit_base_patch16_gap",
        {
            **SMALL,
            "num_heads": 4,
            "num_kv_heads": 2,
            "rope_type": "axial",
            "attn_type": "rope",
            "qkv_fused": False,
        },
    ),
}


def build(
    variant: str = "class token", dtype: torch.dtype = torch.float32, **extra: Any
) -> nn.Module:
    """A small timm model with weights large enough that every part matters."""
    name, arguments = VARIANTS[variant]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{**arguments, **extra})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    return model.to(dtype).eval()


def images(model: nn.Module, batch: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    embed: Any = getattr(model, "patch_embed", None)
    size = (64, 64) if embed is None else embed.img_size
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, *size, generator=generator).to(dtype)


SMALL_LVVIT = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def build_lvvit(
    name: str = "lvvit_small", dtype: torch.dtype = torch.float64, **extra: Any
) -> LVViT:
    """A small LV-ViT whose every part matters, BatchNorm statistics included."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL_LVVIT, **extra})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.to(dtype).eval()
