"""A small training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from spot_vit.data.batches import grouped, images_and_target
from spot_vit.training.objectives import Objective, default_objective
from spot_vit.training.step import NonFiniteStep, TrainStep


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0, epoch: int = 0
) -> LambdaLR:
    """Scales every group's own rate: up linearly over ``warmup`` steps, then a cosine to zero.

    A group with ``freeze_epochs`` (see ``param_groups``) has rate zero for as many epochs, of
    ``epoch`` steps each.
    """

    def factor(step: int, frozen: int) -> float:
        if step < frozen:
            return 0.0
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))

    frozen = [group.get("freeze_epochs", 0) * epoch for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(factor, frozen=until) for until in frozen])


def fit(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    objective: Objective | None = None,
    *,
    epochs: int = 1,
    warmup: int = 0,
    clip_grad: float = math.inf,
    after_backward: Callable[[], Any] = lambda: None,
    name: str = "train",
    accumulate: int = 1,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Trains a model in place, with a progress bar.

    Args:
        model: any module; batches are moved to its device.
        loader: yields (images, targets, ...), of which whatever follows is ignored, or mappings
            with "image" and "label" or "pixel_values" and "labels", or images alone: the
            objective's target is None then.
        optimizer: over the model's parameters; each group's rate is its peak rate.
        objective: the loss, ``dense_objective`` or a ``SpotObjective`` or one of yours. None is
            ``SpotObjective()`` for a SPOT model and ``dense_objective`` for any other.
        epochs: passes over the loader; the schedule spans all of them.
        warmup: steps of linear warm-up before the cosine decay to zero.
        clip_grad: largest norm of the gradient of all parameters together.
        after_backward: called when a step's gradients are there, before they are clipped.
        name: label of the progress bar.
        accumulate: batches a step, whose gradients are averaged over images; the last step of an
            epoch may have fewer.
        amp_dtype: bfloat16 or float16, the latter with a scaler; see `TrainStep`.

    Warns:
        UserWarning: a group of the optimizer rests for all of the epochs, see `param_groups`.

    Returns:
        steps, seconds, and running means (over some 50 steps) of loss, gradient_norm and the
        loss terms.

    Raises:
        ValueError: the loader is empty.
        TypeError: a batch of another form.
        NonFiniteStep: a FloatingPointError, when loss or gradient stops being finite; the
            parameters are then those of the last good step.
    """
    if not len(loader):
        raise ValueError(
            f"{name}: the loader is empty; does drop_last drop its only batch, or is the folder of "
            "images another one?"
        )
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 batch a step, got {accumulate}")
    _warn_of_rest(optimizer, epochs, name)
    train_step = TrainStep(
        model,
        optimizer,
        objective or default_objective(model),
        amp_dtype=amp_dtype,
        clip_grad=clip_grad,
        after_backward=after_backward,
    )
    per_epoch = math.ceil(len(loader) / accumulate)
    schedule = cosine_schedule(optimizer, epochs * per_epoch, warmup, per_epoch)
    means: dict[str, float] = {}
    started, step = time.perf_counter(), 0
    model.train()
    with tqdm(total=epochs * per_epoch, desc=name, unit="step", mininterval=0.5) as bar:
        for batches in (group for _ in range(epochs) for group in grouped(loader, accumulate)):
            try:
                values = train_step([images_and_target(batch) for batch in batches])
            except NonFiniteStep as error:
                raise NonFiniteStep(error.values, f" at step {step}", name) from None
            schedule.step()
            step += 1
            for key, value in values.items():
                means[key] = means.get(key, value) + (value - means.get(key, value)) / min(step, 50)
            bar.set_postfix({"loss": f"{means['loss']:.3f}"}, refresh=False)
            bar.update()
    return {"steps": step, "seconds": time.perf_counter() - started, **means}


def _warn_of_rest(optimizer: torch.optim.Optimizer, epochs: int, name: str) -> None:
    """Warns of groups that never train."""
    rest = {
        str(group.get("name", number)): group["freeze_epochs"]
        for number, group in enumerate(optimizer.param_groups)
        if 0 < epochs <= group.get("freeze_epochs", 0)
    }
    if rest:
        groups = ", ".join(f"{group} (freeze_epochs={until})" for group, until in rest.items())
        warnings.warn(
            f"{name}: {epochs} epochs, and these groups rest for all of them, so they never train: "
            f"{groups}; give param_groups a smaller freeze_epochs, 0 for none",
            stacklevel=3,
        )
