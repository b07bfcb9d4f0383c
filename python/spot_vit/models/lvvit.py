"""LV-ViT (arXiv 2104.10858): a ViT with a convolutional stem and a head for every token.

Sizes and layout are those of the public code (METHOD C3: zihangJiang/TokenLabeling, and
raoyongming/DynamicViT for token pruning), whose state-dict keys fit without renaming.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, PatchEmbed, trunc_normal_
from timm.layers.format import nchw_to
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

STEM_WIDTH = 64
AUX_WEIGHT = 0.5  # of the auxiliary head's maximum in the logits (published)


class ConvStem(PatchEmbed):
    """Patch embedding of four convolutions (published): 7x7 of stride 2, two 3x3, the projection.

    The first three are 64 wide, each with BatchNorm and ReLU; the projection has kernel and stride
    `patch_size // 2`. Arguments as timm's `PatchEmbed`; `patch_size` must be even.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **made, **kwargs)
        if patch_size % 2:
            raise ValueError(f"patch_size must be even, got {patch_size}")
        wide = {"bias": False, **made}
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 7, stride=2, padding=3, **wide)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH, **made)
        self.conv2 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, **wide)
        self.bn2 = nn.BatchNorm2d(STEM_WIDTH, **made)
        self.conv3 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, **wide)
        self.bn3 = nn.BatchNorm2d(STEM_WIDTH, **made)
        self.proj = nn.Conv2d(
            STEM_WIDTH, embed_dim, patch_size // 2, stride=patch_size // 2, bias=bias, **made
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's for `img_size`; the stem fixes the patch size."""
        if patch_size is not None:
            raise ValueError("patch_size of a convolutional stem cannot be changed")
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to tokens [B, N, D], or the format that was asked for."""
        self._check_size(*x.shape[-2:])
        if self.dynamic_img_pad:
            height, width = x.shape[-2:]
            x = F.pad(x, (0, -width % self.patch_size[1], 0, -height % self.patch_size[0]))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt)
        return self.norm(x)

    def _check_size(self, height: int, width: int) -> None:
        if self.img_size is None:
            return
        if self.strict_img_size and (height, width) != self.img_size:
            raise ValueError(f"the model takes {self.img_size} pixels, got {(height, width)}")
        fits = height % self.patch_size[0] == 0 and width % self.patch_size[1] == 0
        if not (self.strict_img_size or self.dynamic_img_pad or fits):
            raise ValueError(f"{(height, width)} pixels are not a multiple of {self.patch_size}")


class LVBlock(Block):
    """timm's pre-norm block with both branches divided by `skip_lam` (published)."""

    def __init__(self, *args: Any, skip_lam: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_lam = skip_lam

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N, D]."""
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(y)) / self.skip_lam
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) / self.skip_lam


class LVViT(VisionTransformer):
    """LV-ViT, with everything timm's `VisionTransformer` offers.

    Logits are those of the class token plus half of each class's maximum over the patch tokens of
    an auxiliary head (published for inference). Training gives the same logits, our choice, so
    that any loss sees what inference uses: DynamicViT's code does so without distillation, and
    with it takes the two heads apart, for which there is `dense_logits`.

    Args:
        skip_lam: divisor of the residual branches.
        global_pool: "token", or "" for one class-token-head logit vector per token and no
            auxiliary head in the logits.
        **kwargs: of `VisionTransformer`, with LV-ViT's defaults.

    Raises:
        ValueError: another `global_pool`.
    """

    def __init__(self, *, skip_lam: float = 1.0, global_pool: Any = "token", **kwargs: Any) -> None:
        _check_pool(global_pool)
        defaults: dict[str, Any] = {
            "mlp_ratio": 3.0,
            "qkv_bias": False,
            "embed_layer": ConvStem,
            "norm_layer": partial(LayerNorm, eps=1e-5),
            "block_fn": partial(LVBlock, skip_lam=skip_lam),
        }
        super().__init__(global_pool=global_pool, **{**defaults, **kwargs})
        self._reset_aux_head()

    def _reset_aux_head(self) -> None:
        self.aux_head: nn.Module = nn.Identity()
        if self.num_classes > 0:
            weight = next(self.parameters())
            aux_head = nn.Linear(
                self.embed_dim, self.num_classes, device=weight.device, dtype=weight.dtype
            )
            trunc_normal_(aux_head.weight, std=0.02)
            nn.init.zeros_(aux_head.bias)
            self.aux_head = aux_head
        self.aux_head.train(self.training)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As timm's, but for the class token, which is drawn as the positions are (published)."""
        super().init_weights(mode, needs_reset=needs_reset)
        trunc_normal_(self.cls_token, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the class head and the auxiliary head."""
        if global_pool is not None:
            _check_pool(global_pool)
        super().reset_classifier(num_classes, global_pool)
        self._reset_aux_head()

    def dense_logits(self, tokens: Tensor) -> Tensor:
        """Auxiliary logits [B, N, classes] of the patches among final `tokens` [B, P+N, D]."""
        return self.aux_head(tokens[:, self.num_prefix_tokens :])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, classes] of final tokens [B, P+N, D]; the class token with `pre_logits`."""
        return super().forward_head(x, pre_logits=True) if pre_logits else self.logits(x)

    def logits(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of both heads together.

        Args:
            x: final tokens [B, P+N, D].
            keep: [B, N] of 0 and 1; patches with 0 do not enter the maximum. None for all.

        Returns:
            [B, classes].
        """
        logits = self.head(super().forward_head(x, pre_logits=True))
        if self.num_classes == 0 or self.global_pool != "token":
            return logits
        dense = self.dense_logits(x)
        if keep is not None:
            seen = keep.detach() > 0.5
            seen = seen | ~seen.any(dim=1, keepdim=True)  # nothing kept: the maximum over all
            dense = dense.masked_fill(~seen[..., None], float("-inf"))
        return logits + AUX_WEIGHT * dense.amax(dim=1)


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("", "token"):
        raise ValueError(f"global_pool of LV-ViT must be 'token' or '', got {global_pool!r}")


def _cfg(crop_pct: float) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {"lvvit_tiny": _cfg(0.9), "lvvit_small": _cfg(0.9), "lvvit_medium": _cfg(1.0)}
)

__all__ = ["ConvStem", "LVBlock", "LVViT", "lvvit_medium", "lvvit_small", "lvvit_tiny"]


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return build_model_with_cfg(
        LVViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={
            "out_indices": kwargs.pop("out_indices", 3),
            "feature_cls": "getter",
        },
        **{**sizes, **kwargs},
    )


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 12 blocks, 240 wide, 4 heads, plain residuals; 2.87 GMACs at 224 px."""
    sizes = {"embed_dim": 240, "depth": 12, "num_heads": 4}
    return _create("lvvit_tiny", pretrained, sizes, kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 16 blocks, 384 wide, 6 heads, residuals halved; 6.55 GMACs at 224 px."""
    sizes = {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0}
    return _create("lvvit_small", pretrained, sizes, kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 20 blocks, 512 wide, 8 heads, residuals halved; 12.68 GMACs at 224 px."""
    sizes = {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}
    return _create("lvvit_medium", pretrained, sizes, kwargs)
