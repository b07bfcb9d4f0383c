"""Latency of several models, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spot_vit.train import eval_mode


@dataclass
class Latency:
    """Time of one forward pass.

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
        models: name to model, all on one CPU and fed the same images; the first is the baseline.
        images: [B, C, H, W].
        rounds: timed passes of each model.
        warmup: passes of each model before timing starts.
        name: label of the progress bar.
    """
    times: dict[str, list[float]] = {key: [] for key in models}
    for step in tqdm(range(warmup + rounds), desc=name, unit="round", mininterval=0.5):
        for key, model in models.items():
            with eval_mode(model):
                started = time.perf_counter()
                model(images)
                elapsed = 1e3 * (time.perf_counter() - started)
            if step >= warmup:
                times[key].append(elapsed)
    baseline = next(iter(times.values()))
    result = {}
    for key, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        ratios = [value / base for value, base in zip(values, baseline, strict=True)]
        result[key] = Latency(median, low, high, statistics.median(ratios))
    return result
