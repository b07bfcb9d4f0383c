"""Kernel or definition: the one place where a public function chooses what it runs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms
from torch._C import _AutoDispatchBelowAutograd as _below_autograd
from torch._C import _functorch
from torch.autograd import forward_ad

from spot_ext import _library, _register

_WITH_KERNELS = ("cpu", "cuda", "meta")
_warned: set[str] = set()


class _Choice(threading.local):
    """What a thread chose; set by `__init__`, since torch.compile guards no class attribute."""

    def __init__(self) -> None:
        self.definitions = False


_choice = _Choice()


class definitions:
    """Context in which the public functions of `spot_ext` run their definitions.

    Inside, every function runs its `*_reference` in plain PyTorch, on any device, and not the
    compiled kernel: for transforms and formats that know torch's own operators only (second
    derivatives, ONNX, TorchScript, int8 subclasses, FLOP counters of others), and to compare.

        with spot_ext.definitions():
            torch.onnx.export(model, (images,), "model.onnx", dynamo=True)

    The choice is that of the calling thread, may be nested, and ends with the block, also by an
    exception. torch.compile, torch.export, torch.jit.trace and make_fx see it, around what they
    trace and inside; a compiled function recompiles when the choice has changed. What was traced
    keeps its choice. A forward pass that is repeated in the backward pass (activation
    checkpointing) must see the same choice there: put both into the block, or give
    `torch.utils.checkpoint.checkpoint` a `context_fn` (autograd runs backward passes on a GPU in
    a thread of its own).

    Calls of `torch.ops.spot.*` are not affected: they always run the kernels.
    """

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(_choice.definitions)
        _choice.definitions = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.definitions = self._before.pop()


def run(
    op: str, reference: Callable[..., Any], like: Tensor, args: tuple[Any, ...], *names: str
) -> Any:
    """The result of `op` on `args`, or that of its `reference` where the definition is chosen.

    `like` is on the device that counts, and `names` are those of the last arguments, which the
    reference takes by keyword. A refused argument is a ValueError on every torch version.
    """
    if _chosen(like):
        return _define(op, reference, like.device.type, args, names)
    kernel = getattr(torch.ops.spot, op)
    try:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return kernel(*args)
        if torch.is_inference_mode_enabled():
            return kernel(*args)
        with _below_autograd():  # no gradient is wanted, and the call is quicker in it
            return kernel(*args)
    except RuntimeError as cause:
        first = str(cause).split("\n", 1)[0]
        if first.startswith("spot::"):
            raise ValueError(first) from cause
        raise


def differentiated(value: Tensor) -> bool:
    """Whether a derivative by `value` may be asked for; inside a transform it cannot be known."""
    if forward_ad._current_level >= 0 or _transforms():
        return True
    return value.requires_grad


def _chosen(like: Tensor) -> bool:
    """Whether the definition runs; raises when a kernel should be there and is not.

    Kernels have a gradient and nothing else, so other transforms get the definition, as do devices
    that SPOT has no kernels for at all (MPS, XPU), with one warning.
    """
    if _choice.definitions or forward_ad._current_level >= 0:
        return True
    if _transforms() and not _kernel_serves():
        return True
    kind = like.device.type
    if kind in _WITH_KERNELS:
        _library.require(kind)
        return False
    if kind not in _warned and not torch.compiler.is_compiling():
        _warned.add(kind)
        warnings.warn(
            f"SPOT has no kernels for {kind}; using the plain PyTorch definitions", stacklevel=4
        )
    return True


def _kernel_serves() -> bool:
    """Whether `torch.func.grad` or `vjp`, at most once, is all that transforms this call."""
    kinds = [level.key() for level in _functorch.get_interpreter_stack() or []]
    others = [kind for kind in kinds if kind != _functorch.TransformType.Functionalize]
    return others in ([], [_functorch.TransformType.Grad])


# What torch.compiler.assume_constant_result does, which would import the compiler here. Compiled
# functions guard the stack of transforms themselves.
_kernel_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _define(
    op: str, reference: Callable[..., Any], device: str, args: tuple[Any, ...], names: Any
) -> Any:
    """The reference; under autocast on arguments as the op casts them, and nothing else cast."""
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast to ask for
        if op in _register.CASTS:
            args, _ = _register.CASTS[op](torch.get_autocast_dtype(device), args, {})
        with torch.amp.autocast(device, enabled=False):
            return _positional(reference, args, names)
    return _positional(reference, args, names)


def _positional(reference: Callable[..., Any], args: tuple[Any, ...], names: Any) -> Any:
    count = len(args) - len(names)
    return reference(*args[:count], **dict(zip(names, args[count:], strict=True)))
