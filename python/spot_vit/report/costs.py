"""What each layer of a traced model costs, beside the same model where nothing is removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

Pair = tuple[FlopCount, FlopCount]

_counts: WeakKeyDictionary[nn.Module, tuple[Any, Pair]] = WeakKeyDictionary()
"""The last counts of a model, and what they were of: counting takes a fifth of a second."""


def layer_costs(model: Any, image: Tensor, rounds: int) -> tuple[list[LayerCost], list[LayerCost]]:
    """Costs of a model's layers, and those of the same model with every token and key.

    Args:
        model: converted, in eval mode.
        image: [1, C, H, W].
        rounds: timed passes of each; 0 for none.
    """
    sparse, full = _counted(model, (image.shape[1], image.shape[2], image.shape[3]))
    times: dict[str, Any] = {"sparse": [], "dense": []}
    if rounds:
        with _dense(model) as dense:
            times = layer_times({"sparse": model, "dense": dense}, image, rounds)
    return _layers(sparse, times["sparse"]), _layers(full, times["dense"])


def _counted(model: nn.Module, size: tuple[int, int, int]) -> Pair:
    """Counts of a model and of the dense one; again only where what they depend on has changed."""
    shapes = [(name, value.shape) for name, value in model.state_dict(keep_vars=True).items()]
    named = [one.density() for one in predictors_in(model, ConnectivityPredictor).values()]
    modules = [type(module) for module in model.modules()]
    depends = (size, conversion_of(model), shapes, modules, named)
    if model not in _counts or _counts[model][0] != depends:
        with _dense(model) as dense:
            _counts[model] = depends, (count_flops(model, size), count_flops(dense, size))
    return _counts[model][1]


@contextmanager
def _dense(model: nn.Module) -> Iterator[nn.Module]:
    """The model with every token and key, on the same weights."""
    weights = [*model.parameters(), *model.buffers()]
    dense = copy.deepcopy(model, {id(weight): weight for weight in weights})
    if hasattr(dense, "spot_config"):
        set_keep(dense, 1.0)
    with dense_attention(dense):
        yield dense


def _layers(count: FlopCount, parts: list[Mapping[str, Any]]) -> list[LayerCost]:
    """Layers with the times of their parts."""
    times: dict[str, float] = {}
    for part in parts:
        times[part["layer"]] = times.get(part["layer"], 0.0) + part["ms"]
    return [
        LayerCost(layer.name, layer.tokens, layer.total / 1e9, times.get(layer.name))
        for layer in count.layers
    ]
