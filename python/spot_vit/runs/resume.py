"""Which folder a run has, and whether a run that goes on is the same run."""

from __future__ import annotations

import time
from pathlib import Path

from spot_vit.config.recipe import Recipe
from spot_vit.config.recipe_files import read
from spot_vit.runs.folder import RunFolder
from spot_vit.utils.errors import UserError

FREE = (
    "resume", "output", "experiment", "workers", "threads", "pin_mem", "device", "log_interval",
    "log_wandb", "log_tensorboard", "recovery_interval", "checkpoint_hist", "data", "bad_share",
)  # fmt: skip
"""Fields that change nothing in what a run computes, so that it may go on with others."""


def resumed(recipe: Recipe) -> Recipe:
    """The recipe of the run that goes on, with the free fields that were given anew.

    Args:
        recipe: one that does not resume stays as it is.

    Raises:
        UserError: there is no such run, or a field was given that is not the run's.
    """
    if recipe.resume is None:
        return recipe
    folder = RunFolder(folder_of(recipe))
    if not folder.recipe.exists():
        raise UserError(f"resume: there is no run in {recipe.resume} (no {folder.recipe.name})")
    try:
        saved = Recipe.from_dict(read(str(folder.path)))
    except ValueError as error:
        raise UserError(f"resume: {error}") from error
    default = Recipe()
    fixed = [name for name in Recipe.names() if name not in FREE]
    given = any(getattr(recipe, name) != getattr(default, name) for name in fixed)
    other = [
        f"{name} was {getattr(saved, name)!r} and is {getattr(recipe, name)!r}"
        for name in fixed
        if given and getattr(recipe, name) != getattr(saved, name)
    ]
    if other:
        raise UserError(
            f"resume: the run of {folder.path} goes on as it began, and {'; '.join(other)}; to "
            "begin another run from its weights: --initial-checkpoint "
            f"{folder.last if folder.last.exists() else folder.best}"
        )
    changed = {
        name: getattr(recipe, name)
        for name in FREE
        if getattr(recipe, name) != getattr(default, name)
    }
    return saved.replace(**changed)


def folder_of(recipe: Recipe) -> Path:
    """The folder of a run: where it is, or where it will be.

    Raises:
        UserError: another run is there.
    """
    if recipe.resume is not None:
        path = Path(recipe.resume)
        return path.parent if path.is_file() else path
    name = recipe.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe.model.replace('/', '-')}"
    folder = RunFolder(Path(recipe.output) / name)
    if folder.begun:
        raise UserError(
            f"output: there is a run in {folder.path}; go on with it by --resume {folder.path}, or "
            "give another --experiment or --output"
        )
    return folder.path
