"""What an evaluation compares: models at their budgets, and the images that each is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.data.loaders import EvalLoader
from spot_vit.data.open import Data
from spot_vit.data.workers import default_number
from spot_vit.evaluation.accuracy import Evaluation, evaluate_all
from spot_vit.evaluation.sweep import Prepared
from spot_vit.models.convert import set_keep
from spot_vit.runs.evaluated import Evaluated, data_config, open_for
from spot_vit.runs.processes import Processes
from spot_vit.utils.errors import UserError

Keep = float | tuple[float, ...]
BASELINE = "baseline"
"""How tables call the model that is compared with."""


@dataclass
class Side:
    """A model at a budget.

    Attributes:
        name: as tables have it.
        evaluated: where the model comes from.
        model: runs at the budget.
        keep: share of tokens kept, or one for each stage; None where it removes none.
        attention_keep: share of keys that queries see; None where attention is dense.
    """

    name: str
    evaluated: Evaluated
    model: Prepared
    keep: Keep | None
    attention_keep: float | None


def sides_of(
    evaluated: Evaluated, baseline: Evaluated | None, settings: EvaluationSettings
) -> list[Side]:
    """All that is compared; the first is what the others are compared with.

    That is the baseline, else the same weights with nothing removed.

    Raises:
        UserError: a budget that the model cannot have.
    """
    spot = getattr(evaluated.model, "spot_config", None)
    sparse = getattr(evaluated.model, "sparsifiner_config", None)
    for name, config, what in (
        ("keep", spot, "removes no tokens"),
        ("attention_keep", sparse, "has dense attention"),
    ):
        if getattr(settings, name) and config is None:
            raise UserError(
                f"{name}: {evaluated.source} ({evaluated.label}) {what}, so it has no such budget"
            )
    own = (None if spot is None else spot.keep, None if sparse is None else sparse.keep_rate)
    budgets: list[tuple[Keep | None, float | None]] = []
    if not settings.no_dense and (spot is not None or sparse is not None):
        budgets.append((spot and 1.0, sparse and 1.0))
    for keep in settings.keep or (own[0],):
        budgets += [(keep, rate) for rate in settings.attention_keep or (own[1],)]
    precision = getattr(torch, settings.amp_dtype) if settings.amp else None
    sides = []
    if baseline is not None:
        keep = getattr(getattr(baseline.model, "spot_config", None), "keep", None)
        rate = getattr(getattr(baseline.model, "sparsifiner_config", None), "keep_rate", None)
        model = Prepared(baseline.model, None, precision)
        sides.append(Side(BASELINE, baseline, model, keep, rate))
    for keep, rate in dict.fromkeys(budgets):
        prepare = None
        if keep is not None or rate is not None:
            prepare = partial(set_keep, tokens=keep, attention=rate)
        name = _name(keep, rate) or evaluated.label
        sides.append(
            Side(name, evaluated, Prepared(evaluated.model, prepare, precision), keep, rate)
        )
        try:
            sides[-1].model.ready()
        except (ValueError, TypeError) as error:
            raise UserError(f"{name}: {error}") from error
    return sides


def _name(keep: Keep | None, rate: float | None) -> str:
    parts = []
    if keep is not None:
        ratios = keep if isinstance(keep, tuple) else (keep,)
        parts.append(f"keep {'/'.join(f'{ratio:g}' for ratio in ratios)}")
    if rate is not None:
        parts.append(f"attention {rate:g}")
    return ", ".join(parts)


@dataclass
class Group:
    """Sides that are shown the same images, made ready in the same way.

    Attributes:
        sides: which ones.
        data: the images; labels are in the order of the sides' logits.
        config: how they are made ready, as timm has it.
        classes: names by label, or None.
    """

    sides: list[Side]
    data: Data
    config: dict[str, Any]
    classes: list[str] | None
    _made: Any = field(default=None, repr=False)

    def dataset(self) -> Any:
        """The images as they are."""
        if self._made is None:
            self._made = self.data.val_set(self.config)
        return self._made

    def class_names(self, number: int) -> list[str]:
        """A name for each of so many logits; its number where it has none."""
        known = self.classes or []
        return [known[c] if c < len(known) else str(c) for c in range(number)]

    def filename(self, index: int) -> str:
        """Name of the file at a position in the data set; streams know no names."""
        data = self.dataset()
        return data.filename(index) if hasattr(data, "filename") else f"image {index}"

    def names(self, found: Evaluation) -> dict[int, str]:
        """File name of each position in the data set that was evaluated."""
        return {index: self.filename(index) for index in found.index.tolist()}

    def independent(self) -> np.ndarray | None:
        """By position in the data set, equal for images that are not independent; None: all are.

        Several of the digits' images show the same digit.
        """
        data = self.dataset()
        sources = getattr(getattr(data, "digits", data), "sources", None)
        return None if sources is None else np.asarray(sources(range(len(data))))


def grouped(sides: list[Side], settings: EvaluationSettings) -> list[Group]:
    """The sides by the images that they are shown: a baseline may want others, or other labels."""
    groups: list[Group] = []
    own: dict[int, Group] = {}  # by model
    for side in sides:
        evaluated = side.evaluated
        if id(evaluated) not in own:
            data = open_for(evaluated, settings)
            config = data_config(evaluated, settings)
            classes = evaluated.classes or data.classes
            there = (g for g in groups if (g.config, g.classes) == (config, classes))
            group = next(there, None) or Group([], data, config, classes)
            if not group.sides:
                groups.append(group)
            own[id(evaluated)] = group
        own[id(evaluated)].sides.append(side)
    return groups


def clean(group: Group) -> Any:
    """The images of a group as they are."""
    return group.dataset()


def evaluate_groups(
    groups: list[Group],
    view: Callable[[Group], Any],
    settings: EvaluationSettings,
    processes: Processes,
    name: str,
    *,
    kept: bool = False,
) -> tuple[dict[str, Evaluation], dict[str, str]]:
    """All sides on the images of their groups, one pass over the data for each group.

    Args:
        groups: of sides.
        view: gives the data set to show to a group.
        settings: how images are loaded.
        processes: this one among those that share the images.
        name: label of the progress bar.
        kept: note the share of patches that is kept.

    Returns:
        Results by name of the side, and why images could not be read, by their names.
    """
    workers = settings.workers
    if workers is None:
        workers = default_number()
    results: dict[str, Evaluation] = {}
    unreadable: dict[str, str] = {}
    for group in groups:
        loader = EvalLoader(
            view(group),
            settings.batch_size,
            rank=processes.rank,
            world=processes.world,
            workers=workers,
            pin=processes.device.type == "cuda",
            bad_share=settings.bad_share,
        )
        torch.manual_seed(settings.seed)  # methods that draw do the same in every pass
        results |= evaluate_all(
            {side.name: side.model for side in group.sides},
            loader,
            name,
            channels_last=settings.channels_last,
            progress=processes.first,
            kept=kept,
        )
        for one in processes.gathered(loader.unreadable):
            unreadable |= one
    return results, unreadable
