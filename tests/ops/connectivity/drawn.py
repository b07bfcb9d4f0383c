"""Drawn calls of connectivity, and what its rows are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from ops.cases.connectivity_data import exact_values
from support.data import generator, random, random_index
from support.layouts import LAYOUTS, lay_out
from torch import Tensor


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    num_prefix = draw(st.sampled_from([0, 1, 1, 2, 5]))
    queries = draw(st.integers(0 if num_prefix else 1, 9))
    in_play = num_prefix + queries
    return {
        "batch": draw(st.integers(0, 3)),
        "heads": draw(st.integers(1, 3)),
        "queries": queries,
        "in_play": in_play,
        "rank": draw(st.integers(0, 6)),
        "budget": draw(st.integers(1, in_play)),
        "columns": draw(st.sampled_from(["", "", "some", "shuffled", "repeated"])),
        "masked": draw(st.booleans()),
        "coef_topk": draw(st.sampled_from([None, None, 1, 2, 3, 8])),
        "threshold": draw(st.sampled_from([None, None, 0.0, -0.5, 0.25, 100.0])),
        "odd": draw(st.sampled_from(["", "", "coefficients", "basis"])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def case_of(**changes: Any) -> dict[str, Any]:
    """One case, described as `cases` does."""
    return {
        "batch": 2, "heads": 2, "queries": 30, "in_play": 31, "rank": 8, "budget": 7, "columns": "",
        "masked": False, "coef_topk": None, "threshold": None, "odd": "", "layout": "contiguous",
        "seed": 0,
    } | changes  # fmt: skip


def build(case: dict[str, Any], dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """Arguments of the public function, whose sums are exact in every dtype; many ties."""
    seed = case["seed"]
    rows = case["batch"], case["heads"], case["queries"], case["rank"]
    in_play = case["in_play"]
    grid = in_play + 4 if case["columns"] else in_play
    coefficients = exact_values(f"coefficients {seed}", rows, -4, 8)
    basis = exact_values(f"basis {seed}", (case["rank"], grid), -2, 6, 0.6)
    if case["odd"] == "basis":  # 0 * inf is NaN: whether what does not count is multiplied is open
        case = case | {"coef_topk": None}
    if case["odd"]:
        odd = {"coefficients": coefficients, "basis": basis}[case["odd"]].view(-1)
        for number, value in enumerate((math.nan, math.inf, -math.inf, -0.0)):
            if number < len(odd):
                odd[(seed + 7 * number) % len(odd)] = value
    columns = keep = None
    if case["columns"] == "repeated":
        drawn = torch.randint(0, grid, (rows[0], in_play), generator=generator(f"columns {seed}"))
        columns = drawn.to(device)
    elif case["columns"]:
        order = "ascending" if case["columns"] == "some" else "shuffled"
        columns = random_index(f"columns {seed}", rows[0], grid, in_play, order, device)
    if case["masked"]:
        flips = torch.rand((rows[0], rows[2]), generator=generator(f"keep {seed}"))
        keep = (flips < 0.6).to(device, dtype)
    return {
        "coefficients": lay_out(coefficients.to(dtype), case["layout"]).to(device),
        "basis": lay_out(basis.to(dtype), case["layout"]).to(device),
        "budget": case["budget"], "columns": columns, "keep": keep,
        "coef_topk": case["coef_topk"], "threshold": case["threshold"],
    }  # fmt: skip


def rows_of(index: Tensor) -> list[set[int]]:
    """The columns that each row names; ascending, and -1 only behind them."""
    assert index.dtype == torch.int32 and index.is_contiguous()
    named = []
    for row in index.flatten(0, 2).tolist():
        real = [j for j in row if j != -1]
        assert row == sorted(set(real)) + [-1] * (len(row) - len(real))
        named.append(set(real))
    return named


def predicted(
    count: int, dtype: torch.dtype, device: Any, batch: int = 2, rank: int = 32, prefix: int = 1
) -> tuple[Tensor, Tensor]:
    """Softmax coefficients and a thresholded basis, as an untrained predictor gives them."""
    logits = random(f"predicted {count}", (batch, 6, count - prefix, rank), torch.float64)
    basis = 0.02 * random(f"basis {count}", (rank, count), torch.float64).abs().clamp(max=2)
    basis = basis.masked_fill(basis <= 0.02, 0)
    return (2 * logits).softmax(-1).to(device, dtype), basis.to(device, dtype)


def exact_approx(
    coefficients: Tensor, basis: Tensor, coef_topk: int | None, columns: Tensor | None = None
) -> Tensor:
    """The sums in float64, of the coefficients that count."""
    coef, basis = coefficients.double(), basis.double()
    if coef_topk is not None:
        least = coef.sort(dim=-1, descending=True, stable=True).indices[..., coef_topk:]
        coef = coef.scatter(-1, least, 0.0)
    return coef @ (basis if columns is None else basis[:, columns].transpose(0, 1)[:, None])


def assert_only_near_the_cut(index: Tensor, approx: Tensor, budget: int, margin: Tensor) -> None:
    """Names every column more than `margin` above the cut and none as far below it."""
    cut = approx.sort(dim=-1, descending=True).values[..., budget - 1 : budget]
    named = torch.zeros_like(approx, dtype=torch.bool).scatter(-1, index.long(), True)
    assert (named.sum(-1) == budget).all()
    missing, extra = ~named & (approx > cut + margin), named & (approx < cut - margin)
    assert not missing.any() and not extra.any(), (int(missing.sum()), int(extra.sum()))
