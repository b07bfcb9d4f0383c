"""Checkpoints: weights as safetensors, and the configuration beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model, save
from torch import nn

from spot_vit.utils.files import atomic_write


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
