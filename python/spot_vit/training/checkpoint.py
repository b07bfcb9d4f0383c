"""Checkpoints: weights as safetensors, and beside them what they mean.

The configuration of the model's conversion is saved with its weights, and compared when they are
loaded, as a state dict fits models that compute something else with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from spot_vit.config.conversion import conversion_of
from spot_vit.models.checkpoint_files import (
    CONVERSION,
    State,
    logger,
    read_metadata,
    read_safetensors,
    refuse_non_finite,
    short_name,
    write_safetensors,
)
from spot_vit.models.checkpoint_fit import misfits, refuse_conversion
from spot_vit.models.saved import CONFIG
from spot_vit.utils.modes import unwrap


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, config: Mapping[str, Any] | None = None
) -> None:
    """Writes the weights of a model as safetensors, atomically.

    How the model was converted is written beside them.

    Args:
        path: of the file; folders are made.
        model: any model, wrapped or not.
        config: more to write beside the weights, as JSON takes it.
    """
    metadata = {
        CONFIG: json.dumps({} if config is None else config),
        CONVERSION: json.dumps(conversion_of(unwrap(model))),
    }
    write_safetensors(path, model.state_dict(), metadata)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the config of a checkpoint, without its weights.

    Raises:
        ValueError: the file is damaged, or was not written by `save_checkpoint`; it is named.
    """
    return _own_metadata(path)[CONFIG]


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Loads the weights into a model that was converted in the same way, and returns the config.

    Fields that change what weights mean (method, at, features, history, heads, scaling, reduce_n
    and so on) must be those of the model. Those that do not (budgets, `keep` and `keep_rate`, and
    what only training or speed depends on) stay as the model has them; the logger `spot_vit` tells
    at level INFO which differ.

    Args:
        path: a file of `save_checkpoint`.
        model: loaded in place, wrapped or not.

    Returns:
        What was given to `save_checkpoint` as `config`.

    Raises:
        ValueError: the file is damaged, was not written by `save_checkpoint`, has numbers that are
            not finite, or does not fit the model. The model is left as it was.
    """
    metadata = _own_metadata(path)
    if CONVERSION in metadata:
        refuse_conversion(metadata[CONVERSION], unwrap(model), path)
    else:
        logger.info("%s is of an older version and does not say how it was converted", path)
    state = read_safetensors(path)
    refuse_non_finite(state, str(path))
    state = _named_as_in(model, state)
    if problems := misfits(model, state):
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)
    return metadata[CONFIG]


def _own_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    metadata = read_metadata(path)
    if CONFIG not in metadata:
        raise ValueError(
            f"{path} was not written by save_checkpoint and does not say what its weights mean; "
            "convert_checkpoint reads published weights, model.load_state_dict plain ones"
        )
    return metadata


def _named_as_in(model: nn.Module, state: State) -> State:
    """The tensors by the model's names, where wrappers on either side put prefixes before them."""
    own = model.state_dict()
    names = {short_name(name)[0]: name for name in own}
    renamed = {}
    for name, value in state.items():
        wanted = name if name in own else names.get(short_name(name)[0], name)
        renamed[name if wanted in state else wanted] = value
    return renamed
