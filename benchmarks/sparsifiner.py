"""Cases of whole models: sparse attention alone, and with tokens removed.

A DeiT-S at 512 px, and the model of `spot demo --sparsifiner`; random weights.
"""

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
from spot_vit.demos.large_canvas import build
from spot_vit.demos.sparsifiner import BATCH_SIZES, Setting, sparse_model, with_tokens_removed
from spot_vit.utils.timing import Case

DENSE, DENSE_DIGITS = "dense DeiT-S", "its dense model"
SIZE, BATCH, KEEP_RATE = 512, 2, 0.25
AT_MOST = {None: 0.9, 0.7: 0.55}  # of the dense model's time, by ρ


def cases(device: str) -> Iterator[Case]:
    """Forward passes against those of the dense model."""
    yield from _deit(device)
    yield from _digits(device)


def _deit(device: str) -> Iterator[Case]:
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


def _digits(device: str) -> Iterator[Case]:
    """Both models are to be faster than the dense one."""
    torch.manual_seed(0)
    setting = Setting()
    dense: torch.nn.Module = build(setting.canvas).eval()
    alone = sparse_model(dense, setting).eval()
    both = with_tokens_removed(copy.deepcopy(alone), dense, setting).eval()
    dense = dense.to(device)
    for batch in BATCH_SIZES:
        x = torch.randn(batch, *setting.canvas.input_size, device=device)
        for name, model in (("Sparsifiner", alone), ("SPOT-Sparsifiner", both)):
            yield Case(
                f"{name}, ClutteredDigits at {setting.canvas.size} px, batch {batch}",
                partial(_forward, model.to(device), x),
                {DENSE_DIGITS: partial(_forward, dense, x)},
                {DENSE_DIGITS: 1.0} if device == "cpu" else {},
            )


def _forward(model: torch.nn.Module, x: torch.Tensor, i: int) -> torch.Tensor:
    return model(x)
