"""What each layer of a traced model costs, beside the same model where nothing is removed."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from spot_vit.bench.layers import layer_times
from spot_vit.measure.flops import count_flops
from spot_vit.models.convert import set_keep
from spot_vit.models.sparsifiner import dense_attention
from spot_vit.report.record import LayerCost


def layer_costs(model: Any, image: Tensor, rounds: int) -> tuple[list[LayerCost], list[LayerCost]]:
    """Costs of a model's layers, and those of the same model with every token and key.

    Args:
        model: converted, in eval mode.
        image: [1, C, H, W].
        rounds: timed passes of each; 0 for none.
    """
    size = (image.shape[1], image.shape[2], image.shape[3])
    dense = copy.deepcopy(model)
    if hasattr(dense, "spot_config"):
        set_keep(dense, 1.0)
    with dense_attention(dense):
        counts = {"sparse": count_flops(model, size), "dense": count_flops(dense, size)}
        times: dict[str, dict[str, float]] = {"sparse": {}, "dense": {}}
        if rounds:
            timed = layer_times({"sparse": model, "dense": dense}, image, rounds)
            for side, parts in timed.items():
                for part in parts:
                    ms = times[side].get(part["layer"], 0.0)
                    times[side][part["layer"]] = ms + part["ms"]
    sparse, full = (
        [
            LayerCost(layer.name, layer.tokens, layer.total / 1e9, times[side].get(layer.name))
            for layer in count.layers
        ]
        for side, count in counts.items()
    )
    return sparse, full
