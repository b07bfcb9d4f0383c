"""The search for the adapter of a module, and the error that says why there is none."""

from __future__ import annotations

import importlib
from typing import Any

import timm
from timm.models._features import FeatureGetterNet
from torch import nn
from torch.distributed.fsdp import FSDPModule

from spot_vit.models.adapters import beit, eva, lvvit, naflex, vit
from spot_vit.models.adapters.base import ATTENTIONS, BLOCKS, MODELS, UNSUPPORTED, AdapterEntry
from spot_vit.models.adapters.subclasses import conflict, entry_for, original_of
from spot_vit.utils.modes import blocks_of, unwrap
from spot_vit.utils.places import attention_of

FAMILIES = (vit, eva, beit, naflex, lvvit)
"""Modules that register their adapters when imported; a new family is named here."""

_HERE = "spot_vit.models.adapters"
ELSEWHERE = {
    "torchvision.models": f"{_HERE}.torchvision_vit",
    "transformers.models.vit": f"{_HERE}.transformers_vit",
    "transformers.models.dinov2": f"{_HERE}.transformers_dinov2",
    "transformers.models.dinov2_with_registers": f"{_HERE}.transformers_dinov2",
    "transformers.models.siglip": f"{_HERE}.transformers_siglip",
    "transformers.models.dinov3_vit": f"{_HERE}.transformers_dinov3",
}
"""The same for packages that need not be installed, by where their classes are from: imported when
such a class is met."""


class UnsupportedModelError(TypeError):
    """The model cannot be converted; the text says which part and why."""


def model_adapter(model: nn.Module) -> AdapterEntry:
    """The adapter of a model, itself converted or not."""
    _register_elsewhere(model)
    return _find(MODELS, model, "model")


def block_adapters(model: Any) -> list[AdapterEntry]:
    """The adapters of its blocks, in order."""
    _register_elsewhere(model)
    return [_find(BLOCKS, block, f"blocks.{b}") for b, block in enumerate(blocks_of(model))]


def attention_adapters(model: Any) -> list[AdapterEntry]:
    """The adapters of the attention of its blocks, in order."""
    _register_elsewhere(model)
    return [
        _find(ATTENTIONS, attention_of(block), f"blocks.{b}.attn")
        for b, block in enumerate(blocks_of(model))
    ]


def refused(where: str, module: nn.Module, reason: str, known: list[str]) -> UnsupportedModelError:
    """The error that says what was not converted, and why."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return UnsupportedModelError(
        f"cannot convert {where}: {name} (timm {timm.__version__}): {reason}. "
        f"Supported here: {', '.join(sorted(known))}"
    )


def original_class(cls: type) -> type | None:
    """The class that an adapter takes the place of; None for a class that is no adapter."""
    for table in (MODELS, BLOCKS, ATTENTIONS):
        for entry in table.values():
            if cls is entry.adapter:
                return entry.target
    return original_of(cls)


def _find(
    table: dict[type[nn.Module], AdapterEntry], module: nn.Module, where: str
) -> AdapterEntry:
    """The adapter of a class, or of the class it adds to without changing its forward pass."""
    cls = type(module)
    for entry in table.values():
        if cls is entry.adapter:
            return entry
    original = original_of(cls) or cls
    found = next((table[c] for c in original.__mro__ if c in table), None)
    if found is not None and original is not cls:  # converted, so it was looked at before
        return entry_for(found, original)
    reason = None
    if found is None or found.target is not cls:
        reason = _why_not(module, found)
    if found is not None and reason is None:
        entry = found if found.target is cls else entry_for(found, cls)
        reason = entry.mismatch(module)
        if reason is None:
            return entry
    assert reason is not None
    raise refused(where, module, reason, [target.__name__ for target in table])


def _register_elsewhere(model: nn.Module) -> None:
    """Registers the adapters for the package that a model's class, or one below it, is from."""
    for start, adapters in ELSEWHERE.items():
        if any(c.__module__.startswith(f"{start}.") for c in type(model).__mro__):
            try:
                importlib.import_module(adapters)
            except ImportError as error:
                reason = f"its adapter needs another version of the package: {error}"
                raise refused(
                    "model", model, reason, [entry.__name__ for entry in MODELS]
                ) from error


def _why_not(module: nn.Module, entry: AdapterEntry | None) -> str | None:
    """Why a class cannot be converted, as that of `entry` if it is a subclass, and the cure."""
    inside: Any = unwrap(module)
    if inside is not module:
        return (
            f"it is a wrapper of {type(inside).__name__}: convert the model first, then wrap or "
            "compile it"
        )
    if isinstance(module, FeatureGetterNet):
        return "it gives features of a model, which is its .model: convert that"
    if isinstance(module, FSDPModule):
        return "fully_shard changed its class: convert the model first, then shard it"
    if entry is not None:
        return conflict(entry, module)
    return UNSUPPORTED.get(type(module).__name__, "there is no adapter for this class")
