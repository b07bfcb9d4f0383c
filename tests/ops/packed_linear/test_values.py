"""packed_linear: sizes, bits that depend on nothing else, odd numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.comparison import assert_accurate, assert_close, assert_same_bits
from support.data import random
from support.switches import isa, isa_control, threads
from torch import Tensor

import spot_ext


def _layer(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and residual, in float32."""

    def normal(what: str, *shape: int) -> Tensor:
        return random(f"{what} {rows} {inputs} {outputs}", shape, torch.float32)

    weight = normal("weight", outputs, inputs) * inputs**-0.5
    return (normal("input", rows, inputs), weight, normal("bias", outputs),
            normal("residual", rows, outputs))  # fmt: skip


def _plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, activation: str) -> Tensor:
    """What a linear layer gives, from the weight as it was before it was packed."""
    made = F.linear(x, weight, bias)
    if activation != "none":
        made = F.gelu(made, approximate="tanh" if activation == "gelu_tanh" else "none")
    return made + residual


def _ours(x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str) -> Tensor:
    packed = spot_ext.pack_linear(weight)
    return spot_ext.packed_linear(x, packed, len(weight), bias, residual, activation)


@pytest.mark.parametrize("name", isa_control().isas())
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("sizes", [(384, 1152), (1536, 384), (384, 1000), (769, 65), (4096, 31)])
def test_values_of_a_layer(sizes: tuple[int, int], activation: str, name: str) -> None:
    inputs, outputs = sizes
    for rows in (1, 5, 17, 68, 101):
        values = _layer(rows, inputs, outputs)
        exact = _plain(*(value.double() for value in values), activation)
        with isa(name):
            ours = _ours(*values, activation)
        assert_accurate(ours, _plain(*values, activation), exact, what=f"{rows} rows")


def test_every_number_of_rows_up_to_three_tiles() -> None:
    x, weight, bias, residual = _layer(43, 70, 40)
    packed = spot_ext.pack_linear(weight)
    for name in isa_control().isas():
        with isa(name):
            whole = spot_ext.packed_linear(x, packed, 40, bias, residual)
            for rows in range(1, 43):
                part = spot_ext.packed_linear(x[:rows], packed, 40, bias, residual[:rows])
                assert_same_bits(part, whole[:rows], f"{rows} rows on {name}")


@pytest.mark.parametrize("inputs", [384, 1000, 1024, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_is_the_same_whatever_the_others_are(inputs: int, dtype: torch.dtype) -> None:
    x, weight, bias, residual = (value.to(dtype) for value in _layer(200, inputs, 100))
    whole = _ours(x, weight, bias, residual, "gelu")
    for first, last in ((0, 1), (0, 68), (150, 200), (199, 200)):
        part = _ours(x[first:last], weight, bias, residual[first:last], "gelu")
        assert_same_bits(part, whole[first:last], f"rows {first} to {last}")
    others = x.clone()
    others[1:] = float("nan")
    assert_same_bits(_ours(others, weight, bias, residual, "gelu")[:1], whole[:1], "beside NaN")


@pytest.mark.parametrize("rows", [1, 68, 300])
def test_any_number_of_threads_gives_the_same_bits(rows: int) -> None:
    values = _layer(rows, 400, 330)
    results = []
    for count in (1, 2, 3, 4, 7):
        with threads(count):
            results.append(_ours(*values, "gelu"))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_the_residual_may_be_the_input() -> None:
    x, weight, bias, _ = _layer(20, 64, 64)
    assert_close(_ours(x, weight, bias, x, "none"), x + F.linear(x, weight, bias), 1e-5)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
def test_numbers_that_are_not_finite_stay_in_their_row(activation: str) -> None:
    x, weight, bias, residual = _layer(30, 50, 40)
    clean = _ours(x, weight, bias, residual, activation)
    x[7, 3], x[20, 0] = float("nan"), float("inf")
    dirty = _ours(x, weight, bias, residual, activation)
    assert dirty[7].isnan().all() and not dirty[20].isfinite().any()
    for row in set(range(30)) - {7, 20}:
        assert_same_bits(dirty[row], clean[row])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_far_from_zero(activation: str) -> None:
    x = torch.linspace(-40, 40, 4001)[:, None]
    zero = torch.zeros(4001, 1)
    values = x, torch.ones(1, 1), torch.zeros(1), zero
    exact = _plain(*(value.double() for value in values), activation)
    assert_accurate(_ours(*values, activation), _plain(*values, activation), exact)


def test_rows_with_gaps() -> None:
    """What ViTs hand over: tokens behind a prefix, a part of qkv, every image's class token."""
    wide = random("wide", (3, 21, 192), torch.float32)
    _, weight, bias, _ = _layer(1, 64, 40)
    for part in (wide[:1, 1:, 64:128], wide[:, 0, :64], wide[:, :, 128:], wide[:, 1:, :64]):
        made = _ours(part, weight, bias, None, "none")
        assert_same_bits(made, _ours(part.contiguous(), weight, bias, None, "none"))


def test_what_was_packed_can_be_unpacked() -> None:
    weight = random("weight", (70, 9), torch.float32)
    packed = spot_ext.pack_linear(weight)
    assert packed.shape == (3, 9, 32) and packed.is_contiguous()
    assert_same_bits(packed.transpose(1, 2).reshape(96, 9)[:70], weight)
    assert not packed[2, :, 6:].any()


def test_a_gradient_is_refused_and_without_one_all_is_well() -> None:
    x, weight, bias, residual = _layer(5, 20, 40)
    packed = spot_ext.pack_linear(weight)
    expected = spot_ext.packed_linear(x, packed, 40, bias, residual)
    for value in (x, packed, bias, residual):
        value.requires_grad_()
    made = spot_ext.packed_linear(x, packed, 40, bias, residual)
    with pytest.raises(RuntimeError, match="spot::packed_linear is for inference"):
        made.sum().backward()
    with torch.no_grad():
        assert_same_bits(spot_ext.packed_linear(x, packed, 40, bias, residual), expected)
    with spot_ext.definitions():
        spot_ext.packed_linear(x, packed, 40, bias, residual).sum().backward()
    assert all(value.grad.any() for value in (x, packed, bias, residual))
