"""attention_stats against its definition, written once more as loops, and its identities."""

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
from ops.cases.attention_stats import attention_reference
from support.arguments import tensors, to_dtype
from support.attention import HEAD_DIMS, NAMES, assert_as_accurate_as, stats_by_hand, with_leaves
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, generator, random, random_index
from support.gradients import cotangents, gradients
from support.layouts import LAYOUTS, lay_out
from support.memory import MEASURE_MEMORY, crash_free
from support.switches import emulated, threads
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from spot_ext import attention_stats, attention_stats_reference, compact_tokens

# ---- the definition as loops ---------------------------------------------------------------------


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 1,
    class_token: bool = True,
    cotangent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`out`, `stats` and the gradient of `keep` for the gradient of `out`, entry by entry."""
    batch, count, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    out, stats = torch.zeros_like(v), v.new_zeros(batch, count, heads, 6)
    keep_grad = None if keep is None or cotangent is None else torch.zeros_like(keep)
    patches = range(num_prefix, count)
    for b in range(batch):
        kept = [True] * num_prefix
        kept += [True] * len(patches) if keep is None else [x == 1 for x in keep[b].tolist()]
        for h in range(heads):
            logit = [[float(q[b, i, h] @ k[b, j, h]) * scale for j in range(count)]
                     for i in range(count)]  # fmt: skip
            if bias is not None:
                slab = bias[b if bias.shape[0] > 1 else 0, h].tolist()
                logit = [[x + y for x, y in zip(*rows, strict=True)]
                         for rows in zip(logit, slab, strict=True)]  # fmt: skip
            p = [[0.0] * count for _ in range(count)]
            lse = []
            for i in range(count):
                seen = [j for j in range(count) if kept[j] or j == i]
                top = max(logit[i][j] for j in seen)
                lse.append(top + math.log(sum(math.exp(logit[i][j] - top) for j in seen)))
                for j in seen:
                    p[i][j] = math.exp(logit[i][j] - lse[i])
                    out[b, i, h] += p[i][j] * v[b, j, h]
            if keep_grad is not None:
                for j in patches:
                    for i in range(count):
                        if i == j:  # a token's own row does not depend on its mask
                            continue
                        share = logit[i][j] - lse[i]
                        weight = math.exp(share) if kept[j] else 1 / (1 + math.exp(-share))
                        pull = float(cotangent[b, i, h] @ (v[b, j, h] - out[b, i, h]))
                        keep_grad[b, j - num_prefix] += weight * pull
            alive = [t for t in patches if kept[t]]
            stats[b, alive, h] = stats_by_hand(p, alive, class_token).to(q.dtype)
    return out, stats, keep_grad


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    num_prefix = draw(st.sampled_from([0, 1, 1, 2, 5]))
    patches = draw(st.integers(0, 6))
    return {
        "batch": draw(st.integers(0, 3)),
        "count": num_prefix + patches,
        "heads": draw(st.integers(1, 3)),
        "dim": draw(st.sampled_from([1, 2, 3, 8])),
        "num_prefix": num_prefix,
        "class_token": num_prefix > 0 and draw(st.booleans()),
        "masked": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, None, "one", "each"])),
        "scale": draw(st.sampled_from([None, None, 0.3, -1.0, 3.0])),
        "spread": draw(st.sampled_from([0.0, 1.0, 1.0, 6.0])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 1 << 30)),
    }


def case_of(**changes: Any) -> dict[str, Any]:
    """One case, described as `cases` does, with the class token that the prefix allows."""
    case = {
        "batch": 2, "count": 17, "heads": 2, "dim": 8, "num_prefix": 1, "masked": False,
        "bias": None, "scale": None, "spread": 1.0, "layout": "contiguous", "seed": 0,
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
    values["keep"] = values["bias"] = None
    if case["masked"]:
        flips = torch.rand(
            (shape[0], shape[1] - case["num_prefix"]), generator=generator(f"{seed}")
        )
        values["keep"] = (flips < 0.6).to(device, dtype)
    if case["bias"]:
        batch = 1 if case["bias"] == "one" else shape[0]
        size = (batch, shape[2], shape[1], shape[1])
        values["bias"] = random(f"bias {seed}", size, torch.float64).to(device, dtype)
    return values | {name: case[name] for name in ("scale", "num_prefix", "class_token")}


@given(cases())
def test_values_and_mask_gradient_by_hand(device: torch.device, case: dict[str, Any]) -> None:
    values = build(case, torch.float64, "cpu")
    cotangent = random(f"cotangent {case['seed']}", values["q"].shape, torch.float64)
    out, stats, keep_grad = by_hand(**values, cotangent=cotangent)
    moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
    for function in (attention_stats_reference, attention_stats):
        arguments, leaves = with_leaves(moved, "keep")
        actual = function(**arguments)
        assert_close([value.cpu() for value in actual], (out, stats), 1e-11, function.__name__)
        if leaves and actual[0].requires_grad:
            (grad,) = torch.autograd.grad(actual[0], leaves, cotangent.to(device))
            assert_close(grad.cpu(), keep_grad, 1e-11, f"{function.__name__} keep gradient")


def assert_as_accurate_as_torch(values: dict[str, Any]) -> None:
    names = ("q", "k", "v", "keep", "bias")
    assert_as_accurate_as(attention_stats_reference, attention_stats, values, names)


@given(cases(), st.sampled_from(FLOATING))
def test_values_and_gradients_are_as_accurate_as_torch(
    device: torch.device, case: dict[str, Any], dtype: torch.dtype
) -> None:
    if case["spread"] == 0.0:
        case = case | {"spread": 0.5}
    if case["layout"] == "flat":  # equal keys leave rounding noise where the gradient of q is zero
        case = case | {"layout": "padded"}
    assert_as_accurate_as_torch(build(case, dtype, device))


# ---- every size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    for turn, count in enumerate((1, 2, 5, 16, 17, 50, 99)):
        case = case_of(
            count=count, dim=dim, masked=(turn + dim) % 2 == 0, batch=1 + turn % 2,
            bias=(None, "one", "each")[(turn + dim) % 3], seed=turn,
        )  # fmt: skip
        assert_as_accurate_as_torch(build(case, dtype, device))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", range(1, 71, 10))
def test_every_number_of_tokens(first: int, masked: bool, device: torch.device) -> None:
    for count in range(first, first + 10):
        case = case_of(count=count, masked=masked, num_prefix=min(count, count % 3), dim=12)
        assert_as_accurate_as_torch(build(case, torch.float32, device))


@pytest.mark.parametrize("first", range(0, 66, 11))
def test_every_number_of_kept_tokens(first: int, device: torch.device) -> None:
    """Images of one batch keep different numbers, all, one and none among them."""
    values = build(case_of(batch=3, count=67, masked=True, bias="one"), torch.float32, device)
    for kept in range(first, first + 11):
        for image, number in enumerate((kept, 66 - kept, min(kept, 1))):
            chosen = random_index(f"kept {kept} {image}", 1, 66, number, "shuffled", device)
            values["keep"][image] = 0
            values["keep"][image, chosen[0]] = 1
        assert values["keep"].sum(1).tolist() == [kept, 66 - kept, min(kept, 1)]
        assert_as_accurate_as_torch(values)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [None, "one"])
def test_a_scale_of_zero_is_uniform_attention(
    scale: float, masked: bool, bias: str | None, device: torch.device
) -> None:
    for dtype in FLOATING:
        case = case_of(scale=scale, masked=masked, bias=bias)
        assert_as_accurate_as_torch(build(case, dtype, device))


def test_gradients_beside_a_hidden_logit_far_above_the_others(device: torch.device) -> None:
    """exp(logit - lse) of the hidden column overflows; it is no part of the result."""
    q, k, v = torch.tensor([[0.0, 10, 1], [0, 0, 100], [1, 2, 3]], device=device).view(
        3, 1, 3, 1, 1
    )
    keep = torch.tensor([[1.0, 0.0]], device=device)
    for function in (attention_stats, attention_stats_reference):
        call, leaves = with_leaves({"q": q, "k": k, "v": v, "keep": keep, "scale": 1.0}, "k", "v")
        out, stats = function(**call)
        grads = torch.autograd.grad(out.sum() + stats.sum(), leaves)
        torch.testing.assert_close(grads[0].flatten(), torch.tensor([-5.0, 5, 0], device=device))
        assert grads[1].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("kept", [None, 0, 1, 5, 150, 398])
def test_few_heads_with_many_queries(
    kept: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    """The CPU cuts the queries of few heads into spans and combines their column sums."""
    case = case_of(batch=1, count=400, num_prefix=2, dim=16, bias="one", masked=kept is not None)
    values = build(case, dtype, device)
    if kept is not None:
        chosen = random_index("spans", 1, 398, kept, "shuffled", device)
        values["keep"] = torch.zeros_like(values["keep"]).scatter(1, chosen, 1)
    assert_as_accurate_as_torch(values)


# ---- identities of the statistics ----------------------------------------------------------------


def _qkv(
    batch: int, count: int, heads: int, dim: int, dtype: torch.dtype = torch.float64,
    device: Any = "cpu",
) -> list[Tensor]:  # fmt: skip
    return [random(f"{x} {count}", (batch, count, heads, dim), dtype, device) for x in "qkv"]


def _mask(batch: int, patches: int, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Any:
    seeded = generator(f"mask {patches}")
    return (torch.rand((batch, patches), generator=seeded) < 0.6).to(device, dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_sum_to_one(masked: bool, device: torch.device) -> None:
    """n row_mean + cls_in = 1, and sum_t n col_mean = n - sum_t cls_in, with one prefix token."""
    q, k, v = _qkv(3, 20, 2, 8, device=device)
    keep = _mask(3, 19, device=device) if masked else None
    _, stats = attention_stats(q, k, v, keep)
    cls_in, row_mean, col_mean = (stats[:, 1:, :, i] for i in (1, 2, 4))
    alive = torch.ones(3, 19, 1, device=device).double() if keep is None else keep[..., None]
    n = alive.sum(1, keepdim=True)
    assert_close(n * row_mean + cls_in, alive.expand_as(cls_in), 1e-12)
    assert_close((n * col_mean).sum(1), n[:, 0] - cls_in.sum(1), 1e-12)
    assert_close(row_mean.sum(1), col_mean.sum(1), 1e-12)
    assert not stats[:, 0].any()
    if keep is not None:
        assert not stats[:, 1:][keep == 0].any()


def _maps(values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The map [B, N, H, N] of the reference in float64 and of the op: what identity values give."""
    batch, count, heads, dim = values["q"].shape
    assert dim == count
    one = torch.eye(count, device=values["q"].device)[None, :, None].expand(batch, -1, heads, -1)
    mapped = values | {"v": one.to(values["q"].dtype)}
    exact = attention_stats_reference(**to_dtype(mapped, torch.float64))[0]
    return exact, attention_stats(**mapped)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
def test_rows_and_columns_sum_to_what_the_prefix_leaves(
    num_prefix: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """n row_mean + prefix columns = 1, and sum_t n col_mean = n - sum_t prefix columns."""
    case = case_of(count=37, dim=37, num_prefix=num_prefix, masked=masked, bias="one")
    values = build(case, dtype, device)
    exact, actual = _maps(values)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(actual.double(), exact, 4e-3 if dtype == torch.bfloat16 else tolerance, "map")
    stats = attention_stats(**values)[1][:, num_prefix:].double()
    alive = torch.ones(2, 37 - num_prefix, 1, device=device).double()
    if masked:
        alive = values["keep"].double()[..., None]
    n = alive.sum(1, keepdim=True)
    taken = exact[:, num_prefix:, :, :num_prefix].sum(-1) * alive  # [B, N-P, H]
    assert_close(n * stats[..., 2] + taken, alive.expand_as(taken), tolerance, "rows")
    total = (n * stats[..., 4]).sum(1)
    assert_close(total, n[:, 0] - taken.sum(1), tolerance, "columns")
    cls = exact[:, 0, :, num_prefix:].transpose(1, 2) * alive if num_prefix else 0 * taken
    assert_close(stats[..., 0], cls, tolerance, "cls_out")
    cls = exact[:, num_prefix:, :, 0] * alive if num_prefix else 0 * taken
    assert_close(stats[..., 1], cls, tolerance, "cls_in")


def test_uniform_attention_has_equal_means_and_no_variance(device: torch.device) -> None:
    for count in (2, 5, 197):
        q, k, v = _qkv(2, count, 2, 8, torch.float32, device)
        out, stats = attention_stats(torch.zeros_like(q), k, v)
        expected = torch.tensor([1, 1, 1, 0, 1, 0], device=device) / count
        torch.testing.assert_close(
            stats[:, 1:], expected.expand(2, count - 1, 2, 6), rtol=1e-5, atol=1e-9
        )
        torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(v), rtol=0, atol=1e-5)


def test_variances_keep_their_digits_when_attention_is_nearly_uniform(device: torch.device) -> None:
    """E[p^2] - mean^2 in float32 would leave nothing of variances near 1e-13."""
    q, k, v = _qkv(1, 197, 2, 64, torch.float64, device)
    q = q * 1e-2
    exact = attention_stats_reference(q, k, v)[1][:, 1:]
    actual = attention_stats(q.float(), k.float(), v.float())[1][:, 1:].double()
    for column in (3, 5):
        error = (actual[..., column] / exact[..., column] - 1).abs().max().item()
        assert error < 1e-2, f"{NAMES[column]}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("count", "variance", "masked", "tolerance"),
    [
        (197, 1e-9, False, 1e-4),
        (197, 1e-12, False, 1e-4),
        (577, 1e-9, False, 1e-4),
        (577, 1e-12, False, 1e-4),
        (197, 1e-9, True, 1e-4),
        (197, 1e-12, True, 1.5e-4),  # here 1/n is 70 standard deviations from the mean 1/(n+1)
        (577, 1e-9, True, 1e-4),
        (577, 1e-12, True, 1e-4),
    ],
)
def test_tiny_variances_are_right(
    count: int, variance: float, masked: bool, tolerance: float, device: torch.device
) -> None:
    """To 1e-4 over the tokens. Near 1e-12 a single one may be off by more: float32 rounds each p
    by up to 2e-4 of its distance from the mean (N = 197); plain PyTorch is off by 5e-4 there."""
    values = build(case_of(count=count, dim=64, masked=masked), torch.float64, device)
    n = count - 1 if not masked else values["keep"].sum(1).mean().item()
    values["q"] = values["q"] * variance**0.5 * n
    values = to_dtype(values, torch.float32)
    exact = attention_stats_reference(**to_dtype(values, torch.float64))[1][:, 1:]
    actual = attention_stats(**values)[1][:, 1:]
    alive = exact[..., 2] > 0
    for column in (3, 5):
        truth = exact[..., column][alive]
        assert 0.5 * variance < truth.median() < 2 * variance
        error = (actual[..., column][alive].double() / truth - 1).abs()
        total = error.square().mean().sqrt().item()
        assert total < tolerance, f"{NAMES[column]}: relative error {total:.1e}"
        largest = error.max().item()
        limit = tolerance if variance > 1e-10 else 4 * tolerance
        assert largest < limit, f"{NAMES[column]}: relative error {largest:.1e}"
    assert not actual[~alive].any()


@pytest.mark.parametrize("count", [197, 577])
def test_one_hot_attention_has_the_variances_of_counts(count: int, device: torch.device) -> None:
    """Column t is chosen c_t times: mean c_t / n, variance c_t / n (1 - c_t / n)."""
    _, k, v = _qkv(1, count, 2, 64, torch.float32, device)
    chosen = torch.randint(1, count, (count,), generator=generator("chosen")).to(device)
    out, stats = attention_stats(20 * k[:, chosen], k, v)
    torch.testing.assert_close(out, v[:, chosen], rtol=1e-6, atol=1e-6)
    n = count - 1
    mean = torch.bincount(chosen[1:], minlength=count)[1:].double()[None, :, None] / n
    assert mean.max() * n >= 3 and (mean == 0).any()
    # Where nobody looks, roundings of 1/n and 1/n^2 may remain.
    for column, truth, rest in ((4, mean, 1 / n), (5, mean * (1 - mean), 1 / n**2)):
        actual = stats[:, 1:, :, column].double()
        truth = truth.expand_as(actual)
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=2e-5 * rest)
    for column, number in ((2, 1 / n), (3, (1 - 1 / n) / n)):
        actual = stats[:, 1:, :, column]
        torch.testing.assert_close(actual, torch.full_like(actual, number), rtol=1e-4, atol=0)


def test_one_patch_has_zero_variance(device: torch.device) -> None:
    q, k, v = _qkv(2, 2, 3, 4, device=device)
    stats = attention_stats(q, k, v)[1]
    assert not stats[..., 3].any() and not stats[..., 5].any()
    assert_close(stats[:, 1, :, 2], stats[:, 1, :, 4])


@pytest.mark.parametrize("num_prefix", [1, 2, 5])
def test_statistics_ignore_the_prefix_but_for_the_class_token(
    num_prefix: int, device: torch.device
) -> None:
    q, k, v = _qkv(2, 12, 2, 8, device=device)
    stats = attention_stats(q, k, v, num_prefix=num_prefix)[1]
    assert not stats[:, :num_prefix].any() and stats[:, num_prefix:].ne(0).all()
    none = attention_stats(q, k, v, num_prefix=num_prefix, class_token=False)[1]
    assert not none[..., :2].any()
    assert_same_bits(none[..., 2:], stats[..., 2:])


def test_defaults(device: torch.device) -> None:
    q, k, v = _qkv(2, 6, 2, 8, device=device)
    default = attention_stats(q, k, v)
    explicit = attention_stats(q, k, v, scale=8**-0.5, num_prefix=1, class_token=True)
    for one, other in zip(default, explicit, strict=True):
        assert_same_bits(one, other)
    no_prefix = attention_stats(q, k, v, num_prefix=0)[1]  # then there is no class token
    assert not no_prefix[..., :2].any() and no_prefix[..., 2].all()


# ---- the mask ------------------------------------------------------------------------------------


@given(cases())
def test_masked_equals_compacted(device: torch.device, case: dict[str, Any]) -> None:
    """The claim that masked training rests on: same result as with the dropped tokens gone."""
    case = case | {"masked": True}
    values = build(case, torch.float64, device)
    prefix, keep = case["num_prefix"], values["keep"]
    out, stats = attention_stats(**values)
    for image in range(case["batch"]):
        index = keep[image].nonzero().T.contiguous()
        rows = torch.cat([torch.arange(prefix, device=device), index[0] + prefix])
        part = {name: compact_tokens(values[name][image : image + 1].contiguous(), index, prefix)
                for name in "qkv"}  # fmt: skip
        bias = values["bias"]
        if bias is not None:
            bias = bias[min(image, bias.shape[0] - 1)][None][:, :, rows][:, :, :, rows]
        rest = {name: values[name] for name in ("scale", "num_prefix", "class_token")}
        fewer_out, fewer_stats = attention_stats(**part, bias=bias, **rest)
        assert_close(out[image, rows], fewer_out[0], 1e-10, "out")
        assert_close(stats[image, rows], fewer_stats[0], 1e-10, "stats")


def test_keeping_all_equals_no_mask(device: torch.device) -> None:
    q, k, v = _qkv(2, 9, 2, 8, device=device)
    masked = attention_stats(q, k, v, torch.ones(2, 8, device=device, dtype=torch.float64))
    assert_close(masked, attention_stats(q, k, v), 1e-12)


def test_keeping_none_leaves_prefix_and_self(device: torch.device) -> None:
    q, k, v = _qkv(2, 9, 2, 8, device=device)
    out, stats = attention_stats(q, k, v, torch.zeros(2, 8, device=device, dtype=torch.float64))
    assert not stats.any()
    assert_close(out[:, 0], v[:, 0])
    alone = [torch.stack([x[:, 0], x[:, 5]], dim=1) for x in (q, k, v)]
    assert_close(out[:, 5], attention_stats(*alone)[0][:, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dropped_token_is_seen_by_no_other(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = _qkv(2, 35, 2, 8, dtype, device)
    keep = torch.ones(2, 34, device=device, dtype=dtype)
    keep[:, [3, 20, 33]] = 0
    out, stats = attention_stats(q, k, v, keep)
    others = [i for i in range(35) if i != 21]
    for name, value in ((0, 7.5), (1, 7.5), (2, 7.5), (0, math.nan), (1, math.nan)):
        changed = [x.clone() for x in (q, k, v)]
        changed[name][:, 21] = value
        again, again_stats = attention_stats(*changed, keep)
        assert_same_bits(again[:, others], out[:, others])
        if value == 7.5:  # the reference multiplies the rows of dropped tokens by zero
            assert_same_bits(again_stats, stats)
        assert (again[:, 21] != out[:, 21]).any()  # its own row sees it


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_mask_may_have_another_dtype(kind: torch.dtype, device: torch.device) -> None:
    q, k, v = _qkv(2, 9, 2, 8, torch.float32, device)
    keep = _mask(2, 8, kind, device).requires_grad_()
    out, stats = attention_stats(q, k, v, keep)
    expected = attention_stats(q, k, v, keep.detach().float())
    assert_same_bits(out, expected[0])
    assert_same_bits(stats, expected[1])
    out.sum().backward()
    assert keep.grad.dtype == kind and keep.grad.any()


def test_the_mask_gradient_is_bounded(device: torch.device) -> None:
    """Where the exact derivative of a dropped column is beyond any float."""
    q, k, v = _qkv(2, 20, 2, 8, torch.float32, device)
    keep = _mask(2, 19, torch.float32, device).requires_grad_()
    for spread in (1.0, 1e2, 1e4):
        out, _ = attention_stats(q * spread, k * spread, v, keep)
        (grad,) = torch.autograd.grad(out.sum(), keep)
        bound = 20 * 2 * 8 * 2 * v.abs().max().item()  # rows, heads, channels, |v - out|
        assert grad.isfinite().all() and grad.abs().max().item() <= bound
        assert grad.any()


def test_statistics_treat_the_mask_as_a_constant(device: torch.device) -> None:
    q, k, v = _qkv(2, 9, 2, 8, device=device)
    keep = _mask(2, 8, device=device).requires_grad_()
    _, stats = attention_stats(q.requires_grad_(), k, v, keep)
    q_grad, keep_grad = torch.autograd.grad(stats.sum(), (q, keep), allow_unused=True)
    assert q_grad.any() and (keep_grad is None or not keep_grad.any())


def test_the_mask_gradient_leaves_the_others_alone(device: torch.device) -> None:
    """Asking for the gradient of the mask changes neither values nor other gradients."""
    keep = _mask(2, 8, device=device)
    results = []
    for wants in (False, True):
        leaves = [x.requires_grad_() for x in _qkv(2, 9, 2, 8, device=device)]
        out, stats = attention_stats(*leaves, keep.clone().requires_grad_(wants))
        grads = torch.autograd.grad(out.sin().sum() + stats.square().sum(), leaves)
        results.append([out.detach(), stats.detach(), *grads])
    assert_close(results[0], results[1], 1e-14)


# ---- symmetries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_permuting_patches_permutes_the_result(masked: bool, device: torch.device) -> None:
    q, k, v = _qkv(2, 15, 2, 8, device=device)
    keep = _mask(2, 13, device=device) if masked else None
    order = random_index("order", 1, 13, 13, "shuffled", device)[0]
    rows = torch.cat([torch.arange(2, device=device), order + 2])
    out, stats = attention_stats(q, k, v, keep, num_prefix=2)
    moved = attention_stats(
        q[:, rows], k[:, rows], v[:, rows], None if keep is None else keep[:, order], num_prefix=2
    )
    assert_close(moved, (out[:, rows], stats[:, rows]), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_permuting_patches_permutes_gradients_too(masked: bool, device: torch.device) -> None:
    """In float32, over several vectors of columns, with bias."""
    case = case_of(count=77, num_prefix=2, masked=masked, bias="each", dim=20)
    order = random_index("order 77", 1, 75, 75, "shuffled", device)[0]
    rows = torch.cat([torch.arange(2, device=device), order + 2])
    inverse = rows.argsort()
    weight = random("weight", (2, 77, 2, 26), torch.float32, device)
    results = []
    for to, back in ((torch.arange(77, device=device), torch.arange(77, device=device)),
                     (rows, inverse)):  # fmt: skip
        values = build(case, torch.float32, device)
        for name in "qkv":
            values[name] = values[name][:, to]
        values["bias"] = values["bias"][:, :, to][:, :, :, to]
        if masked:
            values["keep"] = values["keep"][:, to[2:] - 2]
        values, leaves = with_leaves(values, "q", "k", "v", "bias", "keep")
        both = torch.cat(attention_stats(**values), dim=-1)
        grads = torch.autograd.grad((both * weight[:, to]).sum(), leaves)
        moved = [both[:, back], *(grad[:, back] for grad in grads[:3])]
        moved.append(grads[3][:, :, back][:, :, :, back])
        results.append(moved + [grad[:, back[2:] - 2] for grad in grads[4:]])
    assert_close(results[1], results[0], 2e-5)
    assert all(value.any() for value in results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_constant_added_to_a_row_of_logits_changes_nothing(
    masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """So the gradient of `bias` sums to zero in every row."""
    values = build(case_of(count=41, masked=masked, bias="each"), dtype, device)
    constant = random("constant", (2, 2, 41, 1), dtype, device) * 8
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    results = []
    for bias in (values["bias"], values["bias"] + constant):
        call, leaves = with_leaves(values | {"bias": bias}, "q", "k", "v", "keep", "bias")
        outputs, grads = gradients(lambda *_, c=call: attention_stats(**c), tuple(leaves))
        assert grads[-1].abs().max() > 1e-2
        assert grads[-1].sum(-1).abs().max() < tolerance
        results.append([*outputs, *grads])
    assert_close(results[1], results[0], tolerance)


def test_images_and_heads_do_not_mix(device: torch.device) -> None:
    q, k, v = _qkv(3, 9, 4, 8, device=device)
    keep = _mask(3, 8, device=device)
    out, stats = attention_stats(q, k, v, keep)
    for image in range(3):
        for head in range(4):
            part = [x[image : image + 1, :, head : head + 1] for x in (q, k, v)]
            alone = attention_stats(*part, keep[image : image + 1])
            assert_close(alone, (out[image : image + 1, :, head : head + 1],
                                 stats[image : image + 1, :, head : head + 1]), 1e-12)  # fmt: skip


def test_out_is_scaled_dot_product_attention(device: torch.device) -> None:
    q, k, v = _qkv(2, 30, 3, 16, device=device)
    bias = random("bias", (1, 3, 30, 30), torch.float64, device)
    out, stats = attention_stats(q, k, v, bias=bias, need_stats=False)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias
    )
    assert_close(out, expected.transpose(1, 2), 1e-12)
    assert stats.numel() == 0 and stats.dtype == torch.float64


@pytest.mark.parametrize("batch", [1, 3])
def test_bias_is_broadcast_and_differentiable(batch: int, device: torch.device) -> None:
    q, k, v = _qkv(3, 9, 2, 8, device=device)
    keep = _mask(3, 8, device=device)
    bias = random("bias", (batch, 2, 9, 9), torch.float64, device).requires_grad_()
    args = (q, k, v, keep, bias)
    actual, (grad,) = gradients(attention_stats, args)
    expected, (truth,) = gradients(attention_stats_reference, args)
    assert_close(actual, expected)
    assert grad.shape == bias.shape
    assert_close(grad, truth)
    whole = bias.detach().expand(3, 2, 9, 9)  # stride 0 in the batch
    assert_close(attention_stats(q, k, v, keep, whole), actual, 1e-13)


def test_bias_of_minus_infinity_hides_a_column(device: torch.device) -> None:
    q, k, v = _qkv(2, 9, 2, 8, device=device)
    bias = torch.zeros(1, 2, 9, 9, dtype=torch.float64, device=device)
    bias[..., 5] = -math.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, stats = attention_stats(*leaves, bias=bias)
    assert out.isfinite().all() and stats.isfinite().all()
    rows = [i for i in range(9) if i != 5]
    fewer = [x[:, rows] for x in leaves]
    assert_close(out[:, rows], attention_stats(*fewer)[0], 1e-12)
    grads = torch.autograd.grad(out.sum() + stats.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][:, 5].any() and not grads[2][:, 5].any()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_row_without_a_softmax_is_nan(
    odd: float, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """A logit of +inf or NaN spoils its row, and the columns that the row sees."""
    for row in (0, 1, 4):  # the class token, another prefix token, a patch
        q, k, v = _qkv(1, 9, 2, 8, dtype, device)
        bias = torch.zeros(1, 2, 9, 9, dtype=dtype, device=device)
        bias[0, 1, row, 6] = odd
        keep = torch.tensor([[1, 0, 1, 1, 1, 0, 1.0]], device=device) if masked else None
        out, stats = attention_stats(q, k, v, keep, bias, num_prefix=2)
        expected = torch.zeros_like(stats, dtype=torch.bool)
        if row == 0:
            expected[:, 2:, 1, 0] = True
        elif row == 4:
            expected[:, 4, 1, 1:4] = True
            expected[:, 2:, 1, 4:] = True
        if masked:
            expected[:, [3, 7]] = False
        assert torch.equal(stats.isnan(), expected)
        assert out[0, row, 1].isnan().all() and out.isnan().sum() == 8
        more = attention_stats_reference(q, k, v, keep, bias, num_prefix=2)
        for mine, theirs in zip((out, stats), more, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())


# ---- numbers at the ends -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
def test_large_logits_stay_finite(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = _qkv(2, 12, 2, 16, dtype, device)
    leaves = [(q * 100).requires_grad_(), (k * 100).requires_grad_(), v.requires_grad_()]
    out, stats = attention_stats(*leaves, _mask(2, 11, dtype, device))
    grads = torch.autograd.grad(out.sum() + stats.sum(), leaves)
    assert all(value.isfinite().all() for value in (out, stats, *grads))
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (stats >= 0).all() and (stats[..., [0, 1, 2, 4]] <= 1 + 1e-6).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["products", "bias", "all high", "all low"])
@pytest.mark.parametrize("dtype", FLOATING)
def test_logits_of_ten_thousand(
    dtype: torch.dtype, where: str, masked: bool, device: torch.device
) -> None:
    """Outputs are finite and right, all gradients are finite and there."""
    values = build(case_of(count=41, dim=16, masked=masked, bias="each"), dtype, device)
    if where == "products":
        values["q"] = values["q"] * 250
        values["scale"] = 1.0
        products = torch.einsum("bihd,bjhd->bhij", values["q"].double(), values["k"].double())
        values["scale"] = 1e4 / products.abs().max().item()
    elif where == "bias":
        values["bias"] = values["bias"] / values["bias"].abs().max() * 1e4
    else:  # float32 keeps 1e-3 of such logits
        values["bias"] = values["bias"].sign() * 8 + (9.9e3 if where == "all high" else -9.9e3)
    call, leaves = with_leaves(values, "q", "k", "v", "keep", "bias")
    (out, stats), grads = gradients(lambda *_: attention_stats(**call), tuple(leaves))
    exact_out, exact_stats = attention_stats_reference(**to_dtype(values, torch.float64))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-2}.get(dtype, 3e-2)
    assert_close(out.double(), exact_out, tolerance, "out")
    assert_close(stats.double(), exact_stats, min(tolerance, 1e-2), "stats")
    assert out.isfinite().all() and stats.isfinite().all()
    assert (stats[..., [3, 5]] >= 0).all() and (stats >= -1e-6).all()
    assert len(grads) == 4 + masked and all(grad.isfinite().all() for grad in grads)
    assert all(grad.any() for grad in grads[2:])


def _with_nan(values: dict[str, Any], name: str) -> dict[str, Any]:
    """NaN in image 1, head 1 of one argument (`bias of one` has no images)."""
    changed = values[name.split()[0]].clone()
    if name == "bias":
        changed[1, 1, 3, 20] = math.nan
    elif name == "bias of one":
        changed[0, 1, 3, 20] = math.nan
    else:
        changed[1, 20, 1, 2] = math.nan
    return values | {name.split()[0]: changed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "bias of one"])
def test_a_nan_stays_in_its_image_and_head(
    name: str, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Everything of other images and heads has the same bits as without it."""
    case = case_of(batch=3, heads=3, count=41, masked=masked, dim=16)
    values = build(case | {"bias": "one" if "one" in name else "each"}, dtype, device)
    if masked:
        values["keep"][:, 19] = 1  # token 20 is seen
    results = []
    for arguments in (values, _with_nan(values, name)):
        call, leaves = with_leaves(arguments, "q", "k", "v", "bias", "keep")
        (out, stats), grads = gradients(lambda *_, c=call: attention_stats(**c), tuple(leaves))
        results.append([out, stats, *grads])
    clean, odd = results
    assert all(value.isfinite().all() for value in clean)
    images = [0, 1, 2] if "one" in name else [1]
    hit = torch.zeros(3, 3, dtype=torch.bool, device=device)  # [B, H]
    hit[images, 1] = True
    assert odd[0][1, :, 1].isnan().any() and odd[2][1, :, 1].isnan().any()
    for one, other in zip(odd[:5], clean[:5], strict=True):  # [B, N, H, ...]
        assert_same_bits(one.transpose(1, 2)[~hit], other.transpose(1, 2)[~hit])
    if "one" in name:
        assert_same_bits(odd[5][:, [0, 2]], clean[5][:, [0, 2]])
    else:
        assert_same_bits(odd[5][~hit], clean[5][~hit])
    if masked and "one" not in name:
        assert_same_bits(odd[6][[0, 2]], clean[6][[0, 2]])


def test_a_nan_stays_in_its_row(device: torch.device) -> None:
    q, k, v = _qkv(2, 9, 2, 8, torch.float32, device)
    q[0, 4, 1] = math.nan
    out, stats = attention_stats(q, k, v)
    assert out[0, 4, 1].isnan().all() and stats[0, 4, 1, 1:4].isnan().all()
    out[0, 4, 1] = 0
    assert out.isfinite().all() and stats[1].isfinite().all() and stats[0, :, 0].isfinite().all()


# ---- gradients -----------------------------------------------------------------------------------

_SAMPLES = [
    s.name for s in OPS["attention_stats"].samples if s.name not in ("ViT", "head dim 64", "flat")
]


def _checked(name: str, device: torch.device) -> tuple[Any, list[Tensor]]:
    args = OPS["attention_stats"].sample(name).args(device, torch.float64)
    args = tuple(
        value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for value in args
    )
    places = [place for place in (0, 1, 2, 4) if args[place] is not None]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(args)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        out, stats, _ = OPS["attention_stats"].call(*filled)
        return (out, stats) if stats.requires_grad else (out,)

    return function, [args[place].requires_grad_() for place in places]


_EDGES = [  # panels of 16 columns, of 8 channels
    case_of(count=15, dim=3, batch=1, bias="one"),
    case_of(count=15, dim=9, masked=True, class_token=False),
    case_of(count=16, dim=5, masked=True),
    case_of(count=16, dim=7, num_prefix=0, masked=True, bias="each", batch=1),
    case_of(count=16, dim=2, num_prefix=16, bias="one", masked=True),
    case_of(count=17, dim=9, num_prefix=2, masked=True, bias="one"),
    case_of(count=17, dim=17, num_prefix=1, class_token=False),
    case_of(count=17, dim=3, num_prefix=16, masked=True, batch=3),
    case_of(count=33, dim=7, num_prefix=0, bias="each", batch=1),
    case_of(count=33, dim=13, num_prefix=2, masked=True, scale=0.9),
    case_of(count=65, dim=1, masked=True, bias="one", heads=1, scale=-0.7),
    case_of(count=65, dim=19, num_prefix=2, class_token=False, masked=True, heads=1),
    case_of(count=66, dim=6, num_prefix=1, heads=1, batch=1),
]


def test_enough_shapes_are_checked() -> None:
    assert len(_SAMPLES) >= 20 and len(_EDGES) >= 12


@pytest.mark.parametrize("name", _SAMPLES)
def test_gradcheck(name: str, device: torch.device) -> None:
    function, leaves = _checked(name, device)
    assert gradcheck(function, leaves, check_undefined_grad=False, fast_mode=leaves[0].numel() > 99)


def _of_size_one(stats: Tensor, count: int) -> Tensor:
    """Scaled as features are, so that no tolerance swallows the gradients of the variances."""
    n = max(count, 1)
    return stats * torch.tensor([n, n, n, n * n, n, n * n], device=stats.device)


@pytest.mark.parametrize("need_stats", [True, False])
@pytest.mark.parametrize(
    "case", _EDGES, ids=lambda c: f"{c['count']}-{c['dim']}-{c['num_prefix']}-{c['masked']}"
)
def test_gradcheck_at_edges(case: dict[str, Any], need_stats: bool, device: torch.device) -> None:
    values = build(case, torch.float64, device)
    names = [name for name in ("q", "k", "v", "bias") if values[name] is not None]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        filled = values | dict(zip(names, leaves, strict=True))
        out, stats = attention_stats(**filled, need_stats=need_stats)
        if not need_stats:
            return (out,)
        return out, _of_size_one(stats, case["count"] - case["num_prefix"])

    leaves = [values[name].clone().requires_grad_() for name in names]
    whole = sum(leaf.numel() for leaf in leaves) < 400
    assert gradcheck(function, leaves, check_undefined_grad=False, fast_mode=not whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("column", range(6), ids=NAMES)
def test_the_gradient_of_each_statistic_alone(
    column: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Together, those of the means hide those of the variances, which are smaller by 1/n."""
    values = build(case_of(count=71, masked=masked, num_prefix=2, bias="each"), dtype, device)
    weight = random("weight", (2, 71, 2), torch.float64, device)
    results = []
    for function, arguments in (
        (attention_stats, values),
        (attention_stats_reference, to_dtype(values, torch.float64)),
    ):
        call, leaves = with_leaves(arguments, "q", "k", "bias")
        stats = _of_size_one(function(**call)[1], 69)[..., column]
        results.append(torch.autograd.grad((stats * weight.to(stats.dtype)).sum(), leaves))
    for name, actual, exact in zip(("q", "k", "bias"), *results, strict=True):
        error = ((actual.double() - exact).norm() / exact.norm()).item()
        limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
        assert exact.norm() > 0.1 and error < limit, f"{name}: relative error {error:.1e}"


def _mask_gradient(values: dict[str, Any], cotangent: Tensor) -> Tensor:
    """sum over i != j and heads of p'_ij cotangent_i (v_j - out_i), all rows at once."""
    q, k, v, grad = (x.double().transpose(1, 2) for x in (*(values[n] for n in "qkv"), cotangent))
    prefix, count = values["num_prefix"], q.shape[2]
    scale = q.shape[3] ** -0.5 if values["scale"] is None else values["scale"]
    logits = scale * (q @ k.mT)
    if values["bias"] is not None:
        logits = logits + values["bias"].double()
    dropped = torch.nn.functional.pad(values["keep"].double(), (prefix, 0), value=1.0) == 0
    others = ~torch.eye(count, dtype=torch.bool, device=q.device)
    unseen = dropped[:, None, None] & others  # [B, 1, N, N]
    weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * ~unseen
    lse = logits.amax(-1) + weights.sum(-1).log()
    out = weights @ v / weights.sum(-1, keepdim=True)
    share = logits - lse[..., None]
    soft = torch.where(unseen, 1 / (1 + torch.exp(-share)), torch.exp(share)) * others
    pull = grad @ v.mT - (grad * out).sum(-1, keepdim=True)  # [B, H, N, N]
    return (soft * pull).sum((1, 2))[:, prefix:]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bias", [None, "one", "each"])
@pytest.mark.parametrize(("num_prefix", "count"), [(0, 64), (1, 70), (2, 131)])
def test_the_mask_gradient_is_the_stated_one(
    num_prefix: int, count: int, bias: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    case = case_of(count=count, num_prefix=num_prefix, masked=True, bias=bias, heads=3, dim=20)
    values = build(case | {"scale": 0.5}, dtype, device)
    cotangent = random("cotangent", (2, count, 3, 20), dtype, device)
    truth = _mask_gradient(values, cotangent)
    call, (keep,) = with_leaves(values, "keep")
    out, _ = attention_stats(**call)
    (grad,) = torch.autograd.grad(out, keep, cotangent)
    assert grad.dtype == dtype
    error = (grad.double() - truth).abs().max().item() / truth.abs().max().item()
    limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3}.get(dtype, 1.5e-2)
    assert error < limit, f"relative error {error:.1e}"
    kept = values["keep"] == 1
    assert truth[kept].abs().mean() > 1e-2 and truth[~kept].abs().mean() > 1e-2


@pytest.mark.parametrize("name", _SAMPLES)
def test_second_derivatives_are_right_or_refused(name: str, device: torch.device) -> None:
    function, leaves = _checked(name, device)
    try:
        assert gradgradcheck(function, leaves, check_undefined_grad=False, fast_mode=True)
    except GradcheckError:
        raise
    except RuntimeError as error:
        assert "differentiable once" in str(error)


def test_lse_is_not_differentiable(device: torch.device) -> None:
    q, k, v = _qkv(2, 9, 2, 8, device=device)
    q.requires_grad_()
    out, stats, lse = OPS["attention_stats"].call(q, k, v, _mask(2, 8, device=device))
    assert out.requires_grad and stats.requires_grad and not lse.requires_grad
    assert_close(lse, attention_reference(q, k, v, _mask(2, 8, device=device))[2])


def test_without_statistics_out_and_gradients_are_the_same(device: torch.device) -> None:
    results = []
    for need in (True, False):
        leaves = [x.requires_grad_() for x in _qkv(2, 9, 2, 8, device=device)]
        keep = _mask(2, 8, device=device).requires_grad_()
        out, _ = attention_stats(*leaves, keep, need_stats=need)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), [*leaves, keep])])
    assert_close(results[0], results[1], 1e-14)


# ---- the same bits -------------------------------------------------------------------------------


def _everything(values: dict[str, Any]) -> list[Tensor]:
    """Outputs and the gradients of all five arguments, one after the other."""
    call, leaves = with_leaves(values, "q", "k", "v", "keep", "bias")
    outputs, grads = gradients(lambda *_: attention_stats(**call), tuple(leaves))
    assert len(grads) == 5
    return [value.detach().flatten() for value in (*outputs, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", ["one", "each"])
def test_a_thousand_repeats_give_the_same_bits(
    bias: str, dtype: torch.dtype, device: torch.device
) -> None:
    values = build(case_of(count=35, heads=5, masked=True, bias=bias, batch=3), dtype, device)
    expected = torch.cat([value.double() for value in _everything(values)])
    assert expected.isfinite().all() and expected.any()
    for _ in range(20 if emulated() else 1000):
        actual = torch.cat([value.double() for value in _everything(values)])
        assert torch.equal(actual.view(torch.int64), expected.view(torch.int64))


# ---- strides -------------------------------------------------------------------------------------

_B, _N, _H, _D = 2, 37, 3, 20
_VIEWS: dict[str, Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]] = {
    "packed": lambda make: make("qkv", _B, _N, 3, _H, _D).unbind(2),
    "packed by heads": lambda make: make("qkv", _B, _N, _H, 3, _D).unbind(3),
    "packed in the last dimension": lambda make: make("qkv", _B, _N, _H, _D, 3).unbind(4),
    "heads first": lambda make: tuple(make(x, _B, _H, _N, _D).transpose(1, 2) for x in "qkv"),
    "channels first": lambda make: tuple(make(x, _B, _H, _D, _N).movedim(3, 1) for x in "qkv"),
    "keys and values of one head": lambda make: (
        make("q", _B, _N, _H, _D),
        *(make(x, _B, _N, 1, _D).expand(_B, _N, _H, _D) for x in "kv"),
    ),
    "queries of one image, one key": lambda make: (
        make("q", 1, _N, _H, _D).expand(_B, _N, _H, _D),
        make("k", _B, 1, _H, _D).expand(_B, _N, _H, _D),
        make("v", _B, _N, _H, 2 * _D)[..., ::2],
    ),
    "one channel": lambda make: (
        *(make(x, _B, _N, _H, 1).expand(_B, _N, _H, _D) for x in "qk"),
        make("v", _B, _N, _H, 1).expand(_B, _N, _H, _D),
    ),
    "not aligned": lambda make: (
        make("q", _B, _N, _H, _D + 1)[..., 1:],
        make("k", _B, _N + 1, _H, _D)[:, 1:],
        make("v", _B, _N, _H + 1, _D + 3)[:, :, 1:, 2:-1],
    ),
}
_BIASES: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "expanded over images": lambda make: make("b", 1, _H, _N, _N).expand(_B, _H, _N, _N),
    "expanded over heads": lambda make: make("b", _B, 1, _N, _N).expand(_B, _H, _N, _N),
    "one row": lambda make: make("b", 1, _H, 1, _N).expand(1, _H, _N, _N),
    "one column": lambda make: make("b", _B, _H, _N, 1).expand(_B, _H, _N, _N),
    "transposed": lambda make: make("b", _B, _H, _N, _N).mT,
    "heads last": lambda make: make("b", _N, _N, _H).permute(2, 0, 1)[None],
    "every second column": lambda make: make("b", 1, _H, _N, 2 * _N)[..., ::2],
    "a corner of a larger one": lambda make: make("b", _B, _H, _N + 3, _N + 5)[..., 2:-1, 4:-1],
}
_KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda keep: torch.stack([keep, 1 - keep], dim=-1)[..., 0],
    "transposed": lambda keep: keep.T.contiguous().T,
    "expanded over images": lambda keep: keep[:1].expand(_B, -1),
    "all from one": lambda keep: torch.ones_like(keep[:1, :1]).expand(_B, _N - 1),
    "with the prefix": lambda keep: torch.nn.functional.pad(keep, (1, 0), value=1.0)[:, 1:],
}


def _maker(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    return lambda name, *shape: random(f"{name} {shape}", shape, dtype, device)


def _assert_strides_do_not_matter(
    values: dict[str, Any], kind: str = "random", tolerance: float | None = None
) -> None:
    """The same as with contiguous copies of all arguments and incoming gradients."""
    names = [name for name in ("q", "k", "v", "keep", "bias") if values.get(name) is not None]
    dense = {name: values[name].clone(memory_format=torch.contiguous_format) for name in names}
    results = []
    for arguments, copy in ((values, False), (values | dense, True)):
        call, leaves = with_leaves(arguments, *names)
        outputs = attention_stats(**call)
        sent = cotangents(outputs, kind)
        if copy:
            sent = [x.clone(memory_format=torch.contiguous_format) for x in sent]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, sent)])
    if tolerance is None:
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(values["q"].dtype, 2e-2)
    for number, (mine, theirs) in enumerate(zip(*results, strict=True)):
        limit = tolerance if mine.dtype == values["q"].dtype else max(tolerance, 1e-5)
        assert_close(mine, theirs, limit, f"output or gradient {number}")
    assert all(value.any() for value in results[1][4:])  # gradients of v, keep and bias


def _three(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    make = _maker(dtype, device)
    q, k, v = _VIEWS["packed"](make)
    return {"q": q, "k": k, "v": v, "keep": _mask(_B, _N - 1, dtype, device)}


_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("view", _VIEWS.values(), ids=_VIEWS)
def test_any_strides_of_q_k_and_v(
    view: Any, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = view(_maker(dtype, device))
    assert q.shape == k.shape == v.shape == (_B, _N, _H, _D)
    assert not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous())
    keep = _mask(_B, _N - 1, dtype, device) if masked else None
    _assert_strides_do_not_matter({"q": q, "k": k, "v": v, "keep": keep})


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("view", _BIASES.values(), ids=_BIASES)
def test_any_strides_of_the_bias(view: Any, dtype: torch.dtype, device: torch.device) -> None:
    bias = view(_maker(dtype, device))
    assert not bias.is_contiguous()
    _assert_strides_do_not_matter(_three(dtype, device) | {"bias": bias})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("view", _KEEPS.values(), ids=_KEEPS)
def test_any_strides_of_the_mask(view: Any, dtype: torch.dtype, device: torch.device) -> None:
    """With q in float32, so that masks of another dtype are strided too."""
    keep = view(_mask(_B, _N - 1, dtype, device))
    assert keep.shape == (_B, _N - 1) and not keep.is_contiguous()
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    _assert_strides_do_not_matter(
        _three(torch.float32, device) | {"keep": keep}, tolerance=tolerance
    )


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("kind", ["expanded", "transposed", "partial"])
def test_any_strides_of_incoming_gradients(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    bias = _BIASES["transposed"](_maker(dtype, device))
    _assert_strides_do_not_matter(_three(dtype, device) | {"bias": bias}, kind)


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_meet_under_autocast(ambient: torch.dtype, device: torch.device) -> None:
    """q and k normalised in float32 beside a 16-bit v, as qk_norm gives them under autocast."""
    q, k, v = _qkv(2, 9, 2, 8, torch.float32, device)
    keep = _mask(2, 8, torch.float32, device).requires_grad_()
    with torch.amp.autocast(device.type, dtype=ambient):
        out, stats = attention_stats(q, k, v.to(ambient), keep)
    expected = attention_stats(q.to(ambient), k.to(ambient), v.to(ambient), keep)
    assert out.dtype == ambient and stats.dtype == torch.float32
    assert_same_bits(out, expected[0])
    assert_same_bits(stats, expected[1])
    out.float().sum().backward()
    assert keep.grad.dtype == torch.float32 and keep.grad.any()
    with pytest.raises(TypeError, match="v must be float32"):
        attention_stats(q, k, v.to(ambient))


def test_a_table_without_gradients_in_inference_mode(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(2, 9, 2, 8, device=device))
    with torch.inference_mode():
        outputs = tensors(attention_stats(q, k, v, _mask(2, 8, device=device).requires_grad_()))
    assert not any(value.requires_grad for value in outputs)


# ---- what only the kernels can; torch's own operators do not pass from here on -------------------


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bias", ["one", "each"])
@pytest.mark.parametrize(("count", "batch", "heads"), [(197, 1, 1), (50, 3, 3), (33, 2, 5)])
def test_one_two_and_four_threads_give_the_same_bits(
    count: int, batch: int, heads: int, bias: str, dtype: torch.dtype
) -> None:
    case = case_of(count=count, batch=batch, heads=heads, dim=40, masked=True, bias=bias)
    values = build(case, dtype, "cpu")
    results = []
    for number in (1, 2, 4):
        with threads(number):
            results.append(_everything(values))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(two, one)


@pytest.mark.parametrize("sink", [5.0, 9.0])
def test_variances_are_right_beside_a_sink(sink: float, device: torch.device) -> None:
    """A class token that takes 43 or 98 % of every row moves the means far from 1/n."""
    values = build(case_of(count=197, dim=64, bias="one"), torch.float32, device)
    values["q"] = values["q"] * 6e-3
    values["bias"] = torch.zeros_like(values["bias"])
    values["bias"][..., 0] = sink
    exact = attention_stats_reference(**to_dtype(values, torch.float64))[1][:, 1:]
    actual = attention_stats(**values)[1][:, 1:].double()
    assert exact[..., 1].min() > (0.4 if sink == 5.0 else 0.95)
    for column in (3, 5):
        truth = exact[..., column]
        assert truth.min() > 1e-13 and truth.max() < 1e-9
        error = (actual[..., column] / truth - 1).square().mean().sqrt().item()
        assert error < 1e-4, f"{NAMES[column]}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("output", "name"),
    [
        *((0, name) for name in ("q", "k", "v", "keep", "bias")),
        *((1, x) for x in ("q", "k", "bias")),
    ],
)
def test_there_are_no_second_derivatives(output: int, name: str, device: torch.device) -> None:
    values = build(case_of(masked=True, bias="one"), torch.float64, device)
    call, (leaf,) = with_leaves(values, name)
    loss = attention_stats(**call)[output].square().sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert first.any()
    words = "attention_stats is differentiable once.*attention_stats_reference"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(first.sum(), leaf)


_MEMORY = """
import json, sys
import torch
import spot_ext

torch.set_num_threads(2)

def scratch(call, count, masked):
    q, k, v = (torch.randn(2, count, 6, 64).requires_grad_() for _ in range(3))
    leaves, keep = [q, k, v], None
    if masked:
        keep = (torch.rand(2, count - 1) < 0.7).float().requires_grad_()
        leaves.append(keep)
    forward, outputs = rise(lambda: call(q, k, v, keep))
    sent = [torch.randn_like(x) for x in outputs]
    backward, grads = rise(lambda: torch.autograd.grad(outputs, leaves, sent))
    lse = 2 * count * 6
    forward -= 4 * (sum(x.numel() for x in outputs) + lse)
    return forward, backward - 4 * sum(x.numel() for x in grads)

found = []
for call in (spot_ext.attention_stats, spot_ext.attention_stats_reference):
    scratch(call, 65, sys.argv[1] == "True")
    found.append(scratch(call, 1025, sys.argv[1] == "True"))
print(json.dumps(found))
"""


@pytest.mark.parametrize("masked", [False, True])
def test_no_map_is_ever_in_memory(masked: bool) -> None:
    """Peak resident size beyond results, of 12 maps of 1025 x 1025: at most 0.05 of their bytes."""
    maps = 2 * 6 * 1025 * 1025 * 4
    kernel, reference = json.loads(
        crash_free(MEASURE_MEMORY + _MEMORY, str(masked))
    )  # forward, backward
    assert min(reference) > maps, "the measurement does not see maps where there are some"
    assert max(kernel) <= 0.05 * maps, f"forward, backward: {kernel} bytes"


# -- straight through torch.ops


def _op_values(op: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Legal arguments of the op or of its backward op, in the order of the schema."""
    values = build(case_of(count=23, masked=True, bias="one"), dtype, device)
    values["scale"] = 0.3
    order = ("q", "k", "v", "keep", "bias", "scale", "num_prefix", "class_token")
    forward = {name: values[name] for name in order} | {"need_stats": True}
    if op == "attention_stats":
        return forward
    with torch.no_grad():
        out, stats, lse = torch.ops.spot.attention_stats(*forward.values())
    grad_out, grad_stats = cotangents((out, stats))
    first = {"grad_out": grad_out, "grad_stats": grad_stats}
    results = {"out": out, "stats": stats, "lse": lse}
    tensors_of = {name: forward[name] for name in order[:5]}
    rest = {name: forward[name] for name in order[5:]}
    return first | tensors_of | results | rest | {"keep_grad": True, "bias_grad": True}


@pytest.mark.parametrize("dtype", FLOATING)
def test_the_backward_op_gives_all_gradients(dtype: torch.dtype, device: torch.device) -> None:
    backward = torch.ops.spot.attention_stats_backward
    values = _op_values("attention_stats_backward", dtype, device)
    grads = backward(*values.values())
    names = ("q", "k", "v", "keep", "bias")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [grad.dtype for grad in grads] == [dtype] * 3 + [wide] * 2
    assert all(grad.is_contiguous() for grad in grads)
    keywords = {x: values[x] for x in (*names, "scale", "num_prefix", "class_token")}
    for grad_stats in (values["grad_stats"], None):
        call, leaves = with_leaves(to_dtype(keywords, torch.float64), *names)
        outputs = attention_stats_reference(**call)
        sent = [values["grad_out"], torch.zeros_like(outputs[1]) if grad_stats is None
                else grad_stats]  # fmt: skip
        exact = torch.autograd.grad(outputs, leaves, [x.double() for x in sent])
        grads = backward(*(values | {"grad_stats": grad_stats}).values())
        for name, grad, truth in zip(names, grads, exact, strict=True):
            error = ((grad.double() - truth).norm() / truth.norm()).item()
            limit = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-2)
            assert grad.shape == truth.shape and error < limit, f"{name}: error {error:.1e}"


def test_the_backward_op_gives_what_is_asked_for(device: torch.device) -> None:
    backward = torch.ops.spot.attention_stats_backward
    values = _op_values("attention_stats_backward", torch.float32, device)
    everything = backward(*values.values())
    for keep_grad in (False, True):
        for bias_grad in (False, True):
            flags = {"keep_grad": keep_grad, "bias_grad": bias_grad}
            grads = backward(*(values | flags).values())
            asked = (True, True, True, keep_grad, bias_grad)
            for grad, all_of_it, wanted in zip(grads, everything, asked, strict=True):
                if wanted:
                    assert_close(grad, all_of_it, 1e-6)
                else:
                    assert grad.numel() == 0
    # Without grad_stats the statistics are not read: a forward pass without them left none.
    empty = {"grad_stats": None, "stats": values["stats"].new_empty(0)}
    expected = backward(*(values | {"grad_stats": None}).values())
    for grad, other in zip(backward(*(values | empty).values()), expected, strict=True):
        assert_same_bits(grad, other)


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
    values = _op_values(op, torch.float32, device)
    getattr(torch.ops.spot, op)(*values.values())  # as they are, they are legal
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"spot::{op}: .*{message}"):
        getattr(torch.ops.spot, op)(*(values | {name: make(values)}).values())


@pytest.mark.parametrize("dim", [0, 257])
@pytest.mark.parametrize("op", ["attention_stats", "attention_stats_backward"])
def test_errors_name_the_largest_head_dim(op: str, dim: int, device: torch.device) -> None:
    values = _op_values(op, torch.float32, device)
    for name in {"q", "k", "v", "out", "grad_out"} & set(values):
        values[name] = torch.zeros(2, 23, 2, dim, device=device)
    message = f"spot::{op}: .*head dim of q must be between 1 and 256, got {dim}"
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(torch.ops.spot, op)(*values.values())


@pytest.mark.parametrize("op", ["attention_stats", "attention_stats_backward"])
@pytest.mark.parametrize("odd", [0.5, 2.0, -1.0, 1.0 - 2**-24, math.nan, math.inf])
def test_ops_refuse_a_mask_that_is_not_binary(odd: float, op: str) -> None:
    """On the CPU; one entry is enough, here the last."""
    values = _op_values(op, torch.float32, torch.device("cpu"))
    values["keep"][-1, -1] = odd
    with pytest.raises((RuntimeError, ValueError), match=f"spot::{op}: keep must be .*0 or 1"):
        getattr(torch.ops.spot, op)(*values.values())
