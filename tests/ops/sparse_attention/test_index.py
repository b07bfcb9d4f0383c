"""A bad entry of the index is named, and nothing is read behind the arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.attention.drawn import SPARSE, case_of
from support.memory import crash_free


@st.composite
def planted(draw: Any) -> dict[str, Any]:
    return {
        "count": draw(st.integers(20, 90)),
        "order": draw(st.sampled_from(["ascending", "shuffled"])),
        "place": [draw(st.integers(0, size - 1)) for size in (2, 3, 19, 17)],
        "bad": draw(st.sampled_from([-2, -(2**31), 2**31 - 1, "N", "repeat", "-1 in front"])),
        "backward": draw(st.booleans()),
        "masked": draw(st.booleans()),
    }


@given(planted())
def test_one_bad_entry_anywhere_is_found_and_named(what: dict[str, Any]) -> None:
    """On the CPU, in the forward and in the backward op."""
    case = case_of(count=what["count"], heads=3, named=17, order=what["order"], dim=4,
                   masked=what["masked"])  # fmt: skip
    values = SPARSE.build(case, torch.float32, "cpu")
    index, (b, h, i, t) = values["index"], what["place"]
    words = f"in [0, {what['count']})"
    if what["bad"] == "repeat":
        other = (t + 5) % 17
        index[b, h, i, t] = index[b, h, i, other]
        t, words = max(t, other), "repeated"
    elif what["bad"] == "-1 in front":
        t = min(t, 15)
        index[b, h, i, t] = -1
        t, words = t + 1, "-1 at the end of a row only"  # names the first key behind it
    else:
        index[b, h, i, t] = what["count"] if what["bad"] == "N" else what["bad"]
    options = [values["keep"], None, 1, True]
    operands = [values[name] for name in "qkv"]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        if what["backward"]:
            grad, lse = torch.ones_like(operands[0]), torch.ones(operands[0].shape[:3])
            torch.ops.spot.sparse_attention_backward(
                grad, None, *operands, index, options[0], grad, torch.empty(0), lse, *options[1:],
                False,
            )  # fmt: skip
        else:
            torch.ops.spot.sparse_attention(*operands, index, *options)
    text = str(caught.value)
    assert words in text and f"index[{b}, {h}, {i}, {t}]" in text, text


_GUARD = """
import torch
import spot_ext
from support.memory import guarded
from support.data import random_keys

draw = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for count, prefix, heads, dim, named in (
        (1, 0, 1, 1, 1), (7, 1, 2, 3, 4), (16, 0, 1, 8, 16), (33, 2, 3, 17, 9), (40, 1, 2, 64, 21),
    ):
        size = 2, count, heads, dim
        q, k, v = (guarded(torch.randn(size, generator=draw).to(dtype)) for _ in "qkv")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        keep = guarded((torch.rand(2, count - prefix, generator=draw) < 0.6).to(dtype))
        for order in ("ascending", "shuffled", "padded"):
            shape = (2, heads, count - prefix)
            index = guarded(random_keys(order, shape, count, named, order))
            for mask in (None, keep.requires_grad_()):
                out, stats = spot_ext.sparse_attention(*leaves, index, mask, num_prefix=prefix,
                                                       need_stats=True)
                sent = guarded(torch.randn(out.shape, generator=draw).to(dtype))
                wanted = leaves if mask is None else [*leaves, mask]
                torch.autograd.grad((out, stats.sum()), wanted, (sent, stats.new_ones(())))
        index = random_keys("bad", (2, heads, count - prefix), count, named)
        for bad in (count, -2, 2**31 - 1, -(2**31)):
            index[1, -1, -1, -1] = bad
            calls = [
                lambda: torch.ops.spot.sparse_attention(q, k, v, guarded(index), None, None, prefix,
                                                        prefix > 0),
                lambda: torch.ops.spot.sparse_attention_backward(
                    q, None, q, k, v, guarded(index), None, q, torch.empty(0),
                    torch.zeros(q.shape[:3], dtype=torch.promote_types(dtype, torch.float32)), None,
                    prefix, prefix > 0),
            ]
            for call in calls:
                try:
                    with torch.no_grad():
                        call()
                    raise SystemExit(f"{bad} was not refused")
                except (ValueError, RuntimeError) as error:
                    assert "index" in str(error), error
"""


def test_nothing_is_read_behind_the_arguments() -> None:
    """They end where memory begins that ends the process when it is touched."""
    crash_free(_GUARD)
