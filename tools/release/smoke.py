"""Tries an installed SPOT in seconds: what importing costs, and each op beside its definition.

python tools/release/smoke.py
"""

from __future__ import annotations

import sys
import time

import torch

begin = time.perf_counter()
import spot_ext  # noqa: E402

IMPORT_MS = 1e3 * (time.perf_counter() - begin)
UNUSED = {"allow_unused": True, "materialize_grads": True}  # statistics do not depend on v


def checked() -> list[str]:
    """Names of the public functions that gave what their definitions give; raises for others."""
    torch.manual_seed(0)
    batch, tokens, heads, width = 2, 17, 3, 8
    x = torch.randn(batch, tokens, heads * width, requires_grad=True)
    q, k, v = (torch.randn(batch, tokens, heads, width, requires_grad=True) for _ in range(3))
    scores = torch.randn(batch, tokens - 1)
    index = spot_ext.select_tokens(scores, 9)
    weight = torch.rand(batch, tokens - 1, requires_grad=True)
    named = scores.argsort(dim=1)[:, None, None, :5].expand(-1, heads, tokens - 1, -1)
    layer, bias = torch.randn(12, heads * width), torch.randn(12)
    calls = {
        "select_tokens": (scores, 9),
        "compact_tokens": (x, index, 1),
        "fuse_tokens": (x, weight, index),
        "attention_stats": (q, k, v),
        "sparse_attention": (q, k, v, named.to(torch.int32).contiguous()),
        "packed_linear": (x.detach(), spot_ext.pack_linear(layer), len(layer), bias),
    }
    for name, arguments in calls.items():
        ours = getattr(spot_ext, name)(*arguments)
        theirs = getattr(spot_ext, f"{name}_reference")(*arguments)
        inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        for mine, other in zip(_tensors(ours), _tensors(theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
            if mine.requires_grad:
                weights = torch.randn_like(mine)
                torch.testing.assert_close(
                    torch.autograd.grad(mine, inputs, weights, retain_graph=True, **UNUSED),
                    torch.autograd.grad(other, inputs, weights, retain_graph=True, **UNUSED),
                    rtol=1e-4, atol=1e-5,
                )  # fmt: skip
    return list(calls)


def _tensors(result: object) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


if __name__ == "__main__":
    from spot_ext import _C

    names = checked()
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"spot-vit {spot_ext.__version__}, Python {version}, torch {torch.__version__}")
    print(f"import {IMPORT_MS:.0f} ms; {len(names)} ops as defined, on {_C.isa()}")
