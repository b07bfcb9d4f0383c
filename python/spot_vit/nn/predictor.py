"""What every predictor is: a module of ours inside a model, with a learning rate of its own."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

P = TypeVar("P", bound="Predictor")


class Predictor(nn.Module):
    """Base class of the modules that a conversion adds to a model."""


def predictors_in(model: nn.Module, kind: type[P]) -> dict[str, P]:
    """Predictors of one kind by their name in the model, whatever it is wrapped in."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def predictor_parameters(
    model: nn.Module, kind: type[Predictor] = Predictor
) -> dict[str, nn.Parameter]:
    """Parameters of all predictors, or of one kind, by their name in the model.

    Whatever trains a predictor apart from the backbone asks here which parameters are its own.
    """
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in predictors_in(model, kind).items()
        for name, parameter in module.named_parameters()
    }


def beside(predictor: P, weight: Tensor) -> P:
    """The predictor on the device of a weight of its block, and of its dtype where that is float.

    Weights may be quantised; predictors are not.
    """
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.element_size() > 1 else None
    return predictor.to(device=weight.device, dtype=dtype or torch.float32)


def plain_layer(*layers: nn.Module | None) -> bool:
    """Whether reading the weights of these layers is the same as calling them.

    It is not where a layer was replaced or wrapped (LoRA), is watched or changed by hooks (pruning,
    offloading, per-sample gradients), or has weights of a kind of their own (quantised, sharded).
    """
    for layer in layers:
        if layer is None:
            continue
        if type(layer) not in (nn.Linear, nn.LayerNorm) or "forward" in layer.__dict__:
            return False
        if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks:
            return False
        if layer._backward_pre_hooks:
            return False
        for parameter in (layer.weight, layer.bias):
            if parameter is not None and is_traceable_wrapper_subclass(parameter):
                return False
    return True
