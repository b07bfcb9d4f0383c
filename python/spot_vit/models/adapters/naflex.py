"""timm's NaFlexVit, for images as tensors."""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from spot_vit.models.adapters.base import MODELS, AdapterEntry, names, refuse_model, register
from spot_vit.models.loop import SpotLoop
from spot_vit.nn.positional import PositionTables, RopeTables


class SpotNaFlexVit(SpotLoop, NaFlexVit):
    """A converted `NaFlexVit`.

    Images come as tensors [B, 3, H, W]. Patches that come as a dictionary, of several grids in one
    batch, are refused: token counts would differ from image to image.
    """

    blocks: Any

    def forward(  # type: ignore[override]
        self,
        x: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Logits, see `SpotLoop.forward` for `aux` and `kept`."""
        _refuse_patches(x, patch_coord, patch_valid)
        return super().forward(x, attn_mask, **options)

    def forward_features(  # type: ignore[override]
        self,
        patches: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """Final normalised tokens: all of them where training masks, otherwise survivors."""
        _refuse_patches(patches, patch_coord, patch_valid)
        return super().forward_features(patches, attn_mask)

    def forward_head(
        self, patches: Tensor, pre_logits: bool = False, patch_valid: Tensor | None = None
    ) -> Tensor:
        """Logits of what `forward_features` returned, see `SpotLoop.forward_head`."""
        if patch_valid is not None:
            raise TypeError("patch_valid is not supported: a SPOT NaFlexVit takes whole images")
        return super().forward_head(patches, pre_logits)

    def _tokens(self, x: Tensor) -> tuple[Tensor, PositionTables]:
        embeds = self._forward_embeds(x, None, None, None)
        rope = embeds["rope_embeds"]
        tables = PositionTables() if rope is None else RopeTables(rope, self.rope_is_mixed)
        return embeds["patches"], tables

    def forward_intermediates(
        self,
        x: Any,
        *args: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Block outputs on the full grid, see `SpotLoop.forward_intermediates`."""
        _refuse_patches(x, patch_coord, patch_valid)
        return super().forward_intermediates(x, *args, **arguments)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return self.embeds.dynamic_feat_size((height, width))


def _refuse_patches(x: Any, patch_coord: Any, patch_valid: Any) -> None:
    tensor = isinstance(x, Tensor) and x.dim() == 4
    if not tensor or patch_coord is not None or patch_valid is not None:
        what = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"a SPOT NaFlexVit takes images as one tensor [B, 3, H, W], got {what}; patches of "
            "several grids in one batch are not supported"
        )


_PATCHES = names("patch_coord patch_valid attn_mask")

register(
    MODELS,
    AdapterEntry(
        NaFlexVit,
        SpotNaFlexVit,
        {
            "forward": ("x", *_PATCHES),
            "forward_features": ("patches", *_PATCHES),
            "forward_head": ("patches", "pre_logits", "patch_valid"),
            "_forward_embeds": ("x", *_PATCHES),
            "_pool": ("x", "pool_type", "patch_valid"),
            "forward_intermediates": names(
                "x indices return_prefix_tokens norm stop_early output_fmt intermediates_only "
                "output_dict patch_coord patch_valid attn_mask"
            ),
        },
        names(
            "embeds patch_drop norm_pre blocks norm attn_pool fc_norm head_drop head "
            "num_prefix_tokens has_class_token pool_include_prefix global_pool grad_checkpointing "
            "rope rope_is_mixed"
        ),
        refuse_model,
    ),
)
