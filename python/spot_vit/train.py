"""A small training loop, evaluation, and files that are either complete or not there."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from spot_vit.losses import LossWeights, Teacher, spot_loss
from spot_vit.sampling import SampledKeep

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
        teacher: dense model with the student's token grid; it is put in eval mode and frozen.
        weights: weights of the loss terms.
    """

    def __init__(
        self,
        keep_ratios: list[float] | SampledKeep,
        teacher: nn.Module | None = None,
        weights: LossWeights | None = None,
    ) -> None:
        self.keep_ratios, self.weights = keep_ratios, weights
        self.teacher: Any = teacher and teacher.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Parts]:
        """The loss and its terms; the model returns a ``SpotOutput`` for ``aux=True``."""
        view = None
        if self.teacher is not None:
            with torch.no_grad():
                tokens = self.teacher.forward_features(images)
                view = Teacher(self.teacher.forward_head(tokens), tokens)
        if isinstance(self.keep_ratios, SampledKeep):
            with self.keep_ratios(model) as ratios:
                output = model(images, aux=True)
        else:
            output, ratios = model(images, aux=True), self.keep_ratios
        return spot_loss(output, target, ratios, view, self.weights)


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
    objective: Objective = dense_objective,
    *,
    epochs: int = 1,
    warmup: int = 0,
    clip_grad: float = math.inf,
    name: str = "train",
) -> dict[str, float]:
    """Trains a model in place, with a progress bar.

    Args:
        model: any module; batches are moved to its device.
        loader: yields (images, targets, ...); whatever follows is ignored.
        optimizer: over the model's parameters; each group's rate is its peak rate.
        objective: the loss, ``dense_objective`` or a ``SpotObjective`` or one of yours.
        epochs: passes over the loader; the schedule spans all of them.
        warmup: steps of linear warm-up before the cosine decay to zero.
        clip_grad: largest norm of the gradient of all parameters together.
        name: label of the progress bar.

    Returns:
        steps, seconds, and running means (over some 50 steps) of loss, gradient_norm and the
        loss terms.

    Raises:
        FloatingPointError: when loss or gradient stops being finite; the parameters are then
            those of the last good step.
    """
    device = next(model.parameters()).device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = cosine_schedule(optimizer, epochs * len(loader), warmup, len(loader))
    means: dict[str, float] = {}
    started, step = time.perf_counter(), 0
    model.train()
    with tqdm(total=epochs * len(loader), desc=name, unit="step", mininterval=0.5) as bar:
        for batch in (batch for _ in range(epochs) for batch in loader):
            loss, parts = objective(model, batch[0].to(device), batch[1].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
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


@dataclass
class Evaluation:
    """Result of ``evaluate``.

    Attributes:
        top1: share of images whose label scored highest, 0 to 1.
        loss: mean cross-entropy.
        correct: bool [images], in the loader's order.
    """

    top1: float
    loss: float
    correct: Tensor = field(repr=False)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader[Any], name: str = "evaluate") -> Evaluation:
    """Classifies everything the loader yields, in eval mode; the model's mode is restored."""
    device = next(model.parameters()).device
    correct, losses = [], []
    with eval_mode(model):
        for batch in tqdm(loader, desc=name, unit="batch", mininterval=0.5):
            target = batch[1].to(device)
            logits = model(batch[0].to(device)).float()
            correct.append(logits.argmax(dim=1) == target)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    hits = torch.cat(correct).cpu()
    return Evaluation(hits.float().mean().item(), torch.cat(losses).mean().item(), hits)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches to eval mode, and afterwards back to whatever it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in the same folder; on success it replaces ``path`` at one stroke.

    The data reaches the disk before the name does, so a crash at any time leaves the old file or
    the new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: a kill leaves no heap of them
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # the rename itself


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a JSON file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, config: Mapping[str, Any]
) -> None:
    """Writes the weights as safetensors, with ``config`` as JSON in its metadata, atomically."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as temporary:
        # Not save_file: it renames by itself, and makes files that only the owner may read.
        temporary.write_bytes(save(tensors, {"config": json.dumps(config)}))


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the config of a checkpoint without reading its weights."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("config", "{}"))


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Loads the weights into a model of the same architecture and returns the config."""
    load_model(model, path, strict=True)
    return read_config(path)
