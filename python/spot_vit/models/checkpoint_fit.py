"""Whether tensors fit a model, and what to do where they do not."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spot_vit.config.conversion import compare, conversion_of
from spot_vit.models.checkpoint_files import State, listed, logger
from spot_vit.models.checkpoint_layouts import CONNECTIVITY, RELEVANCE

_DISTILLED = "dist_token"  # DeiT's second prefix token, and names that go with it
_BLOCK = re.compile(rf"blocks\.(\d{{1,9}}){re.escape(RELEVANCE)}")
_OF_DISTILLED = (_DISTILLED, "head_dist.weight", "head_dist.bias")


def refuse_conversion(found: Mapping[str, Any], model: nn.Module, where: object) -> None:
    """Raises ValueError where weights were saved of a model that was converted in another way.

    What differs without changing what they mean is logged.

    Args:
        found: with the weights, see `spot_vit.config.conversion`.
        model: not wrapped.
        where: the weights are, for messages.
    """
    try:
        comparison = compare(found, conversion_of(model))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if comparison.problems:
        raise ValueError(
            f"{where} does not fit this {type(model).__name__}: {'; '.join(comparison.problems)}"
        )
    if comparison.free:
        logger.info("%s: %s, which stays", where, "; ".join(comparison.free))


def misfits(model: nn.Module, state: State, optional: Collection[str] = ()) -> list[str]:
    """What keeps tensors from being loaded into a model, with the cure where there is one.

    Args:
        model: looked at only.
        state: tensors by their names in the model.
        optional: names that may be missing from `state`.

    Returns:
        One text per problem; empty where everything fits.
    """
    own = model.state_dict()
    counters = {key for key in own if key.endswith(".num_batches_tracked")}
    missing = set(own) - set(state) - counters - set(optional)
    unexpected = set(state) - set(own)
    problems = []
    theirs, ours = _DISTILLED in state, _DISTILLED in own
    if theirs != ours:
        missing, unexpected = missing - set(_OF_DISTILLED), unexpected - set(_OF_DISTILLED)
        problems.append(
            f"the weights are {_distilled(theirs)}, the model is {_distilled(ours)}: names like "
            f"deit_small{'_distilled' if theirs else ''}_patch16_224 are timm's for such weights"
        )
    named = ((missing, "missing"), (unexpected, "unexpected"))
    problems += [f"{what} {listed(names)}" for names, what in named if names]
    problems += [
        text
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
        for text in _shape_problem(model, key, value.shape, own[key].shape, theirs - ours)
    ]
    problems += [
        f"{key} is {_kind(value)} ({value.dtype}), the model has {_kind(own[key])} "
        f"({own[key].dtype})"
        for key, value in state.items()
        if key in own and not _holds(own[key], value)
    ]
    return problems + _cures(model, state, missing, unexpected)


def _kind(value: Tensor) -> str:
    return "complex" if value.is_complex() else "real" if value.is_floating_point() else "whole"


def _holds(own: Tensor, value: Tensor) -> bool:
    """Whether numbers stay what they are when `own` takes them, but for rounding.

    Whole numbers of one element are counters, which some files have as floats.
    """
    return _kind(own) == _kind(value) or (value.numel() == 1 and not value.is_complex())


def _distilled(yes: bool) -> str:
    return "distilled (dist_token, head_dist)" if yes else "not distilled"


def _cures(model: nn.Module, state: State, missing: set[str], unexpected: set[str]) -> list[str]:
    spot = getattr(model, "spot_config", None)
    sparse = getattr(model, "sparsifiner_config", None)
    cures = []
    if any(RELEVANCE in key for key in unexpected):
        if spot is None:
            cures.append("convert the model first: sparsify(model, method='dynamicvit')")
        elif not spot.learned:
            cures.append(
                f"method {spot.method!r} has no predictors: convert with method='dynamicvit'"
            )
        else:
            at = sorted({int(m[1]) for key in state if (m := _BLOCK.match(key))})
            cures.append(f"the weights have predictors in blocks {at}: convert with at={at}")
    if any(CONNECTIVITY in key for key in unexpected) and sparse is None:
        cures.append("convert the model first: sparsify_attention(model)")
    channels = f"{CONNECTIVITY}proj_c_q.weight"
    if any(key.endswith(channels) for key in missing):
        cures.append("the weights have no channel projections: convert with reduce_c=1")
    if sparse is not None and any(key.endswith(channels) for key in unexpected):
        shapes = [value.shape for key, value in state.items() if key.endswith(channels)]
        square = all(rows == columns for rows, columns in shapes)
        which = "reduce_c=1, project=True" if square else "reduce_c=2 or what it was"
        cures.append(f"the weights have channel projections: convert with {which}")
    return cures


def _shape_problem(
    model: Any, key: str, found: torch.Size, expected: torch.Size, more_prefix: int
) -> list[str]:
    """At most one text; `more_prefix` is how many prefix tokens the weights have in addition."""
    text = f"{key} is {tuple(found)}, the model has {tuple(expected)}"
    if key == "pos_embed" and found[2:] == expected[2:]:
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        theirs, ours = found[1] - prefix - (more_prefix if prefix else 0), expected[1] - prefix
        if theirs == ours:
            return []
        return [
            f"{text}: positions of {_grid(theirs)} patches instead of {_grid(ours)}; build the "
            "model for the image size of the checkpoint, load it, then call model.set_input_size"
        ]
    if key.startswith(("head", "aux_head")):
        return [f"{text}; load with the checkpoint's num_classes, then call model.reset_classifier"]
    return [text]


def _grid(count: int) -> str:
    side = math.isqrt(max(count, 0))
    return f"{side} x {side}" if side * side == count else str(count)
