"""The small ViT of the demonstrations by name: `timm.create_model("digits_vit")`."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn


class ConvStem(PatchEmbed):
    """Three convolutions of stride 2 for 8 px patches, in place of one of stride 8.

    A plain patch embedding does not learn the task in the time of a demonstration.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **kwargs: Any
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        layers: list[nn.Module] = []
        for width in (24, 48):
            layers += [
                nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.GELU(),
            ]
            in_chans = width
        layers.append(nn.Conv2d(in_chans, embed_dim, 3, stride=2, padding=1))
        self.add_module("proj", nn.Sequential(*layers))


default_cfgs = generate_default_cfgs(
    {
        "digits_vit": {
            "num_classes": 10,
            "input_size": (1, 64, 64),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.0,),
            "std": (1.0,),
            "first_conv": "patch_embed.proj.0",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)

__all__ = ["ConvStem", "digits_vit"]


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """6 blocks, 96 wide, 4 heads, MLP ratio 2, for images [B, 1, 64, 64]; made for digits."""
    sizes = {
        "img_size": 64,
        "patch_size": 8,
        "in_chans": 1,
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "embed_layer": ConvStem,
    }
    return build_model_with_cfg(
        VisionTransformer,
        "digits_vit",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{**sizes, **kwargs},
    )
