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


def fitting(got: Tensor, want: Tensor, tolerance: float, least: float = 0.0) -> bool:
    """Equal up to `tolerance` of the largest value, or of `least` where all are smaller."""
    size = max(float(want.abs().max()) if want.numel() else 0.0, least)
    got = got.cpu().double()
    return got.shape == want.shape and torch.allclose(got, want.double(), 0, tolerance * size)


# tokens, head dim, prefix, mask, images of the bias (0: none), statistics, strided views
ATTENTION = [
    (1, 32, 1, False, 0, True, False),
    (2, 8, 1, True, 0, True, True),
    (17, 64, 0, False, 0, True, True),
    (17, 200, 2, True, 1, True, False),
    (64, 80, 2, True, 2, True, True),
    (64, 20, 0, True, 0, False, False),  # rows that are no multiple of 16 bytes
    (100, 64, 1, True, 0, True, True),
    (129, 96, 1, False, 1, True, False),
    (197, 64, 1, False, 0, True, True),
    (197, 64, 1, True, 0, True, True),
    (197, 64, 1, True, 1, False, True),
    (257, 64, 1, False, 0, True, True),
    (257, 128, 2, True, 0, True, False),
    (300, 64, 1, True, 0, True, True),
    (300, 128, 1, False, 1, True, False),
    (300, 64, 5, True, 0, False, True),
]


def attention_stats() -> Iterator[tuple[str, bool]]:
    """The op and its backward op, against the definition in float64."""
    draw = torch.Generator().manual_seed(0)
    for tokens, dim, prefix, masked, bias_images, need_stats, strided in ATTENTION:
        for dtype, tolerance in DTYPES.items():
            batch, heads = 2, 2
            wide = torch.promote_types(dtype, torch.float32)
            what = f"[{batch},{tokens},{heads},{dim}] prefix {prefix} {dtype}"
            what += f", mask {masked}, bias {bias_images}, stats {need_stats}, strided {strided}"
            qkv = torch.randn(3, batch, tokens, heads, dim, generator=draw).to(dtype)
            pull = torch.randn(batch, tokens, heads, dim, generator=draw).to(dtype)
            keep = bias = pull_stats = None
            if masked:
                keep = (torch.rand(batch, tokens - prefix, generator=draw) < 0.7).to(wide)
            if bias_images:
                bias = torch.randn(bias_images, heads, tokens, tokens, generator=draw).to(dtype)
            if need_stats:
                pull_stats = tokens * torch.randn(batch, tokens, heads, 6, generator=draw).to(wide)

            leaves = [x.double() for x in qkv]
            leaves += [x.double() for x in (keep, bias) if x is not None]
            for leaf in leaves:
                leaf.requires_grad_()
            rest = leaves[3:]
            wide_keep = rest.pop(0) if keep is not None else None
            wide_bias = rest.pop(0) if bias is not None else None
            out, stats = spot_ext.attention_stats_reference(
                *leaves[:3], wide_keep, wide_bias, num_prefix=prefix, need_stats=need_stats
            )
            results = [out, stats] if pull_stats is not None else [out]
            pulls = [pull.double()] + ([pull_stats.double()] if pull_stats is not None else [])
            grads = list(
                torch.autograd.grad(
                    results, leaves, pulls, allow_unused=True, materialize_grads=True
                )
            )
            want = [out.detach(), stats.detach(), *grads[:3]]
            want.append(grads[3] if keep is not None else torch.empty(0))
            want.append(grads[-1] if bias is not None else torch.empty(0))

            if strided:  # what `qkv.reshape(B, N, 3, H, D).unbind(2)` gives
                q, k, v = qkv.permute(1, 2, 0, 3, 4).contiguous().cuda().unbind(2)
            else:
                q, k, v = qkv.cuda()
            gkeep, gbias, gpull, gpull_stats = (
                x.cuda() if x is not None else None for x in (keep, bias, pull, pull_stats)
            )
            options = (None, prefix, prefix > 0)
            runs = []
            for _ in range(2):
                got = torch.ops.spot.attention_stats(q, k, v, gkeep, gbias, *options, need_stats)
                back = torch.ops.spot.attention_stats_backward(
                    gpull, gpull_stats, q, k, v, gkeep, gbias, *got, *options, masked,
                    bias is not None,
                )  # fmt: skip
                runs.append([*got[:2], *back])
            yield (
                f"attention_stats twice {what}",
                all(torch.equal(x, y) for x, y in zip(*runs, strict=True)),
            )
            out, stats, *grads = runs[0]
            yield f"out {what}", fitting(out, want[0], tolerance)
            # Statistics are float32 for 16-bit inputs too. Columns differ in size.
            for i in range(6 if need_stats else 0):
                yield (
                    f"statistic {i} {what}",
                    fitting(stats[..., i], want[1][..., i], min(4 * tolerance, 1e-4)),
                )
            names = ("dq", "dk", "dv", "dkeep", "dbias")
            for name, x, y in zip(names, grads, want[2:], strict=True):
                yield f"{name} {what}", fitting(x, y, 3 * tolerance, 0.1)


# tokens, channels (0: no embeddings), remap, features, hidden units, mask, strided views
RELEVANCE = [
    (1, 4, 2, 0, (1, 1), False, False),
    (7, 5, 6, 3, (4, 3), True, True),
    (33, 0, 0, 9, (5, 2), False, False),
    (64, 33, 34, 0, (17, 9), True, True),
    (196, 96, 96, 36, (66, 33), True, True),
    (300, 384, 384, 108, (246, 123), True, False),
    (70, 64, 600, 7, (300, 280), True, False),  # more columns than a block has threads
]


def relevance() -> Iterator[tuple[str, bool]]:
    """The op and its backward op, against the definition in float64."""
    draw = torch.Generator().manual_seed(0)
    for tokens, channels, remap, features, hidden, masked, strided in RELEVANCE:
        for dtype, tolerance in DTYPES.items():
            batch = 3
            what = f"[{batch},{tokens},{channels}] remap {remap} features {features} {dtype}"

            def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
                scale = max(shape[-1], 1) ** -0.5 if len(shape) == 2 else 1.0
                return (torch.randn(shape, generator=draw) * scale).to(kind)

            keep = (torch.rand(batch, tokens, generator=draw) < 0.7).float() if masked else None
            values = [normal(batch, tokens, channels), normal(batch, tokens, features), keep]
            values += [normal(channels), normal(channels), normal(remap, channels), normal(remap)]
            width = remap + features
            for rows in (*hidden, 2):
                values += [normal(rows, width), normal(rows)]
                width = rows
            if channels == 0:
                values = [v if i not in (0, 3, 4, 5, 6) else None for i, v in enumerate(values)]
            wide = [v if v is None else v.double().requires_grad_() for v in values]
            gpu = [v if v is None else v.cuda() for v in values]
            if strided and gpu[0] is not None:
                gpu[0] = torch.cat([gpu[0][:, :1], gpu[0]], dim=1)[:, 1:]
            gpu = [v if v is None else v.requires_grad_() for v in gpu]
            want = spot_ext.token_relevance_reference(*wide)
            pull = torch.randn(want.shape, generator=draw)
            leaves = [v for v in wide if v is not None]
            grads = torch.autograd.grad(want, leaves, pull.double())
            runs = []
            for _ in range(2):
                got = spot_ext.token_relevance(*gpu)
                leaves = [v for v in gpu if v is not None]
                sent = pull.to(got.dtype).cuda()
                runs.append([got.detach(), *torch.autograd.grad(got, leaves, sent)])
            yield (
                f"token_relevance twice {what}",
                all(torch.equal(x, y) for x, y in zip(*runs, strict=True)),
            )
            for number, (x, y) in enumerate(zip(runs[0], (want.detach(), *grads), strict=True)):
                yield f"result {number} {what}", fitting(x, y, 8 * tolerance, 0.1)


SAMPLES = {"attention_stats": attention_stats, "compact": compact, "relevance": relevance}


def main(ops: list[str]) -> int:
    """Exit status 1 when a call gave something else."""
    wrong = [what for op in ops for what, fine in SAMPLES[op]() if not fine]
    print("\n".join([f"wrong: {what}" for what in wrong] or [f"{', '.join(ops)}: all as defined"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SAMPLES)))
