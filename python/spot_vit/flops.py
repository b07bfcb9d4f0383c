"""Cost of a model in multiply-accumulates, counted rather than estimated."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Multiply-accumulates per image.

    Attributes:
        total: stem, blocks, head, predictors and statistics.
        predictor: the share of the relevance modules.
    """

    total: int
    predictor: int


def count_flops(model: nn.Module, input_size: tuple[int, int, int]) -> FlopCount:
    """Counts one eval forward pass at the current budget.

    The model runs on the meta device: no arithmetic is done, no weight is copied, and fused
    attention is counted in full, which it is not on CPU. Normalisation, activations and softmax are
    not counted, as in the papers' figures.

    Args:
        model: any model; a SPOT model is counted at the budget it is set to.
        input_size: (channels, height, width) of one image.

    Returns:
        Counts per image.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    dtype = next(iter(model.parameters())).dtype
    image = torch.empty(1, *input_size, device="meta", dtype=dtype)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, shapes, (image,))
    finally:
        model.train(training)
    by_module = {
        name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()
    }
    predictor = sum(count for name, count in by_module.items() if name.endswith(".relevance"))
    return FlopCount(by_module["Global"], predictor)
