"""Turns a timm model into a SPOT model, in place, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from spot_vit.config.spot import SpotConfig
from spot_vit.measure.budget import solve_keep
from spot_vit.models import sparsifiner
from spot_vit.models.adapters.find import (
    MODELS,
    attention_adapters,
    block_adapters,
    model_adapter,
    original_class,
)
from spot_vit.models.arguments import check_config, check_heads
from spot_vit.models.fast import is_fast, refuse_fast, undo_fast
from spot_vit.models.loop import SpotLoop
from spot_vit.nn.predictor import beside
from spot_vit.nn.relevance import TokenRelevance
from spot_vit.utils.modes import blocks_of, unwrap
from spot_vit.utils.places import PLACES, attention_of, heads_of, projection_of
from spot_vit.utils.sizes import grid_of

M = TypeVar("M", bound=nn.Module)


def sparsify(model: M, config: SpotConfig | None = None, **overrides: Any) -> M:
    """Converts a timm Vision Transformer in place and returns it.

    The model keeps its parameters, their names, and its hooks; where predictors decide, each
    deciding block gets a child `relevance`. At keep = 1.0 in eval its outputs are bit-exact with
    the original's.

    Args:
        model: a timm model of a supported class (see `supported`).
        config: configuration; the default one when None.
        **overrides: fields of `SpotConfig` to change, e.g. `keep=0.7, at=[3, 6, 9]`; `keep` may
            name a budget instead, `{"gmacs": 2.8}` or `{"latency_ms": 20, "batch": 8}`, see
            `spot_vit.measure.budget.Budget`. The configuration holds the ratio it comes to.

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
    check_config(config, SpotConfig, "sparsify", "keep")
    refuse_fast(model, "sparsify")
    _sparsify(model, config or SpotConfig(), overrides)
    return model


def convert_as(model: Any, conversion: Mapping[str, Mapping[str, Any]]) -> Any:
    """Converts a dense model in place by each conversion that is named, and returns it.

    Args:
        model: of a supported class.
        conversion: fields of each configuration by the conversion's name, as `conversion_of` gives
            them; unknown names are of another version.

    Raises:
        ValueError: an unknown name, or as `sparsify` and `sparsify_attention`.
    """
    calls: dict[str, Callable[..., Any]] = {
        "sparsifiner": sparsifiner.sparsify_attention,
        "spot": sparsify,
    }
    if unknown := sorted(set(conversion) - set(calls)):
        raise ValueError(f"conversions are {sorted(calls)}, got {unknown}")
    for kind, call in calls.items():
        if kind in conversion:
            call(model, **conversion[kind])
    return model


def _sparsify(model: Any, config: SpotConfig, overrides: dict[str, Any]) -> None:
    budget = overrides.get("keep")
    if isinstance(budget, Mapping):
        del overrides["keep"]
    config = config.replace(**overrides)
    entry, block_entries = model_adapter(model), block_adapters(model)
    attention_entries = attention_adapters(model)
    blocks = blocks_of(model)
    config = config.replace(at=config.decision_blocks(len(blocks)))
    assert config.at is not None
    config.ratios(len(config.at))  # a list of ratios must name every stage
    if config.learned or config.cuts_inside:
        check_heads(dict(enumerate(map(attention_of, blocks))), "masks or statistics")
    if not isinstance(budget, Mapping):
        _check_keeps_some(model, config)
    stages = [config.at.index(b) if b in config.at else None for b in range(len(blocks))]
    new = [
        _relevance_for(block, config) if config.learned and stage is not None else None
        for block, stage in zip(blocks, stages, strict=True)
    ]

    original = type(model)
    model.__class__ = entry.adapter
    if config.cuts_inside and not (model.has_class_token and model.cuts_inside_blocks):
        what = (
            "cuts between attention and MLP, and blocks of this {} run as one piece"
            if model.has_class_token
            else "scores by the class token's attention, and this {} has no class token"
        )
        model.__class__ = original
        raise ValueError(f"method {config.method!r} {what.format(original.__name__)}")
    for b, block in enumerate(blocks):
        block.__class__ = block_entries[b].adapter
        attention_of(block).__class__ = attention_entries[b].adapter
        block.stage, block.relevance, block.cuts = stages[b], new[b], False
    try:
        model._configure(config)
        model.train(model.training)
        if isinstance(budget, Mapping):
            set_keep(model, budget)
    except BaseException:
        _restore(model)
        raise


def _check_keeps_some(model: Any, config: SpotConfig) -> None:
    """Raises where a budget leaves no patch token on the grid that the model was built for."""
    assert config.at is not None
    num_patches = math.prod(grid_of(model))
    for k, ratio in enumerate(config.ratios(len(config.at))):
        if num_patches * ratio < 1 and not config.cuts_inside:  # which rounds up
            raise ValueError(
                f"keep={config.keep} leaves none of {num_patches} patch tokens at stage {k}, which "
                f"keeps {float(ratio):.3g} of them; a stage needs at least 1/{num_patches}"
            )


def restore(model: M) -> M:
    """Undoes `sparsify` and `sparsify_attention` in place: original classes, no predictors.

    Trained weights stay. Of a fast model it undoes `fast`, and nothing else.
    """
    inside = unwrap(model)
    if inside is not model:
        raise TypeError(
            f"{type(model).__name__} wraps the model: restore the {type(inside).__name__} inside"
        )
    if is_fast(model):
        undo_fast(model)
        return model
    if not sparsifiner.is_sparse(model):
        _require_spot(model)
    _restore(model)
    return model


def _restore(model: Any) -> None:
    """Undoes everything; looks first, so that a model it cannot restore stays as it is."""
    spot = isinstance(model, SpotLoop)
    blocks = blocks_of(model)
    classes: list[tuple[Any, type]] = []
    for b, block in enumerate(blocks):
        attention = attention_of(block)
        classes.append((attention, original_class(type(attention)) or type(attention)))
        if spot:
            classes.append((block, _original(f"blocks.{b}", block)))
    if spot:
        classes.append((model, _original("the model", model)))

    if sparsifiner.is_sparse(model):
        sparsifiner.remove(model)
    if spot:
        for block in blocks:
            del block.stage, block.relevance, block.cuts
        del model.spot_config, model._spot_ratios, model._spot_shares, model._spot_noise
    for module, target in classes:
        module.__class__ = target


def _original(where: str, module: nn.Module) -> type:
    """The class that a converted module had before; raises where it is none of ours now."""
    found = original_class(type(module))
    if found is None:
        raise TypeError(
            f"{where} is a {type(module).__name__} now, so something changed its class after "
            "sparsify (fully_shard does); restore the model before that, or undo it first"
        )
    return found


Keep = float | list[float] | tuple[float, ...] | Mapping[str, Any]


def set_keep(
    model: M,
    keep: Keep | None = None,
    *,
    tokens: Keep | None = None,
    attention: float | None = None,
) -> M:
    """Changes how much a sparse model keeps, at run time.

    Args:
        model: a SPOT model, or one with sparse attention, or both; wrapped or not.
        keep: another name of `tokens`.
        tokens: as `SpotConfig.keep`, or a budget as in `sparsify`.
        attention: as `SparsifinerConfig.keep_rate`.

    Returns:
        The same object.

    Raises:
        ValueError: ratios that do not fit the model, or a budget out of reach; the model keeps what
            it kept.
        TypeError: the model removes no tokens, or its attention is not sparse; nothing to change.
    """
    if (keep is None) + (tokens is None) + (attention is None) == 3:
        raise TypeError("set_keep needs tokens=... or attention=...")
    if keep is not None and tokens is not None:
        raise TypeError("keep and tokens are two names of one thing; set_keep takes one of them")
    _set_keep(unwrap(model), keep if tokens is None else tokens, attention)
    return model


def _set_keep(model: Any, tokens: Keep | None, attention: float | None) -> None:
    before = getattr(model, "sparsifiner_config", None)
    if tokens is not None:
        _require_spot(model)
    if attention is not None:
        if before is None:
            raise TypeError("attention of this model is not sparse (see sparsify_attention)")
        sparsifiner.configure(model, before.replace(keep_rate=attention))
    if tokens is not None:
        try:
            ratios = solve_keep(model, tokens) if isinstance(tokens, Mapping) else tokens
            config = model.spot_config.replace(keep=ratios)
            _check_keeps_some(model, config)
            model._configure(config)
        except BaseException:
            if before is not None:
                sparsifiner.configure(model, before)
            raise


def supported() -> list[str]:
    """Full names of the model classes that `sparsify` takes, whether installed or not.

    Subclasses that change nothing in the forward pass convert too.
    """
    names = {f"{target.__module__}.{target.__qualname__}" for target in MODELS}
    return sorted(names | set(PLACES))


def _require_spot(model: nn.Module) -> None:
    if not isinstance(model, SpotLoop):
        raise TypeError(f"expected a SPOT model (see sparsify), got {type(model).__name__}")


def _relevance_for(block: Any, config: SpotConfig) -> TokenRelevance:
    attention = attention_of(block)
    weight = projection_of(attention).weight
    dim = weight.shape[0]
    d_remap = (config.d_remap or dim) if "embed" in config.evidence else 0
    relevance = TokenRelevance(dim, config.num_features(heads_of(attention)), d_remap)
    return beside(relevance, weight)
