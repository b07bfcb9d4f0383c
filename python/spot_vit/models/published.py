"""Published weights, brought to the state dict of our models, and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from spot_vit.config.methods import METHODS
from spot_vit.models.checkpoint_files import State, logger, read_weights
from spot_vit.models.checkpoint_fit import misfits
from spot_vit.models.checkpoint_layouts import (
    CONNECTIVITY,
    RELEVANCE,
    SCORES,
    SOURCES,
    gaps,
    once,
    renamed,
)
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.nn.relevance import TokenRelevance


def convert_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    source: str,
    model: nn.Module | None = None,
    *,
    at: Sequence[int] | None = None,
    key: str | None = None,
) -> State:
    """Turns published weights into a state dict of our model, and loads it if one is given.

    Dense weights (deit, lvvit, evit) fit both the timm model and the SPOT model made from it, whose
    predictors then keep the values they have. DynamicViT's also fill the predictors of a model
    converted with `method="dynamicvit"`, or with `features=["embed"]`; where predictors see more,
    they keep their values too, and a warning says so. Sparsifiner's fill those of
    `sparsify_attention`.

    The logger `spot_vit` tells at level INFO what was found where.

    Args:
        checkpoint: a file of `torch.save`, read with `weights_only=True`, or of safetensors; or
            what was read from one. Names may start with "_orig_mod.", "module.", "model." and
            "backbone.", in any nesting; that is taken off.
        source: "deit" (DeiT, distilled DeiT, DeiT-III, as published or as timm names it), "lvvit",
            "evit", "dynamicvit" or "sparsifiner" (both on DeiT or LV-ViT).
        model: loaded in place and strictly, when given.
        at: blocks of DynamicViT's predictors; those of `model`, else the published L//4, L//2,
            3L//4.
        key: where in the file the weights lie, e.g. "model_ema"; None for the first of "model",
            "state_dict", "model_ema", "state_dict_ema", "net" that is there, or none of them.

    Returns:
        Names and tensors as `model.load_state_dict` takes them.

    Raises:
        ValueError: the file is not plain tensors, has numbers that are not finite, or does not have
            the layout of `source`, or does not fit `model`; missing and unexpected keys and
            differing shapes are listed. The model is left as it was.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {list(SOURCES)}, got {source!r}")
    state, found = read_weights(checkpoint, key)
    if wrong := gaps(state, source):
        raise ValueError(
            f"this is not a checkpoint of source={source!r} ({found}): {wrong}{_advice(state)}"
        )
    config = getattr(model, "spot_config", None)
    if source == "dynamicvit":
        if config is not None and config.learned and config.evidence != METHODS[source].evidence:
            state = {name: value for name, value in state.items() if not name.startswith(SCORES)}
            logger.warning(
                "the predictors of method %r see %s and DynamicViT's see embeddings alone: the "
                "backbone is loaded, predictors stay new. For the published predictors convert "
                "with method='dynamicvit'",
                config.method,
                list(config.evidence),
            )
        if at is None and config is not None and config.learned:
            at = config.at
    converted = renamed(state, at)
    if source == "sparsifiner":
        sparse = getattr(model, "sparsifiner_config", None)
        converted = once(converted, sparse is None or sparse.share_inout_proj)
    if model is not None:
        optional: set[str] = set()
        for part, kind in ((RELEVANCE, TokenRelevance), (CONNECTIVITY, ConnectivityPredictor)):
            if not any(part in name for name in converted):
                optional |= set(predictor_parameters(model, kind))
        if problems := misfits(model, converted, optional):
            raise ValueError(
                f"the checkpoint does not fit this {type(model).__name__} ({found}): "
                + "; ".join(problems)
            )
        model.load_state_dict(converted, strict=False)
    return converted


def _advice(state: State) -> str:
    """Which source these weights are of, as text; empty where that is not known."""
    if others := [other for other in SOURCES if not gaps(state, other)]:
        return f"; it has the layout of source={others[0]!r}"
    if any(RELEVANCE in name or CONNECTIVITY in name for name in state):
        return "; it has the names of our own models: model.load_state_dict takes it"
    return ""
