"""Cases of the predictors and statistics in SPOT-DeiT-S: what deciding costs beside the blocks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import spot_vit
from spot_vit.utils.timing import Case

GIVEN = "the same decisions, given"
DENSE = "dense DeiT-S"
SHARE = 0.06  # of the sparse model's own time that predictors and statistics may take


def cases(device: str) -> Iterator[Case]:
    """`forward(x)` against `forward(x, kept=same)`: only predictors and statistics differ."""
    torch.manual_seed(0)
    dense = timm.create_model("deit_small_patch16_224", pretrained=False).to(device).eval()
    model = timm.create_model("deit_small_patch16_224", pretrained=False).to(device)
    model.load_state_dict(dense.state_dict())
    spot_vit.sparsify(model, keep=0.7).eval()
    for batch in (8, 1):
        x = torch.randn(batch, 3, 224, 224, device=device)
        with torch.no_grad():
            kept = model(x, aux=True).index
        yield Case(
            f"SPOT-DeiT-S, ρ = 0.7, batch {batch}",
            partial(_forward, model, x),
            {GIVEN: partial(_forward, model, x, kept=kept), DENSE: partial(_forward, dense, x)},
            {GIVEN: 1 - SHARE} if batch > 1 and device == "cpu" else {},
        )


def _forward(model: torch.nn.Module, x: torch.Tensor, i: int, **options: object) -> torch.Tensor:
    return model(x, **options)
