"""What each layer of a traced model costs, beside the same model where nothing is removed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from spot_vit.bench.layers import layer_times
from spot_vit.config.conversion import conversion_of
from spot_vit.measure.flops import FlopCount, count_flops
from spot_vit.models.convert import set_keep
from spot_vit.models.sparsifiner import dense_attention
from spot_vit.nn.connectivity import ConnectivityPredictor
from spot_vit.nn.predictor import predictors_in
from spot_vit.report.record import LayerCost

Size = tuple[int, int, int]

_counts: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, FlopCount]]] = WeakKeyDictionary()
"""The last counts of a model by side, and what they were of: counting takes a tenth of a second."""


def layer_costs(model: Any, image: Tensor, rounds: int) -> tuple[list[LayerCost], list[LayerCost]]:
    """Costs of a model's layers, and those of the same model with every token and key.

    Args:
        model: converted, in eval mode.
        image: [1, C, H, W].
        rounds: timed passes of each; 0 for none.
    """
    size = (image.shape[1], image.shape[2], image.shape[3])
    weights = [*model.parameters(), *model.buffers()]
    dense = copy.deepcopy(model, {id(weight): weight for weight in weights})  # which it shares
    if hasattr(dense, "spot_config"):
        set_keep(dense, 1.0)
    times: dict[str, dict[str, float]] = {"sparse": {}, "dense": {}}
    with dense_attention(dense):
        counts = {
            side: _counted(model, side, one, size)
            for side, one in (("sparse", model), ("dense", dense))
        }
        if rounds:
            timed = layer_times({"sparse": model, "dense": dense}, image, rounds)
            for side, parts in timed.items():
                for part in parts:
                    ms = times[side].get(part["layer"], 0.0)
                    times[side][part["layer"]] = ms + part["ms"]
    return _layers(counts["sparse"], times["sparse"]), _layers(counts["dense"], times["dense"])


def _counted(model: nn.Module, side: str, one: nn.Module, size: Size) -> FlopCount:
    """Counts of one side of a model, again only where what they depend on has changed."""
    shapes = [(name, value.shape) for name, value in one.state_dict(keep_vars=True).items()]
    named = [own.density() for own in predictors_in(one, ConnectivityPredictor).values()]
    mine = (size, conversion_of(one), shapes, [type(module) for module in one.modules()], named)
    known = _counts.setdefault(model, {})
    if side not in known or known[side][0] != mine:
        known[side] = (mine, count_flops(one, size))
    return known[side][1]


def _layers(count: FlopCount, times: Mapping[str, float]) -> list[LayerCost]:
    return [
        LayerCost(layer.name, layer.tokens, layer.total / 1e9, times.get(layer.name))
        for layer in count.layers
    ]
