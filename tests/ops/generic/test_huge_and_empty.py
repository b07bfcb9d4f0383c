"""Calls without elements return at once, however many images or tokens their shapes name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.cases import OPS
from support.arguments import tensors
from support.package import python
from torch import Tensor

HUGE = 2**40
LONG = 2**31 - 1  # the most tokens that attention takes
SECONDS = 2.0

Args = tuple[Any, ...]


def e(*shape: int) -> Tensor:
    return torch.empty(shape)


def wide(*shape: int, value: float = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """One element, seen as many."""
    return torch.full((1,) * len(shape), value, dtype=dtype).expand(shape)


def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return wide(*shape, value=0, dtype=dtype)


SHAPES = [(HUGE, 0, 2, 4), (HUGE, 5, 0, 4), (0, LONG, 2, 4), (2, LONG, 0, 4), (HUGE, 0, HUGE, 4)]


def _keeps(shape: tuple[int, ...], prefix: int) -> list[Tensor | None]:
    patches = shape[1] - prefix
    return [None, wide(shape[0], patches)]


def _attention() -> list[Args]:
    return [
        (*[e(*s)] * 3, keep, None, None, p, p > 0, True)
        for s in SHAPES
        for p in ({0, 1} if s[1] else {0})
        for keep in _keeps(s, p)
    ]


def _attention_backward() -> list[Args]:
    return [
        (e(*s), e(*s[:3], 6), *[e(*s)] * 3, keep, None, e(*s), e(*s[:3], 6), e(*s[:3]),
         None, 0, False, False, False)
        for s in SHAPES
        for keep in _keeps(s, 0)
    ]  # fmt: skip


def _sparse() -> list[Args]:
    return [
        (*[e(*s)] * 3, ints(s[0], s[2], s[1], 0, dtype=torch.int32), keep, None, 0, False, True)
        for s in SHAPES[:4]
        for keep in _keeps(s, 0)
    ]


def _sparse_backward() -> list[Args]:
    return [
        (e(*s), e(*s[:3], 6), *[e(*s)] * 3, ints(s[0], s[2], s[1], 0, dtype=torch.int32), keep,
         e(*s), e(*s[:3], 6), e(*s[:3]), None, 0, False, False)
        for s in SHAPES[:4]
        for keep in _keeps(s, 0)
    ]  # fmt: skip


def _connectivity() -> list[Args]:
    sizes = [(HUGE, 2, 0), (HUGE, 0, 5), (0, 2, LONG - 2), (2, 0, LONG - 2)]
    return [
        (e(b, h, n, 3), wide(3, max(n + 1, 6)), 1, columns, wide(b, n), None, None)
        for b, h, n in sizes
        for columns in (None, ints(b, n + 1))
    ]


def _predict() -> list[Args]:
    sizes = [(HUGE, 0, 2, 0), (HUGE, 5, 0, 1), (0, LONG - 3, 2, 1), (2, LONG - 3, 0, 1)]
    projected = [None] * 4, [wide(HUGE, 4), wide(HUGE)] * 2
    return [
        (e(b, n, h, 4), wide(b, n + 1, h, 4), wide(n + 1, 3), *weights, wide(n + 1, 3), 1,
         columns, wide(b, n), None, None, None, None)
        for b, n, h, p in sizes
        for weights in projected
        for columns in (None, ints(b, n + 1))
    ]  # fmt: skip


def _relevance() -> list[Args]:
    def call(b: int, n: int, tokens: bool, remap: int) -> Args:
        made = (wide(8), wide(8), wide(remap, 8), wide(remap)) if tokens else [None] * 4
        inner = (remap if tokens else 0) + 3
        return (
            e(b, n, 8) if tokens else None, e(b, n, 3), wide(b, n), *made,
            wide(5, inner), wide(5), wide(4, 5), wide(4), wide(2, 4), wide(2), 1e-5,
        )  # fmt: skip

    return [
        call(HUGE, 0, False, 0), call(HUGE, 0, True, 0), call(0, HUGE, True, 6),
        call(0, HUGE, False, 0), call(HUGE, 0, False, 0),
    ]  # fmt: skip


def _relevance_backward() -> list[Args]:
    return [
        (e(args[1].shape[0], args[1].shape[1], 2), *args[:-1],
         *torch.ops.spot.token_relevance(*args), 1e-5, True, True, True, True)
        for args in _relevance()
    ]  # fmt: skip


CALLS: dict[str, Callable[[], list[Args]]] = {
    "select_tokens": lambda: [
        (e(HUGE, 0), 0), (wide(HUGE, 5), 0), (e(0, LONG), 5), (e(0, LONG), LONG),
    ],
    "compact_tokens": lambda: [
        (e(HUGE, 6, 0), ints(HUGE, 1)), (e(0, HUGE, 3), e(0, 5).long()),
        (e(2, HUGE, 0), ints(2, 1)),
        (e(HUGE, 1, 0), ints(HUGE, 0), 1, e(HUGE, 2, 0)),
    ],
    "compact_tokens_backward": lambda: [
        (e(HUGE, 2, 0), ints(HUGE, 1), 5), (e(0, 6, 3), e(0, 5).long(), HUGE),
        (e(2, 1, 0), ints(2, 0), HUGE), (e(HUGE, 0, 3), ints(HUGE, 0), 0, 0),
    ],
    "scatter_tokens": lambda: [
        (e(HUGE, 2, 0), ints(HUGE, 1), 5), (e(0, 6, 3), e(0, 5).long(), HUGE),
        (e(2, 1, 0), ints(2, 0), HUGE), (e(HUGE, 2, 0), ints(HUGE, 1), 5, 1, e(HUGE, 6, 0)),
    ],
    "fuse_tokens": lambda: [
        (e(HUGE, 6, 0), wide(HUGE, 5), ints(HUGE, 1)), (e(0, HUGE, 3), e(0, HUGE - 1), ints(0, 2)),
        (e(2, HUGE, 0), wide(2, HUGE - 1), ints(2, 1)), (e(HUGE, 1, 0), e(HUGE, 0), ints(HUGE, 0)),
    ],
    "fuse_tokens_backward": lambda: [
        (e(HUGE, 0), e(HUGE, 1, 0), e(HUGE, 0), ints(HUGE, 0)),
        (e(0, 3), e(0, HUGE, 3), e(0, HUGE - 1), ints(0, 2)),
        (wide(HUGE, 3), e(HUGE, 0, 3), e(HUGE, 0), ints(HUGE, 0), 0),
    ],
    "attention_stats": _attention,
    "attention_stats_backward": _attention_backward,
    "sparse_attention": _sparse,
    "sparse_attention_backward": _sparse_backward,
    "connectivity": _connectivity,
    "predict_connectivity": _predict,
    "pack_linear": lambda: [(e(HUGE, 0),), (e(0, HUGE),)],
    "packed_linear": lambda: [
        (e(HUGE, 0, 3), e(1, 3, 32), 5), (e(0, HUGE, 3), e(1, 3, 32), 5, e(5), e(0, HUGE, 5)),
        (wide(HUGE, 3), e(0, 3, 32), 0), (e(HUGE, 0, HUGE, 3), e(1, 3, 32), 5),
    ],
    "token_evidence": lambda: [
        ([e(HUGE, 0, 2, 6)], [0], [0], []), ([e(0, HUGE, 2, 6)], [HUGE], [0], []),
        ([wide(HUGE, 3, 2, 6)], [3], [0], [ints(HUGE, 0)]), ([e(2, HUGE, 0, 6)], [HUGE], [0], []),
    ],
    "token_relevance": _relevance,
    "token_relevance_backward": _relevance_backward,
}  # fmt: skip


def run(name: str) -> None:
    """Makes the calls of an op, and prints how many there are."""
    print(name, end=" ", flush=True)
    calls = CALLS[name]()
    for number, args in enumerate(calls):
        start = time.perf_counter()
        outputs = tensors(getattr(torch.ops.spot, name)(*args))
        taken = time.perf_counter() - start
        assert taken < SECONDS, f"call {number} took {taken:.1f} s"
        assert not outputs[0].numel()
    print(len(calls))


def test_nothing_takes_no_time() -> None:
    """In a process of their own: a walk over 2^40 entries never ends."""
    tests = Path(__file__).resolve().parents[2]
    done = python(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "import torch, spot_ext\n"
        "from ops.generic.test_huge_and_empty import CALLS, run\n"
        "for name in CALLS: run(name)",
        tests,
    )
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert counts.keys() == OPS.keys()
    assert all(int(count) >= 2 for count in counts.values()), counts


def test_gradients_of_nothing_are_zeros() -> None:
    """Where a call has no element but one of its gradients does."""
    q = torch.empty(2, 6, 0, 4)
    keep = torch.ones(2, 5, requires_grad=True)
    index = torch.empty(2, 0, 5, 3, dtype=torch.int32)
    for out in (
        torch.ops.spot.attention_stats(*[q] * 3, keep)[0],
        torch.ops.spot.sparse_attention(*[q] * 3, index, keep)[0],
    ):
        keep.grad = None
        out.sum().backward()
        assert keep.grad is not None and keep.grad.eq(0).all()
    bias = torch.ones(1, 2, 5, 5, requires_grad=True)
    torch.ops.spot.attention_stats(*[torch.empty(0, 5, 2, 4)] * 3, None, bias)[0].sum().backward()
    assert bias.grad is not None and bias.grad.eq(0).all()
    tokens = torch.empty(2, 6, 0, requires_grad=True)
    weights = torch.ones(2, 5, requires_grad=True)
    empty = torch.empty(2, 0, dtype=torch.int64)
    torch.ops.spot.fuse_tokens(tokens, weights, empty).sum().backward()
    assert weights.grad is not None and weights.grad.eq(0).all()
    leaves = [torch.ones(s, requires_grad=True) for s in [(4, 3), (4,), (3, 4), (3,), (2, 3), (2,)]]
    logits = torch.ops.spot.token_relevance(None, torch.empty(2, 0, 3), *[None] * 5, *leaves)[0]
    logits.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.eq(0).all() for leaf in leaves)


def test_a_repeated_position_among_very_many_tokens_is_named() -> None:
    """Without a mark for each of 2^40 tokens, which a machine has no memory for."""
    tokens = torch.rand(1, 1, 3).expand(1, HUGE, 3)
    out = torch.ops.spot.compact_tokens(tokens, torch.tensor([[HUGE - 2, 7, 9]]))
    assert torch.equal(out, tokens[:, :4])
    with pytest.raises((RuntimeError, ValueError), match="repeats position 7"):
        torch.ops.spot.compact_tokens(tokens, torch.tensor([[HUGE - 2, 7, 7]]))
