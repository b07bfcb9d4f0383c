"""Drawn calls of token_relevance."""

from __future__ import annotations

from typing import Any

import torch
from support.data import generator
from torch import Tensor

NAMES = (
    "tokens", "features", "keep", "norm_weight", "norm_bias", "remap_weight", "remap_bias",
    "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "fc3_weight", "fc3_bias",
)  # fmt: skip


def build(
    batch: int = 2,
    count: int = 9,
    channels: int | None = 8,
    remap: int = 6,
    features: int | None = 4,
    hidden: tuple[int, int] = (5, 3),
    keep: str = "random",
    dtype: torch.dtype = torch.float64,
    device: Any = "cpu",
) -> dict[str, Tensor | None]:
    """Arguments by name; channels None: without embeddings."""
    seeded = generator(f"relevance {batch} {count} {channels} {remap} {features}")

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=seeded, dtype=torch.float64) * scale

    values: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    width = features or 0
    if channels is not None:
        values["tokens"] = normal(batch, count, channels) * 2 + 1
        values["norm_weight"] = normal(channels, scale=0.2) + 1
        values["norm_bias"] = normal(channels, scale=0.2)
        values["remap_weight"] = normal(remap, channels, scale=max(channels, 1) ** -0.5)
        values["remap_bias"] = normal(remap, scale=0.2)
        width += remap
    if features is not None:
        values["features"] = normal(batch, count, features)
    if keep:
        drawn = torch.rand((batch, count), generator=seeded, dtype=torch.float64)
        share = {"random": 0.6, "all": 1.0, "none": 0.0, "soft": 0.0}[keep]
        values["keep"] = drawn if keep == "soft" else (drawn < share).double()
    for layer, rows in enumerate((*hidden, 2), start=1):
        values[f"fc{layer}_weight"] = normal(rows, width, scale=max(width, 1) ** -0.5)
        values[f"fc{layer}_bias"] = normal(rows, scale=0.2)
        width = rows
    return {k: v if v is None else v.to(device, dtype) for k, v in values.items()}


def leaves(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors among the arguments, asking for gradients."""
    return {name: x.requires_grad_() for name, x in values.items() if x is not None}
