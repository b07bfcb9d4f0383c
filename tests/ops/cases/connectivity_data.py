"""Arguments of connectivity and predict_connectivity whose sets rounding cannot change."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from ops.cases.strategies import batches, counts, masks, names, prefixes, scales, widths
from support.arguments import to_dtype
from support.data import generator, random, random_index
from support.layouts import LAYOUTS, lay_out
from torch import Tensor


def exact_values(name: str, shape: tuple[int, ...], low: int, high: int, part: float = 1.0) -> Any:
    """Eighths between low and high, of which `part` is not 0: sums of products stay exact."""
    seeded = generator(f"exact {name}")
    value = torch.randint(low, high + 1, shape, generator=seeded).double() / 8
    return value * (torch.rand(shape, generator=seeded) < part)


@dataclass(frozen=True)
class Connectivity:
    name: str
    batch: int = 2
    heads: int = 2
    queries: int = 9
    num_prefix: int = 1
    rank: int = 5
    budget: int = 4
    columns: int | None = None  # of the full grid, of which those in play are drawn
    keep: str = ""  # random, all, none
    coef_topk: int | None = None
    threshold: float | None = None
    part: float = 0.7  # of the basis that is not 0
    coefficients_layout: str = "contiguous"
    basis_layout: str = "contiguous"
    columns_layout: str = "contiguous"
    odd: bool = False  # some coefficients are NaN
    traced: bool = False

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape = self.batch, self.heads, self.queries, self.rank
        coefficients = exact_values(f"{self.name} coefficients", shape, -4, 8)
        basis = exact_values(f"{self.name} basis", (self.rank, self.grid), 1, 6, self.part)
        if self.odd:
            drawn = torch.rand(shape, generator=generator(f"{self.name} odd"))
            coefficients = coefficients.masked_fill(drawn < 0.01, math.nan)
        return (
            lay_out(coefficients.to(device, dtype), self.coefficients_layout),
            lay_out(basis.to(device, dtype), self.basis_layout),
            *self.choice(device, dtype),
        )

    @property
    def grid(self) -> int:
        """Columns of the basis."""
        return self.queries + self.num_prefix if self.columns is None else self.columns

    def choice(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments behind the basis."""
        columns = keep = None
        if self.columns is not None:
            in_play = self.queries + self.num_prefix
            drawn = random_index(f"{self.name} columns", self.batch, self.columns, in_play)
            columns = lay_out(drawn.to(device), self.columns_layout)
        if self.keep:
            value = {"random": 0.6, "all": 1.0, "none": 0.0}[self.keep]
            flips = torch.rand((self.batch, self.queries), generator=generator(f"{self.name} keep"))
            keep = (flips < value).to(device, dtype)
        return self.budget, columns, keep, self.coef_topk, self.threshold


def drawn_sizes(draw: Any, most: int) -> dict[str, Any]:
    """Fields of a case of either op, of at most `most` queries."""
    num_prefix = draw(prefixes)
    queries = min(draw(counts), most)
    queries = max(queries, 1 - num_prefix)  # a budget is at least 1
    in_play = num_prefix + queries
    return {
        "name": draw(names), "batch": draw(batches), "heads": draw(st.sampled_from([2, 1, 3, 0])),
        "queries": queries, "num_prefix": num_prefix, "budget": draw(st.integers(1, in_play)),
        "columns": draw(st.sampled_from([None, None, in_play, in_play + 9])), "keep": draw(masks),
        "coef_topk": draw(st.sampled_from([None, None, 1, 2, 3, 8, 50])),
        "threshold": draw(st.sampled_from([None, None, 0.0, -0.5, 0.25, 100.0])),
    }  # fmt: skip


def _drawn_layouts(draw: Any, *fields: str) -> dict[str, str]:
    return {f"{name}_layout": draw(st.sampled_from(LAYOUTS[:-1])) for name in fields}


@st.composite
def drawn_connectivity(draw: Any) -> Connectivity:
    return Connectivity(
        rank=draw(st.one_of(st.just(0), widths)), part=draw(st.sampled_from([0.7, 0.1, 1.0, 0.0])),
        odd=draw(st.sampled_from([False, False, True])),
        **drawn_sizes(draw, 65), **_drawn_layouts(draw, "coefficients", "basis", "columns"),
    )  # fmt: skip


# In the order of the op.
PREDICTION_NAMES = (
    "q", "k", "down", "query_weight", "query_bias", "key_weight", "key_bias", "up", "budget",
    "columns", "keep", "scale", "coef_topk", "basis_threshold", "threshold",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction(Connectivity):
    """Softmax is not exact: data are drawn until no set hangs on the rounding of a sum."""

    dim: int = 4
    channels: int | None = 8  # of the projections; None for none of them
    scale: float | None = None
    basis_threshold: float | None = None
    fused: bool = False  # one of the columns is of no token of the grid
    rows_layout: str = "qkv"  # of q and k, by default those of a fused projection
    down_layout: str = "contiguous"
    weights_layout: str = "contiguous"

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        number = _first_clear(self, dtype)
        assert number is not None, f"{self.name}: rounding may change a set of every draw"
        return self.drawn(number, device, dtype)

    def args_soon_found(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        """For Hypothesis, which looks for another case where few draws do not do."""
        number = _first_clear(self, dtype, 20)
        return hypothesis.reject() if number is None else self.drawn(number, device, dtype)

    def drawn(self, number: int, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
            drawn = random(f"{self.name} {name} {number}", shape, torch.float64)
            return (scale * drawn).to(device, dtype)

        tokens = self.num_prefix + self.queries
        if self.rows_layout == "qkv":
            packed = normal("q", self.batch, tokens, 3, self.heads, self.dim)
            q, k = packed[:, self.num_prefix :, 0], packed[:, :, 1]
        else:
            q = normal("q", self.batch, self.queries, self.heads, self.dim)
            k = normal("k", self.batch, tokens, self.heads, self.dim)
            q, k = lay_out(q, self.rows_layout), lay_out(k, self.rows_layout)
        down = normal("down", self.grid, self.rank, scale=tokens**-0.5)
        projections: tuple[Any, ...] = (None,) * 4
        if self.channels is not None:
            size, share = (self.channels, self.dim), max(self.dim, 1) ** -0.5
            projections = (
                self._weight(normal("query weight", *size, scale=share)),
                self._weight(normal("query bias", 1, self.channels, scale=0.5))[0],
                self._weight(normal("key weight", *size, scale=share)),
                self._weight(normal("key bias", 1, self.channels, scale=0.5))[0],
            )
        up = normal("up", self.grid, self.rank)
        seeded = generator(f"{self.name} part {number}")
        up = up * (torch.rand(up.shape, generator=seeded) < self.part).to(device)
        budget, columns, keep, coef_topk, threshold = self.choice(device, dtype)
        if self.fused:
            columns = columns.clone()
            columns[:, self.num_prefix] = self.grid
        return (
            q, k, lay_out(down, self.down_layout), *projections, lay_out(up, self.basis_layout),
            budget, columns, keep, self.scale, coef_topk, self.basis_threshold, threshold,
        )  # fmt: skip

    def _weight(self, value: Tensor) -> Tensor:
        return lay_out(value, self.weights_layout)


@st.composite
def drawn_prediction(draw: Any) -> Prediction:
    """Small: of many sets one hangs on rounding in every draw."""
    sizes = drawn_sizes(draw, 12)
    return Prediction(
        rank=draw(st.integers(1, 12)),
        fused=sizes["columns"] is not None and sizes["queries"] > 0 and draw(st.booleans()),
        basis_threshold=draw(st.sampled_from([None, None, 0.0, 0.5])),
        dim=draw(st.sampled_from([1, 2, 4, 7, 16, 33])),
        channels=draw(st.sampled_from([None, 1, 2, 5, 8, 17])), scale=draw(scales),
        basis_layout=draw(st.sampled_from(LAYOUTS[:-2])),  # equal rows would tie
        **sizes, **_drawn_layouts(draw, "rows", "down", "weights", "columns"),
    )  # fmt: skip


@functools.cache
def _first_clear(sample: Prediction, dtype: torch.dtype, most: int = 1000) -> int | None:
    """Which draw of a sample is the first whose sets rounding cannot change."""
    numbers = (n for n in range(most) if clear_of_rounding(*sample.drawn(n, "cpu", dtype)))
    return next(numbers, None)


def prediction_logits(
    q: Tensor, k: Tensor, down: Tensor, query_weight: Tensor | None, query_bias: Tensor | None,
    key_weight: Tensor | None, key_bias: Tensor | None, columns: Tensor | None,
    keep: Tensor | None, scale: float | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, H, N-P, R] in `dtype`, with keys projected first and with keys added up first.

    Without projections the second adds up in another order.
    """
    q, k, down = q.to(dtype), k.to(dtype), down.to(dtype)
    tokens = torch.arange(k.shape[1], device=k.device)[None] if columns is None else columns
    seen = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    if keep is not None:
        seen[:, k.shape[1] - keep.shape[1] :] = keep > 0.5
    seen = seen & (tokens < down.shape[0])
    down = F.pad(down, (0, 0, 0, 1))[tokens].expand(*k.shape[:2], -1) * seen[..., None]
    k = torch.where(seen[..., None, None], k, 0)
    factor = q.shape[3] ** -0.5 if q.shape[3] else 1.0
    sums = torch.einsum("bnr,bnhd->bhrd", down, k)
    first = torch.einsum("bihd,bhrd->bhir", q, sums)
    second = torch.einsum("bihd,bnhd->bhin", q, k) @ down[:, None]
    if query_weight is not None:
        weights = (x.to(dtype) for x in (query_weight, query_bias, key_weight, key_bias))
        to_query, plus_query, to_key, plus_key = weights
        factor = to_query.shape[0] ** -0.5 if to_query.shape[0] else 1.0
        keys = torch.einsum("bnr,bnhc->bhrc", down, k @ to_key.mT + plus_key)
        first = torch.einsum("bihc,bhrc->bhir", q @ to_query.mT + plus_query, keys)
        keys = sums @ to_key.mT + down.sum(1)[:, None, :, None] * plus_key
        second = torch.einsum("bihd,bhrd->bhir", q, keys @ to_query)
        second = second + (keys @ plus_query)[:, :, None]
    factor = factor if scale is None else scale
    return factor * first, factor * second


def rounding_of_logits(*args: Any, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Exact logits, and the most that either order of products loses in `dtype`."""
    exact, other = prediction_logits(*args, dtype=torch.float64)
    orders = (other,) if dtype == torch.float64 else prediction_logits(*args, dtype=dtype)
    if not exact.numel():
        return exact, 0.0
    return exact, max((order - exact).abs().max().item() for order in orders)


def basis_of(up: Tensor, threshold: float | None) -> Tensor:
    """[R, n + 1] in float64: the last column is that of tokens that are not of the grid."""
    basis = up.double().mT
    if threshold is not None:
        basis = torch.where(basis.abs() > threshold, basis.abs(), 0.0)
    return F.pad(basis, (0, 1))


def clear_of_rounding(
    q: Tensor, k: Tensor, down: Tensor, query_weight: Tensor | None, query_bias: Tensor | None,
    key_weight: Tensor | None, key_bias: Tensor | None, up: Tensor, budget: int,
    columns: Tensor | None, keep: Tensor | None, scale: float | None, coef_topk: int | None,
    basis_threshold: float | None, threshold: float | None,
) -> bool:  # fmt: skip
    """Whether all sets of `predict_connectivity` keep away from ties by far more than float32's
    rounding; ties of sums that are exact do not count."""
    logits, rounding = rounding_of_logits(
        q, k, down, query_weight, query_bias, key_weight, key_bias, columns, keep, scale,
        dtype=torch.float32,
    )  # fmt: skip
    margin = max(1e-5, 8 * rounding)
    coefficients, basis = logits.softmax(dim=-1), basis_of(up, basis_threshold)
    used = logits.shape[-1]
    if coef_topk is not None and coef_topk < used:
        used = coef_topk
        best, order = logits.sort(dim=-1, descending=True, stable=True)
        last, next_ = best[..., used - 1], best[..., used]
        # Of no channels, or of no keys, all logits are 0.
        if (~((last == 0) & (next_ == 0)) & (last - next_ < margin)).any():
            return False
        coefficients = coefficients.scatter(-1, order[..., used:], 0.0)
    if columns is None:
        approx = coefficients @ basis[:, :-1]
    else:
        approx = coefficients @ basis.mT[columns].mT[:, None]
    margin *= basis.abs().max().item() if basis.numel() else 1.0
    if threshold is not None:
        if ((approx != 0) & ((approx - threshold).abs() < margin)).any():
            return False
        approx = approx.masked_fill(approx <= threshold, -math.inf)
    if keep is not None:
        dropped = F.pad(keep == 0, (approx.shape[-1] - keep.shape[1], 0))
        approx = approx.masked_fill(dropped[:, None, None], -math.inf)
    if budget == approx.shape[-1]:
        return True
    best = approx.sort(dim=-1, descending=True).values
    last, next_ = best[..., budget - 1], best[..., budget]
    exact = (last == next_) & ((last == 0) | last.isinf() | (used == 1))
    return not (~exact & (last - next_ < margin)).any()


@dataclass(frozen=True)
class Sharp(Connectivity):
    """Arguments of `predict_connectivity` whose softmax is exact in every dtype.

    Everything is a small integer or 4096 times one. Columns of `down` come in pairs, and the best
    pair of a query is better than the next by 1024 or more: its coefficients are 1/2 and all others
    0. Queries with two best pairs become NaN, as are some others, and keys that are dropped.
    """

    dim: int = 4
    channels: int | None = None
    basis_threshold: float | None = None
    rows_layout: str = "contiguous"

    def args(self, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        draw = generator(f"{self.name} sharp")

        def signs(*shape: int) -> Tensor:
            return torch.randint(-1, 2, shape, generator=draw).float()

        tokens, width = self.queries + self.num_prefix, self.channels
        budget, columns, keep, coef_topk, threshold = self.choice("cpu", torch.float32)
        which = torch.arange(tokens).expand(self.batch, -1)
        if columns is not None:
            which = columns = torch.cat(
                [columns[:, :-1], torch.full((self.batch, 1), self.grid)], 1
            )
        dropped = torch.zeros(which.shape, dtype=torch.bool)
        if keep is not None:
            dropped[:, self.num_prefix :] = keep == 0
        down = signs(self.grid, (self.rank + 1) // 2)[:, torch.arange(self.rank) // 2]
        k = signs(self.batch, tokens, self.heads, self.dim)
        projections: tuple[Any, ...] = (None,) * 4
        if width is not None:
            projections = (signs(width, self.dim), 4096 * signs(width), signs(width, self.dim),
                           signs(width))  # fmt: skip
        q = self.queries_for(signs, down, k, projections, which, dropped)
        q[torch.rand(q.shape[:3], generator=draw) < 0.01] = math.nan
        k[dropped | (which == self.grid)] = math.nan
        up = exact_values(f"{self.name} up", (self.grid, self.rank), 0, 8)
        up[::2] *= -1
        q, k, down = (lay_out(x, self.rows_layout) for x in (q, k, down))
        values = (q, k, down, *projections, up, budget, columns, keep, None, coef_topk,
                  self.basis_threshold, threshold)  # fmt: skip
        return tuple(x.to(device) if isinstance(x, Tensor) else x for x in to_dtype(values, dtype))

    def queries_for(
        self, signs: Any, down: Tensor, k: Tensor, projections: tuple[Any, ...], which: Tensor,
        dropped: Tensor,
    ) -> Tensor:  # fmt: skip
        """Drawn up to twenty times; NaN where the best pair is still not clear of the next."""
        to_query, plus_query, to_key, plus_key = projections
        rows = F.pad(down, (0, 0, 0, 1))[which].masked_fill(dropped[..., None], 0)  # [B, N, R]
        keys = k if to_key is None else k @ to_key.mT + plus_key
        sums = torch.einsum("bnr,bnhc->brhc", rows, keys)[:, ::2]
        q = 4096 * signs(self.batch, self.queries, self.heads, self.dim)
        if sums.shape[1] < 2:  # one pair
            return q
        margin = 1024 * (self.channels or self.dim) ** 0.5
        for _ in range(20):
            made = q if to_query is None else q @ to_query.mT + plus_query
            best = torch.einsum("bihc,brhc->bihr", made, sums).topk(2, dim=-1).values
            left = (best[..., 0] - best[..., 1] < margin)[..., None]
            q = torch.where(left, 4096 * signs(*q.shape), q)
        return q.masked_fill(left, math.nan)
