"""What every predictor is: a module of ours inside a model, with a learning rate of its own."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

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
