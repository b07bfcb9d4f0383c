"""What the comparisons share: models trained once and kept, and differences with their errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import spot_vit
from spot_vit.demo import Recipe, build_dense, train_phase, versions
from spot_vit.report import paired_difference
from spot_vit.train import SpotObjective, load_checkpoint, read_config, save_checkpoint


def trained_dense(output: Path, recipe: Recipe, seed: int) -> nn.Module:
    """The dense model of a seed, trained, or read from `output`."""
    torch.manual_seed(seed)
    dense = build_dense(recipe)
    name = f"dense-seed{seed}"
    train_once(
        output / f"{name}.safetensors",
        dense,
        {"recipe": dataclasses.asdict(recipe), "seed": seed},
        lambda: train_phase(dense, dense.parameters(), recipe, seed, name, first=True),
    )
    return dense.eval()


def trained_sparse(
    path: Path,
    dense: nn.Module,
    recipe: Recipe,
    seed: int,
    sample_keep: tuple[float, float] | None = None,
    **spot: Any,
) -> Any:
    """The dense model made sparse and fine-tuned on the seed's images, or read from `path`.

    Args:
        path: the checkpoint.
        dense: starting point and teacher; it stays as it is.
        recipe: sizes and rates.
        seed: of decisions and images.
        sample_keep: smallest and largest ρ to draw from at every step, None for a fixed budget.
        **spot: fields of `SpotConfig`.
    """
    torch.manual_seed(seed)
    model: Any = spot_vit.sparsify(copy.deepcopy(dense), at=list(recipe.at), **spot)
    groups = spot_vit.param_groups(
        model,
        lr=recipe.predictor_lr,
        weight_decay=recipe.weight_decay,
        backbone_lr_scale=recipe.extra_lr / recipe.predictor_lr,
        freeze_epochs=0,
    )
    draw = sample_keep and spot_vit.SampledKeep(*sample_keep, seed=seed)
    ratios = draw or model.spot_config.keep_ratios()
    objective = SpotObjective(ratios, teacher=copy.deepcopy(dense))
    config = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "spot": model.spot_config.to_dict(),
        "sample_keep": draw and [draw.low, draw.high, draw.power],
    }
    train_once(
        path, model, config, lambda: train_phase(model, groups, recipe, seed, path.stem, objective)
    )
    return model.eval()


def train_once(
    path: Path, model: nn.Module, config: Mapping[str, Any], train: Callable[[], None]
) -> None:
    """Trains and saves, unless `path` holds a model that was trained just so."""
    config = json.loads(json.dumps({**config, "versions": versions()}))  # as it will be read
    if path.exists() and read_config(path) == config:
        load_checkpoint(path, model)
        return
    train()
    save_checkpoint(path, model, config)


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
    """What `spread` shows for so many seeds."""
    return f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed only"


def signed(found: Sequence[float]) -> str:
    """A difference and its standard error, in points."""
    return f"{100 * found[0]:+.2f} ± {100 * found[1]:.2f}"
