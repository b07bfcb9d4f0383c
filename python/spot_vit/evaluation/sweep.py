"""One model at several budgets, beside others: what each costs, and how far they are apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spot_vit.evaluation.accuracy import Evaluation
from spot_vit.evaluation.statistics import paired_difference
from spot_vit.measure import flops
from spot_vit.measure.latency import compare_latency
from spot_vit.utils.machine import Clock, contention, wait_for_quiet

ROUNDS = (3, 30)
PATIENCE = 5.0  # seconds to wait for a quiet machine


class Prepared(nn.Module):
    """A model that is prepared anew before each of its batches, such as set to its budget.

    So one model can stand in several places of a comparison, without copies of its weights.

    Args:
        model: shared with other places.
        prepare: is called with the model before it runs; None does nothing.
        amp_dtype: of autocast; None computes as the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[nn.Module], Any] | None = None,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.module = model  # a name that `unwrap` knows
        self.prepare = prepare
        self.amp_dtype = amp_dtype

    def forward(self, images: Tensor, **arguments: Any) -> Any:
        """What the model gives, prepared."""
        self.ready()
        with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.module(images, **arguments)

    def ready(self) -> nn.Module:
        """The model, prepared."""
        if self.prepare is not None:
            self.prepare(self.module)
        return self.module


def gmacs_of(model: Prepared, input_size: tuple[int, int, int]) -> float | None:
    """Billions of multiply-accumulates per image of (channels, height, width).

    None where they cannot be counted. Exported files say what was counted of their models.
    """
    if hasattr(model.module, "gmacs"):
        known: Any = model.module
        return known.gmacs
    return flops.gmacs_of(model.ready(), input_size)


@dataclass(frozen=True)
class Speed:
    """How fast models run side by side on this machine.

    Attributes:
        images_per_second: by model, from the median time of a batch; the forward pass alone.
        ratio: by model, median over rounds of its time by that of the first model, same round.
            Empty on a busy machine: then no ratio can be trusted.
        batch: images in a batch.
        busy: why figures cannot be trusted, None where they can.
    """

    images_per_second: dict[str, float]
    ratio: dict[str, float]
    batch: int
    busy: str | None


class _Fed(nn.Module):
    """A model that is shown images of its own, whatever it is given."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.module, self.images = model, images

    def forward(self, _images: Tensor) -> Any:
        return self.module(self.images)


def speed_of(
    models: Mapping[str, nn.Module], images: Mapping[str, Tensor], seconds: float = 10.0
) -> Speed:
    """Times forward passes of the models, in turn, so that a busy machine slows all alike.

    Args:
        models: by name, in eval mode afterwards as before.
        images: [B, C, H, W] by the same names, on the models' device; B is the same for all.
        seconds: about how long it may take, though at least three rounds are run.
    """
    first = next(iter(images.values()))
    models = {name: _Fed(model, images[name]) for name, model in models.items()}
    once = compare_latency(models, first, rounds=2, warmup=1, name="speed, warm-up")
    a_round = sum(one.median for one in once.values()) / 1e3
    fewest, most = ROUNDS
    rounds = int(min(max(seconds / max(a_round, 1e-6), fewest), most))
    wait_for_quiet(min(PATIENCE, seconds))
    start = Clock.now()
    times = compare_latency(models, first, rounds=rounds, warmup=0, name="speed")
    passed = Clock.now().since(start)
    busy = contention(passed, torch.get_num_threads(), os.cpu_count() or 1)
    return Speed(
        {name: 1e3 * len(first) / time.median for name, time in times.items()},
        {} if busy else {name: time.ratio for name, time in times.items()},
        len(first),
        busy,
    )


def paired(
    ours: Evaluation, theirs: Evaluation, groups: Sequence[int] | np.ndarray | None = None
) -> tuple[float, float]:
    """Difference of top-1 and its standard error, over the images that both have seen.

    Args:
        ours: of one model.
        theirs: of the other one.
        groups: for each position in the data set, equal for images that are not independent;
            None where all are.

    Returns:
        Ours minus theirs and its standard error, shares from 0 to 1.

    Raises:
        ValueError: no image was seen by both.
    """
    index, ours_at, theirs_at = np.intersect1d(
        ours.index.numpy(), theirs.index.numpy(), assume_unique=True, return_indices=True
    )
    if not len(index):
        raise ValueError("the two evaluations have no image in common")
    group = index if groups is None else np.asarray(groups)[index]
    return paired_difference(
        ours.correct[torch.from_numpy(ours_at)], theirs.correct[torch.from_numpy(theirs_at)], group
    )
