"""What sparse_attention does not see: rows without keys, tokens without a name."""

from __future__ import annotations

import math

import pytest
import torch
from ops.attention.drawn import SPARSE, case_of
from support.attention import with_leaves
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, random
from support.gradients import cotangents

from spot_ext import sparse_attention, sparse_attention_reference


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_rows_that_see_nothing_are_zero_and_send_no_gradient(
    num_prefix: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows without a key, and with `keep` rows that name dropped tokens only."""
    values = SPARSE.build(
        case_of(count=40, named=8, num_prefix=num_prefix, masked=masked), dtype, device
    )
    blind = torch.zeros(2, 40, 2, dtype=torch.bool, device=device)
    values["index"][:, :, ::5] = -1
    blind[:, num_prefix::5] = True
    if masked:
        values["keep"][:, :10] = 0  # tokens num_prefix, ..., num_prefix + 9
        values["index"][:, 1, 31] = torch.arange(8, device=device).int() + num_prefix
        blind[:, num_prefix + 31, 1] = True
    results = []
    for hide in (False, True):
        call, leaves = with_leaves(values, "q", "k", "v")
        out, stats = sparse_attention(**call, need_stats=True)
        sent, sent_stats = cotangents((out.detach(), stats.detach()))
        assert not out[blind].any() and not stats[..., 1:4][blind].any()
        assert out[~blind].any(-1).all() and out.isfinite().all() and stats.isfinite().all()
        if hide:
            sent = sent.masked_fill(blind[..., None], 0)
        results.append(torch.autograd.grad((out, stats), leaves, (sent, sent_stats)))
    for grad in results[0]:
        assert grad.isfinite().all() and grad.any()
    assert not results[0][0][blind].any(), "gradients of q"
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 8 * torch.finfo(dtype).eps)


def test_nothing_seen_at_all(device: torch.device) -> None:
    """Without a prefix and without keys everything is zero."""
    for dtype in FLOATING:
        for named, order in ((0, "ascending"), (5, "empty")):
            case = case_of(num_prefix=0, named=named, order=order, masked=True)
            values = SPARSE.build(case, dtype, device)
            outcome = SPARSE.everything(values)
            assert len(outcome) == 6 and all(not value.any() for value in outcome)
            operands = [values[name] for name in ("q", "k", "v", "index")]
            lse = torch.ops.spot.sparse_attention(*operands, None, None, 0, False)[2]
            assert (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [math.nan, math.inf, 7.5])
def test_tokens_that_nobody_names_have_no_say(
    odd: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Even NaN there: their keys and values are not looked at, and get no gradient."""
    values = SPARSE.build(case_of(count=40, named=8, num_prefix=0), dtype, device)
    unnamed = torch.tensor([3, 17, 39], device=device)
    hit = torch.isin(values["index"], unnamed.int())
    values["index"] = values["index"].masked_fill(hit, 40).sort(-1).values
    values["index"] = values["index"].masked_fill(values["index"] == 40, -1)
    results = []
    for change in (False, True):
        changed = dict(values)
        if change:
            for name in "kv":
                changed[name] = values[name].index_fill(1, unnamed, odd)
        results.append(SPARSE.everything(changed, "q", "k", "v"))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
    assert not results[0][3][:, unnamed].any() and not results[0][4][:, unnamed].any()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_row_without_a_softmax_is_nan(
    odd: float, dtype: torch.dtype, device: torch.device
) -> None:
    """A logit of +inf or NaN spoils its row, and the columns that the row names."""
    values = SPARSE.build(case_of(batch=1, count=20, named=6), dtype, device)
    index = values["index"].clone()
    index[..., 0] = 0  # the class token is among them
    index[..., 1:] = 1 + torch.arange(5, device=device)
    index[0, 1, 7] = torch.tensor([0, 3, 8, 9, 12, 19], device=device)
    index[0, 1, 9] = torch.tensor([4, 5, 12, 13, 14, 15], device=device)  # row 10: not the class
    values["q"], values["k"] = values["q"].clone(), values["k"].clone()
    values["q"][0, [8, 10], 1, 0], values["k"][0, 12, 1, 0] = 1, odd
    values["q"][0, 0, 1, 0], values["index"] = 1, index
    out, stats = sparse_attention(**values, need_stats=True)
    assert out[0, [0, 8, 10], 1].isnan().all() and out.isnan().sum() == 3 * out.shape[3]
    expected = torch.zeros_like(stats, dtype=torch.bool)
    expected[0, 1:, 1, 0] = True
    expected[0, 8, 1, 1:4] = expected[0, 10, 1, 2:4] = True
    expected[0, [3, 8, 9, 12, 19, 4, 5, 13, 14, 15], 1, 4:] = True
    assert torch.equal(stats.isnan(), expected)
    more = sparse_attention_reference(**values, need_stats=True)
    for mine, theirs in zip((out, stats), more, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_statistics_of_a_row_without_a_softmax_that_names_no_patch(device: torch.device) -> None:
    q, k, v = (random(name, (1, 4, 1, 8), torch.float32).to(device) for name in "qkv")
    q[0, 2] = math.nan
    index = torch.tensor([[[[0, 1, 2], [0, -1, -1], [2, 3, -1]]]], dtype=torch.int32, device=device)
    for attention in (sparse_attention, sparse_attention_reference):
        stats = attention(q, k, v, index, need_stats=True)[1]
        nan = stats[0, :, 0].isnan()
        assert nan[2].tolist() == [False, True, True, True, False, False], attention.__name__
        assert nan[[0, 1, 3]].sum() == 0, attention.__name__
