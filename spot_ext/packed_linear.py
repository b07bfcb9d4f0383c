"""Linear layers for inference whose weights are packed once: product, bias, GELU and sum in one.

    packed = pack_linear(layer.weight)
    y = packed_linear(x, packed, layer.out_features, layer.bias, residual=x, activation="gelu")

Panels are those of no particular processor: what was packed on one is right on any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spot_ext import _check, _definitions, _register

PANEL = 32  # outputs of a panel
ACTIVATIONS = ("none", "gelu", "gelu_tanh")

# ---- public functions ----------------------------------------------------------------------------


def pack_linear(weight: Tensor) -> Tensor:
    """The weight of a linear layer as `packed_linear` takes it.

    Args:
        weight: [out, in] float32, float64, float16 or bfloat16; any strides.

    Returns:
        [ceil(out / 32), in, 32] contiguous: row `32 p + c` of the weight is `[p, :, c]`, and rows
        from `out` on are zero. A plain tensor, which can be saved. Not differentiable.

    Raises:
        TypeError: `weight` is not a floating tensor.
        ValueError: `weight` is not [out, in].
    """
    if _check.eager():
        _check_weight(weight)
    return _definitions.run("pack_linear", pack_linear_reference, weight, (weight,))


def packed_linear(
    input: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`activation(input @ weight.T + bias) + residual`, for inference.

    Sums run in float32 (float64 for float64), each in an order that depends on `in` alone: a row
    has the same bits whatever the other rows are, and for any number of threads.

    Args:
        input: [..., in] float32, float64, float16 or bfloat16; any strides. Rows a constant apart
            and dense in themselves are copy-free.
        packed: [ceil(out_features / 32), in, 32] of the dtype of `input`, from `pack_linear`.
        out_features: rows of the weight that was packed.
        bias: [out_features] of that dtype, or None.
        residual: [..., out_features] of that dtype, added last; or None.
        activation: "none", "gelu" (the exact one, by erf) or "gelu_tanh" (by tanh).

    Returns:
        [..., out_features] contiguous. Not differentiable: a backward pass through it raises.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes that do not fit, or an unknown activation.
        RuntimeError: a gradient is asked for.
    """
    args = (input, packed, out_features, bias, residual, activation)
    if _check.eager():
        _check_linear(*args)
    return _definitions.run("packed_linear", packed_linear_reference, input, args)


# ---- references: the definitions -----------------------------------------------------------------


def pack_linear_reference(weight: Tensor) -> Tensor:
    """Definition of `pack_linear` in plain PyTorch."""
    panels = _panels(weight.shape[0])
    padded = F.pad(weight, (0, 0, 0, panels * PANEL - weight.shape[0]))
    return padded.reshape(panels, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def packed_linear_reference(
    input: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Definition of `packed_linear` in plain PyTorch."""
    rows = packed.transpose(1, 2).reshape(packed.shape[0] * PANEL, packed.shape[1])
    result = F.linear(input, rows[:out_features], bias)
    if activation != "none":
        result = F.gelu(result, approximate="tanh" if activation == "gelu_tanh" else "none")
    return result if residual is None else result + residual


def _panels(outputs: int) -> int:
    return (outputs + PANEL - 1) // PANEL


# ---- checks --------------------------------------------------------------------------------------


def _check_weight(weight: Tensor) -> None:
    _check.tensor("weight", weight, 2)
    _check.dtype("weight", weight, _check.FLOATING)


def _check_linear(
    input: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    _check.tensor("input", input)
    if input.dim() < 1:
        raise ValueError(f"input must have at least 1 dimension, got shape {list(input.shape)}")
    _check.dtype("input", input, _check.FLOATING)
    _check.tensor("packed", packed, 3)
    last = input.dim() - 1
    _check.size("packed", packed, 1, input.shape[last], "the features of input")
    _check.size("packed", packed, 2, PANEL, "the outputs of a panel")
    most = packed.shape[0] * PANEL
    least = max(most - PANEL + 1, 0) if isinstance(most, int) else 0
    _check.count("out_features", out_features, least, most, " (as packed has panels)")
    if bias is not None:
        _check.tensor("bias", bias, 1)
        _check.size("bias", bias, 0, out_features, "out_features")
    if residual is not None:
        _check.tensor("residual", residual, input.dim())
        for dim in range(last):
            _check.size("residual", residual, dim, input.shape[dim], "as input has")
        _check.size("residual", residual, last, out_features, "out_features")
    for name, value in (("packed", packed), ("bias", bias), ("residual", residual)):
        if value is not None:
            _check.same_dtype(name, value, "input", input)
            _check.device(name, value, "input", input)
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a str, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        names = "'none', 'gelu' or 'gelu_tanh'"
        raise ValueError(f"activation must be {names}, got '{activation}'")


# ---- fakes ---------------------------------------------------------------------------------------


@_register.fake("pack_linear")
def _(weight: Tensor) -> Tensor:
    _check_weight(weight)
    return weight.new_empty((_panels(weight.shape[0]), weight.shape[1], PANEL))


@_register.fake("packed_linear")
def _(
    input: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    _check_linear(input, packed, out_features, bias, residual, activation)
    return input.new_empty((*input.shape[:-1], out_features))


# ---- CUDA: no kernels of our own -----------------------------------------------------------------

_register.cuda("pack_linear")(pack_linear_reference)
_register.cuda("packed_linear")(packed_linear_reference)


# ---- autograd: for inference alone ---------------------------------------------------------------


@_register.autograd("pack_linear")
def _(ctx: Any, grad: Tensor) -> Any:
    _refuse("pack_linear")


@_register.autograd("packed_linear")
def _(ctx: Any, grad: Tensor) -> Any:
    _refuse("packed_linear")


def _refuse(op: str) -> None:
    raise RuntimeError(
        f"spot::{op} is for inference and has no gradient; call it under torch.no_grad(), or "
        f"spot_ext.{op} in `with spot_ext.definitions():` (or spot_ext.{op}_reference)"
    )


# ---- autocast: weights are moved, products are cast ----------------------------------------------


@_register.autocast("packed_linear")
def _(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    input, packed, out_features, *others = args
    named = {name: kwargs[name] for name in ("bias", "residual") if name in kwargs}
    named = dict(zip(named, _register.cast(dtype, tuple(named.values())), strict=True))
    input, packed = _register.cast(dtype, (input, packed))
    return (input, packed, out_features, *_register.cast(dtype, tuple(others))), kwargs | named


# ---- FLOPs ---------------------------------------------------------------------------------------


@_register.flops("pack_linear")
def _(weight: Any, **kwargs: Any) -> int:
    """Moving is free."""
    return 0


@_register.flops("packed_linear")
def _(input: Any, packed: Any, out_features: int, *args: Any, **kwargs: Any) -> int:
    """The product; the rest is left out, as torch's counters do."""
    rows = 1
    for size in input[:-1]:
        rows *= size
    return 2 * rows * input[-1] * out_features
