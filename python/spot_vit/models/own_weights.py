"""Weights of sparse models from where timm finds weights: a file, a folder, a Hub, an address."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import load_pretrained
from torch import Tensor, nn

from spot_vit.models.checkpoint_files import (
    CONVERSION,
    DAMAGE,
    State,
    logger,
    named_in_errors,
    read_metadata,
    refuse_damaged,
    refuse_non_finite,
    refuse_odd,
    without_prefixes,
)
from spot_vit.models.checkpoint_fit import misfits, refuse_conversion
from spot_vit.models.checkpoint_layouts import CONNECTIVITY, RELEVANCE
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import predictor_parameters
from spot_vit.nn.relevance import TokenRelevance

_PARTS = {RELEVANCE: TokenRelevance, CONNECTIVITY: ConnectivityPredictor}
_SOURCES = ("state_dict", "file", "url", "hf_hub_id", "hf_hub_filename", "source")


class OwnWeights(NamedTuple):
    """What a source of weights holds.

    Attributes:
        dense: tensors of the timm model.
        predictors: tensors of our predictors; empty where the weights are those of a dense model.
        conversion: how the model was converted, where the source says so.
        where: the source, for messages.
    """

    dense: State
    predictors: State
    conversion: Mapping[str, Any] | None
    where: str


def has_source(cfg: Mapping[str, Any]) -> bool:
    """Whether a `pretrained_cfg` says where weights are."""
    return any(cfg.get(name) for name in _SOURCES)


def read_own(cfg: Mapping[str, Any], cache_dir: Any = None) -> OwnWeights:
    """Reads the weights that a `pretrained_cfg` of timm names, as timm does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or something else, or has numbers that are not finite.
    """
    state: State = {}

    def take(found: Mapping[str, Tensor], _model: nn.Module) -> State:
        state.update(found)
        return {}

    file = Path(cfg["file"]) if cfg.get("file") else None
    if file is not None and not file.exists():
        raise FileNotFoundError(f"there are no weights at {file}")
    where = str(file or cfg.get("hf_hub_id") or cfg.get("url") or "the state dict")
    plain = {**cfg, "first_conv": None, "classifier": None, "custom_load": False}
    if file is not None and file.is_file() and file.suffix != ".safetensors":
        refuse_damaged(file)
    kinds = DAMAGE if file is None else (Exception,)
    with named_in_errors(where, kinds):  # an empty model: timm reads, and loads nothing
        load_pretrained(nn.Module(), plain, filter_fn=take, cache_dir=cache_dir)
    state, _ = without_prefixes(state)
    refuse_odd(state, where)
    refuse_non_finite(state, where)
    predictors = {name: t for name, t in state.items() if any(part in name for part in _PARTS)}
    dense = {name: tensor for name, tensor in state.items() if name not in predictors}
    return OwnWeights(dense, predictors, _conversion(file), where)


def _conversion(file: Path | None) -> Mapping[str, Any] | None:
    if file is not None and file.is_dir():
        file /= "model.safetensors"
    if file is None or file.suffix != ".safetensors" or not file.exists():
        return None
    return read_metadata(file).get(CONVERSION)


def dense_cfg(cfg: Mapping[str, Any], weights: OwnWeights) -> dict[str, Any]:
    """The `pretrained_cfg` with which timm loads the dense part.

    Its number of classes is that of the weights: timm keeps their head where the model has as many,
    and otherwise makes a new one.
    """
    found = {name: value for name, value in cfg.items() if name not in _SOURCES}
    names = cfg.get("classifier") or ()
    heads = [
        weights.dense.get(f"{name}.weight")
        for name in ([names] if isinstance(names, str) else names)
    ]
    classes = next((head.shape[0] for head in heads if head is not None), 0)
    return {**found, "state_dict": weights.dense, "num_classes": classes}


def forget_weights(model: Any, cfg: Mapping[str, Any]) -> None:
    """Names the source in a model's `pretrained_cfg` again, instead of holding all its tensors."""
    for part in (model, getattr(model, "model", None)):
        held = getattr(part, "pretrained_cfg", None)
        if held is not None and held.pop("state_dict", None) is not None:
            held |= {name: cfg[name] for name in _SOURCES if name in cfg and name != "state_dict"}


def load_predictors(model: Any, weights: OwnWeights) -> None:
    """Loads the predictors of a converted model; where there are none, it stays as it is.

    Raises:
        ValueError: the weights are of a model that was converted in another way.
    """
    if weights.conversion:
        refuse_conversion(weights.conversion, model, weights.where)
    depth = len(model.blocks)  # features_only leaves out the blocks behind those that are asked for
    found = {name: t for name, t in weights.predictors.items() if _block(name) < depth}
    optional = set(model.state_dict())
    for part, kind in _PARTS.items():
        own = set(predictor_parameters(model, kind))
        if any(part in name for name in found):
            optional -= own
        elif own:
            logger.warning(
                "%s holds no predictors %s: they are new", weights.where, part.strip(".")
            )
    if problems := misfits(model, found, optional):
        raise ValueError(
            f"{weights.where} does not fit this {type(model).__name__}: {'; '.join(problems[:4])}"
            + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        )
    model.load_state_dict(found, strict=False)


def _block(name: str) -> int:
    match = re.match(r"blocks\.(\d{1,9})\.", name)
    return int(match[1]) if match else 0
