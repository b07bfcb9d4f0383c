"""Argument checks of the public functions and fake kernels: what was expected, and what came.

Sizes are compared only when both are plain ints. A symbolic size stays symbolic, so that derived
sizes such as `num_keep = N * 7 // 10` export with dynamic shapes; C++ checks the real ones.
"""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What LibTorch's stable ABI can name; sub-byte, quantised and `bits` dtypes are missing.
_ROW_NAMES = r"torch\.(bool|u?int(8|16|32|64)|b?float(16|32|64)|complex(32|64|128)|float8_\w+)"
_ROWS = frozenset(
    kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype) and re.fullmatch(_ROW_NAMES, str(kind))
)
_INT64_MAX = 2**63 - 1


def tensor(name: str, value: object, rank: int | None = None) -> None:
    """`value` is a tensor with strides, of `rank` dimensions when given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise TypeError(f"{name} must be a plain dense tensor, got {kind}")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {list(value.shape)}")


def alike(*values: Any) -> bool:
    """Whether these are plain tensors of one shape, floating dtype and device: nothing to refuse.

    Most calls are right, and this costs a tenth of asking one by one.
    """
    first = values[0]
    if type(first) is not Tensor or first.is_nested or first.layout is not torch.strided:
        return False
    shape, kind, place = first.shape, first.dtype, first.device
    if kind not in FLOATING:
        return False
    for value in values[1:]:
        if type(value) is not Tensor or value.dtype is not kind or value.is_nested:
            return False
        if value.layout is not torch.strided or value.shape != shape or value.device != place:
            return False
    return True


def dtype(name: str, value: Tensor, expected: torch.dtype | tuple[torch.dtype, ...]) -> None:
    """`value` has one of the expected dtypes."""
    allowed = expected if isinstance(expected, tuple) else (expected,)
    if value.dtype not in allowed:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in allowed)
        raise TypeError(f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def same_dtype(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """`value` has the dtype of `like`; autocast may still make them equal."""
    if value.dtype == like.dtype:
        return
    both = value.dtype in FLOATING and like.dtype in FLOATING
    if both and torch.is_autocast_enabled(value.device.type):
        return
    expected, found = (str(t.dtype).removeprefix("torch.") for t in (like, value))
    raise TypeError(f"{name} must be {expected} as {like_name}, got {found}")


def row_dtype(name: str, value: Tensor) -> None:
    """`value` has a dtype whose rows can be moved."""
    if value.dtype not in _ROWS:
        found = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be floating, complex, integer or bool, got {found}")


def traced(value: object) -> bool:
    """`value` is a number that torch.jit.trace made a tensor, as it does of every size."""
    return isinstance(value, Tensor) and value.dim() == 0 and torch.jit.is_tracing()


def flag(name: str, value: object) -> None:
    """`value` is a bool."""
    if value is True or value is False:
        return
    numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if not (isinstance(value, torch.SymBool) or numpys or traced(value)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def number(name: str, value: object) -> None:
    """`value` is a plain number."""
    if type(value) is float:
        return
    plain = isinstance(value, Real | torch.SymInt | torch.SymFloat)
    if not (plain or traced(value)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")


def device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """`value` is on the device of `like`."""
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name} ({like.device}), got {value.device}"
        )


def size(name: str, value: Tensor, dim: int, expected: Any, meaning: str) -> None:
    """`value.shape[dim]` is `expected`, where both are known."""
    found = value.shape[dim]
    if isinstance(found, int) and isinstance(expected, int) and found != expected:
        raise ValueError(
            f"{name} must have size {expected} ({meaning}) in dimension {dim}, "
            f"got shape {list(value.shape)}"
        )


def saved(
    name: str,
    value: object,
    shape: tuple[Any, ...],
    kind: torch.dtype,
    like_name: str,
    like: Tensor,
) -> None:
    """`value` is what a forward pass gave, or a gradient of it: its sizes, dtype and device."""
    tensor(name, value, len(shape))
    assert isinstance(value, Tensor)
    dtype(name, value, kind)
    device(name, value, like_name, like)
    for dim, expected in enumerate(shape):
        size(name, value, dim, expected, "as the forward pass has")


def asked(name: str, value: object, wanted: bool) -> None:
    """`value` is there if its gradient is wanted."""
    if wanted and value is None:
        raise ValueError(f"{name}_grad=True needs {name}")


def count(name: str, value: object, low: int, high: Any = None, meaning: str = "") -> None:
    """`value` is an int in [low, high], where the bounds are known."""
    if type(value) is not int:
        if isinstance(value, torch.SymInt) or traced(value):
            return
        if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's are some
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    bounded = isinstance(high, int)
    if not low <= int(value) <= (high if bounded else _INT64_MAX):
        wanted = f"between {low} and {high}{meaning}" if bounded else f"an int64 of at least {low}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def eager() -> bool:
    """False while torch.compile or torch.export traces; C++ and the fakes check then."""
    return not torch.compiler.is_compiling()
