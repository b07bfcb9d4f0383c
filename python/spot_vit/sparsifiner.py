"""Turns attention of a timm model, SPOT or not, into Sparsifiner's, in place."""

from __future__ import annotations

from typing import Any

from torch import nn

from spot_vit.adapters.base import ATTENTIONS
from spot_vit.adapters.find import attention_adapters, model_adapter, refused
from spot_vit.connectivity import ConnectivityPredictor
from spot_vit.sizes import grid_of
from spot_vit.sparsifiner_config import SparsifinerConfig


def sparsify_attention(
    model: Any,
    keep_rate: float | None = None,
    config: SparsifinerConfig | None = None,
    **overrides: Any,
) -> Any:
    """Makes attention sparse, in place, and returns the model.

    Every patch query sees a share of the keys, chosen for each image, head and query by a predictor
    that has to be trained; prefix queries see all. Parameters keep their names; the attention of
    each sparse block gets a child `connectivity`. At keep_rate = 1.0 outputs are bit-exact with
    the original's, and predictors are not asked.

    Works on timm models and on those of `sparsify`, in either order. `set_keep(model,
    attention=...)` changes the rate, `restore` undoes it.

    Args:
        model: a timm model of a supported class, or a SPOT model.
        keep_rate: share of the full grid's tokens that a query sees; 0.25 by default.
        config: configuration; the default one when None.
        **overrides: fields of `SparsifinerConfig` to change.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the model or its attention has no adapter, does not fit it, or adds
            a bias to its logits.
        ValueError: the configuration does not fit the model.
        TypeError: an unknown field, or attention that is sparse already.
    """
    if is_sparse(model):
        raise TypeError(
            "attention of this model is sparse already; set_keep changes its rate, restore undoes "
            "it"
        )
    if keep_rate is not None:
        overrides["keep_rate"] = keep_rate
    config = (config or SparsifinerConfig()).replace(**overrides)
    model_adapter(model)
    entries = attention_adapters(model)
    places = config.places(len(entries))
    config = config.replace(blocks=places)
    fitting = [target.__name__ for target, e in ATTENTIONS.items() if e.refuse_sparse is None]
    for b in places:
        if reason := entries[b].refuse_sparse:
            raise refused(f"blocks.{b}.attn", model.blocks[b].attn, reason, fitting)
    grid = grid_of(model)
    new = {
        b: _predictor(model.blocks[b].attn, model.num_prefix_tokens, grid, config) for b in places
    }
    for b, predictor in new.items():
        attention = model.blocks[b].attn
        attention.__class__ = entries[b].adapter
        attention.connectivity = predictor.train(attention.training)
    model.sparsifiner_config = config
    return model


def is_sparse(model: Any) -> bool:
    """Whether `sparsify_attention` is on."""
    return hasattr(model, "sparsifiner_config")


def configure(model: Any, config: SparsifinerConfig) -> None:
    """Sets what may change at run time."""
    for predictor in predictors(model).values():
        predictor.configure(config)
    model.sparsifiner_config = config


def predictors(model: Any) -> dict[int, ConnectivityPredictor]:
    """The connectivity predictors by block."""
    attentions = {b: block.attn for b, block in enumerate(model.blocks)}
    return {b: a.connectivity for b, a in attentions.items() if getattr(a, "sparse", False)}


def set_grid(model: Any, grid: tuple[int, int]) -> Any:
    """Says how the patches stand where their number leaves a doubt, e.g. 14 x 28 or 28 x 14."""
    for predictor in predictors(model).values():
        predictor.shown_grid = grid
    return model


def remove(model: Any) -> None:
    """Takes the predictors away; classes stay."""
    for b in predictors(model):
        del model.blocks[b].attn.connectivity
    del model.sparsifiner_config


def _predictor(
    attention: Any, num_prefix: int, grid: tuple[int, int], config: SparsifinerConfig
) -> ConnectivityPredictor:
    weight: nn.Parameter = attention.proj.weight
    sizes = attention.head_dim, attention.num_heads, num_prefix, grid
    predictor = ConnectivityPredictor(*sizes, config)
    return predictor.to(device=weight.device, dtype=weight.dtype)
