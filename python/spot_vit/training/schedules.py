"""What changes in the course of a training: the budget, and the noise of decisions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from spot_vit.config.fields import checked_value
from spot_vit.models.convert import set_keep
from spot_vit.models.loop import SpotLoop
from spot_vit.utils.modes import unwrap


class _Schedule:
    """What a schedule has besides its values: a step, and a state to go on from."""

    _SETTINGS: tuple[str, ...]
    step: int

    def state_dict(self) -> dict[str, Any]:
        """The settings and the step, as plain data."""
        return {name: getattr(self, name) for name in (*self._SETTINGS, "step")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a schedule of the same settings was.

        Raises:
            ValueError: other settings, or something else.
        """
        (step,) = continued(self, state, self._SETTINGS, "step")
        self.step = checked_value("step", step, int, low=0)


class KeepSchedule(_Schedule):
    """EViT's schedule: everything is kept at first, then less and less, to the model's own budget.

    Each stage's ratio falls from 1 to what the model's configuration says, by half a cosine between
    two epochs (published: 10 and 100, of 300). An objective takes one in place of keep ratios; in a
    loop of your own `with schedule(model) as ratios:` around the training forward pass is all it
    takes; afterwards the model has its own budget again. Every pass counts as a step.

    Args:
        steps_per_epoch: passes in an epoch, e.g. `len(loader)`.
        start: epoch at which the ratios begin to fall.
        end: epoch from which on they are the model's own.
        step: passes that were made already, where training goes on from a checkpoint.

    Attributes:
        step: passes so far.

    Raises:
        ValueError: unless 0 <= start <= end, and there are steps in an epoch; or another type.
    """

    _SETTINGS = ("steps_per_epoch", "start", "end")

    def __init__(
        self, steps_per_epoch: int, start: float = 10, end: float = 100, step: int = 0
    ) -> None:
        self.steps_per_epoch = checked_value("steps_per_epoch", steps_per_epoch, int, low=1)
        self.start = checked_value("start", start, float, low=0)
        self.end = checked_value("end", end, float, low=0)
        self.step = checked_value("step", step, int, low=0)
        if self.start > self.end:
            raise ValueError(f"expected 0 <= start <= end, got start={start}, end={end}")

    def at(self, step: int) -> float:
        """The share of the way back to 1: from 1 at the start to 0 at the end."""
        epoch = step / self.steps_per_epoch
        if epoch < self.start:
            return 1.0
        if epoch >= self.end:
            return 0.0
        return 0.5 + 0.5 * math.cos(math.pi * (epoch - self.start) / (self.end - self.start))

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[list[float]]:
        """Sets the step's budget while the block runs; gives the keep ratio of every stage.

        Args:
            model: a SPOT model, wrapped or not.

        Raises:
            TypeError: there is no SPOT model in it.
        """
        spot = spot_inside(model)
        own = spot.spot_config.keep
        set_keep(spot, _towards_one(own, self.at(self.step)))
        try:
            yield spot.spot_config.keep_ratios()
        finally:
            set_keep(spot, own)
        self.step += 1


def _towards_one(keep: Any, share: float) -> Any:
    """Ratios so far on the way to 1, to six decimals: powers of them stay 64-bit fractions."""
    if share == 0:
        return keep
    if isinstance(keep, tuple):
        return tuple(round(ratio + (1 - ratio) * share, 6) for ratio in keep)
    return round(keep + (1 - keep) * share, 6)


class NoiseSchedule(_Schedule):
    """Noise of the decisions that changes evenly in the course of a training (our choice).

    Exploration at first, and at the end the selection of inference. An objective takes one as
    `noise`; in a loop of your own put `with schedule(model):` around the training forward pass.
    Afterwards the model has its own `SpotConfig.noise` again. Every pass counts as a step.

    Args:
        steps: passes until `end` is reached.
        start: scale of the noise at first, as `SpotConfig.noise`.
        end: scale of the noise at the end.
        step: passes that were made already, where training goes on from a checkpoint.

    Attributes:
        step: passes so far.

    Raises:
        ValueError: a scale below 0, no step, or another type; the argument is named.
    """

    _SETTINGS = ("steps", "start", "end")

    def __init__(self, steps: int, start: float = 1.0, end: float = 0.0, step: int = 0) -> None:
        self.steps = checked_value("steps", steps, int, low=1)
        self.start = checked_value("start", start, float, low=0, high=1e6)
        self.end = checked_value("end", end, float, low=0, high=1e6)
        self.step = checked_value("step", step, int, low=0)

    def at(self, step: int) -> float:
        """The scale of the noise at a step."""
        share = min(step / self.steps, 1.0)
        return self.start * (1 - share) + self.end * share

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[float]:
        """Sets the step's noise while the block runs, and gives it.

        Args:
            model: a SPOT model, wrapped or not.

        Raises:
            TypeError: there is no SPOT model in it.
        """
        spot = spot_inside(model)
        own, noise = spot.spot_config.noise, self.at(self.step)
        spot._configure(spot.spot_config.replace(noise=noise))
        try:
            yield noise
        finally:
            spot._configure(spot.spot_config.replace(noise=own))
        self.step += 1


def continued(
    own: Any, state: Mapping[str, Any], settings: Sequence[str], *moving: str
) -> list[Any]:
    """What moves in the course of a training, from the state of an object of the same settings.

    Args:
        own: the object that goes on.
        state: of the one that was saved.
        settings: names of what must be the same, attributes and entries.
        *moving: names of the entries to give.

    Raises:
        ValueError: entries are missing or unknown, or settings differ; they are named.
    """
    kind, names = type(own).__name__, {*settings, *moving}
    if set(state) != names:
        raise ValueError(f"state of {kind}: expected {sorted(names)}, got {sorted(state)}")
    changed = [
        f"{name} was {state[name]!r} and is {getattr(own, name)!r}"
        for name in settings
        if state[name] != getattr(own, name)
    ]
    if changed:
        raise ValueError(
            f"state of {kind}: {', '.join(changed)}; make one of the settings of the saved run"
        )
    return [state[name] for name in moving]


def spot_inside(model: nn.Module) -> SpotLoop:
    """The SPOT model inside its wrappers.

    Raises:
        TypeError: there is none.
    """
    spot = unwrap(model)
    if not isinstance(spot, SpotLoop):
        raise TypeError(f"expected a SPOT model (see sparsify), got {type(model).__name__}")
    return spot
