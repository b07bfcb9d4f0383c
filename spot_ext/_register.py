"""Decorators that attach a fake, an autograd formula, autocast or FLOPs to an op of `spot`.

They do nothing when the library is not loaded, or when the op has the thing already (the module was
imported twice).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from spot_ext import _autograd, _library
from spot_ext._after_import import after_import

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("spot", "IMPL") if _library.error is None else None
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
CASTS: dict[str, Callable[..., Any]] = {}  # what autocast does to the arguments of an op


def _has(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"spot::{op}", key)


def fake(op: str) -> Callable[[F], F]:
    """Registers the decorated function as the fake kernel: contiguous outputs, symbolic sizes."""

    def register(function: F) -> F:
        if _LIBRARY is not None and not _has(op, "Meta"):
            torch.library.register_fake(f"spot::{op}", function, lib=_LIBRARY)
        return function

    return register


def cuda(op: str) -> Callable[[F], F]:
    """Registers the decorated function as the kernel for CUDA of an op that has none in C++."""

    def register(function: F) -> F:
        if _LIBRARY is not None and not _has(op, "CUDA"):
            _LIBRARY.impl(op, function, "CUDA")
        return function

    return register


def autograd(op: str, setup: Callable[..., None] | None = None) -> Callable[[F], F]:
    """Registers the decorated function as the backward formula, which has a place for each input.

    `setup(ctx, inputs, output)` saves what it needs; both see omitted trailing defaults.
    """

    def register(function: F) -> F:
        if _LIBRARY is not None and not _has(op, "Autograd"):
            packet = getattr(torch.ops.spot, op).default
            kernel = _autograd.kernel(packet, function, setup)
            _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
        return function

    return register


def once_only(op: str) -> None:
    """Gives the backward op of `op` a formula that refuses second derivatives."""

    @autograd(f"{op}_backward")
    def _(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"spot::{op} is differentiable once; for second derivatives call spot_ext.{op} in "
            f"`with spot_ext.definitions():` (or spot_ext.{op}_reference)"
        )


def autocast(op: str) -> Callable[[F], F]:
    """Registers `function(dtype, *args) -> args` that casts arguments to the ambient dtype."""

    def register(function: F) -> F:
        CASTS[op] = function
        if _LIBRARY is None:
            return function
        packet = getattr(torch.ops.spot, op).default

        def kernel_for(device_type: str) -> Callable[..., Any]:
            def kernel(*args: Any, **kwargs: Any) -> Any:
                ambient = torch.get_autocast_dtype(device_type)
                args, kwargs = function(ambient, args, kwargs)
                with torch.amp.autocast(device_type, enabled=False):
                    return packet(*args, **kwargs)

            return kernel

        for device_type, key in _AUTOCAST.items():
            if not _has(op, key):
                _LIBRARY.impl(op, kernel_for(device_type), key)
        return function

    return register


def flops(op: str) -> Callable[[F], F]:
    """Registers `function(*shapes) -> int` (2 per multiply-accumulate) with FlopCounterMode."""

    def register(function: F) -> F:
        if _LIBRARY is not None:
            packet = getattr(torch.ops.spot, op)

            def count(counter: Any) -> None:
                if packet not in counter.flop_registry:
                    counter.register_flop_formula(packet)(function)

            # Importing the counter imports Triton, which takes longer than the rest of SPOT.
            after_import("torch.utils.flop_counter", count)
        return function

    return register


def cast(dtype: torch.dtype, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Casts the floating tensors (but not float64) among `values`, as torch's autocast does."""
    return tuple(
        value.to(dtype)
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        else value
        for value in values
    )
