"""Checks of what conversions are given, with the cure in the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spot_vit.config.sparsifiner import SparsifinerConfig
from spot_vit.config.spot import SpotConfig
from spot_vit.utils.places import heads_of, projection_of

HEAD_WIDTH = 256
"""Widest head that attention with masks, statistics or named keys takes."""

_CALLS = {
    SpotConfig: "sparsify(model, config)",
    SparsifinerConfig: "sparsify_attention(model, ...)",
}


def check_config(config: Any, wanted: type, call: str, budget: str) -> None:
    """Raises unless `config` is a configuration of the right kind, or None.

    Args:
        config: what was given.
        wanted: class of the configuration.
        call: name of the function.
        budget: name of the field that a bare number means.
    """
    if config is None or isinstance(config, wanted):
        return
    if isinstance(config, Mapping):
        cure = f"say {call}(model, **{dict(config)!r})"
    elif isinstance(config, str):
        cure = f"say {call}(model, method={config!r})"
    elif type(config) in _CALLS:
        cure = f"{type(config).__name__} goes to {_CALLS[type(config)]}"
    else:
        cure = f"say {call}(model, {budget}={config!r})"
    raise TypeError(f"config must be a {wanted.__name__}, got {config!r}; {cure}")


def check_heads(attentions: Mapping[int, Any], what: str) -> None:
    """Raises where attention with `what` has no kernel for the width of a head, by block."""
    for b, attention in attentions.items():
        width = getattr(attention, "head_dim", None)
        if width is None:
            width = projection_of(attention).weight.shape[0] // heads_of(attention)
        if width > HEAD_WIDTH:
            raise ValueError(
                f"heads of blocks.{b} are {width} wide; attention with {what} takes at most "
                f"{HEAD_WIDTH}"
            )
