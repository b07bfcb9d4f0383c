"""Sparse models by name, for commands that look at what they keep."""

from __future__ import annotations

from typing import Any

from spot_vit.config.evaluation import EvaluationSettings
from spot_vit.config.methods import METHODS
from spot_vit.models.convert import set_keep, sparsify
from spot_vit.runs.evaluated import load_evaluated
from spot_vit.utils.errors import UserError


def load_sparse(source: str, keep: float | None = None) -> tuple[Any, str]:
    """A sparse model from a file, a run's folder, or timm's name.

    A dense model becomes sparse by the first method that needs no training.

    Args:
        source: which one.
        keep: share of tokens, the model's by default.

    Returns:
        The model in eval mode, and a sentence of what was done to it, or nothing.

    Raises:
        UserError: there is no such model, or it cannot be sparse.
    """
    settings = EvaluationSettings(checkpoint=source, data="-")
    model: Any = load_evaluated(source, settings, None).model
    note = ""
    try:
        if not hasattr(model, "spot_config"):
            free = next(row for row in METHODS.values() if not row.evidence and not row.by_chance)
            sparsify(model, method=free.name, keep=0.7 if keep is None else keep)
            note = f"{source} is dense: made sparse by {free.label}, which needs no training"
        elif keep is not None:
            set_keep(model, keep)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    return model.eval(), note
