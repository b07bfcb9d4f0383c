"""One checkpoint for many budgets: a keep ratio drawn anew at every training step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from spot_vit.config.fields import checked_value
from spot_vit.models.convert import set_keep
from spot_vit.training.schedules import continued, spot_inside


class SampledKeep:
    """Draws ρ at every step, so that the model learns to be right at any of them (our choice).

    `with draw(model) as ratios:` around the training forward pass is all it takes; afterwards the
    model has its own budget again. Every rank of a distributed run draws the same ones.

    Args:
        low: smallest ρ.
        high: largest ρ.
        seed: of the sequence of draws.
        power: how the draws crowd near `low`: ρ is low + (high - low) u^power, u uniform, rounded
            to thousandths. A small budget needs more training than a large one: on ClutteredDigits
            uniform draws cost points at the low end, and these nothing at the high one.

    Raises:
        ValueError: unless 0.001 <= low <= high <= 1 and power is positive; or another type.
    """

    _SETTINGS = ("low", "high", "power")

    def __init__(
        self, low: float = 0.3, high: float = 1.0, seed: int = 0, power: float = 3.0
    ) -> None:
        # Rounded to thousandths, which is what is drawn: none may become 0.
        self.low = checked_value("low", low, float, low=1e-3, high=1)
        self.high = checked_value("high", high, float, low=1e-3, high=1)
        self.power = checked_value("power", power, float, above=0)
        if self.low > self.high:
            raise ValueError(f"expected low <= high, got low={low}, high={high}")
        self._random = random.Random(checked_value("seed", seed, int, high=2**63))

    def state_dict(self) -> dict[str, Any]:
        """The settings, and where the sequence of draws is, as plain data."""
        version, words, _ = self._random.getstate()
        place = {"version": version, "words": list(words)}
        return {**{name: getattr(self, name) for name in self._SETTINGS}, "random": place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the draws of one of the same settings, whatever its seed was.

        Raises:
            ValueError: other settings, or something else.
        """
        (place,) = continued(self, state, self._SETTINGS, "random")
        try:
            self._random.setstate((place["version"], tuple(place["words"]), None))
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ValueError(f"state of SampledKeep: random is not one of it: {error}") from error

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[list[float]]:
        """Sets the drawn budget while the block runs; gives the keep ratio of every stage.

        Args:
            model: a SPOT model, wrapped or not (DistributedDataParallel, torch.compile, …).

        Raises:
            TypeError: there is no SPOT model in it.
            ValueError: it draws tokens one by one (`train_decision="gumbel"`): nothing would tell
                its predictors which budget they are to meet.
        """
        spot = spot_inside(model)
        config = spot.spot_config
        if config.learned and config.train_decision != "topk":
            raise ValueError(
                "a sampled budget needs train_decision='topk', which meets it exactly; "
                f"got {config.train_decision!r}"
            )
        share = self._random.random() ** self.power
        set_keep(spot, round(self.low + (self.high - self.low) * share, 3))
        try:
            yield spot.spot_config.keep_ratios()
        finally:
            set_keep(spot, config.keep)
