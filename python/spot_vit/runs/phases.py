"""The phases of a run, and the rate of each step in one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from spot_vit.config.recipe import Recipe
from spot_vit.utils.errors import UserError

DENSE, CONNECTIVITY, FINETUNE = "dense", "connectivity", "finetune"


@dataclass(frozen=True)
class Phase:
    """A training with an optimiser and a schedule of its own.

    Attributes:
        name: "dense" trains the dense model, "connectivity" the predictors of sparse attention,
            "finetune" the model that the run is for.
        steps: optimiser steps in all.
        per_epoch: optimiser steps of an epoch; those of the phase where a data set of unknown
            length is read once.
        lr: peak rate.
        min_lr: rate at the end.
        warmup: steps of linear warm-up.
    """

    name: str
    steps: int
    per_epoch: int
    lr: float
    min_lr: float
    warmup: int

    @property
    def epochs(self) -> int:
        """Epochs, the last one perhaps cut short."""
        return math.ceil(self.steps / self.per_epoch)


def phases_of(recipe: Recipe, batches: int | None) -> list[Phase]:
    """The phases that a recipe asks for.

    Args:
        recipe: with `steps`, each phase has so many instead of its epochs, and the warm-up keeps
            its share.
        batches: micro-batches of an epoch, None where the data set does not say its length.

    Raises:
        UserError: an unknown length, and no steps.
    """
    if batches is None and recipe.steps is None:
        raise UserError(
            "steps: the data set does not say how many pictures it has, so an epoch has no end; "
            "give --steps N (or --train-num-samples N)"
        )

    def phase(name: str, epochs: float, lr: float, min_lr: float, warmup: float) -> Phase:
        if batches is None:
            per_epoch = steps = recipe.steps or 1
        else:
            per_epoch = math.ceil(batches / recipe.grad_accum_steps)
            steps = recipe.steps or round(epochs * per_epoch)
        share = min(warmup / epochs, 1.0) if epochs else 0.0
        return Phase(name, steps, per_epoch, lr, min_lr, round(share * steps))

    found = []
    if recipe.dense_epochs:
        lr = recipe.lr if recipe.dense_lr is None else recipe.dense_lr
        warmup = min(recipe.warmup_epochs, recipe.dense_epochs / 10)
        found.append(phase(DENSE, recipe.dense_epochs, lr, recipe.min_lr, warmup))
    if recipe.attention_keep is not None and recipe.stage != FINETUNE:
        lr, low = recipe.connectivity_lr, recipe.connectivity_min_lr
        low = recipe.min_lr if low is None else low
        warmup = min(recipe.warmup_epochs, recipe.connectivity_epochs)
        found.append(phase(CONNECTIVITY, recipe.connectivity_epochs, lr, low, warmup))
    if recipe.attention_keep is None or recipe.stage != CONNECTIVITY:
        args = (recipe.epochs, recipe.lr, recipe.min_lr, recipe.warmup_epochs)
        found.append(phase(FINETUNE, *args))
    if empty := [one.name for one in found if one.steps < 1]:
        raise UserError(
            f"phase {empty[0]}: no step to train: an epoch has {batches} batches; a smaller "
            "--batch-size, or more pictures"
        )
    return found


class Rates:
    """timm's schedule over the steps of a phase, and zero while a group of parameters rests.

    Args:
        optimizer: whose groups may have `lr_scale` and `freeze_epochs`, see `param_groups`.
        phase: of the run.
        recipe: names the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, phase: Phase, recipe: Recipe) -> None:
        self.optimizer, self.phase = optimizer, phase
        self._schedule: Any
        self._schedule, _ = create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=phase.steps,  # its unit is a step here
            min_lr=phase.min_lr,
            warmup_lr=min(recipe.warmup_lr, phase.lr),
            warmup_epochs=phase.warmup,
            decay_epochs=recipe.decay_epochs * phase.per_epoch,
            decay_milestones=[epoch * phase.per_epoch for epoch in recipe.decay_milestones],
            decay_rate=recipe.decay_rate,
        )

    def set(self, step: int) -> float:
        """Sets the rates of a step, counted from 0, and gives the largest."""
        self._schedule.step(step)
        for group in self.optimizer.param_groups:
            if step < group.get("freeze_epochs", 0) * self.phase.per_epoch:
                group["lr"] = 0.0
        return max(group["lr"] for group in self.optimizer.param_groups)
