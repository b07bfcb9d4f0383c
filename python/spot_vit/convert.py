"""Turns a timm model into a SPOT model, in place, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from spot_vit.adapters import ATTENTIONS, BLOCKS, MODELS, UNSUPPORTED, ClassAdapter
from spot_vit.budget import solve_keep
from spot_vit.config import SpotConfig
from spot_vit.loop import SpotLoop
from spot_vit.relevance import TokenRelevance


class UnsupportedModelError(TypeError):
    """The model cannot be converted; the text says which part and why."""


def sparsify(model: Any, config: SpotConfig | None = None, **overrides: Any) -> Any:
    """Converts a timm Vision Transformer in place and returns it.

    The model keeps its parameters, their names, and its hooks; where predictors decide, each
    deciding block gets a child `relevance`. At keep = 1.0 in eval its outputs are bit-exact with
    the original's.

    Args:
        model: a timm model of a supported class (see `supported`).
        config: configuration; the default one when None.
        **overrides: fields of `SpotConfig` to change, e.g. `keep=0.7, at=[3, 6, 9]`; `keep` may
            name a budget instead, `{"gmacs": 2.8}` or `{"latency_ms": 20, "batch": 8}`, see
            `spot_vit.budget.Budget`. The configuration holds the ratio it comes to.

    Returns:
        The same object, now a `SpotLoop`.

    Raises:
        UnsupportedModelError: the model, or one of its blocks, has no adapter or does not fit it.
        ValueError: the configuration does not fit the model, or the budget is out of reach.
        TypeError: an unknown field, or a model that is already converted.
    """
    if isinstance(model, SpotLoop):
        raise TypeError(
            "the model is a SPOT model already; set_keep changes its budget, restore undoes it"
        )
    budget = overrides.get("keep")
    if isinstance(budget, Mapping):
        del overrides["keep"]
    config = (config or SpotConfig()).replace(**overrides)
    entry = _adapter_for(MODELS, model, "model")
    blocks = list(model.blocks)
    block_entries = [_adapter_for(BLOCKS, block, f"blocks.{b}") for b, block in enumerate(blocks)]
    attention_entries = [
        _adapter_for(ATTENTIONS, block.attn, f"blocks.{b}.attn") for b, block in enumerate(blocks)
    ]
    config = config.replace(at=config.places(len(blocks)))
    assert config.at is not None
    config.ratios(len(config.at))  # a list of ratios must name every stage
    stages = [config.at.index(b) if b in config.at else None for b in range(len(blocks))]
    new = [
        _relevance_for(block, config) if config.learned and stage is not None else None
        for block, stage in zip(blocks, stages, strict=True)
    ]

    original = type(model)
    model.__class__ = entry.adapter
    if config.cuts_inside and not model.has_class_token:
        model.__class__ = original
        raise ValueError(
            f"method {config.method!r} scores by the class token's attention, and this "
            f"{original.__name__} has no class token"
        )
    for b, block in enumerate(blocks):
        block.__class__ = block_entries[b].adapter
        block.attn.__class__ = attention_entries[b].adapter
        block.stage, block.relevance = stages[b], new[b]
    model._configure(config)
    model.train(model.training)
    if isinstance(budget, Mapping):
        try:
            set_keep(model, budget)
        except BaseException:
            restore(model)
            raise
    return model


def restore(model: Any) -> Any:
    """Undoes `sparsify` in place: original classes, no predictors. Trained weights stay."""
    _require_spot(model)
    original = {
        entry.adapter: entry.target
        for entry in itertools.chain(MODELS.values(), BLOCKS.values(), ATTENTIONS.values())
    }
    for block in model.blocks:
        block.attn.__class__ = original[type(block.attn)]
        block.__class__ = original[type(block)]
        del block.stage, block.relevance
    del model.spot_config, model._spot_ratios
    model.__class__ = original[type(model)]
    return model


def set_keep(model: Any, keep: float | list[float] | tuple[float, ...] | Mapping[str, Any]) -> Any:
    """Changes how much a SPOT model keeps, at run time.

    Args:
        model: a SPOT model.
        keep: as `SpotConfig.keep`, or a budget as in `sparsify`.

    Returns:
        The same object.

    Raises:
        ValueError: ratios that do not fit the model, or a budget out of reach; the model keeps what
            it kept.
    """
    _require_spot(model)
    if isinstance(keep, Mapping):
        keep = solve_keep(model, keep)
    model._configure(model.spot_config.replace(keep=keep))
    return model


def supported() -> list[str]:
    """Full names of the timm model classes that `sparsify` takes."""
    return sorted(f"{target.__module__}.{target.__qualname__}" for target in MODELS)


def _require_spot(model: nn.Module) -> None:
    if not isinstance(model, SpotLoop):
        raise TypeError(f"expected a SPOT model (see sparsify), got {type(model).__name__}")


def _adapter_for(
    table: dict[type[nn.Module], ClassAdapter], module: nn.Module, where: str
) -> ClassAdapter:
    """The adapter of the exact class; a subclass may do anything, so it does not count."""
    entry = table.get(type(module))
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if entry is None:
        reason = UNSUPPORTED.get(type(module).__name__, "there is no adapter for this class")
    else:
        found = entry.mismatch(module)
        if found is None:
            return entry
        reason = found
    known = ", ".join(sorted(target.__name__ for target in table))
    raise UnsupportedModelError(
        f"cannot convert {where}: {name} (timm {timm.__version__}): {reason}. "
        f"Supported here: {known}"
    )


def _relevance_for(block: Any, config: SpotConfig) -> TokenRelevance:
    weight = block.attn.proj.weight
    dim = weight.shape[0]
    d_remap = (config.d_remap or dim) if "embed" in config.evidence else 0
    relevance = TokenRelevance(dim, config.num_features(block.attn.num_heads), d_remap)
    return relevance.to(device=weight.device, dtype=weight.dtype)
