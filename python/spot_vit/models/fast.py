"""`fast`: the same model with fewer and faster operators, for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spot_vit.models.fast_blocks import FAST, SLOW, takes
from spot_vit.nn.fast_relevance import FastTokenRelevance
from spot_vit.nn.packed import (
    PACKED,
    PackedLinear,
    fastest,
    missing_int8,
    pack_linear,
    unpack_linear,
)
from spot_vit.nn.packed_patches import PackedPatches
from spot_vit.nn.predictor import Predictor
from spot_vit.nn.watch import untouched, whole
from spot_vit.utils.modes import unwrap

M = TypeVar("M", bound=nn.Module)

DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclasses.dataclass
class Fast:
    """What `fast` did to a model, so that it can be undone.

    Attributes:
        dtype: what was asked for: that of the weights, or int8.
        packed: how many linear layers are packed.
        frozen: parameters that asked for gradients before.
        masters: parameters and buffers as they were, where the model computes in another dtype.
        compiled: whether the model was compiled.
    """

    dtype: torch.dtype
    packed: int = 0
    frozen: list[str] = dataclasses.field(default_factory=list)
    masters: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    compiled: bool = False


def fast(model: M, dtype: torch.dtype | None = None) -> M:
    """Makes a model fast for inference, in place, and returns it in eval mode.

    On a CPU, linear layers multiply by packed weights, with GELU, LayerScale and the residual as
    part of the product; attention reads queries, keys and values where the projection left them;
    and where the head reads prefix tokens alone, the last block computes no others. Blocks of
    timm's `VisionTransformer` get all of it, other models packed layers. On a GPU the model is
    compiled, with CUDA graphs. Values are those of the model to rounding: logits within 1e-4 in
    float32, and the same tokens kept.

    The model stays a plain module: its `state_dict` is what it was, `set_keep` works, copies and
    pickles are fast too. It does not train: parameters ask for no gradient, and a pass in training
    mode raises. Gradients by the images are right, by plain operators. `restore` undoes it, and a
    second `restore` the conversion below it.

    Args:
        model: dense or converted, not wrapped.
        dtype: None computes in the dtype of the weights. bfloat16 and float16 (GPU) compute in
            that; the weights given stay as they are for `state_dict` and `restore`. int8 (CPU)
            multiplies linear layers in int8, weights by output channel and activations by call;
            predictors, statistics and everything else stay in float32.

    Raises:
        TypeError: the model is fast already, or a wrapper.
        ValueError: a dtype that there is not, or not on this device.
    """
    inside = unwrap(model)
    if inside is not model:
        raise TypeError(
            f"{type(model).__name__} wraps the model: make the {type(inside).__name__} inside fast"
        )
    if is_fast(model):
        raise TypeError("the model is fast already; restore undoes it")
    _check(model, dtype)
    state = Fast(dtype or next(model.parameters()).dtype)
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state.frozen.append(name)
            parameter.requires_grad_(False)
    if dtype is not None and dtype.is_floating_point:
        _compute_in(model, dtype, state)
    kind = _fastest(model)
    _swap_classes(model, kind)
    kind = "int8" if dtype is torch.int8 else kind
    for layer in list(_linear_layers(model)):
        pack_linear(layer, kind)
        state.packed += kind != "plain"
    model._fast = state
    if next(model.parameters()).device.type == "cuda":
        model.compile(mode="reduce-overhead")
        state.compiled = True
    return model


def is_fast(model: Any) -> bool:
    """Whether `fast` was called on a model."""
    return "_fast" in model.__dict__


def refuse_fast(model: Any, what: str) -> None:
    """Raises where a model is fast, which comes after every conversion."""
    if is_fast(model):
        raise TypeError(f"the model is fast: restore it, call {what}, and then fast again")


def undo_fast(model: Any) -> None:
    """Undoes `fast`, in place; the model stays in eval mode."""
    state: Fast = model._fast
    for module in model.modules():
        if isinstance(module, PackedLinear):
            unpack_linear(module)
        elif type(module) in SLOW:
            module.__class__ = SLOW[type(module)]
            for name in ("_plan", "kind"):
                module.__dict__.pop(name, None)
    tensors = _tensors(model)
    for name, master in state.masters.items():
        tensors[name].data = master
    embed = _first(model)
    for hooks in (
        embed._forward_pre_hooks,
        model._state_dict_hooks,
        model._load_state_dict_pre_hooks,
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in _HOOKS]:
            del hooks[key]
            embed._forward_pre_hooks_with_kwargs.pop(key, None)
    parameters = dict(model.named_parameters())
    for name in state.frozen:
        parameters[name].requires_grad_(True)
    if state.compiled:
        model._compiled_call_impl = None
    del model._fast


def _check(model: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES[1:])
        raise ValueError(f"dtype: expected None or torch's {names}, got {dtype!r}")
    device = next(model.parameters()).device.type
    if dtype is torch.float16 and device == "cpu":
        raise ValueError("dtype: float16 is for GPUs; on a CPU take bfloat16 or int8")
    if dtype is torch.int8:
        if device != "cpu":
            raise ValueError(f"dtype: int8 is for CPUs, and the model is on {device}")
        if (reason := missing_int8()) is not None:
            raise ValueError(f"dtype: int8 is not there: {reason}")
        if next(model.parameters()).dtype is not torch.float32:
            raise ValueError("dtype: int8 is made of a model in float32")


def _fastest(model: nn.Module) -> str:
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype not in PACKED:
        return "plain"
    return fastest(parameter.dtype, torch.get_num_threads())[0]


def _swap_classes(model: nn.Module, who: str) -> None:
    for module in model.modules():
        kind = FAST.get(type(module))
        if kind is not None and takes(module):
            module.__class__ = kind
            if isinstance(module, FastTokenRelevance | PackedPatches):
                module.kind = who


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The plain linear layers of a model; predictors multiply by theirs in their own way."""
    for child in module.children():
        if isinstance(child, Predictor):
            continue
        if type(child) is nn.Linear:
            if untouched(child) and whole(child):
                yield child
        else:
            yield from _linear_layers(child)


# ---- another dtype than that of the weights ------------------------------------------------------


def _compute_in(model: nn.Module, dtype: torch.dtype, state: Fast) -> None:
    """Casts a model, keeps what it was cast from, and has it take images of any float dtype."""
    for name, tensor in _tensors(model).items():
        if tensor.is_floating_point() and tensor.dtype is not dtype:
            state.masters[name] = tensor.data
            tensor.data = tensor.data.to(dtype)
    _first(model).register_forward_pre_hook(_cast_images, with_kwargs=True)
    model._register_state_dict_hook(_give_masters)
    model.register_load_state_dict_pre_hook(_take_masters)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _first(model: Any) -> Any:
    """What is given the images, whichever method of the model is called."""
    return getattr(model, "patch_embed", None) or getattr(model, "embeds", None) or model


def _cast_images(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in named.items()}


def _give_masters(model: Any, found: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name, master in model._fast.masters.items():
        if prefix + name in found:
            found[prefix + name] = master


def _take_masters(model: Any, given: Mapping[str, Any], prefix: str, *_further: Any) -> None:
    for name, master in model._fast.masters.items():
        value = given.get(prefix + name)
        if value is not None and value.shape == master.shape:
            master.copy_(value)


_HOOKS = (_cast_images, _give_masters, _take_masters)
