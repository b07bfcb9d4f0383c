"""What has no say in the results of both attention ops: dropped tokens, order, odd neighbours."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from ops.attention.drawn import DENSE, SPARSE, Attention, by_attention, by_options, case_of, cases
from support.comparison import assert_close, assert_same_bits
from support.data import FLOATING, random_index
from support.memory import MEASURE_MEMORY, crash_free
from support.slow import most_slow
from support.switches import emulated, threads
from torch import Tensor

from spot_ext import compact_tokens


def renamed(index: Tensor, rows: Tensor) -> Tensor:
    """The lists [H, N, K] of the tokens `rows` alone, by their new places; -1 behind them."""
    place = {old: new for new, old in enumerate(rows.tolist())}
    lists = [[place[j] for j in row if j in place] for row in index.flatten(0, 1).tolist()]
    wide = max(map(len, lists), default=0)
    lists = [row + [-1] * (wide - len(row)) for row in lists]
    shape = (*index.shape[:2], wide)
    return torch.tensor(lists, dtype=torch.int32, device=index.device).view(shape)


@by_attention
@given(cases())
def test_masked_equals_compacted(
    attention: Attention, device: torch.device, case: dict[str, Any]
) -> None:
    """The claim that masked training rests on: same result as with the dropped tokens gone."""
    values = attention.build(case | {"masked": True}, torch.float64, device)
    prefix, keep = case["num_prefix"], values["keep"]
    out, stats = attention(values)
    for image in range(case["batch"]):
        kept = keep[image].nonzero().T.contiguous()
        rows = torch.cat([torch.arange(prefix, device=device), kept[0] + prefix])
        part = {name: compact_tokens(values[name][image : image + 1].contiguous(), kept, prefix)
                for name in "qkv"}  # fmt: skip
        part |= {name: values[name] for name in ("scale", "num_prefix", "class_token")}
        if attention is SPARSE:
            part["index"] = renamed(values["index"][image][:, kept[0]], rows)[None]
        elif values["bias"] is not None:
            bias = values["bias"]
            bias = bias[min(image, bias.shape[0] - 1)][None]
            part["bias"] = bias[:, :, rows][:, :, :, rows]
        fewer_out, fewer_stats = attention(part)
        assert_close(out[image, rows], fewer_out[0], 1e-10, "out")
        assert_close(stats[image, rows], fewer_stats[0], 1e-10, "stats")


@by_attention
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dropped_token_is_seen_by_no_other(
    dtype: torch.dtype, attention: Attention, device: torch.device
) -> None:
    values = attention.build(case_of(count=35, named=12), dtype, device)
    values["keep"] = torch.ones(2, 34, device=device, dtype=dtype)
    values["keep"][:, [3, 20, 33]] = 0
    if attention is SPARSE:
        values["index"][:, :, 20, 0] = 21  # its own row names it
        values["index"][:, :, 20, 1:] = torch.arange(11, device=device).int()
    out, stats = attention(values)
    others = [i for i in range(35) if i != 21]
    for name, odd in itertools.product("qkv", (7.5, math.nan)):
        # The dense definition multiplies values and rows of dropped tokens by zero.
        spread = attention is DENSE and math.isnan(odd)
        if spread and name == "v":
            continue
        changed = values[name].clone()
        changed[:, 21] = odd
        again, again_stats = attention(values | {name: changed})
        assert_same_bits(again[:, others], out[:, others])
        if not spread:
            assert_same_bits(again_stats[:, others], stats[:, others])
        if odd == 7.5:
            assert_same_bits(again_stats, stats)
        assert (again[:, 21] != out[:, 21]).any()  # its own row sees it


@by_attention
@pytest.mark.parametrize("masked", [False, True])
def test_permuting_patches_permutes_the_result(
    masked: bool, attention: Attention, device: torch.device
) -> None:
    for count in (15, 30):
        case = case_of(count=count, num_prefix=2, masked=masked, order="padded")
        values = attention.build(case, torch.float64, device)
        patches = count - 2
        order = random_index("order", 1, patches, patches, "shuffled", device)[0]
        rows = torch.cat([torch.arange(2, device=device), order + 2])
        moved = values | {name: values[name][:, rows] for name in "qkv"}
        if masked:
            moved["keep"] = values["keep"][:, order]
        if attention is SPARSE:
            names = rows.argsort()  # old position -> new one
            named = values["index"][:, :, order]
            moved["index"] = torch.where(named < 0, -1, names[named.clamp(min=0).long()]).int()
        out, stats = attention(values)
        assert_close(attention(moved), (out[:, rows], stats[:, rows]), 1e-12)


@by_attention
def test_images_and_heads_do_not_mix(attention: Attention, device: torch.device) -> None:
    for count in (9, 17):
        case = case_of(batch=3, heads=4, masked=True, count=count)
        values = attention.build(case, torch.float64, device)
        out, stats = attention(values)
        for image, head in itertools.product(range(3), range(4)):
            part = {x: values[x][image : image + 1, :, head : head + 1] for x in "qkv"}
            part["keep"] = values["keep"][image : image + 1]
            if attention is SPARSE:
                part["index"] = values["index"][image : image + 1, head : head + 1]
            assert_close(attention(part), (out[image : image + 1, :, head : head + 1],
                                           stats[image : image + 1, :, head : head + 1]),
                         1e-12)  # fmt: skip


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


@by_options(
    [{"name": name} for name in ("q", "k", "v", "bias", "bias of one")],
    [{"name": name} for name in "qkv"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_stays_in_its_image_and_head(
    masked: bool,
    dtype: torch.dtype,
    attention: Attention,
    own: dict[str, str],
    device: torch.device,
) -> None:
    """Everything of other images and heads has the same bits as without it."""
    name = own["name"]
    bias = "one" if "one" in name else "each"
    case = case_of(batch=3, heads=3, count=41, masked=masked, dim=16, bias=bias, named=10)
    values = attention.build(case, dtype, device)
    if masked:
        values["keep"][:, 19] = 1  # token 20 is seen
    leaves = [leaf for leaf in attention.leaves if values[leaf] is not None]
    clean, odd = (
        dict(zip(("out", "stats", *leaves), attention.everything(arguments), strict=True))
        for arguments in (values, _with_nan(values, name))
    )
    assert all(value.isfinite().all() for value in clean.values())
    hit = torch.zeros(3, 3, dtype=torch.bool, device=device)  # [B, H]
    hit[[0, 1, 2] if "one" in name else [1], 1] = True
    assert odd["out"][1, :, 1].isnan().any() and odd["q"][1, :, 1].isnan().any()
    for part in ("out", "stats", "q", "k", "v"):  # [B, N, H, ...]
        one, other = odd[part].transpose(1, 2), clean[part].transpose(1, 2)
        assert_same_bits(one[~hit], other[~hit], part)
    if "one" in name:
        assert_same_bits(odd["bias"][:, [0, 2]], clean["bias"][:, [0, 2]])
    elif attention is DENSE:
        assert_same_bits(odd["bias"][~hit], clean["bias"][~hit])
    if masked and "one" not in name:
        assert_same_bits(odd["keep"][[0, 2]], clean["keep"][[0, 2]])


# ---- the same bits -------------------------------------------------------------------------------


@by_options([{"bias": "one", "batch": 3}, {"bias": "each", "batch": 3}], [{"named": 9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_repeats_give_the_same_bits(
    dtype: torch.dtype, attention: Attention, own: dict[str, Any], device: torch.device
) -> None:
    values = attention.build(case_of(count=35, heads=5, masked=True, **own), dtype, device)
    expected = torch.cat([value.double().flatten() for value in attention.everything(values)])
    assert expected.isfinite().all() and expected.any()
    for _ in range(20 if emulated() else 1000):
        actual = torch.cat([value.double().flatten() for value in attention.everything(values)])
        assert torch.equal(actual.view(torch.int64), expected.view(torch.int64))


@by_options(
    [{"bias": bias} for bias in ("one", "each")],
    [{"order": order} for order in ("ascending", "shuffled", "padded")],
)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("count", "batch", "heads"), [(197, 1, 1), (50, 3, 3), (33, 2, 5)])
def test_any_number_of_threads_gives_the_same_bits(
    count: int,
    batch: int,
    heads: int,
    dtype: torch.dtype,
    attention: Attention,
    own: dict[str, str],
) -> None:
    case = case_of(count=count, batch=batch, heads=heads, named=count // 3, dim=40, masked=True,
                   **own)  # fmt: skip
    values = attention.build(case, dtype, "cpu")
    results = []
    for number in (1, 2, 3, 4):
        with threads(number):
            results.append(attention.everything(values))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(two, one)


# ---- memory --------------------------------------------------------------------------------------

_MEMORY = """
import json, sys
import torch
import spot_ext

torch.set_num_threads(2)
name, masked = sys.argv[1], sys.argv[2] == "True"

def scratch(call, count):
    q, k, v = (torch.randn(2, count, 6, 64).requires_grad_() for _ in range(3))
    leaves, options = [q, k, v], {"need_stats": True}
    if masked:
        options["keep"] = (torch.rand(2, count - 1) < 0.7).float().requires_grad_()
        leaves.append(options["keep"])
    if name == "sparse_attention":
        keys = torch.rand(2, 6, count - 1, count).argsort(-1)[..., : count // 8]
        options["index"] = keys.sort(-1).values.int().contiguous()
        del keys
    forward, outputs = rise(lambda: call(q, k, v, **options))
    sent = [torch.randn_like(x) for x in outputs]
    backward, grads = rise(lambda: torch.autograd.grad(outputs, leaves, sent))
    lse = 2 * count * 6
    forward -= 4 * (sum(x.numel() for x in outputs) + lse)
    return forward, backward - 4 * sum(x.numel() for x in grads)

found = []
for call in (getattr(spot_ext, name), getattr(spot_ext, f"{name}_reference")):
    scratch(call, 65)  # warms up
    found.append(scratch(call, 1025))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("attention", "masked", "backward"),
    most_slow([(DENSE, True, 0.05), (SPARSE, False, 0.15), (DENSE, False, 0.05)], 2),
    ids=lambda value: getattr(value, "name", value),
)
def test_no_map_is_ever_in_memory(attention: Attention, masked: bool, backward: float) -> None:
    """Peak resident size beyond results, of 12 maps of 1025 x 1025: at most 0.05 of their bytes.

    An eighth of the keys is named, and the backward pass may list them by key.
    """
    maps = 2 * 6 * 1025 * 1025 * 4
    printed = crash_free(MEASURE_MEMORY + _MEMORY, attention.name, str(masked))
    kernel, reference = json.loads(printed)  # forward, backward
    assert min(reference) > maps, "the measurement does not see maps where there are some"
    assert kernel[0] <= 0.05 * maps and kernel[1] <= backward * maps, kernel
