"""sparse_attention against its definition, written once more as loops, and against its like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import OPS
from ops.cases.sparse_attention import sparse_reference
from support.arguments import to_dtype
from support.attention import HEAD_DIMS, NAMES, assert_as_accurate_as, stats_by_hand, with_leaves
from support.comparison import assert_accurate, assert_close, assert_gradient, assert_same_bits
from support.data import FLOATING, generator, random, random_index, random_keys
from support.gradients import cotangents, gradients
from support.layouts import LAYOUTS, lay_out
from support.memory import MEASURE_MEMORY, crash_free
from support.switches import emulated, threads
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.utils.flop_counter import FlopCounterMode

from spot_ext import (
    attention_stats,
    compact_tokens,
    connectivity,
    sparse_attention,
    sparse_attention_reference,
)
from spot_ext.sparse_attention import named_keys

ORDERS = ("ascending", "shuffled", "padded", "empty")

# ---- the definition as loops ---------------------------------------------------------------------


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    keep: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    cotangent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`out`, `stats` and the gradient of `keep` for the gradient of `out`, key by key."""
    batch, count, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    out, stats = torch.zeros_like(v), v.new_zeros(batch, count, heads, 6)
    keep_grad = None if keep is None or cotangent is None else torch.zeros_like(keep)
    for b in range(batch):
        kept = [True] * num_prefix
        kept += (
            [True] * (count - num_prefix) if keep is None else [x == 1 for x in keep[b].tolist()]
        )
        for h in range(heads):
            p = [[0.0] * count for _ in range(count)]
            for i in range(count):
                named = list(range(count))
                if i >= num_prefix:
                    named = [j for j in index[b, h, i - num_prefix].tolist() if j != -1]
                logit = {j: float(q[b, i, h] @ k[b, j, h]) * scale for j in named}
                seen = [j for j in named if kept[j] or j == i]
                lse = -math.inf
                if seen:
                    top = max(logit[j] for j in seen)
                    lse = top + math.log(sum(math.exp(logit[j] - top) for j in seen))
                for j in seen:
                    p[i][j] = math.exp(logit[j] - lse)
                    out[b, i, h] += p[i][j] * v[b, j, h]
                if keep_grad is None:
                    continue
                for j in named:
                    if j == i or j < num_prefix:  # a token's own row does not depend on its mask
                        continue
                    weight = p[i][j]
                    if not kept[j]:
                        weight = 1 / (1 + math.exp(min(lse - logit[j], 700.0)))
                    pull = float(cotangent[b, i, h] @ (v[b, j, h] - out[b, i, h]))
                    keep_grad[b, j - num_prefix] += weight * pull
            alive = [t for t in range(num_prefix, count) if kept[t]]
            stats[b, alive, h] = stats_by_hand(p, alive, class_token).to(q.dtype)
    return out, stats, keep_grad


@st.composite
def cases(draw: Any) -> dict[str, Any]:
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
        "scale": draw(st.sampled_from([None, None, 0.3, -1.0, 3.0, 0.0])),
        "spread": draw(st.sampled_from([1.0, 1.0, 6.0])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def case_of(**changes: Any) -> dict[str, Any]:
    """One case, described as `cases` does, with the class token that the prefix allows."""
    case = {
        "batch": 2, "count": 17, "heads": 2, "dim": 8, "named": 6, "order": "ascending",
        "num_prefix": 1, "masked": False, "scale": None, "spread": 1.0, "layout": "contiguous",
        "seed": 0,
    } | changes  # fmt: skip
    return {"class_token": case["num_prefix"] > 0} | case


def build(case: dict[str, Any], dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """Arguments of the public function; 16-bit values are rounded once, so that all agree."""
    seed, shape = case["seed"], (case["batch"], case["count"], case["heads"], case["dim"])
    q, k, v = (random(f"{x} {seed}", shape, torch.float64) for x in "qkv")
    values: dict[str, Any] = {
        name: lay_out((x * spread).to(dtype), case["layout"]).to(device)
        for name, x, spread in (("q", q, case["spread"]), ("k", k, 1.0), ("v", v, 1.0))
    }
    patches = shape[1] - case["num_prefix"]
    rows = shape[0], shape[2], patches
    index = random_keys(f"{seed}", rows, shape[1], case["named"], case["order"])
    values["index"] = lay_out(index.to(device), case["layout"])
    values["keep"] = None
    if case["masked"]:
        flips = torch.rand((shape[0], patches), generator=generator(f"{seed}"))
        values["keep"] = (flips < 0.6).to(device, dtype)
    return values | {name: case[name] for name in ("scale", "num_prefix", "class_token")}


def _everything(values: dict[str, Any], *names: str) -> list[Tensor]:
    """Output, statistics and the gradients of the arguments `names`, by default of all four."""
    call, leaves = with_leaves(values, *(names or ("q", "k", "v", "keep")))
    outputs, grads = gradients(lambda *_: sparse_attention(**call, need_stats=True), tuple(leaves))
    return [value.detach() for value in (*outputs, *grads)]


@given(cases())
def test_values_and_mask_gradient_by_hand(device: torch.device, case: dict[str, Any]) -> None:
    values = build(case, torch.float64, "cpu")
    cotangent = random(f"cotangent {case['seed']}", values["q"].shape, torch.float64)
    out, stats, keep_grad = by_hand(**values, cotangent=cotangent)
    moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
    for function in (sparse_attention_reference, sparse_attention):
        arguments, leaves = with_leaves(moved, "keep")
        actual = function(**arguments, need_stats=True)
        assert_close([value.cpu() for value in actual], (out, stats), 1e-11, function.__name__)
        if leaves and actual[0].requires_grad:
            (grad,) = torch.autograd.grad(actual[0], leaves, cotangent.to(device))
            assert_close(grad.cpu(), keep_grad, 1e-11, f"{function.__name__} keep gradient")


def assert_as_accurate_as_torch(values: dict[str, Any], need_stats: bool = True) -> None:
    names = ("q", "k", "v", "keep")
    assert_as_accurate_as(sparse_attention_reference, sparse_attention, values, names, need_stats)


@given(cases(), st.sampled_from(FLOATING), st.booleans())
def test_values_and_gradients_are_as_accurate_as_torch(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype, need_stats: bool
) -> None:
    if case["layout"] == "flat":  # equal keys leave rounding noise where the gradient of q is zero
        case = case | {"layout": "padded"}
    assert_as_accurate_as_torch(build(case, dtype, device), need_stats)


# ---- every size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    for turn, count in enumerate((1, 2, 5, 16, 17, 50)):
        case = case_of(
            count=count, dim=dim, named=max(count * 2 // 3, 1), masked=(turn + dim) % 2 == 0,
            batch=1 + turn % 2, order=ORDERS[turn % 3], seed=turn,
        )  # fmt: skip
        assert_as_accurate_as_torch(build(case, dtype, device))


@pytest.mark.parametrize("order", ["ascending", "padded"])
@pytest.mark.parametrize("first", range(0, 70, 10))
def test_every_number_of_keys(first: int, order: str, device: torch.device) -> None:
    for named in range(first, first + 10):
        case = case_of(
            count=80, named=named, masked=named % 3 == 0, order=order, dim=12, seed=named
        )
        assert_as_accurate_as_torch(build(case, torch.float32, device), named % 2 == 0)


@pytest.mark.parametrize("first", range(1, 71, 10))
def test_every_number_of_tokens(first: int, device: torch.device) -> None:
    for count in range(first, first + 10):
        case = case_of(count=count, named=-(-count // 4), num_prefix=min(count, count % 3), dim=12,
                       masked=count % 2 == 0, batch=1 + count % 2)  # fmt: skip
        assert_as_accurate_as_torch(build(case, torch.float32, device))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("named", [1, 100, 300])
def test_few_heads_with_many_queries(named: int, dtype: torch.dtype, device: torch.device) -> None:
    """More rows and entries than a kernel takes at once."""
    case = case_of(batch=1, count=600, heads=1, dim=20, named=named, num_prefix=2, masked=True)
    assert_as_accurate_as_torch(build(case, dtype, device))


# ---- what it must agree with ---------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, index: Tensor, **options: Any) -> Tensor:
    """Torch's attention with the boolean map of `index` as its mask."""
    allowed = named_keys(index, q.shape[1])
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(*heads_first, attn_mask=allowed, **options).transpose(1, 2)


def predicted(count: int, share: float, device: Any, batch: int = 2, heads: int = 3) -> Tensor:
    """An index as connectivity gives it: the best of a random low-rank map."""
    coefficients = random(f"c {count}", (batch, heads, count - 1, 16), torch.float32, device)
    basis = random(f"b {count}", (16, count), torch.float32, device).abs()
    return connectivity(coefficients.softmax(-1), basis, math.ceil(share * count), coef_topk=8)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("count", "share"), [(50, 0.25), (197, 0.25), (197, 0.9), (65, 0.05)])
def test_it_is_masked_scaled_dot_product_attention(
    count: int, share: float, scale: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Output and gradients, as views of a fused projection, by the error rule."""
    index = predicted(count, share, device)
    packed = random(f"qkv {count}", (2, count, 3, 3, 64), dtype, device)

    def run(function: Any, packed: Tensor) -> tuple[Tensor, Tensor]:
        leaf = packed.detach().requires_grad_()
        out = function(*leaf.unbind(2), index, scale=scale)
        out = out[0] if isinstance(out, tuple) else out
        (grad,) = torch.autograd.grad(out, leaf, cotangents((out.detach(),)))
        return out.detach(), grad

    actual, grad = run(sparse_attention, packed)
    plain, plain_grad = run(sdpa, packed)
    exact, exact_grad = run(sdpa, packed.double())
    if dtype == torch.float64:
        plain, plain_grad = exact, exact_grad
    assert_accurate(actual, plain, exact, what="out")
    for place, name in enumerate("qkv"):
        parts = (x[:, :, place].contiguous() for x in (grad, plain_grad, exact_grad))
        assert_gradient(*parts, what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
@pytest.mark.parametrize(("count", "num_prefix"), [(41, 1), (70, 0), (33, 5)])
def test_naming_all_keys_is_dense_attention(
    count: int, num_prefix: int, order: str, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """attention_stats with the same arguments: output, statistics and every gradient."""
    case = case_of(count=count, named=count, num_prefix=num_prefix, masked=masked, order=order,
                   dim=20, class_token=num_prefix > 0)  # fmt: skip
    results = []
    for function in (sparse_attention, attention_stats):
        for kind in (dtype, torch.float64):
            values, leaves = with_leaves(
                to_dtype(build(case, dtype, device), kind), "q", "k", "v", "keep"
            )
            if function is attention_stats:
                values.pop("index")
            outputs, grads = gradients(lambda *_, f=function, a=values: f(**a, need_stats=True),
                                       tuple(leaves))  # fmt: skip
            results.append([*outputs, *grads])
    actual, _, plain, exact = results
    names = ["out", "stats", "q", "k", "v", "keep"]
    for name, mine, theirs, truth in zip(names, actual, plain, exact, strict=False):
        if name == "stats":
            assert_close(mine, theirs, 1e-11 if dtype == torch.float64 else 1e-5)
        elif name == "out":
            assert_accurate(mine, theirs, truth, what=name)
        else:
            assert_gradient(mine, theirs, truth, name, scale=1.0)
    assert_close(results[1], exact, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_the_order_of_keys_changes_nothing_beyond_rounding(
    masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    values = build(case_of(count=70, named=23, masked=masked, dim=20), dtype, device)
    results = []
    for turn in range(3):
        index = values["index"]
        if turn:
            order = torch.rand(index.shape, generator=generator(f"{turn}")).argsort(-1)
            index = index.gather(-1, order.to(device))
        results.append(_everything(values | {"index": index}))
    for other in results[1:]:
        assert_close(other, results[0], 1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_changes_nothing(masked: bool, device: torch.device) -> None:
    """-1 behind a row is the same as a shorter row."""
    for dtype in FLOATING:
        values = build(case_of(count=30, named=7, masked=masked), dtype, device)
        padded = torch.nn.functional.pad(values["index"], (0, 11), value=-1)
        results = []
        for index in (values["index"], padded):
            results.append(_everything(values | {"index": index}))
        assert_close(results[1], results[0], 8 * torch.finfo(dtype).eps)


def test_keys_of_no_weight_may_as_well_be_missing(device: torch.device) -> None:
    """Sets that differ only by keys whose probability is 0 give the same result and gradients."""
    values = build(case_of(count=60, named=30, num_prefix=0, dim=16), torch.float32, device)
    # Tokens from 40 on point away from every query: their logits are lower by 1000.
    values["q"][..., 0], values["k"][..., 0] = 1.0, 0.0
    values["k"][:, 40:, :, 0] = -4000.0
    values["index"][..., 0] = 0  # so that some key has weight
    values["index"][..., 1:] = values["index"][..., 1:].clamp(min=1)
    index = values["index"].clone()
    for row in index.flatten(0, 2):
        distinct = sorted(set(row.tolist()))
        row[: len(distinct)] = torch.tensor(distinct, dtype=torch.int32, device=device)
        row[len(distinct) :] = -1
    fewer = index.masked_fill(index >= 40, -1)  # ascending: they are the last
    assert ((index >= 0).sum(-1) > (fewer >= 0).sum(-1)).double().mean() > 0.9
    results = []
    for named in (index, fewer):
        results.append(_everything(values | {"index": named}, "q", "k", "v"))
    assert_close(results[0], results[1], 1e-6)
    assert not results[0][4][:, 40:].any(), "values of no weight get no gradient"


@given(cases())
def test_masked_equals_compacted(device: torch.device, case: dict[str, Any]) -> None:
    """The claim that masked training rests on: same result as with the dropped tokens gone."""
    values = build(case | {"masked": True}, torch.float64, device)
    prefix, keep = case["num_prefix"], values["keep"]
    out, stats = sparse_attention(**values, need_stats=True)
    for image in range(case["batch"]):
        kept = keep[image].nonzero().T.contiguous()
        rows = torch.cat([torch.arange(prefix, device=device), kept[0] + prefix])
        part = {name: compact_tokens(values[name][image : image + 1].contiguous(), kept, prefix)
                for name in "qkv"}  # fmt: skip
        place = {old: new for new, old in enumerate(rows.tolist())}
        lists = values["index"][image][:, kept[0]].flatten(0, 1).tolist()
        lists = [[place[j] for j in row if j in place] for row in lists]
        wide = max(map(len, lists), default=0)
        lists = [row + [-1] * (wide - len(row)) for row in lists]
        index = torch.tensor(lists, dtype=torch.int32, device=device)
        index = index.view(1, case["heads"], kept.shape[1], wide)
        rest = {name: values[name] for name in ("scale", "num_prefix", "class_token")}
        fewer_out, fewer_stats = sparse_attention(**part, index=index, **rest, need_stats=True)
        assert_close(out[image, rows], fewer_out[0], 1e-10, "out")
        assert_close(stats[image, rows], fewer_stats[0], 1e-10, "stats")


# ---- what is not seen ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_rows_that_see_nothing_are_zero_and_send_no_gradient(
    num_prefix: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows without a key, and with `keep` rows that name dropped tokens only."""
    values = build(case_of(count=40, named=8, num_prefix=num_prefix, masked=masked), dtype, device)
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
            values = build(case, dtype, device)
            outcome = _everything(values)
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
    values = build(case_of(count=40, named=8, num_prefix=0), dtype, device)
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
        results.append(_everything(changed, "q", "k", "v"))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
    assert not results[0][3][:, unnamed].any() and not results[0][4][:, unnamed].any()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_row_without_a_softmax_is_nan(
    odd: float, dtype: torch.dtype, device: torch.device
) -> None:
    """A logit of +inf or NaN spoils its row, and the columns that the row names."""
    values = build(case_of(batch=1, count=20, named=6), dtype, device)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dropped_token_is_seen_by_no_other(dtype: torch.dtype, device: torch.device) -> None:
    values = build(case_of(count=35, named=12), dtype, device)
    values["index"][:, :, 20, 0] = 21  # its own row names it
    values["index"][:, :, 20, 1:] = torch.arange(11, device=device).int()
    values["keep"] = torch.ones(2, 34, device=device, dtype=dtype)
    values["keep"][:, [3, 20, 33]] = 0
    out, stats = sparse_attention(**values, need_stats=True)
    others = [i for i in range(35) if i != 21]
    for name in "kv":
        for odd in (7.5, math.nan):
            changed = values[name].clone()
            changed[:, 21] = odd
            again, again_stats = sparse_attention(**(values | {name: changed}), need_stats=True)
            assert_same_bits(again[:, others], out[:, others])
            assert_same_bits(again_stats[:, others], stats[:, others])
            assert (again[:, 21] != out[:, 21]).any()  # its own row sees it


def test_a_nan_stays_in_its_image_and_head(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = case_of(batch=3, heads=3, count=41, named=10, masked=True, dim=16)
        clean = build(case, dtype, device)
        for name in "qkv":
            results = []
            for change in (False, True):
                changed = clean[name].clone()
                if change:
                    changed[1, 20, 1, 2] = math.nan
                results.append(_everything(clean | {name: changed}))
            hit = torch.zeros(3, 3, dtype=torch.bool, device=device)
            hit[1, 1] = True
            for one, other in zip(results[1][:5], results[0][:5], strict=True):  # [B, N, H, ...]
                assert_same_bits(one.transpose(1, 2)[~hit], other.transpose(1, 2)[~hit])
            assert_same_bits(results[1][5][[0, 2]], results[0][5][[0, 2]])
            assert results[1][0][1, :, 1].isnan().any()


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_rows_and_columns_sum_to_what_the_class_token_leaves(
    masked: bool, device: torch.device
) -> None:
    """n row_mean + cls_in = 1 where anything is seen, and sum_t n col_mean = sum_t n row_mean."""
    values = build(case_of(count=40, named=9, masked=masked, order="padded"), torch.float64, device)
    out, stats = sparse_attention(**values, need_stats=True)
    stats, seen = stats[:, 1:], out[:, 1:].any(-1)
    alive = torch.ones(2, 39, 1, device=device).double()
    if masked:
        alive = values["keep"][..., None]
    n = alive.sum(1, keepdim=True)
    assert_close(n * stats[..., 2] + stats[..., 1], seen * alive, 1e-12)
    assert_close(stats[..., 4].sum(1), stats[..., 2].sum(1), 1e-12)
    assert not stats[(alive == 0)[..., 0]].any()
    assert (~seen).any()


@pytest.mark.parametrize("named", [4, 13, 36])
def test_uniform_attention_has_the_statistics_of_counts(named: int, device: torch.device) -> None:
    """With K of n keys each: rows have mean 1/n and variance (1/K - 1/n)/n."""
    case = case_of(count=36, named=named, num_prefix=0, scale=0.0, heads=3)
    values = build(case, torch.float64, device)
    _, stats = sparse_attention(**values, need_stats=True)
    count = torch.zeros(2, 3, 36, dtype=torch.float64, device=device)
    places = values["index"].flatten(2).long()
    count.scatter_add_(2, places, torch.ones_like(places, dtype=torch.float64))
    share = count.transpose(1, 2) / 36
    expected = torch.stack([
        0 * share, 0 * share, 0 * share + 1 / 36, 0 * share + (1 / named - 1 / 36) / 36,
        share / named, share * (1 - share) / named**2,
    ], dim=-1)  # fmt: skip
    assert_close(stats, expected, 1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variance", [1e-9, 1e-12])
@pytest.mark.parametrize(("count", "named"), [(197, 50), (577, 145)])
def test_tiny_variances_of_columns_are_right(
    count: int, named: int, variance: float, masked: bool, device: torch.device
) -> None:
    """Columns that all rows name, with nearly equal weight 1/K: E[p^2] - mean^2 has no digits."""
    case = case_of(count=count, named=named, dim=64, heads=2, num_prefix=1, masked=masked)
    values = build(case, torch.float64, device)
    # All rows name tokens 1 to 16 and others behind them; all of those are kept, like the rest.
    for row in values["index"].flatten(0, 2):
        rest = 17 + torch.randperm(count - 17, generator=generator("rest"))[: named - 16]
        row[:] = torch.cat([torch.arange(1, 17), rest.sort().values]).int()
    if masked:  # drops tokens that nobody names: every row keeps its K keys
        values["keep"][:] = 1
        free = torch.ones(count, dtype=torch.bool, device=device)
        free[values["index"].flatten().long()] = False
        values["keep"][:, free[1:]] = 0
        assert not values["keep"].all()
    values["q"] = values["q"] * variance**0.5 * named
    values = to_dtype(values, torch.float32)
    exact = sparse_attention_reference(**to_dtype(values, torch.float64), need_stats=True)[1]
    actual = sparse_attention(**values, need_stats=True)[1]
    truth = exact[:, 1:17, :, 5]
    assert 0.3 * variance < truth.median() < 3 * variance
    error = (actual[:, 1:17, :, 5].double() / truth - 1).square().mean().sqrt().item()
    assert error < (1e-4 if variance > 1e-10 else 2e-3), f"relative error {error:.1e}"


@pytest.mark.parametrize("variance", [1e-9, 1e-12])
def test_tiny_variances_of_rows_are_right(variance: float, device: torch.device) -> None:
    """All patch tokens named, the class token not: every row is nearly uniform over them."""
    values = build(case_of(count=197, named=196, dim=64), torch.float64, device)
    values["index"][:] = torch.arange(1, 197, device=device).int()
    values["q"] = values["q"] * variance**0.5 * 196
    values = to_dtype(values, torch.float32)
    exact = sparse_attention_reference(**to_dtype(values, torch.float64), need_stats=True)[1][:, 1:]
    actual = sparse_attention(**values, need_stats=True)[1][:, 1:]
    for column in (3, 5):
        truth = exact[..., column]
        assert 0.5 * variance < truth.median() < 2 * variance
        error = (actual[..., column].double() / truth - 1).square().mean().sqrt().item()
        assert error < (1e-4 if variance > 1e-10 else 2e-3), f"{NAMES[column]}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("column", range(6), ids=NAMES)
def test_the_gradient_of_each_statistic_alone(
    column: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Together, those of the means hide those of the variances, which are smaller by 1/n."""
    values = build(case_of(count=71, named=20, masked=masked, num_prefix=2), dtype, device)
    weight = random("weight", (2, 71, 2), torch.float64, device)
    results = []
    for function, arguments in (
        (sparse_attention, values),
        (sparse_attention_reference, to_dtype(values, torch.float64)),
    ):
        call, leaves = with_leaves(arguments, "q", "k")
        stats = function(**call, need_stats=True)[1][..., column]
        results.append(torch.autograd.grad((stats * weight.to(stats.dtype)).sum(), leaves))
    for name, actual, exact in zip("qk", *results, strict=True):
        error = ((actual.double() - exact).norm() / exact.norm()).item()
        limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
        assert exact.any() and error < limit, f"{name}: relative error {error:.1e}"


def test_without_statistics_out_and_gradients_are_the_same(device: torch.device) -> None:
    results = []
    for need in (True, False):
        values = build(case_of(masked=True), torch.float64, device)
        call, leaves = with_leaves(values, "q", "k", "v", "keep")
        out, stats = sparse_attention(**call, need_stats=need)
        assert (stats.numel() > 0) == need and stats.dtype == torch.float64
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    assert_close(results[0], results[1], 1e-13)


def test_defaults(device: torch.device) -> None:
    values = build(case_of(), torch.float64, device)
    args = [values[name] for name in ("q", "k", "v", "index")]
    default = sparse_attention(*args)
    explicit = sparse_attention(*args, None, scale=8**-0.5, num_prefix=1, class_token=True,
                                need_stats=False)  # fmt: skip
    for one, other in zip(default, explicit, strict=True):
        assert_same_bits(one, other)
    assert default[1].numel() == 0
    stats = sparse_attention(*args, need_stats=True)[1]
    none = sparse_attention(*args, class_token=False, need_stats=True)[1]
    assert stats[:, 1:, :, :2].any() and not none[..., :2].any()
    assert_same_bits(none[..., 2:], stats[..., 2:])


# ---- gradients -----------------------------------------------------------------------------------

_EDGES = [
    *(case_of(count=9, named=named, dim=3, batch=1, heads=1, order=order, masked=masked)
      for named, order, masked in ((1, "ascending", False), (4, "shuffled", True),
                                   (9, "ascending", True), (5, "padded", True),
                                   (0, "padded", False))),
    case_of(count=12, named=5, dim=5, num_prefix=0, batch=1, order="padded", masked=True),
    case_of(count=12, named=7, dim=2, num_prefix=3, class_token=False, masked=True),
    case_of(count=17, named=4, dim=9, batch=1, scale=-0.7),
    case_of(count=33, named=17, dim=4, heads=1, batch=1, masked=True, num_prefix=2),
    case_of(count=20, named=16, dim=17, heads=1, masked=True, order="shuffled"),
    case_of(count=1, named=1, dim=3), case_of(count=3, named=2, num_prefix=3),
]  # fmt: skip


@pytest.mark.parametrize("need_stats", [True, False])
@pytest.mark.parametrize("case", _EDGES, ids=lambda c: f"{c['count']}-{c['named']}-{c['dim']}")
def test_gradcheck(case: dict[str, Any], need_stats: bool, device: torch.device) -> None:
    values = build(case, torch.float64, device)
    patches = max(case["count"] - case["num_prefix"], 1)
    # Scaled as features are, so that no tolerance swallows the gradients of the variances.
    sizes = torch.tensor(
        [patches, patches, patches, patches**2, patches, patches**2], device=device
    )

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        filled = values | dict(zip("qkv", leaves, strict=True))
        out, stats = sparse_attention(**filled, need_stats=need_stats)
        return (out, stats * sizes) if need_stats else (out,)

    leaves = [values[name].clone().requires_grad_() for name in "qkv"]
    whole = sum(leaf.numel() for leaf in leaves) < 400
    assert gradcheck(function, leaves, check_undefined_grad=False, fast_mode=not whole)


def _mask_gradient(values: dict[str, Any], cotangent: Tensor) -> Tensor:
    """sum over named i, j with i != j and heads of p'_ij cotangent_i (v_j - out_i)."""
    q, k, v, grad = (x.double().transpose(1, 2) for x in (*(values[n] for n in "qkv"), cotangent))
    prefix, count = values["num_prefix"], q.shape[2]
    scale = q.shape[3] ** -0.5 if values["scale"] is None else values["scale"]
    logits = scale * (q @ k.mT)
    dropped = torch.nn.functional.pad(values["keep"].double(), (prefix, 0), value=1.0) == 0
    others = ~torch.eye(count, dtype=torch.bool, device=q.device)
    named = named_keys(values["index"], count)
    seen = named & ~(dropped[:, None, None] & others)
    lse = logits.masked_fill(~seen, -math.inf).logsumexp(-1, keepdim=True)
    p = torch.where(seen, torch.exp(logits - lse), 0.0)
    soft = torch.where(seen, p, 1 / (1 + torch.exp(lse - logits))) * (named & others)
    pull = grad @ v.mT - (grad * (p @ v)).sum(-1, keepdim=True)  # [B, H, N, N]
    return (soft * pull).sum((1, 2))[:, prefix:]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("order", ["ascending", "padded"])
@pytest.mark.parametrize(("num_prefix", "count"), [(0, 64), (1, 70), (2, 131)])
def test_the_mask_gradient_is_the_stated_one(
    num_prefix: int, count: int, order: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = case_of(count=count, named=count // 3, num_prefix=num_prefix, masked=True, order=order,
                   heads=3, dim=20, scale=0.5)  # fmt: skip
    values = build(case, dtype, device)
    cotangent = random("cotangent", (2, count, 3, 20), dtype, device)
    truth = _mask_gradient(values, cotangent)
    call, (keep,) = with_leaves(values, "keep")
    (grad,) = torch.autograd.grad(sparse_attention(**call)[0], keep, cotangent)
    assert grad.dtype == dtype
    error = (grad.double() - truth).abs().max().item() / truth.abs().max().item()
    limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3}.get(dtype, 1.5e-2)
    assert error < limit, f"relative error {error:.1e}"
    kept = values["keep"] == 1
    assert truth[kept].abs().mean() > 1e-2 and truth[~kept].abs().mean() > 1e-2


def test_the_mask_gradient_is_bounded(device: torch.device) -> None:
    """Where the exact derivative of a dropped key is beyond any float."""
    values = build(case_of(count=20, named=8, masked=True), torch.float32, device)
    for spread in (1.0, 1e2, 1e4):
        changed = values | {name: values[name] * spread for name in "qk"}
        call, (keep,) = with_leaves(changed, "keep")
        (grad,) = torch.autograd.grad(sparse_attention(**call)[0].sum(), keep)
        bound = 20 * 2 * 8 * 2 * values["v"].abs().max().item()  # rows, heads, channels, |v - out|
        assert grad.isfinite().all() and grad.any() and grad.abs().max().item() <= bound


def test_statistics_treat_the_mask_as_a_constant(device: torch.device) -> None:
    call, leaves = with_leaves(build(case_of(masked=True), torch.float64, device), "q", "keep")
    stats = sparse_attention(**call, need_stats=True)[1]
    q_grad, keep_grad = torch.autograd.grad(stats.sum(), leaves, allow_unused=True)
    assert q_grad.any() and (keep_grad is None or not keep_grad.any())


def test_the_mask_gradient_leaves_the_others_alone(device: torch.device) -> None:
    results = []
    for names in (("q", "k", "v"), ("q", "k", "v", "keep")):
        call, leaves = with_leaves(build(case_of(masked=True), torch.float64, device), *names)
        out, stats = sparse_attention(**call, need_stats=True)
        grads = torch.autograd.grad(out.sin().sum() + stats.square().sum(), leaves)
        results.append([out.detach(), stats.detach(), *grads[:3]])
    assert_close(results[0], results[1], 1e-14)


@pytest.mark.parametrize("kind", FLOATING)
def test_the_mask_may_have_another_dtype(kind: torch.dtype, device: torch.device) -> None:
    values = build(case_of(masked=True), torch.float32, device)
    keep = values["keep"].to(kind).requires_grad_()
    out, stats = sparse_attention(**(values | {"keep": keep}), need_stats=True)
    expected = sparse_attention(**values, need_stats=True)
    assert_same_bits(out, expected[0])
    assert_same_bits(stats, expected[1])
    out.sum().backward()
    assert keep.grad.dtype == kind and keep.grad.any()


@pytest.mark.parametrize(
    ("output", "name"), [*((0, x) for x in ("q", "k", "v", "keep")), (1, "q"), (1, "k")]
)
def test_there_are_no_second_derivatives(output: int, name: str, device: torch.device) -> None:
    call, (leaf,) = with_leaves(build(case_of(masked=True), torch.float64, device), name)
    loss = sparse_attention(**call, need_stats=True)[output].square().sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert first.any()
    words = "sparse_attention is differentiable once.*sparse_attention_reference"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(first.sum(), leaf)


@pytest.mark.parametrize("name", ["q", "k", "v", "keep"])
def test_forward_mode_is_refused_with_words(name: str, device: torch.device) -> None:
    values = build(case_of(masked=True), torch.float64, device)
    with forward_ad.dual_level():
        values[name] = forward_ad.make_dual(values[name], torch.ones_like(values[name]))
        with pytest.raises(
            RuntimeError, match=r"spot_ext\.sparse_attention does not support forward"
        ):
            sparse_attention(**values)


def test_lse_is_that_of_the_keys_seen(device: torch.device) -> None:
    values = build(case_of(masked=True, order="padded", count=30), torch.float64, device)
    args = [values[x] for x in ("q", "k", "v", "index", "keep", "scale", "num_prefix")]
    args[0].requires_grad_()
    out, _, lse = torch.ops.spot.sparse_attention(*args)
    assert out.requires_grad and not lse.requires_grad
    expected = sparse_reference(*args)[2]
    assert torch.equal(lse == -math.inf, expected == -math.inf) and (lse == -math.inf).any()
    assert_close(lse, expected)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("order", ["ascending", "shuffled", "padded"])
@pytest.mark.parametrize(("count", "batch", "heads"), [(197, 1, 1), (50, 3, 3), (33, 2, 5)])
def test_any_number_of_threads_gives_the_same_bits(
    count: int, batch: int, heads: int, order: str, dtype: torch.dtype
) -> None:
    case = case_of(count=count, batch=batch, heads=heads, named=count // 3, dim=40, masked=True,
                   order=order)  # fmt: skip
    values = build(case, dtype, "cpu")
    results = []
    for number in (1, 2, 3, 4):
        with threads(number):
            results.append(_everything(values))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(two, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_repeats_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    values = build(case_of(count=35, heads=5, masked=True, named=9), dtype, device)
    expected = torch.cat([value.double().flatten() for value in _everything(values)])
    assert expected.isfinite().all() and expected.any()
    for _ in range(20 if emulated() else 1000):
        actual = torch.cat([value.double().flatten() for value in _everything(values)])
        assert torch.equal(actual.view(torch.int64), expected.view(torch.int64))


# ---- bad indices ---------------------------------------------------------------------------------


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
    values = build(case, torch.float32, "cpu")
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


# ---- cost ----------------------------------------------------------------------------------------


def test_flops_grow_with_the_keys_named(device: torch.device) -> None:
    """METHOD B5: two products of (n-1) k D multiply-accumulates, and a dense row for the class."""

    def count(named: int, call: Callable[..., Any] = sparse_attention) -> int:
        values = build(
            case_of(count=197, named=named, heads=6, dim=64, batch=1), torch.float32, device
        )
        with FlopCounterMode(display=False) as counter:
            call(**values)
        return counter.get_total_flops()

    assert count(50) == 2 * 2 * (196 * 50 + 197) * 384
    assert count(100) - count(50) == 2 * 2 * 196 * 50 * 384


_MEMORY = """
import json
import torch
import spot_ext

torch.set_num_threads(2)
found = []
for call in (spot_ext.sparse_attention, spot_ext.sparse_attention_reference):
    for count in (65, 1025):  # the first call warms up
        named = count // 8
        q, k, v = (torch.randn(2, count, 6, 64).requires_grad_() for _ in range(3))
        index = torch.rand(2, 6, count - 1, count).argsort(-1)[..., :named].sort(-1).values.int()
        index = index.contiguous()
        forward, (out, stats) = rise(lambda: call(q, k, v, index, need_stats=True))
        sent = torch.randn_like(out), torch.randn_like(stats)
        backward, grads = rise(lambda: torch.autograd.grad((out, stats), (q, k, v), sent))
        forward -= 4 * (out.numel() + stats.numel() + out.numel() // 64)
        backward -= 4 * sum(x.numel() for x in grads)
    found.append((forward, backward))
print(json.dumps(found))
"""


def test_no_map_is_ever_in_memory() -> None:
    """Peak resident size beyond results, of 12 maps of 1025 x 1025: at most 0.15 of their bytes.

    An eighth of the keys is named, and the backward pass may list them by key.
    """
    maps = 2 * 6 * 1025 * 1025 * 4
    kernel, reference = json.loads(crash_free(MEASURE_MEMORY + _MEMORY))  # forward, backward
    assert min(reference) > maps, "the measurement does not see maps where there are some"
    assert kernel[0] <= 0.05 * maps and kernel[1] <= 0.15 * maps, kernel


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_meet_under_autocast(ambient: torch.dtype, device: torch.device) -> None:
    """q and k normalised in float32 beside a 16-bit v, as qk_norm gives them under autocast."""
    values = build(case_of(masked=True), torch.float32, device)
    q, k, v, index, keep = (values[x] for x in ("q", "k", "v", "index", "keep"))
    keep.requires_grad_()
    with torch.amp.autocast(device.type, dtype=ambient):
        out, stats = sparse_attention(q, k, v.to(ambient), index, keep, need_stats=True)
    expected = sparse_attention(q.to(ambient), k.to(ambient), v.to(ambient), index, keep,
                                need_stats=True)  # fmt: skip
    assert out.dtype == ambient and stats.dtype == torch.float32
    assert_same_bits(out, expected[0])
    assert_same_bits(stats, expected[1])
    out.float().sum().backward()
    assert keep.grad.dtype == torch.float32 and keep.grad.any()
    with pytest.raises(TypeError, match="v must be float32"):
        sparse_attention(q, k, v.to(ambient), index)


# ---- what the table leaves out -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
def test_large_logits_stay_finite(dtype: torch.dtype, device: torch.device) -> None:
    values = build(case_of(count=30, dim=16, masked=True, order="padded"), dtype, device)
    values |= {name: values[name] * 100 for name in "qk"}
    outcome = _everything(values)
    assert all(value.isfinite().all() for value in outcome)
    exact = sparse_attention_reference(**to_dtype(values, torch.float64), need_stats=True)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-2}.get(dtype, 3e-2)
    assert_close(outcome[0].double(), exact[0], tolerance)
    assert_close(outcome[1].double(), exact[1], min(tolerance, 1e-2))


def test_images_and_heads_do_not_mix(device: torch.device) -> None:
    values = build(case_of(batch=3, heads=4, masked=True), torch.float64, device)
    out, stats = sparse_attention(**values, need_stats=True)
    for image in range(3):
        for head in range(4):
            part = {x: values[x][image : image + 1, :, head : head + 1] for x in "qkv"}
            part["index"] = values["index"][image : image + 1, head : head + 1]
            part["keep"] = values["keep"][image : image + 1]
            alone = sparse_attention(**part, need_stats=True)
            assert_close(alone, (out[image : image + 1, :, head : head + 1],
                                 stats[image : image + 1, :, head : head + 1]), 1e-12)  # fmt: skip


def test_permuting_patches_permutes_the_result(device: torch.device) -> None:
    values = build(
        case_of(count=30, num_prefix=2, masked=True, order="padded"), torch.float64, device
    )
    order = random_index("order", 1, 28, 28, "shuffled", device)[0]
    rows = torch.cat([torch.arange(2, device=device), order + 2])
    names = rows.argsort()  # old position -> new one
    named = values["index"][:, :, order]
    moved = values | {name: values[name][:, rows] for name in "qkv"}
    moved["keep"] = values["keep"][:, order]
    moved["index"] = torch.where(named < 0, -1, names[named.clamp(min=0).long()]).int()
    out, stats = sparse_attention(**values, need_stats=True)
    assert_close(sparse_attention(**moved, need_stats=True), (out[:, rows], stats[:, rows]), 1e-12)


def test_the_backward_op_gives_what_is_asked_for(device: torch.device) -> None:
    args = list(OPS["sparse_attention_backward"].sample("masked with statistics").args(
        device, torch.float32))  # fmt: skip
    everything = torch.ops.spot.sparse_attention_backward(*args)
    assert everything[3].any() and everything[3].dtype == torch.float32
    args[-1] = False
    fewer = torch.ops.spot.sparse_attention_backward(*args)
    assert fewer[3].numel() == 0
    assert_close(fewer[:3], everything[:3], 1e-6)
    # Without grad_stats the statistics are not read: a forward pass without them left none.
    args[1] = None
    expected = torch.ops.spot.sparse_attention_backward(*args)
    args[8] = args[8].new_empty(0)
    for one, other in zip(torch.ops.spot.sparse_attention_backward(*args), expected, strict=True):
        assert_same_bits(one, other)
