"""Weights to start from, fitted to the model that is to take them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from spot_vit.models.checkpoint_files import State, logger, read_weights
from spot_vit.models.checkpoint_fit import misfits
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.training.param_groups import head_parameters
from spot_vit.utils.errors import UserError
from spot_vit.utils.sizes import grid_of


def initial_state(model: Any, path: str | Path) -> State:
    """Weights of a file for a model to start from.

    They may be of a dense model or of a converted one, of another image size, and of other classes
    or none. Positions are resampled, as timm does; predictors that the file has not stay new, and
    so does a head of other classes.

    Args:
        model: that is to take them, converted or not.
        path: of the file.

    Raises:
        UserError: there is no such file, or it does not fit.
    """
    if not Path(path).is_file():
        raise UserError(f"initial_checkpoint: there is no file {path}")
    try:
        state = dict(read_weights(path).state)
    except ValueError as error:
        raise UserError(f"initial_checkpoint: {error}") from error
    own, head = model.state_dict(), head_parameters(model)
    new_head = any(name not in state or state[name].shape != own[name].shape for name in head)
    if new_head:
        logger.info("%s: the head has other classes and is new", path)
        state = {name: value for name, value in state.items() if name not in head}
    predictors = set(predictor_parameters(model)) - set(state)
    if predictors:
        logger.info("%s: predictors are new", path)
    if "pos_embed" in state and "pos_embed" in own:
        state["pos_embed"] = _at_size_of(model, state["pos_embed"], own["pos_embed"])
    optional = predictors | (head if new_head else set())
    if problems := misfits(model, state, optional):
        raise UserError(f"initial_checkpoint {path} does not fit: {'; '.join(problems)}")
    return state


def _at_size_of(model: Any, found: Tensor, own: Tensor) -> Tensor:
    """Position embeddings [1, P+N, C] of a square grid, resampled to the model's grid."""
    if found.shape == own.shape or found.ndim != 3 or found.shape[2] != own.shape[2]:
        return found
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = math.isqrt(max(found.shape[1] - prefix, 0))
    if side * side != found.shape[1] - prefix:
        return found
    return resample_abs_pos_embed(found, list(grid_of(model)), num_prefix_tokens=prefix)
