"""An evaluation from its settings to its summary: what `spot eval` does."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.evaluation.accuracy import Evaluation
from spot_vit.evaluation.predictions import save_predictions
from spot_vit.evaluation.real_labels import check_names, real_accuracy, real_labels
from spot_vit.evaluation.report import as_table
from spot_vit.evaluation.sweep import Speed, gmacs_of, paired, speed_of
from spot_vit.runs.damaged import check_damage, check_images, evaluate_damaged
from spot_vit.runs.evaluated import load_evaluated, settings_of_run
from spot_vit.runs.processes import Processes, started
from spot_vit.runs.sides import Group, Side, clean, evaluate_groups, grouped, sides_of
from spot_vit.utils.errors import UserError
from spot_vit.utils.files import atomic_write, save_json
from spot_vit.utils.folders import prepare
from spot_vit.utils.machine import facts

_LARGEST_ON_CPU = 32  # images in a batch whose time is taken; more only take longer


def evaluate(settings: EvaluationSettings) -> dict[str, Any]:
    """Evaluates a model, and writes the files that are asked for.

    Under torchrun or `accelerate launch`, each process takes a share of the images; the first one
    writes.

    Args:
        settings: what to evaluate, and how.

    Returns:
        What the JSON file holds; `spot_vit.evaluation.report.describe` makes text of it.

    Raises:
        UserError: anything named in the settings is missing or does not fit; nothing is written.
    """
    began = time.perf_counter()
    for path in filter(None, (settings.output, settings.predictions)):
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder; name the file to write")
        prepare(Path(path).parent)
    settings = settings_of_run(settings)
    truth = _real_labels(settings)
    check_damage(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with started(settings.device) as processes:
        sides = _prepared(settings, processes)
        groups = grouped(sides, settings)
        _check_names(groups, truth)
        check_images(groups, settings)
        results, unreadable = evaluate_groups(
            groups, clean, settings, processes, "evaluate", kept=settings.predictions is not None
        )
        summary: dict[str, Any] = {
            "checkpoint": settings.checkpoint,
            "model": sides[-1].evaluated.label,
            "settings": settings.to_dict(),
            "data": _about_data(groups[-1], settings, results, unreadable),
            "preprocessing": {k: v for k, v in groups[-1].config.items() if k != "crop_mode"},
            "damage": evaluate_damaged(groups, sides, settings, processes),
        }
        speed = _speed(groups, settings, processes)
        summary |= {
            "rows": _rows(sides, groups, results, truth, speed),
            "per_class": _per_class(sides, groups, results),
            "speed": None if speed is None else {"batch": speed.batch, "busy": speed.busy},
            "machine": facts(processes.device) | {"processes": processes.world},
            "seconds": time.perf_counter() - began,
        }
        summary = _finite(summary)
        if processes.first:
            _write(summary, settings, groups, results)
    return summary


def _prepared(settings: EvaluationSettings, processes: Processes) -> list[Side]:
    """The sides on their device, compiled if that is asked for."""
    model = load_evaluated(settings.checkpoint, settings, settings.model)
    other = None
    if settings.baseline is not None:
        other = load_evaluated(settings.baseline, settings, None)
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    for one in filter(None, (model, other)):
        one.model.to(processes.device, memory_format=layout)
        if settings.compile:
            one.model.compile()
    return sides_of(model, other, settings)


def _real_labels(settings: EvaluationSettings) -> dict[str, list[int]] | None:
    if settings.real_labels is None:
        return None
    try:
        return real_labels(None if settings.real_labels == "timm" else settings.real_labels)
    except (OSError, ValueError) as error:
        raise UserError(f"real_labels: {error}") from error


def _check_names(groups: list[Group], truth: Mapping[str, list[int]] | None) -> None:
    """Raises a UserError where real labels are those of other images."""
    if truth is None:
        return
    data = groups[0].dataset()
    if not hasattr(data, "filename"):
        raise UserError("real_labels: these images have no file names to find their labels by")
    names = [data.filename(index) for index in range(len(data))]
    try:
        check_names(names, truth)
    except ValueError as error:
        raise UserError(f"real_labels: {error}") from error


def _about_data(
    group: Group,
    settings: EvaluationSettings,
    results: Mapping[str, Evaluation],
    unreadable: Mapping[str, str],
) -> dict[str, Any]:
    data = group.data
    return {
        "name": "random images" if settings.synthetic else settings.dataset or settings.data,
        "split": settings.split,
        "images": len(next(iter(results.values())).index),
        "num_classes": data.num_classes,
        "classes": data.classes,
        "multi_label": data.multi_label,
        "notes": data.notes,
        "left_out": data.left_out,
        "unreadable": dict(unreadable),
    }


def _speed(groups: list[Group], settings: EvaluationSettings, processes: Processes) -> Speed | None:
    """Measured by one process alone, on images of noise: their time does not depend on them."""
    if not settings.speed or processes.world > 1:
        return None
    size = settings.batch_size
    if processes.device.type == "cpu":
        size = min(size, _LARGEST_ON_CPU)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    models, images = {}, {}
    for group in groups:
        noise = torch.randn(size, *group.config["input_size"])
        noise = noise.to(processes.device, memory_format=layout)
        for side in group.sides:
            models[side.name], images[side.name] = side.model, noise
    return speed_of(models, images, settings.speed)


def _rows(
    sides: list[Side],
    groups: list[Group],
    results: Mapping[str, Evaluation],
    truth: Mapping[str, list[int]] | None,
    speed: Speed | None,
) -> list[dict[str, Any]]:
    reference = results[sides[0].name]
    of = {side.name: group for group in groups for side in group.sides}
    rows = []
    for side in sides:
        found, group = results[side.name], of[side.name]
        real = None if truth is None else real_accuracy(found, group.names(found), truth)
        rows.append(
            {
                "name": side.name,
                "model": side.evaluated.label,
                "source": side.evaluated.source,
                "keep": side.keep,
                "attention_keep": side.attention_keep,
                "images": len(found.index),
                "top1": found.top1,
                "top5": found.top5,
                "loss": found.loss,
                "mean_ap": found.mean_ap,
                "not_finite": found.not_finite,
                "difference": None
                if side is sides[0]
                else paired(found, reference, group.independent()),
                "real": real,
                "gmacs": gmacs_of(side.model, group.config["input_size"]),
                "images_per_second": speed and speed.images_per_second[side.name],
                "time_ratio": speed and speed.ratio.get(side.name),
            }
        )
    return rows


def _per_class(
    sides: list[Side], groups: list[Group], results: Mapping[str, Evaluation]
) -> list[dict[str, Any]]:
    """Images and shares of each class, by its name."""
    counted: dict[str, dict[str, Any]] = {}
    of = {side.name: group for group in groups for side in group.sides}
    for side in sides:
        names = of[side.name].class_names(results[side.name].num_classes)
        for name, (images, share) in zip(names, results[side.name].per_class(), strict=True):
            entry = counted.setdefault(name, {"class": name, "images": images, "shares": {}})
            entry["shares"][side.name] = share
    return [one for one in counted.values() if len(one["shares"]) == len(sides)]


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(
    summary: Mapping[str, Any],
    settings: EvaluationSettings,
    groups: list[Group],
    results: Mapping[str, Evaluation],
) -> None:
    if settings.as_csv:
        rows = as_table(summary)
        with atomic_write(settings.output) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        save_json(settings.output, summary)
    if settings.predictions is not None:
        classes = {
            side.name: group.class_names(results[side.name].num_classes)
            for group in groups
            for side in group.sides
        }
        save_predictions(settings.predictions, results, groups[0].filename, classes)
