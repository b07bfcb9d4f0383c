"""token_evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from ops.cases.base import ANY, Bad, Op, no_flops, samples
from ops.cases.errors import ints, t
from ops.cases.strategies import batches, counts, drawn, names, orders, prefixes
from support.data import random, random_index
from support.layouts import LAYOUTS, lay_out, lay_out_index
from torch import Tensor

import spot_ext

_NAMES = (
    "stats", "counts", "followed", "cuts", "scaling", "mean_heads", "first", "last", "moments",
)  # fmt: skip


def statistics(
    name: str, batch: int, prefix: int, count: int, heads: int, dtype: torch.dtype, device: Any
) -> Tensor:
    """[batch, prefix + count, heads, 6] as attention over about `count` tokens gives them."""
    drawn = random(name, (batch, prefix + count, heads, 6), torch.float64).abs()
    scale = torch.ones(6, dtype=torch.float64) / max(count, 1)
    scale[[3, 5]] = scale[[3, 5]].square() / 4
    return (drawn * scale).to(device, dtype)


@dataclass(frozen=True)
class Evidence:
    name: str
    batch: int = 2
    tokens: tuple[int, ...] = (9, 5, 3)  # before the first cut, behind each
    blocks: tuple[int, ...] = (0, 0, 1, 2)  # cuts before each block
    prefix: int = 1
    heads: int = 3
    order: str = "ascending"
    scaling: str = "log1p"
    mean_heads: bool = False
    latest: tuple[int, int] = (0, 6)
    moments: bool = True
    layout: str = "contiguous"  # of the statistics
    cut_layout: str = "contiguous"
    traced: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        stats = [
            statistics(f"{self.name} {i}", self.batch, self.prefix, self.tokens[cut], self.heads,
                       dtype, device)
            for i, cut in enumerate(self.blocks)
        ]  # fmt: skip
        cuts = [
            random_index(f"{self.name} {k}", self.batch, self.tokens[k], self.tokens[k + 1],
                         self.order, device)
            for k in range(len(self.tokens) - 1)
        ]  # fmt: skip
        return (
            [lay_out(x, self.layout) for x in stats],
            [self.tokens[cut] for cut in self.blocks],
            list(self.blocks),
            [lay_out_index(index, self.cut_layout) for index in cuts],
            self.scaling,
            self.mean_heads,
            *self.latest,
            self.moments,
        )


_CASES = (
    Evidence("plain", traced=True),
    Evidence("two cuts at once", blocks=(0, 0, 2), traced=True),
    Evidence("behind no block", blocks=(0, 0), traced=True),
    Evidence("no cut", tokens=(7,), blocks=(0, 0, 0), traced=True),
    Evidence("cuts before all blocks", blocks=(2, 2), traced=True),
    Evidence("one cut between", tokens=(8, 6), blocks=(0, 1, 1)),
    Evidence("one block", tokens=(8,), blocks=(0,), traced=True),
    Evidence("shuffled", order="shuffled", traced=True),
    Evidence("n", scaling="n", traced=True),
    Evidence("raw", scaling="raw", traced=True),
    Evidence("mean of heads", mean_heads=True, traced=True),
    Evidence("mean of heads, n", mean_heads=True, scaling="n"),
    Evidence("mean of heads, raw, class token", mean_heads=True, scaling="raw", latest=(0, 2)),
    Evidence("mean of one head", mean_heads=True, heads=1),
    Evidence("class token", latest=(0, 2), traced=True),
    Evidence("rows and columns", latest=(2, 6)),
    Evidence("moments alone", latest=(0, 0)),
    Evidence("the last block alone", moments=False),
    Evidence("one statistic", latest=(4, 5), moments=False, mean_heads=True),
    Evidence("one head", heads=1),
    Evidence("eleven heads", heads=11, blocks=(0, 1, 1, 2, 2)),
    Evidence("sixteen heads", heads=16, scaling="n"),
    Evidence("no heads", heads=0),
    Evidence("no prefix", prefix=0),
    Evidence("long prefix", prefix=6),
    Evidence("nothing kept", tokens=(9, 0), blocks=(0, 0)),
    Evidence("no tokens", tokens=(0,), blocks=(0, 0)),
    Evidence("no images", batch=0),
    Evidence("one token", batch=1, tokens=(4, 1), blocks=(0, 1)),
    Evidence("ViT", 1, (196, 137, 96), (0, 0, 0, 1, 1, 1, 2, 2, 2), heads=6),
    Evidence("twelve images", 12, (196, 137, 96), (0, 0, 0, 1, 1, 1), heads=6),
    *(
        Evidence(f"{layout} statistics", layout=layout, traced=layout in ("swapped", "padded"))
        for layout in LAYOUTS[1:]
    ),
    *(Evidence(f"{layout} cuts", cut_layout=layout) for layout in LAYOUTS[1:-1]),
)


@st.composite
def _drawn(draw: Any) -> Evidence:
    tokens = [draw(counts)]
    for _ in range(draw(st.integers(0, 3))):
        tokens.append(draw(st.integers(0, tokens[-1])))
    blocks = draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=6).map(sorted))
    first, last = draw(st.tuples(*[st.integers(0, 6)] * 2).map(sorted))
    return Evidence(
        draw(names), draw(batches), tuple(tokens), tuple(blocks), draw(prefixes),
        draw(st.sampled_from([3, 1, 2, 6, 8, 11, 0])), draw(orders),
        draw(st.sampled_from(["log1p", "n", "raw"])), draw(st.booleans()), (first, last),
        first == last or draw(st.booleans()), draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(LAYOUTS[:-1])),
    )  # fmt: skip


def _errors() -> tuple[Bad, ...]:
    def build(device: Any, **changes: Any) -> tuple[Any, ...]:
        values: dict[str, Any] = {
            "stats": [t(2, 6, 2, 6, device=device), t(2, 4, 2, 6, device=device)],
            "counts": [5, 3], "followed": [0, 1],
            "cuts": [ints(device, [0, 2, 4], [1, 2, 3]), ints(device, [0], [2])],
            "scaling": "log1p", "mean_heads": False, "first": 0, "last": 6, "moments": True,
        }  # fmt: skip
        values |= changes
        return tuple(values[name] for name in _NAMES)

    def bad(label: str, changes: Callable[[Any], dict[str, Any]], raises: Any, words: Any,
            **more: Any) -> Bad:  # fmt: skip
        return Bad(label, lambda d: build(d, **changes(d)), raises, words, **more)

    def second(label: str, value: Callable[[Any], Any], raises: Any, *words: str,
               **more: Any) -> Bad:  # fmt: skip
        return bad(f"stats[1] {label}", lambda d: {"stats": [t(2, 6, 2, 6, device=d), value(d)]},
                   raises, words, **more)  # fmt: skip

    def cut(label: str, value: Callable[[Any], Any], raises: Any, *words: str,
            **more: Any) -> Bad:  # fmt: skip
        first = [0, 2, 4], [1, 2, 3]
        return bad(f"cuts[1] {label}", lambda d: {"cuts": [ints(d, *first), value(d)]},
                   raises, words, **more)  # fmt: skip

    def plain(label: str, raises: Any, *words: str, more: Any = None, **changes: Any) -> Bad:
        return bad(label, lambda d: changes, raises, words, **(more or {}))

    stats_words, in_schema = ("stats[1]",), {"op_words": ()}
    return (
        plain("stats None", TypeError, "stats", "NoneType", stats=None, more=in_schema),
        bad("stats a tensor", lambda d: {"stats": t(2, 6, 2, 6, device=d)}, TypeError,
            ("stats", "list", "Tensor"), op_words=()),
        plain("no stats", ValueError, "stats", "at least one block", stats=[], counts=[],
              followed=[]),
        second("None", lambda d: None, TypeError, *stats_words, "NoneType", op_words=()),
        second("sparse", lambda d: t(2, 4, 2, 6, device=d).to_sparse(), TypeError, *stats_words,
               "sparse", layouts=True),
        second("of rank 3", lambda d: t(2, 4, 12, device=d), ValueError, *stats_words, "4 dim",
               "[2, 4, 12]"),
        second("of another batch", lambda d: t(1, 4, 2, 6, device=d), ValueError, *stats_words,
               "size 2", "the batch", "[1, 4, 2, 6]"),
        second("of other heads", lambda d: t(2, 4, 3, 6, device=d), ValueError, *stats_words,
               "size 2", "heads"),
        second("of five statistics", lambda d: t(2, 4, 2, 5, device=d), ValueError, *stats_words,
               "size 6", "statistics"),
        second("of another dtype", lambda d: t(2, 4, 2, 6, device=d).double(), TypeError,
               *stats_words, "float32", "float64"),
        second("on another device", lambda d: t(2, 4, 2, 6, device="meta"), ValueError,
               *stats_words, "device"),
        bad("integer stats", lambda d: {
                "stats": [t(2, n, 2, 6, dtype=torch.int32, device=d) for n in (6, 4)]},
            TypeError, ("stats[0]", "float32", "int32")),
        bad("complex stats", lambda d: {
                "stats": [t(2, n, 2, 6, dtype=torch.complex64, device=d) for n in (6, 4)]},
            TypeError, ("stats[0]", "complex64")),
        plain("few counts", ValueError, "counts", "2 entries", "got 1", counts=[5]),
        plain("many counts", ValueError, "counts", "2 entries", "got 3", counts=[5, 3, 1]),
        plain("counts None", TypeError, "counts", "NoneType", counts=None, more=in_schema),
        plain("more than there are", ValueError, "counts[0]", "0 and 6", "got 7", counts=[7, 3]),
        plain("fewer than none", ValueError, "counts[1]", "0 and 4", "got -1", counts=[5, -1]),
        plain("other than were left", ValueError, "counts[1]", "3", "left", "got 4",
              counts=[5, 4]),
        plain("counts float", TypeError, "counts[1]", "float", counts=[5, 3.0], more=in_schema),
        plain("few followed", ValueError, "followed", "2 entries", "got 1", followed=[0]),
        plain("followed None", TypeError, "followed", "NoneType", followed=None, more=in_schema),
        plain("followed descends", ValueError, "followed[1]", "1 and 2", "got 0", followed=[1, 0],
              counts=[3, 3]),
        plain("followed beyond the cuts", ValueError, "followed[1]", "0 and 2", "got 3",
              followed=[0, 3]),
        plain("followed negative", ValueError, "followed[0]", "0 and 2", "got -1",
              followed=[-1, 1]),
        plain("followed float", TypeError, "followed[0]", "float", followed=[0.5, 1],
              more=in_schema),
        plain("cuts None", TypeError, "cuts", "NoneType", cuts=None, more=in_schema),
        cut("None", lambda d: None, TypeError, "cuts[1]", "NoneType", op_words=()),
        cut("of rank 1", lambda d: torch.zeros(2, dtype=torch.int64, device=d), ValueError,
            "cuts[1]", "2 dim", "[2]"),
        cut("of int32", lambda d: ints(d, [0], [1]).int(), TypeError, "cuts[1]", "int64", "int32"),
        cut("of another batch", lambda d: ints(d, [0]), ValueError, "cuts[1]", "size 2", "batch",
            "[1, 1]"),
        cut("on another device", lambda d: ints("meta", [0], [1]), ValueError, "cuts[1]",
            "device"),
        cut("beyond the cut before", lambda d: ints(d, [0], [3]), ValueError, "cuts[1][1, 0]",
            "is 3", "3 tokens", values=True),
        cut("negative", lambda d: ints(d, [-1], [0]), ValueError, "cuts[1][0, 0]", "is -1",
            values=True),
        bad("cuts beyond the first block", lambda d: {
                "cuts": [ints(d, [0, 2, 4], [1, 5, 3]), ints(d, [0], [1])]}, ValueError,
            ("cuts[0][1, 1]", "is 5", "5 tokens"), values=True),
        bad("cuts far beyond", lambda d: {
                "cuts": [ints(d, [0, 2**40, 4], [1, 2, 3]), ints(d, [1], [1])]}, ValueError,
            ("cuts[0][0, 1]", f"is {2**40}"), values=True),
        plain("an unknown scaling", ValueError, "scaling", "'log1p'", "'log'", scaling="log"),
        plain("scaling None", TypeError, "scaling", "NoneType", scaling=None,
              more={"op_words": ("scaling",)}),
        plain("mean_heads an int", TypeError, "mean_heads", "int", mean_heads=1,
              more={"op_accepts": True}),
        plain("moments a str", TypeError, "moments", "str", moments="yes",
              more={"op_words": ("moments",)}),
        plain("latest beyond the six", ValueError, "latest[1]", "0 and 6", "got 7", last=7),
        plain("latest reversed", ValueError, "latest[0]", "0 and 2", "got 3", first=3, last=2),
        plain("latest negative", ValueError, "latest[0]", "0 and 6", "got -1", first=-1),
        plain("latest float", TypeError, "latest[1]", "float", last=6.0, more=in_schema),
        plain("asks for nothing", ValueError, "nothing", first=2, last=2, moments=False),
    )  # fmt: skip


def _public(
    stats: Any, counts: Any, followed: Any, cuts: Any, scaling: Any, mean_heads: Any, first: Any,
    last: Any, moments: Any,
) -> Tensor:  # fmt: skip
    """The public function with the arguments of the op."""
    return spot_ext.token_evidence(
        stats, counts, followed, cuts, scaling=scaling, mean_heads=mean_heads,
        latest=(first, last), moments=moments,
    )  # fmt: skip


def _reference(
    stats: Any, counts: Any, followed: Any, cuts: Any, scaling: Any, mean_heads: Any, first: Any,
    last: Any, moments: Any,
) -> Tensor:  # fmt: skip
    return spot_ext.token_evidence_reference(
        stats, counts, followed, cuts, scaling=scaling, mean_heads=mean_heads,
        latest=(first, last), moments=moments,
    )  # fmt: skip


OPS = (
    Op("token_evidence", _reference, samples(_CASES), _errors(), no_flops, exact=False,
       public=_public, once_only="for inference and has no gradient", large="twelve images",
       drawn=drawn(_drawn()), odd={0: ANY}),
)  # fmt: skip
