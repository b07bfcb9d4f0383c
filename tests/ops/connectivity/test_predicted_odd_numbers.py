"""predict_connectivity with NaN, infinities and large logits."""

from __future__ import annotations

import math

import pytest
import torch
from ops.connectivity.drawn import rows_of
from ops.connectivity.predictor import by_order, exact_logits, operands
from support.comparison import assert_same_bits
from support.data import FLOATING

from spot_ext import connectivity, predict_connectivity


@by_order
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("coef_topk", [None, 8])
def test_an_odd_query_spoils_its_own_rows(
    coef_topk: int | None,
    dtype: torch.dtype,
    value: float,
    channels: int | None,
    device: torch.device,
) -> None:
    """Its logits are infinite or NaN, its coefficients NaN, and so all its columns: ties."""
    values = operands(50, dtype, device, channels)
    clean = predict_connectivity(**values, budget=12, coef_topk=coef_topk)
    odd = values["q"].clone()
    odd[1, 5, 2, 7] = value
    index = predict_connectivity(**(values | {"q": odd}), budget=12, coef_topk=coef_topk)
    assert index[1, 2, 5].tolist() == list(range(12))
    index[1, 2, 5] = clean[1, 2, 5]
    assert_same_bits(index, clean)


@by_order
@pytest.mark.parametrize("place", [0, 4, 49])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", FLOATING)
def test_an_odd_key_spoils_its_head(
    dtype: torch.dtype, value: float, place: int, channels: int | None, device: torch.device
) -> None:
    """Of its image: every sum has it."""
    values = operands(50, dtype, device, channels)
    clean = predict_connectivity(**values, budget=12)
    odd = values["k"].clone()
    odd[1, place, 2, 7] = value
    index = predict_connectivity(**(values | {"k": odd}), budget=12)
    assert (index[1, 2] == torch.arange(12, device=device)).all()
    index[1, 2] = clean[1, 2]
    assert_same_bits(index, clean)


@pytest.mark.parametrize("name", ["query_weight", "query_bias", "key_weight", "key_bias", "down"])
@pytest.mark.parametrize("channels", [8, 96])
def test_an_odd_weight_spoils_everything(channels: int, name: str, device: torch.device) -> None:
    values = operands(50, torch.float32, device, channels)
    odd = values[name].clone()
    odd.view(-1)[1] = math.nan
    index = predict_connectivity(**(values | {name: odd}), budget=12)
    assert (index == torch.arange(12, device=device)).all()


@pytest.mark.parametrize("threshold", [None, 0.02])
@pytest.mark.parametrize("dtype", FLOATING)
def test_an_odd_entry_of_up_spoils_its_column(
    dtype: torch.dtype, threshold: float | None, device: torch.device
) -> None:
    """NaN exceeds every threshold: its column is the last of all; that of infinity the first."""
    values = operands(50, dtype, device, 8)
    odd = values["up"].clone()
    odd[[0, 7, 49], [1, 3, 31]] = math.nan
    odd[20, 5] = math.inf
    values["up"] = odd
    for named in rows_of(predict_connectivity(**values, budget=47, basis_threshold=threshold)):
        assert named == set(range(50)) - {0, 7, 49}
    only = predict_connectivity(**values, budget=1, basis_threshold=threshold)
    assert (only == 20).all()


@by_order
@pytest.mark.parametrize("dtype", FLOATING)
def test_large_logits_leave_one_coefficient(
    dtype: torch.dtype, channels: int | None, device: torch.device
) -> None:
    """Softmax does not overflow: columns are those of the basis row that wins."""
    values = operands(50, dtype, device, channels)
    values["q"] = values["q"] * 1000
    logits, loss = exact_logits(values, dtype=torch.promote_types(dtype, torch.float32))
    best = logits.topk(2, dim=-1)
    clear = best.values[..., 0] - best.values[..., 1] > 1000
    assert clear.double().mean() > 0.1 and logits.max() > 5000 and loss < 1
    index = predict_connectivity(**values, budget=12)
    eye = torch.eye(32, dtype=dtype, device=device)[None, None]
    alone = connectivity(eye, values["up"].mT, 12)
    assert_same_bits(index[clear], alone[0, 0, best.indices[..., 0]][clear])


@by_order
@pytest.mark.parametrize("dtype", FLOATING)
def test_sums_of_keys_are_kept_in_float32(
    dtype: torch.dtype, channels: int | None, device: torch.device
) -> None:
    """256 + 1/4 is no number of bfloat16, and 256 * 512 none of float16."""
    q, k = (torch.zeros(1, n, 1, 32, dtype=dtype, device=device) for n in (49, 50))
    down = torch.zeros(50, 32, dtype=dtype, device=device)
    up = torch.zeros(50, 32, dtype=dtype, device=device)
    q[..., 0], k[:, :4, :, 0] = 1, torch.tensor([256.0, 0.25, 512, -512], device=device)[:, None]
    # Sums of 256 and of 256.25, beside 512 * 512 that cancel, and of far less.
    down[0, :2], down[1, 1], down[2:4, :2] = 1, 1, 512
    down[0, 2:] = -512
    up[2, 0], up[3, 1] = 1, 1
    values = {"q": q, "k": k, "down": down, "up": up}
    if channels is not None:
        eye = torch.eye(channels, 32, dtype=dtype, device=device)
        values |= {"query_weight": eye, "key_weight": eye, "query_bias": eye[:, -1] * 0,
                   "key_bias": eye[:, -1] * 0}  # fmt: skip
    index = predict_connectivity(**values, budget=2, scale=1.0)
    assert index.tolist() == [[[[2, 3]] * 49]]
    assert predict_connectivity(**values, budget=1, scale=1.0).tolist() == [[[[3]] * 49]]
