"""A small training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from spot_vit.training.objectives import Objective, default_objective


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
) -> dict[str, float]:
    """Trains a model in place, with a progress bar.

    Args:
        model: any module; batches are moved to its device.
        loader: yields (images, targets, ...), of which whatever follows is ignored, or images
            alone: the objective's target is None then.
        optimizer: over the model's parameters; each group's rate is its peak rate.
        objective: the loss, ``dense_objective`` or a ``SpotObjective`` or one of yours. None is
            ``SpotObjective()`` for a SPOT model and ``dense_objective`` for any other.
        epochs: passes over the loader; the schedule spans all of them.
        warmup: steps of linear warm-up before the cosine decay to zero.
        clip_grad: largest norm of the gradient of all parameters together.
        after_backward: called when a step's gradients are there, before they are clipped.
        name: label of the progress bar.

    Warns:
        UserWarning: a group of the optimizer rests for all of the epochs, see `param_groups`.

    Returns:
        steps, seconds, and running means (over some 50 steps) of loss, gradient_norm and the
        loss terms.

    Raises:
        ValueError: the loader is empty.
        FloatingPointError: when loss or gradient stops being finite; the parameters are then
            those of the last good step.
    """
    if not len(loader):
        raise ValueError(
            f"{name}: the loader is empty; does drop_last drop its only batch, or is the folder of "
            "images another one?"
        )
    _warn_of_rest(optimizer, epochs, name)
    objective = objective or default_objective(model)
    device = next(model.parameters()).device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = cosine_schedule(optimizer, epochs * len(loader), warmup, len(loader))
    means: dict[str, float] = {}
    started, step = time.perf_counter(), 0
    model.train()
    with tqdm(total=epochs * len(loader), desc=name, unit="step", mininterval=0.5) as bar:
        for batch in (batch for _ in range(epochs) for batch in loader):
            images, target = (batch, None) if isinstance(batch, Tensor) else _first_two(batch)
            target = target.to(device) if isinstance(target, Tensor) else target
            loss, parts = objective(model, images.to(device), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            after_backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip_grad)
            scalars = {"loss": loss.detach(), "gradient_norm": norm, **parts}
            # One transfer for all of them: each one waits for the device.
            values = dict(zip(scalars, torch.stack([*scalars.values()]).tolist(), strict=True))
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                terms = ", ".join(f"{key} {value:g}" for key, value in values.items())
                raise FloatingPointError(
                    f"{name}: not finite at step {step}: {terms}; lower the learning rate or "
                    "clip_grad, or check the data"
                )
            optimizer.step()
            schedule.step()
            step += 1
            for key, value in values.items():
                means[key] = means.get(key, value) + (value - means.get(key, value)) / min(step, 50)
            bar.set_postfix({"loss": f"{means['loss']:.3f}"}, refresh=False)
            bar.update()
    return {"steps": step, "seconds": time.perf_counter() - started, **means}


def _first_two(batch: Sequence[Any]) -> tuple[Any, Any]:
    return batch[0], batch[1] if len(batch) > 1 else None


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
