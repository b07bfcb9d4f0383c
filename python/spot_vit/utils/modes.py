"""Modes of a model, and the model inside its wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spot_vit.utils.places import blocks_in

# Where wrappers keep what they wrap: torch.compile, FSDP, checkpointing or offloading of
# activations, and DDP, DataParallel and EMA models.
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def unwrap(model: Any) -> Any:
    """The model inside DDP, FSDP, torch.compile, an EMA, PEFT, or several of them."""
    while True:
        if hasattr(type(model), "get_base_model"):  # PEFT
            return unwrap(model.get_base_model())
        inside = (getattr(model, name, None) for name in _INSIDE)
        found = next((module for module in inside if isinstance(module, nn.Module)), None)
        if found is None:
            return model
        model = found


def blocks_of(model: Any) -> list[Any]:
    """The blocks of a model, each without its wrappers."""
    return [unwrap(block) for block in blocks_in(model)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches to eval mode, and afterwards back to whatever it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
