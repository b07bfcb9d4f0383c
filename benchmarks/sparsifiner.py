"""Cases of a whole DeiT-S at 512 px: sparse attention alone, and with tokens removed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import spot_vit

from benchmarks.timing import Case

DENSE = "dense DeiT-S"
SIZE, BATCH, KEEP_RATE = 512, 2, 0.25
AT_MOST = {None: 0.9, 0.7: 0.55}  # of the dense model's time, by ρ


def cases(device: str) -> Iterator[Case]:
    """The forward pass of a DeiT-S with 1,025 tokens and random weights."""
    torch.manual_seed(0)
    dense = timm.create_model("deit_small_patch16_224", pretrained=False, img_size=SIZE)
    dense = dense.to(device).eval()
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    for keep, share in AT_MOST.items():
        model = spot_vit.sparsify_attention(copy.deepcopy(dense), KEEP_RATE)
        name = f"Sparsifiner-DeiT-S, 25 % of 1,025 keys, batch {BATCH}"
        if keep is not None:
            spot_vit.sparsify(model, keep=keep)
            name = f"SPOT-{name}, ρ = {keep}"
        yield Case(
            name,
            partial(_forward, model, x),
            {DENSE: partial(_forward, dense, x)},
            {DENSE: 1 / share} if device == "cpu" else {},
        )


def _forward(model: torch.nn.Module, x: torch.Tensor, i: int) -> torch.Tensor:
    return model(x)
