"""Sizes while torch.jit.trace runs a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def known(size: Any) -> Any:
    """A size of a tensor as it is, or as an int where torch.jit.trace made a tensor of it.

    How many tokens stay decides what a pass does, so a traced model serves one image size.
    """
    if not isinstance(size, Tensor):
        return size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(size)
