"""Time of a forward pass or of a training step of several models, measured side by side."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spot_vit.utils.modes import eval_mode
from spot_vit.utils.timing import Side, take_turns

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Any]]
"""Maps (model in training mode, images, targets) to the loss and anything else."""


@dataclass
class Latency:
    """Time of one forward pass or training step.

    Attributes:
        median: milliseconds.
        low: lower quartile, milliseconds.
        high: upper quartile, milliseconds.
        ratio: median over the rounds of this model's time by the first model's, same round.
    """

    median: float
    low: float
    high: float
    ratio: float


@torch.inference_mode()
def compare_latency(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    rounds: int = 30,
    warmup: int = 3,
    name: str = "latency",
) -> dict[str, Latency]:
    """Runs the models in turn, round after round, so that a busy machine slows all alike.

    Args:
        models: name to model, all on the device of the images; the first is the baseline.
        images: [B, C, H, W].
        rounds: timed passes of each model.
        warmup: passes of each model before timing starts.
        name: label of the progress bar.
    """

    def forward(model: nn.Module, _: int) -> None:
        with eval_mode(model):
            model(images)

    sides = {key: partial(forward, model) for key, model in models.items()}
    return _compare(sides, images.device, rounds, warmup, name)


def compare_training(
    models: Mapping[str, nn.Module],
    objectives: Mapping[str, Loss],
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int = 10,
    warmup: int = 2,
    name: str = "training step",
) -> dict[str, Latency]:
    """As `compare_latency`, for a training step: forward, loss and backward, no optimizer.

    Args:
        models: as above; parameters keep their values and end without gradients.
        objectives: the loss of each model.
        images: [B, C, H, W].
        labels: [B] int64.
        rounds: timed steps of each model.
        warmup: steps of each model before timing starts.
        name: label of the progress bar.
    """

    def step(model: nn.Module, objective: Loss, _: int) -> None:
        loss, _parts = objective(model, images, labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    sides = {key: partial(step, model, objectives[key]) for key, model in models.items()}
    training = {key: model.training for key, model in models.items()}
    buffers = {key: copy.deepcopy(dict(model.named_buffers())) for key, model in models.items()}
    try:
        for model in models.values():
            model.train()
        return _compare(sides, images.device, rounds, warmup, name)
    finally:
        for key, model in models.items():
            model.train(training[key])
            for buffer, value in buffers[key].items():  # statistics of batch normalisation
                model.get_buffer(buffer).copy_(value)


def _compare(
    sides: Mapping[str, Side], device: torch.device, rounds: int, warmup: int, name: str
) -> dict[str, Latency]:
    with tqdm(total=rounds, desc=name, unit="round", mininterval=0.5) as bar:
        times = take_turns(sides, device, rounds=rounds, warmup=warmup, after_round=bar.update)
    baseline = next(iter(times.values())).wall
    result = {}
    for key, one in times.items():
        quartiles = statistics.quantiles(one.wall, n=4, method="inclusive")
        low, median, high = (1e3 * quartile for quartile in quartiles)
        ratios = [value / base for value, base in zip(one.wall, baseline, strict=True)]
        result[key] = Latency(median, low, high, statistics.median(ratios))
    return result
