"""An export from its settings to its file: what `spot export` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.config.export import ExportSettings
from spot_vit.config.fields import near_names
from spot_vit.export.formats import ENDINGS
from spot_vit.export.make import check_target, export_model
from spot_vit.export.opened import Exported, open_exported
from spot_vit.models.convert import set_keep
from spot_vit.runs.evaluated import load_evaluated, untrained
from spot_vit.utils.errors import UserError
from spot_vit.utils.folders import prepare


def export_checkpoint(
    settings: ExportSettings, say: Callable[[str], Any] = lambda text: None
) -> Exported:
    """Exports a model from a file, a run's folder, or timm's name.

    Args:
        settings: which model, at which budget, as what.
        say: is told each step.

    Returns:
        The file, opened.

    Raises:
        UserError: anything named in the settings is missing or does not fit, or the file does not
            give what the model gives; nothing is written then.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    target = Path(settings.output or _name(settings))
    check_target(target, settings.format, settings.force)
    prepare(target.parent)
    model = _model(settings)
    if settings.keep is not None or settings.attention_keep is not None:
        _set_budget(model, settings)
    path = export_model(
        model,
        target,
        settings.format,
        image_size=settings.img_size,
        batch_size=settings.batch_size,
        opset=settings.opset,
        force=settings.force,
        say=say,
    )
    return open_exported(path)


def describe(found: Exported) -> str:
    """What was written, what it gives, and what it needs, as text."""
    data = found.metadata
    budget = {"keep": data["keep"], "attention keep": data["attention_keep"]}
    parts = [data["architecture"], *(f"{k} {v}" for k, v in budget.items() if v is not None)]
    inputs, outputs = (
        ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in data[kind].items())
        for kind in ("inputs", "outputs")
    )
    return "\n".join(
        [
            f"{found.path}: {', '.join(parts)}, as {data['format']}",
            f"  takes {inputs} float32",
            f"  gives {outputs}",
            f"  needs {data['needs']}",
        ]
    )


def _name(settings: ExportSettings) -> str:
    """Name of the file where none is given: the checkpoint's."""
    path = Path(settings.checkpoint)
    stem = path.stem if path.is_file() else path.name
    compiled = ".aoti" if settings.format == "aoti" else ""
    return f"{stem}{compiled}{ENDINGS[settings.format]}"


def _model(settings: ExportSettings) -> Any:
    given: dict[str, Any] = {"img_size": settings.img_size, "num_classes": settings.num_classes}
    given = {name: value for name, value in given.items() if value is not None}
    if not settings.no_pretrained:
        asked = EvaluationSettings(
            checkpoint=settings.checkpoint,
            model=settings.model,
            model_kwargs=settings.model_kwargs,
            use_ema=settings.use_ema,
            **given,
        )
        return load_evaluated(settings.checkpoint, asked, settings.model).model
    name = settings.checkpoint
    if not timm.is_model(name):
        raise UserError(
            f"no_pretrained takes a model of timm, which knows no {name!r}"
            f"{near_names(name, timm.list_models())}"
        )
    return untrained(name, given.pop("img_size", None), **given, **settings.model_kwargs)


def _set_budget(model: Any, settings: ExportSettings) -> None:
    wanted = (("keep", "spot_config", "removes no tokens"),) * (settings.keep is not None)
    wanted += (("attention_keep", "sparsifiner_config", "has dense attention"),) * (
        settings.attention_keep is not None
    )
    for name, attribute, what in wanted:
        if not hasattr(model, attribute):
            raise UserError(
                f"{name}: {settings.checkpoint} ({type(model).__name__}) {what}, so it has no such "
                "budget"
            )
    keep: Any = settings.keep
    if keep is not None and len(keep) == 1:
        keep = keep[0]
    try:
        set_keep(model, tokens=keep, attention=settings.attention_keep)
    except (ValueError, TypeError) as error:
        raise UserError(f"keep: {error}") from error
