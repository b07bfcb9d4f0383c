"""Image size and grid that a model was built for."""

from __future__ import annotations

from typing import Any

from spot_vit.utils.places import place_of


def input_size(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of an image."""
    if place_of(model) is not None:
        built = _built(model)
        return getattr(built, "num_channels", 3), *_pair(built.image_size)
    default = model.default_cfg["input_size"] if hasattr(model, "default_cfg") else (3, 224, 224)
    patch_embed = getattr(model, "patch_embed", None)
    height, width = getattr(patch_embed, "img_size", None) or default[1:]
    return getattr(model, "in_chans", default[0]), height, width


def grid_of(model: Any) -> tuple[int, int]:
    """Rows and columns of patches."""
    if place_of(model) is not None:
        built = _built(model)
        (height, width), (down, across) = _pair(built.image_size), patch_size(model)
        return height // down, width // across
    embed = getattr(model, "patch_embed", None)
    if embed is None:  # NaFlexVit
        embed = model.embeds
        if embed.pos_embed_grid_size is not None:
            rows, columns = embed.pos_embed_grid_size
            return rows, columns
    rows, columns = embed.dynamic_feat_size(input_size(model)[1:])
    return rows, columns


def patch_size(model: Any) -> tuple[int, int]:
    """Height and width of a patch in pixels, of a model that is not timm's."""
    return _pair(_built(model).patch_size)


def _built(model: Any) -> Any:
    """What names the sizes of a model that is not timm's: its configuration, or itself."""
    config = getattr(model, "config", model)
    return getattr(config, "vision_config", config)


def _pair(size: Any) -> tuple[int, int]:
    """(height, width), of which one number stands for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
