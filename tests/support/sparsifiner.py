"""Small models with sparse attention, whose predictors are not near uniform."""

from __future__ import annotations

import copy
from typing import Any

import spot_vit
import torch
from spot_vit.models.sparsifiner import predictors
from support.models import VARIANTS, build, build_lvvit, images
from torch import Tensor

BIASED = [variant for variant in VARIANTS if "BEiT" in variant]
FITTING = [variant for variant in VARIANTS if variant not in BIASED]
FAMILIES = ["class token", "registers, LayerScale", "EVA-02", "NaFlex, rotary", "LV-ViT"]
EVERY = [*FITTING, "LV-ViT"]


def make(variant: str = "class token", dtype: torch.dtype = torch.float64, **extra: Any) -> Any:
    if variant == "LV-ViT":
        return build_lvvit(dtype=dtype, depth=5, **extra)
    return build(variant, dtype, **extra)


def sparse(
    variant: str = "class token",
    keep_rate: float = 0.4,
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> Any:
    """A model with sparse attention whose predictors are not near uniform, as trained ones."""
    model = spot_vit.sparsify_attention(make(variant, dtype), keep_rate, **overrides)
    generator = torch.Generator().manual_seed(5)
    for predictor in predictors(model).values():
        for parameter in predictor.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)
    return model


def picture(model: Any, batch: int = 3, seed: int = 1) -> Tensor:
    return images(model, batch, seed)


def masking(model: Any) -> Any:
    """Training mode, but for a stem with BatchNorm, which would see other statistics."""
    model.train()
    if hasattr(model, "aux_head"):
        model.patch_embed.eval()
    return model


def with_backend(model: Any, backend: str) -> Any:
    model = copy.deepcopy(model)
    for predictor in predictors(model).values():
        predictor.configure(predictor.config.replace(backend=backend))
    return model


class Named:
    """In place of a predictor: names what it was told to; fields are of its configuration."""

    def __init__(self, index: Tensor, backend: str, **fields: Any) -> None:
        self.index, self.chosen = index, backend
        self.config = spot_vit.SparsifinerConfig(**fields)

    def __call__(self, *args: Any) -> Tensor:
        return self.index

    def backend(self, q: Tensor, num_named: int) -> str:
        return self.chosen

    def names_some(self, keep: Tensor | None) -> bool:
        return False
