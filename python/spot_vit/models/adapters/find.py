"""The search for the adapter of a module, and the error that says why there is none."""

from __future__ import annotations

from typing import Any

import timm
from timm.models._features import FeatureGetterNet
from torch import nn
from torch.distributed.fsdp import FSDPModule

from spot_vit.models.adapters import beit, eva, lvvit, naflex, vit
from spot_vit.models.adapters.base import ATTENTIONS, BLOCKS, MODELS, UNSUPPORTED, AdapterEntry
from spot_vit.utils.modes import blocks_of, unwrap

FAMILIES = (vit, eva, beit, naflex, lvvit)
"""Modules that register their adapters when imported; a new family is named here."""


class UnsupportedModelError(TypeError):
    """The model cannot be converted; the text says which part and why."""


def model_adapter(model: nn.Module) -> AdapterEntry:
    """The adapter of a model, itself converted or not."""
    return _find(MODELS, model, "model")


def block_adapters(model: Any) -> list[AdapterEntry]:
    """The adapters of its blocks, in order."""
    return [_find(BLOCKS, block, f"blocks.{b}") for b, block in enumerate(blocks_of(model))]


def attention_adapters(model: Any) -> list[AdapterEntry]:
    """The adapters of the attention of its blocks, in order."""
    return [
        _find(ATTENTIONS, block.attn, f"blocks.{b}.attn")
        for b, block in enumerate(blocks_of(model))
    ]


def refused(where: str, module: nn.Module, reason: str, known: list[str]) -> UnsupportedModelError:
    """The error that says what was not converted, and why."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return UnsupportedModelError(
        f"cannot convert {where}: {name} (timm {timm.__version__}): {reason}. "
        f"Supported here: {', '.join(sorted(known))}"
    )


def _find(
    table: dict[type[nn.Module], AdapterEntry], module: nn.Module, where: str
) -> AdapterEntry:
    """The adapter of the exact class; a subclass may do anything, so it does not count."""
    for entry in table.values():
        if type(module) is entry.adapter:
            return entry
    entry_or_none = table.get(type(module))
    if entry_or_none is None:
        reason = _why_not(module, where)
    else:
        found = entry_or_none.mismatch(module)
        if found is None:
            return entry_or_none
        reason = found
    raise refused(where, module, reason, [target.__name__ for target in table])


def _why_not(module: nn.Module, where: str) -> str:
    """Why a class has no adapter, and the cure where there is one."""
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
    return UNSUPPORTED.get(type(module).__name__, "there is no adapter for this class")
