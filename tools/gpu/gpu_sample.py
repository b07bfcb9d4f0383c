"""Calls every CUDA kernel over odd shapes and dtypes and compares with the definition on the CPU.

    compute-sanitizer --tool memcheck python tools/gpu/gpu_sample.py compact

Small on purpose: a sanitizer slows everything down. Bad indices are among the calls: what they must
not do is touch foreign memory.
"""

from __future__ import annotations

import itertools
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


# tokens, head dim, prefix, keys named, mask, statistics, strided views, order of the names
SPARSE = [
    (1, 32, 1, 1, False, True, False, "ascending"),  # no patch at all
    (2, 8, 1, 1, True, True, True, "ascending"),
    (17, 64, 0, 4, False, True, True, "shuffled"),
    (17, 200, 2, 17, True, True, False, "ascending"),
    (64, 20, 0, 9, True, False, False, "shuffled"),  # rows that are no multiple of 16 bytes
    (64, 80, 2, 0, True, True, True, "ascending"),  # nothing named
    (40, 16, 0, 0, True, True, False, "ascending"),  # no prefix either
    (70, 96, 1, 33, True, True, False, "shuffled"),
    (100, 64, 1, 12, True, True, True, "padded"),
    (197, 64, 1, 50, False, True, True, "ascending"),
    (197, 32, 1, 50, True, False, True, "padded"),
    (130, 128, 2, 64, True, True, False, "shuffled"),
    (300, 64, 5, 40, True, True, True, "ascending"),
]


def named(
    batch: int, heads: int, tokens: int, prefix: int, count: int, order: str, draw: torch.Generator
) -> Tensor:
    """An index of `count` distinct keys a patch query; "padded" ends rows early with -1."""
    scores = torch.rand(batch, heads, tokens - prefix, tokens, generator=draw)
    index = scores.argsort(-1)[..., :count].to(torch.int32)
    if order == "shuffled":
        return index
    index = index.sort(-1).values
    if order == "padded":
        length = torch.randint(0, count + 1, (batch, heads, tokens - prefix, 1), generator=draw)
        index = torch.where(torch.arange(count) < length, index, -1)
    return index


def sparse_attention() -> Iterator[tuple[str, bool]]:
    """The op and its backward op, against the definition in float64."""
    draw = torch.Generator().manual_seed(0)
    for tokens, dim, prefix, count, masked, need_stats, strided, order in SPARSE:
        for dtype, tolerance in DTYPES.items():
            batch, heads = 2, 2
            wide = torch.promote_types(dtype, torch.float32)
            what = f"[{batch},{tokens},{heads},{dim}] prefix {prefix} {count} {order} {dtype}"
            what += f", mask {masked}, stats {need_stats}, strided {strided}"
            qkv = torch.randn(3, batch, tokens, heads, dim, generator=draw).to(dtype)
            pull = torch.randn(batch, tokens, heads, dim, generator=draw).to(dtype)
            index = named(batch, heads, tokens, prefix, count, order, draw)
            keep = pull_stats = None
            if masked:
                keep = (torch.rand(batch, tokens - prefix, generator=draw) < 0.7).to(wide)
            if need_stats:
                pull_stats = tokens * torch.randn(batch, tokens, heads, 6, generator=draw).to(wide)

            leaves = [x.double() for x in qkv]
            leaves += [keep.double()] if keep is not None else []
            for leaf in leaves:
                leaf.requires_grad_()
            out, stats = spot_ext.sparse_attention_reference(
                *leaves[:3], index, leaves[3] if masked else None, num_prefix=prefix,
                need_stats=need_stats,
            )  # fmt: skip
            results = [out, stats] if pull_stats is not None else [out]
            pulls = [pull.double()] + ([pull_stats.double()] if pull_stats is not None else [])
            grads = list(
                torch.autograd.grad(
                    results, leaves, pulls, allow_unused=True, materialize_grads=True
                )
            )
            want = [out.detach(), stats.detach(), *grads]
            want += [] if masked else [torch.empty(0)]

            if strided:  # what `qkv.reshape(B, N, 3, H, D).unbind(2)` gives
                q, k, v = qkv.permute(1, 2, 0, 3, 4).contiguous().cuda().unbind(2)
            else:
                q, k, v = qkv.cuda()
            gindex = index.cuda()
            gkeep, gpull, gpull_stats = (
                x.cuda() if x is not None else None for x in (keep, pull, pull_stats)
            )
            options = (None, prefix, prefix > 0)
            runs = []
            for _ in range(2):
                got = torch.ops.spot.sparse_attention(q, k, v, gindex, gkeep, *options, need_stats)
                back = torch.ops.spot.sparse_attention_backward(
                    gpull, gpull_stats, q, k, v, gindex, gkeep, *got, *options, masked
                )
                runs.append([*got[:2], *back])
            yield (
                f"sparse_attention twice {what}",
                all(torch.equal(x, y) for x, y in zip(*runs, strict=True)),
            )
            out, stats, *grads = runs[0]
            yield f"out {what}", fitting(out, want[0], tolerance)
            for i in range(6 if need_stats else 0):
                yield (
                    f"statistic {i} {what}",
                    fitting(stats[..., i], want[1][..., i], min(4 * tolerance, 1e-4)),
                )
            for name, x, y in zip(("dq", "dk", "dv", "dkeep"), grads, want[2:], strict=True):
                yield f"{name} {what}", fitting(x, y, 3 * tolerance, 0.1)
    # One bad row each: its query is NaN, others are not. float32 gathers, float16 has tensor cores.
    good = named(1, 1, 41, 1, 6, "shuffled", draw)
    for dtype, (name, entries) in itertools.product(
        (torch.float32, torch.float16),
        {
            "out of range": (0, 41, 2, 3, 4, 5),
            "far out of range": (0, 2**31 - 1, -(2**31), 3, 4, 5),
            "repeated": (0, 1, 2, 3, 1, 5),
            "behind a -1": (0, 1, 2, -1, 4, 5),
        }.items(),
    ):
        index = good.clone()
        index[0, 0, 7] = torch.tensor(entries, dtype=torch.int32)
        leaves = [
            x.cuda().requires_grad_()
            for x in torch.randn(3, 1, 41, 1, 64, generator=draw).to(dtype)
        ]
        out, _ = spot_ext.sparse_attention(*leaves, index.cuda(), need_stats=True)
        grads = torch.autograd.grad(out.sum(), leaves)
        rest = torch.arange(41) != 8
        yield (
            f"sparse_attention with a name {name} {dtype}",
            bool(out[0, 8].isnan().all() and out.cpu()[0, rest].isfinite().all())
            and bool(grads[0][0, 8].isnan().all() and grads[0].cpu()[0, rest].isfinite().all()),
        )


# columns, patch queries, rank, budget, coefficients kept, masked, gathered columns, threshold
CONNECTIVITY = [
    (1, 1, 1, 1, None, False, False, None),
    (2, 2, 0, 1, None, False, False, None),  # no basis: all tie
    (17, 17, 5, 17, 3, True, False, None),
    (33, 31, 40, 4, 8, True, True, None),
    (197, 196, 32, 50, 8, False, False, None),
    (197, 196, 32, 50, 8, True, True, None),
    (197, 196, 32, 100, None, False, False, 0.01),
    (256, 9, 7, 255, 2, True, True, 0.0),
    (300, 20, 64, 30, 8, True, False, None),
    (700, 12, 33, 70, 8, True, True, None),  # more columns than a warp holds
    (30000, 2, 3, 999, 2, False, False, None),
    (70000, 1, 2, 50, None, True, True, None),  # more than shared memory holds
]


# head dim, channels of the projections
PREDICTOR = [(32, None), (77, None), (77, 3), (33, 40), (64, 200)]


def sharp(
    queries: int,
    rank: int,
    dim: int,
    channels: int | None,
    which: Tensor,
    keep: Tensor | None,
    full: int,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """Arguments of `predict_connectivity` whose softmax is exact in every dtype.

    Everything is a small integer or 4096 times one. Columns of `down` come in pairs, and the best
    pair of a query is better than the next by 1024 or more: its coefficients are 1/2 and all others
    0. Queries with two best pairs become NaN, as are some others, and keys that are dropped.
    """
    (batch, tokens), heads = which.shape, 3

    def signs(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=draw).float()

    down = signs(full, (rank + 1) // 2)[:, torch.arange(rank) // 2]
    values = {"k": signs(batch, tokens, heads, dim), "down": down}
    if channels is not None:
        values |= {"query_weight": signs(channels, dim), "query_bias": 4096 * signs(channels),
                   "key_weight": signs(channels, dim), "key_bias": signs(channels)}  # fmt: skip
    rows = torch.nn.functional.pad(down, (0, 0, 0, 1))[which]  # [B, N, R]
    if keep is not None:
        dropped = keep == 0
        rows[:, tokens - queries :][dropped] = 0
    keys = values["k"] @ values["key_weight"].mT + values["key_bias"] if channels else values["k"]
    sums = torch.einsum("bnr,bnhc->brhc", rows, keys)
    q = torch.empty(batch, queries, heads, dim)
    left = torch.ones(q.shape[:3], dtype=torch.bool)
    for _ in range(20):
        q = torch.where(left[..., None], 4096 * signs(*q.shape), q)
        made = q @ values["query_weight"].mT + values["query_bias"] if channels else q
        logits = torch.einsum("bihc,brhc->bihr", made, sums)[..., ::2]
        best = logits.topk(min(2, logits.shape[-1]), dim=-1).values
        if best.shape[-1] < 2:
            left[:] = False
            break
        left = best[..., 0] - best[..., 1] < 1024 * max(channels or dim, 1) ** 0.5
    q[left | (torch.rand(left.shape, generator=draw) < 0.01)] = float("nan")
    if keep is not None:
        values["k"][:, tokens - queries :][dropped] = float("nan")
    values["k"][which == full] = float("nan")
    return {"q": q} | values


def connectivity() -> Iterator[tuple[str, bool]]:
    """Against the definition, on values whose sums are exact in every dtype, so that ties tie."""
    draw = torch.Generator().manual_seed(0)
    for columns, queries, rank, budget, used, masked, gathered, threshold in CONNECTIVITY:
        for dtype in DTYPES:
            batch, heads = 2, 3
            what = f"[{batch},{heads},{queries},{rank}] x {columns}, {budget} of {used} {dtype}"
            what += f", mask {masked}, columns {gathered}, threshold {threshold}"
            full = columns + 5 if gathered else columns
            coef = torch.randint(-8, 9, (batch, heads, queries, rank), generator=draw).to(dtype) / 8
            basis = torch.randint(0, 9, (rank, full), generator=draw).to(dtype) / 8
            coef.masked_fill_(torch.rand(coef.shape, generator=draw) < 0.01, float("nan"))
            keep = which = None
            if masked:
                keep = (torch.rand(batch, queries, generator=draw) < 0.5).to(dtype)
            if gathered:
                which = torch.stack([torch.randperm(full, generator=draw) for _ in range(batch)])
                which = which[:, :columns].sort(-1).values
            options = {"coef_topk": used, "threshold": threshold}
            want = spot_ext.connectivity_reference(coef, basis, budget, which, keep, **options)
            flipped = coef.transpose(1, 3).contiguous().transpose(1, 3)
            gpu = [x if x is None else x.cuda() for x in (basis, which, keep, coef, flipped)]
            for given in gpu[3:]:
                got = spot_ext.connectivity(given, gpu[0], budget, gpu[1], gpu[2], **options)
                yield f"connectivity {what}", torch.equal(got.cpu(), want)
            up = basis.mT.contiguous()
            up[::2] *= -1
            for dim, channels in PREDICTOR if columns < 1000 else [(5, None), (5, 2)]:
                tokens = torch.arange(columns).expand(batch, -1)
                if which is not None:  # the last of no token of the grid
                    tokens = torch.cat([which[:, :-1], torch.full((batch, 1), full)], dim=1)
                made = sharp(queries, rank, dim, channels, tokens, keep, full, draw)
                made = {name: x.to(dtype) for name, x in made.items()}
                named = None if which is None else tokens
                cut = options | {"basis_threshold": None if dim == 32 else 0.25}
                want = spot_ext.predict_connectivity_reference(
                    **made, up=up, budget=budget, columns=named, keep=keep, **cut
                )
                sent = {name: x.cuda() for name, x in made.items()}
                if dim != 77:  # strided
                    for name in ("q", "k"):
                        sent[name] = sent[name].transpose(1, 3).contiguous().transpose(1, 3)
                    sent["down"] = sent["down"].mT.contiguous().mT
                got = spot_ext.predict_connectivity(
                    **sent, up=up.cuda(), budget=budget,
                    columns=None if named is None else named.cuda(), keep=gpu[2], **cut,
                )  # fmt: skip
                yield (
                    f"predict_connectivity {what}, head dim {dim}, channels {channels}",
                    torch.equal(got.cpu(), want),
                )
    coef, basis = torch.rand(1, 1, 4, 3, generator=draw), torch.rand(3, 9, generator=draw)
    which = torch.tensor([[0, 1, 2, 9, -1, 1 << 40]])
    first = torch.arange(3, dtype=torch.int32)
    got = spot_ext.connectivity(coef.cuda(), basis.cuda(), 3, which.cuda())
    yield "connectivity with columns out of range", bool((got.cpu() == first).all())
    q, k, down = (
        torch.rand(*shape, generator=draw) for shape in ((1, 4, 2, 8), (1, 6, 2, 8), (9, 3))
    )
    got = spot_ext.predict_connectivity(
        q.cuda(), k.cuda(), down.cuda(), basis.mT.cuda(), 3, which.cuda()
    )
    yield "predict_connectivity with columns out of range", bool((got.cpu() == first).all())


SAMPLES = {
    "attention_stats": attention_stats,
    "compact": compact,
    "connectivity": connectivity,
    "relevance": relevance,
    "sparse_attention": sparse_attention,
}


def main(ops: list[str]) -> int:
    """Exit status 1 when a call gave something else."""
    wrong = [what for op in ops for what, fine in SAMPLES[op]() if not fine]
    print("\n".join([f"wrong: {what}" for what in wrong] or [f"{', '.join(ops)}: all as defined"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SAMPLES)))
