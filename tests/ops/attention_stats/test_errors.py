"""Wrong arguments, straight through torch.ops: errors name the op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.attention.drawn import op_values

_WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {  # name, value, message
    "q of rank 3": ("q", lambda a: a["q"][0], "q must have 4 dimensions"),
    "k of rank 5": ("k", lambda a: a["k"][None], "k must have 4 dimensions"),
    "k of another dtype": ("k", lambda a: a["k"].double(), "k must be .*got"),
    "v of other tokens": ("v", lambda a: a["v"][:, 1:], "v must have size 23"),
    "v of another head dim": ("v", lambda a: a["v"][..., 1:], "v must have size 8"),
    "k of other heads": ("k", lambda a: a["k"][:, :, :1], "k must have size 2"),
    "keep of rank 1": ("keep", lambda a: a["keep"][0], "keep must have 2 dimensions"),
    "keep with the prefix": ("keep", lambda a: torch.ones_like(a["q"][:, :, 0, 0]),
                             "keep must have size 22"),
    "keep of one image": ("keep", lambda a: a["keep"][:1], "keep must have size 2"),
    "keep bool": ("keep", lambda a: a["keep"].bool(), "keep must be float32"),
    "bias of rank 3": ("bias", lambda a: a["bias"][0], "bias must have 4 dimensions"),
    "bias of three images": ("bias", lambda a: a["bias"].expand(3, -1, -1, -1),
                             "bias must have size 2"),
    "bias of one head": ("bias", lambda a: a["bias"][:, :1], "bias must have size 2"),
    "bias of other rows": ("bias", lambda a: a["bias"][:, :, 1:], "bias must have size 23"),
    "bias of other columns": ("bias", lambda a: a["bias"][..., 1:], "bias must have size 23"),
    "bias integer": ("bias", lambda a: a["bias"].long(), "bias must be float32"),
    "num_prefix below 0": ("num_prefix", lambda a: -1, "num_prefix must be between 0 and 23"),
    "num_prefix too large": ("num_prefix", lambda a: 24, "num_prefix must be between 0 and 23"),
    "class token without prefix": ("num_prefix", lambda a: 0, "num_prefix of at least 1, got 0"),
}  # fmt: skip

_WRONG_BACKWARD: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "grad_out of rank 3": ("grad_out", lambda a: a["q"][0], "grad_out must have 4 dimensions"),
    "grad_out of another dtype": ("grad_out", lambda a: a["q"].double(), "grad_out must be .*got"),
    "grad_out of other tokens": ("grad_out", lambda a: a["q"][:, 1:], "grad_out must have size 23"),
    "grad_stats of rank 3": ("grad_stats", lambda a: a["stats"][0], "grad_stats must have 4 dim"),
    "grad_stats of another dtype": ("grad_stats", lambda a: a["stats"].double(),
                                    "grad_stats must be .*got"),
    "grad_stats of five": ("grad_stats", lambda a: a["stats"][..., 1:],
                           "grad_stats must have size 6"),
    "grad_stats of other heads": ("grad_stats", lambda a: a["stats"][:, :, 1:],
                                  "grad_stats must have size 2"),
    "out of one image": ("out", lambda a: a["out"][:1], "out must have size 2"),
    "out of another dtype": ("out", lambda a: a["out"].half(), "out must be .*got"),
    "stats empty": ("stats", lambda a: a["stats"].new_empty(0), "stats must have 4 dimensions"),
    "stats of other tokens": ("stats", lambda a: a["stats"][:, 1:], "stats must have size 23"),
    "lse of rank 4": ("lse", lambda a: a["lse"][..., None], "lse must have 3 dimensions"),
    "lse of another dtype": ("lse", lambda a: a["lse"].bfloat16(), "lse must be .*got"),
    "lse of other tokens": ("lse", lambda a: a["lse"][:, 1:], "lse must have size 23"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        *(pytest.param("attention_stats", wrong, id=name) for name, wrong in _WRONG.items()),
        *(
            pytest.param("attention_stats_backward", wrong, id=f"backward, {name}")
            for name, wrong in (_WRONG | _WRONG_BACKWARD).items()
        ),
    ],
)
def test_errors_name_the_op(op: str, wrong: Any, device: torch.device) -> None:
    name, make, message = wrong
    values = op_values(op, torch.float32, device)
    getattr(torch.ops.spot, op)(*values.values())  # as they are, they are legal
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"spot::{op}: .*{message}"):
        getattr(torch.ops.spot, op)(*(values | {name: make(values)}).values())


@pytest.mark.parametrize("dim", [0, 257])
@pytest.mark.parametrize("op", ["attention_stats", "attention_stats_backward"])
def test_errors_name_the_largest_head_dim(op: str, dim: int, device: torch.device) -> None:
    values = op_values(op, torch.float32, device)
    for name in {"q", "k", "v", "out", "grad_out"} & set(values):
        values[name] = torch.zeros(2, 23, 2, dim, device=device)
    message = f"spot::{op}: .*head dim of q must be between 1 and 256, got {dim}"
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(torch.ops.spot, op)(*values.values())


@pytest.mark.parametrize("op", ["attention_stats", "attention_stats_backward"])
@pytest.mark.parametrize("odd", [0.5, 2.0, -1.0, 1.0 - 2**-24, math.nan, math.inf])
def test_ops_refuse_a_mask_that_is_not_binary(odd: float, op: str) -> None:
    """On the CPU; one entry is enough, here the last."""
    values = op_values(op, torch.float32, torch.device("cpu"))
    values["keep"][-1, -1] = odd
    with pytest.raises((RuntimeError, ValueError), match=f"spot::{op}: keep must be .*0 or 1"):
        getattr(torch.ops.spot, op)(*values.values())
