"""Image size and grid that a model was built for."""

from __future__ import annotations

from typing import Any


def input_size(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of an image."""
    default = model.default_cfg["input_size"] if hasattr(model, "default_cfg") else (3, 224, 224)
    patch_embed = getattr(model, "patch_embed", None)
    height, width = getattr(patch_embed, "img_size", None) or default[1:]
    return getattr(model, "in_chans", default[0]), height, width


def grid_of(model: Any) -> tuple[int, int]:
    """Rows and columns of patches."""
    embed = getattr(model, "patch_embed", None)
    if embed is None:  # NaFlexVit
        embed = model.embeds
        if embed.pos_embed_grid_size is not None:
            rows, columns = embed.pos_embed_grid_size
            return rows, columns
    rows, columns = embed.dynamic_feat_size(input_size(model)[1:])
    return rows, columns
