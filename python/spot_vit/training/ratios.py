"""Keep ratios that a loss asks for: the model's own, or given ones that agree with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from spot_vit.config.spot import SpotConfig
from spot_vit.models.loop import SpotLoop
from spot_vit.utils.modes import unwrap

Ratios = float | Sequence[float] | None
"""None for the model's own, ρ, or one cumulative ratio per stage; empty for no ratio term."""


def check_ratios(given: Any) -> float | tuple[float, ...] | None:
    """The ratios as plain numbers.

    Raises:
        ValueError: no number in (0, 1], or a list that rises or holds one that is none.
    """
    if given is None:
        return None
    if hasattr(given, "__len__") and not isinstance(given, str):  # lists, NumPy's arrays
        given = tuple(given)
        if not given:
            return ()
    try:
        return SpotConfig(keep=given).keep
    except ValueError as error:
        raise ValueError(
            f"keep_ratios: expected None for the model's own, ρ, or one cumulative ratio per "
            f"stage; {error}"
        ) from None


def target_ratios(model: nn.Module, given: float | tuple[float, ...] | None) -> list[float]:
    """The keep ratio that the loss asks of each stage.

    Args:
        model: what is trained, wrapped or not.
        given: what `check_ratios` gave. None: those of the model's configuration, and none at all
            where training meets the budget by itself (`train_decision="topk"`, methods without
            predictors), so that the ratio term would be a constant.

    Returns:
        One ratio per stage, or an empty list for no ratio term.

    Raises:
        ValueError: the given ones are not the model's, which inference uses.
        TypeError: ρ, and a model without stages.
    """
    spot = unwrap(model)
    if not isinstance(spot, SpotLoop):
        if isinstance(given, float | int):
            raise TypeError(
                f"keep_ratios: {given} needs a SPOT model (see sparsify), got {type(spot).__name__}"
            )
        return list(given or ())
    config = spot.spot_config
    own = config.keep_ratios()
    if given is None:
        return own if config.learned and config.train_decision == "gumbel" else []
    if isinstance(given, tuple) and not given:
        return []
    stages = len(own)
    if isinstance(given, tuple) and len(given) != stages:
        raise ValueError(
            f"keep_ratios: expected {stages} values, one a stage, got {len(given)}: {list(given)}"
        )
    wanted = [float(ratio) for ratio in SpotConfig(keep=given).ratios(stages)]
    if any(abs(mine - theirs) > 1e-9 for mine, theirs in zip(own, wanted, strict=True)):
        raise ValueError(
            f"keep_ratios: {wanted} are not those that the model keeps in inference, {own}; leave "
            "them out, or change the model's: set_keep(model, ...)"
        )
    return wanted
