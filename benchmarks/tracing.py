"""Cases of `trace`: a pass with everything that happened in it beside a plain one."""

from __future__ import annotations

from collections.abc import Iterator

import spot_vit
import timm
import torch
from spot_vit.utils.timing import Case

PLAIN = "a plain pass of the sparse model"
IMAGES = 16  # as on a page of spot report
MOST = 3  # times a plain pass


def cases(device: str) -> Iterator[Case]:
    """Photos of 224 px through DeiT-S: SPOT alone, with sparse attention, and EViT."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, 224, 224, device=device)
    for title, options in (
        ("SPOT", {"method": "spot"}),
        ("SPOT and Sparsifiner", {"method": "spot"}),
        ("EViT", {"method": "evit"}),
    ):
        model = timm.create_model("deit_small_patch16_224").eval().to(device)
        spot_vit.sparsify(model, keep=0.7, **options)
        if "Sparsifiner" in title:
            spot_vit.sparsify_attention(model)
        model.to(device).eval()

        def traced(i: int, model: torch.nn.Module = model) -> object:
            return spot_vit.trace(model, images)

        @torch.inference_mode()
        def plain(i: int, model: torch.nn.Module = model) -> object:
            return model(images)

        yield Case(f"{title}, {IMAGES} images", traced, {PLAIN: plain}, {PLAIN: 1 / MOST})
