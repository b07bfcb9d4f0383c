"""Differences between models with their errors, and how they are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def paired_difference(
    correct: Tensor, baseline: Tensor, groups: Sequence[int] | np.ndarray
) -> tuple[float, float]:
    """Compares two models on the same images.

    Args:
        correct: bool [images], where the model is right.
        baseline: bool [images], where the other one is.
        groups: [images], equal for images that are not independent, such as several views of one
            digit.

    Returns:
        The difference of the two accuracies and its standard error over groups, from 0 to 1.
    """
    delta = correct.double() - baseline.double()
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(group), delta - delta.mean())
    variance = sums.square().sum() * count / max(count - 1, 1)
    return delta.mean().item(), variance.sqrt().item() / len(delta)


def difference(ours: Tensor, theirs: Tensor, groups: np.ndarray) -> tuple[float, float]:
    """Compares two methods, each trained with several seeds and tested on the same images.

    Args:
        ours: [seeds, images], how right each model is on each image, 0 to 1.
        theirs: the same of the other method.
        groups: [images], equal for images that are not independent.

    Returns:
        Mean of ours - theirs and its standard error. Images and seeds both are samples: their
        errors add in squares. That counts the images' part in the spread between seeds twice, and
        so errs on the side of a tie (our choice).
    """
    ours, theirs = ours.double(), theirs.double()
    mean, images = paired_difference(ours.mean(dim=0), theirs.mean(dim=0), groups)
    by_seed = (ours - theirs).mean(dim=1).tolist()
    seeds = statistics.stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else 0.0
    return mean, math.hypot(images, seeds)


def spread(shares: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds, in percent; of one seed the figure alone."""
    mean = f"{statistics.mean(shares):.{digits}%}"
    if len(shares) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(shares):.{max(digits, 1)}f}"


def over_seeds(count: int) -> str:
    """Words for what `spread` shows of so many seeds."""
    return f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed only"


def signed(found: Sequence[float]) -> str:
    """A difference and its standard error, in points."""
    return f"{100 * found[0]:+.2f} ± {100 * found[1]:.2f}"
