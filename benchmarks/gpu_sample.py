"""Calls every CUDA kernel over odd shapes and dtypes and compares with the definition on the CPU.

    compute-sanitizer --tool memcheck python benchmarks/gpu_sample.py compact

Small on purpose: a sanitizer slows everything down. Bad indices are among the calls: what they must
not do is touch foreign memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import spot_ext

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Equal up to `tolerance` of the largest value, NaN where NaN is wanted."""
    got, want = got.cpu().double(), want.double()
    scale = want.nan_to_num().abs().max().clamp(min=1) if want.numel() else 1
    return torch.allclose(got, want, rtol=0, atol=float(scale) * tolerance, equal_nan=True)


def compact() -> Iterator[tuple[str, bool]]:
    """The compact slice: each call's description, and whether it gave what it should."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, 1, 1, 0, 1), (2, 33, 7, 1, 0), (3, 196, 64, 2, 137), (2, 300, 33, 1, 300)]
    for batch, patches, channels, prefix, keep in shapes:
        for dtype, tolerance in DTYPES.items():
            what = f"[{batch},{prefix}+{patches},{channels}] keep {keep} {dtype}"
            x = torch.randn(batch, prefix + patches, channels, generator=draw).to(dtype)
            extra = torch.randn(batch, 2, channels, generator=draw).to(dtype)
            scores = torch.randn(batch, patches, generator=draw).round(decimals=1).to(dtype)
            scores[:, ::5] = float("nan")
            index = spot_ext.select_tokens_reference(scores, keep)
            shuffled = index[:, torch.randperm(keep, generator=draw)]
            kept = spot_ext.compact_tokens_reference(x, shuffled, prefix)
            gpu = [t.cuda() for t in (x, extra, scores, shuffled, kept)]
            gx, gextra, gscores, gindex, gkept = gpu

            yield f"select {what}", torch.equal(spot_ext.select_tokens(gscores, keep).cpu(), index)
            full = spot_ext.compact_tokens_reference(x, shuffled, prefix, extra)
            yield (
                f"compact {what}",
                torch.equal(spot_ext.compact_tokens(gx, gindex, prefix, gextra).cpu(), full),
            )
            flipped = gx.transpose(0, 1).contiguous().transpose(0, 1)
            yield (
                f"compact strided {what}",
                torch.equal(spot_ext.compact_tokens(flipped, gindex, prefix).cpu(), kept),
            )
            for back, gback in ((None, None), (x, gx)):
                yield (
                    f"scatter {what}",
                    torch.equal(
                        spot_ext.scatter_tokens(gkept, gindex, patches, prefix, gback).cpu(),
                        spot_ext.scatter_tokens_reference(kept, shuffled, patches, prefix, back),
                    ),
                )
            weights = torch.rand(batch, patches, generator=draw).to(dtype)
            for normalize in (True, False):
                wide = [t.double().requires_grad_() for t in (x, weights)]
                grads = [t.cuda().requires_grad_() for t in (x, weights)]
                want = spot_ext.fuse_tokens_reference(*wide, shuffled, prefix, normalize)
                got = spot_ext.fuse_tokens(*grads, gindex, prefix, normalize)
                pull = torch.randn(want.shape, generator=draw).to(dtype)
                wanted = [want, *torch.autograd.grad(want, wide, pull.double())]
                given = [got, *torch.autograd.grad(got, grads, pull.cuda())]
                yield (
                    f"fuse {what}",
                    all(
                        close(g.detach(), w.detach(), 4 * tolerance)
                        for g, w in zip(given, wanted, strict=True)
                    ),
                )
    x = torch.randn(2, 1 + 9, 5, generator=draw).cuda()
    for entry in (-1, 9, 1 << 40):
        index = torch.tensor([[0, entry], [1, 2]]).cuda()
        out = spot_ext.compact_tokens(x, index)
        yield (
            f"compact with index {entry}",
            bool(out[0, 2].isnan().all() and out[1].isfinite().all()),
        )
        out = spot_ext.scatter_tokens(x[:, :3], index, 9)
        yield (
            f"scatter with index {entry}",
            bool(out[0, 1:].isnan().all() and out[1].isfinite().all()),
        )
        weights = torch.ones(2, 9).cuda()
        out = spot_ext.fuse_tokens(x, weights, index)
        yield f"fuse with index {entry}", bool(out[0].isnan().all() and out[1].isfinite().all())


SAMPLES = {"compact": compact}


def main(ops: list[str]) -> int:
    """Exit status 1 when a call gave something else."""
    wrong = [what for op in ops for what, fine in SAMPLES[op]() if not fine]
    print("\n".join([f"wrong: {what}" for what in wrong] or [f"{', '.join(ops)}: all as defined"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SAMPLES)))
