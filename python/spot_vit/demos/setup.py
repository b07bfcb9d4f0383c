"""What the demonstrations share: sizes, the dense model, training, and trained models kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader

from spot_vit.data.digits import ClutteredDigits
from spot_vit.models.convert import sparsify
from spot_vit.models.saved import save
from spot_vit.training.checkpoint import load_checkpoint, read_config
from spot_vit.training.fit import fit
from spot_vit.training.keep_sampling import SampledKeep
from spot_vit.training.objectives import Objective, SpotObjective, dense_objective
from spot_vit.training.param_groups import param_groups
from spot_vit.utils.machine import versions

_RANDOM = "random"  # of the config of a trained model: torch's state behind its training


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of the demonstration, found by trial (our choice)."""

    width: int = 96
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 2.0
    steps: int = 2000
    lr: float = 1e-3
    extra_steps: int = 350
    extra_lr: float = 2e-4
    predictor_lr: float = 1e-3
    batch_size: int = 32
    weight_decay: float = 0.05
    ramp: float = 0.4  # share of the dense training over which the clutter grows
    keep: float = 0.6
    at: Sequence[int] = (1, 2, 3)
    test_images: int = 1440
    latency_rounds: int = 40
    data: Mapping[str, Any] = field(default_factory=dict)  # settings of ClutteredDigits

    def digits(self, split: str, length: int, **settings: Any) -> ClutteredDigits:
        """The data set of the demonstration."""
        return ClutteredDigits(split, length, **self.data, **settings)


def build_dense(recipe: Recipe) -> VisionTransformer:
    """Makes the dense model, for float32 images [B, 1, 64, 64]."""
    model: Any = timm.create_model(
        "digits_vit",
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        mlp_ratio=recipe.mlp_ratio,
    )
    return model


def train_phase(
    model: nn.Module,
    parameters: Any,
    recipe: Recipe,
    seed: int,
    name: str,
    objective: Objective = dense_objective,
    *,
    first: bool = False,
) -> None:
    """One phase: the first training with growing clutter, or extra steps on new images."""
    steps, lr = (recipe.steps, recipe.lr) if first else (recipe.extra_steps, recipe.extra_lr)
    images = steps * recipe.batch_size
    ramp = int(recipe.ramp * images) if first else 0
    # Seeds are even for the first phase and odd for the others: no image comes back.
    data = recipe.digits("train", images, ramp=ramp, seed=2 * seed + (not first))
    fit(
        model,
        DataLoader(data, batch_size=recipe.batch_size),
        torch.optim.AdamW(parameters, lr=lr, weight_decay=recipe.weight_decay),
        objective,
        warmup=steps // 10,
        clip_grad=1.0,
        name=name,
    )


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
    model: Any = sparsify(copy.deepcopy(dense), at=list(recipe.at), **spot)
    groups = param_groups(
        model,
        lr=recipe.predictor_lr,
        weight_decay=recipe.weight_decay,
        backbone_lr_scale=recipe.extra_lr / recipe.predictor_lr,
        freeze_epochs=0,
        head="pretrained",
    )
    draw = sample_keep and SampledKeep(*sample_keep, seed=seed)
    objective = SpotObjective(draw, teacher=copy.deepcopy(dense))
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
    """Trains and saves, unless `path` holds a model that was trained just so.

    Random numbers go on as after the training, so that an interrupted run ends as another would.
    The file is one of `spot_vit.models.saved.save`. A damaged one is named, and made again.
    """
    config = json.loads(json.dumps({**config, "versions": versions()}))  # as it will be read
    found = _config_of(path)
    random = found.pop(_RANDOM, None)
    if found == config and random is not None:
        load_checkpoint(path, model)
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(random), dtype=torch.uint8))
        return
    train()
    random = bytes(torch.get_rng_state().tolist()).hex()
    save(path, model, config={**config, _RANDOM: random})


def _config_of(path: Path) -> dict[str, Any]:
    """How a model was trained; nothing where it is not there or damaged."""
    if not path.exists():
        return {}
    try:
        return read_config(path)
    except ValueError as error:
        warnings.warn(f"{error}; it is trained again", RuntimeWarning, stacklevel=3)
        return {}
