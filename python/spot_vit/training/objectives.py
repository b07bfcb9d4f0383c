"""Objectives: what `fit` calls for the loss, with whatever it needs besides the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spot_vit.training.keep_sampling import SampledKeep
from spot_vit.training.losses import LossWeights, Teacher, spot_loss
from spot_vit.utils.modes import unwrap

Parts = dict[str, Tensor]

Objective = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Parts]]
"""Maps (model in training mode, images, targets) to the loss and its named terms."""


def dense_objective(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
    """Cross-entropy of a model that returns logits."""
    return F.cross_entropy(model(images), target), {}


class SpotObjective:
    """The loss of a SPOT ViT, with a frozen timm ViT as teacher or without one.

    Args:
        keep_ratios: the share of patches each stage should keep, or a `SampledKeep` that draws a
            budget at every step.
        teacher: dense model with the student's token grid, wrapped or not; it is put in eval mode
            and frozen.
        weights: weights of the loss terms.
    """

    def __init__(
        self,
        keep_ratios: Sequence[float] | SampledKeep,
        teacher: nn.Module | None = None,
        weights: LossWeights | None = None,
    ) -> None:
        self.keep_ratios, self.weights = keep_ratios, weights
        self.teacher = frozen(teacher)

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """The loss and its terms; the model, wrapped or not, returns a ``SpotOutput``."""
        view = view_of(self.teacher, images)
        ratios = self.keep_ratios
        if isinstance(ratios, SampledKeep):
            with ratios(model) as drawn:
                output = model(images, aux=True)
            return spot_loss(output, target, drawn, view, self.weights)
        return spot_loss(model(images, aux=True), target, ratios, view, self.weights)


def frozen(teacher: nn.Module | None) -> Any:
    """The model inside `teacher`, in eval mode and without gradients; None for None."""
    return None if teacher is None else unwrap(teacher).eval().requires_grad_(False)


@torch.no_grad()
def view_of(teacher: Any, images: Tensor) -> Teacher | None:
    """Logits and tokens that a frozen timm model gives; None without one."""
    if teacher is None:
        return None
    tokens = teacher.forward_features(images)
    return Teacher(teacher.forward_head(tokens), tokens)
