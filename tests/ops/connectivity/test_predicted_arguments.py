"""What each argument of predict_connectivity has a say in."""

from __future__ import annotations

import math

import pytest
import torch
from ops.connectivity.predictor import by_order, operands
from support.comparison import assert_same_bits
from support.data import FLOATING, generator, random, random_index
from torch import Tensor
from torch.nn import functional as F

from spot_ext import connectivity, predict_connectivity, predict_connectivity_reference


@by_order
def test_channels_of_zeros_change_nothing(channels: int | None, device: torch.device) -> None:
    """Nor the other order of products, which they make worth while."""
    values = operands(70, torch.float64, device, channels)
    expected = predict_connectivity(**values, budget=18, coef_topk=8)
    if channels is None:  # as with weights that change nothing
        channels = 32
        for name in ("query", "key"):
            values[f"{name}_weight"] = torch.eye(32, dtype=torch.float64, device=device)
            values[f"{name}_bias"] = torch.zeros(32, dtype=torch.float64, device=device)
        assert_same_bits(predict_connectivity(**values, budget=18, coef_topk=8), expected)
    scale = channels**-0.5
    for more in (1, 3, 10, 30, 200):
        wider = dict(values)
        for name in ("query", "key"):
            weight, bias = values[f"{name}_weight"], values[f"{name}_bias"]
            wider[f"{name}_weight"] = F.pad(weight, (0, 0, 0, more))
            wider[f"{name}_bias"] = F.pad(bias, (0, more))
        index = predict_connectivity(**wider, budget=18, scale=scale, coef_topk=8)
        assert_same_bits(index, expected)


@by_order
def test_the_default_scale(channels: int | None, device: torch.device) -> None:
    for dtype in FLOATING:
        values = operands(70, dtype, device, channels)
        width = 32 if channels is None else channels
        index = predict_connectivity(**values, budget=18, coef_topk=8)
        for scale, same in ((width**-0.5, True), (1.0, False), (-(width**-0.5), False)):
            other = predict_connectivity(**values, budget=18, scale=scale, coef_topk=8)
            assert torch.equal(other, index) == same
        flat = predict_connectivity(**values, budget=18, scale=0.0, coef_topk=8)
        even = torch.full((2, 6, 69, 32), 1 / 32, dtype=dtype, device=device)
        assert_same_bits(flat, connectivity(even, values["up"].mT, 18, coef_topk=8))


@pytest.mark.parametrize("name", ["query_weight", "query_bias", "key_weight", "key_bias"])
@pytest.mark.parametrize("channels", [8, 96])
def test_every_weight_has_a_say(channels: int, name: str, device: torch.device) -> None:
    values = operands(70, torch.float32, device, channels)
    index = predict_connectivity(**values, budget=18)
    other = values | {name: values[name].flip(0)}
    # Other coefficients for all heads, and other sets for most rows.
    changed = (predict_connectivity(**other, budget=18) != index).any(-1)
    assert changed.double().mean() > 0.5


@by_order
def test_predicted_alone_as_in_the_batch(channels: int | None, device: torch.device) -> None:
    """Images, heads and queries know nothing of each other."""
    values = operands(70, torch.float32, device, channels, batch=3)
    index = predict_connectivity(**values, budget=18, coef_topk=8)

    def part(images: slice, heads: slice, queries: slice) -> Tensor:
        fewer = {"q": values["q"][images, queries, heads], "k": values["k"][images, :, heads]}
        return predict_connectivity(**(values | fewer), budget=18, coef_topk=8)

    everything = slice(None)
    for b in range(3):
        for h in range(6):
            alone = part(slice(b, b + 1), slice(h, h + 1), everything)
            assert_same_bits(alone, index[b : b + 1, h : h + 1])
    for first, count in ((0, 1), (3, 1), (68, 1), (5, 33), (17, 52)):
        some = slice(first, first + count)
        assert_same_bits(part(everything, everything, some), index[:, :, some])


# ---- the basis -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [None, 0.0, 0.0125, 0.02, 1.0, -1.0])
@pytest.mark.parametrize("dtype", FLOATING)
def test_the_basis_is_up_or_what_exceeds_the_threshold(
    dtype: torch.dtype, threshold: float | None, device: torch.device
) -> None:
    values = operands(70, dtype, device, 8)
    signs = torch.randint(0, 2, (70, 32), generator=generator("signs")).to(device) * 2 - 1
    signed = values | {"up": values["up"] * signs}
    index = predict_connectivity(**signed, budget=18, basis_threshold=threshold)
    basis = signed["up"] if threshold is None else values["up"].abs()
    if threshold is not None:
        basis = torch.where(basis.double() > threshold, basis, torch.zeros_like(basis))
    made = predict_connectivity(**(values | {"up": basis}), budget=18)
    assert_same_bits(index, made)
    assert threshold is None or threshold > 0 or (index.diff(dim=-1) > 1).any()


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_an_entry_at_the_threshold_is_zero(threshold: float | None, device: torch.device) -> None:
    """The comparison is with the threshold as given, in float64 when the inputs are."""
    for level in (0.02, 0.5):
        low = torch.tensor(level, dtype=torch.float64)
        high = torch.nextafter(low, low + 1)
        up = torch.stack([low, high, -low, -high])[:, None].to(device)
        q, k = (torch.ones(1, n, 1, 1, dtype=torch.float64, device=device) for n in (3, 4))
        index = predict_connectivity(
            q, k, torch.ones_like(up), up, 4, basis_threshold=level, threshold=threshold
        )
        expected = [0, 1, 2, 3] if threshold is None else [1, 3, -1, -1]
        assert index.tolist() == [[[expected] * 3]]


# ---- keys: which are added up --------------------------------------------------------------------


@by_order
@pytest.mark.parametrize("kind", ["some", "shuffled", "repeated"])
def test_predicted_columns_gather_down_and_up(
    kind: str, channels: int | None, device: torch.device
) -> None:
    values = operands(70, torch.float32, device, channels, batch=3)
    if kind == "repeated":
        columns = torch.randint(0, 70, (3, 41), generator=generator(kind)).to(device)
    else:
        columns = random_index(kind, 3, 70, 41, "ascending" if kind == "some" else kind, device)
    values |= {"q": values["q"][:, :40], "k": values["k"][:, :41]}
    index = predict_connectivity(**values, budget=11, columns=columns, coef_topk=8)
    for image in range(3):
        own, one = columns[image], slice(image, image + 1)
        gathered = {"q": values["q"][one], "k": values["k"][one], "down": values["down"][own],
                    "up": values["up"][own]}  # fmt: skip
        alone = predict_connectivity(**(values | gathered), budget=11, coef_topk=8)
        assert_same_bits(index[one], alone)
        # Rows of down that no token names have no say.
        odd = values["down"].clone()
        odd[[t for t in range(70) if t not in own.tolist()]] = math.nan
        again = predict_connectivity(**(values | {"down": odd}), budget=11, columns=columns,
                                     coef_topk=8)  # fmt: skip
        assert_same_bits(again[one], index[one])


@by_order
def test_permuting_tokens_and_columns_permutes_the_sets(
    channels: int | None, device: torch.device
) -> None:
    values = operands(70, torch.float64, device, channels)
    more = random("no ties", (70, 32), torch.float64, device).abs()
    values["up"] = values["up"] + 1e-3 * more
    order = random_index("tokens", 2, 70, 70, "shuffled", device)
    index = predict_connectivity(**values, budget=18, coef_topk=8)
    rows = order[:, :, None, None].expand(values["k"].shape)
    moved = values | {"k": values["k"].gather(1, rows)}
    named = predict_connectivity(**moved, budget=18, columns=order, coef_topk=8)
    back = order[:, None, None].expand(2, 6, 69, -1).gather(-1, named.long())
    assert_same_bits(back.sort(-1).values.to(torch.int32), index)


@by_order
def test_predicted_masked_names_the_keys_that_compacted_names(
    channels: int | None, device: torch.device
) -> None:
    """Dropped keys are not added up, and their rows of `down` and columns are not there."""
    values = operands(70, torch.float64, device, channels)
    kept = random_index("kept", 2, 69, 40, device=device)
    keep = torch.zeros(2, 69, device=device).scatter(1, kept, 1)
    masked = predict_connectivity(**values, budget=18, keep=keep, coef_topk=8)
    columns = torch.cat([kept.new_zeros(2, 1), kept + 1], dim=1)
    q, k = (
        x.gather(1, rows[:, :, None, None].expand(-1, -1, 6, 32))
        for x, rows in ((values["q"], kept), (values["k"], columns))
    )
    fewer = predict_connectivity(**(values | {"q": q, "k": k}), budget=18, columns=columns,
                                 coef_topk=8)  # fmt: skip
    assert (fewer >= 0).all()
    named = columns[:, None, None].expand(2, 6, 40, -1).gather(-1, fewer.long()).int()
    assert_same_bits(masked.gather(2, kept[:, None, :, None].expand(2, 6, 40, 18)), named)
    everything = predict_connectivity(**values, budget=18, keep=torch.ones_like(keep), coef_topk=8)
    assert_same_bits(everything, predict_connectivity(**values, budget=18, coef_topk=8))
    assert not torch.equal(everything, masked)


@by_order
@pytest.mark.parametrize("dtype", FLOATING)
def test_dropped_keys_have_no_say(
    dtype: torch.dtype, channels: int | None, device: torch.device
) -> None:
    """Not even with numbers that would spoil all sums."""
    values = operands(70, dtype, device, channels)
    keep = (torch.rand((2, 69), generator=generator("mask")) < 0.6).to(device, dtype)
    index = predict_connectivity(**values, budget=12, keep=keep, coef_topk=8)
    for value in (math.nan, math.inf, 1e4):
        k = values["k"].clone()
        k[:, 1:][keep == 0] = value
        odd = predict_connectivity(**(values | {"k": k}), budget=12, keep=keep, coef_topk=8)
        assert_same_bits(odd, index)
    for kind in FLOATING:
        other = predict_connectivity(**values, budget=12, keep=keep.to(kind), coef_topk=8)
        assert_same_bits(other, index)
    gone = 1 + (keep.sum(0) == 0).nonzero().flatten()  # of both images
    assert len(gone) > 3
    down = values["down"].clone()
    down[gone] = math.nan
    for call in (predict_connectivity, predict_connectivity_reference):
        clean = call(**values, budget=12, keep=keep, coef_topk=8)
        odd = call(**(values | {"down": down}), budget=12, keep=keep, coef_topk=8)
        assert_same_bits(odd, clean)


@by_order
def test_fused_tokens_are_not_added_up_and_compete_at_zero(
    channels: int | None, device: torch.device
) -> None:
    """Columns beyond the grid: as columns whose rows of `down` and `up` are zero."""
    values = operands(70, torch.float64, device, channels)
    columns = torch.arange(70, device=device).repeat(2, 1)
    columns[0, 5], columns[1, 69] = 70, 70
    index = predict_connectivity(**values, budget=60, columns=columns, coef_topk=8)
    for image, place in ((0, 5), (1, 69)):
        zeroed = {name: values[name].clone() for name in ("down", "up")}
        for value in zeroed.values():
            value[place] = 0
        alone = predict_connectivity(**(values | zeroed), budget=60, coef_topk=8)
        assert_same_bits(alone[image], index[image])
        odd = values["k"].clone()
        odd[image, place] = math.nan
        again = predict_connectivity(**(values | {"k": odd}), budget=60, columns=columns,
                                     coef_topk=8)  # fmt: skip
        assert_same_bits(again, index)
        every = predict_connectivity(**values, budget=70, columns=columns, threshold=-1e-9)
        assert (every[image] == place).any(-1).all()
        above = predict_connectivity(**values, budget=70, columns=columns, threshold=0.0)
        assert not (above[image] == place).any()
