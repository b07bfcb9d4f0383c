"""Drawn calls of the row ops."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from support.data import random_index
from support.layouts import LAYOUTS, lay_out, lay_out_index
from torch import Tensor


@st.composite
def row_cases(draw: Any) -> dict[str, Any]:
    num_tokens = draw(st.integers(0, 12))
    return {
        "batch": draw(st.integers(0, 4)),
        "num_tokens": num_tokens,
        "num_keep": draw(st.integers(0, num_tokens)),
        "num_prefix": draw(st.sampled_from([0, 1, 2, 5])),
        "num_extra": draw(st.sampled_from([0, 0, 1, 3])),
        "row": draw(st.sampled_from([(), (1,), (3,), (8,), (0,), (2, 3), (33,), (2, 1, 2)])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "second_layout": draw(st.sampled_from(LAYOUTS)),
        "index_layout": draw(st.sampled_from(LAYOUTS)),
        "order": draw(st.sampled_from(["ascending", "shuffled"])),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def rows_of(case: dict[str, Any], what: str, count: int, dtype: torch.dtype, make: Any) -> Tensor:
    shape = (case["batch"], count, *case["row"])
    layout = case["second_layout" if what == "second" else "layout"]
    return lay_out(make(f"{what} {case['seed']}", shape, dtype), layout)


def index_of(case: dict[str, Any]) -> Tensor:
    index = random_index(
        str(case["seed"]), case["batch"], case["num_tokens"], case["num_keep"], case["order"]
    )
    return lay_out_index(index, case["index_layout"])


def moved(device: torch.device, *values: Any) -> list[Any]:
    return [v.to(device) if isinstance(v, Tensor) else v for v in values]
