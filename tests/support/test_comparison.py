"""The assertions of the op tests fail when they should."""

from __future__ import annotations

import math

import pytest
import torch
from support.comparison import (
    BACKWARD,
    assert_accurate,
    assert_close,
    assert_gradient,
    assert_same_bits,
    bits,
    error_bound,
)
from support.data import FLOATING, ROW_DTYPES, random, random_bits


def fails(match: str):
    return pytest.raises(AssertionError, match=match)


# ---- bits ----------------------------------------------------------------------------------------


def test_bits_tell_apart_what_equality_does_not() -> None:
    zero = torch.tensor([[0.0, 1.0]])
    assert torch.equal(zero, -zero * torch.tensor([1.0, -1.0]))
    with fails("bytes differ"):
        assert_same_bits(-zero * torch.tensor([1.0, -1.0]), zero)
    quiet = torch.tensor([[0x7FC00000, 0]], dtype=torch.int32).view(torch.float32)
    payload = torch.tensor([[0x7FC00001, 0]], dtype=torch.int32).view(torch.float32)
    assert_same_bits(quiet, quiet.clone())
    with fails("bytes differ"):
        assert_same_bits(payload, quiet)


def test_same_bits_wants_shape_and_dtype() -> None:
    value = torch.arange(6).reshape(2, 3)
    with fails("shape"):
        assert_same_bits(value, value.reshape(3, 2))
    with fails("dtype"):
        assert_same_bits(value, value.int())
    with fails("on meta"):
        assert_same_bits(value.to("meta"), value)
    with fails("first at"):
        assert_same_bits(value, value + (value == 5))
    with fails("bytes differ"):
        assert_same_bits(torch.tensor(1.0), torch.tensor(2.0))
    empty = torch.empty((0, 2**62, 1), dtype=torch.uint16)
    assert_same_bits(empty, empty.clone())


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_bits_see_every_byte(dtype: torch.dtype) -> None:
    value = random_bits("value", (2, 3, 4), dtype)
    seen = bits(value)
    assert seen.shape == (2, 3, 4 * dtype.itemsize)
    if dtype != torch.bool:
        back = seen.reshape(-1).view(dtype).reshape(2, 3, 4)
        assert_same_bits(back, value)
        for byte in range(dtype.itemsize):
            other = seen.clone()
            other[1, 2, byte] ^= 1
            with fails("1 bytes differ"):
                assert_same_bits(other.reshape(-1).view(dtype).reshape(2, 3, 4), value)
    assert bits(value[:, :0]).shape == (2, 0, 4 * dtype.itemsize)


# ---- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_error_rule(dtype: torch.dtype) -> None:
    exact = random("exact", (50,), torch.float64) + 3
    plain = exact.to(dtype)
    assert_accurate(plain, plain, exact)
    bound = error_bound(plain, exact, 2.0)
    unit = torch.finfo(dtype).eps * exact.abs().max().item()
    worst = (plain.double() - exact).abs().max().item()
    assert worst <= unit < bound <= (2 if dtype.itemsize == 2 else 13.1) * unit
    wrong = plain.clone()
    wrong[7] += 3 * bound
    with fails(r"error .* above .* at \[7\]"):
        assert_accurate(wrong, plain, exact)
    less = exact.clone()
    less[7] += bound / 2
    assert_accurate(less.to(dtype) if dtype == torch.float32 else plain, plain, exact)


def test_the_floor_grows_with_terms_that_cancel() -> None:
    exact, plain = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    noise = torch.tensor([0.0, 1e-6, 0.0])
    with fails("above"):
        assert_accurate(noise, plain, exact)
    assert_accurate(noise, plain, exact, scale=10.0)


def test_accuracy_in_float64_is_absolute() -> None:
    exact = random("exact", (50,), torch.float64)
    assert_accurate(exact + 1e-14, exact, exact)
    with fails("off by"):
        assert_accurate(exact + 1e-10, exact, exact)
    assert_accurate(exact + 1e-11, exact, exact, scale64=100.0)
    with fails("off by"):
        assert_accurate(exact + 1e-9, exact, exact, scale64=100.0)
    with fails("off by"):
        assert_accurate(exact + 1e-11, exact, exact, scale=100.0)


def test_accuracy_of_odd_values() -> None:
    exact = torch.tensor([1.0, math.nan, math.inf, 1e39], dtype=torch.float64)
    plain = exact.float()  # the last one is beyond float32
    assert_accurate(plain, plain, exact)
    for place, value, words in ((0, math.nan, "not finite"), (0, math.inf, "not finite"),
                                (1, 1.0, "should not be finite"), (1, math.inf, "should not be"),
                                (2, 1.0, "should not be finite"), (2, math.nan, "should not be"),
                                (3, 1.0, "should not be finite")):  # fmt: skip
        wrong = plain.clone()
        wrong[place] = value
        with fails(words):
            assert_accurate(wrong, plain, exact)


def test_accuracy_wants_shape_and_dtype() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    with fails("dtype"):
        assert_accurate(torch.ones(3).half(), torch.ones(3), exact)
    with fails("shape"):
        assert_accurate(torch.ones(2), torch.ones(3), exact)


# ---- gradients -----------------------------------------------------------------------------------


def _gradient() -> tuple[torch.Tensor, torch.Tensor]:
    exact = random("gradient", (40, 5), torch.float64)
    exact[7] = 0
    exact[9] *= 1e-12  # small, but there
    return exact.float(), exact


def test_a_right_gradient_passes() -> None:
    plain, exact = _gradient()
    assert_gradient(plain.clone(), plain, exact)
    assert_gradient(None, None, None)


def test_a_missing_gradient_fails() -> None:
    plain, exact = _gradient()
    with fails("no gradient"):
        assert_gradient(None, plain, exact)
    with fails("should be none"):
        assert_gradient(plain, None, None)


def test_a_zeroed_gradient_fails_however_small() -> None:
    plain, exact = _gradient()
    with fails("above"):
        assert_gradient(torch.zeros_like(plain), plain, exact)
    dropped = plain.clone()
    dropped[9] = 0  # within every tolerance of size
    with fails("5 entries are zero that should not be"):
        assert_gradient(dropped, plain, exact)


def test_a_leaking_gradient_fails() -> None:
    plain, exact = _gradient()
    leaking = plain.clone()
    leaking[7, 2] = 1e-12
    with fails("1 entries should be exactly zero"):
        assert_gradient(leaking, plain, exact)
    assert_gradient(leaking, plain, exact, scale=1.0)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_a_biased_gradient_fails(dtype: torch.dtype) -> None:
    _, exact = _gradient()
    plain = exact.to(dtype)
    with fails("above|off by"):
        assert_gradient((plain * 1.1).to(dtype), plain, exact)
    with fails("above|off by"):
        assert_gradient(-plain, plain, exact)
    with fails("above|off by"):
        assert_gradient(plain.flip(0), plain, exact)


def test_many_small_errors_in_one_direction_fail() -> None:
    """Every element is within its bound, the sum of them is not."""
    exact = torch.full((1000,), 1e-3, dtype=torch.float64)
    exact[0] = 1.0
    plain = exact.float()
    bound = error_bound(plain, exact, BACKWARD)
    shifted = (exact + 0.9 * bound).float()
    shifted[0] = 1.0
    assert_accurate(shifted, plain, exact, BACKWARD)
    with fails("relative L2 error"):
        assert_gradient(shifted, plain, exact)


# ---- closeness -----------------------------------------------------------------------------------


def test_close() -> None:
    value = random("value", (5, 4), torch.float64)
    assert_close(value + 1e-11, value)
    with fails("off by"):
        assert_close(value + 1e-9, value)
    with fails("dtype"):
        assert_close(value.float(), value)
    with fails("shape"):
        assert_close(value[:4], value)
    with fails("NaN in other places"):
        assert_close(value.masked_fill(value > 1, math.nan), value)
    with fails("off by"):
        assert_close(value.masked_fill(value > 1, math.inf), value)
    with fails("differs"):
        assert_close(torch.tensor([1]), torch.tensor([2]))
    infinite = torch.tensor([math.inf, 1.0])
    assert_close(infinite, infinite)
    with fails("off by"):
        assert_close(-infinite, infinite)
    with pytest.raises(ValueError, match="zip"):
        assert_close([value], [value, value])
