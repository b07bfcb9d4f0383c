"""Cases of the compact slice. What a user would otherwise write is spelled out in the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from spot_vit.utils.timing import Case, Side, input_sets
from torch import Tensor

from spot_ext import compact_tokens, fuse_tokens, scatter_tokens, select_tokens

KEEP, PATCHES = 137, 196


def gather(tokens: Tensor, scores: Tensor) -> Tensor:
    """With topk, sort, cat, gather: the class token joins as an index, so each row moves once.

    (Gathering the patches and then concatenating the class row would copy every row twice.)
    """
    index = scores.topk(KEEP, dim=1).indices.sort(dim=1).values + 1
    index = torch.cat([index.new_zeros(index.shape[0], 1), index], dim=1)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def indexing(tokens: Tensor, scores: Tensor) -> Tensor:
    """With topk and advanced indexing; unsorted, since nothing asks for an order."""
    index = scores.topk(KEEP, dim=1).indices + 1
    index = torch.cat([index.new_zeros(index.shape[0], 1), index], dim=1)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], index]


def ours(tokens: Tensor, scores: Tensor) -> Tensor:
    return compact_tokens(tokens, select_tokens(scores, KEEP))


class Inputs:
    """Sets of random inputs to rotate over."""

    def __init__(
        self, batch: int, channels: int, dtype: torch.dtype, device: str, least: int = 1
    ) -> None:
        draw = torch.Generator(device).manual_seed(0)
        shape = (batch, PATCHES + 1, channels)
        self.bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        self.count = max(input_sets(self.bytes, device), least) if self.bytes < 1 << 27 else 1

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draw, device=device, dtype=dtype)

        self.tokens = [normal(*shape) for _ in range(self.count)]
        self.scores = [normal(batch, PATCHES) for _ in range(self.count)]
        self.index = [select_tokens(scores, KEEP) for scores in self.scores]
        self.kept = [compact_tokens(x, i) for x, i in zip(self.tokens, self.index, strict=True)]

    def side(self, function: Callable[..., Any], *names: str) -> Side:
        """`function` of the named inputs, as a side."""
        sets = [[getattr(self, name)[i] for name in names] for i in range(self.count)]
        return lambda i: function(*sets[i % self.count])


def _cut(x: Inputs, name: str, bars: dict[str, float]) -> Case:
    return Case(
        f"select + compact {name}",
        x.side(ours, "tokens", "scores"),
        {
            "topk + sort + cat + gather": x.side(gather, "tokens", "scores"),
            "topk + indexing": x.side(indexing, "tokens", "scores"),
        },
        bars,
        x.bytes,
    )


def cases(device: str) -> Iterator[Case]:
    """Cases one after the other, so that only one holds memory."""
    bars = {"topk + sort + cat + gather": 6.0, "topk + indexing": 2.0} if device == "cpu" else {}
    yield _cut(Inputs(64, 384, torch.float32, device), "[64,197,384] float32", bars)
    cold = Inputs(64, 384, torch.float32, device, least=8)
    yield _cut(cold, "[64,197,384] float32, eight inputs in turn", {})
    del cold
    yield _cut(Inputs(64, 384, torch.bfloat16, device), "[64,197,384] bfloat16", {})
    yield _cut(Inputs(1, 384, torch.float32, device), "[1,197,384] float32", {})

    x = Inputs(512, 768, torch.float32, device)
    yield Case(
        "compact [512,197,768] float32",
        x.side(compact_tokens, "tokens", "index"),
        {"clone of the output": x.side(torch.clone, "kept")},
        {"clone of the output": 0.8},
        x.bytes,
    )

    x = Inputs(64, 384, torch.float32, device)
    yield Case(
        "select [64,196]",
        x.side(lambda s: select_tokens(s, KEEP), "scores"),
        {
            "topk + sort": x.side(lambda s: s.topk(KEEP, dim=1).indices.sort(dim=1), "scores"),
            "topk": x.side(lambda s: s.topk(KEEP, dim=1), "scores"),
        },
        {},
        64 * PATCHES * 4,
    )

    def put_back(kept: Tensor, index: Tensor) -> Tensor:
        grid = kept.new_zeros(kept.shape[0], PATCHES + 1, kept.shape[2])
        grid[:, :1] = kept[:, :1]
        where = (index + 1)[:, :, None].expand(-1, -1, kept.shape[2])
        return grid.scatter_(1, where, kept[:, 1:])

    yield Case(
        "scatter [64,138,384] -> 197",
        x.side(lambda kept, index: scatter_tokens(kept, index, PATCHES), "kept", "index"),
        {"zeros + scatter_": x.side(put_back, "kept", "index")},
        {},
        x.bytes,
    )

    def soft_token(tokens: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        left = weights.scatter(1, index, 0.0)
        return torch.bmm(left[:, None], tokens[:, 1:])[:, 0] / left.sum(1, keepdim=True)

    yield Case(
        "fuse [64,197,384], 59 removed",
        x.side(fuse_tokens, "tokens", "scores", "index"),
        {"scatter + bmm over all": x.side(soft_token, "tokens", "scores", "index")},
        {},
        x.bytes,
    )
