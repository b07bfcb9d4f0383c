"""Accuracy on damaged images: damage done here, or ImageNet-C's folders."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.config.fields import nearest
from spot_vit.data.damage import (
    DAMAGES,
    EXTRA_DAMAGES,
    SEVERITIES,
    Damaged,
    imagenet_c,
    mean_corruption_error,
)
from spot_vit.evaluation.accuracy import Evaluation
from spot_vit.evaluation.sweep import paired
from spot_vit.runs.evaluated import open_for
from spot_vit.runs.processes import Processes
from spot_vit.runs.sides import Group, Side, evaluate_groups
from spot_vit.utils.errors import UserError

View = Callable[[Group], Any]
ALEXNET = "AlexNet"
LEAST_SIDE = 32  # of an image that can be damaged
_EVERY = "all"


def kinds_of(settings: EvaluationSettings) -> tuple[str, ...]:
    """The kinds of damage that are asked for, by name.

    Raises:
        UserError: there is no kind of a name.
    """
    if settings.corruptions == (_EVERY,):
        return tuple(DAMAGES)
    known = (*DAMAGES, *EXTRA_DAMAGES)
    asked = settings.corruptions or ()
    for kind in asked:
        if kind not in known:
            raise UserError(
                f"corruptions: there is no {kind!r}{nearest(kind, known)}; say all, or some of "
                f"{', '.join(known)}"
            )
    return asked


def check_damage(settings: EvaluationSettings) -> None:
    """Raises a UserError unless the damage that is asked for can be had; before any work."""
    for kind in kinds_of(settings):
        Damaged((), kind, settings.severities[0], mean=(0.0,), std=(1.0,))  # needs its package
    if settings.imagenet_c is not None:
        _folders(settings)


def check_images(groups: list[Group], settings: EvaluationSettings) -> None:
    """Raises a UserError unless the images can be damaged, if that is asked for."""
    for group in groups if settings.corruptions else ():
        height, width = group.config["input_size"][1:]
        if min(height, width) < LEAST_SIDE:
            raise UserError(
                f"corruptions: images must have at least {LEAST_SIDE} pixels a side to be damaged, "
                f"and {group.sides[0].evaluated.source} takes {height}x{width}"
            )
        if isinstance(group.dataset(), IterableDataset):
            raise UserError(
                "corruptions: the images of a stream have no numbers to damage them by; name a "
                "data set that is no stream (hfds/ for hfids/)"
            )


def _folders(settings: EvaluationSettings) -> dict[tuple[str, int], Path]:
    assert settings.imagenet_c is not None
    found = imagenet_c(settings.imagenet_c)
    chosen = {key: path for key, path in found.items() if key[1] in settings.severities}
    if not chosen:
        there = sorted({severity for _, severity in found})
        raise UserError(
            f"severities: {settings.imagenet_c} has {there}, got {list(settings.severities)}"
        )
    return chosen


def evaluate_damaged(
    groups: list[Group], sides: list[Side], settings: EvaluationSettings, processes: Processes
) -> dict[str, Any] | None:
    """All sides on every kind of damage at every severity, one pass for each.

    Returns:
        None where no damage is asked for. "source", "severities", "kinds"; "errors", error rates by
        kind, side and severity; "top1", their mean as accuracy, by side; "difference" to the first
        side with its standard error over images, by side; "mce" by side, where 1 is as good as
        "relative_to".
    """
    views = _views(settings)
    if not views:
        return None
    results = {
        (kind, severity): evaluate_groups(groups, view, settings, processes, f"{kind} {severity}")[
            0
        ]
        for (kind, severity), view in views.items()
    }
    kinds = list(dict.fromkeys(kind for kind, _ in views))
    severities = sorted({severity for _, severity in views})
    names = [side.name for side in sides]
    errors = {
        kind: {
            name: [1 - results[kind, s][name].top1 for s in severities if (kind, s) in results]
            for name in names
        }
        for kind in kinds
    }
    over_images = {name: _mean_over([results[key][name] for key in views]) for name in names}
    independent = groups[0].independent()
    mce, relative_to = _mce(errors, names, settings)
    return {
        "source": settings.imagenet_c or "damage done here, as in ImageNet-C",
        "severities": severities,
        "kinds": kinds,
        "errors": errors,
        "top1": {
            name: 1 - statistics.mean(statistics.mean(errors[kind][name]) for kind in kinds)
            for name in names
        },
        "difference": {
            name: paired(over_images[name], over_images[names[0]], independent)
            for name in names[1:]
        },
        "mce": mce,
        "relative_to": relative_to,
    }


def _views(settings: EvaluationSettings) -> dict[tuple[str, int], View]:
    """What shows a group each kind of damage at each severity."""
    if settings.imagenet_c is not None:
        folders = _folders(settings)
        return {key: partial(_of_folder, settings, folder) for key, folder in folders.items()}
    return {
        (kind, severity): partial(_damaged, kind, severity)
        for kind in kinds_of(settings)
        for severity in settings.severities
    }


def _damaged(kind: str, severity: int, group: Group) -> Any:
    config = group.config
    return Damaged(group.dataset(), kind, severity, mean=config["mean"], std=config["std"])


def _of_folder(settings: EvaluationSettings, folder: Path, group: Group) -> Any:
    # Its images are crops already: they are resized whole.
    data = open_for(group.sides[0].evaluated, settings, str(folder))
    return data.val_set({**group.config, "crop_pct": 1.0})


def _mean_over(found: list[Evaluation]) -> Evaluation:
    """One result whose `correct` is the share of the damages under which each image is right."""
    shared = set(found[0].index.tolist()).intersection(*(one.index.tolist() for one in found))
    index = torch.tensor(sorted(shared))
    rows = [one.correct[torch.searchsorted(one.index, index)].double() for one in found]
    return replace(found[0], correct=torch.stack(rows).mean(dim=0), index=index)


def _mce(
    errors: Mapping[str, Mapping[str, list[float]]],
    names: list[str],
    settings: EvaluationSettings,
) -> tuple[dict[str, float] | None, str | None]:
    """Mean corruption error of each side, and of whom it is relative to.

    AlexNet's rates are those of ImageNet-C's own images at all severities; otherwise the first side
    is what others are relative to, if there are others.
    """
    complete = all(len(kind[names[0]]) == len(SEVERITIES) for kind in errors.values())
    of_alexnet = settings.imagenet_c is not None and complete
    first = {kind: errors[kind][names[0]] for kind in errors}
    if not of_alexnet and (len(names) == 1 or not all(map(sum, first.values()))):
        return None, None  # relative to nothing, or to no errors
    baseline = None if of_alexnet else first
    found = {
        name: mean_corruption_error({kind: errors[kind][name] for kind in errors}, baseline)["mce"]
        for name in names
    }
    return found, ALEXNET if of_alexnet else names[0]
