"""Turns attention of a timm model, SPOT or not, into Sparsifiner's, in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.config.spot import SpotConfig
from spot_vit.models.adapters.find import ATTENTIONS, attention_adapters, model_adapter, refused
from spot_vit.models.arguments import check_config, check_heads
from spot_vit.models.fast import refuse_fast
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import beside
from spot_vit.utils.modes import blocks_of, unwrap
from spot_vit.utils.places import attention_of, heads_of, prefix_of, projection_of
from spot_vit.utils.sizes import grid_of

M = TypeVar("M", bound=nn.Module)


def sparsify_attention(
    model: M,
    keep_rate: float | None = None,
    config: SparsifinerConfig | None = None,
    **overrides: Any,
) -> M:
    """Makes attention sparse, in place, and returns the model.

    Every patch query sees a share of the keys, chosen for each image, head and query by a predictor
    that has to be trained (`train_connectivity`, or `learn_connectivity` in a loop of your own;
    otherwise its parameters ask for no gradients); prefix queries see all. Parameters keep their
    names; the attention of each sparse block gets a child `connectivity`. At keep_rate = 1.0
    outputs are bit-exact with the original's, and predictors are not asked.

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
    if isinstance(keep_rate, SparsifinerConfig | SpotConfig):
        raise TypeError(
            f"keep_rate must be a number, got {keep_rate!r}; say sparsify_attention(model, "
            "config=...)"
        )
    check_config(config, SparsifinerConfig, "sparsify_attention", "keep_rate")
    refuse_fast(model, "sparsify_attention")
    if keep_rate is not None:
        overrides["keep_rate"] = keep_rate
    _sparsify(model, (config or SparsifinerConfig()).replace(**overrides))
    return model


def _sparsify(model: Any, config: SparsifinerConfig) -> None:
    model_adapter(model)
    entries = attention_adapters(model)
    blocks = config.sparse_blocks(len(entries))
    config = config.replace(blocks=blocks)
    modules = [attention_of(block) for block in blocks_of(model)]
    check_heads({b: modules[b] for b in blocks}, "named keys")
    fitting = [target.__name__ for target, e in ATTENTIONS.items() if e.refuse_sparse is None]
    for b in blocks:
        if reason := entries[b].refuse_sparse:
            raise refused(f"blocks.{b}.attn", modules[b], reason, fitting)
    grid = grid_of(model)
    new = {b: _predictor(modules[b], prefix_of(model), grid, config) for b in blocks}
    for b, predictor in new.items():
        attention = modules[b]
        attention.__class__ = entries[b].adapter
        # They name keys by an index, so ordinary training gives them no gradient.
        attention.connectivity = predictor.requires_grad_(False).train(attention.training)
    model.sparsifiner_config = config
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):
        embed.register_forward_pre_hook(partial(_note_grid, list(new.values())))


def _note_grid(
    predictors: list[ConnectivityPredictor], embed: Any, inputs: tuple[Any, ...]
) -> None:
    """Tells predictors how patches stand, where their number alone leaves a doubt."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or not isinstance(inputs[0], Tensor):  # symbols of torch.fx
        return
    grid = embed.dynamic_feat_size(inputs[0].shape[-2:])
    for predictor in predictors:
        if grid != (predictor.shown_grid or predictor.grid):
            predictor.shown_grid = grid


def is_sparse(model: Any) -> bool:
    """Whether `sparsify_attention` is on."""
    return hasattr(model, "sparsifiner_config")


def configure(model: Any, config: SparsifinerConfig) -> None:
    """Sets what may change at run time."""
    for predictor in predictors(model).values():
        predictor.configure(config)
    model.sparsifiner_config = config


def predictors(model: Any) -> dict[int, ConnectivityPredictor]:
    """The connectivity predictors by block, of a model that may be wrapped."""
    attentions = {b: attention_of(block) for b, block in enumerate(blocks_of(unwrap(model)))}
    return {b: a.connectivity for b, a in attentions.items() if getattr(a, "sparse", False)}


def set_grid(model: M, grid: tuple[int, int]) -> M:
    """Says how the patches stand where their number leaves a doubt, e.g. 14 x 28 or 28 x 14."""
    for predictor in predictors(model).values():
        predictor.shown_grid = grid
    return model


def remove(model: Any) -> None:
    """Takes the predictors away; classes stay."""
    for attention in map(attention_of, blocks_of(model)):
        if getattr(attention, "sparse", False):
            del attention.connectivity
    hooks = getattr(getattr(model, "patch_embed", None), "_forward_pre_hooks", {})
    for key, hook in list(hooks.items()):
        if isinstance(hook, partial) and hook.func is _note_grid:
            del hooks[key]
    del model.sparsifiner_config


def _predictor(
    attention: Any, num_prefix: int, grid: tuple[int, int], config: SparsifinerConfig
) -> ConnectivityPredictor:
    weight: nn.Parameter = projection_of(attention).weight
    sizes = attention.head_dim, heads_of(attention), num_prefix, grid
    predictor = ConnectivityPredictor(*sizes, config)
    return beside(predictor, weight)


# ---- for training --------------------------------------------------------------------------------


@contextmanager
def dense_attention(model: Any) -> Iterator[Any]:
    """A context in which attention of `model` is dense: predictors are not asked.

    Token removal goes on. Gives the model.
    """
    before = {predictor: predictor.enabled for predictor in predictors(model).values()}
    for predictor in before:
        predictor.enabled = False
    try:
        yield model
    finally:
        for predictor, enabled in before.items():
            predictor.enabled = enabled
