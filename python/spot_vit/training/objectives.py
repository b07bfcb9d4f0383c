"""Objectives: what `fit` calls for the loss, with whatever it needs besides the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.models.loop import SpotLoop, SpotOutput
from spot_vit.nn.decide import noise_share
from spot_vit.training.auxiliary import apart, check_auxiliary, teacher_apart
from spot_vit.training.keep_sampling import SampledKeep
from spot_vit.training.losses import (
    Criterion,
    Distillation,
    LossWeights,
    check_terms,
    cross_entropy,
    feature_distillation,
    softmax_distillation,
    spot_loss,
)
from spot_vit.training.ratios import check_ratios, target_ratios
from spot_vit.training.schedules import KeepSchedule, NoiseSchedule
from spot_vit.training.teacher import FrozenTeacher
from spot_vit.utils.modes import unwrap

Parts = dict[str, Tensor]

Objective = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Parts]]
"""Maps (model in training mode, images, targets or None) to the loss and its named terms."""


def dense_objective(
    model: nn.Module, images: Tensor, target: Any, *, criterion: Criterion = cross_entropy
) -> tuple[Tensor, Parts]:
    """The loss of a model that returns logits.

    Args:
        model: in training mode.
        images: [B, channels, H, W].
        target: what the criterion takes.
        criterion: softmax cross-entropy, its target checked as in `spot_loss`, or another, e.g.
            `partial(dense_objective, criterion=F.binary_cross_entropy_with_logits)`.

    Raises:
        ValueError: no target, or one that is no probabilities.
    """
    if target is None:
        raise ValueError(
            "target: a dense model learns from labels, and the loader gives none; a SPOT model can "
            "learn from a teacher alone, see SpotObjective"
        )
    return criterion(model(images), target), {}


def default_objective(model: nn.Module) -> Objective:
    """`SpotObjective()` for a SPOT model, wrapped or not, `dense_objective` for any other."""
    return SpotObjective() if isinstance(unwrap(model), SpotLoop) else dense_objective


class SpotObjective:
    """The loss of a SPOT ViT, with a frozen timm ViT as teacher or without one.

    Terms are those of `spot_loss`. Among the terms it returns there is also, where predictors
    decide, "noise_share", which is none of the loss: the share of the kept tokens that noise put in
    the place of better ones, mean over stages.

    Batches may come without targets (None): then the teacher is all there is to learn from. A model
    without a head (`num_classes=0`) has no logits: targets are not looked at unless a criterion is
    given, and its pooled features take the place of logits, with `feature_distillation`.

    Args:
        keep_ratios: the share of patches each stage should keep. None for the model's own; ρ or one
            cumulative ratio per stage, which must agree with the model's, as inference uses those;
            empty for no ratio term; a `SampledKeep` that draws a budget at every step, or a
            `KeepSchedule`.
        teacher: dense model with the student's token grid, wrapped or not; at the first step it is
            put in eval mode and frozen. With `weights.mse` 0 any module that gives logits will do:
            a CNN, a ViT of another grid or width, a model of another library.
        weights: weights of the loss terms.
        criterion: takes the place of the cross-entropy, see `spot_loss`.
        distillation: takes the place of the KL of logits, see `spot_loss`.
        auxiliary: for LV-ViT, whose two heads it takes apart as published code does when it
            distils: the class head's logits stand for the logits, and the auxiliary head's of each
            patch for its features, compared by "kl" (DynamicViT's code) or "mse" (Sparsifiner's).
            None trains on the logits that inference uses.
        noise: a `NoiseSchedule` in place of the configuration's constant noise.

    Raises:
        ValueError: arguments that do not fit each other; in a step: ratios, a target or a teacher
            that do not fit the model.
        TypeError: in a step, no SPOT model, or `auxiliary` and no LV-ViT.
    """

    def __init__(
        self,
        keep_ratios: float | Sequence[float] | SampledKeep | KeepSchedule | None = None,
        teacher: nn.Module | None = None,
        weights: LossWeights | None = None,
        *,
        criterion: Criterion | None = None,
        distillation: Distillation | None = None,
        auxiliary: str | None = None,
        noise: NoiseSchedule | None = None,
    ) -> None:
        check_terms(criterion, distillation, teacher is not None, weights)
        check_auxiliary(auxiliary)
        self.keep_ratios: Any = keep_ratios if callable(keep_ratios) else check_ratios(keep_ratios)
        self.teacher, self.weights = FrozenTeacher(teacher), weights
        self.criterion, self.distillation = criterion, distillation
        self.auxiliary, self.noise = auxiliary, noise

    def __call__(self, model: nn.Module, images: Tensor, target: Any) -> tuple[Tensor, Parts]:
        """The loss and its terms.

        Args:
            model: in training mode, wrapped or not; called so that it returns a `SpotOutput`.
            images: [B, channels, H, W].
            target: as in `spot_loss`.
        """
        weights = self.weights or LossWeights()
        # LV-ViT's class head, which `auxiliary` takes apart, reads tokens too.
        view = self.teacher.view(model, images, weights.mse != 0 or self.auxiliary is not None)
        with (
            self._budget(model) as ratios,
            nullcontext() if self.noise is None else self.noise(model),
        ):
            output = self._output(model, images)
        noise = _noise_of(output)
        if self.auxiliary is not None:
            output = apart(model, output)
            view = None if view is None else teacher_apart(self.teacher.model, view)
        distillation = self.distillation
        if getattr(unwrap(model), "num_classes", None) == 0:
            target = None if self.criterion is None else target
            distillation = distillation or feature_distillation
        elif target is None:
            distillation = distillation or softmax_distillation
        loss, parts = spot_loss(
            output,
            target,
            ratios,
            view,
            self.weights,
            criterion=self.criterion,
            distillation=distillation,
            token_term=self.auxiliary or "mse",
        )
        return loss, {**parts, **noise}

    def _budget(self, model: nn.Module) -> AbstractContextManager[Sequence[float]]:
        """A context with the step's budget, which gives the ratios that the loss asks for."""
        if callable(self.keep_ratios):
            return self.keep_ratios(model)
        return nullcontext(target_ratios(model, self.keep_ratios))

    def _output(self, model: nn.Module, images: Tensor) -> SpotOutput:
        inside = unwrap(model)
        if (
            not isinstance(inside, SpotLoop)
            and "aux" not in inspect.signature(inside.forward).parameters
        ):
            raise TypeError(f"expected a SPOT model (see sparsify), got {type(inside).__name__}")
        return model(images, aux=True)


def _noise_of(output: SpotOutput) -> Parts:
    """The mean share of noise over the stages that decided in this pass, where masks were drawn."""
    if output.index or not output.logp or len(output.logp) != len(output.masks):
        return {}
    before = [None, *output.masks[:-1]]
    shares = map(noise_share, output.logp, output.masks, before)
    return {"noise_share": torch.stack(list(shares)).mean()}
