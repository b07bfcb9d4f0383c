"""What torch.jit.trace and torch.fx make of tensors and sizes while they run a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def known(size: Any) -> Any:
    """A size of a tensor as it is, or as an int where torch.jit.trace made a tensor of it.

    How many tokens stay decides what a pass does, so a traced model serves one image size.

    Raises:
        TypeError: see `refuse_symbols`.
    """
    if not isinstance(size, Tensor):
        refuse_symbols(size)
        return size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(size)


def refuse_symbols(*values: Any) -> None:
    """Raises for what torch.fx passes instead of tensors, sizes and arguments.

    Raises:
        TypeError: a value is a symbol of `torch.fx.symbolic_trace`.
    """
    if any(isinstance(value, torch.fx.Proxy) for value in values):
        raise TypeError(
            "torch.fx.symbolic_trace (and torchvision's create_feature_extractor, which calls it) "
            "cannot follow a sparse model: what is computed depends on sizes, which are symbols "
            "there. torch.export.export(model, (images,)) gives a graph of torch.fx, and "
            "model.forward_intermediates(images) the features of any block"
        )
