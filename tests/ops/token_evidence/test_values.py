"""token_evidence: logarithms, odd numbers, positions, who else is there."""

from __future__ import annotations

import pytest
import torch
from ops.cases.token_evidence import Evidence, statistics
from support.comparison import assert_close, assert_same_bits
from support.data import random
from support.switches import isa, isa_control, threads

import spot_ext


@pytest.mark.parametrize("name", isa_control().isas())
def test_logarithms_are_within_two_units(name: str) -> None:
    drawn = random("exponents", (4, 50, 20, 6), torch.float64).abs()
    x = (2.0 ** (40 * drawn.sin() - 20)).float()
    x[2:] = -(2.0 ** (-20 * drawn[2:].cos().abs())).float()
    x = x.clamp(min=-0.999999)
    with isa(name):
        made = spot_ext.token_evidence([x], [50], [0], [], scaling="log1p", moments=False)
        scaled = spot_ext.token_evidence([x], [50], [0], [], scaling="n", moments=False)
    inside = scaled > -1
    exact = scaled.double().log1p()
    unit = exact.float().nextafter(torch.tensor(torch.inf)) - exact.float()
    wrong = (made.double() - exact).abs()[inside] / unit.abs().double()[inside]
    assert wrong.max() < 2.2 and inside.sum() > 10000
    assert made[scaled < -1].isnan().all()


def test_odd_numbers_are_those_of_torch_and_stay_in_their_token() -> None:
    inf, nan = torch.inf, torch.nan
    odd = torch.tensor([-1.0, -2.0, inf, -inf, nan, 3e38, 2.0**121, -0.0, 1e-42, -0.9999999])
    stats = [statistics(f"{i}", 1, 0, 12, 5, torch.float32, "cpu") for i in range(3)]
    clean = spot_ext.token_evidence(stats, [12] * 3, [0] * 3, [])
    for value in odd:
        dirty = [x.clone() for x in stats]
        dirty[2][0, 7, 1, 4] = value / 12
        made = spot_ext.token_evidence(dirty, [12] * 3, [0] * 3, [])
        expected = spot_ext.token_evidence_reference(dirty, [12] * 3, [0] * 3, [])
        torch.testing.assert_close(made, expected, rtol=2e-6, atol=1e-9, equal_nan=True)
        others = [t for t in range(12) if t != 7]
        assert_same_bits(made[:, others], clean[:, others], f"beside {value}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 12, 16])
def test_a_token_is_the_same_in_any_company(heads: int, dtype: torch.dtype) -> None:
    case = Evidence("company", 3, (50, 31, 20), (0, 0, 1, 1, 2), heads=heads)
    stats, counts, followed, cuts = case.args("cpu", dtype)[:4]
    whole = spot_ext.token_evidence(stats, counts, followed, cuts)
    for count in (1, 2, 3, 7):
        with threads(count):
            assert_same_bits(spot_ext.token_evidence(stats, counts, followed, cuts), whole)
    part = [*cuts[:1], cuts[1][:, 4:7]]
    last = slice(0, 4)  # the block behind the last cut has other tokens
    alone = spot_ext.token_evidence(stats[last], counts[last], followed[last], part)
    full = spot_ext.token_evidence(stats[last], counts[last], followed[last], cuts)
    assert_same_bits(alone, full[:, 4:7])
    for image in range(3):
        one = [x[image : image + 1] for x in stats], [x[image : image + 1] for x in cuts]
        assert_same_bits(
            spot_ext.token_evidence(one[0], counts, followed, one[1]), whole[image : image + 1]
        )


def test_positions_may_repeat_and_come_in_any_order() -> None:
    stats = [statistics(f"{i}", 1, 2, 9, 2, torch.float64, "cpu") for i in range(2)]
    cuts = [torch.tensor([[8, 0, 8, 3]]), torch.tensor([[3, 2, 0, 0, 1]])]
    made = spot_ext.token_evidence(stats, [9, 9], [0, 0], cuts)
    every = spot_ext.token_evidence(stats, [9, 9], [0, 0], [])
    assert_same_bits(made, every[:, [3, 8, 8, 8, 0]])


def test_cuts_that_no_block_asks_are_not_read() -> None:
    stats = [statistics("x", 2, 1, 5, 2, torch.float32, "cpu")]
    cuts = [torch.full((2, 7), 2**50), torch.tensor([[0, 2], [4, 1]])]
    made = spot_ext.token_evidence(stats, [5], [1], cuts)
    assert_same_bits(made, spot_ext.token_evidence(stats, [5], [0], cuts[1:]))


def test_the_layout_of_columns() -> None:
    """[latest | mean | variance], each by head and then by statistic."""
    stats = [statistics(f"{i}", 1, 0, 4, 3, torch.float64, "cpu") for i in range(5)]
    made = spot_ext.token_evidence(stats, [4] * 5, [0] * 5, [], scaling="raw", latest=(2, 6))
    window = torch.stack(stats)
    assert made.shape == (1, 4, 3 * (4 + 12))
    assert_close(made[..., :12].unflatten(-1, (3, 4)), stats[-1][..., 2:])
    assert_close(made[..., 12:30].unflatten(-1, (3, 6)), window.mean(0))
    assert_close(made[..., 30:].unflatten(-1, (3, 6)), window.var(0, correction=0))


def test_tuples_and_numpys_integers_will_do() -> None:
    import numpy as np

    stats, counts, followed, cuts = Evidence("plain").args("cpu", torch.float32)[:4]
    expected = spot_ext.token_evidence(stats, counts, followed, cuts)
    others = tuple(map(np.int64, counts)), tuple(map(np.int64, followed))
    made = spot_ext.token_evidence(tuple(stats), *others, tuple(cuts), latest=[0, 6])  # type: ignore[arg-type]
    assert_same_bits(made, expected)


def test_a_gradient_is_refused_and_without_one_all_is_well() -> None:
    stats, counts, followed, cuts = Evidence("plain").args("cpu", torch.float64)[:4]
    expected = spot_ext.token_evidence(stats, counts, followed, cuts)
    for number in range(len(stats)):
        asked = [x.detach().requires_grad_(i == number) for i, x in enumerate(stats)]
        made = spot_ext.token_evidence(asked, counts, followed, cuts)
        with pytest.raises(RuntimeError, match="spot::token_evidence is for inference"):
            made.sum().backward()
        with torch.no_grad():
            assert_same_bits(spot_ext.token_evidence(asked, counts, followed, cuts), expected)
    asked = [x.detach().requires_grad_() for x in stats]
    with spot_ext.definitions():
        spot_ext.token_evidence(asked, counts, followed, cuts).sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in asked)


def test_latest_is_a_pair() -> None:
    stats, counts, followed, cuts = Evidence("plain").args("cpu", torch.float32)[:4]
    for latest in (6, (0, 2, 6), None, "06"):
        with pytest.raises(TypeError, match="latest must be a pair"):
            spot_ext.token_evidence(stats, counts, followed, cuts, latest=latest)  # type: ignore[arg-type]
