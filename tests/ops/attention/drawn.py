"""Both attention ops for the tests that they share, and drawn calls of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from ops.cases import OPS
from support.attention import assert_as_accurate_as, with_leaves
from support.data import generator, random, random_keys
from support.gradients import cotangents, gradients
from support.layouts import LAYOUTS, lay_out
from torch import Tensor

import spot_ext

ORDERS = ("ascending", "shuffled", "padded", "empty")


@dataclass(frozen=True)
class Attention:
    """An op, its definition, and its arguments that have gradients."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    leaves: tuple[str, ...]

    def build(self, case: dict[str, Any], dtype: torch.dtype, device: Any) -> dict[str, Any]:
        """Arguments of the function; 16-bit values are rounded once, so that all agree."""
        seed, shape = case["seed"], (case["batch"], case["count"], case["heads"], case["dim"])
        q, k, v = (random(f"{x} {seed}", shape, torch.float64) for x in "qkv")
        values: dict[str, Any] = {
            name: lay_out((x * spread).to(dtype), case["layout"]).to(device)
            for name, x, spread in (("q", q, case["spread"]), ("k", k, 1.0), ("v", v, 1.0))
        }
        patches = shape[1] - case["num_prefix"]
        values["keep"] = None
        if case["masked"]:
            flips = torch.rand((shape[0], patches), generator=generator(f"{seed}"))
            values["keep"] = (flips < 0.6).to(device, dtype)
        if self is SPARSE:
            rows = shape[0], shape[2], patches
            index = random_keys(f"{seed}", rows, shape[1], case["named"], case["order"])
            values["index"] = lay_out(index.to(device), case["layout"])
        else:
            values["bias"] = None
            if case["bias"]:
                batch = 1 if case["bias"] == "one" else shape[0]
                size = (batch, shape[2], shape[1], shape[1])
                values["bias"] = random(f"bias {seed}", size, torch.float64).to(device, dtype)
        return values | {name: case[name] for name in ("scale", "num_prefix", "class_token")}

    def __call__(self, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Output and statistics."""
        return self.function(**values, need_stats=True)

    def everything(self, values: dict[str, Any], *names: str) -> list[Tensor]:
        """Output, statistics and the gradients of the arguments `names`, by default of all."""
        call, leaves = with_leaves(values, *(names or self.leaves))
        outputs, grads = gradients(lambda *_: self(call), tuple(leaves))
        return [value.detach() for value in (*outputs, *grads)]

    def assert_as_accurate_as_torch(self, values: dict[str, Any], need_stats: bool = True) -> None:
        assert_as_accurate_as(self.reference, self.function, values, self.leaves, need_stats)


DENSE = Attention(
    "attention_stats", spot_ext.attention_stats, spot_ext.attention_stats_reference,
    ("q", "k", "v", "keep", "bias"),
)  # fmt: skip
SPARSE = Attention(
    "sparse_attention", spot_ext.sparse_attention, spot_ext.sparse_attention_reference,
    ("q", "k", "v", "keep"),
)  # fmt: skip

by_attention = pytest.mark.parametrize("attention", [DENSE, SPARSE], ids=lambda a: a.name)


def by_options(dense: list[dict[str, Any]], sparse: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """For both, each with options of its own that describe cases."""
    pairs = [(DENSE, own) for own in dense] + [(SPARSE, own) for own in sparse]
    names = ["-".join(map(str, (attention.name, *own.values()))) for attention, own in pairs]
    return pytest.mark.parametrize(("attention", "own"), pairs, ids=names)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Of `bias`, or of `named` and `order`, an op takes what it has."""
    num_prefix = draw(st.sampled_from([0, 1, 1, 2, 5]))
    count = num_prefix + draw(st.integers(0, 6))
    return {
        "batch": draw(st.integers(0, 3)),
        "count": count,
        "heads": draw(st.integers(1, 3)),
        "dim": draw(st.sampled_from([1, 2, 3, 8])),
        "named": draw(st.integers(0, count)),
        "order": draw(st.sampled_from(ORDERS)),
        "num_prefix": num_prefix,
        "class_token": num_prefix > 0 and draw(st.booleans()),
        "masked": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, None, "one", "each"])),
        "scale": draw(st.sampled_from([None, None, 0.3, -1.0, 3.0, 0.0])),
        "spread": draw(st.sampled_from([0.0, 1.0, 1.0, 6.0])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def case_of(**changes: Any) -> dict[str, Any]:
    """One case, described as `cases` does, with the class token that the prefix allows."""
    case = {
        "batch": 2, "count": 17, "heads": 2, "dim": 8, "named": 6, "order": "ascending",
        "num_prefix": 1, "masked": False, "bias": None, "scale": None, "spread": 1.0,
        "layout": "contiguous", "seed": 0,
    } | changes  # fmt: skip
    return {"class_token": case["num_prefix"] > 0} | case


def op_values(op: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Legal arguments of an op or of its backward op, in the order of the schema."""
    attention = DENSE if op.startswith(DENSE.name) else SPARSE
    case = case_of(count=23, masked=True, bias="one", scale=0.3)
    values = attention.build(case, dtype, device) | {"need_stats": True}
    if op != attention.name:
        with torch.no_grad():
            out, stats, lse = OPS[attention.name].call(**values)
        grad_out, grad_stats = cotangents((out, stats))
        values |= {"grad_out": grad_out, "grad_stats": grad_stats, "out": out, "stats": stats,
                   "lse": lse, "keep_grad": True, "bias_grad": True}  # fmt: skip
    return {x.name: values[x.name] for x in OPS[op].call.default._schema.arguments}
